"""Converts the inputs of `upscale` to a `Volume`, and its result back to an object of the same kind."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deformmamba.errors import InvalidType
from deformmamba.inference.settings import Settings
from deformmamba.volume import Volume, VolumeError, from_nibabel, read_volume, to_nibabel

# Converts (geometry and header of the result, its voxels) to an object of the same kind as the input.
Back = Callable[[Volume, np.ndarray], Any]

# the range of float32, with a margin for squares and overshoot
LARGEST, SMALLEST = 1e18, 1e-18

# Share of voxels that may be negative in a magnitude image (interpolation makes some).
MOST_NEGATIVE = 0.01
# Mean difference of neighbours over the range of values: 1/3 for uniform noise, at most 0.1 for LR magnitude images of
# the validation split.
PHASE_STEP = 0.2


def opened(scan: Any, settings: Settings) -> tuple[Volume, Back, Settings]:
    """The scan as a volume, the function that converts a result back, and the settings that fit the volume.

    Raises:
        VolumeError: not 2-D or 3-D, or an axis for a 2-D image; or as `read_volume`.
        InvalidType: a model, because the arguments are swapped.
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
    if isinstance(scan, torch.Tensor):
        plain = scan.detach().cpu()
        array = (plain.float() if plain.is_floating_point() else plain).numpy()  # numpy has no bfloat16
    else:
        array = np.asarray(scan)
    if array.ndim not in (2, 3):
        raise VolumeError(
            f"a scan is 2-D (h, w) or 3-D, not {array.shape}; for a batch of images call the model itself"
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


def is_list(scan: Any) -> bool:
    """Whether `scan` is a list or tuple of scans; a nested list of numbers is one image."""
    kinds = (Volume, torch.Tensor, np.ndarray, str, os.PathLike)
    return isinstance(scan, (list, tuple)) and any(isinstance(one, kinds) or hasattr(one, "dataobj") for one in scan)


def of_list(scans: Any, upscaled: Callable[..., Any]) -> list[Any]:
    """The results for a list. Slices (h, w) of one size and kind are one scan, stacked along axis 0."""
    shapes = {tuple(one.shape) for one in scans if isinstance(one, (np.ndarray, torch.Tensor))}
    kinds = {type(one) for one in scans}
    if len(scans) > 1 and len(kinds) == 1 and len(shapes) == 1 and len(next(iter(shapes))) == 2:
        is_tensor = isinstance(scans[0], torch.Tensor)
        made = upscaled(torch.stack(tuple(scans)) if is_tensor else np.stack(scans), axis=0)
        return list(zip(*made, strict=True)) if isinstance(made, tuple) else list(made)
    return [upscaled(one) for one in scans]


def check_voxels(array: np.ndarray) -> None:
    """Raises VolumeError for voxels that are complex, NaN or infinite, or too large or too small for float32."""
    if array.dtype.kind not in "iuf":
        raise VolumeError(
            f"the scan has the type {array.dtype}, not real numbers; take the magnitude of complex ones first"
        )
    if not np.isfinite(array).all():
        raise VolumeError("the scan holds NaN or infinite voxels; replace them first")
    largest = max(abs(float(array.max())), abs(float(array.min())))
    if largest > LARGEST or 0 < largest < SMALLEST:
        raise VolumeError(
            f"the largest voxel is {largest:.3g}, outside the range of float32 results; scale the scan first so that "
            f"it lies between {SMALLEST:g} and {LARGEST:g}"
        )


def no_magnitude(array: np.ndarray) -> str | None:
    """Why a scan does not look like a magnitude image, in one sentence; None if it does.

    Negative values: more than 1 % of the voxels (a t-map, a signed or negated image). Phase: the values fill the range
    of a phase, in radians or in a scanner's 12-bit units, and neighbours differ by a fifth of it on average, because
    the phase in air is uniform noise (magnitude images: by a tenth or less).
    """
    negative = float(np.mean(array < 0))
    lowest, highest = float(array.min()), float(array.max())
    spans = ((-np.pi, np.pi), (0.0, 2 * np.pi), (-4096.0, 4095.0), (0.0, 4095.0), (-2048.0, 2047.0))
    for low, high in spans:
        near = 0.02 * (high - low)
        if low - near < lowest < low + near and high - near < highest < high + near:
            axis = int(np.argmax(array.shape))
            if np.abs(np.diff(array.astype(np.float32), axis=axis)).mean() > PHASE_STEP * (high - low):
                return f"its values fill {low:.4g} to {high:.4g} like noise, as those of a phase image do"
    if negative > MOST_NEGATIVE:
        return f"{100 * negative:.0f} % of its voxels are negative, as in a t-map or in a signed or negated image"
    return None
