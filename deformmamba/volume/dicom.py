"""DICOM series are read through pydicom: classic images, one slice a file, and enhanced ones, a file of many frames.

Every slice is a `Frame`, wherever it came from; frames are sorted by their positions, never by name or number.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume.files import Bounded, parsing, volume_index
from deformmamba.volume.image import Volume, VolumeError

# slices nearer to each other than this, in mm, lie at the same place
SAME_PLACE = 0.01
# no compression of an image that anybody looks at goes beyond; a damaged header that says so is not believed
MOST_VOXELS_PER_BYTE = 10_000
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: `index` is its frame in the file at `path`, lengths are in mm, directions LPS+ as DICOM has them.

    `axes` are the directions along a row and along a column, `spacing` is between rows and between columns, `step` what
    the header says of the distance between slices (one that is alone has nothing else).
    `parameters` tell images apart that lie at the same place: echo time, b-value, kind (magnitude, phase). `order` is
    how those with the same parameters follow each other: in time, then as numbered.
    """

    path: Path
    index: int
    position: np.ndarray
    axes: np.ndarray
    spacing: tuple[float, float]
    step: float
    slope: float
    intercept: float
    parameters: tuple[float, float, str]
    order: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """What a volume's `header` is when it came from DICOM: its slices in order, and their data sets without pixels."""

    frames: tuple[Frame, ...]
    datasets: dict[Path, Any]
    affine: np.ndarray

    def __repr__(self) -> str:
        return f"DicomSeries of {len(self.frames)} slices"  # a data set prints a patient's name


def is_dicom(path: Path) -> bool:
    with parsing(path, "cannot be read"), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def holds_dicom(paths: Iterable[Path]) -> bool:
    """Whether one of them is a DICOM file; a folder is none, nor is what cannot be read."""
    for path in paths:
        with suppress(VolumeError):
            if is_dicom(path):
                return True
    return False


def image_header(path: Path) -> Any:
    """The data set, without pixels, of a DICOM file that holds an image; None for any other file."""
    with suppress(VolumeError):
        if path.is_file() and is_dicom(path) and "Rows" in (dataset := _dataset(path)):
            return dataset
    return None


def not_an_image(dataset: Any) -> str:
    """Why a DICOM object with pixels is no scan: a segmentation, a dose, a map; empty if it is one."""
    name = str(getattr(dataset.get("SOPClassUID"), "name", ""))
    for kind in ("Segmentation", "RT Dose", "Parametric Map", "Presentation State", "Secondary Capture"):
        if kind in name:
            return f"a DICOM object of another kind ({kind})"
    modality = str(dataset.get("Modality") or "")
    if modality in ("SEG", "RTDOSE", "RTSTRUCT", "PR", "SR", "REG", "KO"):
        return f"a DICOM object of another kind (modality {modality})"
    return ""


def read(path: Path, volume: int | None, series: int | str | None) -> Volume:
    """The volume (column, row, slice) of a file or of one series in a folder."""
    if path.is_dir():
        with parsing(path, "cannot be read"):
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and is_dicom(p))
    else:
        files = [path]
    datasets = {file: dataset for file in files if "Rows" in (dataset := _dataset(file))}  # a report is no image
    if not datasets:
        raise VolumeError(f"{path}: holds no DICOM image; give a NIfTI file, a DICOM file or a folder of one series")
    with parsing(path, "DICOM geometry that cannot be understood"):
        datasets = _one_series(path, datasets, series)
        frames = [frame for file, dataset in datasets.items() for frame in _frames(file, dataset)]
        frames = _one_volume(path, frames, volume)
        affine = _affine(path, frames)
        size = _one_size(path, datasets)
    used = {frame.path: datasets[frame.path] for frame in frames}
    for file, dataset in used.items():
        with parsing(file, "a damaged DICOM file"):
            _check_pixels(file, dataset)
    with parsing(path, "its pixels cannot be decoded"):
        array = np.empty((*size, len(frames)), np.float32, order="F")
    for file, dataset in used.items():
        with parsing(file, "its pixels cannot be decoded: damaged, or compressed in an unusual way"):
            places = [k for k, frame in enumerate(frames) if frame.path == file]
            for k, pixels in zip(places, _pixels(file, dataset, [frames[k].index for k in places]), strict=True):
                array[:, :, k] = pixels.T * frames[k].slope + frames[k].intercept
    with parsing(path, "DICOM geometry that cannot be understood"):
        return Volume(array, affine, header=DicomSeries(tuple(frames), used, affine))


def _dataset(path: Path) -> Any:
    import pydicom

    with parsing(path, "a damaged DICOM file"), path.open("rb") as file:
        dataset = pydicom.dcmread(Bounded(file, path.stat().st_size), stop_before_pixels=True)
        dataset.buffer = None  # a file that is closed by then is not to be copied with the data set
        return dataset


