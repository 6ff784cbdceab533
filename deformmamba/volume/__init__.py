"""Reads and writes scans. A `Volume` holds voxels in scanner units and their position in the world.

Conventions. An affine is 4x4, float64, voxel index to millimetres in RAS+ (x towards the patient's right, y to the
front, z to the head), as in nibabel. NIfTI and MGH keep the file's axis order. DICOM is read as (column, row, slice),
the axis order of the same scan in NIfTI. Voxels are float32 in memory, slope and intercept applied.

Every problem with a file raises a `VolumeError` of one line. To protect patient data, no message holds the value of a
DICOM tag, or the text of a parser, which may quote one.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deformmamba.annotations import check_types, is_one_of
from deformmamba.atomic import is_special, renamed, renamed_folder
from deformmamba.errors import InvalidArgument, did_you_mean, shown
from deformmamba.volume import dicom, dicom_out, nifti
from deformmamba.volume.dicom import holds_dicom
from deformmamba.volume.files import (
    DTYPES,
    MGH_DTYPES,
    MGH_SUFFIXES,
    NIFTI_SUFFIXES,
    ChoiceNeeded,
    NotFinite,
    PathLike,
    SliceFile,
    check_folder_of,
    parsing,
    refusals,
    replacing,
    silenced,
    slice_file,
    suffix,
    warn_of,
    write_text,
)
from deformmamba.volume.image import (
    NothingToDo,
    Volume,
    VolumeError,
    chosen_axis,
    in_plane,
    intensity_scale,
    normalise,
    restore,
    slice_axis,
    upscaled_affine,
)
from deformmamba.volume.nifti import from_nibabel, to_nibabel
from deformmamba.volume.selection import Candidate, no_scan, not_a_scan, remove_sidecar, scans_below

__all__ = [
    "DTYPES",
    "MGH_SUFFIXES",
    "NIFTI_SUFFIXES",
    "Candidate",
    "ChoiceNeeded",
    "NotFinite",
    "NothingToDo",
    "PathLike",
    "Volume",
    "VolumeError",
    "check_output",
    "chosen_axis",
    "count_volumes",
    "from_nibabel",
    "holds_dicom",
    "in_plane",
    "intensity_scale",
    "no_scan",
    "normalise",
    "not_a_scan",
    "read_volume",
    "read_volumes",
    "replacing",
    "restore",
    "scans_below",
    "slice_axis",
    "to_nibabel",
    "upscaled_affine",
    "write_text",
    "write_volume",
    "writing",
]


def read_volume(
    path: PathLike,
    *,
    volume: int | None = None,
    series: int | str | None = None,
    stack: int | None = None,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
) -> Volume:
    """Read NIfTI (.nii, .nii.gz), MGH (.mgh, .mgz), one DICOM file, or a folder that holds DICOM.

    DICOM images may be classic, enhanced or Siemens mosaics, and compressed if a decoder is installed (the extra
    `dicom`). Gzip is recognised by content, not by name. The reader's remarks about the file are given as warnings and
    stored in `Volume.notes`.

    Args:
        path: of the file or folder.
        volume: index from 0 of the volume to read. Required for a 4-D file, and for a DICOM series with several images
            of each slice (echoes, b-values, magnitude and phase, time points: in this order).
        series: the DICOM series to read: an index from 0, in the order of the series numbers, or a SeriesInstanceUID.
            Required for a folder with several series.
        stack: index from 0 of the stack to read. Required for a DICOM series whose slices have several orientations or
            sizes (a localiser).
        nan: "zero" replaces NaN and infinite voxels by 0.
        partial: read a DICOM folder although some of its files are empty or damaged.

    Raises:
        ChoiceNeeded: `volume`, `series` or `stack` is required, or the given one does not exist.
        VolumeError: the file is missing, damaged or of another kind; or it holds complex numbers, colours, NaN or
            infinite voxels, nothing but zeros, or an invalid geometry.
    """
    check_types(read_volume, locals())
    if not is_one_of(nan, ("refuse", "zero")):
        raise VolumeError(f'nan must be "refuse" or "zero", not {shown(nan)}')
    path = Path(path)
    with silenced():
        if (choice := _dicom_choice(path, series, stack, partial)) is not None:
            made = dicom.read(path, volume, choice)
        else:
            made = nifti.read(path, volume)
    made = _checked_voxels(made, path, nan)
    warn_of(made.notes, path)
    return made


def count_volumes(
    path: PathLike, *, series: int | str | None = None, stack: int | None = None, partial: bool = False
) -> int:
    """Number of 3-D volumes in a file or a DICOM series; arguments and errors as `read_volume`."""
    check_types(count_volumes, locals())
    path = Path(path)
    with silenced():
        choice = _dicom_choice(path, series, stack, partial)
        return nifti.count(path) if choice is None else dicom.count(path, choice)


def read_volumes(
    path: PathLike,
    *,
    series: int | str | None = None,
    stack: int | None = None,
    nan: Literal["refuse", "zero"] = "refuse",
    partial: bool = False,
) -> Iterator[Volume]:
    """Every 3-D volume of a file or a DICOM series, one at a time in memory; arguments, errors and warnings as
    `read_volume`."""
    path = Path(path)
    told: set[str] = set()
    with silenced():
        choice = _dicom_choice(path, series, stack, partial)
        volumes = nifti.each(path) if choice is None else dicom.each(path, choice)
    while True:
        with silenced():
            made = next(volumes, None)
        if made is None:
            return
        made = _checked_voxels(made, path, nan, zeros=True)
        # the notes on the header are the same for each volume
        warn_of((note for note in made.notes if note not in told), path)
        told.update(made.notes)
        yield made


def _dicom_choice(path: Path, series: int | str | None, stack: int | None, partial: bool) -> dicom.Choice | None:
    """The part of a DICOM file or folder to read; None for NIfTI and MGH."""
    with parsing(path, "cannot be read"):
        if not os.path.exists(path):
            raise VolumeError(f"{path}: no such file or folder")
        if not path.is_dir() and not path.is_file():
            raise VolumeError(f"{path}: neither a file nor a folder")
        known = suffix(path) in NIFTI_SUFFIXES + MGH_SUFFIXES
        if path.is_dir() or (not known and dicom.is_dicom(path)):
            return dicom.Choice(series, stack, partial)
        if not known:
            raise VolumeError(f"{path}: {_other_kind(path)}; give .nii, .nii.gz, .mgh, .mgz or DICOM")
    if series is not None or stack is not None:
        raise VolumeError(f"{path}: a single file; series and stack are for a folder of DICOM files; leave them out")
    return None


def _other_kind(path: Path) -> str:
    """The kind of an unreadable file, guessed from its name and first bytes."""
    if dicom.lacks_preamble(path):
        return 'DICOM without the preamble ("DICM" after 128 bytes), which is not read; convert it with dcm2niix'
    if path.suffix.lower() in (".hdr", ".img"):
        return "half of a pair .hdr and .img (NIfTI or Analyze), which is not read; convert it to one .nii file"
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        return "a gzip file under an unknown name; a compressed NIfTI file ends in .nii.gz"
    return "not a scan that can be read"


def _checked_voxels(volume: Volume, path: Path, nan: str, *, zeros: bool = False) -> Volume:
    bad = volume.array.size - np.count_nonzero(np.isfinite(volume.array))
    if bad and nan == "zero":
        array = np.nan_to_num(volume.array, nan=0.0, posinf=0.0, neginf=0.0)
        note = f"{bad} of {volume.array.size} voxels were NaN or infinite and are 0 now"
        volume = replace(volume, array=array, notes=(*volume.notes, note))
    elif bad:
        raise NotFinite(f"{path}: {bad} of {volume.array.size} voxels are NaN or infinite")
    if not zeros and not volume.array.any():
        raise VolumeError(f"{path}: every voxel is zero; the volume is empty")
    return volume


def write_volume(
    path: PathLike,
    volume: "Volume | Any",
    *,
    dtype: str | None = None,
    derivation: str | None = None,
    deviation: bool = False,
) -> None:
    """Write NIfTI (.nii, .nii.gz), MGH (.mgh, .mgz) or DICOM. An existing file is replaced only by a complete one.

    `volume` is a `Volume` or a 3-D nibabel image. `writing` documents the other arguments, and the rules for headers,
    types and DICOM.

    Raises:
        VolumeError: the path cannot be written, the format is not one of these, or values do not fit the `dtype`.
    """
    check_types(write_volume, locals())
    if hasattr(volume, "dataobj") and hasattr(volume, "header"):
        volume = from_nibabel(volume)
    if not isinstance(volume, Volume):
        raise VolumeError(f"write_volume takes a Volume or a nibabel image, not a {type(volume).__name__}")
    with writing(path, volume, volume.array.shape, dtype=dtype, derivation=derivation, deviation=deviation) as write:
        for k in range(volume.array.shape[2]):
            write(volume.array[:, :, k])


@contextmanager
def writing(
    path: PathLike,
    like: Volume,
    shape: Sequence[int],
    *,
    axis: int = 2,
    dtype: str | None = None,
    derivation: str | None = None,
    deviation: bool = False,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a volume slice by slice, for volumes that do not fit into memory.

    ```python
    place = scan.resampled(scan.array, 4, (0, 1), "origin")  # where it will lie; its array is not looked at
    with writing("sharper.nii.gz", place, (4 * h, 4 * w, n), axis=2) as write:
        for k in range(n):
            write(sharper_slice(k))  # (4 * h, 4 * w)
    ```

    The complete file replaces an existing one when the block ends; the files of a new DICOM series replace those of an
    earlier one, and the folder itself stays. If the block raises or ctrl-C ends it, no file is written and existing
    ones are unchanged. Exceptions of the block itself are passed on unchanged.

    Memory: a few copies of one slice, for any number of slices. Slices across the last axis of NIfTI and MGH are
    written directly into the file. Slices across other axes, and DICOM, need a temporary file without a name beside
    `path`, or inside an existing folder. It is as large as the voxels (float32 for DICOM) and disappears with the
    process.

    NIfTI and MGH: voxels are `dtype`, one of `DTYPES` (default float32). Integers are rounded, and values are never
    rescaled, even if the source's header has a slope. NIfTI keeps the header of the source (units, description,
    extensions). Sform and qform are both written, each under its own code. Several volumes from MGH or from a DICOM
    time series get the time between them (pixdim[4], in seconds); 0 if it is unknown, or for echoes and b-values.

    DICOM output requires DICOM input. It is a new series in a folder: one file a slice for a classic series, one
    multi-frame file for an enhanced one. `volume.dicom_out` lists new, kept and removed elements. Voxels are 16-bit
    integers with a slope over the range of the whole series, accurate to half a step of 1/65535 of the largest value
    (1/32767 with negative ones); `dtype` "uint16" or "int16" rounds to whole numbers instead.

    Args:
        path: .nii, .nii.gz, .mgh or .mgz. If `like` came from DICOM, also a folder (a name without a suffix, or ending
            in /) that is new, empty, or holds only files that this function wrote. If the series fits into one DICOM
            file, also a name ending in .dcm or .ima.
        like: a volume with the geometry, codes and header to write; its array is not used.
        shape: (i, j, k) of the output; (i, j, k, volumes) for several volumes one after the other, in NIfTI only.
        axis: where the slices are stacked: slice k is `array.take(k, axis)` of the output.
        dtype: of the voxels.
        derivation: how the output was made (model, version, hash). It becomes DICOM's DerivationDescription, 1024
            characters of ASCII. The first 79 become NIfTI's `descrip`, and a NIfTI intent such as LABEL is removed,
            because interpolated values are no labels. Without it, both stay, and the JSON file of an earlier output
            of this package at `path` is removed.
        deviation: the values are an uncertainty map, not an image: DICOM gets another series number, description and
            window; NIfTI's `descrip` states it, and the header gets no range for display (`cal_min`, `cal_max`).

    Raises:
        VolumeError: as `check_output`, or values that do not fit the `dtype`, or an error of the operating system.
        ValueError: slices of another shape, or too many or too few of them.
    """
    check_output(path, source=like, dtype=dtype)
    as_dicom = _is_dicom_target(path)
    path = Path(path)
    shape = tuple(int(n) for n in shape)
    if len(shape) not in (3, 4) or min(shape) < 1 or axis not in (0, 1, 2):
        raise InvalidArgument(f"a volume has three sizes and the axes 0, 1 and 2; not shape {shape} and axis {axis}")
    if len(shape) == 4 and suffix(path) not in NIFTI_SUFFIXES:
        raise VolumeError(f"{path}: several volumes can be written as NIfTI only; give a file name ending in .nii.gz")
    size = tuple(shape[a] for a in in_plane(axis))
    n_slices = shape[axis] * (shape[3] if len(shape) == 4 else 1)
    done = 0
    with ExitStack() as stack:
        with refusals(path), silenced():
            into_folder = as_dicom and suffix(path) not in dicom_out.SUFFIXES
            temporary = stack.enter_context(renamed_folder(path, dicom_out.is_ours) if into_folder else renamed(path))
            if as_dicom:
                slices = dicom_out.slices(temporary, like, shape, axis, dtype, derivation, deviation)
            else:
                if suffix(path) in MGH_SUFFIXES and like.codes == (0, 0):
                    warnings.warn(
                        f"{path}: the scan states no orientation, but MGH files always do; write .nii.gz to keep it "
                        "unknown",
                        stacklevel=4,
                    )
                slices = nifti.planes(temporary, like, shape, dtype or "float32", derivation, deviation)
                if axis != 2:
                    slices = _turned(slices, path, shape[:3], axis, dtype or "float32")
            put = stack.enter_context(slices)

        def write(image: np.ndarray) -> None:
            nonlocal done
            if image.shape != size or done == n_slices:
                raise InvalidArgument(f"{n_slices} slices of {size} make {shape}; slice {done} has shape {image.shape}")
            with refusals(path):
                put(image)
            done += 1

        yield write
        if done != n_slices:
            raise InvalidArgument(f"{n_slices} slices of {size} make {shape}; only {done} were written")
        with refusals(path), silenced():
            stack.close()
            if derivation is None or deviation:  # other outputs get a new JSON file
                remove_sidecar(path)


