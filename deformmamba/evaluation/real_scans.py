"""Scores under properties of real scans: markers, other units, cut fields of view, masked backgrounds.

`real_scans` gives the LR images of high-resolution scans these properties, one at a time, and compares each result with
that of the unchanged image. The truth is known, so the loss in every case is measured, not judged by eye.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba import __version__
from deformmamba.data.augmentation import TISSUE, closed
from deformmamba.data.scans import Scan, load_slices, named_scans
from deformmamba.errors import InvalidArgument
from deformmamba.inference import upscale, weights_hash
from deformmamba.metrics.statistics import subject_means
from deformmamba.models.base import SRModel
from deformmamba.models.interpolation import ZeroFill
from deformmamba.physics.edges import constant_neighbourhood
from deformmamba.physics.kspace import degrade
from deformmamba.volume import intensity_scale

Row = dict[str, Any]

MARKERS = (2.0, 5.0, 20.0)  # times the 99.9th percentile of the input
MARKED_SHARE = 0.005  # share of a slice's pixels that the largest marker covers
AROUND = 4  # margin around a marker, in LR pixels, that is excluded from the score
GAINS = (20.0, 0.05, 0.03)
OFFSETS = (-200.0, -600.0, -1500.0, 2000.0)  # in the scan's own units
WELL_OUTSIDE = 4  # smallest distance from the mask, in LR pixels, of the pixels that are checked


class _Stack(NamedTuple):
    """Slices of one volume, in the scan's own units: truth (n, h, w) and input (n, h / scale, w / scale)."""

    subject: str
    hr: torch.Tensor
    lr: torch.Tensor


def real_scans(
    model: SRModel, scans: Iterable[Scan | str], *, slices: int = 8, window: int = 20, tile: int = 32
) -> list[Row]:
    """One row per case: `case`, `subjects`, and the means over subjects of the measured values.

    - `psnr`, `zero_fill_psnr`: PSNR [dB] of the network and of zero-filling over the pixels that the case is about;
      the peak is the maximum of the volume's truth.
    - `psnr_without`: the network's PSNR over the same pixels of the unchanged image.
    - `loss`: `psnr_without` - `psnr`.
    - `deviation`, for other units a * x + b: RMS difference between the output and a * output(x) + b, divided by the
      RMS difference between the network's output and the zero-filled image.
    - `nonzero`, `largest`, for a region that is 0 in the input: share of its voxels that are not 0 in the output, and
      its largest absolute value divided by the maximum of the output.

    Args:
        model: on the origin grid.
        scans: high-resolution volumes.
        slices: number of slices per volume, spread evenly over its middle half.
        window: side of the cut fields of view in LR pixels. Each slice has three, around its middle.
        tile: side of the tiles in LR pixels. One case of other units runs in tiles.

    Raises:
        InvalidArgument: no scan, a model on the half-pixel grid, or slices smaller than two windows.
    """
    if model.grid != "origin":
        raise InvalidArgument(f"real_scans: {type(model).__name__} is on the {model.grid} grid; wanted the origin grid")
    stacks = [_stack(scan, model.scale, slices, window) for scan in named_scans(scans)]
    if not stacks:
        raise InvalidArgument("real_scans: no scan was given")
    measured: dict[str, list[Row]] = {}
    with warnings.catch_warnings():
        # these cases change offsets and add markers on purpose
        warnings.filterwarnings("ignore", "the scan does not look like a magnitude image")
        warnings.filterwarnings("ignore", ".*models expect about")
        for stack in stacks:
            for row in _rows(model, stack, window, tile):
                measured.setdefault(row.pop("case"), []).append({"subject": stack.subject, **row})
    return [_mean_over_subjects(case, rows) for case, rows in measured.items()]


def settings_of(models: Mapping[str, SRModel], scans: Iterable[Scan | str]) -> dict[str, Any]:
    """What the rows of `real_scans` depend on, for JSON: the version, the volumes, and for each model its facts.

    `source` and `sha256` are those of the weights (see `inference.weights_hash`; None without a file), `consistency` is
    the data consistency applied.
    """
    return {
        "version": __version__,
        "volumes": [
            {"file": scan.path.name, "subject": scan.subject, "split": scan.split, "group": scan.group}
            for scan in named_scans(scans)
        ],
        "models": {
            name: {
                "source": model.source,
                "scale": model.scale,
                "sha256": weights_hash(model),
                "consistency": model.consistency,
            }
            for name, model in models.items()
        },
    }


