"""A checked scan as a stack of slices, and the grid of the isotropic result.

Grid: the centre of the first slice is unchanged, and voxels follow at intervals of `to` mm.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deformmamba.data.thick_slices import robust_range
from deformmamba.errors import InvalidArgument, counted, shown
from deformmamba.inference.inputs import check_voxels
from deformmamba.physics.edges import have_outliers, outliers, smooth_part
from deformmamba.physics.slice_profile import (
    SliceProfile,
    ThickSlices,
    along,
    is_millimetres,
    linear_matrix,
    resampled_linearly,
    resampled_positions,
    slice_positions,
    slice_profile,
    spline_matrix,
)
from deformmamba.volume import NothingToDo, Volume, VolumeError, chosen_axis, in_plane
from deformmamba.volume.inspection import measured_matrix

LEAST_RATIO = 1.3  # slice spacing divided by the wanted voxel size; below this ratio a scan counts as isotropic
TRAINED_RATIOS = (2.0, 8.0)  # of the weights `thick`
FINEST = 4  # the voxels of the result are at most this many times finer than the in-plane pixel
FEWEST_SLICES = 8
MOST_SHEAR = 1.0  # degrees between the slices' normal and the direction in which they are stacked
UNLIKE, ALIKE = 0.2, 0.5  # correlations of two slices: below the first they share no anatomy, above the second they do
ROUNDING = 1e-4  # relative error of a spacing that follows from a float32 affine
SQUARE = 1.05  # in-plane pixels whose sides differ by a smaller factor are not resampled


@dataclass(frozen=True)
class Stack:
    """A checked scan as a stack of slices (n, h, w), with the geometry of the result.

    Attributes:
        slices: float32, scanner units; with the in-plane pixels of the result, without outliers such as a marker.
        spots: (n, h, w), what the outliers add to `slices` (`physics.edges.outliers`, in a slice's plane).
        limits: the `robust_range` of the scan.
        lowest: the lowest voxel, except for outliers; the result has none below it.
        place: geometry and header of the result; its array is the input's.
        notes: what a reader of the result should know about the scan; `remarks`: further facts. A line each.
    """

    slices: np.ndarray
    spots: np.ndarray
    limits: tuple[float, float]
    lowest: float
    place: Volume
    axis: int
    spacing: float
    to: float
    pixel: tuple[float, float]
    profile: SliceProfile
    thickness_from: str
    remarks: tuple[str, ...]
    notes: tuple[str, ...]

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
        """(n_fine, n): cubic interpolation from the slices to the result's; beyond the last centre it is constant."""
        at = (torch.arange(self.n_fine, dtype=torch.float64) / self.ratio).clamp(max=len(self.slices) - 1)
        return spline_matrix(len(self.slices), at)

    def linear(self) -> torch.Tensor:
        """(n_fine, n): linear interpolation from the slices to the result's."""
        return linear_matrix(len(self.slices), torch.arange(self.n_fine, dtype=torch.float64) / self.ratio)

    def fine_spots(self) -> np.ndarray:
        """What the outliers add to the result, (n_fine, h, w), scanner units."""
        return along(self.linear(), torch.from_numpy(self.spots), 0).numpy()

    def completed(self, fine: np.ndarray) -> np.ndarray:
        """The result (n_fine, h, w) from that without outliers, scanner units: with them, and not below `lowest`."""
        return np.maximum(fine, np.float32(self.lowest)) + self.fine_spots()

    def operator(self) -> ThickSlices:
        """The linear operator from the result to the slices."""
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
        to = check_voxel(to)
        axis = chosen_axis(volume, axis)
        check_voxels(volume.array)
        array = np.ascontiguousarray(np.moveaxis(volume.array, axis, 0), np.float32)  # also from a flipped view
        spacing = _checked_spacing(volume, axis)
        remarks, notes = list[str](), list[str]()
        first, second = in_plane(axis)
        sides = [volume.spacing[first], volume.spacing[second]]
        pixel = (sides[0], sides[1])
        wanted, estimated = sides, to is None
        if to is None:
            wanted = _resolved(array, sides, measured_matrix(volume, axis), notes)
            to = math.sqrt(wanted[0] * wanted[1]) if max(wanted) <= SQUARE * min(wanted) else min(wanted)
        if to * FINEST < min(sides):
            raise InvalidArgument(
                f"to is {to:.3g} mm, but pixels are {min(sides):.3g} mm, so smaller voxels contain no new information; "
                f"give {min(sides) / FINEST:.2g} mm or more"
            )
        if (ratio := spacing / max(to, min(sides))) < LEAST_RATIO:  # `to` cannot make thin slices thick
            raise _isotropic_already(spacing, to, min(sides), ratio, estimated and wanted != sides)
        if (n_slices := len(array)) < FEWEST_SLICES:
            held = counted(n_slices, "slice")
            raise VolumeError(f"the scan has {held}; at least {FEWEST_SLICES} are needed to interpolate between them")
        limits, spots = _outliers(array)
        _check_slices(array, array - spots)
        if n_spots := int(np.count_nonzero(spots)):
            remarks.append(f"outliers, such as a marker, that were interpolated linearly: {counted(n_spots, 'voxel')}")
        lowest = float(array[spots == 0].min())
        array = array - spots  # the former may be a view of the user's
        array = np.maximum(array, np.float32(lowest)) if n_spots else array
        place = volume.resampled(volume.array, spacing / to, (axis,), "origin")
        shape = list(array.shape[1:])
        for k, (n, side) in enumerate(zip(array.shape[1:], sides, strict=True)):
            m = max(1, round(n * side / to))
            if m != n and max(side, to) > SQUARE * min(side, to):  # not almost the requested voxel size already
                shape[k] = m
                place = place.resampled(place.array, m / n, ((first, second)[k],), "origin")
        if shape != list(array.shape[1:]):
            array, spots = resampled(array, shape), resampled_linearly(torch.from_numpy(spots), shape).numpy()
        found, origin = _profile_of_slice(volume, profile, thickness, spacing)
        least, most = TRAINED_RATIOS
        if not least * (1 - ROUNDING) <= spacing / to <= most * (1 + ROUNDING):
            notes.append(
                f"{spacing / to:.3g} voxels fit between two slices, and `thick` was trained for {least:g} to {most:g}: "
                "check the result before use"
            )
        said = tuple(remarks), tuple(notes)
        return cls(array, spots, limits, lowest, place, axis, spacing, to, pixel, found, origin, *said)


def _isotropic_already(spacing: float, to: float, pixel: float, ratio: float, is_estimate: bool) -> VolumeError:
    """The error for slices whose spacing is hardly more than the voxel of the result; `is_estimate`: that voxel follows
    from k-space, and was not given."""
    if is_estimate:
        return VolumeError(
            f"slices are {spacing:.3g} mm apart, and a slice resolves no more than that: its k-space is filled for "
            f"voxels of {to:.3g} mm; to=MM (--to MM) asks for smaller ones"
        )
    result = (
        f", close enough for voxels of {to:.3g} mm; smaller ones need to=MM (--to MM)"
        if to > pixel
        else f" and pixels are {pixel:.3g} mm: the scan is isotropic already"
    )
    needed = f"the ratio is {ratio:.2f}, at least {LEAST_RATIO} is needed"
    return NothingToDo(f"slices are {spacing:.3g} mm apart{result} ({needed})")


def _profile_of_slice(
    volume: Volume, profile: "str | os.PathLike[str] | SliceProfile", thickness: float | None, spacing: float
) -> tuple[SliceProfile, str]:
    """The profile of one slice, and where its thickness comes from, in words."""
    given = thickness
    if thickness is None and (known := _dicom_thickness(volume)) is not None:
        thickness, origin = known, "DICOM's SliceThickness"
    elif thickness is None:
        thickness, origin = spacing, "the spacing between slices, because the file has no thickness"
    else:
        origin = "as given"
    given_profile(profile, given)
    found = slice_profile(profile, thickness)
    if found.table is not None or isinstance(profile, SliceProfile):  # its width is not the thickness
        origin = "the width of the profile"
    if not 0.1 * spacing <= found.width() <= 4 * spacing:
        raise InvalidArgument(
            f"slices {found.width():.3g} mm thick ({origin}) do not fit slices {spacing:.3g} mm apart; give a "
            f"thickness from {0.1 * spacing:.2g} to {4 * spacing:.3g} mm (--thickness)"
        )
    return found, origin


def given_profile(profile: "str | os.PathLike[str] | SliceProfile", thickness: float | None) -> SliceProfile:
    """The profile as `slice_profile`, with a thickness of 1 mm if none is given, before the spacing is known.

    Raises:
        SliceProfileError: as `slice_profile`.
        InvalidArgument: a thickness, and a profile that has its own.
    """
    found = slice_profile(profile, 1.0 if thickness is None else thickness)
    if thickness is not None and (found.table is not None or isinstance(profile, SliceProfile)):
        raise InvalidArgument(
            f"thickness is {shown(thickness)} mm, but the profile {found.kind} is {found.width():.3g} mm wide; "
            "give one of the two"
        )
    return found


def check_voxel(to: float | None) -> float | None:
    """The voxel size as a float. Raises InvalidArgument if it is not a positive number of mm."""
    if to is None:
        return None
    if not is_millimetres(to):
        raise InvalidArgument(f"to is {shown(to)}; it must be a positive number of mm")
    return float(to)


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


def _check_slices(slices: np.ndarray, rest: np.ndarray) -> None:
    """Raises VolumeError for an empty slice between others, for two equal neighbours, or for an unlike one.

    `rest`: the slices without outliers, because a marker in one slice makes it unlike its neighbours.
    """
    full = [bool(image.any()) and float(image.max()) > float(image.min()) for image in slices]
    inside = [k for k, is_full in enumerate(full) if is_full]
    missing = [k for k in range(inside[0], inside[-1]) if not full[k]] if inside else []
    if missing:
        raise VolumeError(f"slice {missing[0]} of {len(slices)} is empty, so it is missing; the stack must be complete")
    doubled = [k for k in inside[:-1] if full[k + 1] and np.array_equal(slices[k], slices[k + 1])]
    if doubled:
        raise VolumeError(
            f"slices {doubled[0]} and {doubled[0] + 1} of {len(slices)} are the same image; remove the duplicate"
        )
    if inside and (lost := _unlike_neighbours(rest[inside[0] : inside[-1] + 1])) is not None:
        raise VolumeError(
            f"slice {inside[0] + lost} of {len(slices)} has nothing in common with its neighbours, which resemble each "
            "other: it is noise or another image, so the slice is missing; the stack must be complete"
        )


def _unlike_neighbours(slices: np.ndarray) -> int | None:
    """The first slice of a run that correlates with no neighbour, if the slices on both sides of the run correlate."""
    unit = slices.reshape(len(slices), -1) - slices.mean((1, 2))[:, None]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) + np.finfo(np.float32).tiny
    like = np.einsum("kp,kp->k", unit[:-1], unit[1:]) >= UNLIKE  # slice k and k + 1
    start = 0
    while start < len(like):
        stop = start
        while stop < len(like) and not like[stop]:
            stop += 1
        if stop - start >= 2 and unit[start] @ unit[stop] > ALIKE:
            return start + 1
        start = stop + 1
    return None


