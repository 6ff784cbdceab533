"""`Volume`: one image in scanner units with its position in the world. Affines, slice axis and intensity scale."""

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import numpy as np
import numpy.typing as npt

from deformmamba.annotations import is_integer, is_one_of
from deformmamba.errors import DeformMambaError, InvalidArgument, counted, shown


class VolumeError(DeformMambaError, ValueError):
    """A scan that cannot be read, written or upscaled; the message is one line."""


class NothingToDo(VolumeError):
    """A scan that already has what was asked for. In a folder of scans it is no failure."""


def check_unmasked(array: Any) -> None:
    """Raises VolumeError if `array` is a masked array that hides values, which would count as if they were not."""
    if np.ma.is_masked(array):
        hidden = counted(np.ma.count_masked(array), "voxel")
        raise VolumeError(f"the array is masked and hides {hidden}; fill it first: array.filled(0)")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """One 3-D image and its position in the world.

    Attributes:
        array: (i, j, k), float32 when read from a file, in scanner units.
        affine: 4x4 float64, voxel index to mm (RAS+); invertible.
        qform: the file's qform in mm, if it has one; None: the same as `affine`.
        codes: NIfTI's (qform_code, sform_code): 0 unknown, 1 scanner, 2 aligned, 3 Talairach, 4 MNI. (0, 0) means that
            the orientation in the patient is unknown: no left or right may be printed on the image.
        header: the source of units, descriptions and tags for the output: a nibabel header, or for DICOM a
            `dicom.DicomSeries`.
        slices: the axis along which slices are stacked according to the file; None: not stated.
        notes: the reader's remarks about the file, one line each: inconsistent fields, skipped files.

    Raises:
        VolumeError: the array is not a 3-D numpy array, or the affine is not an invertible 4x4 matrix.
    """

    array: np.ndarray
    affine: np.ndarray
    qform: np.ndarray | None = None
    codes: tuple[int, int] = (1, 1)
    header: Any = None
    slices: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray):
            raise VolumeError(f"a volume is a numpy array, not a {type(self.array).__name__}; convert it first")
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise VolumeError(f"a volume is a 3-D array, not one of shape {self.array.shape}")
        check_unmasked(self.array)
        if not (self.slices is None or (is_integer(self.slices) and self.slices in (0, 1, 2))):
            raise VolumeError(f"slices must be 0, 1, 2 (where slices are stacked) or None, not {shown(self.slices)}")
        if not (isinstance(self.codes, tuple) and len(self.codes) == 2 and all(map(is_integer, self.codes))):
            raise VolumeError(f"codes must be NIfTI's two codes (qform_code, sform_code), not {shown(self.codes)}")
        for form in ("affine", "qform"):
            if (matrix := getattr(self, form)) is not None or form == "affine":
                object.__setattr__(self, form, _checked_affine(matrix, form))

    def __repr__(self) -> str:
        """`Volume(64x64x20, 3.76x3.76x5 mm, RAS, int16)`; "?" if the file does not state the orientation."""
        shape = "x".join(map(str, self.array.shape))
        return f"Volume({shape}, {'x'.join(f'{mm:.3g}' for mm in self.spacing)} mm, {self.towards}, {self.array.dtype})"

    @property
    def towards(self) -> str:
        """The direction of each axis in the patient, such as "RAS"; "?" if the file does not state it."""
        if not any(self.codes):
            return "?"
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        letters, left = [""] * 3, [0, 1, 2]
        for axis in np.argsort(-np.abs(directions).max(axis=0)):
            world = max(left, key=lambda w: abs(directions[w, axis]))
            left.remove(world)
            letters[axis] = ("RL", "AP", "SI")[world][int(directions[world, axis] < 0)]
        return "".join(letters)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along each axis in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def resampled(self, array: np.ndarray, scale: float, axes: Sequence[int], grid: str) -> "Volume":
        """The volume whose voxels are `array`, `scale` times finer along `axes`: see `upscaled_affine`."""
        qform = None if self.qform is None else upscaled_affine(self.qform, scale, axes, grid)
        return replace(self, array=array, affine=upscaled_affine(self.affine, scale, axes, grid), qform=qform)


def _checked_affine(matrix: npt.ArrayLike, name: str) -> np.ndarray:
    try:
        affine = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        affine = np.empty(0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise VolumeError(f"the {name} must be a finite 4x4 matrix")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths == 0).any():
        raise VolumeError(f"the voxel spacing is zero along axis {int(np.argmin(lengths))}; correct the affine")
    # the volume of the parallelepiped of unit edges: 1 for orthogonal axes, 0 for axes in one plane
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise VolumeError(f"the {name} is singular: its axes lie in one plane")
    return affine