@contextmanager
def _turned(
    planes: AbstractContextManager[Callable[[np.ndarray], None]],
    path: Path,
    shape: tuple[int, ...],
    axis: int,
    dtype: str,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes slices across `axis`, volume after volume, and passes slices across the third axis on to `planes`."""
    with planes as put_plane, ExitStack() as current:
        slices: list[SliceFile] = []
        n_put = 0

        def put(image: np.ndarray) -> None:
            nonlocal n_put
            if not slices:
                slices.append(current.enter_context(slice_file(path, shape, axis, dtype)))
            slices[0].put(image)
            n_put += 1
            if n_put == shape[axis]:
                for k in range(shape[2]):
                    put_plane(slices[0].plane(k))
                slices.clear()
                current.close()
                n_put = 0

        yield put


def _is_dicom_target(path: PathLike) -> bool:
    ending = suffix(Path(path))
    is_folder = not ending or os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path)
    return ending not in NIFTI_SUFFIXES + MGH_SUFFIXES and (is_folder or ending in dicom_out.SUFFIXES)


def check_output(
    path: PathLike,
    suffixes: Sequence[str] = NIFTI_SUFFIXES + MGH_SUFFIXES,
    *,
    source: Volume | None = None,
    dtype: str | None = None,
) -> None:
    """Check before any computation that `path` can be written (as `dtype`).

    A command that writes scans calls this after it reads its input, the `source`, and before it computes. A folder, or
    a name ending in .dcm, is an allowed target only if the source came from DICOM.

    Raises:
        VolumeError: the suffix is not among `suffixes`, the format does not support the `dtype`, the folder is missing
            or not writable, or `path` is a folder. A DICOM target: it is the source itself, or it holds anything that
            this package did not write.
    """
    if source is not None and _is_dicom_target(path):
        dicom_out.check_target(path, source, dtype)
        return
    path = Path(path)
    if suffix(path) not in suffixes:
        or_dicom = "; or, as DICOM, to a folder" if source and isinstance(source.header, dicom.DicomSeries) else ""
        raise VolumeError(f"{path}: wanted a file name ending in {', '.join(suffixes)}{or_dicom}; choose another name")
    allowed = MGH_DTYPES if suffix(path) in MGH_SUFFIXES else DTYPES
    if not is_one_of(dtype, (None, *allowed)):
        hint = did_you_mean(str(dtype), allowed)
        given = dtype if isinstance(dtype, str) else shown(dtype)
        raise VolumeError(f"{path}: voxels can be written as {', '.join(allowed)}, not as {given}{hint}")
    if os.path.isdir(path):
        raise VolumeError(f"{path}: is a folder; give a file name")
    if is_special(path):
        raise VolumeError(f"{path}: is a device, a pipe or a socket; give the name of a file")
    check_folder_of(path)
