"""Decides which files are scans. Cohorts and data sets share this rule.

A scan is a NIfTI or MGH file, or a DICOM series, that holds a magnitude image of a patient. Masks, label images, phase
images, statistical maps and outputs of this package are skipped, each with a reason. `scans_below` walks a folder,
`not_a_scan` checks one file.
"""

import gzip
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume import dicom
from deformmamba.volume.files import MGH_SUFFIXES, NIFTI_SUFFIXES, PathLike, silenced, stem, suffix
from deformmamba.volume.image import Volume

# the first word of NIfTI's `descrip` and of DICOM's DerivationDescription in an output of `upscale`
PRODUCER = "deformmamba"

# the last part of a file's name; the first four are suffixes of BIDS
_LABEL_NAMES = ("dseg", "mask", "probseg", "seg", "label", "labels", "segmentation", "aseg", "wmparc")
_PHASE_NAMES = ("ph", "phase", "phase1", "phase2", "phasediff", "fieldmap")
# NIfTI intent codes of images other than intensity images: statistics, matrices and vectors, surfaces, FSL's
# deformations and field maps, CIFTI
_LABEL_INTENT = 1002
_OTHER_INTENTS = (*range(2, 25), *range(1003, 1011), *range(2002, 2019), *range(3000, 3100))

OWN_OUTPUT = "an output of this package"  # how `not_a_scan` begins for one

_PHASE_BY_TYPE = "a phase image (by its ImageType)"
_MOST_LABELS = 2048
_FEW_VALUES = 16
_ALIKE = 0.5


@dataclass(frozen=True)
class Candidate:
    """A file that may be a scan, or the folder of a DICOM series.

    Attributes:
        path: the file; for DICOM the folder.
        series: the SeriesInstanceUID, if the folder holds several series.
        reason: why it is not a scan; empty for a scan.
    """

    path: Path
    series: str | None = None
    reason: str = ""


