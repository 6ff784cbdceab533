"""Writes one self-contained HTML report of an upscaled scan, for visual checks.

The page works offline and makes no request: pictures are embedded. Apart from the pictures it holds no patient
data: no header, no tag, and the file's name only if the caller includes it in the facts.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.annotations import check_types
from deformmamba.physics.kspace import fft2c
from deformmamba.pictures.figures import STATEMENT, grey_window, oriented, oriented_like
from deformmamba.volume import PathLike, Volume, VolumeError, check_output, in_plane, write_text
from deformmamba.volume.inspection import Inspection, evenly, inspect_volume

SUFFIXES = (".html",)

_MAX_SLICES = 40
_BUDGET = 13_000_000  # bytes of pictures; base64 makes 17 MB of them
_QUALITY = 92  # of JPEG
_DECADES = 5.0
# colours at even steps, dark for zero: below and above zero; small to large
_DIVERGING = ((120, 196, 255), (30, 90, 160), (10, 12, 14), (165, 90, 20), (255, 205, 120))
_SEQUENTIAL = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))


def write_report(
    path: PathLike,
    before: Volume,
    after: Volume,
    *,
    axis: int,
    grid: str,
    facts: Mapping[str, str],
    uncertainty: Volume | None = None,
    cautions: Sequence[str] = (),
) -> None:
    """Write the page: slices of input and output to scroll, compare and zoom, maps, k-space, and provenance.

    The input is interpolated (bicubic) to the voxels of the output, with the two affines. Slices are evenly spaced, as
    many as keep the page below about 20 MB, at most 40. Pictures are 8-bit JPEG in one grey window, from the input.
    Difference (output minus interpolated input) and uncertainty have colour bars in the scan's units.

    Args:
        path: .html; replaced if it exists.
        before: the input of the model.
        after: the output, with the same number of slices.
        axis: where slices are stacked.
        grid: position of the output relative to the input, "origin" or "half-pixel"; stated on the page.
        facts: provenance, one name and value per line, in this order: model, version, hash, time, settings, and the
            file's name if it may be shown.
        uncertainty: a standard deviation for each voxel of the output, in its units.
        cautions: reasons why the output may be worse than reported; shown at the top, below "model" and "version".

    Raises:
        VolumeError: `path` cannot be written, or the three volumes do not belong together.
    """
    check_types(write_report, locals())
    check_output(path, SUFFIXES)
    _check_fit(before, after, uncertainty, axis)
    found = inspect_volume(before, axis=axis)
    page = _Pictures(before, after, uncertainty, axis)
    n = before.array.shape[axis]
    chosen, pictures = _chosen_slices(page, n)
    grids = {
        "origin": "origin-aligned: the first voxels of input and output have the same centre",
        "half-pixel": "half-pixel: the outer edges of input and output coincide",
    }
    listed = {**facts, "input": _sizes(before), "output": _sizes(after), "grid": grids.get(grid, grid)}
    shown = "All" if len(chosen) == n else f"{len(chosen)} of"
    text = Template(files("deformmamba.pictures").joinpath("report.html").read_text("utf-8")).substitute(
        statement=escape(STATEMENT),
        banner=escape(", ".join(facts[name] for name in ("model", "version") if name in facts)),
        cautions="".join(f'<p class="statement" role="alert">Warning: {escape(text)}.</p>' for text in cautions),
        shown=escape(
            f"{shown} {n} slices, 8 bits, JPEG, for viewing only; the result is the output file. Input and output "
            f"share one grey window, {page.window[0]:.4g} to {page.window[1]:.4g}, set by the input."
        ),
        filled=escape(f"Input: {found.filling}."),
        spectra=_spectra(before, after, axis, n // 2, found),
        middle=str(n // 2 + 1),
        dashed="; dashed frame: the part that is filled" if found.interpolated else "",
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in listed.items()),
        data=json.dumps(_viewer_data(page, after, axis, chosen, pictures)).replace("<", "\\u003c"),
    )
    write_text(path, text)


def _check_fit(before: Volume, after: Volume, uncertainty: Volume | None, axis: int) -> None:
    """Raises VolumeError unless input, output and uncertainty belong together."""
    n = before.array.shape[axis]
    if after.array.shape[axis] != n:
        raise VolumeError(f"report: the output has {after.array.shape[axis]} slices across axis {axis}, the input {n}")
    if uncertainty is not None and uncertainty.array.shape != after.array.shape:
        raise VolumeError(
            f"report: uncertainty {uncertainty.array.shape} must have the shape of the output {after.array.shape}"
        )


def _chosen_slices(page: "_Pictures", n: int) -> tuple[list[int], list[list[bytes]]]:
    """Evenly spaced slices, as many as fit on the page, and the pictures of each."""
    middle = n // 2
    first = page.slice(middle)
    fit = int(_BUDGET / (1.25 * sum(map(len, first))))
    chosen = evenly(n, min(_MAX_SLICES, max(fit, 3)))
    return chosen, [first if k == middle else page.slice(k) for k in chosen]


def _viewer_data(
    page: "_Pictures", after: Volume, axis: int, chosen: list[int], pictures: list[list[bytes]]
) -> dict[str, Any]:
    """The data for the page's script: slices, sizes in mm, directions at the edges, panels with their pictures."""
    n = after.array.shape[axis]
    seen = oriented(after, axis, n // 2)
    return {
        "slices": chosen,
        "n_slices": n,
        "start": int(np.argmin(np.abs(np.array(chosen) - n // 2))),
        "size_mm": [size * mm for size, mm in zip(seen.image.shape, seen.spacing, strict=True)],
        "edges": seen.labels if any(seen.labels) else [],
        "panels": [
            panel | {"pictures": [_base64(slices[i]) for slices in pictures]} for i, panel in enumerate(page.panels)
        ],
    }


class _Pictures:
    """The images of the panels, and a slice of each as JPEG."""

    def __init__(self, before: Volume, after: Volume, uncertainty: Volume | None, axis: int) -> None:
        self.before, self.after, self.uncertainty, self.axis = before, after, uncertainty, axis
        self.window = grey_window(before.array)
        n = after.array.shape[axis]
        sample = evenly(n, 9)[1 if n > 2 else 0 :]
        self.change = _magnitude_limit(
            np.stack([_plane(after, axis, k) - _interpolated(before, after, axis, k) for k in sample])
        )
        self.panels: list[dict[str, Any]] = [
            {"title": "Input", "detail": f"interpolated (bicubic) from {_pixels(before, axis)}"},
            {"title": "Output", "detail": _pixels(after, axis)},
            {
                "title": "Difference",
                "detail": "output minus interpolated input",
                "colours": _DIVERGING,
                "low": f"−{self.change:.3g}",
                "high": f"+{self.change:.3g} in the scan's units",
            },
        ]
        if uncertainty is not None:
            self.spread = _magnitude_limit(uncertainty.array.take(sample, axis))
            self.panels.append(
                {
                    "title": "Uncertainty",
                    "detail": "spread of the estimates, standard deviation",
                    "colours": _SEQUENTIAL,
                    "low": "0",
                    "high": f"{self.spread:.3g} in the scan's units",
                }
            )

    def slice(self, k: int) -> list[bytes]:
        before, after = _interpolated(self.before, self.after, self.axis, k), _plane(self.after, self.axis, k)
        images = [
            _bytes(before, *self.window),
            _bytes(after, *self.window),
            _bytes(after - before, -self.change, self.change),
        ]
        if self.uncertainty is not None:
            images.append(_bytes(_plane(self.uncertainty, self.axis, k), 0, self.spread))
        return [_jpeg(oriented_like(image, self.after, self.axis).image) for image in images]


def _plane(volume: Volume, axis: int, k: int) -> np.ndarray:
    return np.asarray(volume.array.take(k, axis), np.float32)


def _interpolated(before: Volume, after: Volume, axis: int, k: int) -> np.ndarray:
    """Slice k of the input at the voxels of the output, bicubic; the nearest edge outside the input."""
    image = torch.from_numpy(_plane(before, axis, k))
    to_before = np.linalg.inv(before.affine) @ after.affine
    first, second = in_plane(axis)
    rows, columns = (
        torch.from_numpy(to_before[a, a] * np.arange(after.array.shape[a]) + to_before[a, 3]) for a in (first, second)
    )
    h, w = image.shape
    # grid_sample's -1 to 1 run between the centres of the outer pixels
    y, x = (2 * at / max(n - 1, 1) - 1 for at, n in ((rows, h), (columns, w)))
    where = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).float()
    out = F.grid_sample(image[None, None], where[None], mode="bicubic", padding_mode="border", align_corners=True)
    return np.asarray(out[0, 0].numpy())


def _magnitude_limit(values: np.ndarray) -> float:
    """The upper end of a colour bar of magnitudes."""
    return float(np.percentile(np.abs(values), 99.5)) or float(np.abs(values).max()) or 1.0


def _bytes(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _base64(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def _spectra(before: Volume, after: Volume, axis: int, k: int, found: Inspection) -> str:
    """Two figures: log magnitude of the spectrum, before and after, both in the frame of the output."""
    turned = _is_transposed(before, axis)
    frame = _seen(after, axis, k).shape
    levels = [_log_spectrum(_seen(volume, axis, k)) for volume in (before, after)]
    top = levels[0].max()
    held: Sequence[int] = levels[0].shape
    filled = found.effective[::-1] if turned else found.effective
    height, width = (n * mm for n, mm in zip(frame, oriented(after, axis, k).spacing, strict=True))
    figures = []
    for title, level in zip(("Input", "Output"), levels, strict=True):
        picture = np.zeros(frame, np.uint8)
        (top_row, rows), (left, columns) = (
            (max(n // 2 - m // 2, 0), min(m, n)) for n, m in zip(frame, level.shape, strict=True)
        )
        picture[top_row : top_row + rows, left : left + columns] = _bytes(level[:rows, :columns], top - _DECADES, top)
        boxes = _box("box", held, frame)
        if found.interpolated and title == "Input":
            boxes += _box("box found", filled, frame)
        # drawn in cycles per mm, because finer pixels mean a wider k-space
        shape = f"aspect-ratio: {frame[1] / width:.6g} / {frame[0] / height:.6g}"
        figures.append(
            f'<figure><figcaption><strong>{title}</strong></figcaption><div class="stage" style="{shape}">'
            f'<img alt="k-space of the {title.lower()}" src="data:image/jpeg;base64,{_base64(_jpeg(picture))}">'
            f"{boxes}</div></figure>"
        )
    return "".join(figures)


def _seen(volume: Volume, axis: int, k: int) -> np.ndarray:
    return oriented(volume, axis, k).image


def _log_spectrum(image: np.ndarray) -> np.ndarray:
    magnitude = fft2c(torch.from_numpy(np.array(image, np.float64))).abs().numpy()
    return np.log10(np.maximum(magnitude, magnitude.max() * 1e-12 or 1.0))


def _is_transposed(volume: Volume, axis: int) -> bool:
    """Whether a slice is shown with the array's first axis across."""
    rows = np.arange(2.0)[:, None].repeat(2, 1)
    return bool(np.ptp(oriented_like(rows, volume, axis).image[:, 0]) == 0)


def _box(name: str, size: Sequence[int], frame: Sequence[int]) -> str:
    height, width = (min(100.0, 100 * m / n) for m, n in zip(size, frame, strict=True))
    place = f"left:{50 - width / 2:.3f}%;top:{50 - height / 2:.3f}%;width:{width:.3f}%;height:{height:.3f}%"
    return f'<div class="{name}" style="{place}"></div>'


def _pixels(volume: Volume, axis: int) -> str:
    first, second = in_plane(axis)
    return (
        f"{volume.array.shape[first]} × {volume.array.shape[second]} px of "
        f"{volume.spacing[first]:.3g} × {volume.spacing[second]:.3g} mm"
    )


def _sizes(volume: Volume) -> str:
    shape = " × ".join(map(str, volume.array.shape))
    return f"{shape} voxels of {' × '.join(f'{mm:.3g}' for mm in volume.spacing)} mm"
