"""Makes scans with thick slices isotropic: the resolution across slices becomes that within slices.

A cubic spline interpolates the scan along the slice direction. A network trained to restore thick slices
(`DeformMambaSR(scale=1)`, the weights `thick`) is applied to the sections along both in-plane axes (sagittal and
coronal for an axial scan). The result is the mean of both, and half their difference is the uncertainty. Optionally,
the network is first adapted to the scan. The training data are the scan's in-plane slices, blurred and downsampled
along one axis to the slice thickness; they have the right anatomy and contrast.

Some in-plane slices are held out from adaptation and degraded in the same way. On them, network and spline are
compared: this is the expected gain. If there is no gain, the spline is the result.

Grid: the centre of the first slice is unchanged, and voxels follow at intervals of `to` mm.

Source: Zhao et al., SMORE, IEEE TMI 40 (2021); Remedios et al., ECLARE, arXiv 2503.10822.
"""

import copy
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deformmamba.annotations import check_seed
from deformmamba.data.thick_slices import EMPTY, trained_on
from deformmamba.errors import InvalidArgument, counted
from deformmamba.inference.adaptation import Gain, best_of, parse_adapt, split_slices
from deformmamba.inference.inputs import intensity_cautions, opened
from deformmamba.inference.networks import check_precision, unwrapped
from deformmamba.inference.networks import network as known
from deformmamba.inference.provenance import distrust, weights_hash, weights_name
from deformmamba.inference.sections import by_sections
from deformmamba.inference.settings import Settings
from deformmamba.inference.slice_consistency import consistent
from deformmamba.inference.stack import Stack
from deformmamba.physics.consistency import Consistency, check_consistency
from deformmamba.physics.slice_profile import SliceProfile, along
from deformmamba.tensors import check_device, on_cpu_by_default, with_full_precision
from deformmamba.volume import Volume, VolumeError, read_volume
from deformmamba.volume.files import warn_of
from deformmamba.volume.inspection import is_far, trained_spacings
from deformmamba.weights.cards import pixel_range

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

