"""Reduces the resolution of volumes: simulates a coarser scan, or crops to the filled part of k-space."""

import operator
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from deformmamba.annotations import is_integer
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.inference.inputs import check_voxels
from deformmamba.physics.degradations import Degradation, KSpaceCrop, gives_magnitudes
from deformmamba.physics.edges import outliers
from deformmamba.physics.kspace import resize
from deformmamba.physics.slice_profile import resampled_linearly
from deformmamba.volume import Volume, VolumeError, chosen_axis, in_plane, intensity_scale
from deformmamba.volume.inspection import measured_matrix


def coarsen(
    volume: Volume,
    degradation: int | Degradation,
    *,
    axis: int | None = None,
    crop: bool = False,
    seed: int = 0,
) -> Volume:
    """Simulates a coarser measurement of the volume, slice by slice, float32; the result states its axis of slices.

    Args:
        volume: real numbers; noise levels are relative to its "p99.9".
        degradation: of `physics.degradations`; an integer is the scale of a k-space crop (`k_space_crop`): the image of
            a scanner that measures 1 / scale of the k-space per in-plane axis.
        axis: where slices are stacked; None: `volume.slice_axis`.
        crop: crop rows and columns at the end to a multiple of the scale, so that voxel 0 keeps its position; without
            it such slices are refused.
        seed: random seed of the noise, if any.

    A degradation that gives magnitudes takes the signs of a scan with negative voxels; it warns.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, no such axis, or slices smaller than the scale.
        ValueError: slices that are not a multiple of the scale, without `crop`.
        TypeError: `degradation` is neither a Degradation nor an integer.
    """
    if not (isinstance(degradation, Degradation) or is_integer(degradation)):
        raise InvalidType(f"coarsen: degradation is {shown(degradation)}; give an integer scale or a Degradation")
    axis = chosen_axis(volume, axis)
    check_voxels(volume.array)
    made = degradation if isinstance(degradation, Degradation) else k_space_crop(volume, operator.index(degradation))
    scale = made.scale
    _warn_of_lost_signs(volume, made)
    h, w = (volume.array.shape[a] for a in in_plane(axis))
    if min(h, w) < scale:
        raise VolumeError(f"slices across axis {axis} are {h}x{w}, too small to reduce by {scale}")
    if (h % scale or w % scale) and not crop:
        raise InvalidArgument(
            f"slices across axis {axis} are {h}x{w}, not a multiple of {scale}; give crop=True (--crop) to crop them "
            f"to {h - h % scale}x{w - w % scale}"
        )
    h, w = h - h % scale, w - w % scale
    unit = intensity_scale(volume.array)

    def coarser(image: torch.Tensor, k: int) -> torch.Tensor:
        return made(image[:h, :w] / unit, seed=seed, first=k) * unit

    coarse = _map_slices(volume, axis, made.size(h, w), coarser)
    return replace(volume.resampled(coarse, 1 / scale, in_plane(axis), made.grid), slices=axis)


def _warn_of_lost_signs(volume: Volume, degradation: Degradation) -> None:
    if gives_magnitudes(degradation) and volume.array.min() < 0:
        warnings.warn(
            f"the scan has negative voxels, and {degradation} gives magnitudes, so their signs are lost; output=real "
            "and noise instead of rician keep them",
            stacklevel=3,
        )


def k_space_crop(volume: Volume, scale: int) -> KSpaceCrop:
    """The k-space crop for a scan: with magnitude, as a scanner computes it; for negative voxels with the real part."""
    return KSpaceCrop(scale, "real" if volume.array.min() < 0 else "magnitude")


def to_effective(volume: Volume, *, axis: int | None = None, matrix: tuple[int, int] | None = None) -> Volume:
    """Undoes the scanner's zero-filling: crops the k-space to the measured `matrix` (h, w); float32.

    `matrix` None: `inspection.measured_matrix`. Slice by slice; magnitudes stay magnitudes, and voxel 0 keeps its
    position. Only the interpolation is lost, and the networks get pixels as in their training data. A volume with full
    k-space is returned unchanged. Outliers such as a marker (`physics.edges.outliers`) would ring; they are resampled
    linearly.

    Raises:
        VolumeError: voxels that are complex, NaN or infinite, no such axis, or a matrix larger than the slices.
    """
    axis = chosen_axis(volume, axis)
    check_voxels(volume.array)
    first, second = in_plane(axis)
    size = volume.array.shape[first], volume.array.shape[second]
    found = measured_matrix(volume, axis) if matrix is None else matrix
    if found == size:
        return volume
    if not all(1 <= m <= n for m, n in zip(found, size, strict=True)):
        raise VolumeError(f"a matrix of {found[0]}x{found[1]} is larger than the slices, {size[0]}x{size[1]}")

    def cropped(image: torch.Tensor, _: int) -> torch.Tensor:
        spots = outliers(image)
        low = resize(image - spots, found)
        magnitude = ((image >= 0) | (spots != 0)).all()
        return (low.abs() if magnitude else low.real) + resampled_linearly(spots, found)

    array = _map_slices(volume, axis, found, cropped)
    for a, m, n in zip((first, second), found, size, strict=True):
        volume = volume.resampled(array, m / n, (a,), "origin")
    return volume


def _map_slices(
    volume: Volume, axis: int, size: tuple[int, int], change: Callable[[torch.Tensor, int], torch.Tensor]
) -> np.ndarray:
    """Applies `change` to every slice and its number, and stacks the results, of `size`, along the same axis."""
    out = np.empty([*size[:axis], volume.array.shape[axis], *size[axis:]], np.float32, order="F")
    made = np.moveaxis(out, axis, 0)
    for k, image in enumerate(np.moveaxis(volume.array, axis, 0)):
        made[k] = change(torch.from_numpy(np.ascontiguousarray(image, np.float32)), k).numpy()
    return out
