"""Reads DICOM series with pydicom: classic images (one slice per file) and enhanced images (many frames per file).

Every slice is a `Frame`. Frames are sorted by their positions, never by name or number.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.annotations import is_integer
from deformmamba.errors import counted
from deformmamba.volume import mosaic, timing
from deformmamba.volume.files import Bounded, ChoiceNeeded, parsing, volume_index
from deformmamba.volume.image import Volume, VolumeError

# slices nearer to each other than this, in mm, have the same position
SAME_PLACE = 0.01
# no clinical image is compressed more; a higher ratio means a damaged header
MOST_VOXELS_PER_BYTE = 10_000
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice: `index` is its frame in the file at `path`, lengths are in mm, directions LPS+ as DICOM has them.

    `axes` are the directions along a row and along a column, `spacing` is between rows and between columns, `step` the
    header's distance between slices (used for a single slice), `size` is (columns, rows).
    `parameters` distinguish images at the same position: echo time, b-value, kind (magnitude, phase). `order` sorts
    images with equal parameters: by time, then by number.
    `box` is the part of a mosaic's image: first row, end row, first column, end column.
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
    size: tuple[int, int]
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """The `header` of a volume from DICOM: its slices in order, and their data sets without pixels.

    `time_step` is in seconds, between the volumes of a time series; 0: unknown, or no time series.
    """

    frames: tuple[Frame, ...]
    datasets: dict[Path, Any]
    affine: np.ndarray
    time_step: float = 0.0

    def __repr__(self) -> str:
        return f"DicomSeries of {len(self.frames)} slices"  # the repr of a data set contains the patient's name


def is_dicom(path: Path) -> bool:
    with parsing(path, "cannot be read"), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def holds_dicom(paths: Iterable[Path]) -> bool:
    """Whether one of the files is a DICOM image, and not a DICOMDIR or a report."""
    return any(image_header(path) is not None for path in paths)


def image_header(path: Path) -> Any:
    """The data set, without pixels, of a DICOM file that holds an image; None for any other file."""
    with suppress(VolumeError):
        if path.is_file() and is_dicom(path) and "Rows" in (dataset := _dataset(path)):
            return dataset
    return None


def not_an_image(dataset: Any) -> str:
    """Why a DICOM object with pixels is not a scan: a segmentation, a dose, a map; empty for a scan."""
    name = str(getattr(dataset.get("SOPClassUID"), "name", ""))
    for kind in ("Segmentation", "RT Dose", "Parametric Map", "Presentation State"):
        if kind in name:
            return f"a DICOM object of another kind ({kind})"
    modality = str(dataset.get("Modality") or "")
    if modality in ("SEG", "RTDOSE", "RTSTRUCT", "PR", "SR", "REG", "KO"):
        return f"a DICOM object of another kind (modality {modality})"
    return ""


@dataclass(frozen=True, eq=False)
class Choice:
    """The part of a folder to read; see `deformmamba.volume.read_volume`."""

    series: int | str | None = None
    stack: int | None = None
    partial: bool = False


def read(path: Path, volume: int | None, choice: Choice) -> Volume:
    """The volume (column, row, slice) of a file or of one series in a folder."""
    source = _Series(path, choice)
    return source.volume(volume_index(path, source.n_volumes, volume))


def count(path: Path, choice: Choice) -> int:
    """Number of volumes in a file or series: echoes, b-values, time points."""
    return _Series(path, choice).n_volumes


def each(path: Path, choice: Choice) -> Iterator[Volume]:
    """Every volume of a file or series, one at a time."""
    source = _Series(path, choice)
    if len(source.kinds) > 1:
        raise ChoiceNeeded(
            f"{path}: holds {source.n_volumes} volumes of {len(source.kinds)} kinds, such as magnitude and phase",
            "volume",
            f"0 to {source.n_volumes - 1}",
        )
    notes = [timing.UNKNOWN] if source.is_over_time and not source.time_step else []
    for index in range(source.n_volumes):
        made = source.volume(index)
        yield replace(made, notes=(*made.notes, *notes))


class _Series:
    """The headers of one series, sorted by position; pixels are decoded volume by volume."""

    def __init__(self, path: Path, choice: Choice) -> None:
        self._path = path
        datasets, self._notes = _images(path, choice.partial)
        with parsing(path, "its DICOM geometry cannot be read"):
            datasets = _one_series(path, datasets, choice.series)
            for file, dataset in datasets.items():
                if reason := not_an_image(dataset):
                    raise VolumeError(f"{file}: {reason}, not a scan")
            self._datasets = datasets
            frames = [frame for file, dataset in datasets.items() for frame in _frames(file, dataset)]
            self._places = _places(path, _one_stack(path, frames, choice.stack))
        self.n_volumes = len(self._places[0])
        self.kinds = {frame.parameters[2] for frame in self._places[0]}
        self.is_over_time, self.time_step = self._times()
        modalities = {str(dataset.get("Modality")) for dataset in datasets.values()}
        self._notes += [OTHER_MODALITIES[name] for name in sorted(modalities) if name in OTHER_MODALITIES]

    def _times(self) -> tuple[bool, float]:
        """Whether the volumes are a time series, and the seconds between them; 0 if unknown."""
        volumes = self._places[0]
        _, b_value, kind = volumes[0].parameters
        same = len(volumes) > 1 and len({frame.parameters for frame in volumes}) == 1
        if not same or b_value > 0 or "DIFFUSION" in kind:
            return False, 0.0
        groups = {file: _functional_groups(file, self._datasets[file]) for file in {frame.path for frame in volumes}}
        of_volumes = [groups[frame.path][frame.index] for frame in volumes]
        try:
            return (True, timing.time_step(of_volumes)) if timing.is_over_time(of_volumes) else (False, 0.0)
        except Exception:  # malformed elements raise anything, and the images do not need them
            return True, 0.0

    def volume(self, index: int) -> Volume:
        path = self._path
        frames = [place[index] for place in self._places]
        with parsing(path, "its DICOM geometry cannot be read"):
            affine = _affine(path, frames)
        used = {frame.path: self._datasets[frame.path] for frame in frames}
        for file, dataset in used.items():
            with parsing(file, "damaged DICOM file"):
                _check_pixels(file, dataset)
        with parsing(path, "its pixels cannot be decoded"):
            array = np.empty((*frames[0].size, len(frames)), np.float32, order="F")
            padded = np.zeros(array.shape, bool, order="F")
        for file, dataset in used.items():
            with parsing(file, "its pixels cannot be decoded: damaged, or an unsupported compression"):
                places = [k for k, frame in enumerate(frames) if frame.path == file]
                # the tiles of a mosaic are all in one frame
                indices = list(dict.fromkeys(frames[k].index for k in places))
                decoded = dict(zip(indices, _pixels(file, dataset, indices), strict=True))
                for k in places:
                    top, bottom, left, right = frames[k].box or (0, frames[k].size[1], 0, frames[k].size[0])
                    pixels, padding = (image[top:bottom, left:right].T for image in decoded[frames[k].index])
                    array[:, :, k] = pixels * frames[k].slope + frames[k].intercept
                    padded[:, :, k] = padding
        padding_notes = _without_padding(array, padded)
        with parsing(path, "its DICOM geometry cannot be read"):
            header = DicomSeries(tuple(frames), used, affine, self.time_step)
            return Volume(array, affine, header=header, slices=2, notes=(*self._notes, *padding_notes))


# the note on a scan of each modality that is not MR
OTHER_MODALITIES = {
    "CT": "this is a CT scan, and the weights are for MR images",
    "PT": "this is a PET scan, and the weights are for MR images",
    "NM": "this is a nuclear medicine scan, and the weights are for MR images",
    "US": "this is an ultrasound image, and the weights are for MR images",
    "XA": "this is an angiogram, and the weights are for MR images",
}
_MOST_NAMES = 20


def _images(path: Path, partial: bool) -> tuple[dict[Path, Any], list[str]]:
    """The data sets of a file, or of all DICOM images of a folder; and a note that names the skipped files.

    Raises:
        VolumeError: no image; or, unless `partial`, an empty or damaged file among the images.
    """
    if not path.is_dir():
        dataset = _dataset(path)
        if "Rows" not in dataset:
            raise VolumeError(f"{path}: {_kind_without_pixels(dataset)}; give the DICOM images or their folder")
        return {path: dataset}, []
    datasets: dict[Path, Any] = {}
    other: list[str] = []
    damaged: list[str] = []
    with parsing(path, "cannot be read"):
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in files:
        try:
            if not is_dicom(file):
                (damaged if _should_be_dicom(file) else other).append(file.name)
            elif "Rows" in (dataset := _dataset(file)):
                datasets[file] = dataset
            else:
                (damaged if "Image Storage" in _class_name(dataset) else other).append(file.name)
        except VolumeError as error:
            if "permission denied" in str(error):
                raise
            damaged.append(file.name)
    if not datasets:
        what = f"no DICOM image, only damaged files ({_listed(damaged)})" if damaged else "no DICOM image"
        raise VolumeError(f"{path}: holds {what}; give a NIfTI file, a DICOM file or a folder of one series")
    if damaged and not partial:
        raise VolumeError(
            f"{path}: {len(damaged)} of {len(files)} files are empty or damaged ({_listed(damaged)}); copy them again, "
            "or read only the others with partial=True (--partial)"
        )
    notes = []
    if damaged:
        notes.append(f"damaged files skipped: {_listed(damaged)}")
    if other:
        notes.append(f"files skipped, because they are not DICOM images: {_listed(other)}")
    return datasets, notes


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _should_be_dicom(path: Path) -> bool:
    """Whether a file that is not DICOM probably was: its name suggests it, or it is empty without a known ending."""
    ending = path.suffix.lower()
    return ending in (".dcm", ".ima", ".dicom") or lacks_preamble(path) or (not ending and not path.stat().st_size)


def lacks_preamble(path: Path) -> bool:
    """Whether a file starts with a DICOM data set, without the preamble of 128 bytes and "DICM"."""
    with path.open("rb") as file:
        start = file.read(8)
    group, element = (int.from_bytes(start[at : at + 2], "little") for at in (0, 2))
    return len(start) == 8 and group in (0x0002, 0x0008) and element in (0x0000, 0x0001, 0x0005, 0x0008, 0x0016)


def _class_name(dataset: Any) -> str:
    uid = dataset.file_meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID")
    return str(getattr(uid, "name", ""))


def _kind_without_pixels(dataset: Any) -> str:
    if "Directory" in _class_name(dataset):
        return "a DICOMDIR, a table of contents"
    return "a DICOM object without pixels"


def _dataset(path: Path) -> Any:
    import pydicom

    with parsing(path, "a damaged DICOM file"), path.open("rb") as file:
        dataset = pydicom.dcmread(Bounded(file, path.stat().st_size), stop_before_pixels=True)
        dataset.buffer = None  # otherwise a later copy of the data set would include the closed file
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
    if is_integer(series) and 0 <= series < len(uids):
        return by_uid[uids[series]]
    listed = [
        f"{k}: {counted(len(by_uid[uid]), 'file')} of {int(first.Columns)}x{int(first.Rows)}"
        for k, uid in enumerate(uids[:10])
        for first in [next(iter(by_uid[uid].values()))]
    ]
    wrong = "" if series is None else f" but no series {series}" if is_integer(series) else " but not this one"
    raise ChoiceNeeded(
        f"{source}: holds {len(uids)} DICOM series{wrong}",
        "series",
        f"counted in the order of their numbers ({', '.join(listed)}{', ...' if len(uids) > 10 else ''}), or by its "
        "SeriesInstanceUID",
    )


def _one_stack(source: Path, frames: list[Frame], stack: int | None) -> list[Frame]:
    """The frames of one orientation, pixel size and image size; a localiser holds several such stacks."""
    stacks: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda frame: (frame.order[-2], frame.order[-1], str(frame.path))):
        for found in stacks:
            if _belong_together(found[0], frame):
                found.append(frame)
                break
        else:
            stacks.append([frame])
    if stack is not None and 0 <= stack < len(stacks):
        return stacks[stack]
    if stack is None and len(stacks) == 1:
        return frames
    listed = [
        f"{k}: {counted(len(found), f'{_plane(found[0])} slice')} of {found[0].size[0]}x{found[0].size[1]}"
        for k, found in enumerate(stacks[:10])
    ]
    wrong = "" if stack is None else f" but no stack {stack}"
    raise ChoiceNeeded(
        f"{source}: the slices differ in orientation, pixel spacing or image size: {len(stacks)} stacks{wrong}",
        "stack",
        f"from 0 ({'; '.join(listed)}{'; ...' if len(stacks) > 10 else ''})",
    )


def _belong_together(a: Frame, b: Frame) -> bool:
    return (
        a.size == b.size
        and np.allclose(a.axes, b.axes, rtol=0, atol=1e-4)
        and np.allclose(a.spacing, b.spacing, rtol=1e-4)
    )


def _plane(frame: Frame) -> str:
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(np.cross(*frame.axes))))]


def _frames(path: Path, dataset: Any) -> Iterator[Frame]:
    """The images of a file; a Siemens mosaic is cut into its tiles."""
    is_grey = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").startswith("MONOCHROME")
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or not is_grey:
        raise VolumeError(f"{path}: voxels are colours; extract one channel first")
    for index, groups in enumerate(_functional_groups(path, dataset)):
        frame = _frame(path, dataset, index, groups)
        if not mosaic.is_mosaic(dataset) and "MOSAIC" not in frame.parameters[2]:
            yield frame
            continue
        if "PerFrameFunctionalGroupsSequence" in dataset:
            raise VolumeError(f"{path}: an enhanced Siemens mosaic, which is not supported; convert it with dcm2niix")
        for box, where in mosaic.tiles(path, dataset, frame.position, frame.axes, frame.spacing):
            yield replace(frame, position=where, box=box, size=(box[3] - box[2], box[1] - box[0]))


def _functional_groups(path: Path, dataset: Any) -> list[list[Any]]:
    """For each frame, the groups that can hold its fields: its own, the shared ones, the data set itself."""
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" in dataset:
        groups = list(dataset.PerFrameFunctionalGroupsSequence)
        if len(groups) != n_frames:
            raise VolumeError(
                f"{path}: multi-frame DICOM that describes {len(groups)} of its {n_frames} frames; export it again"
            )
        shared = [*dataset.get("SharedFunctionalGroupsSequence", [])][:1]
        return [[group, *shared, dataset] for group in groups]
    if n_frames > 1:
        raise VolumeError(f"{path}: multi-frame DICOM without a position for each frame; convert it to NIfTI")
    return [[dataset]]


def _frame(path: Path, dataset: Any, index: int, groups: list[Any]) -> Frame:
    """Frame `index` of a file, from the groups that hold its fields."""

    get = partial_of(timing.field, groups)
    geometry = {
        "ImagePositionPatient": get("PlanePositionSequence", "ImagePositionPatient"),
        "ImageOrientationPatient": get("PlaneOrientationSequence", "ImageOrientationPatient"),
        "PixelSpacing": get("PixelMeasuresSequence", "PixelSpacing"),
    }
    for field, value in geometry.items():
        if value is None:
            raise VolumeError(f"{path}: has no {field}, so its position in the patient is unknown")
    position, axes, spacing = (np.array(value, dtype=float) for value in geometry.values())
    between = get("PixelMeasuresSequence", "SpacingBetweenSlices")
    kind = get("MRImageFrameTypeSequence", "FrameType") or dataset.get("ImageType") or ()
    echo = get("MREchoSequence", "EffectiveEchoTime")
    frame = Frame(
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
        (int(dataset.Columns), int(dataset.Rows)),
    )
    if min(frame.size) < 1:
        raise VolumeError(f"{path}: its images contain no pixels")
    return frame


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _places(source: Path, frames: list[Frame]) -> list[list[Frame]]:
    """The frames at each position, along the normal of the slices; the k-th of each list belongs to volume k."""
    first = frames[0]
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
    apart = "several slices have the same position"
    if any(len(place) != n for place in places):
        raise VolumeError(
            f"{source}: {apart}, and their number differs between positions; a file is missing or duplicated"
        )
    if n > 1 and any(len({frame.parameters for frame in kth}) > 1 for kth in zip(*places, strict=True)):
        raise VolumeError(f"{source}: {apart}, and no DICOM field states which of them belong to one volume")
    # copies of one file under different names are kept once
    if any(a.parameters == b.parameters and a.order == b.order for p in places for a, b in itertools.pairwise(p)):
        raise VolumeError(f"{source}: {apart} and the same number; remove the duplicated files")
    return places


def _affine(source: Path, frames: list[Frame]) -> np.ndarray:
    first, last = frames[0], frames[-1]
    if not np.allclose(first.axes @ first.axes.T, np.eye(2), atol=1e-3):
        raise VolumeError(f"{source}: ImageOrientationPatient is not two perpendicular unit vectors")
    along_row, along_column = first.axes / np.linalg.norm(first.axes, axis=1, keepdims=True)
    if len(frames) == 1:
        step = np.cross(along_row, along_column) * abs(first.step)
    else:
        step = (last.position - first.position) / (len(frames) - 1)
        gaps = np.diff([frame.position for frame in frames], axis=0)
        # a scanner rounds positions by far less than 2 % of a step
        if not np.abs(gaps - step).max() <= 0.02 * np.linalg.norm(step):
            raise VolumeError(f"{source}: slices are not evenly spaced; probably a file of the series is missing")
    # PixelSpacing is (between rows, between columns)
    between_rows, between_columns = first.spacing
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * between_columns, along_column * between_rows, step, first.position], axis=1)
    return LPS_FROM_RAS @ affine


def _check_pixels(path: Path, dataset: Any) -> None:
    """Checks before any allocation that the file can hold the pixels of its header, and that they can be decoded."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_transfer_syntax or syntax.is_private:
        raise VolumeError(f"{path}: has no valid TransferSyntaxUID, so its pixel format is unknown")
    n_bytes = path.stat().st_size
    bits = int(dataset.get("BitsAllocated", 0))
    if bits not in (1, 8, 16, 32, 64):
        raise VolumeError(f"{path}: its header gives {bits} bits per pixel; 1, 8, 16, 32 and 64 are allowed")
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


