"""Writes DICOM series with pydicom, as copies of the source's data sets that keep all still valid elements.

The rules, for classic and enhanced images:

- New: SOP instance and series UIDs, instance numbers (slices in order), content, creation and series date and time,
  the series number (the source's plus 1000; plus 2000 for a deviation, whose window is its own range), " SR" after the
  series description (" SR standard deviation"; for other derivations see `KINDS`), ImageType DERIVED\\SECONDARY (an
  enhanced image must say DERIVED\\PRIMARY) and the source's further values, the description of the derivation, the
  source image of each slice, this package among the contributing equipment.
- Computed: Rows, Columns, PixelSpacing, position and orientation; if the slice direction was resampled,
  SliceThickness and SpacingBetweenSlices in proportion, and no SliceLocation.
- Pixels: 16 bits, unsigned unless there are negative values, one rescale slope for the whole series, intercept 0. The
  slope covers the range of the values, so that neither values beyond the source's range nor small ones are lost.
  Windows are unchanged, because their units are those after the slope.
- Removed: private elements (they may describe the old pixels), overlays, icons, padding and smallest and
  largest values, lookup tables, real world maps, signatures: `STALE`.
- Kept: the patient, the study, the frame of reference, the acquisition, the manufacturer, everything else. Explicit
  little endian, not compressed.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba import __version__
from deformmamba.atomic import is_temporary
from deformmamba.volume.dicom import LPS_FROM_RAS, DicomSeries, Frame, is_dicom, number
from deformmamba.volume.files import (
    DICOM_DTYPES,
    PathLike,
    SliceFile,
    as_dtype,
    check_folder,
    check_folder_of,
    closed,
    parsing,
    slice_file,
    suffix,
)
from deformmamba.volume.image import Volume, VolumeError

SUFFIXES = (".dcm", ".ima")
# marks the files that this package wrote
IMPLEMENTATION_UID = "2.25.193584632671490206451184087241860893217"
LARGEST_ELEMENT = 2**32 - 2  # bytes
# value and meaning in DICOM's own scheme
RESAMPLING = ("113085", "Spatial resampling")
SOURCE_IMAGE = ("121322", "Source image for image processing operation")
EQUIPMENT = ("109102", "Processing Equipment")
POSITION, IN_STACK = 0x00200032, 0x00209057  # the dimensions of frames that follow the slices


def check_target(path: PathLike, source: Volume, dtype: str | None) -> None:
    """As `check_output`, for a DICOM target: a folder, or a file if one file holds the whole series."""
    series = source.header
    if not isinstance(series, DicomSeries):
        raise VolumeError(f"{path}: DICOM output needs DICOM input; give a file name ending in .nii.gz")
    if any(frame.box for frame in series.frames):
        raise VolumeError(f"{path}: a Siemens mosaic cannot be written as DICOM; give a file name ending in .nii.gz")
    if dtype not in (None, *DICOM_DTYPES):
        raise VolumeError(
            f"{path}: DICOM voxels are 16-bit integers with a slope (no dtype), or {', '.join(DICOM_DTYPES)} without "
            f"one; not {dtype}"
        )
    target = Path(os.path.realpath(path))
    if any(os.path.realpath(file) == str(target) for file in series.datasets):
        raise VolumeError(f"{path}: the output is the input file; choose another output name")
    if suffix(target) in SUFFIXES:
        if len(series.datasets) > 1 or (source.array.shape[2] > 1 and not _is_enhanced(series)):
            raise VolumeError(f"{path}: this series has one file per slice; give a folder, not a file")
        if target.is_dir():
            raise VolumeError(f"{path}: is a folder; give a file name, or a folder name without .dcm")
    elif target.is_dir():
        if any(os.path.realpath(file.parent) == str(target) for file in series.datasets):
            raise VolumeError(f"{path}: the output folder is the input folder; choose another folder")
        check_folder(path, target)
        with parsing(Path(path), "cannot be read"):
            if not all(is_ours(file) for file in target.iterdir() if not is_temporary(file.name)):
                raise VolumeError(f"{path}: contains files that this command did not write; give a new or empty folder")
        return
    elif target.exists():
        raise VolumeError(f"{path}: is a file, but a DICOM series is written to a folder; choose another name")
    check_folder_of(path)


def is_ours(path: Path) -> bool:
    """Whether this package wrote a DICOM file.

    Raises:
        VolumeError: it cannot be read.
    """
    from pydicom.filereader import read_file_meta_info

    if path.is_symlink() or not path.is_file() or not is_dicom(path):
        return False
    with parsing(path, "a damaged DICOM file"):
        return bool(read_file_meta_info(path).get("ImplementationClassUID") == IMPLEMENTATION_UID)


def _is_enhanced(series: DicomSeries) -> bool:
    return any("PerFrameFunctionalGroupsSequence" in dataset for dataset in series.datasets.values())


@contextmanager
def slices(
    target: Path,
    like: Volume,
    shape: tuple[int, ...],
    axis: int,
    dtype: str | None,
    derivation: str | None,
    deviation: bool,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Takes slices across `axis`, keeps them on disk, and writes the series to `target` at the end: see `write`.

    The shared slope depends on the range of all slices. They lie in `target`, or beside it if it is a file.
    """
    with slice_file(target / "slices" if target.is_dir() else target, shape, axis, "float32") as voxels:
        yield voxels.put
        write(target, like, voxels, dtype, derivation, deviation)


