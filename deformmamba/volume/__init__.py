"""Scans as files: a `Volume` in scanner units with its place in the world, read from and written to disk.

Conventions. An affine is 4x4, float64, voxel index to millimetres in RAS+ (x towards the patient's right, y to the
front, z to the head), as nibabel has it. NIfTI and MGH keep the file's axis order; DICOM comes as (column, row, slice),
the order in which NIfTI holds the same scan. Voxels are float32 in memory, slope and intercept applied.

Everything that goes wrong with a file is a `VolumeError` of one line. No message ever holds the value of a DICOM tag or
the text of a parser, which may quote one: patients are in there.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deformmamba.volume import dicom, nifti
from deformmamba.volume.files import (
    DTYPES,
    MGH_DTYPES,
    MGH_SUFFIXES,
    NIFTI_SUFFIXES,
    PathLike,
    replacing,
    silenced,
    suffix,
    volume_index,
)
from deformmamba.volume.image import (
    Volume,
    VolumeError,
    intensity_scale,
    normalise,
    restore,
    slice_axis,
    upscaled_affine,
)

__all__ = [
    "DTYPES",
    "MGH_SUFFIXES",
    "NIFTI_SUFFIXES",
    "PathLike",
    "Volume",
    "VolumeError",
    "check_output",
    "intensity_scale",
    "normalise",
    "read_volume",
    "replacing",
    "restore",
    "slice_axis",
    "upscaled_affine",
    "write_volume",
]


def read_volume(path: PathLike, *, volume: int | None = None) -> Volume:
    """Read NIfTI (.nii, .nii.gz), MGH (.mgh, .mgz), one DICOM file, or a folder that holds one DICOM series.

    `volume` chooses one volume, counted from 0, of a 4-D file, and must be given for one.

    Raises:
        VolumeError: the file is missing, damaged or of another kind; or it holds complex numbers, colours, NaN or
            infinite voxels, nothing but zeros, or a geometry that is no geometry.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise VolumeError(f"{path}: no such file or folder")
    with silenced():
        if path.is_dir():
            read = dicom.read_folder(path)
        elif not path.is_file():
            raise VolumeError(f"{path}: neither a file nor a folder")
        elif suffix(path) in NIFTI_SUFFIXES + MGH_SUFFIXES:
            return _checked_voxels(nifti.read(path, volume), path)
        elif dicom.is_dicom(path):
            read = dicom.read_series([path], path)
        else:
            raise VolumeError(f"{path}: not a scan that can be read; give .nii, .nii.gz, .mgh, .mgz or DICOM")
    volume_index(path, 1, volume)
    return _checked_voxels(read, path)


def _checked_voxels(volume: Volume, path: Path) -> Volume:
    bad = volume.array.size - np.count_nonzero(np.isfinite(volume.array))
    if bad:
        raise VolumeError(f"{path}: {bad} of {volume.array.size} voxels are NaN or infinite; replace them first")
    if not volume.array.any():
        raise VolumeError(f"{path}: every voxel is zero; there is nothing in this volume")
    return volume


def write_volume(path: PathLike, volume: Volume, *, dtype: str | None = None) -> None:
    """Write NIfTI (.nii, .nii.gz) or MGH (.mgh, .mgz), whole or not at all; an existing file is replaced.

    Voxels are `dtype`, one of `DTYPES` (default float32); integers are rounded, and nothing is ever rescaled, whatever
    the source's header says. NIfTI keeps the header the volume came with (units, description, extensions), with sform
    and qform both written, each under its own code.

    Raises:
        VolumeError: the path cannot be written, the format is not one of these, or values do not fit the `dtype`.
    """
    path = Path(path)
    check_output(path, dtype=dtype)
    with replacing(path) as temporary, silenced():
        nifti.write(temporary, volume, dtype or "float32")


def check_output(
    path: PathLike, suffixes: Sequence[str] = NIFTI_SUFFIXES + MGH_SUFFIXES, *, dtype: str | None = None
) -> None:
    """Say now, not after an hour of work, that `path` could not be written (as `dtype`).

    Raises:
        VolumeError: the suffix is not among `suffixes`, the format holds no such voxels, the folder is missing or
            closed, or `path` is a folder.
    """
    path = Path(path)
    if suffix(path) not in suffixes:
        raise VolumeError(f"{path}: can only be written as {', '.join(suffixes)}; choose such a name")
    allowed = MGH_DTYPES if suffix(path) in MGH_SUFFIXES else DTYPES
    if dtype not in (None, *allowed):
        raise VolumeError(f"{path}: voxels can be written as {', '.join(allowed)}, not as {dtype}")
    if os.path.isdir(path):
        raise VolumeError(f"{path}: is a folder; give the name of a file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise VolumeError(f"{path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeError(f"{path}: the folder {folder} cannot be written to")
