"""Inspects a scan before processing: geometry, intensities, and the filled part of its k-space.

Scanners often measure a smaller matrix than the image has, and fill the rest of k-space with zeros. The pixels in the
header are then finer than the true resolution. `effective_matrix` finds the border in the spectrum of the image.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deformmamba.annotations import check_types
from deformmamba.physics.kspace import fft2c
from deformmamba.tensors import on_cpu_by_default
from deformmamba.volume import Volume, VolumeError, chosen_axis, in_plane, intensity_scale
from deformmamba.volume.dicom import DicomSeries
from deformmamba.weights.cards import pixel_range

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# a pixel outside the range of the training data by more than this factor is far from it
FAR_SPACING = 1.5

# Share of voxels that may be negative in a magnitude image (interpolation makes some).
MOST_NEGATIVE = 0.01
# Mean difference of neighbours over the range of values: 1/3 for uniform noise, at most 0.1 for LR magnitude images of
# the validation split.
PHASE_STEP = 0.2

_N_SLICES = 32  # enough slices for a smooth profile
_DYNAMIC_RANGE = 1e-12  # in power; smaller values are rounding of float32 voxels
_LOWEST = 0.15  # share of the highest frequency; lower frequencies are anatomy, and no scanner interpolates sevenfold
# Power of anatomy falls off like f ** -2 to f ** -5, and power of noise is constant. A border is where the exponent
# exceeds STEEP, and where the spectrum ends FALL dB below the power law f ** -NATURAL; or HARD_FALL dB, if it falls
# within a few frequencies, as neither anatomy nor a filter does.
_STEEP = 8.0
_FALL, _HARD_FALL = 10.0, 4.0
_NATURAL = 5.0
# dB of a step beyond the slopes on both sides, and near the matrix that a header states
_STEP, _STATED_STEP = 3.0, 1.5
# if the sum over slices has no border: share of the slices that must agree, within this share of the axis
_MAJORITY, _FEWEST_VOTES, _AGREEMENT = 0.6, 3, 0.02


@on_cpu_by_default
def effective_matrix(
    slices: np.ndarray | torch.Tensor, stated: tuple[int | None, int | None] = (None, None)
) -> tuple[int, int]:
    """(h, w): the filled part of the k-space of whole slices (n, H, W); (H, W) if no border is found.

    Slices may be real or complex, in any unit; at most 32 are used. A Hann window suppresses leakage from anatomy cut
    off at the edge of the field. The power spectrum is summed over the other axis and folded at frequency 0. Along this
    profile, the border is where power falls more steeply than in anatomy, by 10 dB or more in excess of anatomy's
    steepest power law or by 4 dB within a few frequencies, and stays low for another 4 % of the axis.

    Measured on zero-filled slices of nine volumes, at 1.25, 1.5 and 2 times the matrix, with phase and 1 % noise, as
    magnitudes rounded to integers: a hard border is found within 1 %. (Taking the magnitude discards the phase and
    smears power beyond the border: the step is lower, but at the same place.) If a filter fades the edge, the result is
    where the faded signal meets the level beyond: a few per cent less than the matrix after a Fermi or Hamming filter,
    about 15 % after a Hann filter, which leaves little signal there. A border in the outermost 4 % is not found.
    Partial Fourier is not found either: the larger side counts.

    A sum over slices can hide a border that most slices have. So if the sum has no border, each slice is searched, and
    a border counts if 60 % of at least three slices agree on it. `stated` is the acquisition matrix of the header: a
    border near it needs less evidence.

    Args:
        slices: (n, H, W).
        stated: (h, w) of a header, None for an unknown one of them.

    Source: this package; not in the paper.

    Raises:
        VolumeError: not three axes, or no slice.
    """
    if slices.ndim != 3 or 0 in slices.shape:
        raise VolumeError(f"effective_matrix takes slices (n, H, W), not {tuple(slices.shape)}")
    n, h, w = slices.shape
    window = torch.hann_window(h, dtype=torch.float64)[:, None] * torch.hann_window(w, dtype=torch.float64)
    profiles: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for k in evenly(n, _N_SLICES):
        image = _double(slices[k])
        mean = (
            image * window
        ).sum() / window.sum()  # a bright pixel in a corner, which the window removes, is left out
        power = fft2c((image - mean) * window).abs() ** 2
        for of_axis, profile in zip(profiles, (power.sum(1), power.sum(0)), strict=True):
            of_axis.append(profile.numpy())
    rows, columns = (_agreed(np.stack(found), size) for found, size in zip(profiles, stated, strict=True))
    return rows, columns


def _double(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """An image in double precision; PyTorch lacks some of numpy's types, such as those of other processors."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(image, np.complex128 if image.dtype.kind == "c" else np.float64))
    return image.to(torch.complex128 if image.is_complex() else torch.float64)


