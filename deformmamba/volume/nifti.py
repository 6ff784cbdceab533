"""Reads and writes NIfTI with nibabel's headers, and the steps that MGH shares (`mgh.py`).

The affine of a file is the sform if sform_code > 0, else the qform if qform_code > 0. With both codes 0 the file has no
affine, and each program computes one from voxel size and shape: nibabel puts the middle of the volume at the origin,
ITK its first voxel. Such a volume has `codes` (0, 0), nibabel's affine as its `affine` and ITK's as its `qform`. It is
written with explicit codes, because an affine computed from the new shape would differ.
"""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume import mgh, timing
from deformmamba.volume.files import (
    MGH_SUFFIXES,
    Bounded,
    CompressedFile,
    as_dtype,
    closed,
    parsing,
    suffix,
    volume_index,
    warn_of,
)
from deformmamba.volume.image import Volume, VolumeError

# nibabel's spatial unit in mm
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}
# The codes for an affine that the source did not state: ITK reads the qform of these two, nibabel the sform.
_UNSTATED_CODES = (1, 2)
# written to the header's `aux_file` if the source has no orientation, so that an output does not state one
_UNSTATED = b"orientation unknown"
# a gzip file cannot unpack to more than this many times its size
_MOST_UNPACKED = 1032
_SPACING_TOLERANCE = 0.005


def read(path: Path, volume: int | None) -> Volume:
    """One 3-D volume of a NIfTI or MGH file; `volume` as `volume_index`."""
    with _voxels_of(path) as (source, n_volumes):
        index = volume_index(path, n_volumes, volume)
        return source.volume(index)


def count(path: Path) -> int:
    """Number of 3-D volumes in a NIfTI or MGH file."""
    with _voxels_of(path) as (_, n_volumes):
        return n_volumes


def each(path: Path) -> Iterator[Volume]:
    """Every 3-D volume of a NIfTI or MGH file, in order, one at a time in memory; a gzip file is read once."""
    with _voxels_of(path) as (source, n_volumes):
        for index in range(n_volumes):
            with parsing(path, "a damaged file"):
                made = source.volume(index)
            is_timed = n_volumes == 1 or _is_nifti(made.header) or _time_step(made.header) > 0
            yield made if is_timed else replace(made, notes=(*made.notes, timing.UNKNOWN))


@contextmanager
def _voxels_of(path: Path) -> Iterator[tuple["_Source", int]]:
    kind = "MGH" if suffix(path) in MGH_SUFFIXES else "NIfTI"
    with parsing(path, f"not a {kind} file, or a damaged one"):
        n_bytes = path.stat().st_size
        with path.open("rb") as raw:
            start = raw.read(132)
        packed = start[:2] == b"\x1f\x8b"
        if start[128:] == b"DICM":
            raise VolumeError(f"{path}: a DICOM file with a {kind} name; rename it to end in .dcm")
        with gzip.open(path) if packed else path.open("rb") as file:
            source = _Source(path, file, n_bytes * (_MOST_UNPACKED if packed else 1), kind == "MGH")
            yield source, source.n_volumes


