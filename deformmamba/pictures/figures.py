"""Figures of results for radiologists.

Rules for every figure: all panels share one grey window, chosen from the reference image and never from a result. All
show the same physical field with pixels of their true shape, so that on the origin-aligned grid LR pixel i is drawn
centred on HR pixel scale * i. The whole image marks the zoomed region. Each figure states that this is not a medical
device.

Images are (h, w) arrays in display order, row 0 on top: `oriented` turns a slice of a volume to this order.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deformmamba.annotations import check_types
from deformmamba.errors import InvalidArgument
from deformmamba.metrics import psnr, ssim
from deformmamba.pictures.lettering import (
    DPI,
    MARGIN,
    NOTE_LINE,
    NOTE_SIZE,
    TITLE_LINE,
    TITLE_SIZE,
    note_height,
    note_lines,
    save_figure,
    title_height,
    title_lines,
)
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, chosen_axis, in_plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
STATEMENT = "Research software, not a medical device. Detail beyond the input is estimated, not measured."

_PAPER, _INK, _MUTED, _ACCENT = "#ffffff", "#1a1a1a", "#666666", "#f5b301"
_PANEL, _GAP, _TOP, _BOTTOM = 3.0, 0.12, 0.85, 0.35  # inches


class Slice(NamedTuple):
    """A slice in display order.

    Attributes:
        image: (h, w), row 0 on top.
        spacing: mm between rows and between columns.
        labels: patient directions at the left, right, top and bottom edge; empty if unknown.
    """

    image: np.ndarray
    spacing: tuple[float, float]
    labels: tuple[str, str, str, str]


def oriented(volume: Volume, axis: int, index: int) -> Slice:
    """One slice of a volume in radiological orientation.

    Axial slices are seen from below (the patient's right is on the left, the front on top), coronal slices from the
    front (right on the left, head on top). Sagittal slices have the front on the left and the head on top. An oblique
    slice is shown like the nearest of the three. A volume without an orientation is shown in array order, without
    labels.
    """
    check_types(oriented, locals())
    if not 0 <= index < volume.array.shape[chosen_axis(volume, axis)]:
        raise VolumeError(f"there is no slice {index} across axis {axis} of {volume!r}")
    return oriented_like(np.moveaxis(volume.array, axis, 0)[index], volume, axis)


def oriented_like(image: np.ndarray, volume: Volume, axis: int) -> Slice:
    """`image` (h, w) turned as `oriented` turns a slice of `volume` across `axis`; only the geometry of `volume` is
    used."""
    first, second = in_plane(axis)
    spacing = volume.spacing[first], volume.spacing[second]
    if not any(volume.codes):
        return Slice(np.ascontiguousarray(image), spacing, ("", "", "", ""))
    directions = volume.affine[:3, [first, second]] / spacing
    # the world axis left out by the slice: 0 sagittal, 1 coronal, 2 axial
    normal = int(np.argmax(np.abs(np.cross(directions[:, 0], directions[:, 1]))))
    across, down = [w for w in (0, 1, 2) if w != normal]  # x before y before z: the horizontal axis comes first
    if np.abs(directions[down, 0]) < np.abs(directions[down, 1]):
        image, directions, spacing = image.T, directions[:, ::-1], spacing[::-1]
    # rows must run towards the back (A to P) or the feet (S to I), columns towards the left (R to L) or the back
    if directions[down, 0] > 0:
        image = image[::-1]
    if directions[across, 1] > 0:
        image = image[:, ::-1]
    names = (("R", "L"), ("A", "P"), ("S", "I"))
    labels = (*names[across], *names[down])
    return Slice(np.ascontiguousarray(image), spacing, labels)


def before_after(
    lr: np.ndarray,
    results: Mapping[str, np.ndarray],
    path: PathLike,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    labels: Sequence[str] = ("", "", "", ""),
    grid: str = "origin",
    zoom: tuple[float, float, float] | None = None,
    title: str = "",
    note: str = "",
) -> None:
    """Draws the input, with pixels as measured, beside each of `results`: whole, and zoomed into the same region.

    Args:
        lr: (h, w), the input.
        results: title to (scale * h, scale * w) image, from left to right.
        path: .png, .pdf or .svg.
        spacing: mm between rows and between columns of `lr`.
        labels: see `Slice`.
        grid: position of the results relative to the input, see `deformmamba.physics.kspace.Grid`.
        zoom: (row, column, size) of the zoomed square's centre and side in LR pixels; None: a region full of edges.
        title: above the panels.
        note: below the panels: provenance of the results, and warnings, each in its own lines (see `note_lines`).

    Raises:
        VolumeError: `path` cannot be written.
        ValueError: no results.
    """
    check_types(before_after, locals())
    check_output(path, SUFFIXES)
    if not results:
        raise InvalidArgument("before_after: no result given; give at least one")
    region = zoom or _busiest(list(results.values())[-1], lr.shape)
    images = {"input": lr, **results}
    heights = [_aspect(lr.shape, spacing), 1.0]
    figure, panels = new_figure(len(images), heights, title, note)
    window = grey_window(lr)
    for column, (name, image) in enumerate(images.items()):
        scale = image.shape[0] / lr.shape[0]
        rows, columns = (round(s / scale, 3) for s in spacing)
        for row in (0, 1):
            _show(panels[row, column], image, scale, spacing, grid, window)
        caption(panels[0, column], name, f"{image.shape[1]} × {image.shape[0]} px, {columns:g} × {rows:g} mm")
        _edges(panels[0, column], labels)
        _zoom(panels[0, column], panels[1, column], region, lr.shape, spacing)
    save(figure, path, title, note)


def comparison(
    hr: np.ndarray,
    results: Mapping[str, np.ndarray],
    path: PathLike,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    zoom: tuple[float, float, float] | None = None,
    title: str = "",
) -> None:
    """Draws the truth beside each result: whole, zoomed, and the absolute error on one shared colour scale.

    PSNR and SSIM below each result are of this slice, with the slice's maximum as data range (protocol "slice").

    Args:
        hr: (h, w), the truth.
        results: title to image of the same size.
        path: .png, .pdf or .svg.
        spacing: mm between rows and between columns of `hr`.
        zoom: (row, column, size) of the zoomed square's centre and side in pixels; None: a region full of edges.

    Raises:
        VolumeError: `path` cannot be written.
        ValueError: no results, or one of another size.

    Source: figure 2 of the paper.
    """
    check_types(comparison, locals())
    check_output(path, SUFFIXES)
    if not results or any(image.shape != hr.shape for image in results.values()):
        raise InvalidArgument(f"comparison: give at least one result; every result must have the size {hr.shape} of hr")
    region = zoom or _busiest(hr, hr.shape)
    aspect = _aspect(hr.shape, spacing)
    figure, panels = new_figure(len(results) + 1, [aspect, 1.0, aspect], title, below=0.35)
    window, peak = grey_window(hr), float(hr.max()) or 1.0
    errors = {name: np.abs(image - hr) / peak for name, image in results.items()}
    worst = max(float(np.percentile(error, 99.7)) for error in errors.values()) or 1.0
    scores = {name: [metric(image, hr, protocol="slice") for metric in (psnr, ssim)] for name, image in results.items()}
    best = [max(values) for values in zip(*scores.values(), strict=True)]
    for column, (name, image) in enumerate([("truth", hr), *results.items()]):
        for row in (0, 1):
            _show(panels[row, column], image, 1, spacing, "origin", window)
        _zoom(panels[0, column], panels[1, column], region, hr.shape, spacing, marked=column == 0)
        caption(panels[0, column], name)
        if column:
            _show(panels[2, column], errors[name], 1, spacing, "origin", (0, worst), "inferno")
            for side, value, digits, highest in zip((-1, 1), scores[name], (2, 4), best, strict=True):
                _below(panels[2, column], side, f"{value:.{digits}f}" + " dB" * (side < 0), bold=value == highest)
    for axes in panels[2, 1:]:
        axes.annotate("/", (0.5, 0), (0, -13), "axes fraction", "offset points", fontsize=11, color=_MUTED, ha="center")
    key = panels[2, 0]
    key.set_axis_off()
    bar = figure.colorbar(panels[2, 1].images[0], cax=key.inset_axes((0.88, 0.02, 0.06, 0.96)), extend="max")
    bar.ax.yaxis.set_ticks_position("left")
    bar.ax.tick_params(labelsize=9, colors=_INK)
    words: dict[str, Any] = {"transform": key.transAxes, "fontsize": 9, "color": _INK}
    key.text(0.6, 0.5, "absolute error\n(1 = maximum of the truth)", rotation=90, ha="center", va="center", **words)
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9, "color": _MUTED, "ha": "right"}
    key.annotate("PSNR / SSIM of this slice,\ndata range its own maximum", (0.94, 0), (0, -24), **above)
    save(figure, path, title)


def _aspect(shape: tuple[int, ...], spacing: tuple[float, float]) -> float:
    """Height of the panel of a whole image, relative to its width; limited for a whole spine."""
    return min(max(shape[0] * spacing[0] / (shape[1] * spacing[1]), 0.4), 1.6)


def new_figure(
    n_columns: int, heights: Sequence[float], title: str, note: str = "", *, left: float = MARGIN, below: float = 0.0
) -> tuple["Figure", Any]:
    """A figure without pyplot (no window, no global state), with room for the text that `save` adds, and its panels.

    Args:
        n_columns: panels in a row.
        heights: of the panels of each row, relative to their width.
        left: inches to the left of the panels.
        below: inches for text directly below the last row.
    """
    from matplotlib.figure import Figure

    width = _PANEL * n_columns + _GAP * (n_columns - 1) + left + MARGIN
    top, bottom = _TOP + title_height(title, width), _BOTTOM + below + note_height(note, width)
    height = _PANEL * sum(heights) + _GAP * (len(heights) - 1) + top + bottom
    figure = Figure(figsize=(width, height), facecolor=_PAPER, dpi=DPI)
    panels = figure.subplots(len(heights), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(
        left=left / width,
        right=1 - MARGIN / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=_GAP / _PANEL,
        hspace=_GAP * len(heights) / (sum(heights) * _PANEL),
    )
    return figure, panels


def _show(
    axes: "Axes",
    image: np.ndarray,
    scale: float,
    spacing: tuple[float, float],
    grid: str,
    window: tuple[float, float],
    colours: str = "gray",
) -> None:
    """`image` in mm: the centre of LR pixel (0, 0) is the origin, and every pixel is a sharp-edged rectangle."""
    first = 0.0 if grid == "origin" else -(1 - 1 / scale) / 2
    (top, bottom), (left, right) = (
        ((first - 0.5 / scale) * mm, (first + (n - 0.5) / scale) * mm)
        for n, mm in zip(image.shape, spacing, strict=True)
    )
    low, high = window
    extent = (left, right, bottom, top)
    axes.imshow(image, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest", aspect="equal")
    axes.set_facecolor("black")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _zoom(
    whole: "Axes",
    detail: "Axes",
    region: tuple[float, float, float],
    shape: tuple[int, ...],
    spacing: tuple[float, float],
    marked: bool = True,
) -> None:
    """Cuts the whole image to the reference's field, draws the square in it, and cuts the detail to the square."""
    from matplotlib.patches import Rectangle

    row, column, size = region
    side = size * min(spacing)
    (top, left) = (
        min(max(centre * mm - side / 2, -mm / 2), (n - 0.5) * mm - side)
        for centre, n, mm in zip((row, column), shape, spacing, strict=True)
    )
    if marked:
        whole.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=_ACCENT, linewidth=1.2))
    whole.set_xlim(-spacing[1] / 2, (shape[1] - 0.5) * spacing[1])
    whole.set_ylim((shape[0] - 0.5) * spacing[0], -spacing[0] / 2)
    detail.set_xlim(left, left + side)
    detail.set_ylim(top + side, top)
    for edge in detail.spines.values():
        edge.set(visible=True, edgecolor=_ACCENT, linewidth=1.2)