def _agreed(profiles: np.ndarray, stated: int | None) -> int:
    """The filled part of one axis, from the power profile (slices, n) of each slice."""
    n = profiles.shape[1]
    total = profiles.sum(0)
    if (found := _filled(total)) < n:
        return found
    if stated is not None and 0 < stated < n and (found := _step(total, stated)) < n:
        return found
    votes = np.array([_filled(profile) for profile in profiles if profile.any()])
    seen = votes[votes < n]
    if len(seen) < _FEWEST_VOTES or len(seen) < _MAJORITY * len(votes):
        return n
    middle = int(np.median(seen))
    agreed = np.abs(seen - middle) <= max(2, round(_AGREEMENT * n))
    return middle if agreed.sum() >= _MAJORITY * len(votes) else n


def evenly(n: int, most: int) -> list[int]:
    """Up to `most` of the n slices, by index: evenly spaced, first and last among them."""
    chosen: list[int] = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist()
    return chosen


def _filled(power: np.ndarray) -> int:
    """Number of filled frequencies of a centred power profile (n,); n if no border is found."""
    n = len(power)
    centre = n // 2
    last = (n - 1) // 2  # the frequency -n / 2 of an even n has no positive partner and is dropped
    folded = np.maximum(power[centre : centre + last + 1], power[centre - last : centre + 1][::-1])
    if last < 8 or not folded.any():
        return n
    level = 10 * np.log10(np.maximum(folded, folded.max() * _DYNAMIC_RANGE))
    bend = level[:-6] - 2 * level[3:-3] + level[6:]  # three apart, because the window correlates neighbours
    noise = 1.4826 * np.median(np.abs(bend)) / np.sqrt(6)

    reach = max(2, round(0.015 * last))
    at = np.arange(max(int(_LOWEST * last), reach + 1), last - reach + 1)
    fall = level[at - reach] - level[at + reach]
    exponent = fall / (10 * np.log10((at + reach) / (at - reach)))
    clearest, edge = 1.0, 0
    turns = np.flatnonzero(np.diff(np.r_[False, exponent >= _STEEP, False]))
    for first, end in zip(turns[::2], turns[1::2], strict=True):
        steepest = first + int(np.argmax(fall[first:end]))
        # a third point, because the smear of a magnitude image can itself be steep just outside a hard border
        gentle = np.flatnonzero(exponent[steepest:] < max(_STEEP, exponent[steepest] / 3))
        if not gentle.size:
            continue  # falls until the end of the axis: the fading of a filter, not a border
        foot = int(at[steepest + gentle[0] - 1]) + reach
        inside = np.arange(at[0] - reach, at[steepest])
        excess = np.max(level[inside] - level[foot] - _NATURAL * 10 * np.log10(foot / inside))
        raised = np.flatnonzero(level[:foot] > level[foot] + min(6.0, excess / 4))
        border = int(raised[-1]) - 1  # the window widens the border by one frequency
        near, far = (level[max(border + 1 - d, 0)] - level[min(border + 1 + d, last)] for d in (2, 6))
        clear = excess / (_FALL + 3 * noise)
        if near > 2 / 3 * far:
            clear = max(clear, near / (_HARD_FALL + 6 * noise))
        if clear >= clearest and border + max(3, round(0.04 * last)) <= last:
            clearest, edge = clear, border
    return min(n, 2 * edge + n % 2) if edge else _step(power)


