"""NIfTI, through nibabel; and what nibabel reads and writes the same way for MGH (`mgh.py`)."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume import mgh
from deformmamba.volume.files import MGH_SUFFIXES, Bounded, as_dtype, closed, parsing, suffix, volume_index
from deformmamba.volume.image import Volume, VolumeError

# nibabel's spatial unit in mm
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}


def read(path: Path, volume: int | None) -> Volume:
    from nibabel.openers import ImageOpener

    kind = "MGH" if suffix(path) in MGH_SUFFIXES else "NIfTI"
    with parsing(path, f"not a {kind} file, or a damaged one"):
        n_bytes = _uncompressed_size(path)
        with ImageOpener(str(path)) as file:
            return _read(path, Bounded(file, n_bytes), n_bytes, volume)


def _read(path: Path, file: Bounded, n_bytes: int, volume: int | None) -> Volume:
    import nibabel
    from nibabel.fileholders import FileHolder

    is_mgh = suffix(path) in MGH_SUFFIXES
    made: Any = mgh.image_class()
    if not is_mgh:
        block = file.read(nibabel.Nifti2Header.sizeof_hdr)
        is_nifti2 = nibabel.Nifti2Header.sizeof_hdr in (int.from_bytes(block[:4], end) for end in ("little", "big"))
        made = nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image
        raw = made.header_class(block[: made.header_class.sizeof_hdr], check=False)
        # nibabel turns a pixdim of 0 into 1; an sform does not need it
        if raw["sform_code"] == 0 and not np.all(np.abs(raw["pixdim"][1:4]) > 0):
            raise VolumeError(f"{path}: the voxel spacing in the header is zero or missing")
        file.seek(0)
    image = made.from_file_map({"image": FileHolder(fileobj=file)}, mmap=False)
    header = image.header
    dtype = np.dtype(header.get_data_dtype())
    if dtype.kind not in "iuf":
        cure = "complex numbers: take the magnitude" if dtype.kind == "c" else "colours: take one channel"
        raise VolumeError(f"{path}: voxels are {cure} first")
    if image.dataobj.offset + int(np.prod(image.shape, dtype=object)) * dtype.itemsize > n_bytes:
        raise VolumeError(f"{path}: truncated: shorter than its header says")
    extra = [n for n in image.shape[3:] if n != 1]
    if len(extra) > 1:
        raise VolumeError(f"{path}: has {len(image.shape)} dimensions {image.shape}; at most 4 can be read")
    n_volumes = extra[0] if extra else 1
    index = volume_index(path, n_volumes, volume)
    within = tuple(index if n != 1 else 0 for n in image.shape[3:])
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(image.dataobj[(..., *within)] if within else image.dataobj).astype(np.float32)
    array = array.reshape(array.shape + (1,) * (3 - array.ndim))
    return _placed(array, image)


def from_nibabel(image: Any) -> Volume:
    """A 3-D nibabel image, NIfTI or MGH, as a volume: real voxels as float32, slope and intercept applied.

    Raises:
        VolumeError: not 3-D, or a geometry that is no geometry.
    """
    if len(image.shape) != 3:
        raise VolumeError(f"the image has shape {image.shape}; give one 3-D volume, such as image.slicer[..., 0]")
    array = np.asarray(image.dataobj)
    return _placed(array.astype(np.float32) if array.dtype.kind in "iuf" else array, image)


def to_nibabel(volume: Volume, kind: Any) -> Any:
    """The volume as a nibabel image of the class `kind`, with the header that it came with if that is of such an image.

    Raises:
        VolumeError: more voxels along an axis than NIfTI-1 can count.
    """
    return (_nifti_image if _is_nifti(kind.header_class) else mgh.image)(volume.array, volume, kind)


def _is_nifti(header: Any) -> bool:
    """Else MGH, whose headers (or their class) have neither units nor codes."""
    return hasattr(header, "get_xyzt_units")


def _placed(array: np.ndarray, image: Any) -> Volume:
    """`array` where a nibabel image lies."""
    header = image.header
    if not _is_nifti(header):
        return mgh.placed(array, image)
    to_mm = np.diag([*[_mm(header)] * 3, 1.0])
    codes = (int(header["qform_code"]), int(header["sform_code"]))
    qform = to_mm @ header.get_qform() if codes[0] else None
    return Volume(array, to_mm @ image.affine, qform=qform, codes=codes, header=header)


def _mm(header: Any) -> float:
    """The spatial unit of a NIfTI header in mm."""
    return _MM.get(header.get_xyzt_units()[0], 1.0)


def _uncompressed_size(path: Path) -> int:
    """Bytes in the file once unpacked; reads a gzip file to its end, which is where its checksum is compared."""
    if path.suffix.lower() not in (".gz", ".mgz"):
        return path.stat().st_size
    n = 0
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            n += len(chunk)
    return n


@contextmanager
def planes(path: Path, like: Volume, shape: tuple[int, ...], dtype: str) -> Iterator[Callable[[np.ndarray], None]]:
    """Write the file plane by plane: yields a function that takes the next (i, j) plane of the last axis.

    Geometry and header are those of `like`. Nothing but one plane is held in memory.
    """
    from nibabel.openers import ImageOpener

    is_mgh = suffix(path) in MGH_SUFFIXES
    # the header of an image of this shape, which is never made
    voxels = np.broadcast_to(np.zeros((), dtype), shape)
    header = mgh.image(voxels, like).header if is_mgh else _nifti_header(voxels, like)
    file_dtype = header.get_data_dtype()
    with closed(ImageOpener(str(path), "wb")) as file:
        if is_mgh:
            header.writehdr_to(file)
        else:
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
    """`voxels` where `volume` lies, with its header; `kind` None: of the NIfTI version of that header, else 1."""
    import nibabel

    known = isinstance(volume.header, nibabel.Nifti1Header)
    header = volume.header.copy() if known else nibabel.Nifti1Header()
    if not known:
        header.set_xyzt_units("mm")
    header.set_data_dtype(voxels.dtype)
    slices = header.get_dim_info()[2]
    if (
        known
        and slices is not None
        and header.get_data_shape()[slices : slices + 1] != voxels.shape[slices : slices + 1]
    ):
        for field in ("slice_start", "slice_end", "slice_code", "slice_duration"):
            header[field] = 0  # the order in which the scanner took other slices
    is_nifti2 = isinstance(header, nibabel.Nifti2Header)
    if not is_nifti2 and max(voxels.shape) > np.iinfo(np.int16).max:
        raise VolumeError(f"NIfTI-1 holds at most {np.iinfo(np.int16).max} voxels along an axis, not {voxels.shape}")
    image = (kind or (nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image))(voxels, None, header)
    from_mm = np.diag([*[1 / _mm(header)] * 3, 1.0])
    qform = volume.affine if volume.qform is None else volume.qform
    image.set_qform(from_mm @ qform, volume.codes[0], update_affine=False)
    image.set_sform(from_mm @ volume.affine, volume.codes[1])
    return image