def write(
    target: Path, like: Volume, voxels: SliceFile, dtype: str | None, derivation: str | None, deviation: bool
) -> None:
    """Writes a new series to `target`, an empty folder or a file: (column, row, slice), with the geometry of `like`.

    Each slice is written into a copy of the data set of the nearest source slice.
    """
    series: DicomSeries = like.header
    axes = like.affine[:3, :2] / np.linalg.norm(like.affine[:3, :2], axis=0)
    if abs(axes[:, 0] @ axes[:, 1]) > 1e-3:
        raise VolumeError("the rows and columns are not perpendicular, which DICOM cannot store; write NIfTI")
    middle = [(voxels.shape[0] - 1) / 2, (voxels.shape[1] - 1) / 2]
    source_from_out = np.linalg.inv(series.affine) @ like.affine
    nearest = [
        int(np.clip(np.rint((source_from_out @ [*middle, k, 1])[2]), 0, len(series.frames) - 1))
        for k in range(voxels.shape[2])
    ]
    stored, slope = _quantisation(voxels, dtype)
    made = _Made(like, series, voxels, stored, slope, derivation or f"deformmamba {__version__}", deviation)
    if not _is_enhanced(series):
        names = [target] if suffix(target) in SUFFIXES else [target / f"{k + 1:04d}.dcm" for k in range(len(nearest))]
        for k, (name, source) in enumerate(zip(names, nearest, strict=True)):
            made.classic(name, k, series.frames[source])
        return
    for n, file in enumerate(series.datasets):
        of_file = [(k, series.frames[source]) for k, source in enumerate(nearest) if series.frames[source].path == file]
        name = target if suffix(target) in SUFFIXES else target / f"{n + 1:04d}.dcm"
        if of_file:
            made.enhanced(name, of_file)


@contextmanager
def _encoding() -> Iterator[None]:
    """Turns the error for a readable source element that cannot be written into one line that does not quote it."""
    try:
        yield
    except (VolumeError, OSError):
        raise
    except Exception as error:  # malformed data sets raise anything
        raise VolumeError(
            f"the DICOM source is damaged ({type(error).__name__}); give a file name ending in .nii.gz"
        ) from None


def _quantisation(voxels: SliceFile, dtype: str | None) -> tuple[str, float]:
    """The stored type of the voxels and the slope, short enough for a decimal string of 16 characters.

    Zero is stored as zero. Without a `dtype` the 16 bits are used in full, independent of the source's range.
    """
    if dtype is not None:
        return dtype, 1.0
    ranges = [(float(plane.min()), float(plane.max())) for plane in map(voxels.plane, range(voxels.shape[2]))]
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    stored = "uint16" if lowest >= 0 else "int16"
    limits = np.iinfo(stored)
    span = max(highest / limits.max, lowest / limits.min if lowest < 0 else 0.0)
    return stored, float(f"{span:.9e}") if span > 0 else 1.0


# Elements that are no longer valid in the output: layout of stored values, signatures, parts of a whole. Overlays and
# icons would have the old size. All private elements are removed too, because their meaning is unknown.
STALE = (
    "DataSetTrailingPadding",
    "DigitalSignaturesSequence",
    "DoubleFloatPixelData",
    "EncapsulatedDocument",
    "EncryptedAttributesSequence",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "FloatPixelPaddingValue",
    "IconImageSequence",
    "InConcatenationNumber",
    "InConcatenationTotalNumber",
    "ConcatenationFrameOffsetNumber",
    "ConcatenationUID",
    "SOPInstanceUIDOfConcatenationSource",
    "InstanceCreatorUID",
    "LargestImagePixelValue",
    "LargestImagePixelValueInPlane",
    "LargestPixelValueInSeries",
    "MACParametersSequence",
    "ModalityLUTSequence",
    "PixelAspectRatio",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PlanarConfiguration",
    "RealWorldValueMappingSequence",
    "SmallestImagePixelValue",
    "SmallestImagePixelValueInPlane",
    "SmallestPixelValueInSeries",
    "VOILUTSequence",
)

