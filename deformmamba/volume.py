"""Scans as files: a `Volume` in scanner units with its place in the world, read from and written to disk.

Conventions. An affine is 4x4, float64, voxel index to millimetres in RAS+ (x towards the patient's right, y to the
front, z to the head), as nibabel has it. NIfTI and MGH keep the file's axis order; DICOM comes as (column, row, slice),
the order in which NIfTI holds the same scan. Voxels are float32 in memory, slope and intercept applied.

Everything that goes wrong with a file is a `VolumeError` of one line. No message ever holds the value of a DICOM tag or
the text of a parser, which may quote one: patients are in there.
"""

import gzip
import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import numpy.typing as npt

PathLike = str | os.PathLike[str]
NIFTI_SUFFIXES = (".nii", ".nii.gz")
MGH_SUFFIXES = (".mgh", ".mgz")
# what a voxel may be written as; integers are rounded, never rescaled
DTYPES = ("float32", "float64", "int16", "uint16", "int32", "uint8")
_MGH_DTYPES = ("float32", "int16", "int32", "uint8")
_MM = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}


class VolumeError(ValueError):
    """A scan that cannot be read, written or upscaled; the message is one line."""


@final
@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D image and its place in the world.

    Attributes:
        array: (i, j, k), float32 when read from a file, in the scanner's own units.
        affine: 4x4 float64, voxel index to mm (RAS+); invertible.
        qform: the file's qform in mm where it has one; None: the same as `affine`.
        codes: NIfTI's (qform_code, sform_code): 0 unknown, 1 scanner, 2 aligned, 3 Talairach, 4 MNI. (0, 0) says that
            nobody knows how the image lies in the patient: no left or right may be printed on it.
        header: the nibabel header that came with it, source of units and descriptions when it is written back.

    Raises:
        VolumeError: the array is not 3-D, or the affine is no invertible 4x4.
    """

    array: np.ndarray
    affine: np.ndarray
    qform: np.ndarray | None = None
    codes: tuple[int, int] = (1, 1)
    header: Any = None

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise VolumeError(f"a volume is a 3-D array, not one of shape {self.array.shape}")
        for form in ("affine", "qform"):
            if (matrix := getattr(self, form)) is not None:
                object.__setattr__(self, form, _checked_affine(matrix, form))

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
    affine = np.asarray(matrix, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise VolumeError(f"the {name} must be a finite 4x4 matrix")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths == 0).any():
        raise VolumeError(f"the voxel spacing is zero along axis {int(np.argmin(lengths))}; the geometry is broken")
    # the volume of the parallelepiped of unit edges: 1 for orthogonal axes, 0 for axes in one plane
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise VolumeError(f"the {name} is singular: its axes lie in one plane")
    return affine


def upscaled_affine(affine: npt.ArrayLike, scale: float, axes: Sequence[int], grid: str) -> np.ndarray:
    """The affine after `scale`-fold super-resolution along `axes`, so that anatomy stays where it is.

    Voxel j of the fine image lies on voxel j / scale ("origin": fine voxel 0 is coarse voxel 0, so the translation
    stays) or on voxel (j + 1/2) / scale - 1/2 ("half-pixel": outer edges coincide, so the translation moves by
    -(1 - 1 / scale) / 2 coarse voxels along each axis) of the coarse image. A `scale` below 1 goes the other way.

    Raises:
        ValueError: `grid` is neither of the two.
    """
    if grid not in ("origin", "half-pixel"):
        raise ValueError(f'grid must be "origin" or "half-pixel", not {grid!r}')
    coarse_from_fine = np.eye(4)
    for axis in axes:
        coarse_from_fine[axis, axis] = 1 / scale
        if grid == "half-pixel":
            coarse_from_fine[axis, 3] = -(1 - 1 / scale) / 2
    return np.asarray(affine, dtype=np.float64) @ coarse_from_fine


def slice_axis(volume: Volume) -> int:
    """The axis along which slices are stacked, where the pixels of a slice are taken to be square.

    The only axis of length 1 if there is just one; else the one axis whose spacing differs, by more than 1 %, from that
    of the two others (it may be the smaller: a scan of coarse pixels in thin slices); else the axis of the largest
    spacing, the later one of equals: the last axis of an isotropic volume.
    """
    if volume.array.shape.count(1) == 1:
        return volume.array.shape.index(1)
    spacing = np.array(volume.spacing)

    def equal(a: float, b: float) -> bool:
        return bool(abs(a - b) <= 0.01 * max(a, b))

    square = [axis for axis in range(3) if equal(*np.delete(spacing, axis))]
    if len(square) == 1:
        return square[0]
    return int(np.flatnonzero(spacing >= 0.99 * spacing.max())[-1])


def intensity_scale(array: npt.ArrayLike, rule: str = "p99.9") -> float:
    """What a volume is divided by before a model sees it; always positive.

    "p99.9" (or any other percentile): that percentile of the finite non-zero voxels, a maximum that a few bright
    vessels do not move. "max": the largest finite voxel. Where that is not positive (a volume of zeros, or one mostly
    below zero): the largest magnitude, and 1 if there is none.

    Raises:
        ValueError: an unknown rule.
    """
    try:
        percentile = 100.0 if rule == "max" else float(rule.removeprefix("p")) if rule.startswith("p") else -1.0
    except ValueError:
        percentile = -1.0
    if not 0 < percentile <= 100:
        raise ValueError(f'intensity rule must be "max" or a percentile such as "p99.9", not {rule!r}')
    values = np.asarray(array)
    values = values[np.isfinite(values) & (values != 0)]
    if values.size == 0:
        return 1.0
    scale = float(np.percentile(values, percentile))
    return scale if scale > 0 else float(np.abs(values).max())


Image = TypeVar("Image", bound=Any)


def normalise(image: Image, scale: float) -> Image:
    """Scanner units to about [0, 1] (array or tensor); `scale` from `intensity_scale`. Nothing is clipped."""
    return image / scale


def restore(image: Image, scale: float) -> Image:
    """The inverse of `normalise`: about [0, 1] to scanner units."""
    return image * scale


# ---------------------------------------------------------------------------------------------------------- reading


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
    with _silenced():
        if path.is_dir():
            read = _read_dicom_folder(path)
        elif not path.is_file():
            raise VolumeError(f"{path}: neither a file nor a folder")
        elif _suffix(path) in NIFTI_SUFFIXES + MGH_SUFFIXES:
            return _checked_voxels(_read_nibabel(path, volume), path)
        elif _is_dicom(path):
            read = _read_dicom_series([path], path)
        else:
            raise VolumeError(f"{path}: not a scan that can be read; give .nii, .nii.gz, .mgh, .mgz or DICOM")
    _volume_index(path, 1, volume)
    return _checked_voxels(read, path)


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing from nibabel and pydicom on the terminal: they quote header fields, a patient's among them."""
    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """Any exception of a foreign parser becomes a VolumeError that does not quote it."""
    try:
        yield
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except PermissionError:
        raise VolumeError(f"{path}: permission denied") from None
    except MemoryError:
        raise VolumeError(f"{path}: does not fit into memory") from None
    except Exception as error:  # malformed bytes raise anything
        raise VolumeError(f"{path}: {what} ({type(error).__name__})") from None


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _checked_voxels(volume: Volume, path: Path) -> Volume:
    bad = volume.array.size - np.count_nonzero(np.isfinite(volume.array))
    if bad:
        raise VolumeError(f"{path}: {bad} of {volume.array.size} voxels are NaN or infinite; replace them first")
    if not volume.array.any():
        raise VolumeError(f"{path}: every voxel is zero; there is nothing in this volume")
    return volume