def _one_series(source: Path, datasets: dict[Path, Any], series: int | str | None) -> dict[Path, Any]:
    by_uid: dict[str, dict[Path, Any]] = {}
    for path, dataset in datasets.items():
        by_uid.setdefault(str(dataset.get("SeriesInstanceUID")), {})[path] = dataset

    def place(uid: str) -> tuple[float, str]:
        return number(next(iter(by_uid[uid].values())).get("SeriesNumber")), uid

    uids = sorted(by_uid, key=place)
    if series is None and len(uids) == 1:
        return datasets
    if isinstance(series, str) and series in by_uid:
        return by_uid[series]
    if isinstance(series, int) and 0 <= series < len(uids):
        return by_uid[uids[series]]
    listed = [
        f"{k}: {len(by_uid[uid])} files of {int(first.Columns)}x{int(first.Rows)}"
        for k, uid in enumerate(uids[:10])
        for first in [next(iter(by_uid[uid].values()))]
    ]
    wrong = "" if series is None else f" but no series {series}" if isinstance(series, int) else " but not this one"
    raise VolumeError(
        f"{source}: holds {len(uids)} DICOM series{wrong}; choose one with series=K (--series K), counted in the order "
        f"of their numbers ({', '.join(listed)}{', ...' if len(uids) > 10 else ''}), or by its SeriesInstanceUID"
    )


def _frames(path: Path, dataset: Any) -> Iterator[Frame]:
    is_grey = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or not is_grey:
        raise VolumeError(f"{path}: voxels are colours: take one channel first")
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in dataset:
        groups = list(dataset.PerFrameFunctionalGroupsSequence)
        if len(groups) != n_frames:
            raise VolumeError(f"{path}: multi-frame DICOM that says what {len(groups)} of {n_frames} frames are")
        shared = [*dataset.get("SharedFunctionalGroupsSequence", [])][:1]
        levels = [[group, *shared, dataset] for group in groups]
    elif n_frames > 1:
        raise VolumeError(f"{path}: multi-frame DICOM of a kind that does not say where each frame lies; convert it")
    else:
        levels = [[dataset]]
    for index, level in enumerate(levels):

        def get(macro: str, field: str, level: list[Any] = level) -> Any:
            """A field of a functional group, of the frame or shared; of a classic image, of the data set itself."""
            for group in level:
                found = group if group is dataset else next(iter(group.get(macro) or []), None)
                if found is not None and found.get(field) not in (None, ""):
                    return found[field].value
            return None

        geometry = {
            "ImagePositionPatient": get("PlanePositionSequence", "ImagePositionPatient"),
            "ImageOrientationPatient": get("PlaneOrientationSequence", "ImageOrientationPatient"),
            "PixelSpacing": get("PixelMeasuresSequence", "PixelSpacing"),
        }
        for field, value in geometry.items():
            if value is None:
                raise VolumeError(f"{path}: has no {field}, so its place in the patient is unknown")
        position, axes, spacing = (np.array(value, dtype=float) for value in geometry.values())
        between = get("PixelMeasuresSequence", "SpacingBetweenSlices")
        kind = get("MRImageFrameTypeSequence", "FrameType") or dataset.get("ImageType") or ()
        echo = get("MREchoSequence", "EffectiveEchoTime")
        yield Frame(
            path,
            index,
            position.reshape(3),
            axes.reshape(2, 3),
            (float(spacing[0]), float(spacing[1])),
            number(between) or number(get("PixelMeasuresSequence", "SliceThickness")) or 1.0,
            float(get("PixelValueTransformationSequence", "RescaleSlope") or 1),
            float(get("PixelValueTransformationSequence", "RescaleIntercept") or 0),
            (
                number(dataset.get("EchoTime") if echo is None else echo),
                number(get("MRDiffusionSequence", "DiffusionBValue")),
                "\\".join(str(value) for value in kind),
            ),
            (
                number(get("FrameContentSequence", "TemporalPositionIndex")),
                number(dataset.get("TemporalPositionIdentifier")),
                number(dataset.get("AcquisitionNumber")),
                number(dataset.get("TriggerTime")),
                number(dataset.get("InstanceNumber")),
                float(index),
            ),
        )


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _one_size(source: Path, datasets: dict[Path, Any]) -> tuple[int, int]:
    sizes = {(int(dataset.Columns), int(dataset.Rows)) for dataset in datasets.values()}
    if len(sizes) > 1:
        raise VolumeError(f"{source}: the files of this series differ in image size; they are no single volume")
    size = sizes.pop()
    if min(size) < 1:
        raise VolumeError(f"{source}: its images have no pixels")
    return size