def _pixels(path: Path, dataset: Any, indices: list[int]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each of the frames at `indices`: (row, column) stored values, and which of them are padding."""
    from pydicom.pixels import apply_modality_lut, iter_pixels
    from pydicom.uid import RLELossless

    # pydicom's own decoder raises an error for a damaged file; another plugin ends the process
    plugin = "pydicom" if dataset.file_meta.TransferSyntaxUID == RLELossless else ""
    with path.open("rb") as file:
        bounded: Any = Bounded(file, path.stat().st_size)
        for pixels in iter_pixels(bounded, indices=indices, raw=True, decoding_plugin=plugin):
            pixels = _stored_bits(pixels, dataset)
            padding = _is_padding(pixels, dataset)
            yield apply_modality_lut(pixels, dataset) if "ModalityLUTSequence" in dataset else pixels, padding


def _is_padding(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Which stored values are PixelPaddingValue, or between it and PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    given = [float(end) for end in ends if isinstance(end, int | float)]
    if not given or ends[0] is None:
        return np.zeros(pixels.shape, bool)
    return np.asarray((pixels >= min(given)) & (pixels <= max(given)))


def _without_padding(array: np.ndarray, padded: np.ndarray) -> list[str]:
    """Sets padding that is far from the scan's values to the lowest of them, in place; returns a note on it.

    Padding that is as dark as the darkest voxels is their background and stays.
    """
    if not padded.any() or padded.all():
        return []
    values = array[~padded]
    lowest, highest = float(values.min()), float(values.max())
    outside = padded & ((array > lowest) | (array < lowest - (highest - lowest)))
    if not outside.any():
        return []
    array[outside] = lowest
    return [
        f"padding (PixelPaddingValue) was set to the lowest value, {lowest:.6g}: {counted(int(outside.sum()), 'voxel')}"
    ]


def _stored_bits(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """Clears the unused bits of each pixel, in which old scanners store overlays, and extends the sign into them."""
    allocated = 8 * pixels.itemsize
    stored = int(dataset.get("BitsStored") or allocated)
    above = allocated - 1 - int(dataset.get("HighBit") or stored - 1)
    if pixels.dtype.kind not in "iu" or not 0 < stored < allocated or not 0 <= above <= allocated - stored:
        return pixels
    return np.right_shift(np.left_shift(pixels, above), allocated - stored)
