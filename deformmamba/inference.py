"""From a scan to a sharper scan: normalise, slice, run the model, correct, restore units, place in the world."""

import warnings
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from deformmamba.kspace import data_consistency, degrade
from deformmamba.volume import Volume, VolumeError, intensity_scale, normalise, restore, slice_axis

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

Scan = TypeVar("Scan", Volume, np.ndarray, torch.Tensor)

# HR pixels in one batch on a CPU: larger batches cost memory and gain no speed there
CPU_BATCH_PIXELS = 1 << 18
# of the accelerator's free memory, after one slice has shown what a slice takes
FREE_MEMORY_SHARE = 0.6
# spacings beyond this factor of the range that the weights were trained on are warned about
FAR_SPACING = 1.5


def upscale(
    model: "SRModel",
    scan: Scan,
    *,
    axis: int | None = None,
    batch_size: int | None = None,
    consistency: bool | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Scan:
    """`scan` at `model.scale` times the in-plane resolution: the same kind of object, float32, in the same units.

    Slices are taken across `axis`, whole, and divided by one intensity scale of the whole scan by the model's rule.
    The number of slices stays. Magnitude images stay so: negative outputs become 0 if the scan has no negative value,
    and are kept if it has one.

    Args:
        model: any SRModel; run in eval mode.
        scan: a `Volume`, whose affine follows on the model's grid; or real numbers (h, w) or 3-D as an array or tensor.
        axis: where slices are stacked; None: `volume.slice_axis`, which for bare numbers, whose geometry nobody knows,
            is the last axis (or the only one of length 1). (slices, h, w) needs axis=0.
        batch_size: slices at once; None: as memory allows.
        consistency: correct each slice so that degrading it gives the input back (`kspace.data_consistency`; before
            negative values become 0); None: what was found best for the weights (`model.consistency`, else off).
        device: where to run; moves the model there. None: where the model is.
        progress: a bar on stderr, if that is a terminal.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, not 2-D or 3-D, no such axis, or slices smaller than the
            model takes.
        ValueError: consistency asked of a model on the half-pixel grid.
    """
    if isinstance(scan, Volume):
        array = _upscaled(model, scan, axis, batch_size, consistency, device, progress)
        return scan.resampled(array, model.scale, _in_plane(_axis(scan, axis)), model.grid)
    if isinstance(scan, torch.Tensor):
        plain = scan.detach().cpu()
        array = (plain.float() if plain.is_floating_point() else plain).numpy()  # numpy has no bfloat16
    else:
        array = np.asarray(scan)
    if array.ndim not in (2, 3):
        raise VolumeError(f"a scan is (h, w) or 3-D, not {array.shape}; a batch of images goes to the model itself")
    if array.ndim == 2 and axis is not None:
        raise VolumeError("axis chooses among the axes of a 3-D scan; a 2-D one is a slice already")
    volume = Volume(array if array.ndim == 3 else array[:, :, None], np.eye(4), codes=(0, 0))
    sharp = _upscaled(model, volume, axis if array.ndim == 3 else 2, batch_size, consistency, device, progress)
    sharp = sharp if array.ndim == 3 else sharp[:, :, 0]
    return torch.from_numpy(sharp).to(scan.device) if isinstance(scan, torch.Tensor) else sharp


def coarsen(volume: Volume, scale: int, *, axis: int | None = None) -> Volume:
    """The other way: what a scanner measuring 1 / `scale` of the k-space per in-plane axis would have given, float32.

    Magnitude, slice by slice (`kspace.degrade`); rows and columns beyond a multiple of `scale` are left out at the end,
    so that voxel 0 stays where it is.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, no such axis, or slices smaller than `scale`.
    """
    axis = _axis(volume, axis)
    _check_voxels(volume.array)
    slices = np.moveaxis(volume.array, axis, 0)
    h, w = (n // scale for n in slices.shape[1:])
    if min(h, w) < 1:
        raise VolumeError(f"slices across axis {axis} are {slices.shape[1]}x{slices.shape[2]}, too small for 1/{scale}")
    out = np.empty([n if a == axis else n // scale for a, n in enumerate(volume.array.shape)], np.float32, order="F")
    coarse = np.moveaxis(out, axis, 0)
    for k, image in enumerate(slices):
        hr = torch.from_numpy(np.ascontiguousarray(image[: h * scale, : w * scale], np.float32))
        coarse[k] = degrade(hr, scale).numpy()
    return volume.resampled(out, 1 / scale, _in_plane(axis), "origin")


def _axis(volume: Volume, axis: int | None) -> int:
    if axis is None:
        return slice_axis(volume)
    if axis not in (0, 1, 2):
        raise VolumeError(f"axis is where slices are stacked: 0, 1 or 2, not {axis!r}")
    return axis


def _in_plane(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)


def _upscaled(
    model: "SRModel",
    volume: Volume,
    axis: int | None,
    batch_size: int | None,
    consistency: bool | None,
    device: str | torch.device | None,
    progress: bool,
) -> np.ndarray:
    from tqdm import tqdm

    axis = _axis(volume, axis)
    _check(model, volume, axis)
    if consistency is None:
        consistency = model.consistency
    if consistency and model.grid != "origin":
        raise ValueError(f'consistency is defined for the "origin" grid; {type(model).__name__} has {model.grid!r}')
    if device is not None:
        model.to(device)
    device = next((p.device for p in model.parameters()), torch.device(device or "cpu"))

    intensity = intensity_scale(volume.array, model.intensity)
    signed = bool((volume.array < 0).any())
    slices = np.moveaxis(volume.array, axis, 0)
    shape = [n if a == axis else n * model.scale for a, n in enumerate(volume.array.shape)]
    # the order in which NIfTI is written: slices along the last axis are then contiguous
    out = np.empty(shape, np.float32, order="F")
    sharp = torch.from_numpy(np.moveaxis(out, axis, 0))

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(slices), unit="slice", disable=None if progress else True) as bar:
            start = 0
            while start < len(slices):
                n = batch_size or _batch(model, slices.shape[-2:], device, first=start == 0)
                lr = torch.from_numpy(np.ascontiguousarray(slices[start : start + n], np.float32)).to(device)
                lr = normalise(lr, intensity)[:, None]
                sr = model(lr).float()
                if consistency:
                    sr = data_consistency(sr, lr, model.scale, magnitude=not signed)
                sr = restore(sr[:, 0], intensity)
                sharp[start : start + n] = sr if signed else sr.clamp_(min=0)
                start += len(lr)
                bar.update(len(lr))
    finally:
        model.train(was_training)
    return out


def _batch(model: "SRModel", size: tuple[int, ...], device: torch.device, *, first: bool) -> int:
    """How many slices of `size` to run at once."""
    if device.type != "cuda":
        return max(1, CPU_BATCH_PIXELS // (size[0] * size[1] * model.scale**2))
    if first:
        torch.cuda.reset_peak_memory_stats(device)
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    reusable = torch.cuda.memory_reserved(device) - held
    slice_bytes = max(1, torch.cuda.max_memory_allocated(device) - held)
    return max(1, int(FREE_MEMORY_SHARE * (free + reusable) / slice_bytes))


def _check(model: "SRModel", volume: Volume, axis: int) -> None:
    array, in_plane = volume.array, _in_plane(axis)
    _check_voxels(array)
    size = [array.shape[a] for a in in_plane]
    if min(size) < model.minimum_size:
        raise VolumeError(
            f"slices across axis {axis} are {size[0]}x{size[1]} pixels, the smallest that {type(model).__name__} takes "
            f"is {model.minimum_size}x{model.minimum_size}; choose another axis or pad the scan"
        )
    trained = np.ravel(model.provenance.get("spacings_mm") or [])
    if trained.size and any(volume.codes):
        given = [volume.spacing[a] for a in in_plane]
        if min(given) < trained.min() / FAR_SPACING or max(given) > trained.max() * FAR_SPACING:
            warnings.warn(
                f"the pixels are {given[0]:.3g} x {given[1]:.3g} mm, the weights were trained on {trained.min():.3g} "
                f"to {trained.max():.3g} mm: the result may be worse than reported",
                stacklevel=4,
            )


def _check_voxels(array: np.ndarray) -> None:
    if array.dtype.kind not in "iuf":
        raise VolumeError(f"the scan holds {array.dtype}, not real numbers; of complex ones take the magnitude first")
    if not np.isfinite(array).all():
        raise VolumeError("the scan holds NaN or infinite voxels; replace them first")