# The pulse sequence, which an enhanced image may name only where it is ORIGINAL (PS3.3 C.8.13.4).
OF_ORIGINALS = (
    "ArterialSpinLabelingContrast",
    "BulkMotionCompensationTechnique",
    "BulkMotionSignalSource",
    "CoverageOfKSpace",
    "EchoPlanarPulseSequence",
    "EchoPulseSequence",
    "GeometryOfKSpaceTraversal",
    "MRAcquisitionType",
    "MultiPlanarExcitation",
    "MultipleSpinEcho",
    "NumberOfKSpaceTrajectories",
    "OversamplingPhase",
    "PhaseContrast",
    "PulseSequenceName",
    "RectilinearPhaseEncodeReordering",
    "SaturationRecovery",
    "SegmentedKSpaceTraversal",
    "SpectrallySelectedSuppression",
    "SteadyStatePulseSequence",
    "TimeOfFlightContrast",
)


# by a word in the description of the derivation: what follows the series description, and this package's contribution
KINDS = {"isotropic": ("isotropic", "isotropic resampling"), "degrade": ("degraded", "simulated lower resolution")}


class _Made:
    """The shared elements of one new series, and the methods that write its instances."""

    def __init__(
        self,
        like: Volume,
        series: DicomSeries,
        voxels: SliceFile,
        stored: str,
        slope: float,
        derivation: str,
        deviation: bool,
    ) -> None:
        from pydicom.uid import generate_uid

        self.series, self.voxels, self.stored, self.slope = series, voxels, stored, slope
        self.deviation = deviation
        # from 0 to the largest value, because the image's window would show a deviation as black
        planes = range(voxels.shape[2]) if deviation else ()
        self.largest = max((float(voxels.plane(k).max()) for k in planes), default=0.0)
        self.derivation = derivation.encode("ascii", "replace").decode()[:1024]
        self.label, self.purpose = next(
            (words for kind, words in KINDS.items() if f", {kind} " in derivation), ("SR", "super-resolution")
        )
        self.series_uid = generate_uid(prefix=None)
        self.now = datetime.now()
        lps = LPS_FROM_RAS @ like.affine
        between_columns, between_rows, between_slices = (float(n) for n in np.linalg.norm(lps[:3, :3], axis=0))
        self.orientation = [_decimal(n) for n in (*lps[:3, 0] / between_columns, *lps[:3, 1] / between_rows)]
        self.spacing = [_decimal(between_rows), _decimal(between_columns)]
        before = float(np.linalg.norm(series.affine[:3, 2]))
        # thickness differs from spacing: gaps and overlaps are kept in proportion
        self.thinner = between_slices / before
        self.slices_moved = voxels.shape[2] != len(series.frames) or abs(self.thinner - 1) > 1e-4
        self.positions = [[_decimal(n) for n in (lps @ [0, 0, k, 1])[:3]] for k in range(voxels.shape[2])]

    def pixels(self, k: int) -> bytes:
        """Slice k, row by row, as stored."""
        plane = as_dtype(self.voxels.plane(k).astype(np.float64) / self.slope, self.stored)
        return plane.astype(np.dtype(self.stored).newbyteorder("<")).tobytes(order="F")

    def classic(self, path: Path, k: int, frame: Frame) -> None:
        """One file of slice k, like that of the source's `frame`."""
        pixels = self.pixels(k)
        with _encoding():
            made = self._copy(frame.path)
            made.InstanceNumber = k + 1
            made.ImagePositionPatient = self.positions[k]
            made.ImageOrientationPatient = self.orientation
            self._measures(made)
            self._transformation(made)
            if self.slices_moved:
                _drop(made, ["SliceLocation"])
            made.DerivationDescription = self.derivation
            made.SourceImageSequence = [_reference(self.series.datasets[frame.path])]
            made.add_new("PixelData", "OW", pixels)
            self._save(path, made)

    def enhanced(self, path: Path, frames: list[tuple[int, Frame]]) -> None:
        """One multi-frame file of the slices k, each with the source's frame whose functional groups it has."""
        if len(frames) * self.voxels.shape[0] * self.voxels.shape[1] * 2 > LARGEST_ELEMENT:
            raise VolumeError(f"{len(frames)} frames of {self.voxels.shape[:2]} do not fit into one DICOM file (4 GB)")
        with _encoding():
            made = self._multi_frame(frames)
        with closed(tempfile.TemporaryFile(dir=path.parent)) as pixels:
            for k, _ in frames:
                pixels.write(self.pixels(k))
            pixels.seek(0)
            made.add_new("PixelData", "OW", pixels)
            self._save(path, made)

    def _multi_frame(self, frames: list[tuple[int, Frame]]) -> Any:
        from pydicom.dataset import Dataset

        file = frames[0][1].path
        made = self._copy(file)
        _drop(made, OF_ORIGINALS)
        made.ImageType = _image_type(made.get("ImageType"), "PRIMARY")
        made.NumberOfFrames = len(frames)
        source = self.series.datasets[file]
        made.SourceImageEvidenceSequence = [_evidence(source)]
        shared = next(iter(made.get("SharedFunctionalGroupsSequence") or []), Dataset())
        made.SharedFunctionalGroupsSequence = [shared]
        groups = [copy.deepcopy(made.PerFrameFunctionalGroupsSequence[frame.index]) for _, frame in frames]
        pointers = [item.get("DimensionIndexPointer") for item in made.get("DimensionIndexSequence") or []]
        _drop(shared, ["DerivationImageSequence", "PlanePositionSequence", "PlaneOrientationSequence"])
        for nth, ((k, frame), group) in enumerate(zip(frames, groups, strict=True)):
            _macro(group, "PlanePositionSequence").ImagePositionPatient = self.positions[k]
            _macro(group, "PlaneOrientationSequence").ImageOrientationPatient = self.orientation
            content = _macro(group, "FrameContentSequence")
            if "InStackPositionNumber" in content:
                content.InStackPositionNumber = nth + 1
            values = content.get("DimensionIndexValues")
            if values is not None and len(pointers) > 1 and len(values) == len(pointers):
                content.DimensionIndexValues = [
                    nth + 1 if pointer in (POSITION, IN_STACK) else value
                    for pointer, value in zip(pointers, values, strict=True)
                ]
            elif values is not None:
                content.DimensionIndexValues = nth + 1
            image = _reference(source)
            image.ReferencedFrameNumber = frame.index + 1
            image.PurposeOfReferenceCodeSequence = [_code(SOURCE_IMAGE)]
            derived = Dataset()
            derived.DerivationDescription = self.derivation
            derived.DerivationCodeSequence = [_code(RESAMPLING)]
            derived.SourceImageSequence = [image]
            group.DerivationImageSequence = [derived]
        for group in [shared, *groups]:
            for name in [element.keyword for element in group if element.keyword.endswith("FrameTypeSequence")]:
                group[name].value[0].FrameType = _image_type(group[name].value[0].get("FrameType"), "PRIMARY")
            for macro, fill in (
                ("PixelMeasuresSequence", self._measures),
                ("PixelValueTransformationSequence", self._transformation),
            ):
                if macro in group or (group is shared and not any(macro in each for each in groups)):
                    fill(_macro(group, macro))
        made.PerFrameFunctionalGroupsSequence = groups
        return made

    def _copy(self, path: Path) -> Any:
        """A copy of a data set with the elements of the new series, except pixels and geometry."""
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

        source = self.series.datasets[path]
        made = copy.deepcopy(source)
        if source.file_meta.TransferSyntaxUID.is_implicit_VR or not source.file_meta.TransferSyntaxUID.is_little_endian:
            _decode(made)
        _drop_private(made)
        _drop(made, STALE)
        for tag in [tag for tag in made.keys() if 0x6000 <= tag.group <= 0x60FF or tag.group == 0x7FE0]:  # noqa: SIM118
            del made[tag]
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = made.SOPClassUID
        meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = generate_uid(prefix=None)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
        meta.ImplementationVersionName = f"DEFORMMAMBA {__version__}"[:16]
        made.file_meta = meta
        made.SeriesInstanceUID = self.series_uid
        made.SeriesNumber = int(number(made.get("SeriesNumber"))) + (2000 if self.deviation else 1000)
        name = f" {self.label} standard deviation" if self.deviation else f" {self.label}"
        made.SeriesDescription = f"{str(made.get('SeriesDescription') or '')[: 64 - len(name)]}{name}".strip()
        if self.deviation:
            self._window(made)
        made.ImageType = _image_type(made.get("ImageType"))
        day, clock = self.now.strftime("%Y%m%d"), self.now.strftime("%H%M%S")
        for event in ("Content", "InstanceCreation", "Series"):
            setattr(made, f"{event}Date", day)
            setattr(made, f"{event}Time", clock)
        made.ContributingEquipmentSequence = [*(made.get("ContributingEquipmentSequence") or []), self._equipment()]
        made.Columns, made.Rows = self.voxels.shape[:2]
        made.SamplesPerPixel = 1
        made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
        made.PixelRepresentation = int(self.stored == "int16")
        if made.get("PhotometricInterpretation") != "MONOCHROME1":
            made.PhotometricInterpretation = "MONOCHROME2"
        return made

    def _equipment(self) -> Any:
        from pydicom.dataset import Dataset

        equipment = Dataset()
        equipment.PurposeOfReferenceCodeSequence = [_code(EQUIPMENT)]
        equipment.Manufacturer = equipment.ManufacturerModelName = "deformmamba"
        equipment.SoftwareVersions = __version__
        equipment.ContributionDateTime = self.now.strftime("%Y%m%d%H%M%S")
        equipment.ContributionDescription = self.purpose
        return equipment

    def _window(self, group: Any) -> None:
        """A window over the whole range of a deviation, wherever the source has a window."""
        if group.get("WindowCenter") is not None or group.get("WindowWidth") is not None:
            group.WindowCenter, group.WindowWidth = _decimal(self.largest / 2), _decimal(max(self.largest, self.slope))
            _drop(group, ["WindowCenterWidthExplanation"])
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            for item in group.get(name) or ():
                for window in item.get("FrameVOILUTSequence") or ():
                    self._window(window)

    def _measures(self, group: Any) -> None:
        group.PixelSpacing = self.spacing
        for field in ("SliceThickness", "SpacingBetweenSlices"):
            if self.slices_moved and (before := number(group.get(field))):
                setattr(group, field, _decimal(before * self.thinner))

    def _transformation(self, group: Any) -> None:
        group.RescaleIntercept = "0"
        group.RescaleSlope = f"{self.slope:.10g}"
        group.RescaleType = group.get("RescaleType") or "US"  # unspecified, as before

    def _save(self, path: Path, made: Any) -> None:
        import pydicom

        with closed(path.open("xb")) as file, _encoding():
            pydicom.dcmwrite(file, made, enforce_file_format=True)


