"""Makes scans with thick slices isotropic: the resolution across slices becomes that within slices.

A cubic spline interpolates the scan along the slice direction. A network trained to restore thick slices
(`DeformMambaSR(scale=1)`, the weights `thick`) is applied to the sections along both in-plane axes (sagittal and
coronal for an axial scan). Their mean is the result, their disagreement the uncertainty. Optionally, the network is
first adapted to the scan: its in-plane slices, blurred and downsampled along one axis to the slice thickness, are
training data with the right anatomy and contrast.

Some in-plane slices are held out from adaptation and degraded in the same way. On them, network and spline are
compared: this is the expected gain. If there is no gain, the spline is the result.

Grid: the centre of the first slice is unchanged, and voxels follow at intervals of `to` mm.

Source: Zhao et al., SMORE, IEEE TMI 40 (2021); Remedios et al., ECLARE, arXiv 2503.10822.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.data.thick_slices import EMPTY, n_slices, robust_range, thick_matrix
from deformmamba.errors import InvalidArgument, shown
from deformmamba.inference.inputs import check_voxels, opened
from deformmamba.inference.networks import network as known
from deformmamba.inference.provenance import weights_hash, weights_name
from deformmamba.inference.settings import Settings
from deformmamba.metrics import psnr, ssim
from deformmamba.physics.consistency import Consistency, check_consistency
from deformmamba.physics.slice_profile import (
    SliceProfile,
    ThickSlices,
    along,
    back_projected,
    slice_positions,
    slice_profile,
    spline_matrix,
)
from deformmamba.volume import Volume, VolumeError, chosen_axis, in_plane, read_volume
from deformmamba.volume.inspection import effective_matrix

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

MODEL = "thick"
LEAST_RATIO = 1.3  # of slice spacing to the wanted voxel: below it a scan counts as isotropic
FEWEST_SLICES = 8
MOST_SHEAR = 1.0  # degrees between the slices' normal and the direction in which they are stacked
SQUARE = 1.05  # in-plane pixels whose sides differ by less are left as they are
HELD_OUT = 6  # in-plane slices that adaptation does not see
FEWEST_ACROSS = 4  # thick slices across an in-plane image; with fewer the comparison means nothing
BATCH_PIXELS = 1 << 17  # of the sections that the network gets at once, on each thread
# adaptation
PATCH, BATCH, RATE = 96, 4, 4e-4
CONSISTENCY_STEPS = 3  # of conjugate gradients: about a twentieth of the difference is left
TISSUE = 0.1  # of the intensity range: brighter than air
MARGIN = 8  # pixels of air around the anatomy that the network sees
NOISE_BLOCK = 8  # wavelet details, so 16 pixels


@dataclass(frozen=True)
class Gain:
    """Comparison of network and cubic spline on in-plane slices of the scan held out from adaptation."""

    slices: int
    psnr: float
    psnr_spline: float
    ssim: float
    ssim_spline: float

    @property
    def db(self) -> float:
        """PSNR of the network minus that of the spline."""
        return self.psnr - self.psnr_spline


@dataclass(frozen=True)
class IsotropicReport:
    """Method, settings and expected gain of `isotropic`.

    Attributes:
        method: "network" or "spline", whichever was better on the held-out slices.
        axis: where slices are stacked.
        spacing: mm from slice to slice, before.
        to: mm from slice to slice, after.
        pixel: in-plane pixel in mm, before.
        thickness: of a slice in mm; `thickness_from` is the source of this number.
        profile: kind of the slice profile.
        ratio: spacing / to.
        shape: (i, j, k) of the result.
        expected: the gain on held-out slices; None: the slices are too small to tell.
        adapted: steps of adaptation.
        inconsistency: root mean square difference between the input slices and slices simulated from the result, as a
            share of the intensity range: before and after the correction.
        disagreement: mean absolute difference of the two orientations inside the anatomy, as a share of the range.
        uncertainty: half the difference of the two orientations in each voxel, in scanner units; None for the spline.
        weights, sha256: of the network; None without a file, and for sha256 after adaptation.
        seed, seconds: of the whole run.
        remarks: further remarks, one line each.
    """

    method: str
    axis: int
    spacing: float
    to: float
    pixel: tuple[float, float]
    thickness: float
    thickness_from: str
    profile: str
    ratio: float
    shape: tuple[int, int, int]
    expected: Gain | None
    adapted: int
    inconsistency: tuple[float, float]
    disagreement: float
    uncertainty: np.ndarray | None = field(repr=False)
    weights: str | None
    sha256: str | None
    seed: int
    seconds: float
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        """The gain in one sentence."""
        if self.expected is None:
            return "expected gain over cubic interpolation: not measured, the slices are too small"
        gain = self.expected
        measured = f"(measured on {gain.slices} slices of this scan)"
        if self.method == "spline":
            return f"no gain over cubic interpolation: {gain.db:+.1f} dB {measured}; the cubic spline was written"
        return f"expected gain over cubic interpolation {gain.db:+.1f} dB {measured}"

    def facts(self) -> dict[str, Any]:
        """Everything except the uncertainty map, as JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "uncertainty"}
        return {**plain, "expected": None if self.expected is None else {**vars(self.expected), "db": self.expected.db}}


