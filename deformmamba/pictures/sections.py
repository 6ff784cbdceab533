"""A figure of sections across the slices, before and after super-resolution along the slice direction."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from deformmamba.pictures.figures import SUFFIXES, caption, grey_window, new_figure, oriented, oriented_like, save
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, in_plane

_NAMES = ("sagittal", "coronal", "axial")
_OUTSIDE = "#d3dfea"  # not a grey, which would be an intensity


class _Section(NamedTuple):
    """A section in display order, with the positions of its edges in mm (0: the centre of the input's first voxel)."""

    image: np.ndarray
    left: float
    right: float
    bottom: float
    top: float


def section_figure(
    volumes: Mapping[str, Volume], path: PathLike, *, axis: int, title: str = "", note: str = ""
) -> None:
    """Draws the middle sections along both in-plane axes of each volume, in mm (sagittal and coronal for axial scans).

    All panels of a row show the same region of the world, which holds every volume. Where a volume has no voxels, its
    panel is light blue.

    Args:
        volumes: name to volume, from left to right, the input first; with parallel axes in the same order. The affines
            decide where each is drawn.
        path: .png, .pdf or .svg.
        axis: where slices are stacked.
        note: below the panels: provenance of the results, and warnings, each in its own lines.

    Raises:
        VolumeError: `path` cannot be written, or there is no volume.
    """
    check_output(path, SUFFIXES)
    if not volumes:
        raise VolumeError(f"{path}: no volume to draw; give at least one")
    first = next(iter(volumes.values()))
    window = grey_window(first.array)
    rows = [[_section(volume, first, across) for volume in volumes.values()] for across in in_plane(axis)]
    limits = [_limits(sections) for sections in rows]
    heights = [abs(top - bottom) / abs(right - left) for left, right, bottom, top in limits]
    figure, panels = new_figure(len(volumes), heights, title, note, left=0.4)
    for row, (across, sections) in enumerate(zip(in_plane(axis), rows, strict=True)):
        left, right, bottom, top = limits[row]
        for axes, (image, *extent) in zip(panels[row], sections, strict=True):
            axes.imshow(
                np.clip(image, *window), cmap="gray", vmin=window[0], vmax=window[1],
                extent=extent, interpolation="nearest", aspect="equal",
            )  # fmt: skip
            axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor=_OUTSIDE)
            for edge in axes.spines.values():
                edge.set_visible(False)
        if any(first.codes):
            panels[row, 0].set_ylabel(_section_name(first, across), fontsize=9)
    for axes, (name, volume) in zip(panels[0], volumes.items(), strict=True):
        caption(axes, name, " × ".join(f"{side:.3g}" for side in volume.spacing) + " mm")
    save(figure, path, title, note)


def _section(volume: Volume, first: Volume, across: int) -> _Section:
    """The section of `volume` that is nearest to the middle of `first` across an axis."""
    to_first = np.linalg.inv(first.affine) @ volume.affine  # voxel index to voxel index of `first`
    n = volume.array.shape[across]
    middle = (first.array.shape[across] // 2 - to_first[across, 3]) / to_first[across, across]
    image = oriented(volume, across, min(max(round(middle), 0), n - 1)).image
    edges = [
        (to_first[a, a] * np.array([-0.5, volume.array.shape[a] - 0.5]) + to_first[a, 3]) * first.spacing[a]
        for a in in_plane(across)
    ]
    # the positions of the four corners are turned like the section, so that they follow each flip
    one, other = (oriented_like(corners, volume, across).image for corners in np.meshgrid(*edges, indexing="ij"))
    down, right = (one, other) if one[0, 0] != one[1, 0] else (other, one)
    return _Section(image, right[0, 0], right[0, 1], down[1, 0], down[0, 0])


def _limits(sections: list[_Section]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the smallest region that holds all sections."""

    def span(starts: list[float], ends: list[float]) -> tuple[float, float]:
        low, high = min(*starts, *ends), max(*starts, *ends)
        return (low, high) if starts[0] < ends[0] else (high, low)

    left, right = span([s.left for s in sections], [s.right for s in sections])
    bottom, top = span([s.bottom for s in sections], [s.top for s in sections])
    return left, right, bottom, top


def _section_name(volume: Volume, across: int) -> str:
    """The name of a section across an axis."""
    direction = np.abs(volume.affine[:3, across])
    return _NAMES[int(np.argmax(direction))]