MODEL = "thick"
NO_ADAPTATION = "there was no adaptation, because the slices are too small, or too few of them hold anatomy"
FAR_RATIO = 1.25  # a slice spacing farther than this factor from those of the training data gives a warning


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
        expected: the gain on held-out slices; None: the slices are too small to measure it.
        adapted: steps of adaptation.
        inconsistency: root mean square difference between the input slices and slices simulated from the result, as a
            share of the intensity range: before and after the correction.
        disagreement: mean absolute difference of the two orientations inside the anatomy, as a share of the range.
        uncertainty: half the difference of the two orientations in each voxel, in scanner units; None for the spline.
        weights, sha256: of the network; None without a file, and for sha256 after adaptation.
        seed, seconds: of the whole run.
        remarks: further remarks, one line each.
        cautions: reasons why the result may be worse than reported, a sentence each; also given as warnings.
        notes: the reader's remarks about the file, see `Volume.notes`, and what else a reader of the result should
            know, such as a scan that the scanner interpolated; the latter are also given as warnings.
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
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def warned(self) -> tuple[str, ...]:
        """All that a reader of the result should know, a sentence each: the notes and the cautions."""
        return (*self.notes, *self.cautions)

    def __str__(self) -> str:
        """The gain in one sentence."""
        if self.expected is None:
            return "expected gain over cubic interpolation: not measured, the slices are too small or empty"
        gain = self.expected
        measured = f"(measured on {counted(gain.slices, 'slice')} of this scan)"
        if self.method == "spline":
            return f"no gain over cubic interpolation: {gain.db:+.1f} dB {measured}; the cubic spline was written"
        return f"expected gain over cubic interpolation {gain.db:+.1f} dB {measured}"

    def facts(self) -> dict[str, Any]:
        """Everything except the uncertainty map, as JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "uncertainty"}
        return {**plain, "expected": None if self.expected is None else {**vars(self.expected), "db": self.expected.db}}


@on_cpu_by_default
@with_full_precision
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

    Outliers such as a marker (`physics.edges.outliers`, in a slice's plane) are hidden from the network and the spline,
    which they would make ring. They are interpolated linearly, and a remark of the report states it.

    Args:
        scan: a `Volume`, a nibabel image, or the path of a scan (which gives a `Volume`).
        to: voxel size of the result in mm. None: the in-plane pixel, or its true resolution in k-space if the scanner
            interpolated the slices. In-plane, another size is reached by resampling in k-space.
        thickness: of a slice in mm. None: DICOM's SliceThickness, else the spacing between slices.
        profile: "gaussian" (full width at half maximum: the thickness), "boxcar", or a file of two columns, mm from the
            slice centre and weight.
        model: a name, a path or a model; at scale 1, trained for the slice direction.
        adapt: minutes of adaptation to this scan, such as 3; or "400 steps"; 0: no adaptation. Minutes are converted to
            steps by timing them; the report states the number.
        seed: of the adaptation. Equal seeds, steps and threads give equal results.
        consistency: correct the result so that averaging it by the profile gives the input slices.
            "object": inside the anatomy only, reduced by the estimated noise. "exact": everywhere. "off": none.
            The spline is never corrected.
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
    seed = check_seed(seed)
    volume, back, _ = opened(_with_spacing(scan), Settings())
    job = Stack.of(volume, to=to, thickness=thickness, profile=profile, axis=axis)
    network = loaded(model, device)
    low, high = job.limits
    width = np.float32(high - low)
    slices = torch.from_numpy((job.slices - np.float32(low)) / width)
    held, own = split_slices(slices, job)
    chosen, gain, adapted = best_of(network, held, own, job, minutes, steps, seed, progress)
    least = (job.lowest - low) / (high - low)
    done = restored(chosen, slices, job, consistency, least, progress)
    fine = job.completed(done.image.numpy() * width + np.float32(low))
    out = np.asfortranarray(np.moveaxis(fine, 0, job.axis), np.float32)
    spread = None if done.spread is None else np.moveaxis(done.spread.numpy() * width, 0, job.axis)
    notes = (*job.notes, *([NO_ADAPTATION] if (minutes or steps) and not len(own) else []))
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
        shape=(out.shape[0], out.shape[1], out.shape[2]),
        expected=gain,
        adapted=adapted,
        inconsistency=done.inconsistency,
        disagreement=done.disagreement,
        uncertainty=spread,
        weights=weights_name(network),
        sha256=weights_hash(network),
        seed=seed,
        seconds=time.perf_counter() - start,
        remarks=job.remarks,
        cautions=_cautions(None if chosen is None else network, job),
        notes=(*job.place.notes, *notes),
    )
    warn_of(notes)
    return back(replace(job.place, notes=report.notes), out), report


def _with_spacing(scan: Any) -> Any:
    """A `Volume` or a nibabel image."""
    if isinstance(scan, (str, os.PathLike)):
        return read_volume(scan)
    if not isinstance(scan, Volume) and not hasattr(scan, "dataobj"):
        raise VolumeError(
            f"isotropic takes a Volume, a nibabel image or a path, not {type(scan).__name__}, which has no voxel "
            "spacing; make a Volume(array, affine)"
        )
    return scan


def _cautions(network: "SRModel | None", job: Stack) -> tuple[str, ...]:
    """Reasons why the result may be worse than reported: intensities, voxels or spacings unlike the training data.

    `network`: None for the spline. They are also given as warnings.
    """
    cautions = [*intensity_cautions(job.place.array, signed=True), *(_far(network, job) if network else [])]
    warn_of(cautions)
    return tuple(cautions)


def _far(network: "SRModel", job: Stack) -> list[str]:
    """Voxels or slice spacings far from the training data, a sentence each."""
    found = []
    trained = trained_spacings(network)
    if trained and any(job.place.codes) and is_far((job.to, job.to), trained):
        known = pixel_range(*trained)
        found.append(f"the voxels of the result are {job.to:.3g} mm, the weights were trained on {known}")
    data = trained_on(network.provenance)
    ratios = data["ratio"] if data else None
    if ratios and not min(ratios) / FAR_RATIO <= job.ratio <= max(ratios) * FAR_RATIO:
        found.append(
            f"the slices are {job.ratio:.3g} voxels of the result apart, the weights were trained on "
            f"{min(ratios):.3g} to {max(ratios):.3g}"
        )
    return [f"{text}: the result may be worse than reported" for text in found]


class Restored(NamedTuple):
    """An isotropic image (n_fine, h, w), about [0, 1], and its agreement with the slices and between orientations.

    Attributes:
        spread: half the difference of the two orientations in each voxel; None for the spline.
        disagreement, inconsistency: as in `IsotropicReport`.
    """

    image: torch.Tensor
    spread: torch.Tensor | None
    disagreement: float
    inconsistency: tuple[float, float]


def restored(
    network: torch.nn.Module | None,
    slices: torch.Tensor,
    job: Stack,
    consistency: Consistency,
    least: float,
    progress: bool,
) -> Restored:
    """The isotropic image from slices (n, h, w), about [0, 1]: by the network, or for None by the cubic spline.

    `least`: smallest value of the result.
    """
    operator = job.operator()
    image, spread, disagreement = along(job.spline(), slices, 0), None, 0.0

    def inconsistency() -> float:
        return float((operator(image, 0) - slices).square().mean().sqrt())

    if network is not None:
        one, other = by_sections(network, image, progress)
        image, spread = (one + other) / 2, (one - other).abs() / 2
    before = inconsistency()
    if network is not None:
        image = consistent(image, slices, operator, consistency)
    image = image.clamp(min=least)
    if spread is not None and bool((image > EMPTY).any()):
        disagreement = 2 * float(spread[image > EMPTY].mean())
    return Restored(image, spread, disagreement, (before, inconsistency()))


def cubic_spline(volume: Volume, **geometry: Any) -> np.ndarray:
    """The voxels of the result by cubic interpolation alone (outliers: linear); `geometry` as `Stack.of`."""
    job = Stack.of(volume, **geometry)
    fine = job.completed(along(job.spline(), torch.from_numpy(job.slices), 0).numpy())
    return np.moveaxis(fine, 0, job.axis)


def loaded(model: "str | os.PathLike[str] | SRModel", device: str | torch.device | None) -> "SRModel":
    """The network for the slice direction, in eval mode; a copy of a given model, which keeps its mode and device.

    Raises:
        InvalidArgument: weights that change the size of an image, or a missing device.
    """
    if device is not None:
        check_device(device)
    network: SRModel = known(model)
    check_precision(network)
    if network.scale != 1:
        name = weights_name(network) or type(network).__name__
        raise InvalidArgument(
            f"{name} upscales slices in-plane by {network.scale}; the slice direction needs weights of scale 1, such "
            f'as "{MODEL}"'
        )
    network = network if isinstance(model, (str, os.PathLike)) else copy.deepcopy(unwrapped(network))
    return (network if device is None else network.to(device)).eval()


def derivation(report: IsotropicReport) -> str:
    """One line of ASCII for an image header: this package, the method, the weights and their hash."""
    from deformmamba import __version__

    how = "cubic spline"
    if report.method == "network":
        weights = f"{report.weights or 'weights without a file'}, sha256 {report.sha256 or 'none'}"
        how = weights
        if report.adapted:
            how += f", adapted for {counted(report.adapted, 'step')}, seed {report.seed}"
    mark = distrust(report.cautions, report.notes)
    line = f"deformmamba {__version__}, {mark}isotropic to {report.to:.4g} mm, {how}"
    return line.encode("ascii", "replace").decode()


def without_spread(report: IsotropicReport) -> IsotropicReport:
    """The report without the uncertainty map, which is as large as the scan."""
    return replace(report, uncertainty=None)