def _resolved(slices: np.ndarray, sides: Sequence[float], filled: tuple[int, int], notes: list[str]) -> list[float]:
    """The true in-plane resolution in mm, if k-space is `filled`; adds a note if it differs from the header."""
    found = [side * n / m for side, n, m in zip(sides, slices.shape[1:], filled, strict=True)]
    if filled == slices.shape[1:]:
        return list(sides)
    notes.append(
        f"the slices were interpolated by the scanner: k-space is filled to {filled[0]}x{filled[1]} of "
        f"{slices.shape[1]}x{slices.shape[2]}, so voxels of {min(found):.3g} mm were made (to=MM, --to MM, asks for "
        "others)"
    )
    return [min(found)] * 2  # the finer of the two resolutions is kept


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


def _outliers(slices: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
    """The `robust_range` of the scan, and what its outliers add to their surroundings in each slice."""
    low, high = robust_range(slices)
    width = np.float32(high - low)
    units = torch.from_numpy((slices - np.float32(low)) / width)
    spots = torch.zeros_like(units)
    unit = torch.zeros(()), torch.ones(())
    marked = have_outliers(units, *unit)
    if marked.any():
        spots[marked] = outliers(units[marked], *unit)
    return (low, high), spots.numpy() * width


def resampled(slices: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resamples slices (n, h, w) to (n, *shape) in k-space (cropped or zero-filled); pixel 0 keeps its position.

    If the edges of the field of view cut the anatomy, the smooth part of a slice (`physics.edges.smooth_part`) is
    interpolated by a cubic spline instead. If the input has no negative voxel, the result has none.
    """
    image = torch.from_numpy(np.ascontiguousarray(slices))
    smooth = smooth_part(image)
    image = image - smooth
    for axis, m in enumerate(shape, start=1):
        n = image.shape[axis]
        if m == n:
            continue
        spectrum = torch.fft.rfft(image.movedim(axis, -1), norm="forward")
        if m > n and n % 2 == 0:
            spectrum[..., -1] /= 2  # divided between -n / 2 and n / 2
        image = torch.fft.irfft(spectrum[..., : m // 2 + 1], n=m, norm="forward").movedim(-1, axis)
        smooth = along(spline_matrix(n, resampled_positions(n, m)), smooth, axis)
    new = (image + smooth).contiguous().numpy()
    return np.maximum(new, 0) if slices.min() >= 0 else new