def scans_below(root: PathLike, *, skip: PathLike | None = None, outside: bool = True) -> Iterator[Candidate]:
    """Every scan below `root`, and every similar file that is not a scan, with the reason; sorted by name.

    Names that start with a dot are left out. Each folder is visited once, even if several links lead to it.

    Args:
        root: a folder.
        skip: a folder below it that is left out.
        outside: follow links to folders outside of `root`.
    """
    top = os.path.realpath(root)
    seen = set() if skip is None else {os.path.realpath(skip)}
    closed: list[Path] = []
    walk = os.walk(root, followlinks=True, onerror=lambda error: closed.append(Path(error.filename)))
    for folder, folders, names in walk:
        real = os.path.realpath(folder)
        if real in seen or not (outside or _is_below(real, top)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        yield from _in_folder(Path(folder), files, Path(root))
    yield from map(Candidate, closed)  # the reader reports why it cannot be opened


def _is_below(path: str, top: str) -> bool:
    return os.path.commonpath([path, top]) == top


def _in_folder(folder: Path, files: list[Path], root: Path) -> Iterator[Candidate]:
    made = "derivatives" in folder.relative_to(root).parts
    for path in files:
        if suffix(path) in (*NIFTI_SUFFIXES, *MGH_SUFFIXES):
            yield Candidate(path, reason="below derivatives/: made from a scan" if made else not_a_scan(path))
    others = [path for path in files if suffix(path) not in (*NIFTI_SUFFIXES, *MGH_SUFFIXES)]
    found = series_in(others)
    for uid, first in found.items():
        reason = "below derivatives/: made from a scan" if made else _dicom_reason(first)
        yield Candidate(folder, uid if len(found) > 1 else None, reason)


def series_in(files: list[Path]) -> dict[str, Any]:
    """Maps SeriesInstanceUID to one data set (without pixels) of each DICOM series among `files`, in series order.

    It is the first one that may be upscaled, because a series may hold phase images too. Files that are not DICOM
    images are ignored: other formats, reports, a DICOMDIR.
    """
    found: dict[str, Any] = {}
    with silenced():
        for path in files:
            if (dataset := dicom.image_header(path)) is not None:
                uid = str(dataset.get("SeriesInstanceUID"))
                if uid not in found or (_dicom_reason(found[uid]) and not _dicom_reason(dataset)):
                    found[uid] = dataset
    return dict(sorted(found.items(), key=lambda item: (dicom.number(item[1].get("SeriesNumber")), item[0])))


def not_a_scan(path: PathLike) -> str:
    """Why a NIfTI, MGH or DICOM file must not be upscaled, trained on or scored; empty for a scan.

    Checks the name, the JSON file of the same name beside it, the header, and the voxels as far as needed. A file
    that cannot be read counts as a scan, so that the reader reports the error.
    """
    path = Path(path)
    if suffix(path) not in (*NIFTI_SUFFIXES, *MGH_SUFFIXES):
        with silenced():
            dataset = dicom.image_header(path)
        return "" if dataset is None else _dicom_reason(dataset)
    name = stem(path)
    last = re.split(r"[_\-. ]", name)[-1].lower()
    if last in _LABEL_NAMES:
        return f'a mask or label image (the name ends in "{last}")'
    if last in _PHASE_NAMES or "_part-phase" in name:
        return "a phase image (by its name)"
    found = read_json(sidecar_of(path))
    sidecar = found if isinstance(found, dict) else {}
    if is_sidecar_of(sidecar, path) and not _is_degraded(sidecar):
        return f"{OWN_OUTPUT} (by the JSON file beside it)"
    kinds = sidecar.get("ImageType")
    if isinstance(kinds, list) and {"P", "PHASE"} & {str(kind).upper() for kind in kinds}:
        return "a phase image (by the JSON file beside it)"
    with suppress(Exception), silenced():  # malformed bytes raise anything
        return _header_reason(path)
    return ""


def no_scan(path: PathLike, volume: Volume) -> str:
    """`not_a_scan` for the volume read from `path`, a file or a folder of DICOM files."""
    if not isinstance(volume.header, dicom.DicomSeries):
        return not_a_scan(path)
    if reason := _dicom_reason(next(iter(volume.header.datasets.values()))):
        return reason
    # an enhanced series may hold magnitude and phase, and then its ImageType does not say which this volume is
    return _PHASE_BY_TYPE if any(_is_phase(frame.parameters[2].split("\\")) for frame in volume.header.frames) else ""


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def sidecar_of(path: PathLike) -> Path:
    """The path of the JSON file beside a scan: scan.json for scan.nii.gz and for a folder scan."""
    path = Path(path)
    return path.parent / f"{stem(path)}.json"


def is_generated(facts: Any) -> bool:
    """Whether this package wrote `facts`, the content of a JSON file beside an output."""
    producers = facts.get("GeneratedBy") if isinstance(facts, dict) else None
    return isinstance(producers, list) and any(isinstance(p, dict) and p.get("Name") == PRODUCER for p in producers)


def _is_degraded(facts: Any) -> bool:
    """Whether `facts` of this package describe an output of `degrade`, which remains valid input for `upscale`."""
    return any(isinstance(p, dict) and "degradation" in p for p in facts["GeneratedBy"])


def is_sidecar_of(facts: Any, path: PathLike) -> bool:
    """Whether this package wrote `facts`, the content of a JSON file, for the NIfTI or MGH file at `path`.

    scan.json is the sidecar of scan.nii and of scan.mgz. `OutputFile` in it names the output; only the endings are
    compared, so that both files may be renamed. Without this entry (earlier versions), it belongs to each of them.
    """
    if not is_generated(facts):
        return False
    name = facts.get("OutputFile")
    return not isinstance(name, str) or suffix(Path(name)) == suffix(Path(path))


def remove_sidecar(path: PathLike) -> None:
    """Removes the JSON file of a former output of this package at `path`, which describes the new file wrongly."""
    path = Path(path)
    if suffix(path) in (*NIFTI_SUFFIXES, *MGH_SUFFIXES):
        beside = sidecar_of(path)
        if is_sidecar_of(read_json(beside), path):
            beside.unlink(missing_ok=True)


def is_own_file(path: PathLike) -> bool:
    """Whether this package wrote a NIfTI file, by its header. MGH files do not state it."""
    import nibabel

    with suppress(Exception), silenced():  # malformed bytes raise anything
        found: Any = nibabel.load(path)
        return str(found.header["descrip"].item().decode("latin-1")).startswith(f"{PRODUCER} ")
    return False


def _is_own(description: str) -> bool:
    """Whether `inference.derivation` wrote this description. Outputs of `degrade` remain valid input for `upscale`."""
    return description.startswith(f"{PRODUCER} ") and ", degrade " not in description


def _dicom_reason(dataset: Any) -> str:
    if _is_own(str(dataset.get("DerivationDescription") or "")):
        return f"{OWN_OUTPUT} (by its DerivationDescription)"
    if _is_phase(list(dataset.get("ImageType") or [])):
        return _PHASE_BY_TYPE
    return dicom.not_an_image(dataset)


def _is_phase(image_type: list[Any]) -> bool:
    """Whether the values of DICOM's ImageType or FrameType are those of a phase image."""
    return not {"P", "PHASE"}.isdisjoint(str(kind).upper() for kind in image_type[2:4])


def _header_reason(path: Path) -> str:
    import nibabel

    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else path.open("rb") as file:
        start = file.read(nibabel.Nifti2Header.sizeof_hdr)
        slope, intercept = 1.0, 0.0
        if suffix(path) in MGH_SUFFIXES:
            file.seek(0)
            header: Any = nibabel.freesurfer.mghformat.MGHHeader.from_fileobj(file)
        else:
            size = nibabel.Nifti2Header.sizeof_hdr
            is_2 = size in (int.from_bytes(start[:4], end) for end in ("little", "big"))
            kind = nibabel.Nifti2Header if is_2 else nibabel.Nifti1Header
            header = kind(start[: kind.sizeof_hdr], check=False)
            intent = int(header["intent_code"])
            if intent == _LABEL_INTENT:
                return "a label image (NIfTI intent LABEL)"
            if intent in _OTHER_INTENTS:
                return f"not an intensity image (NIfTI intent code {intent})"
            if _is_own(header["descrip"].item().decode("latin-1")):
                return f"{OWN_OUTPUT} (by its header)"
            slope, intercept = _scaling(header)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf" or len(shape) < 2:
            return ""
        file.seek(header.get_data_offset())
        return _voxel_reason(file, shape, dtype, slope, intercept)


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept of a NIfTI header; 1 and 0 where it has none."""
    slope, intercept = header.get_slope_inter()
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _voxel_reason(file: Any, shape: tuple[int, ...], dtype: np.dtype, slope: float, intercept: float) -> str:
    """Reads plane after plane, and stops as soon as the voxels cannot be labels or a phase.

    Labels are integers as stored; the range of a phase is that of slope * stored + intercept.
    """
    n = shape[0] * shape[1]
    values: np.ndarray = np.empty(0)
    background: float | None = None  # the most frequent value of the first plane, which the labels lie in
    alike = pairs = 0
    low = high = 0.0
    labels = True
    for _ in range(int(np.prod(shape[2:3], dtype=int))):
        block = file.read(n * dtype.itemsize)
        if len(block) < n * dtype.itemsize:
            break
        plane = np.frombuffer(block, dtype).reshape(shape[1], shape[0]).astype(np.float64)
        scaled = np.nan_to_num(slope * plane + intercept, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(low, float(scaled.min())), max(high, float(scaled.max()))
        plane = np.nan_to_num(plane, nan=0.0, posinf=0.0, neginf=0.0)
        if labels and (plane == np.rint(plane)).all():
            if background is None:
                found, counts = np.unique(plane, return_counts=True)
                background = float(found[counts.argmax()])
            values = np.union1d(values, plane)
            both = (plane[:, 1:] != background) & (plane[:, :-1] != background)
            alike, pairs = alike + int(((plane[:, 1:] == plane[:, :-1]) & both).sum()), pairs + int(both.sum())
            labels = len(values) <= _FEW_VALUES or (len(values) <= _MOST_LABELS and alike > _ALIKE * pairs)
        else:
            labels = False
        if not labels and low >= 0:
            return ""
    if labels and len(values) > 1:
        kind = "mask (its voxels have two values)" if len(values) == 2 else "label image (its voxels are few integers)"
        return f"a {kind}"
    # a phase fills its whole range: -pi to pi, or the integers that Siemens writes for it
    if abs(low + np.pi) < 0.01 and abs(high - np.pi) < 0.01:
        return "a phase image (its voxels run from -pi to pi)"
    if low == -4096 and 4090 <= high <= 4096:
        return "a phase image (its voxels run from -4096 to 4095)"
    return ""