def _decimal(value: float) -> str:
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value) + 0.0)  # avoids -0


def _image_type(before: Any, second: str = "SECONDARY") -> list[str]:
    return ["DERIVED", second, *(list(before or [])[2:] or ["OTHER"])]


def _macro(group: Any, name: str) -> Any:
    """The one item of a functional group, created if missing."""
    from pydicom.dataset import Dataset

    if not group.get(name):
        setattr(group, name, [Dataset()])
    return group[name].value[0]


def _reference(dataset: Any) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    return item


def _evidence(dataset: Any) -> Any:
    """The image as part of its series and study."""
    from pydicom.dataset import Dataset

    series, study = Dataset(), Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = dataset.SeriesInstanceUID, [_reference(dataset)]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = dataset.StudyInstanceUID, [series]
    return study


def _code(code: tuple[str, str]) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    (item.CodeValue, item.CodeMeaning), item.CodingSchemeDesignator = code, "DCM"
    return item


def _drop(dataset: Any, names: Iterable[str]) -> None:
    for name in names:
        if name in dataset:
            del dataset[name]


def _drop_private(dataset: Any) -> None:
    """Removes private elements, in sequences too; `keys` and `get_item` leave all other elements undecoded."""
    for tag in list(dataset.keys()):
        if tag.is_private:
            del dataset[tag]
        elif dataset.get_item(tag).VR == "SQ":
            for item in dataset[tag].value:
                _drop(item, ["RealWorldValueMappingSequence"])
                _drop_private(item)


def _decode(dataset: Any) -> None:
    """Decodes raw elements of another byte order or without a type, so that they are encoded anew; drops failures."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
            for item in element.value if element.VR == "SQ" else ():
                _decode(item)
        except Exception:  # malformed bytes raise anything
            del dataset[tag]
