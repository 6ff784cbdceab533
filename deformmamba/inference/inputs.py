"""What `upscale` accepts: an object in memory becomes a `Volume`, and the result an object of the same kind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deformmamba.inference.settings import Settings
from deformmamba.volume import Volume, VolumeError, from_nibabel, to_nibabel

# Turns (geometry and header of the result, its voxels) into an object of the kind that was given.
Back = Callable[[Volume, np.ndarray], Any]


def opened(scan: Any, settings: Settings) -> tuple[Volume, Back, Settings]:
    """The scan as a volume, the way back to its kind, and the settings that fit the volume.

    Raises:
        VolumeError: not 2-D or 3-D, or an axis for a 2-D image.
    """
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
        raise VolumeError(f"a scan is (h, w) or 3-D, not {array.shape}; a batch of images goes to the model itself")
    flat = array.ndim == 2
    if flat:
        if settings.axis is not None:
            raise VolumeError("axis chooses among the axes of a 3-D scan; a 2-D one is a slice already")
        settings, array = replace(settings, axis=2), array[:, :, None]

    def back(_: Volume, out: np.ndarray) -> Any:
        out = out[:, :, 0] if flat else out
        return torch.from_numpy(out).to(scan.device) if isinstance(scan, torch.Tensor) else out

    return Volume(array, np.eye(4), codes=(0, 0)), back, settings


def check_voxels(array: np.ndarray) -> None:
    """Raises VolumeError for voxels that are complex, NaN or infinite."""
    if array.dtype.kind not in "iuf":
        raise VolumeError(f"the scan holds {array.dtype}, not real numbers; of complex ones take the magnitude first")
    if not np.isfinite(array).all():
        raise VolumeError("the scan holds NaN or infinite voxels; replace them first")