def _one_volume(source: Path, frames: list[Frame], volume: int | None) -> list[Frame]:
    """The frames of one volume, along the normal of the slices."""
    first = frames[0]
    for what, same in (
        ("orientation", all(np.allclose(f.axes, first.axes, rtol=0, atol=1e-4) for f in frames)),
        ("pixel spacing", all(np.allclose(f.spacing, first.spacing, rtol=1e-4) for f in frames)),
    ):
        if not same:
            raise VolumeError(f"{source}: the files of this series differ in {what}; they are no single volume")
    normal = np.cross(*first.axes)
    along = sorted(frames, key=lambda frame: float(normal @ frame.position))
    places: list[list[Frame]] = []
    for frame in along:
        if places and normal @ (frame.position - places[-1][0].position) < SAME_PLACE:
            places[-1].append(frame)
        else:
            places.append([frame])
    for place in places:
        place.sort(key=lambda frame: (frame.parameters, frame.order, str(frame.path)))
    n = len(places[0])
    apart = "several slices share one position"
    if any(len(place) != n for place in places):
        raise VolumeError(f"{source}: {apart}, not as many at each; is a file missing, or there twice?")
    if n > 1 and any(len({frame.parameters for frame in kth}) > 1 for kth in zip(*places, strict=True)):
        raise VolumeError(f"{source}: {apart}, and nothing tells which of them belong together")
    # a copy of a file under another name: nothing but the name differs
    if any(a.parameters == b.parameters and a.order == b.order for p in places for a, b in itertools.pairwise(p)):
        raise VolumeError(f"{source}: {apart} and one number: files are there twice; keep one of each")
    index = volume_index(source, n, volume)
    return [place[index] for place in places]


def _affine(source: Path, frames: list[Frame]) -> np.ndarray:
    first, last = frames[0], frames[-1]
    if not np.allclose(first.axes @ first.axes.T, np.eye(2), atol=1e-3):
        raise VolumeError(f"{source}: ImageOrientationPatient holds no two perpendicular unit vectors")
    along_row, along_column = first.axes / np.linalg.norm(first.axes, axis=1, keepdims=True)
    if len(frames) == 1:
        step = np.cross(along_row, along_column) * abs(first.step)
    else:
        step = (last.position - first.position) / (len(frames) - 1)
        gaps = np.diff([frame.position for frame in frames], axis=0)
        # a scanner rounds positions by far less than 2 % of a step
        if not np.abs(gaps - step).max() <= 0.02 * np.linalg.norm(step):
            raise VolumeError(f"{source}: slices are not evenly spaced; is a file of the series missing?")
    # PixelSpacing is (between rows, between columns)
    between_rows, between_columns = first.spacing
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * between_columns, along_column * between_rows, step, first.position], axis=1)
    return LPS_FROM_RAS @ affine


def _check_pixels(path: Path, dataset: Any) -> None:
    """What the header promises can be in the file, and can be decoded; before anything is allocated."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_transfer_syntax or syntax.is_private:
        raise VolumeError(f"{path}: does not say how its pixels are stored (TransferSyntaxUID)")
    n_bytes = path.stat().st_size
    bits = int(dataset.get("BitsAllocated", 0))
    if bits not in (1, 8, 16, 32, 64):
        raise VolumeError(f"{path}: says that a pixel has {bits} bits; 1, 8, 16, 32 and 64 are allowed")
    voxels = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("NumberOfFrames") or 1)
    if syntax.is_encapsulated or syntax.is_deflated:
        if voxels > MOST_VOXELS_PER_BYTE * n_bytes:
            raise VolumeError(f"{path}: truncated: {n_bytes} bytes cannot hold the {voxels} pixels of its header")
        if syntax.is_encapsulated and not get_decoder(syntax).is_available:
            raise VolumeError(
                f"{path}: pixels are compressed ({syntax.name}); install the decoders with: pip install "
                "'deformmamba[dicom]'"
            )
    elif voxels * bits > 8 * n_bytes:
        raise VolumeError(f"{path}: truncated: {n_bytes} bytes cannot hold the {voxels} pixels of its header")


def _pixels(path: Path, dataset: Any, indices: list[int]) -> Iterable[np.ndarray]:
    """(row, column) stored values of the frames at `indices`."""
    from pydicom.pixels import apply_modality_lut, iter_pixels
    from pydicom.uid import RLELossless

    # another plugin for it ends the process on a damaged file; pydicom's own raises
    plugin = "pydicom" if dataset.file_meta.TransferSyntaxUID == RLELossless else ""
    with path.open("rb") as file:
        bounded: Any = Bounded(file, path.stat().st_size)
        for pixels in iter_pixels(bounded, indices=indices, raw=True, decoding_plugin=plugin):
            pixels = _stored_bits(pixels, dataset)
            yield apply_modality_lut(pixels, dataset) if "ModalityLUTSequence" in dataset else pixels


def _stored_bits(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Without the other bits of a pixel, where old scanners put drawings; a sign is carried to where they were."""
    allocated = 8 * pixels.itemsize
    stored = int(dataset.get("BitsStored") or allocated)
    above = allocated - 1 - int(dataset.get("HighBit") or stored - 1)
    if pixels.dtype.kind not in "iu" or not 0 < stored < allocated or not 0 <= above <= allocated - stored:
        return pixels
    return np.right_shift(np.left_shift(pixels, above), allocated - stored)
