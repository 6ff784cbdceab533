"""Reads fastMRI's single-coil knee data as downloaded: one HDF5 file of k-space per volume."""

import math
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deformmamba.data.prepare.plan import (
    PathLike,
    Plan,
    Source,
    Unusable,
    existing_folder,
    files_below,
    relative_name,
    text_digest,
)
from deformmamba.data.splits import by_count, check_shares, read_text, validating
from deformmamba.errors import InvalidArgument
from deformmamba.extras import require
from deformmamba.volume import VolumeError

FASTMRI_SUBJECTS = (227, 45)
FASTMRI_CROP = 320


def plan_fastmri(
    root: PathLike,
    *,
    crop: int = FASTMRI_CROP,
    slices: str = "all",
    val: float = 0.1,
    train_list: PathLike | None = None,
    test_list: PathLike | None = None,
    skip_unusable: bool = False,
) -> Plan:
    """Plans fastMRI's single-coil knee files (file1000001.h5 ...), anywhere below `root`; needs the extra `data`.

    The complex image of each slice is the inverse FFT of its k-space (centred and orthonormal, as in fastMRI), cropped
    to the central `crop` x `crop` pixels. It stays complex: the degradation crops its k-space and only then takes the
    magnitude, as a scanner would.

    The paper's split of 227 and 45 comes from MINet and SANet: lists of file names (CSV, pairs of PD and PD-FS) that
    this package does not contain. Given as `train_list` and `test_list`, the lists define the split, and other files
    are skipped. Without lists, subjects (fastMRI's patient id, or the file name if there is no id) are sorted by
    SHA-256. Of the first 272 subjects, 227 train and 45 test; fewer subjects are split in that proportion. `val` is as
    in `plan_ixi`. With `skip_unusable`, an unusable file is skipped and does not count.

    Args:
        root: the folder.
        crop: side of the central crop in pixels; 1 or more.
        slices: which slices, see `chosen_slices`.
        val, train_list, test_list, skip_unusable: see above.

    Raises:
        ValueError: `crop` or `val` out of range.
        VolumeError: no .h5 file, a file that cannot be opened or holds another kind of data (names what is missing),
            or a list that names a missing file.
        MissingExtra: h5py is not installed.
    """
    check_shares(val)
    if crop < 1:
        raise InvalidArgument(
            f"fastmri: crop is {crop}; wanted the side of the central square in pixels, 1 or more, such as 320"
        )
    root = existing_folder(root)
    require("h5py", extra="data", what="fastMRI")
    if (train_list is None) != (test_list is None):
        raise VolumeError(
            "fastmri: only one of the two file lists was given; give both, for training and testing, or neither"
        )
    skipped: list[tuple[str, str]] = []
    by_name = _by_name(root, skipped)
    listed: dict[str, str] = {}
    if train_list is not None and test_list is not None:
        listed = _listed_splits(train_list, test_list, by_name, root)
        skipped += [(relative_name(by_name[name], root), "in no list") for name in by_name.keys() - listed.keys()]
        by_name = {name: path for name, path in by_name.items() if name in listed}
    headers = _headers(by_name, root, skipped if skip_unusable else None)
    if listed:
        assert test_list is not None
        split_of, rule = _splits_of_patients(headers, listed, val, test_list), "file lists given by the user"
    else:
        split_of, rule = by_count((header.patient for header in headers.values()), FASTMRI_SUBJECTS, val)
    sources = []
    for name, header in headers.items():
        path = by_name[name]
        source = relative_name(path, root)
        if header.patient in split_of:
            split, group = split_of[header.patient], f"{header.contrast} knee"
            sources.append(Source(path, source, name, header.patient, split, group, _slice_reader(path, crop)))
        else:
            skipped.append((source, "its subject is in no split"))
    options = {
        "crop": crop,
        "slices": slices,
        "val": val,
        "train_list": text_digest(train_list),
        "test_list": text_digest(test_list),
    }
    return Plan("fastmri", tuple(sources), tuple(skipped), rule, options)


class _Header(NamedTuple):
    """The patient, and the contrast: "PD" or "PDFS", the two protocols of fastMRI's knee data."""

    patient: str
    contrast: str


def _by_name(root: Path, skipped: list[tuple[str, str]]) -> dict[str, Path]:
    """The .h5 files by name without extension; a second file with the same name goes to `skipped`."""
    by_name: dict[str, Path] = {}
    for path in files_below(root, (".h5",)):
        if path.stem in by_name:
            skipped.append((relative_name(path, root), f"another {path.name} is used"))
        else:
            by_name[path.stem] = path
    if not by_name:
        raise VolumeError(f"{root}: no .h5 file; wanted fastMRI's single-coil knees, such as file1000001.h5")
    return by_name


def _listed_splits(train_list: PathLike, test_list: PathLike, known: Container[str], root: Path) -> dict[str, str]:
    """The split of each listed file."""
    listed: dict[str, str] = {}
    for file, split in ((train_list, "train"), (test_list, "test")):
        for name in _listed(file):
            if name not in known:
                raise VolumeError(f"{file}: lists {name}, but there is no {name}.h5 in {root} or its subfolders")
            if listed.setdefault(name, split) != split:
                raise VolumeError(f"{file}: {name} is in both lists; remove it from one")
    return listed