class _Source:
    """An open file: its header, and its voxels volume by volume."""

    def __init__(self, path: Path, file: Any, n_bytes: int, is_mgh: bool) -> None:
        self._path, self._file = path, file
        self._flag = int.from_bytes(file.read(mgh.FLAG.stop)[mgh.FLAG], "big", signed=True) if is_mgh else None
        file.seek(0)
        self._header = _header(path, Bounded(file, n_bytes), is_mgh)
        self._dtype = np.dtype(self._header.get_data_dtype())
        if self._dtype.kind not in "iuf":
            cure = "complex numbers; take the magnitude" if self._dtype.kind == "c" else "colours; extract one channel"
            raise VolumeError(f"{path}: voxels are {cure} first")
        shape = tuple(int(n) for n in self._header.get_data_shape())
        extra = [n for n in shape[3:] if n != 1]
        if len(extra) > 1:
            raise VolumeError(f"{path}: has {len(shape)} dimensions {shape}; at most 4 can be read")
        self.n_volumes = extra[0] if extra else 1
        self._shape = (*shape[:3], *[1] * (3 - len(shape)))
        if min(self._shape) < 1:
            raise VolumeError(f"{path}: a volume is a 3-D array, not one of shape {self._shape}")
        self._offset = int(self._header.get_data_offset())
        if self._offset + self._n_bytes * self.n_volumes > n_bytes:
            raise VolumeError(f"{path}: truncated: the file is shorter than its header requires")

    @property
    def _n_bytes(self) -> int:
        return int(np.prod(self._shape, dtype=object)) * self._dtype.itemsize

    def volume(self, index: int) -> Volume:
        self._file.seek(self._offset + index * self._n_bytes)
        slope, intercept = (None, None) if not _is_nifti(self._header) else self._header.get_slope_inter()
        array = np.empty(self._shape, np.float32, order="F")
        n, largest = self._shape[0] * self._shape[1], 0.0
        for k in range(self._shape[2]):
            block = self._file.read(n * self._dtype.itemsize)
            if len(block) < n * self._dtype.itemsize:
                raise VolumeError(f"{self._path}: truncated: the file is shorter than its header requires")
            plane = np.frombuffer(block, self._dtype).reshape(self._shape[:2], order="F")
            with np.errstate(over="ignore", invalid="ignore"):
                if slope is not None and (slope, intercept) != (1, 0):
                    plane = plane.astype(np.float64) * slope + intercept
                array[:, :, k] = plane
            largest = max(largest, float(np.abs(plane[np.isfinite(plane)]).max(initial=0)))
        if largest > np.finfo(np.float32).max or (largest > 0 and not array.any()):
            raise VolumeError(
                f"{self._path}: its largest voxel is {largest:.3g}, beyond float32; scale the voxels first"
            )
        if index == self.n_volumes - 1:
            while self._file.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
        return _placed(array, self._header) if self._flag is None else mgh.placed(array, self._header, self._flag)


def _header(path: Path, file: Bounded, is_mgh: bool) -> Any:
    import nibabel

    if is_mgh:
        return mgh.image_class().header_class.from_fileobj(file)
    block = file.read(nibabel.Nifti2Header.sizeof_hdr)
    sizes = [int.from_bytes(block[:4], end) for end in ("little", "big")]
    is_nifti2 = nibabel.Nifti2Header.sizeof_hdr in sizes
    kind = nibabel.Nifti2Header if is_nifti2 else nibabel.Nifti1Header
    if kind.sizeof_hdr in sizes and len(block) >= kind.sizeof_hdr:
        raw = kind(block[: kind.sizeof_hdr], check=False)
        if not is_nifti2 and raw["magic"] in (b"ni1", b""):
            what = "the header of an .hdr and .img pair" if raw["magic"] == b"ni1" else "an Analyze 7.5 header"
            raise VolumeError(f"{path}: {what}; convert it to one .nii file")
        if raw["vox_offset"] == 0:  # the only value inside the header that nibabel accepts
            raise VolumeError(
                f"{path}: the header places the voxels at byte 0, inside the header itself; correct its vox_offset "
                f"(in most files {kind.single_vox_offset})"
            )
        _check_pixdim(path, raw)
    file.seek(0)
    return kind.from_fileobj(file)


def _check_pixdim(path: Path, raw: Any) -> None:
    """Refuses a missing voxel size; not needed with an sform, nor across a single slice."""
    shape = [int(n) for n in raw["dim"][1 : 1 + int(np.clip(raw["dim"][0], 0, 3))]]
    needed = [axis for axis, n in enumerate(shape) if n > 1]
    if raw["sform_code"] <= 0 and not all(np.abs(raw["pixdim"][1 + axis]) > 0 for axis in needed):
        raise VolumeError(f"{path}: the voxel spacing in the header is zero or missing")


def from_nibabel(image: Any) -> Volume:
    """A 3-D nibabel image, NIfTI or MGH, as a volume: real voxels as float32, slope and intercept applied.

    Remarks about its header are given as warnings and stored in `Volume.notes`.

    Raises:
        VolumeError: not 3-D, another format, or an invalid geometry.
    """
    if not _is_nifti(image.header) and not isinstance(image.header, mgh.image_class().header_class):
        raise VolumeError(
            f"the image is a {type(image).__name__}; give NIfTI or MGH, such as Nifti1Image(image.get_fdata(), "
            "image.affine)"
        )
    if len(image.shape) != 3:
        raise VolumeError(f"the image has shape {image.shape}; give one 3-D volume, such as image.slicer[..., 0]")
    array = np.asarray(image.dataobj)
    made = _placed(array.astype(np.float32) if array.dtype.kind in "iuf" else array, image.header, image.affine)
    warn_of(made.notes)
    return made