def caption(axes: "Axes", name: str, detail: str = "") -> None:
    """The name of a panel above it, and below the name a detail such as the voxel size."""
    above: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(name, xytext=(0, 17 if detail else 5), fontsize=11, color=_INK, fontweight="bold", **above)
    if detail:
        axes.annotate(detail, xytext=(0, 5), fontsize=8.5, color=_MUTED, **above)


def _below(axes: "Axes", side: int, text: str, *, bold: bool) -> None:
    """A score under a panel, left (-1) or right (1) of its middle."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": _INK, "fontsize": 11}
    weight, aligned = ("bold" if bold else "normal"), ("right" if side < 0 else "left")
    axes.annotate(text, (0.5, 0), (side * 6, -13), ha=aligned, fontweight=weight, **place)


def _edges(axes: "Axes", labels: Sequence[str]) -> None:
    """Patient directions at the left, right, top and bottom edge, legible on any grey."""
    from matplotlib.patheffects import withStroke

    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    aligned = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for text, (x, y), (ha, va) in zip(labels, places, aligned, strict=True):
        outline = [withStroke(linewidth=2, foreground="black")]
        axes.text(x, y, text, transform=axes.transAxes, fontsize=9, color="white", ha=ha, va=va, path_effects=outline)


def grey_window(reference: np.ndarray) -> tuple[float, float]:
    """The values of black and white, independent of a single voxel such as a marker or a padding value.

    White is the 99.7th percentile of the non-zero values above black. Black is the 0.3rd percentile: negative for a
    signed image, above 0 for a scan with an offset. It is 0 if the percentile is above 0 by less than a tenth of white,
    as in a scan with noise in air.
    """
    low = float(np.percentile(reference, 0.3, method="higher"))
    values = reference[(reference > low) & (reference != 0)]
    high = float(np.percentile(values, 99.7, method="lower")) if values.size else low
    low = 0.0 if 0 < low < high / 10 else low
    return low, high if high > low else low + 1.0


def _busiest(image: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """(row, column, size) in pixels of an image of `shape`: a square a quarter as wide, full of edges."""
    size = min(max(8, min(shape) // 4), *shape)
    scale = image.shape[0] / shape[0]
    down, across = np.gradient(np.asarray(image, dtype=np.float64))
    strength = np.hypot(down, across)
    # else a bright rim of skin and fat would be chosen
    strength = np.minimum(strength, np.percentile(strength[strength > 0], 95)) if strength.any() else strength + 1
    window = max(1, round(size * scale))
    total = np.pad(strength.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[window:, window:] - total[:-window, window:] - total[window:, :-window] + total[:-window, :-window]
    rows, columns = (np.linspace(-1, 1, n) for n in sums.shape)
    towards_centre = np.exp(-2 * (rows[:, None] ** 2 + columns[None, :] ** 2))
    row, column = np.unravel_index(int(np.argmax(sums * towards_centre)), sums.shape)
    return (float(row) + window / 2) / scale, (float(column) + window / 2) / scale, float(size)


def save(figure: "Figure", path: PathLike, title: str, note: str = "") -> None:
    """Adds title, note and statement to a figure of `new_figure`, and writes it; the file appears when it is complete.

    Warnings in the note are dark; other text below the panels is grey.
    """
    width, height = figure.get_figwidth(), figure.get_figheight()
    # a file's name may hold dollar signs that look like a formula
    words: dict[str, Any] = {"x": MARGIN / width, "parse_math": False}
    for k, line in enumerate(title_lines(title, width)):
        y = 1 - (0.14 + TITLE_LINE * k) / height
        figure.text(y=y, s=line, fontsize=TITLE_SIZE, color=_INK, va="top", fontweight="bold", **words)
    for k, (line, is_warning) in enumerate(reversed(note_lines(note, width))):
        y, colour = (0.3 + NOTE_LINE * k) / height, _INK if is_warning else _MUTED
        figure.text(y=y, s=line, fontsize=NOTE_SIZE, color=colour, va="bottom", **words)
    figure.text(y=0.12 / height, s=STATEMENT, fontsize=7.5, color=_MUTED, va="bottom", **words)
    save_figure(figure, path, facecolor=_PAPER)
