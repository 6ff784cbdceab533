"""Assessment for a model card: results outside the training domain, and the effect on small lesions.

Three functions return rows of plain values for `weights_manifest.json`: `by_spacing` (one model at many voxel sizes),
`out_of_domain` (other contrasts and scanners; the same images rotated, shaded, noisy, or degraded in another way) and
`lesions` (the recovered share of a small lesion's contrast, and false lesion-like structures). `assess` calls all
three; `deformmamba.weights.cards.tables` renders the rows.

The baseline is always zero-filling of the same input. PSNR and SSIM follow protocol "volume", averaged over the volumes
of a subject and then over subjects. All randomness follows from one seed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.annotations import check_seed
from deformmamba.data.patches import Scan, load_slices
from deformmamba.errors import InvalidArgument
from deformmamba.inference import upscale
from deformmamba.metrics import psnr, ssim
from deformmamba.metrics.statistics import summarise
from deformmamba.models import Bicubic, SRModel, ZeroFill
from deformmamba.physics.degradations import AreaAverage, Degradation, KSpaceCrop, RicianNoise
from deformmamba.physics.kspace import resize
from deformmamba.volume import intensity_scale
from deformmamba.volume.inspection import trained_spacings

Row = dict[str, Any]

SPACINGS = (0.9, 1.2, 1.5, 2.0, 3.0)  # mm, of the ground truth
SIZES = (2.0, 3.0, 4.0, 6.0)  # mm, diameter at half contrast
CONTRAST = 0.25  # of a lesion, as a share of bright tissue (99.9th percentile of the volume); see model cards
ANGLES = (3.0, 10.0)  # degrees
SNRS = (60.0, 30.0, 15.0)  # signal-to-noise ratios of bright tissue in the LR image
APART = 25.0  # mm between lesions in one slice
RING = 2.0  # mm, width of the ring around a lesion with which it is compared
FINER = 0.95  # a spacing below this share of the data's spacing counts as finer than the data
SMALLEST = 16  # smallest side of an LR slice in pixels


class _Stack(NamedTuple):
    """The middle slices of a volume: (n, H, W) in scanner units, and the (height, width) of a pixel in mm."""

    hr: torch.Tensor
    spacing: tuple[float, float]
    scan: Scan


def _stacks(model: SRModel, scans: Iterable[Scan], slices: int | None) -> list[_Stack]:
    stacks = []
    for scan in scans:
        loaded = load_slices(scan, model.scale)
        n = len(loaded.array)
        first = 0 if slices is None else max(0, (n - slices) // 2)
        hr = torch.from_numpy(loaded.array[first : n if slices is None else first + slices])
        stacks.append(_Stack(hr, loaded.spacing, scan))
    return stacks


def _compared(model: SRModel, lr: torch.Tensor, hr: torch.Tensor) -> Row:
    """The scores of the model and of zero-filling on one stack."""
    row: Row = {}
    for name, made in (("", model), ("zero_fill_", ZeroFill(scale=model.scale))):
        sr = upscale(made, lr, axis=0)
        row |= {f"{name}psnr": psnr(sr, hr), f"{name}ssim": ssim(sr, hr)}
    return row


def _summary(rows: Sequence[Row], stacks: Sequence[_Stack], **facts: Any) -> Row:
    """One row of the scores of several stacks: the mean over the volumes of a subject, then over subjects."""
    named = [{**row, "subject": stack.scan.subject} for row, stack in zip(rows, stacks, strict=True)]
    people = {stack.scan.subject for stack in stacks}
    mean = {key: summarise(named, key).mean for key in rows[0]}
    gains = {f"{key}_gain": mean[key] - mean[f"zero_fill_{key}"] for key in ("psnr", "ssim")}
    scores = {key: round(value, 4) for key, value in {**mean, **gains}.items()}
    return {**facts, "subjects": len(people), "slices": sum(len(stack.hr) for stack in stacks), **scores}


def by_spacing(
    model: SRModel, scans: Iterable[Scan], *, spacings: Sequence[float] = SPACINGS, slices: int | None = 8
) -> list[Row]:
    """Scores at several voxel sizes: each volume is k-space cropped to a spacing (the truth), then degraded.

    A spacing is skipped for a volume if it is finer than the volume, or leaves too few pixels of a slice. One row per
    spacing: `truth_mm`, `input_mm`, whether the model was `trained` there (None if unknown), subjects, slices, scores,
    gains over zero-filling.

    Args:
        model: on the origin grid.
        scans: volumes it was not trained on.
        spacings: pixel sizes of the truth in mm.
        slices: number of middle slices of each volume; None for all.
    """
    stacks = _stacks(model, scans, slices)
    trained = trained_spacings(model)
    rows = []
    for spacing in spacings:
        coarser = [made for stack in stacks if (made := _at_spacing(stack, spacing, model.scale))]
        if not coarser:
            continue
        scores = [_compared(model, KSpaceCrop(model.scale)(stack.hr), stack.hr) for stack in coarser]
        given = spacing * model.scale
        known = FINER * trained[0] <= given <= trained[1] / FINER if trained else None
        rows.append(_summary(scores, coarser, truth_mm=spacing, input_mm=round(given, 2), trained=known))
    return rows


def _at_spacing(stack: _Stack, spacing: float, scale: int) -> _Stack | None:
    """The stack resampled to pixels of `spacing` by k-space cropping; None if the data are too coarse or too small."""
    factors = [spacing / own for own in stack.spacing]
    if min(factors) < FINER:
        return None
    sizes = [round(n / max(factor, 1) / scale) * scale for n, factor in zip(stack.hr.shape[1:], factors, strict=True)]
    if min(sizes) < SMALLEST * scale:
        return None
    if tuple(sizes) == tuple(stack.hr.shape[1:]):
        return stack
    hr = resize(stack.hr, (sizes[0], sizes[1])).abs()
    real = [own * n / size for own, n, size in zip(stack.spacing, stack.hr.shape[1:], sizes, strict=True)]
    return stack._replace(hr=hr, spacing=(real[0], real[1]))


def out_of_domain(
    model: SRModel,
    scans: Iterable[Scan],
    *,
    groups: Sequence[str] | None = None,
    slices: int | None = 8,
    seed: int = 0,
) -> list[Row]:
    """Gains over zero-filling on images that differ from the training data.

    One row for each unchanged group of scans, and for `groups` one row for each change: a rotated slice, another
    contrast curve, shading as by a surface coil, other units, Rician noise on the input, and an input made by area
    averaging instead of k-space cropping. The columns are `case`, `group`, subjects, slices, scores, gains.

    The averaged input is first shifted onto the model's grid, so that it differs in blur but not in position.

    Args:
        model: on the origin grid.
        scans: volumes it was not trained on.
        groups: groups that the model is meant for (`Scan.group`); None: all.
        slices: number of middle slices of each volume; None for all.
        seed: random seed of the noise.
    """
    seed = check_seed(seed)
    stacks = _stacks(model, scans, slices)
    crop = KSpaceCrop(model.scale)
    rows = []
    for group in sorted({stack.scan.group for stack in stacks}):
        own = [stack for stack in stacks if stack.scan.group == group]
        meant = groups is None or group in groups
        rows.append(
            _summary(
                [_compared(model, crop(stack.hr), stack.hr) for stack in own],
                own,
                case="unchanged" if meant else "other group",
                group=group,
            )
        )
        for case, change, degradation in _changes(model.scale) if meant else ():
            scores = []
            for stack in own:
                hr = change(stack.hr / intensity_scale(stack.hr.numpy()))
                scores.append(_compared(model, degradation(hr, seed=seed), hr))
            rows.append(_summary(scores, own, case=case, group=group))
    return rows


Change = Callable[[torch.Tensor], torch.Tensor]


def _changes(scale: int) -> list[tuple[str, Change, Callable[..., torch.Tensor]]]:
    """For each case: its name, the change to the truth (about [0, 1]), and the degradation that makes the input."""
    crop = KSpaceCrop(scale)

    def averaged(hr: torch.Tensor, *, seed: int) -> torch.Tensor:
        return AreaAverage(scale)(_shifted(hr, (scale - 1) / 2)).clamp(min=0)

    def same(hr: torch.Tensor) -> torch.Tensor:
        return hr

    return [
        *((f"turned by {angle:g} degrees", _turning(angle), crop) for angle in ANGLES),
        *((f"contrast curve x^{power:g}", _bending(power), crop) for power in (0.6, 1.6)),
        ("shaded by half across the image", _shaded, crop),
        ("in units 1,000 times as large", lambda hr: hr * 1000, crop),
        *((f"noise, SNR {snr:g}", same, _noisy(crop, snr)) for snr in SNRS),
        ("input averaged over areas", same, averaged),
    ]


def _noisy(crop: Degradation, snr: float) -> Degradation:
    return crop >> RicianNoise(snr)


def _bending(power: float) -> Change:
    return lambda hr: hr.clamp(min=0) ** power


def _turning(angle: float) -> Change:
    return lambda hr: turned(hr, angle)


def _shaded(hr: torch.Tensor) -> torch.Tensor:
    return hr * torch.linspace(1, 0.5, hr.shape[-1])


def _shifted(image: torch.Tensor, pixels: torch.Tensor | float, axes: Sequence[int] = (-2, -1)) -> torch.Tensor:
    """`image` (..., H, W) shifted by `pixels` towards larger indices along `axes`, exactly and with periodic edges."""
    for axis in axes:
        n = image.shape[axis]
        frequency = torch.fft.fftfreq(n, dtype=image.dtype).reshape([n, 1] if axis == -2 else [1, n])
        ramp = torch.exp(-2j * math.pi * frequency * pixels)
        image = torch.fft.ifft(torch.fft.fft(image, dim=axis) * ramp, dim=axis).real
    return image


def turned(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """`image` (..., H, W) rotated about its centre without interpolation: three shears, each a shift in k-space.

    The edges are periodic, so use it for small angles and images with empty corners. Negative values, which ringing
    leaves in air, become 0.

    Source: Unser, Thevenaz and Yaroslavsky 1995.
    """
    angle = math.radians(degrees)
    rows, columns = (torch.arange(n, dtype=image.dtype) - (n - 1) / 2 for n in image.shape[-2:])
    across, down = -math.tan(angle / 2) * rows[:, None], math.sin(angle) * columns[None, :]
    image = _shifted(image, across, (-1,))
    image = _shifted(image, down, (-2,))
    return _shifted(image, across, (-1,)).clamp(min=0)


def lesions(
    model: SRModel,
    scans: Iterable[Scan],
    *,
    sizes: Sequence[float] = SIZES,
    per_slice: int = 3,
    slices: int | None = 8,
    seed: int = 0,
) -> list[Row]:
    """Measures the effect of a model on synthetic lesions: round, smooth-edged, bright or dark, within tissue, added
    before degradation.

    A lesion's contrast is the mean at its centre minus the mean of a ring of 2 mm around it. The result has one row per
    size and kind:

    - `recovered`: the contrast that a lesion adds to the result divided by the contrast that it adds to the truth, mean
      over lesions; 1 is full recovery. `recovered_sd`: its standard deviation over lesions. The row also has the mean
      for zero-filling and bicubic interpolation.
    - `invented`: measured on slices WITHOUT lesions: the largest contrast of that size and kind within tissue that
      exceeds the truth's (allowing for a displacement of less than one LR pixel), in units of the lesion's contrast,
      mean over slices. 1 is a false lesion as strong as the true ones. The row also has it for zero-filling and bicubic
      interpolation.

    Args:
        model: on the origin grid.
        scans: volumes it was not trained on.
        sizes: diameters at half contrast, in mm.
        per_slice: largest number of lesions of a kind in one slice, 25 mm apart.
        slices: number of middle slices of each volume; None for all.
        seed: random seed of the positions.
    """
    seed = check_seed(seed)
    models = {"": model, "zero_fill_": ZeroFill(scale=model.scale), "bicubic_": Bicubic(scale=model.scale)}
    crop = KSpaceCrop(model.scale)
    kinds = [(size, kind, sign) for size in sizes for kind, sign in (("bright", 1.0), ("dark", -1.0))]
    recovered: dict[tuple[float, str, str], list[float]] = defaultdict(list)
    invented: dict[tuple[float, str, str], list[float]] = defaultdict(list)
    for number, stack in enumerate(_stacks(model, scans, slices)):
        strength = CONTRAST * intensity_scale(stack.hr.numpy())
        plain = {name: upscale(made, crop(stack.hr), axis=0) for name, made in models.items()}
        for size, kind, sign in kinds:
            shape = _Lesion(size, stack.spacing)
            tissue = shape.tissue(stack.hr, 1.2 * strength)
            rng = np.random.default_rng((seed, number, round(1000 * size), kind == "dark"))
            places = [shape.places(mask, per_slice, rng) for mask in tissue]
            added = torch.stack([shape.image(at, image.shape) for at, image in zip(places, stack.hr, strict=True)])
            ill = (stack.hr + sign * strength * added).clamp(min=0)
            truth = shape.contrast(ill - stack.hr)
            before = _largest_nearby((sign * shape.contrast(stack.hr)).clamp(min=0), model.scale)
            for name, made in models.items():
                change = shape.contrast(upscale(made, crop(ill), axis=0) - plain[name])
                recovered[size, kind, name] += [
                    float(change[k, y, x] / truth[k, y, x]) for k, at in enumerate(places) for y, x in at
                ]
                beyond = (sign * shape.contrast(plain[name])).clamp(min=0) - before
                invented[size, kind, name] += [
                    max(0.0, float(image[mask].max())) / strength
                    for image, mask in zip(beyond, tissue, strict=True)
                    if mask.any()
                ]
    rows = []
    for size, kind, _ in kinds:
        found = recovered[size, kind, ""]
        if found:
            row: Row = {"size_mm": size, "kind": kind, "lesions": len(found)}
            row |= {f"{name}recovered": round(float(np.mean(recovered[size, kind, name])), 3) for name in models}
            row["recovered_sd"] = round(float(np.std(found, ddof=1)), 3) if len(found) > 1 else None
            row |= {f"{name}invented": round(float(np.mean(invented[size, kind, name])), 3) for name in models}
            rows.append(row)
    return rows


class _Lesion:
    """A disc of `size` mm with a soft edge on pixels of `spacing` mm, and its detector."""

    def __init__(self, size: float, spacing: tuple[float, float]) -> None:
        radius, edge = size / 2, size / 3  # half contrast at the radius
        outer = max(radius + edge / 2, *spacing)
        self.reach = [math.ceil((outer + RING) / mm) for mm in spacing]
        self.apart = [max(1, round(APART / mm)) for mm in spacing]
        y, x = torch.meshgrid(
            *(torch.arange(-n, n + 1) * mm for n, mm in zip(self.reach, spacing, strict=True)), indexing="ij"
        )
        distance = torch.hypot(y, x)
        self.profile = 0.5 * (1 + torch.cos(math.pi * ((distance - radius) / edge + 0.5).clamp(0, 1)))
        centre = (distance <= radius - edge / 2).float()
        ring = ((distance > outer) & (distance <= outer + RING)).float()
        self.detector = centre / centre.sum() - ring / ring.sum()
        self.body = (distance <= outer).float()

    def contrast(self, images: torch.Tensor) -> torch.Tensor:
        """(n, H, W): the contrast of a lesion centred on each pixel; edges replicated."""
        down, across = self.reach
        padded = F.pad(images[:, None], (across, across, down, down), mode="replicate")
        return F.conv2d(padded, self.detector.to(images)[None, None])[:, 0]

    def tissue(self, images: torch.Tensor, least: float) -> torch.Tensor:
        """(n, H, W), bool: whether lesion and ring are within the image and within tissue.

        Tissue has 3x3 means of at least `least`.
        """
        down, across = self.reach
        empty = (F.avg_pool2d(images[:, None], 3, 1, 1) < least).to(images)
        window = (self.detector.abs() + self.body > 0).to(images)
        near = F.conv2d(F.pad(empty, (across, across, down, down), value=1.0), window[None, None])
        height, width = images.shape[-2:]
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[down : height - down, across : width - across] = True
        return (near[:, 0] < 0.5) & inside

    def places(self, mask: torch.Tensor, most: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Up to `most` pixels of `mask` in random order, at least `APART` from each other."""
        found: list[tuple[int, int]] = []
        candidates = mask.nonzero().numpy()
        for y, x in candidates[rng.permutation(len(candidates))]:
            if all(abs(y - v) >= self.apart[0] or abs(x - u) >= self.apart[1] for v, u in found):
                found.append((int(y), int(x)))
                if len(found) == most:
                    break
        return found

    def image(self, places: Sequence[tuple[int, int]], shape: Sequence[int]) -> torch.Tensor:
        """(H, W): lesions of contrast 1 at `places`, zero elsewhere."""
        image = torch.zeros(*shape)
        down, across = self.reach
        for y, x in places:
            image[y - down : y + down + 1, x - across : x + across + 1] += self.profile
        return image