def _headers(by_name: Mapping[str, Path], root: Path, skipped: list[tuple[str, str]] | None) -> dict[str, _Header]:
    """The headers by name; an unusable file goes to `skipped`, or raises if `skipped` is None."""
    headers = {}
    for name, path in by_name.items():
        try:
            headers[name] = _read_header(path)
        except Unusable as error:
            if skipped is None:
                raise
            skipped.append((relative_name(path, root), str(error).replace(str(path), path.name)))
    return headers


def _splits_of_patients(
    headers: Mapping[str, _Header], listed: Mapping[str, str], val: float, test_list: PathLike
) -> dict[str, str]:
    """The split of each patient, from the splits of their files."""
    of_patient: dict[str, str] = {}
    for name, header in headers.items():
        if of_patient.setdefault(header.patient, listed[name]) != listed[name]:
            raise VolumeError(f"{test_list}: the patient of {name} is in both lists; keep each patient in one list")
    return validating(of_patient, val)


def _listed(path: PathLike) -> list[str]:
    """File names without extension, in the order of a list: one or several per line, numbers between them ignored."""
    fields = [field.strip() for line in read_text(path).splitlines() for field in line.split(",")]
    return [field.removesuffix(".h5") for field in fields if field and not re.fullmatch(r"[-+.\deE]+", field)]


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError:
        raise Unusable(f"{path}: not an HDF5 file, or a truncated one") from None


def _read_header(path: Path) -> _Header:
    with _opened(path) as file:
        missing = [key for key in ("kspace", "ismrmrd_header") if key not in file]
        if missing:
            raise Unusable(
                f"{path}: has no data set {missing[0]!r}, only {', '.join(sorted(file)) or 'none'}; wanted a fastMRI "
                "single-coil file with kspace and ismrmrd_header (the test files of the fastMRI challenge lack it)"
            )
        if "mask" in file:
            raise Unusable(f"{path}: its k-space is undersampled (it has a mask); wanted a fully sampled one")
        acquisition = str(file.attrs.get("acquisition", ""))
        contrast = {"CORPD_FBK": "PD", "CORPDFS_FBK": "PDFS"}.get(acquisition, acquisition)
        return _Header(str(file.attrs.get("patient_id", path.stem)), contrast)


def _slice_reader(path: Path, crop: int) -> Callable[[], tuple[np.ndarray, tuple[float, float], int]]:
    def read() -> tuple[np.ndarray, tuple[float, float], int]:
        with _opened(path) as file:
            try:
                kspace, header = file["kspace"][()], file["ismrmrd_header"][()]
            except OSError:
                raise Unusable(f"{path}: truncated file: its k-space cannot be read") from None
        if kspace.ndim != 3 or not np.iscomplexobj(kspace):
            raise Unusable(f"{path}: k-space of shape {kspace.shape}; wanted single-coil (slices, rows, columns)")
        if min(kspace.shape[1:]) < crop:
            raise Unusable(f"{path}: slices of {kspace.shape[1]}x{kspace.shape[2]}, smaller than the crop of {crop}")
        if not np.isfinite(kspace).all() or not kspace.any():
            raise Unusable(f"{path}: its k-space is all zero, or holds NaN or infinite values")
        image = complex_image(kspace)
        top, left = ((n - crop) // 2 for n in image.shape[1:])
        return image[:, top : top + crop, left : left + crop], ismrmrd_spacing(header, path), 0

    return read


def complex_image(kspace: np.ndarray) -> np.ndarray:
    """The image of centred k-space (..., H, W): complex64, centred and orthonormal as in fastMRI."""
    axes = (-2, -1)
    image = np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho")
    return np.fft.fftshift(image, axes=axes).astype(np.complex64)


def ismrmrd_spacing(header: bytes | str, path: PathLike) -> tuple[float, float]:
    """Pixel (height, width) in mm from an ISMRMRD header (XML): field of view over matrix size of the encoded space.

    The first axis of fastMRI's k-space is the readout, x. Its encoded field of view is twice the reconstructed one; a
    crop in image space does not change the pixel size.
    """
    from xml.etree import ElementTree

    try:
        space = ElementTree.fromstring(header).find(".//{*}encoding/{*}encodedSpace")
        height, width = (
            float(space.findtext(f"{{*}}fieldOfView_mm/{{*}}{axis}") or 0)  # type: ignore[union-attr]
            / float(space.findtext(f"{{*}}matrixSize/{{*}}{axis}") or 0)  # type: ignore[union-attr]
            for axis in "xy"
        )
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise InvalidArgument(header)
    except (ElementTree.ParseError, AttributeError, ValueError, ZeroDivisionError):
        raise Unusable(f"{path}: its ISMRMRD header has no field of view and matrix of the encoded space") from None
    return height, width