def isotropic(
    scan: Any,
    *,
    to: float | None = None,
    thickness: float | None = None,
    profile: "str | os.PathLike[str] | SliceProfile" = "gaussian",
    model: "str | os.PathLike[str] | SRModel" = MODEL,
    adapt: float | str = 0,
    seed: int = 0,
    consistency: Consistency = "object",
    axis: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[Any, IsotropicReport]:
    """Makes the slice spacing of `scan` equal to its pixel size: the same kind of object, float32, in the same units.

    Args:
        scan: a `Volume`, a nibabel image, or the path of a scan (which gives a `Volume`).
        to: voxel size of the result in mm. None: the in-plane pixel, or its true resolution in k-space if the scanner
            interpolated the slices. In-plane, another size is reached by resampling in k-space.
        thickness: of a slice in mm. None: DICOM's SliceThickness, else the spacing between slices.
        profile: "gaussian" (full width at half maximum: the thickness), "boxcar", or a file of two columns, mm from the
            slice centre and weight.
        model: a name, a path or a model; at scale 1, trained for the slice direction.
        adapt: minutes of adaptation to this scan, such as 3; or "400 steps"; 0: no adaptation. Minutes are converted to
            steps by timing a few steps; the report states the number.
        seed: of the adaptation. Equal seeds, steps and threads give equal results.
        consistency: correct the result so that averaging it by the profile gives the input slices.
            "object": inside the anatomy only, reduced by the estimated noise. "exact": everywhere. "off": none.
        axis: where slices are stacked; None: from the geometry.
        device: where to run; None: the model's device, or the CPU for a name.
        progress: bars on stderr, if that is a terminal.

    Returns:
        The result and an `IsotropicReport`.

    Raises:
        VolumeError: the scan is isotropic already, has fewer than 8 slices, or sheared, missing or doubled slices, is
            not one 3-D volume, or holds NaN.
        InvalidArgument, SliceProfileError: an argument out of range, or weights that are not for the slice direction.
    """
    start = time.perf_counter()
    minutes, steps = parse_adapt(adapt)
    check_consistency(consistency)
    if isinstance(scan, (str, os.PathLike)):
        scan = read_volume(scan)
    elif not isinstance(scan, Volume) and not hasattr(scan, "dataobj"):
        raise VolumeError(
            f"isotropic takes a Volume, a nibabel image or a path, not {type(scan).__name__}: bare numbers have no "
            "spacing; make a Volume(array, affine)"
        )
    volume, back, _ = opened(scan, Settings())
    job = Stack.of(volume, to=to, thickness=thickness, profile=profile, axis=axis)
    network = loaded(model, device)
    low, high = robust_range(job.slices)
    slices = torch.from_numpy((job.slices - np.float32(low)) / np.float32(high - low))
    held, own = split_slices(slices, job)
    chosen, gain, adapted = best_of(network, slices, held, own, job, minutes, steps, seed, progress)
    fine = along(job.spline(), slices, 0)
    two = None if chosen is None else by_sections(chosen, fine, progress)
    result = fine if two is None else (two[0] + two[1]) / 2
    operator = job.operator()
    before = float((operator(result, 0) - slices).square().mean().sqrt())
    if two is not None:
        result = consistent(result, slices, operator, consistency)
    if volume.array.min() >= 0:  # a magnitude image stays one
        result = result.clamp(min=-low / (high - low))
    after = float((operator(result, 0) - slices).square().mean().sqrt())
    spread = disagreement = None
    if two is not None:
        difference = (two[0] - two[1]).abs()
        disagreement = float(difference[result > EMPTY].mean()) if bool((result > EMPTY).any()) else 0.0
        spread = np.moveaxis((difference / 2 * (high - low)).numpy(), 0, job.axis)
    array = result.numpy() * np.float32(high - low) + np.float32(low)
    out = np.asfortranarray(np.moveaxis(array, 0, job.axis), np.float32)
    i, j, k = out.shape
    report = IsotropicReport(
        method="spline" if chosen is None else "network",
        axis=job.axis,
        spacing=job.spacing,
        to=job.to,
        pixel=job.pixel,
        thickness=job.profile.width(),
        thickness_from=job.thickness_from,
        profile=job.profile.kind,
        ratio=job.ratio,
        shape=(i, j, k),
        expected=gain,
        adapted=adapted,
        inconsistency=(before, after),
        disagreement=disagreement or 0.0,
        uncertainty=spread,
        weights=weights_name(network),
        sha256=weights_hash(network),
        seed=seed,
        seconds=time.perf_counter() - start,
        remarks=job.remarks,
    )
    return back(job.place, out), report


def cubic_spline(volume: Volume, **geometry: Any) -> np.ndarray:
    """The voxels of the result by cubic interpolation alone; `geometry` as `Stack.of`."""
    job = Stack.of(volume, **geometry)
    fine = along(job.spline(), torch.from_numpy(np.ascontiguousarray(job.slices)), 0).numpy()
    return np.moveaxis(np.maximum(fine, 0) if volume.array.min() >= 0 else fine, 0, job.axis)


def parse_adapt(adapt: float | str) -> tuple[float, int | None]:
    """Parses "3", 3 or "400 steps" to (minutes, steps); steps is None for minutes.

    Raises:
        InvalidArgument: anything else, or a negative number.
    """

    text = str(adapt).strip()
    number, _, unit = text.partition(" ")
    try:
        value = float(number)
        if not 0 <= value < math.inf or unit not in ("", "steps", "minutes") or (unit == "steps" and value % 1):
            raise ValueError
    except ValueError:
        raise InvalidArgument(
            f'adapt is {shown(adapt)}; it must be minutes, 0 or more, or a number of steps such as "400 steps"'
        ) from None
    return (0.0, int(value)) if unit == "steps" else (value, None)


def loaded(model: "str | os.PathLike[str] | SRModel", device: str | torch.device | None) -> "SRModel":
    """The network for the slice direction, in eval mode.

    Raises:
        InvalidArgument: weights that change the size of an image.
    """

    network: SRModel = known(model)
    if network.scale != 1:
        name = weights_name(network) or type(network).__name__
        raise InvalidArgument(
            f"{name} upscales slices in-plane by {network.scale}; the slice direction needs weights of scale 1, such "
            f'as "{MODEL}"'
        )
    return (network if device is None else network.to(device)).eval()


@dataclass(frozen=True)
class Stack:
    """A checked scan as a stack of slices (n, h, w), with the geometry of the result.

    Attributes:
        slices: float32, scanner units; with the in-plane pixels of the result.
        place: geometry and header of the result; its array is the input's.
    """

    slices: np.ndarray
    place: Volume
    axis: int
    spacing: float
    to: float
    pixel: tuple[float, float]
    profile: SliceProfile
    thickness_from: str
    remarks: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Rows of the result from one slice centre to the next."""
        return self.spacing / self.to

    @property
    def n_fine(self) -> int:
        """Number of slices of the result."""
        return round(len(self.slices) * self.ratio)

    @property
    def in_rows(self) -> SliceProfile:
        """The slice profile in units of `to`, for in-plane images."""
        table = self.profile.table and tuple((z / self.to, weight) for z, weight in self.profile.table)
        return SliceProfile(self.profile.kind, self.profile.thickness / self.to, table)

    def spline(self) -> torch.Tensor:
        """(n_fine, n): cubic interpolation from the slices to the result's."""
        return spline_matrix(len(self.slices), torch.arange(self.n_fine, dtype=torch.float64) / self.ratio)

    def operator(self) -> ThickSlices:
        """From the result to the slices."""
        return ThickSlices(self.n_fine, self.to, slice_positions(len(self.slices), self.spacing), self.profile)

    @classmethod
    def of(
        cls,
        volume: Volume,
        *,
        to: float | None = None,
        thickness: float | None = None,
        profile: "str | os.PathLike[str] | SliceProfile" = "gaussian",
        axis: int | None = None,
    ) -> "Stack":
        """Checks a scan and resamples its slices to the in-plane pixel of the result. Raises as `isotropic`."""
        from deformmamba.errors import InvalidArgument

        if to is not None and not 0 < to < math.inf:
            raise InvalidArgument(f"to is {to!r}; it must be a positive number of mm")
        axis = chosen_axis(volume, axis)
        check_voxels(volume.array)
        array = np.moveaxis(volume.array, axis, 0).astype(np.float32, copy=False)
        spacing = _checked_spacing(volume, axis)
        remarks: list[str] = []
        first, second = in_plane(axis)
        sides = [volume.spacing[first], volume.spacing[second]]
        pixel = (sides[0], sides[1])
        wanted = sides
        if to is None:
            wanted = _resolved(array, sides, remarks)
            to = math.sqrt(wanted[0] * wanted[1]) if max(wanted) <= SQUARE * min(wanted) else min(wanted)
        if spacing / to < LEAST_RATIO:
            raise VolumeError(
                f"slices are {spacing:.3g} mm apart and voxels of {to:.3g} mm are wanted: the scan is isotropic "
                f"already (the ratio is {spacing / to:.2f}, at least {LEAST_RATIO} is needed)"
            )
        if len(array) < FEWEST_SLICES:
            raise VolumeError(
                f"the scan has {len(array)} slices; at least {FEWEST_SLICES} are needed to go between them"
            )
        _check_slices(array)
        place = volume.resampled(volume.array, spacing / to, (axis,), "origin")
        for a, n, side in zip((first, second), array.shape[1:], sides, strict=True):
            m = max(1, round(n * side / to))
            if m == n or max(side, to) <= SQUARE * min(side, to):  # as fine as asked for, almost
                continue
            array = resampled(array, 1 if a == first else 2, m)
            place = place.resampled(place.array, m / n, (a,), "origin")
        if thickness is None and (known := _dicom_thickness(volume)) is not None:
            thickness, origin = known, "DICOM's SliceThickness"
        elif thickness is None:
            thickness, origin = spacing, "the spacing between slices, as the file does not say"
        else:
            origin = "as given"
        found = slice_profile(profile, thickness)
        if found.table is not None:
            origin = "the file of the profile"
        if not 0.1 * spacing <= found.width() <= 4 * spacing:
            raise InvalidArgument(
                f"slices {found.width():.3g} mm thick do not fit slices {spacing:.3g} mm apart; wanted a thickness "
                f"from {0.1 * spacing:.2g} to {4 * spacing:.3g} mm"
            )
        return cls(array, place, axis, spacing, to, pixel, found, origin, tuple(remarks))


def _checked_spacing(volume: Volume, axis: int) -> float:
    """mm from slice to slice, across the slices.

    Raises:
        VolumeError: slices that are shifted against each other, as after a tilted gantry.
    """
    step = volume.affine[:3, axis]
    first, second = (volume.affine[:3, a] for a in in_plane(axis))
    normal = np.cross(first, second)
    spacing = float(abs(step @ normal) / np.linalg.norm(normal))
    tilt = math.degrees(math.acos(min(1.0, spacing / float(np.linalg.norm(step)))))
    if tilt > MOST_SHEAR:
        raise VolumeError(
            f"the stack is sheared: slices are stacked {tilt:.1f} degrees off their normal (a tilted gantry); resample "
            "it to an upright stack first"
        )
    return spacing


def _check_slices(slices: np.ndarray) -> None:
    """Raises VolumeError for a slice that is empty between others, or the same as its neighbour."""
    full = [bool(image.any()) and float(image.max()) > float(image.min()) for image in slices]
    inside = [k for k, is_full in enumerate(full) if is_full]
    missing = [k for k in range(inside[0], inside[-1]) if not full[k]] if inside else []
    if missing:
        raise VolumeError(
            f"slice {missing[0]} of {len(slices)} is empty between others, so it is missing; the stack must be complete"
        )
    doubled = [k for k in inside[:-1] if full[k + 1] and np.array_equal(slices[k], slices[k + 1])]
    if doubled:
        raise VolumeError(
            f"slices {doubled[0]} and {doubled[0] + 1} of {len(slices)} are the same image, so one is there twice; "
            "keep one of each"
        )


def _resolved(slices: np.ndarray, sides: Sequence[float], remarks: list[str]) -> list[float]:
    """The true in-plane resolution in mm from k-space; adds a remark if it differs from the header."""
    filled = effective_matrix(slices)
    found = [side * n / m for side, n, m in zip(sides, slices.shape[1:], filled, strict=True)]
    if filled == slices.shape[1:]:
        return list(sides)
    remarks.append(
        f"the slices were interpolated by the scanner: k-space is filled to {filled[0]}x{filled[1]} of "
        f"{slices.shape[1]}x{slices.shape[2]}, so voxels of {min(found):.3g} mm are made; to (--to) asks for others"
    )
    return [min(found)] * 2  # what either side resolves is kept


def _dicom_thickness(volume: Volume) -> float | None:
    """DICOM's SliceThickness in mm, if all images agree on one; None for other files."""
    from deformmamba.volume.dicom import DicomSeries

    if not isinstance(volume.header, DicomSeries):
        return None
    found: set[float] = set()
    for dataset in volume.header.datasets.values():
        holders = [dataset]
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            for group in dataset.get(name) or []:
                holders += group.get("PixelMeasuresSequence") or []
        for holder in holders:
            try:
                value = float(holder.get("SliceThickness") or 0)
            except (TypeError, ValueError):
                value = 0.0
            if 0 < value < math.inf:
                found.add(round(value, 4))
    return found.pop() if len(found) == 1 else None


def resampled(array: np.ndarray, axis: int, m: int) -> np.ndarray:
    """Resamples one axis to m samples in k-space (cropped or zero-filled); sample 0 keeps its position.

    If no voxel is negative before, none is negative after.
    """
    n = array.shape[axis]
    spectrum = torch.fft.rfft(torch.from_numpy(np.ascontiguousarray(array)).movedim(axis, -1), norm="forward")
    if m > n and n % 2 == 0:
        spectrum[..., -1] /= 2  # shared out between -n / 2 and n / 2
    new = torch.fft.irfft(spectrum[..., : m // 2 + 1], n=m, norm="forward").movedim(-1, axis).numpy()
    return np.maximum(new, 0) if array.min() >= 0 else new


def split_slices(slices: torch.Tensor, job: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """In-plane slices (k, h, w) for the comparison, and those for adaptation; both empty if slices are too small."""
    full = (slices.clamp(0, 1).mean((1, 2)) > EMPTY).nonzero()[:, 0]
    if n_slices(min(slices.shape[1:]), job.ratio) < FEWEST_ACROSS or not len(full):
        return slices[:0], slices[:0]
    middle = full[len(full) // 10 : len(full) - len(full) // 10]
    inner = middle if len(middle) >= 2 else full
    some = max(1, min(HELD_OUT, len(full) // 4))
    # the middles of equal parts, to avoid the first and last slices, which show little
    held = inner[[int((number + 0.5) * len(inner) / some) for number in range(some)]]
    rest = torch.tensor([k for k in full.tolist() if k not in set(held.tolist())], dtype=torch.long)
    return slices[held], slices[rest]


def best_of(
    network: "SRModel",
    slices: torch.Tensor,
    held: torch.Tensor,
    own: torch.Tensor,
    job: Stack,
    minutes: float,
    steps: int | None,
    seed: int,
    progress: bool,
) -> tuple["SRModel | None", Gain | None, int]:
    """The network to use (None: the spline), its gain on the held-out slices, and the number of adaptation steps."""
    if not len(held):
        return network, None, 0
    gain = measured(network, held, job)
    chosen, best, adapted = network, gain, 0
    if (minutes or steps) and len(own):
        tuned, done = adapted_to(network, own, job, minutes, steps, seed, progress)
        after = measured(tuned, held, job)
        if after.db > gain.db:
            chosen, best, adapted = tuned, after, done
    return (chosen if best.db > 0 else None), best, adapted


def measured(network: "SRModel", held: torch.Tensor, job: Stack) -> Gain:
    """Compares network and spline on in-plane slices (k, h, w), degraded along their rows, then along their columns."""
    rows = []
    for images in (held, held.mT):
        phase = 0.5 * ((images.shape[1] - 1) % job.ratio)  # the same distance to both ends
        spline = along(thick_matrix(images.shape[1], job.ratio, job.in_rows, phase), images, 1)
        sharp = run(network, spline)
        rows.append([f(image, images) for f in (psnr, ssim) for image in (sharp, spline)])
    a, b, c, d = np.mean(rows, 0).tolist()
    return Gain(len(held), a, b, c, d)


def _device(network: "SRModel") -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def run(network: "SRModel", images: torch.Tensor) -> torch.Tensor:
    """The network on images (k, n, w), whose second axis is the coarse one."""
    device = _device(network)
    with torch.inference_mode():
        return torch.cat([network(image[None, None].to(device))[0].cpu() for image in images])


def adapted_to(
    network: "SRModel",
    own: torch.Tensor,
    job: Stack,
    minutes: float,
    steps: int | None,
    seed: int,
    progress: bool,
) -> tuple["SRModel", int]:
    """A copy of the network, trained on degraded slices `own` (k, h, w); and the number of steps.

    Minutes are converted to steps by timing three steps that do not change the network.
    """
    from tqdm import tqdm

    device = _device(network)
    tuned = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=RATE, weight_decay=0.01)

    def step(number: int) -> None:
        lr, hr = (image.to(device) for image in patches(own, job, seed, number))
        torch.manual_seed(seed)
        loss = (tuned(lr) - hr).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)

    if steps is None:
        step(0)  # compiles, and fills caches
        before = time.perf_counter()
        for number in range(3):
            step(number)
        steps = max(1, int(60 * minutes / ((time.perf_counter() - before) / 3)))
        optimizer.zero_grad(set_to_none=True)
    with tqdm(total=steps, unit="step", desc="adapting", disable=None if progress else True) as bar:
        for number in range(steps):
            step(number)
            for group in optimizer.param_groups:
                warm = min(1.0, (number + 1) / 20)
                group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * number / steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
    return tuned.eval(), steps


def patches(own: torch.Tensor, job: Stack, seed: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of patches (b, 1, p, p), degraded and true, for step `number`; depends on `seed` and `number` only."""
    rng = np.random.default_rng((seed, number))
    side = min(PATCH, *own.shape[1:])
    lr, hr = [], []
    for _ in range(BATCH):
        image = own[rng.integers(len(own))]
        image = image.mT if rng.random() < 0.5 else image
        image = image.flip([axis for axis in (0, 1) if rng.random() < 0.5])
        n, w = image.shape
        left, top = int(rng.integers(w - side + 1)), int(rng.integers(n - side + 1))
        columns = image[:, left : left + side]
        matrix = thick_matrix(n, job.ratio, job.in_rows, job.ratio * rng.random())
        lr.append((matrix[top : top + side] @ columns)[None])
        hr.append(columns[top : top + side][None])
    return torch.stack(lr), torch.stack(hr)


def by_sections(network: "SRModel", fine: torch.Tensor, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the network on both kinds of sections through an interpolated stack (n, h, w): along w, and along h.

    The air around the anatomy and empty sections are unchanged. A CPU runs several batches in parallel, each with its
    share of torch's threads.
    """
    from tqdm import tqdm

    device = _device(network)
    outs = fine.clone(), fine.clone()
    rows, columns = _box(fine)
    inner, into = fine[:, rows, columns], [out[:, rows, columns] for out in outs]
    # (n, h) sections at each w, and (n, w) sections at each h
    views = [(inner.permute(2, 0, 1), into[0].permute(2, 0, 1)), (inner.permute(1, 0, 2), into[1].permute(1, 0, 2))]
    work: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
    for source, target in views:
        full = (source.clamp(0, 1).mean((1, 2)) > EMPTY / 4).nonzero()[:, 0].tolist()
        some = max(1, BATCH_PIXELS // (source.shape[1] * source.shape[2]))
        work += [(source, target, full[start : start + some]) for start in range(0, len(full), some)]

    def sharpen(item: tuple[torch.Tensor, torch.Tensor, list[int]]) -> int:
        source, target, numbers = item
        with torch.inference_mode():
            target[numbers] = network(source[numbers][:, None].contiguous().to(device))[:, 0].cpu()
        return len(numbers)

    total = sum(len(numbers) for _, _, numbers in work)
    with tqdm(total=total, unit="section", desc="sharpening", disable=None if progress else True) as bar:
        for done in _in_parallel(sharpen, work, device):
            bar.update(done)
    return outs


def _box(fine: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns of (n, h, w) with anatomy, and MARGIN more on each side."""
    signal = (fine > TISSUE / 2).float().mean(0)
    spans = []
    for profile in (signal.mean(1), signal.mean(0)):
        full = (profile > 0.002).nonzero()[:, 0]
        first, last = (int(full[0]), int(full[-1])) if len(full) else (0, len(profile) - 1)
        spans.append(slice(max(0, first - MARGIN), last + MARGIN + 1))
    return spans[0], spans[1]


def _in_parallel(job: Callable[[Any], int], work: Sequence[Any], device: torch.device) -> Any:
    """The results of `job`, in order; computed in parallel on a CPU."""
    threads = torch.get_num_threads()
    workers = min(threads, len(work)) if device.type == "cpu" else 1
    if workers <= 1:
        yield from map(job, work)
        return
    torch.set_num_threads(max(1, threads // workers))  # of every thread that begins now
    try:
        with ThreadPoolExecutor(workers, "deformmamba-sections") as pool:
            futures = [pool.submit(job, item) for item in work]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)


def consistent(image: torch.Tensor, slices: torch.Tensor, operator: ThickSlices, how: Consistency) -> torch.Tensor:
    """Corrects `image` (n_fine, h, w) so that `operator` maps it to `slices`.

    "exact": everywhere, by conjugate gradients. "object": inside the anatomy only, and only the share of the difference
    that noise does not explain (the gain of a Wiener filter). Otherwise the correction would restore the noise that the
    network removed, and spread it between the slices. On validation images degraded by a factor of 4, exact consistency
    gains +0.35 dB without noise and -0.13 dB if each slice has noise of 2 % of the range.
    """
    if how == "off":
        return image
    change = back_projected(image, slices, operator, axis=0, steps=CONSISTENCY_STEPS)[0] - image
    if how == "exact":
        return image + change
    anatomy = F.max_pool2d((slices > TISSUE).float()[:, None], 5, 1, 2)[:, 0]
    difference = (operator(image, 0) - slices)[anatomy > 0]
    power = float(difference.square().mean()) if difference.numel() else 0.0
    share = max(0.0, 1 - noise_level(slices) ** 2 / power) if power > 0 else 0.0
    # a voxel is in the anatomy if the slice with its largest weight is
    return image + share * anatomy[operator.matrix.argmax(0)] * change


def noise_level(slices: torch.Tensor) -> float:
    """The standard deviation of the noise inside the anatomy of (n, h, w), from the blocks with the least texture.

    It is the power of the diagonal details of the Haar wavelet, averaged over blocks of 16x16 pixels. The lowest
    twentieth of the blocks is used, because all others have texture.

    Source: the wavelet estimate of Donoho & Johnstone, Biometrika 81 (1994), in blocks.
    """
    h, w = (n - n % 2 for n in slices.shape[1:])
    a, b = slices[:, 0:h:2, 0:w:2], slices[:, 0:h:2, 1:w:2]
    c, d = slices[:, 1:h:2, 0:w:2], slices[:, 1:h:2, 1:w:2]
    if min(h, w) < 2 * NOISE_BLOCK:
        return 0.0
    power = F.avg_pool2d(((a - b - c + d) / 2).square()[:, None], NOISE_BLOCK)
    inside = F.avg_pool2d(((a + b + c + d) / 4 > TISSUE).float()[:, None], NOISE_BLOCK) > 0.95
    return float(power[inside].quantile(0.05).sqrt()) if bool(inside.any()) else 0.0


def derivation(report: IsotropicReport) -> str:
    """One line of ASCII for an image header: this package, the method, the weights and their hash."""
    from deformmamba import __version__

    how = "cubic spline"
    if report.method == "network":
        weights = f"{report.weights or 'weights without a file'}, sha256 {report.sha256 or 'none'}"
        how = f"{weights}, adapted for {report.adapted} steps, seed {report.seed}" if report.adapted else weights
    line = f"deformmamba {__version__}, isotropic to {report.to:.4g} mm, {how}"
    return line.encode("ascii", "replace").decode()


def without_spread(report: IsotropicReport) -> IsotropicReport:
    """The report without the uncertainty map, which is as large as the scan."""
    return replace(report, uncertainty=None)