def _largest_nearby(images: torch.Tensor, scale: int) -> torch.Tensor:
    """The largest value within less than `scale` pixels, so that a small displacement does not count."""
    return F.max_pool2d(images[:, None], 2 * scale - 1, 1, scale - 1)[:, 0]


def assess(
    model: SRModel,
    scans: Sequence[Scan],
    *,
    groups: Sequence[str] | None = None,
    slices: int | None = 8,
    seed: int = 0,
) -> dict[str, list[Row]]:
    """The rows of `by_spacing`, `out_of_domain` and `lesions`, by function name, for a model card.

    `by_spacing` and `lesions` use only the scans of `groups`, the groups that the model is meant for; None: all.

    Raises:
        ValueError: no scan belongs to `groups`, or the model is on the half-pixel grid.
    """
    seed = check_seed(seed)
    meant = [scan for scan in scans if groups is None or scan.group in groups]
    if not meant:
        raise InvalidArgument(f"assess: none of the {len(scans)} scans belongs to {', '.join(groups or ['any group'])}")
    if model.grid != "origin":
        raise InvalidArgument(f"assess: {type(model).__name__} is on the {model.grid} grid; wanted the origin grid")
    return {
        "by_spacing": by_spacing(model, meant, slices=slices),
        "out_of_domain": out_of_domain(model, scans, groups=groups, slices=slices, seed=seed),
        "lesions": lesions(model, meant, slices=slices, seed=seed),
    }