def upscaled_affine(affine: npt.ArrayLike, scale: float, axes: Sequence[int], grid: str) -> np.ndarray:
    """The affine after `scale`-fold super-resolution along `axes`; anatomy keeps its position in the world.

    "origin": voxel j of the fine image lies on voxel j / scale of the coarse image. Voxel 0 is the same in both, so
    the translation is unchanged. "half-pixel": voxel j lies on voxel (j + 1/2) / scale - 1/2. Outer edges coincide, so
    the translation moves by -(1 - 1 / scale) / 2 coarse voxels along each axis. A `scale` below 1 is the inverse.

    Raises:
        ValueError: `grid` is neither of the two.
    """
    if not is_one_of(grid, ("origin", "half-pixel")):
        raise InvalidArgument(f'grid must be "origin" or "half-pixel", not {shown(grid)}')
    coarse_from_fine = np.eye(4)
    for axis in axes:
        coarse_from_fine[axis, axis] = 1 / scale
        if grid == "half-pixel":
            coarse_from_fine[axis, 3] = -(1 - 1 / scale) / 2
    return np.asarray(affine, dtype=np.float64) @ coarse_from_fine


def slice_axis(volume: Volume) -> int:
    """The axis along which slices are stacked: `volume.slices`, else a guess from shape and voxel size.

    A DICOM series always states it, NIfTI in its field dim_info. The guess assumes square pixels. It is the only axis
    of length 1, if there is exactly one; else the axis whose spacing differs by more than 1 % from two equal others
    (it may be the smaller spacing: coarse pixels in thin slices); else the axis of the largest spacing, the later of
    equals: the last axis of an isotropic volume.
    """
    if volume.slices is not None:
        return volume.slices
    if volume.array.shape.count(1) == 1:
        return volume.array.shape.index(1)
    spacing = np.array(volume.spacing)

    def equal(a: float, b: float) -> bool:
        return bool(abs(a - b) <= 0.01 * max(a, b))

    square = [axis for axis in range(3) if equal(*np.delete(spacing, axis))]
    if len(square) == 1:
        return square[0]
    return int(np.flatnonzero(spacing >= 0.99 * spacing.max())[-1])


def chosen_axis(volume: Volume, axis: int | None) -> int:
    """`axis`, where slices are stacked; for None the result of `slice_axis`.

    Raises:
        VolumeError: there is no such axis.
    """
    return slice_axis(volume) if axis is None else check_axis(axis)


def check_axis(axis: Any) -> int:
    """`axis` as Python's integer. Raises VolumeError if it is not the axis along which slices are stacked."""
    if not is_integer(axis) or axis not in (0, 1, 2):
        raise VolumeError(f"axis is {shown(axis)}; it must be 0, 1 or 2, the axis along which slices are stacked")
    return operator.index(axis)


def in_plane(axis: int) -> tuple[int, int]:
    """The two axes of a slice across `axis`, in the array's order: its rows, its columns."""
    axis = check_axis(axis)
    first, second = (a for a in range(3) if a != axis)
    return first, second


def intensity_scale(array: npt.ArrayLike, rule: str = "p99.9") -> float:
    """The positive number by which a volume is divided before a model gets it.

    "p99.9" (or any other percentile): that percentile of the finite non-zero voxels, a maximum that a few bright
    vessels do not change. "max": the largest finite voxel. If that is not positive (a volume of zeros, or mostly
    below zero): the largest magnitude, or 1 if that is 0 too.

    Raises:
        ValueError: an unknown rule.
    """
    percentile = 100.0 if is_one_of(rule, ("max",)) else -1.0
    if isinstance(rule, str) and rule.startswith("p"):
        with suppress(ValueError):
            percentile = float(rule.removeprefix("p"))
    if not 0 < percentile <= 100:
        raise InvalidArgument(f'intensity rule must be "max" or a percentile such as "p99.9", not {shown(rule)}')
    values = np.asarray(array)
    values = values[np.isfinite(values) & (values != 0)]
    if values.size == 0:
        return 1.0
    scale = float(np.percentile(values, percentile))
    return scale if scale > 0 else float(np.abs(values).max())


Image = TypeVar("Image", bound=Any)


def normalise(image: Image, scale: float | Image) -> Image:
    """Scanner units to about [0, 1] (array or tensor); `scale` from `intensity_scale`. Nothing is clipped."""
    return image / scale


def restore(image: Image, scale: float | Image) -> Image:
    """The inverse of `normalise`: about [0, 1] to scanner units."""
    return image * scale