def to_nibabel(volume: Volume, kind: Any) -> Any:
    """The volume as a nibabel image of the class `kind`; it keeps its header if that is of this class.

    Raises:
        VolumeError: more voxels along an axis than NIfTI-1 can count.
    """
    return (_nifti_image if _is_nifti(kind.header_class) else mgh.image)(volume.array, volume, kind)


def _is_nifti(header: Any) -> bool:
    """Whether a header (or its class) is NIfTI; MGH has neither units nor codes."""
    return hasattr(header, "get_xyzt_units")


def _placed(array: np.ndarray, header: Any, affine: np.ndarray | None = None) -> Volume:
    """`array` with the geometry of a header; `affine` is nibabel's, if known."""
    if not _is_nifti(header):
        return mgh.placed(array, header)
    codes = (int(header["qform_code"]), int(header["sform_code"]))
    sizes = _voxel_sizes(header)
    qform = _qform(header, sizes)
    if affine is None:
        affine = header.get_sform() if codes[1] > 0 else qform if codes[0] > 0 else _centred(header, sizes)
    notes = []
    if codes[1] > 0 and _sizes_differ(affine, sizes, int(header["dim"][0])):
        by_sform, by_pixdim = (
            " x ".join(f"{mm:.3g}" for mm in values) for values in (np.linalg.norm(affine[:3, :3], axis=0), sizes)
        )
        notes.append(f"the header has two voxel sizes: {by_sform} (sform, used) and {by_pixdim} (pixdim)")
    if codes == (0, 0):
        qform = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    elif header["aux_file"].item().startswith(_UNSTATED):
        codes = (0, 0)
    if min(codes) > 0 and np.linalg.det(affine[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        notes.append(
            "the header has two orientations that are mirror images of each other: the sform, used here, and the "
            "qform; programs that use the qform show left as right"
        )
    to_mm = np.diag([*[_mm(header)] * 3, 1.0])
    return Volume(
        array,
        to_mm @ affine,
        qform=to_mm @ qform if np.isfinite(qform).all() else None,
        codes=codes,
        header=header,
        slices=header.get_dim_info()[2],
        notes=tuple(notes),
    )


def _voxel_sizes(header: Any) -> np.ndarray:
    """pixdim; 1 if missing, as for a single slice."""
    sizes = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    sizes[int(header["dim"][0]) :] = 1.0
    return np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)


def _sizes_differ(affine: np.ndarray, sizes: np.ndarray, n_axes: int) -> bool:
    """Whether the affine has other voxel sizes along the axes that the header states."""
    by_affine = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((np.abs(by_affine / sizes - 1) > _SPACING_TOLERANCE)[:n_axes].any())


def _qform(header: Any, sizes: np.ndarray) -> np.ndarray:
    """The qform, for any code. A quaternion that rounding made longer than 1 is scaled to 1, as NIfTI's own C library
    does; nibabel refuses it."""
    from nibabel.quaternions import quat2mat

    vector = np.array([float(header[f"quatern_{name}"]) for name in "bcd"])
    rest = 1.0 - vector @ vector
    first = np.sqrt(rest) if rest > 1e-7 else 0.0
    if rest <= 1e-7:
        vector = vector / np.linalg.norm(vector)
    made = np.eye(4)
    flip = -1.0 if header["pixdim"][0] < 0 else 1.0
    made[:3, :3] = quat2mat(np.array([first, *vector])) @ np.diag(sizes * [1.0, 1.0, flip])
    made[:3, 3] = [float(header[f"qoffset_{name}"]) for name in "xyz"]
    return made


def _centred(header: Any, sizes: np.ndarray) -> np.ndarray:
    """nibabel's affine for a file without one: the middle of the volume at the origin, the first axis mirrored."""
    shape = [int(n) for n in header.get_data_shape()[:3]]
    shape += [1] * (3 - len(shape))
    made = np.diag([-sizes[0], sizes[1], sizes[2], 1.0])
    made[:3, 3] = -made[:3, :3] @ ((np.array(shape) - 1) / 2)
    return made


def _mm(header: Any) -> float:
    """The spatial unit of a NIfTI header in mm."""
    return _MM.get(header.get_xyzt_units()[0], 1.0)


@contextmanager
def planes(
    path: Path, like: Volume, shape: tuple[int, ...], dtype: str, description: str | None, deviation: bool
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write the file plane by plane: yields a function that takes the next (i, j) plane of the third axis.

    Geometry and header are those of `like`; `description` replaces NIfTI's `descrip`. With `deviation` the description
    names an uncertainty map after its first entry, and the image's range for display is left out. Only one plane is in
    memory.
    """
    is_mgh = suffix(path) in MGH_SUFFIXES
    # the header for this shape; the image itself is never created
    voxels = np.broadcast_to(np.zeros((), dtype), shape)
    header = mgh.image(voxels, like).header if is_mgh else _nifti_header(voxels, like)
    file_dtype = header.get_data_dtype()
    with closed(CompressedFile(path) if path.suffix.lower() in (".gz", ".mgz") else path.open("wb")) as file:
        if is_mgh:
            header.writehdr_to(file)
        else:
            if deviation:
                producer, _, rest = (description or "").partition(", ")
                description = ", ".join(filter(None, (producer, "uncertainty map", rest)))
                header["cal_min"] = header["cal_max"] = 0
            if description is not None:
                header["descrip"] = description.encode("ascii", "replace")[:79]
                header.set_intent("none")
            header.write_to(file)
        file.write(bytes(header.get_data_offset() - file.tell()))
        yield lambda plane: file.write(as_dtype(plane, dtype).astype(file_dtype).tobytes(order="F"))
        if is_mgh:
            header.writeftr_to(file)


def _nifti_header(voxels: np.ndarray, volume: Volume) -> Any:
    header = _nifti_image(voxels, volume).header
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset + header.extensions.get_sizeondisk())
    return header


def _nifti_image(voxels: np.ndarray, volume: Volume, kind: Any = None) -> Any:
    """`voxels` with the geometry and header of `volume`; `kind` None: the NIfTI version of that header, else 1."""
    import nibabel

    known = isinstance(volume.header, nibabel.Nifti1Header)
    header = volume.header.copy() if known else nibabel.Nifti1Header()
    seconds = _time_step(volume.header) if voxels.ndim == 4 and not known else 0.0
    if not known:
        header.set_xyzt_units("mm", "sec" if seconds else "unknown")
    header.set_data_dtype(voxels.dtype)
    _state_slices(header, volume.slices, voxels.shape)
    is_nifti2 = isinstance(header, nibabel.Nifti2Header)
    if not is_nifti2 and max(voxels.shape) > np.iinfo(np.int16).max:
        raise VolumeError(f"NIfTI-1 holds at most {np.iinfo(np.int16).max} voxels along an axis, not {voxels.shape}")
    image = (kind or (nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image))(voxels, None, header)
    if voxels.ndim == 4 and not known:
        image.header["pixdim"][4] = seconds
    from_mm = np.diag([*[1 / _mm(header)] * 3, 1.0])
    # a qform that does not count must not set pixdim, which many programs read as the voxel size
    qform = volume.affine if volume.qform is None or volume.codes[0] <= 0 < volume.codes[1] else volume.qform
    unstated = volume.codes == (0, 0)
    if unstated:
        image.header["aux_file"] = _UNSTATED
    qform_code, sform_code = _UNSTATED_CODES if unstated else volume.codes
    image.set_qform(from_mm @ qform, qform_code, update_affine=False)
    image.set_sform(from_mm @ volume.affine, sform_code)
    return image


def _time_step(header: Any) -> float:
    """Seconds between volumes, from the header of an MGH file or a DICOM series; 0 if unknown, or no time series."""
    if isinstance(header, mgh.image_class().header_class):
        return mgh.time_step(header)
    return float(getattr(header, "time_step", 0.0))


def _state_slices(header: Any, axis: int | None, shape: tuple[int, ...]) -> None:
    """The axis of the slices in dim_info, if known; the acquisition order of other slices is removed."""
    row, column, stated = header.get_dim_info()
    if axis is None:
        axis = stated
    if axis is None:
        return
    if axis != stated:
        row, column = (None, None) if axis in (row, column) else (row, column)
        header.set_dim_info(row, column, axis)
    if axis != stated or header.get_data_shape()[axis : axis + 1] != shape[axis : axis + 1]:
        for field in ("slice_start", "slice_end", "slice_code", "slice_duration"):
            header[field] = 0