def _volume_index(path: Path, n: int, volume: int | None) -> int:
    if volume is None:
        if n > 1:
            raise VolumeError(f"{path}: holds {n} volumes; choose one with volume=K (--volume K), 0 to {n - 1}")
        return 0
    if not 0 <= volume < n:
        allowed = f"0 to {n - 1}" if n > 1 else "only volume 0"
        raise VolumeError(f"{path}: has no volume {volume}; it holds {n}: {allowed}")
    return volume


def _read_nibabel(path: Path, volume: int | None) -> Volume:
    import nibabel
    from nibabel.openers import ImageOpener

    is_mgh = _suffix(path) in MGH_SUFFIXES
    kind = "MGH" if is_mgh else "NIfTI"
    with _parsing(path, f"not a {kind} file, or a damaged one"):
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
        index = _volume_index(path, n_volumes, volume)
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


def _is_dicom(path: Path) -> bool:
    with _parsing(path, "cannot be read"), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_dicom_folder(folder: Path) -> Volume:
    with _parsing(folder, "cannot be read"):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and _is_dicom(p))
    return _read_dicom_series(files, folder)


def _read_dicom_series(files: Sequence[Path], source: Path) -> Volume:
    """The volume (column, row, slice) of one series, sorted by position along the normal of its slices."""
    import pydicom

    datasets = []
    for path in files:
        with _parsing(path, "a damaged DICOM file"):
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            if "Rows" in dataset:  # a DICOMDIR or a report in the same folder is no image
                datasets.append((path, dataset))
    if not datasets:
        raise VolumeError(f"{source}: holds no DICOM image; give a NIfTI file, a DICOM file or a folder of one series")
    with _parsing(source, "DICOM geometry that cannot be understood"):
        n_series = len({str(d.get("SeriesInstanceUID")) for _, d in datasets})
        if n_series > 1:
            raise VolumeError(f"{source}: holds {n_series} DICOM series mixed; put one series into a folder of its own")
        for path, dataset in datasets:
            _check_dicom_image(path, dataset)
        first = datasets[0][1]
        for field, what in _SAME.items():
            if any(not _close(d.get(field), first.get(field)) for _, d in datasets):
                raise VolumeError(f"{source}: the files of this series differ in {what}; they are no single volume")
        axes = np.array(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
        if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
            raise VolumeError(f"{source}: ImageOrientationPatient holds no two perpendicular unit vectors")
        along_row, along_column = axes
        normal = np.cross(along_row, along_column)
        position = {path: np.array(d.ImagePositionPatient, dtype=float) for path, d in datasets}
        paths = sorted(position, key=lambda path: float(normal @ position[path]))
        start = position[paths[0]]
        if len(paths) == 1:
            step = normal * abs(float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0))
        else:
            step = (position[paths[-1]] - start) / (len(paths) - 1)
            _check_spacing(np.array([position[path] for path in paths]), step, source)
        # PixelSpacing is (between rows, between columns); DICOM is LPS+, an affine here RAS+
        between_rows, between_columns = map(float, first.PixelSpacing)
        affine = np.eye(4)
        affine[:3] = np.stack([along_row * between_columns, along_column * between_rows, step, start], axis=1)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    array = np.empty((int(first.Columns), int(first.Rows), len(paths)), np.float32, order="F")
    for k, path in enumerate(paths):
        with _parsing(path, "its pixels cannot be decoded: damaged, or compressed in a way that needs pylibjpeg"):
            dataset = pydicom.dcmread(path)
            slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
            array[:, :, k] = dataset.pixel_array.T * slope + intercept
    with _parsing(source, "DICOM geometry that cannot be understood"):
        return Volume(array, affine)