def _step(power: np.ndarray, near: int | None = None) -> int:
    """Number of frequencies of a centred power profile (n,) inside a step; n if there is no step.

    A step is a fall within 5 % of the axis, in excess of the slopes on both sides. Scanners cause it when they fill
    k-space with zeros and then smooth or take magnitudes. Anatomy has no step: 1 dB or less. A smaller step counts
    `near` a stated matrix.
    """
    n = len(power)
    last = (n - 1) // 2
    reach = max(3, round(0.024 * last))
    if last < 8 * reach:
        return n
    centre = n // 2
    folded = np.maximum(power[centre : centre + last + 1], power[centre - last : centre + 1][::-1])
    if not folded.any():
        return n
    level = 10 * np.log10(np.maximum(folded, folded.max() * _DYNAMIC_RANGE))
    bend = level[:-6] - 2 * level[3:-3] + level[6:]
    noise = 1.4826 * np.median(np.abs(bend)) / np.sqrt(6)
    at = np.arange(max(int(_LOWEST * last), 3 * reach), last - 3 * reach + 1)
    least = _STEP + 12 * noise
    if near is not None:
        at = at[np.abs(2 * at - near) <= max(4, round(_AGREEMENT * n))]
        least = _STATED_STEP + 6 * noise
    if not at.size:
        return n
    slopes = (level[at - 3 * reach] - level[at - reach]) + (level[at + reach] - level[at + 3 * reach])
    step = level[at - reach] - level[at + reach] - slopes / 2
    if step.max() < least:
        return n
    steep = np.where(step >= 0.8 * step.max(), level[at - 2] - level[at + 2], -np.inf)
    return min(n, 2 * int(at[np.argmax(steep)]) + n % 2)


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_volume`.

    Attributes:
        shape: voxels along each axis.
        spacing: voxel size along each axis, mm, from the file.
        orientation: direction of each axis in the patient, of R L A P S I; None: not stated in the file.
        tilt: degrees between the slices and the nearest of axial, coronal and sagittal; None: not stated in the file.
        axis: where slices are stacked.
        matrix: pixels of a slice along its two axes, in the array's order.
        effective: the filled part of the k-space of `matrix`, see `effective_matrix`.
        resolution: true resolution along the same two axes, mm: the field of view divided by `effective`.
        lowest, highest: smallest and largest voxel.
        intensity: the 99.9th percentile of the non-zero voxels (`volume.intensity_scale`); networks that do not
            normalise each slice themselves get the voxels divided by it.
        negative: share of voxels below zero, 0 to 1.
        remarks: further remarks, also about the given model: one line each, without a full stop.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str | None
    tilt: float | None
    axis: int
    matrix: tuple[int, int]
    effective: tuple[int, int]
    resolution: tuple[float, float]
    lowest: float
    highest: float
    intensity: float
    negative: float
    remarks: tuple[str, ...]

    @property
    def interpolated(self) -> bool:
        """Whether a border was found inside k-space."""
        return self.effective != self.matrix

    @property
    def filling(self) -> str:
        """The meaning of `effective` in one sentence."""
        if not self.interpolated:
            return "no border of a smaller measured matrix is visible in k-space; a filter or a soft edge can hide one"
        pixel = tuple(
            mm * part / whole for mm, part, whole in zip(self.resolution, self.effective, self.matrix, strict=True)
        )
        return (
            f"k-space is filled for {self.effective[0]} of {self.matrix[0]} and {self.effective[1]} of "
            f"{self.matrix[1]} pixels: the scan was interpolated or filtered, and resolves about "
            f"{self.resolution[0]:.3g} x {self.resolution[1]:.3g} mm, not the {pixel[0]:.3g} x {pixel[1]:.3g} mm of "
            "its pixels"
        )


def inspect_volume(volume: Volume, *, axis: int | None = None, model: "SRModel | None" = None) -> Inspection:
    """Geometry, intensities and filled k-space of a scan, with remarks.

    Args:
        volume: real, finite voxels.
        axis: where slices are stacked; None: `volume.slice_axis`.
        model: also compare the scan with the training data of this model.

    Raises:
        VolumeError: no such axis, or voxels that are not real and finite.
    """
    check_types(inspect_volume, locals())
    axis = chosen_axis(volume, axis)
    array = volume.array
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise VolumeError("the scan has voxels that are complex, NaN or infinite; take the magnitude, replace NaN")
    first, second = in_plane(axis)
    matrix = (array.shape[first], array.shape[second])
    stated, effective = stated_matrix(volume, axis), measured_matrix(volume, axis)
    pixel = (volume.spacing[first], volume.spacing[second])
    resolution = (pixel[0] * matrix[0] / effective[0], pixel[1] * matrix[1] / effective[1])
    orientation, tilt = _orientation(volume, axis)
    negative = float(np.count_nonzero(array < 0) / array.size)

    remarks = []
    if (reason := no_magnitude(array, ends(array))) is not None:
        remarks.append(
            f"the scan does not look like a magnitude image, and the models are for magnitude images: {reason}"
        )
    if effective == matrix and any(m is not None and m < n for m, n in zip(stated, matrix, strict=True)):
        sizes = " x ".join("?" if m is None else str(m) for m in stated)
        remarks.append(
            f"the header states an acquisition matrix of {sizes} for slices of {matrix[0]} x {matrix[1]} pixels: the "
            "scan was probably interpolated, though k-space shows no border"
        )
    if orientation is None:
        remarks.append("the file has no patient orientation, so left and right are unknown")
    if model is not None:
        if min(matrix) < model.minimum_size:
            n = model.minimum_size
            remarks.append(f"{type(model).__name__} takes slices of {n}x{n} pixels or more")
        else:
            remarks.append(spacing_remark(model, volume, axis))
    return Inspection(
        shape=array.shape,
        spacing=volume.spacing,
        orientation=orientation,
        tilt=tilt,
        axis=axis,
        matrix=matrix,
        effective=effective,
        resolution=resolution,
        lowest=float(array.min()),
        highest=float(array.max()),
        intensity=intensity_scale(array),
        negative=negative,
        remarks=tuple(remarks),
    )


def ends(array: np.ndarray) -> tuple[float, float]:
    """The values between which a scan's intensities are judged: single voxels, as of padding, do not count."""
    low, high = np.percentile(array, (0.1, 99.9))
    return float(low), float(high)


def no_magnitude(array: np.ndarray, between: tuple[float, float], *, signed: bool = False) -> str | None:
    """Why a scan with these `ends` does not look like a magnitude image, in one sentence; None if it does.

    Negative values, unless `signed`: more than 1 % of the voxels (a t-map, a signed or negated image). Phase: the
    values fill the range of a phase, in radians or in a scanner's 12-bit units, and neighbours differ by a fifth of it
    on average, because the phase in air is uniform noise (magnitude images: by a tenth or less).
    """
    lowest, highest = between
    spans = ((-np.pi, np.pi), (0.0, 2 * np.pi), (-4096.0, 4095.0), (0.0, 4095.0), (-2048.0, 2047.0))
    for low, high in spans:
        near = 0.02 * (high - low)
        if low - near < lowest < low + near and high - near < highest < high + near:
            axis = int(np.argmax(array.shape))
            if np.abs(np.diff(array.astype(np.float32), axis=axis)).mean() > PHASE_STEP * (high - low):
                return f"its values fill {low:.4g} to {high:.4g} like noise, as those of a phase image do"
    if not signed and (negative := too_negative(array)):
        return f"{negative}, as in a t-map or in a signed or negated image"
    return None


def too_negative(array: np.ndarray) -> str:
    """The share of negative voxels in words, if it is larger than in a magnitude image; else empty."""
    share = float(np.mean(array < 0))
    return f"{100 * share:.0f} % of its voxels are negative" if share > MOST_NEGATIVE else ""


def stated_matrix(volume: Volume, axis: int) -> tuple[int | None, int | None]:
    """The acquisition matrix that a DICOM header states, along the two axes of a slice across `axis`; None: unknown."""
    if not isinstance(volume.header, DicomSeries) or axis != 2:
        return None, None
    dataset = next(iter(volume.header.datasets.values()))
    try:
        # frequency rows, frequency columns, phase rows, phase columns; one of each direction is not 0
        given = [int(value) for value in dataset.get("AcquisitionMatrix") or ()]
    except (TypeError, ValueError):
        return None, None
    if len(given) != 4:
        return None, None
    return (given[1] or given[3] or None), (given[0] or given[2] or None)


def measured_matrix(volume: Volume, axis: int) -> tuple[int, int]:
    """(h, w) of the filled k-space of slices across `axis`: `effective_matrix`, with the header's matrix as a hint."""
    return effective_matrix(np.moveaxis(volume.array, axis, 0), stated_matrix(volume, axis))


def _orientation(volume: Volume, axis: int) -> tuple[str | None, float | None]:
    """One letter of R L A P S I per axis, and the degrees between the slices' normal and the nearest patient axis."""
    if not any(volume.codes):
        return None, None
    import nibabel

    letters = "".join(nibabel.aff2axcodes(volume.affine))
    first, second = (volume.affine[:3, a] for a in in_plane(axis))
    normal = np.cross(first, second)
    return letters, float(np.degrees(np.arccos(min(1.0, np.abs(normal).max() / np.linalg.norm(normal)))))


def trained_spacings(model: "SRModel") -> tuple[float, float] | None:
    """The finest and the coarsest pixel in the training data of the weights, in mm; None: unknown."""
    stored = model.provenance.get("spacings_mm")  # any JSON
    try:
        sizes = np.asarray(stored, np.float64) if isinstance(stored, list | tuple) else np.empty(0)
    except (TypeError, ValueError):
        return None
    if not sizes.size or not ((sizes > 0) & (sizes < np.inf)).all():
        return None
    return float(sizes.min()), float(sizes.max())


def is_far(pixel: tuple[float, float], trained: tuple[float, float]) -> bool:
    """Whether a `pixel` (mm, mm) is so far from `trained_spacings` that the result may be worse than reported."""
    return min(pixel) < trained[0] / FAR_SPACING or max(pixel) > trained[1] * FAR_SPACING


def spacing_remark(model: "SRModel", volume: Volume, axis: int) -> str:
    """Compares the pixel sizes of the training data with those of a scan's slices across `axis`, in one line."""
    trained = trained_spacings(model)
    if trained is None:
        return "the weights do not record the pixel sizes of their training data"
    known = f"the weights were trained on pixels of {pixel_range(*trained)}"
    if not any(volume.codes):
        return f"{known}; the pixel size of this file is of unknown origin"
    first, second = in_plane(axis)
    pixel = (volume.spacing[first], volume.spacing[second])
    given = f"{pixel[0]:.3g} x {pixel[1]:.3g} mm"
    if trained[0] <= min(pixel) and max(pixel) <= trained[1]:
        return f"{known}; this scan's {given} are among them"
    if is_far(pixel, trained):
        return f"{known}; this scan's {given} are far from that, and the result may be worse than reported"
    return f"{known}; this scan's {given} are near that"
