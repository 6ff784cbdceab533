"""Converts the inputs of `upscale` to a `Volume`, and its result back to an object of the same kind."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deformmamba.errors import InvalidType, counted, one_line
from deformmamba.inference.settings import Settings
from deformmamba.tensors import has_values
from deformmamba.volume import Volume, VolumeError, from_nibabel, read_volume, to_nibabel
from deformmamba.volume.files import warn_of
from deformmamba.volume.inspection import ends, no_magnitude

# Converts (geometry and header of the result, its voxels) to an object of the same kind as the input.
Back = Callable[[Volume, np.ndarray], Any]

SCANS = "a path, a Volume, a nibabel image, an array or tensor of real numbers, or a list of these"

# the range of float32, with a margin for squares and overshoot
LARGEST, SMALLEST = 1e18, 1e-18

# a scan whose range is less than this many steps of float32 gets a warning
FEWEST_STEPS = 256


def opened(scan: Any, settings: Settings) -> tuple[Volume, Back, Settings]:
    """The scan as a volume, the function that converts a result back, and the settings that fit the volume.

    Raises:
        VolumeError: not 2-D or 3-D, an axis for a 2-D image, or masked voxels; or as `read_volume`.
        InvalidType: a model, because the arguments are swapped; or an object that holds no array of numbers.
    """
    if isinstance(scan, torch.nn.Module):
        raise InvalidType("the scan is a model: the arguments are swapped; write upscale(model, scan)")
    if isinstance(scan, (str, os.PathLike)):
        scan = read_volume(scan)
    if isinstance(scan, Volume):
        return scan, lambda place, out: replace(place, array=out), settings
    if hasattr(scan, "dataobj") and hasattr(scan, "header"):
        kind = type(scan)
        return from_nibabel(scan), lambda place, out: to_nibabel(replace(place, array=out), kind), settings
    array = _array(scan)
    if array.ndim not in (2, 3):
        raise VolumeError(
            f"a scan is 2-D (h, w) or 3-D, not {array.shape}; give one volume of several, such as scan[0], or call the "
            "model itself for a batch of images"
        )
    flat = array.ndim == 2
    if flat:
        if settings.axis is not None:
            raise VolumeError("axis is for 3-D scans; this scan is 2-D, a single slice; leave axis out")
        settings, array = replace(settings, axis=2), array[:, :, None]

    def back(_: Volume, out: np.ndarray) -> Any:
        out = out[:, :, 0] if flat else out
        return torch.from_numpy(out).to(scan.device) if isinstance(scan, torch.Tensor) else out

    return Volume(array, np.eye(4), codes=(0, 0)), back, settings


def _array(scan: Any) -> np.ndarray:
    """The numbers of an array, a tensor, nested lists, or another object that numpy can convert.

    Raises:
        InvalidType: none of these, or a tensor whose memory is not an array of numbers.
        VolumeError: masked voxels, or lists of different lengths.
    """
    if isinstance(scan, torch.Tensor):
        if scan.is_nested or scan.layout != torch.strided or scan.is_quantized:
            raise InvalidType("the scan is a sparse, nested or quantised tensor; give a dense one, as from to_dense()")
        if not has_values(scan):
            raise InvalidType(f"the scan is a tensor without values, on the device {str(scan.device)!r}")
        plain = scan.detach().cpu().resolve_conj().resolve_neg()
        array: np.ndarray = (plain.float() if plain.is_floating_point() else plain).numpy()  # numpy has no bfloat16
        return array
    if not isinstance(scan, (list, tuple)) and not _is_array(scan):
        raise InvalidType(f"the scan is of the type {type(scan).__name__}; give {SCANS}")
    _check_masked(scan)
    try:
        return np.asarray(scan)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VolumeError(f"the scan cannot be converted to an array: {one_line(error)}; give {SCANS}") from None


def _is_array(value: Any) -> bool:
    """Whether numpy takes an object as an array, or nibabel as an image."""
    return any(hasattr(value, name) for name in ("__array__", "__array_interface__", "dataobj"))


def _check_masked(array: Any) -> None:
    if np.ma.is_masked(array):
        hidden = counted(np.ma.count_masked(array), "voxel")
        raise VolumeError(f"the scan is a masked array that hides {hidden}; fill it first: scan.filled(0)")


def is_list(scan: Any) -> bool:
    """Whether `scan` is a list or tuple of scans; a nested list of numbers is one image.

    Raises:
        VolumeError: an empty list.
    """
    if not isinstance(scan, (list, tuple)):
        return False
    if not scan:
        raise VolumeError("the list of scans is empty")
    return any(isinstance(one, (Volume, str, os.PathLike)) or _is_array(one) for one in scan)


def of_list(scans: Any, upscaled: Callable[..., Any], axis: int | None) -> list[Any]:
    """The results for a list. Slices (h, w) of one size, kind and device are one scan, stacked along axis 0."""
    shapes = {tuple(one.shape) for one in scans if isinstance(one, (np.ndarray, torch.Tensor))}
    kinds = {(type(one), getattr(one, "device", None)) for one in scans}
    if len(scans) > 1 and len(kinds) == 1 and len(shapes) == 1 and len(next(iter(shapes))) == 2 and axis is None:
        for one in scans:
            _check_masked(one)  # np.stack loses the mask
        is_tensor = isinstance(scans[0], torch.Tensor)
        made = upscaled(torch.stack(tuple(scans)) if is_tensor else np.stack(scans), axis=0)
        return list(zip(*made, strict=True)) if isinstance(made, tuple) else list(made)
    return [upscaled(one) for one in scans]


def check_voxels(array: np.ndarray) -> None:
    """Raises VolumeError for voxels that are complex, masked, NaN or infinite, or too large or small for float32."""
    _check_masked(array)
    if array.dtype.kind not in "iuf":
        cure = {
            "c": "take their magnitude first",
            "b": "convert a mask to numbers to upscale it as an image",
        }
        raise VolumeError(
            f"the scan has the type {array.dtype}, not real numbers; "
            + cure.get(array.dtype.kind, "convert it first, as with scan.astype(float)")
        )
    if not np.isfinite(array).all():
        raise VolumeError("the scan holds NaN or infinite voxels; replace them first")
    largest = max(abs(float(array.max())), abs(float(array.min())))
    if largest > LARGEST or 0 < largest < SMALLEST:
        raise VolumeError(
            f"the largest voxel is {largest:.3g}, outside the range of float32 results; scale the scan first so that "
            f"it lies between {SMALLEST:g} and {LARGEST:g}"
        )


def rounding_notes(array: np.ndarray, dtype: str | None) -> tuple[str, ...]:
    """A note if the values span few whole numbers and `dtype` (None: float32) rounds the result to them.

    It is also given as a warning.
    """
    if dtype is None or np.dtype(dtype).kind == "f":
        return ()
    lowest, highest = ends(array)
    if highest - lowest >= FEWEST_STEPS:
        return ()
    note = (
        f"the values lie between {lowest:.4g} and {highest:.4g}, and {dtype} rounds the result to whole numbers: it is "
        "coarse; use float32, or scale the scan first"
    )
    warn_of([note])
    return (note,)


def intensity_cautions(array: np.ndarray, *, trained: bool = True, signed: bool = False) -> list[str]:
    """Reasons in the intensities why a result may be worse than reported, a sentence each.

    `trained`: the network has weights; interpolation takes any image. `signed`: negative values are allowed.
    """
    found, between = [], ends(array)
    if trained and (reason := no_magnitude(array, between, signed=signed)) is not None:
        found.append(
            f"the scan does not look like a magnitude image: {reason}; the weights were trained on magnitude images "
            "only, so check the result before use"
        )
    lowest, highest = between
    step = float(np.spacing(np.float32(max(abs(lowest), abs(highest)))))
    if 0 < highest - lowest < FEWEST_STEPS * step:
        found.append(
            f"the values lie between {lowest:.7g} and {highest:.7g}, where float32 has steps of {step:.2g}: subtract "
            "an offset first, or the result is coarse"
        )
    return found