def _stack(scan: Scan, scale: int, slices: int, window: int) -> _Stack:
    array = load_slices(scan, scale).array
    n = len(array)
    middle = np.unique(np.linspace(n // 4, max(n // 4, 3 * n // 4 - 1), slices).round().astype(int))
    hr = torch.from_numpy(array[middle])
    lr = degrade(hr, scale)
    if min(lr.shape[-2:]) < 2 * window:
        raise InvalidArgument(
            f"real_scans: {scan.path.name} has slices of {lr.shape[-2]}x{lr.shape[-1]} pixels at {scale}x; wanted at "
            f"least {2 * window}x{2 * window}, twice the window"
        )
    return _Stack(scan.subject, hr, lr)


def _mean_over_subjects(case: str, rows: Sequence[Row]) -> Row:
    by_subject = {key: list(subject_means(rows, key).values()) for key in rows[0] if key != "subject"}
    means = {key: float(np.mean(values)) for key, values in by_subject.items()}
    return {"case": case, "subjects": len({row["subject"] for row in rows}), **means}


def _rows(model: SRModel, stack: _Stack, window: int, tile: int) -> list[Row]:
    """The rows of one volume."""
    zero_fill = ZeroFill(scale=model.scale)
    clean, plain = upscale(model, stack.lr, axis=0), upscale(zero_fill, stack.lr, axis=0)
    rows = [{"case": "unchanged", "psnr": _psnr(clean, stack.hr), "zero_fill_psnr": _psnr(plain, stack.hr)}]
    rows += _marker_rows(model, stack, clean)
    rows += _unit_rows(model, stack, clean, plain, tile)
    rows += _window_rows(model, stack, clean, window)
    rows += _background_rows(model, stack)
    return rows


def _psnr(sr: torch.Tensor, hr: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """PSNR [dB] over the pixels `where` (bool, shape of `hr`; None: all); the peak is the maximum of `hr`."""
    error = (sr - hr).square()
    return float(10 * torch.log10(hr.max() ** 2 / (error if where is None else error[where]).mean()))


def _marker_rows(model: SRModel, stack: _Stack, clean: torch.Tensor) -> list[Row]:
    """Markers on the input of each slice; their pixels and those around them are excluded from the score."""
    bright = float(np.percentile(stack.lr.numpy(), 99.9))
    rows = []
    for name, marker in markers((stack.lr.shape[-2], stack.lr.shape[-1])).items():
        side = 2 * AROUND + 1
        near = F.max_pool2d(marker[None, None].to(stack.lr.dtype), side, 1, AROUND)
        elsewhere = F.interpolate(near, scale_factor=float(model.scale))[0].expand_as(stack.hr) == 0
        without = _psnr(clean, stack.hr, elsewhere)
        for times in MARKERS:
            marked = stack.lr.masked_fill(marker, times * bright)
            value = _psnr(upscale(model, marked, axis=0), stack.hr, elsewhere)
            rows.append(
                {
                    "case": f"{name}, {times:g} times as bright",
                    "psnr": value,
                    "zero_fill_psnr": _psnr(upscale(ZeroFill(scale=model.scale), marked, axis=0), stack.hr, elsewhere),
                    "psnr_without": without,
                    "loss": without - value,
                }
            )
    return rows


def markers(size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Markers by name, bool (h, w): a square of 2x2 pixels and three shapes of `MARKED_SHARE` of the pixels.

    The three shapes are a square, a diagonal line one pixel wide through the centre, and single pixels on a grid.
    """
    h, w = size
    count = max(4, int(MARKED_SHARE * h * w))
    side, index = int(count**0.5), torch.arange(count)
    length = min(count, h, w)
    every = max(1, h * w // count)
    square, largest, line, single = (torch.zeros(size, dtype=torch.bool) for _ in range(4))
    square[h // 3 : h // 3 + 2, w // 3 : w // 3 + 2] = True
    largest[h // 3 : h // 3 + side, w // 3 : w // 3 + side] = True
    line[(h - length) // 2 + index[:length], (w - length) // 2 + index[:length]] = True
    single.view(-1)[every // 2 + every * index] = True
    return {
        "marker of 2x2 pixels": square,
        **({f"marker of {side}x{side} pixels": largest} if side > 2 else {}),
        f"diagonal line of {length} pixels": line,
        f"{count} single pixels": single,
    }


def _unit_rows(model: SRModel, stack: _Stack, clean: torch.Tensor, plain: torch.Tensor, tile: int) -> list[Row]:
    """Other units a * x + b: equal for all slices, different between slices, in tiles, and with the self-ensemble."""
    one = torch.ones(len(stack.lr), 1, 1)
    odd = torch.arange(len(stack.lr))[:, None, None] % 2
    by_slice = 0.05 ** odd.to(one), 600.0 * odd.to(one)
    changes = [
        *((f"times {gain:g}", gain * one, 0 * one) for gain in GAINS),
        *((f"{offset:+g} in the scan's units", one, offset * one) for offset in OFFSETS),
        ("every second slice times 0.05, plus 600", *by_slice),
    ]
    ways: list[tuple[str, Mapping[str, Any]]] = [("tiles", {"tile": tile}), ("self-ensemble", {"ensemble": True})]
    tried: list[tuple[str, torch.Tensor, torch.Tensor, Mapping[str, Any]]]
    tried = [(name, gain, offset, {}) for name, gain, offset in changes]
    tried += [(f"{way}: times 0.03, plus 2000", 0.03 * one, 2000 * one, settings) for way, settings in ways]
    rows = []
    for name, gain, offset, settings in tried:
        few = slice(0, 2 if settings else None)  # tiles and ensembles take long
        lr, hr, base = stack.lr[few], stack.hr[few], plain[few]
        wanted = upscale(model, lr, axis=0, **settings) if settings else clean
        given = (upscale(model, gain[few] * lr + offset[few], axis=0, **settings) - offset[few]) / gain[few]
        value, without, moved = _psnr(given, hr), _psnr(wanted, hr), (wanted - base).square().mean().sqrt()
        rows.append(
            {
                "case": name,
                "psnr": value,
                "zero_fill_psnr": _psnr(base, hr),
                "psnr_without": without,
                "loss": without - value,
                "deviation": float((given - wanted).square().mean().sqrt() / moved) if moved > 0 else 0.0,
            }
        )
    return rows


def _window_rows(model: SRModel, stack: _Stack, clean: torch.Tensor, window: int) -> list[Row]:
    """Three windows around the middle, each upscaled as a separate image and as part of the whole slice."""
    scale = model.scale
    found: dict[str, list[float]] = {}
    for top, left in window_corners((stack.lr.shape[-2], stack.lr.shape[-1]), window):
        cut = stack.lr[:, top : top + window, left : left + window].contiguous()
        here = (slice(None), *(slice(scale * at, scale * (at + window)) for at in (top, left)))
        truth = stack.hr[here]
        for key, sr in (
            ("psnr", upscale(model, cut, axis=0)),
            ("zero_fill_psnr", upscale(ZeroFill(scale=scale), cut, axis=0)),
            ("psnr_without", clean[here]),
        ):
            found.setdefault(key, []).append(_psnr(sr, truth))
    row = {key: float(np.mean(values)) for key, values in found.items()}
    return [
        {
            "case": f"windows of {window}x{window} pixels as separate images",
            **row,
            "loss": row["psnr_without"] - row["psnr"],
        }
    ]


def window_corners(size: tuple[int, int], window: int) -> list[tuple[int, int]]:
    """(top, left) of the three windows: in the middle, above and to the right of it, and below and to the left."""
    middle = [n // 2 for n in size]
    near, far = window // 5, window - window // 10
    corners = [(window // 2, window // 2), (far, near), (near, far)]
    return [
        (min(max(0, middle[0] - down), size[0] - window), min(max(0, middle[1] - across), size[1] - window))
        for down, across in corners
    ]


def _background_rows(model: SRModel, stack: _Stack) -> list[Row]:
    """Regions that are 0 in the input: the background outside a mask, and rows without tissue in a cut image."""
    bright = intensity_scale(stack.lr.numpy())  # a mask sets the background, darker than TISSUE, to 0
    tissue = (stack.lr > TISSUE * bright).to(stack.lr)[:, None]
    filled = closed(tissue)
    masked = stack.lr * filled[:, 0]
    reach = 2 * WELL_OUTSIDE + 1
    outside = F.max_pool2d(filled, reach, 1, WELL_OUTSIDE)[:, 0] == 0
    half = masked[:, masked.shape[-2] // 2 :].contiguous()
    empty_row = constant_neighbourhood(half[:, None])[:, 0].all(-1, keepdim=True).expand_as(half)
    cases: list[tuple[str, torch.Tensor, torch.Tensor]] = [
        ("masked background, well outside of the mask", masked, outside),
        ("lower half of a masked slice, rows without tissue", half, empty_row),
    ]
    rows = []
    for name, lr, region in cases:
        sr = upscale(model, lr, axis=0).abs()
        inside = sr[region.repeat_interleave(model.scale, -1).repeat_interleave(model.scale, -2)]
        rows.append(
            {
                "case": name,
                "nonzero": float((inside > 0).float().mean()) if len(inside) else 0.0,
                "largest": float(inside.max() / sr.max()) if len(inside) else 0.0,
            }
        )
    return rows


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("psnr", "network", lambda x: f"{x:.2f}"),
    ("zero_fill_psnr", "zero-filling", lambda x: f"{x:.2f}"),
    ("psnr_without", "network, unchanged", lambda x: f"{x:.2f}"),
    ("loss", "loss [dB]", lambda x: f"{round(x, 2) + 0:.2f}"),  # not -0.00
    ("deviation", "deviation", lambda x: f"{100 * x:.2f} %"),
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `real_scans` as two Markdown tables: scores, and regions that are 0 in the input."""
    scored = [row for row in rows if "psnr" in row]
    lines = ["| case | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in scored:
        lines.append(f"| {row['case']} | " + " | ".join(f(row[k]) if k in row else "" for k, _, f in COLUMNS) + " |")
    lines += ["", "| region that is 0 in the input | voxels not 0 | largest, of the maximum |", "|---|---:|---:|"]
    lines += [
        f"| {row['case']} | {100 * row['nonzero']:.2f} % | {100 * row['largest']:.3f} % |"
        for row in rows
        if "nonzero" in row
    ]
    return "\n".join(lines) + "\n"
