"""The other way: volumes that are coarser, slice by slice."""

from collections.abc import Callable

import numpy as np
import torch

from deformmamba.inference.upscaling import check_voxels, chosen_axis, in_plane
from deformmamba.inspection import effective_matrix
from deformmamba.kspace import crop_spectrum, degrade, fft2c, ifft2c
from deformmamba.volume import Volume, VolumeError


def coarsen(volume: Volume, scale: int, *, axis: int | None = None) -> Volume:
    """The other way: what a scanner measuring 1 / `scale` of the k-space per in-plane axis would have given, float32.

    Magnitude, slice by slice (`kspace.degrade`); rows and columns beyond a multiple of `scale` are left out at the end,
    so that voxel 0 stays where it is.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, no such axis, or slices smaller than `scale`.
    """
    axis = chosen_axis(volume, axis)
    check_voxels(volume.array)
    h, w = (volume.array.shape[a] // scale for a in in_plane(axis))
    if min(h, w) < 1:
        size = "x".join(str(volume.array.shape[a]) for a in in_plane(axis))
        raise VolumeError(f"slices across axis {axis} are {size}, too small for 1/{scale}")

    def degraded(hr: torch.Tensor) -> torch.Tensor:
        return degrade(hr[: h * scale, : w * scale].contiguous(), scale)

    return volume.resampled(_each(volume, axis, (h, w), degraded), 1 / scale, in_plane(axis), "origin")


def to_effective(volume: Volume, *, axis: int | None = None, matrix: tuple[int, int] | None = None) -> Volume:
    """The scan as it was measured, before the scanner filled its k-space with zeros: cropped to `matrix` (h, w),
    float32.

    `matrix` None: what `inspection.effective_matrix` finds. Magnitude, slice by slice; voxel 0 stays where it is.
    Nothing is lost but the interpolation, and the networks get the pixels that they were trained on. A volume whose
    k-space is full comes back as it is.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, no such axis, or a matrix larger than the slices.
    """
    axis = chosen_axis(volume, axis)
    check_voxels(volume.array)
    first, second = in_plane(axis)
    size = volume.array.shape[first], volume.array.shape[second]
    found = effective_matrix(np.moveaxis(volume.array, axis, 0)) if matrix is None else matrix
    if found == size:
        return volume
    if not all(1 <= m <= n for m, n in zip(found, size, strict=True)):
        raise VolumeError(f"a matrix of {found[0]}x{found[1]} does not lie in slices of {size[0]}x{size[1]}")

    def cropped(image: torch.Tensor) -> torch.Tensor:
        low = ifft2c(crop_spectrum(fft2c(image), found))
        return low.abs() if (image >= 0).all() else low.real

    array = _each(volume, axis, found, cropped)
    for a, m, n in zip((first, second), found, size, strict=True):
        volume = volume.resampled(array, m / n, (a,), "origin")
    return volume


def _each(
    volume: Volume, axis: int, size: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Every slice changed to another of `size`, stacked as they were."""
    out = np.empty([*size[:axis], volume.array.shape[axis], *size[axis:]], np.float32, order="F")
    made = np.moveaxis(out, axis, 0)
    for k, image in enumerate(np.moveaxis(volume.array, axis, 0)):
        made[k] = change(torch.from_numpy(np.ascontiguousarray(image, np.float32))).numpy()
    return out