_SAME = {
    "ImageOrientationPatient": "orientation",
    "PixelSpacing": "pixel spacing",
    "Rows": "image size",
    "Columns": "image size",
}


def _check_dicom_image(path: Path, dataset: Any) -> None:
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(f"{path}: multi-frame DICOM cannot be read; convert it with dcm2niix first")
    if int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise VolumeError(f"{path}: voxels are colours: take one channel first")
    for field in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        if not dataset.get(field):
            raise VolumeError(f"{path}: has no {field}, so its place in the patient is unknown")


def _close(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.array(a, dtype=float), np.array(b, dtype=float), rtol=1e-4, atol=1e-4))


def _check_spacing(positions: np.ndarray, step: np.ndarray, source: Path) -> None:
    """`positions` (n, 3) must lie `step` apart; a scanner rounds them by far less than 2 % of that."""
    gaps = np.diff(positions, axis=0) @ step / max(float(step @ step), 1e-12)
    if (gaps < 0.02).any():
        raise VolumeError(f"{source}: several slices share one position (echoes or time points?); keep one of each")
    if np.abs(np.diff(positions, axis=0) - step).max() > 0.02 * np.linalg.norm(step):
        raise VolumeError(f"{source}: slices are not evenly spaced; is a file of the series missing?")


# ---------------------------------------------------------------------------------------------------------- writing


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
    is_mgh = _suffix(path) in MGH_SUFFIXES
    array = _as_dtype(volume.array, dtype or "float32")
    image = _mgh_image(array, volume) if is_mgh else _nifti_image(array, volume)
    with replacing(path) as temporary, _silenced():
        image.to_filename(temporary)


def check_output(
    path: PathLike, suffixes: Sequence[str] = NIFTI_SUFFIXES + MGH_SUFFIXES, *, dtype: str | None = None
) -> None:
    """Say now, not after an hour of work, that `path` could not be written (as `dtype`).

    Raises:
        VolumeError: the suffix is not among `suffixes`, the format holds no such voxels, the folder is missing or
            closed, or `path` is a folder.
    """
    path = Path(path)
    if _suffix(path) not in suffixes:
        raise VolumeError(f"{path}: can only be written as {', '.join(suffixes)}; choose such a name")
    allowed = _MGH_DTYPES if _suffix(path) in MGH_SUFFIXES else DTYPES
    if dtype not in (None, *allowed):
        raise VolumeError(f"{path}: voxels can be written as {', '.join(allowed)}, not as {dtype}")
    if os.path.isdir(path):
        raise VolumeError(f"{path}: is a folder; give the name of a file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise VolumeError(f"{path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeError(f"{path}: the folder {folder} cannot be written to")


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` if the block succeeds and vanishes if not.

    Raises:
        VolumeError: the operating system refused.
    """
    target = Path(os.path.realpath(path))  # a link is written through, not replaced
    temporary = target.parent / f".{secrets.token_hex(8)}{_suffix(target)}"
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written: {error.strerror or type(error).__name__}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return array.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    lowest, highest = float(array.min()), float(array.max())
    if not (limits.min <= np.rint(lowest) and np.rint(highest) <= limits.max):
        raise VolumeError(
            f"values from {lowest:g} to {highest:g} do not fit {dtype} ({limits.min} to {limits.max}); use float32"
        )
    return np.rint(array).astype(dtype)


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
