"""DICOM series made for the tests: classic MR images and enhanced ones, complete enough for a validator."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

PATIENT = "SECRET^PATIENT"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation(seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q


def oblique(seed: int, spacing: tuple[float, float, float] = (0.9, 0.7, 4.0)) -> np.ndarray:
    """A random RAS+ affine. Slices advance along the cross product of rows and columns, as in DICOM's order."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) @ np.diag(spacing)
    affine[:3, 3] = np.random.default_rng(seed + 100).normal(scale=80, size=3)
    if np.linalg.det((LPS @ affine)[:3, :3]) < 0:
        affine[:3, 2] *= -1
    return affine


def voxels(shape: tuple[int, ...] = (7, 6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def point(affine: np.ndarray, *index: float) -> np.ndarray:
    return affine[:3, :3] @ index + affine[:3, 3]


def geometry(affine: np.ndarray) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """(PixelSpacing, ImageOrientationPatient, the spacing along the axes, the LPS+ affine)."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    orientation = [f"{value:.10f}" for value in (*direction[:, 0], *direction[:, 1])]
    return [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"], orientation, spacing, lps


def image(sop_class: str, series: str, study: str, frame: str) -> FileDataset:
    """The elements that all images here share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, frame
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = PATIENT, "SECRET-ID", "19700101", "O"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200102", "101112", "SECRET-STUDY", "SECRET-ACC"
    ds.ReferringPhysicianName, ds.PositionReferenceIndicator, ds.Laterality = "SECRET^DOCTOR", "", "L"
    ds.ContentDate, ds.ContentTime, ds.SeriesNumber, ds.SeriesDescription = "20200102", "101500", 7, "T2 TSE tra"
    ds.Modality, ds.Manufacturer, ds.PatientPosition = "MR", "Scanners Inc.", "HFS"
    ds.ManufacturerModelName, ds.DeviceSerialNumber, ds.SoftwareVersions = "Big One", "123", "1.0"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    private = ds.private_block(0x0029, "SCANNERS HEADER", create=True)
    private.add_new(0x10, "LO", "SECRET PRIVATE")
    return ds


def save(ds: FileDataset, path: Path) -> None:
    ds.save_as(path, enforce_file_format=True)


def classic(
    folder: Path,
    affine: np.ndarray,
    shape: tuple[int, int, int] = (7, 6, 5),
    *,
    echoes: tuple[float, ...] = (90.0,),
    slope: float = 2.0,
    number: int = 7,
) -> np.ndarray:
    """Writes a classic MR series of (columns, rows, slices) with the RAS+ `affine`, under shuffled file names.

    Returns its voxels, with a fourth axis if there are several echoes.
    """
    folder.mkdir(exist_ok=True)
    array = voxels((*shape, len(echoes)))
    pixel_spacing, orientation, spacing, lps = geometry(affine)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    places = np.random.default_rng(1).permutation(shape[2] * len(echoes))
    for n, place in enumerate(places):
        k, echo = divmod(n, len(echoes))
        ds = image(MRImageStorage, series, study, frame)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
        ds.SeriesNumber, ds.AcquisitionNumber = number, 1
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "SE", "SK", "", "2D"
        ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength, ds.EchoNumbers = echoes[echo], 4000, 9, echo + 1
        ds.Columns, ds.Rows = shape[:2]
        ds.PixelSpacing, ds.SliceThickness = pixel_spacing, f"{spacing[2] * 0.9:.8g}"
        ds.SpacingBetweenSlices, ds.SliceLocation = f"{spacing[2]:.8g}", f"{k * spacing[2]:.8g}"
        ds.ImageOrientationPatient = orientation
        ds.ImagePositionPatient = [f"{value:.8f}" for value in point(lps, 0, 0, k)]
        ds.InstanceNumber = int(place) + 1
        ds.WindowCenter, ds.WindowWidth = "500", "1000"
        ds.SmallestImagePixelValue, ds.LargestImagePixelValue = 1, 1000
        if slope != 1:
            ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = str(slope), "-1", "US"
        for element, vr, value in (
            (0x0010, "US", shape[1]),
            (0x0011, "US", shape[0]),
            (0x0040, "CS", "G"),
            (0x0050, "SS", [1, 1]),
            (0x0100, "US", 1),
            (0x0102, "US", 0),
            (0x3000, "OW", bytes((shape[0] * shape[1] + 15) // 16 * 2)),
        ):
            ds.add_new(0x60000000 + element, vr, value)
        ds.PixelData = array[:, :, k, echo].T.astype("<u2").tobytes()
        save(ds, folder / f"IM{place:04d}")
    scaled = array * slope - (1 if slope != 1 else 0)
    return scaled if len(echoes) > 1 else scaled[..., 0]


def item(**fields: object) -> Dataset:
    ds = Dataset()
    for name, value in fields.items():
        setattr(ds, name, value)
    return ds


def enhanced(
    path: Path, affine: np.ndarray, shape: tuple[int, int, int] = (7, 6, 5), *, echoes: tuple[float, ...] = (90.0,)
) -> np.ndarray:
    """Writes an enhanced MR image with shuffled frames and one slope per frame. Returns its voxels, like `classic`."""
    array = voxels((*shape, len(echoes)))
    pixel_spacing, orientation, spacing, lps = geometry(affine)
    ds = image(EnhancedMRImageStorage, generate_uid(), generate_uid(), generate_uid())
    del ds.Laterality  # it is in the frames
    n_frames = shape[2] * len(echoes)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    ds.InstanceNumber, ds.AcquisitionDateTime, ds.AcquisitionNumber = 1, "20200102101112", 1
    ds.ContentQualification, ds.ImageComments, ds.BurnedInAnnotation = "RESEARCH", "", "NO"
    ds.LossyImageCompression, ds.PresentationLUTShape = "00", "IDENTITY"
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "VOLUME", "NONE"
    ds.ComplexImageComponent, ds.AcquisitionContrast = "MAGNITUDE", "T2"
    ds.MagneticFieldStrength, ds.ResonantNucleus, ds.KSpaceFiltering = 3.0, "1H", "NONE"
    ds.ApplicableSafetyStandardAgency, ds.AcquisitionContextSequence = "IEC", []
    ds.PulseSequenceName, ds.MRAcquisitionType, ds.EchoPulseSequence = "tse", "2D", "SPIN"
    ds.AcquisitionDuration, ds.MultipleSpinEcho, ds.MultiPlanarExcitation, ds.PhaseContrast = 60.0, "YES", "NO", "NO"
    ds.TimeOfFlightContrast, ds.SteadyStatePulseSequence, ds.EchoPlanarPulseSequence = "NO", "NONE", "NO"
    ds.SaturationRecovery, ds.SpectrallySelectedSuppression, ds.OversamplingPhase = "NO", "NONE", "NONE"
    ds.GeometryOfKSpaceTraversal, ds.SegmentedKSpaceTraversal, ds.NumberOfKSpaceTrajectories = "RECTILINEAR", "FULL", 1
    ds.RectilinearPhaseEncodeReordering = "LINEAR"
    organization = generate_uid()
    ds.DimensionOrganizationSequence = [item(DimensionOrganizationUID=organization)]
    ds.DimensionIndexSequence = [
        item(DimensionOrganizationUID=organization, DimensionIndexPointer=pointer, FunctionalGroupPointer=group)
        for pointer, group in ((0x00209056, 0x00209111), (0x00209057, 0x00209111), (0x00189082, 0x00189114))
    ]
    ds.NumberOfFrames = n_frames
    ds.Columns, ds.Rows = shape[:2]
    ds.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[
                item(
                    PixelSpacing=pixel_spacing,
                    SliceThickness=f"{spacing[2] * 0.9:.8g}",
                    SpacingBetweenSlices=f"{spacing[2]:.8g}",
                )
            ],
            PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
            MRImageFrameTypeSequence=[
                item(
                    FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
                    PixelPresentation="MONOCHROME",
                    VolumetricProperties="VOLUME",
                    VolumeBasedCalculationTechnique="NONE",
                    ComplexImageComponent="MAGNITUDE",
                    AcquisitionContrast="T2",
                )
            ],
            FrameVOILUTSequence=[item(WindowCenter="500", WindowWidth="1000")],
            FrameAnatomySequence=[
                item(
                    FrameLaterality="U",
                    AnatomicRegionSequence=[
                        item(CodeValue="12738006", CodingSchemeDesignator="SCT", CodeMeaning="Brain")
                    ],
                )
            ],
            MRTimingAndRelatedParametersSequence=[
                item(
                    RepetitionTime="4000",
                    FlipAngle="90",
                    EchoTrainLength=9,
                    RFEchoTrainLength=9,
                    GradientEchoTrainLength=0,
                    GradientOutput=10.0,
                    GradientOutputType="DB_DT",
                    SpecificAbsorptionRateSequence=[
                        item(SpecificAbsorptionRateDefinition="IEC_HEAD", SpecificAbsorptionRateValue=1.0)
                    ],
                    OperatingModeSequence=[item(OperatingModeType="STATIC FIELD", OperatingMode="IEC_NORMAL")],
                )
            ],
            MRModifierSequence=[
                item(
                    InversionRecovery="NO",
                    FlowCompensation="NONE",
                    Spoiling="NONE",
                    T2Preparation="NO",
                    SpectrallySelectedExcitation="NONE",
                    SpatialPresaturation="NONE",
                    PartialFourier="NO",
                    ParallelAcquisition="NO",
                )
            ],
            MRImagingModifierSequence=[
                item(
                    MagnetizationTransfer="NONE",
                    BloodSignalNulling="NO",
                    Tagging="NONE",
                    TransmitterFrequency=123.2,
                    PixelBandwidth="200",
                )
            ],
            MRReceiveCoilSequence=[
                item(
                    ReceiveCoilName="head",
                    ReceiveCoilManufacturerName="",
                    ReceiveCoilType="VOLUME",
                    QuadratureReceiveCoil="NO",
                )
            ],
            MRTransmitCoilSequence=[
                item(TransmitCoilName="body", TransmitCoilManufacturerName="", TransmitCoilType="BODY")
            ],
            MRAveragesSequence=[item(NumberOfAverages="1")],
            MRFOVGeometrySequence=[
                item(
                    InPlanePhaseEncodingDirection="ROW",
                    MRAcquisitionFrequencyEncodingSteps=shape[0],
                    MRAcquisitionPhaseEncodingStepsInPlane=shape[1],
                    PercentSampling="100",
                    PercentPhaseFieldOfView="100",
                )
            ],
        )
    ]
    groups, pixels, values = [], [], np.empty(array.shape)
    for n in np.random.default_rng(2).permutation(n_frames):
        k, echo = divmod(int(n), len(echoes))
        slope, intercept = 1 + k / 4, -k
        values[:, :, k, echo] = array[:, :, k, echo] * slope + intercept
        group = item(
            FrameContentSequence=[
                item(
                    StackID="1",
                    InStackPositionNumber=k + 1,
                    DimensionIndexValues=[1, k + 1, echo + 1],
                    FrameAcquisitionNumber=1,
                    FrameReferenceDateTime="20200102101112",
                    FrameAcquisitionDateTime="20200102101112",
                    FrameAcquisitionDuration=1.0,
                )
            ],
            PlanePositionSequence=[item(ImagePositionPatient=[f"{value:.8f}" for value in point(lps, 0, 0, k)])],
            MREchoSequence=[item(EffectiveEchoTime=echoes[echo])],
            PixelValueTransformationSequence=[
                item(RescaleIntercept=str(intercept), RescaleSlope=str(slope), RescaleType="US")
            ],
        )
        group.private_block(0x0029, "SCANNERS HEADER", create=True).add_new(0x11, "LO", "SECRET PRIVATE")
        groups.append(group)
        pixels.append(array[:, :, k, echo].T.astype("<u2").tobytes())
    ds.PerFrameFunctionalGroupsSequence = groups
    ds.PixelData = b"".join(pixels)
    save(ds, path)
    return values if len(echoes) > 1 else values[..., 0]
