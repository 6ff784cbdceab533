"""NIfTI and MGH, through nibabel."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume.files import MGH_SUFFIXES, as_dtype, parsing, suffix, volume_index
from deformmamba.volume.image import Volume, VolumeError

_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}


def read(path: Path, volume: int | None) -> Volume:
    import nibabel
    from nibabel.openers import ImageOpener

    is_mgh = suffix(path) in MGH_SUFFIXES
    kind = "MGH" if is_mgh else "NIfTI"
    with parsing(path, f"not a {kind} file, or a damaged one"):
        n_bytes = _uncompressed_size(path)
        image: Any = nibabel.load(path)
        header = image.header
        if not is_mgh:
            with ImageOpener(str(path)) as file:
                raw = type(header).from_fileobj(file, check=False)
            # nibabel turns a pixdim of 0 into 1; an sform does not need it
            if header["sform_code"] == 0 and not np.all(np.abs(raw["pixdim"][1:4]) > 0):
                raise VolumeError(f"{path}: the voxel spacing in the header is zero or missing")
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
        if is_mgh:
            return Volume(array, image.affine, header=header)
        to_mm = np.diag([*[_MM.get(header.get_xyzt_units()[0], 1.0)] * 3, 1.0])
        codes = (int(header["qform_code"]), int(header["sform_code"]))
        qform = to_mm @ header.get_qform() if codes[0] else None
        return Volume(array, to_mm @ image.affine, qform=qform, codes=codes, header=header)


def _uncompressed_size(path: Path) -> int:
    """Bytes in the file once unpacked; reads a gzip file to its end, which is where its checksum is compared."""
    if path.suffix.lower() not in (".gz", ".mgz"):
        return path.stat().st_size
    n = 0
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            n += len(chunk)
    return n


def write(path: Path, volume: Volume, dtype: str) -> None:
    array = as_dtype(volume.array, dtype)
    image = _mgh_image(array, volume) if suffix(path) in MGH_SUFFIXES else _nifti_image(array, volume)
    image.to_filename(path)


def _nifti_image(array: np.ndarray, volume: Volume) -> Any:
    import nibabel

    known = isinstance(volume.header, nibabel.Nifti1Header)
    header = volume.header.copy() if known else nibabel.Nifti1Header()
    if not known:
        header.set_xyzt_units("mm")
    header.set_data_dtype(array.dtype)
    header.set_data_offset(0)
    is_nifti2 = isinstance(header, nibabel.Nifti2Header)
    image = (nibabel.Nifti2Image if is_nifti2 else nibabel.Nifti1Image)(array, None, header)
    from_mm = np.diag([*[1 / _MM.get(header.get_xyzt_units()[0], 1.0)] * 3, 1.0])
    qform = volume.affine if volume.qform is None else volume.qform
    image.set_qform(from_mm @ qform, volume.codes[0], update_affine=False)
    image.set_sform(from_mm @ volume.affine, volume.codes[1])
    return image


def _mgh_image(array: np.ndarray, volume: Volume) -> Any:
    import nibabel

    header = volume.header.copy() if isinstance(volume.header, nibabel.freesurfer.mghformat.MGHHeader) else None
    if header is not None:
        header.set_data_dtype(array.dtype)
    return nibabel.freesurfer.mghformat.MGHImage(array, volume.affine, header)
