"""A figure of sections across the slices, before and after super-resolution along the slice direction."""

from collections.abc import Mapping

import numpy as np

from deformmamba.pictures.figures import SUFFIXES, grey_window, oriented, save
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, in_plane

_NAMES = ("sagittal", "coronal", "axial")


def section_figure(
    volumes: Mapping[str, Volume], path: PathLike, *, axis: int, title: str = "", note: str = ""
) -> None:
    """Draws the middle sections along both in-plane axes of each volume, in mm (sagittal and coronal for axial scans).

    Args:
        volumes: name to volume, from left to right, the input first; all at the same position in the world.
        path: .png, .pdf or .svg.
        axis: where slices are stacked.
        note: below the panels: provenance of the results, and warnings.

    Raises:
        VolumeError: `path` cannot be written, or there is no volume.
    """
    from matplotlib.figure import Figure

    check_output(path, SUFFIXES)
    if not volumes:
        raise VolumeError(f"{path}: no volume to draw; give at least one")
    first = next(iter(volumes.values()))
    window = grey_window(first.array)
    rows = in_plane(axis)
    sizes = [[n * mm for n, mm in zip(first.array.shape, first.spacing, strict=True)][a] for a in range(3)]
    heights = []
    for across in rows:
        seen = oriented(first, across, first.array.shape[across] // 2)
        height, width = (n * mm for n, mm in zip(seen.image.shape, seen.spacing, strict=True))
        heights.append(height / width)
    wide, gap = 3.4, 0.35
    size = wide * len(volumes) + 0.2, wide * sum(heights) + gap * 3 + 0.5
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    panels = figure.subplots(2, len(volumes), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, across in enumerate(rows):
        place = sizes[across] / 2  # mm from the centre of the first voxel
        for column, (name, volume) in enumerate(volumes.items()):
            k = min(round(place / volume.spacing[across]), volume.array.shape[across] - 1)
            seen = oriented(volume, across, k)
            height, width = (n * mm for n, mm in zip(seen.image.shape, seen.spacing, strict=True))
            axes = panels[row, column]
            axes.imshow(
                np.clip(seen.image, *window), cmap="gray", vmin=window[0], vmax=window[1],
                extent=(0, width, height, 0), interpolation="nearest", aspect="equal",
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                mm = " x ".join(f"{side:.3g}" for side in volume.spacing)
                axes.set_title(f"{name}\n{mm} mm", fontsize=9)
            if column == 0 and any(volume.codes):
                axes.set_ylabel(_section(volume, across), fontsize=9)
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1 - 0.4 / height))
    save(figure, path, title, note)


def _section(volume: Volume, across: int) -> str:
    """The name of a section across an axis."""
    direction = np.abs(volume.affine[:3, across])
    return _NAMES[int(np.argmax(direction))]
