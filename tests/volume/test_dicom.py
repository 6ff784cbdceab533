"""DICOM: world coordinates agree with independent readers; the output is a new, correct and complete series."""

import gzip
import os
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_made import PATIENT, classic, enhanced, oblique, point, save
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from deformmamba.volume import Volume, VolumeError, check_output, read_volume, slice_axis, write_volume, writing
from deformmamba.volume.dicom_out import IMPLEMENTATION_UID, STALE

SHAPE = (7, 6, 5)
GRIDS = ("origin", "half-pixel")
# elements that upscaling does not change
KEPT = (
    *("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "StudyID", "AccessionNumber"),
    *("ReferringPhysicianName", "FrameOfReferenceUID", "Manufacturer", "ManufacturerModelName", "SoftwareVersions"),
    *("EchoTime", "RepetitionTime", "SliceThickness", "SpacingBetweenSlices", "SliceLocation", "WindowCenter"),
    *("WindowWidth", "SOPClassUID"),
)


def error_of(action: Callable[..., object], *arguments: object, **named: object) -> str:
    with pytest.raises(VolumeError) as caught:
        action(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    assert "SECRET" not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def source(tmp_path: Path, kind: str, seed: int = 0) -> tuple[Volume, list[Path]]:
    """A series: the volume that is read from it, and its files."""
    affine = oblique(seed)
    if kind == "enhanced":
        enhanced(tmp_path / "source.dcm", affine)
        return read_volume(tmp_path / "source.dcm"), [tmp_path / "source.dcm"]
    classic(tmp_path / "source", affine)
    return read_volume(tmp_path / "source"), sorted((tmp_path / "source").iterdir())


def finer(volume: Volume, scale: int = 4, grid: str = "origin", axes: tuple[int, ...] = (0, 1)) -> Volume:
    array = volume.array
    for axis in axes:
        array = array.repeat(scale, axis)
    noise = np.random.default_rng(5).uniform(0, 1, array.shape).astype(np.float32)
    return volume.resampled(array * np.float32(1.7) + noise, scale, axes, grid)


def headers(folder: Path) -> list[Any]:
    """Data sets in the order of their names."""
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def elements(ds: Dataset) -> list[Any]:
    return list(ds.iterall())


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("seed", range(4))
def test_a_classic_series_is_sorted_by_position(tmp_path: Path, seed: int) -> None:
    affine = oblique(seed)
    array = classic(tmp_path / "series", affine)
    (tmp_path / "series" / ".DS_Store").write_text("hidden")
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert "SECRET" not in repr(volume)
    sitk = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, volume.array)
    for index in ((0, 0, 0), (6, 0, 0), (0, 5, 0), (6, 5, 4)):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((-x, -y, z), point(volume.affine, *index), atol=1e-4)
    write_volume(tmp_path / "out.nii.gz", volume)
    again = nibabel.load(tmp_path / "out.nii.gz")
    assert (int(again.header["qform_code"]), int(again.header["sform_code"])) == (1, 1)
    np.testing.assert_allclose(again.affine, affine, atol=1e-4)
    assert b"SECRET" not in gzip.decompress((tmp_path / "out.nii.gz").read_bytes())


@pytest.mark.parametrize("seed", range(2))
def test_an_enhanced_image_is_sorted_by_position_with_a_slope_a_frame(tmp_path: Path, seed: int) -> None:
    array = enhanced(tmp_path / "a.dcm", oblique(seed))
    volume = read_volume(tmp_path / "a.dcm")
    np.testing.assert_allclose(volume.array, array, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, oblique(seed), atol=1e-5)
    (tmp_path / "folder").mkdir()
    shutil.move(tmp_path / "a.dcm", tmp_path / "folder" / "IM1")
    np.testing.assert_array_equal(read_volume(tmp_path / "folder").array, volume.array)


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
def test_echoes_are_volumes_of_one_series(tmp_path: Path, kind: str) -> None:
    path, make = tmp_path / "scan", classic if kind == "classic" else enhanced
    array = make(path, oblique(0), SHAPE, echoes=(90.0, 12.5, 30.0))
    for volume, echo in enumerate((1, 2, 0)):  # by echo time
        read = read_volume(path, volume=volume)
        np.testing.assert_allclose(read.array, array[..., echo], rtol=1e-6)
        np.testing.assert_allclose(read.affine, oblique(0), atol=1e-5)
    assert "3 volumes" in error_of(read_volume, path)
    assert "no volume 3" in error_of(read_volume, path, volume=3)
    write_volume(tmp_path / "out", finer(read_volume(path, volume=1)))
    assert read_volume(tmp_path / "out").array.shape == (28, 24, 5)


def test_time_points_are_volumes_too(tmp_path: Path) -> None:
    first = classic(tmp_path / "series", oblique(0))
    uid = headers(tmp_path / "series")[0].SeriesInstanceUID
    second = classic(tmp_path / "later", oblique(0), slope=3.0)
    for n, path in enumerate((tmp_path / "later").iterdir()):
        ds = pydicom.dcmread(path)
        ds.SeriesInstanceUID, ds.TemporalPositionIdentifier = uid, 2
        save(ds, tmp_path / "series" / f"later{n}")
    np.testing.assert_array_equal(read_volume(tmp_path / "series", volume=0).array, first)
    np.testing.assert_array_equal(read_volume(tmp_path / "series", volume=1).array, second)


def test_slices_may_differ_where_nothing_is_to_be_told_apart(tmp_path: Path) -> None:
    array = classic(tmp_path / "series", oblique(0))
    for n, path in enumerate(sorted((tmp_path / "series").iterdir())):
        ds = pydicom.dcmread(path)
        ds.EchoTime, ds.AcquisitionNumber, ds.TriggerTime = 90 + n / 10, n, 7 * n
        save(ds, path)
    np.testing.assert_array_equal(read_volume(tmp_path / "series").array, array)


def test_one_series_of_several_is_chosen(tmp_path: Path) -> None:
    arrays = [classic(tmp_path / "mixed", oblique(0), (7, 6, 5), number=11)]
    for path in (tmp_path / "mixed").iterdir():
        path.rename(path.with_name(f"eleven{path.name}"))
    arrays.insert(0, classic(tmp_path / "mixed", oblique(1), (4, 8, 3), number=2))
    said = error_of(read_volume, tmp_path / "mixed")
    assert "holds 2 DICOM series" in said
    assert "0: 3 files of 4x8, 1: 5 files of 7x6" in said
    for series, array in enumerate(arrays):
        np.testing.assert_array_equal(read_volume(tmp_path / "mixed", series=series).array, array)
    uid = str(pydicom.dcmread(tmp_path / "mixed" / "elevenIM0000").SeriesInstanceUID)
    np.testing.assert_array_equal(read_volume(tmp_path / "mixed", series=uid).array, arrays[1])
    assert "no series 2" in error_of(read_volume, tmp_path / "mixed", series=2)
    assert uid not in error_of(read_volume, tmp_path / "mixed", series=uid + "1")
    nibabel.save(nibabel.Nifti1Image(arrays[0], np.eye(4)), tmp_path / "a.nii")
    assert "a single file" in error_of(read_volume, tmp_path / "a.nii", series=0)


def test_a_single_file() -> None:
    path = get_testdata_file("MR_small.dcm", download=False)
    volume = read_volume(path)
    assert volume.array.shape == (64, 64, 1)
    assert volume.spacing == pytest.approx((0.3125, 0.3125, 0.8))
    assert slice_axis(volume) == 2
    np.testing.assert_array_equal(volume.array[:, :, 0], pydicom.dcmread(path).pixel_array.T)
    assert "no volume 1" in error_of(read_volume, path, volume=1)
    assert "no series 1" in error_of(read_volume, path, series=1)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("MR_small_implicit", None),
        ("MR_small_bigendian", None),
        ("MR_small_expb", None),
        ("MR_small_padded", None),
        ("MR_small_RLE", None),
        ("MR_small_jp2klossless", "openjpeg"),
        ("MR_small_jpeg_ls_lossless", "libjpeg"),
    ],
)
def test_other_transfer_syntaxes(tmp_path: Path, name: str, decoder: str | None) -> None:
    if decoder:
        pytest.importorskip(decoder)
    plain = read_volume(get_testdata_file("MR_small.dcm", download=False))
    volume = read_volume(get_testdata_file(f"{name}.dcm", download=False))
    np.testing.assert_array_equal(volume.array, plain.array)
    np.testing.assert_array_equal(volume.affine, plain.affine)
    out = finer(volume)
    write_volume(tmp_path / "out.dcm", out)
    again, made = read_volume(tmp_path / "out.dcm"), pydicom.dcmread(tmp_path / "out.dcm")
    np.testing.assert_allclose(again.array, out.array, atol=made.RescaleSlope / 1.99)
    before = pydicom.dcmread(get_testdata_file(f"{name}.dcm", download=False))
    for field in ("PatientName", "EchoTime", "StudyInstanceUID", "RepetitionTime", "ScanningSequence"):
        assert made[field].value == before[field].value, field


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_are_no_part_of_the_pixel(tmp_path: Path, signed: bool) -> None:
    array = classic(tmp_path / "series", oblique(0), (7, 6, 1), slope=1.0)[:, :, 0].astype(int)
    array -= 500 * signed
    path = next((tmp_path / "series").iterdir())
    ds = pydicom.dcmread(path)
    drawing = np.random.default_rng(0).integers(0, 16, array.shape) << 12
    ds.PixelData = ((array & 0xFFF) | drawing).T.astype("<u2").tobytes()
    ds.PixelRepresentation = int(signed)
    save(ds, path)
    np.testing.assert_array_equal(read_volume(path).array[:, :, 0], array)
    sitk = pytest.importorskip("SimpleITK")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].T, array)


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", property(lambda self: False))
    said = error_of(read_volume, get_testdata_file("MR_small_jp2klossless.dcm", download=False))
    assert "JPEG 2000" in said
    assert "pip install 'deformmamba[dicom]'" in said


def change(folder: Path, **fields: object) -> None:
    """Sets fields of the first file; None deletes."""
    path = sorted(folder.iterdir())[0]
    ds = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.save_as(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "2 DICOM series"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient"),
        ({"PixelSpacing": None}, "PixelSpacing"),
        ({"PixelSpacing": [1, 1]}, "pixel spacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "orientation"),
        ({"Rows": 4}, "image size"),
        ({"SamplesPerPixel": 3}, "colours"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colours"),
        ({"NumberOfFrames": 4}, "multi-frame"),
        ({"PixelData": b"\0" * 20}, "pixels cannot be decoded"),
        ({"PixelData": None}, "pixels cannot be decoded"),
        ({"RescaleSlope": "1e999"}, "NaN or infinite"),
        ({"BitsAllocated": 12}, "12 bits"),
    ],
)
def test_series_that_are_no_volume(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    classic(tmp_path / "series", oblique(0))
    change(tmp_path / "series", **fields)
    assert said in error_of(read_volume, tmp_path / "series")


def test_gaps_and_duplicates_are_seen(tmp_path: Path) -> None:
    classic(tmp_path / "series", oblique(0))
    positions = {p: pydicom.dcmread(p).ImagePositionPatient for p in (tmp_path / "series").iterdir()}
    normal = oblique(0)[:3, 2] * (-1, -1, 1)
    inner = sorted(positions, key=lambda p: normal @ np.array(positions[p], float))[2]
    shutil.copy(inner, tmp_path / "series" / "again")
    assert "have the same position" in error_of(read_volume, tmp_path / "series")
    for path in positions:
        shutil.copy(path, tmp_path / "series" / f"again{path.name}")
    (tmp_path / "series" / "again").unlink()
    assert "duplicated" in error_of(read_volume, tmp_path / "series")
    for path in positions:
        (tmp_path / "series" / f"again{path.name}").unlink()
    inner.unlink()
    assert "evenly spaced" in error_of(read_volume, tmp_path / "series")


def test_axes_that_are_not_perpendicular(tmp_path: Path) -> None:
    classic(tmp_path / "series", oblique(0), (7, 6, 1))
    change(tmp_path / "series", ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    assert "perpendicular" in error_of(read_volume, tmp_path / "series")
    change(tmp_path / "series", ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0, 1])
    assert "zero" in error_of(read_volume, tmp_path / "series")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), "4 of its 5 frames"),
        (lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence"), "a position for each frame"),
        (lambda ds: delattr(ds.SharedFunctionalGroupsSequence[0], "PixelMeasuresSequence"), "no PixelSpacing"),
        (lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[2], "PlanePositionSequence"), "ImagePositionPatient"),
        (lambda ds: delattr(ds, "SharedFunctionalGroupsSequence"), "has no ImageOrientationPatient"),
    ],
)
def test_enhanced_images_that_are_no_volume(tmp_path: Path, damage: Callable[[Dataset], object], said: str) -> None:
    enhanced(tmp_path / "a.dcm", oblique(0))
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    damage(ds)
    save(ds, tmp_path / "a.dcm")
    assert said in error_of(read_volume, tmp_path / "a.dcm")


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_written_and_read_is_the_same_volume(tmp_path: Path, kind: str, grid: str, seed: int) -> None:
    volume, _ = source(tmp_path, kind, seed)
    out = finer(volume, 4, grid)
    write_volume(tmp_path / "out", out)
    again = read_volume(tmp_path / "out")
    step = out.array.max() / 65535
    np.testing.assert_allclose(again.array, out.array, rtol=1e-6, atol=step / 2)
    np.testing.assert_allclose(again.affine, out.affine, atol=1e-6)
    assert len(list((tmp_path / "out").iterdir())) == (5 if kind == "classic" else 1)
    offset = 0 if grid == "origin" else 1.5
    for index in ((0, 0, 0), (6, 0, 0), (3, 5, 2), (6, 5, 4)):
        fine = (4 * index[0] + offset, 4 * index[1] + offset, index[2])
        np.testing.assert_allclose(point(again.affine, *fine), point(oblique(seed), *index), atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_an_independent_reader_finds_anatomy_where_it_was(tmp_path: Path, grid: str, seed: int) -> None:
    sitk = pytest.importorskip("SimpleITK")
    volume, _ = source(tmp_path, "classic", seed)
    out = finer(volume, 4, grid)
    write_volume(tmp_path / "out", out)

    def read(folder: Path) -> Any:
        reader = sitk.ImageSeriesReader()
        names = reader.GetGDCMSeriesFileNames(str(folder))
        reader.SetFileNames(names)
        return reader.Execute()

    before, after = read(tmp_path / "source"), read(tmp_path / "out")
    np.testing.assert_allclose(sitk.GetArrayFromImage(after).T, out.array, atol=out.array.max() / 65535)
    offset = 0.0 if grid == "origin" else 1.5
    for index in ((0.0, 0.0, 0.0), (6.0, 0.0, 0.0), (3.0, 5.0, 2.0), (6.0, 5.0, 4.0)):
        fine = (4 * index[0] + offset, 4 * index[1] + offset, index[2])
        np.testing.assert_allclose(
            after.TransformContinuousIndexToPhysicalPoint(fine),
            before.TransformContinuousIndexToPhysicalPoint(index),
            atol=1e-4,
        )


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(2))
def test_an_independent_reader_finds_it_in_an_enhanced_image(tmp_path: Path, grid: str, seed: int) -> None:
    sitk = pytest.importorskip("SimpleITK")
    volume, _ = source(tmp_path, "enhanced", seed)
    out = finer(volume, 4, grid)
    write_volume(tmp_path / "out.dcm", out)
    image = sitk.ReadImage(str(tmp_path / "out.dcm"))
    np.testing.assert_allclose(sitk.GetArrayFromImage(image).T, out.array, atol=out.array.max() / 65535)
    offset = 0.0 if grid == "origin" else 1.5
    for index in ((0.0, 0.0, 0.0), (6.0, 0.0, 0.0), (3.0, 5.0, 2.0), (6.0, 5.0, 4.0)):
        fine = (4 * index[0] + offset, 4 * index[1] + offset, index[2])
        x, y, z = image.TransformContinuousIndexToPhysicalPoint(fine)
        np.testing.assert_allclose((-x, -y, z), point(oblique(seed), *index), atol=1e-4)


def test_what_a_new_series_says_of_itself(tmp_path: Path) -> None:
    volume, files = source(tmp_path, "classic")
    before = {pydicom.dcmread(path).SOPInstanceUID: pydicom.dcmread(path) for path in files}
    bytes_before = [path.read_bytes() for path in files]
    write_volume(tmp_path / "out", finer(volume), derivation="ixi-4x, sha256 1234")
    assert [path.read_bytes() for path in files] == bytes_before
    made = headers(tmp_path / "out")
    assert len({ds.SOPInstanceUID for ds in made} | set(before)) == 10
    assert len({ds.SeriesInstanceUID for ds in made}) == 1
    for k, ds in enumerate(made):
        old = before[ds.SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert ds.SeriesInstanceUID != old.SeriesInstanceUID
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.file_meta.ImplementationClassUID == IMPLEMENTATION_UID
        assert (ds.InstanceNumber, ds.SeriesNumber, ds.SeriesDescription) == (k + 1, 1007, "T2 TSE tra SR")
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "M"]
        assert ds.DerivationDescription == "ixi-4x, sha256 1234"
        assert ds.ContributingEquipmentSequence[0].Manufacturer == "deformmamba"
        assert (ds.Rows, ds.Columns) == (24, 28)
        np.testing.assert_allclose(ds.PixelSpacing, [0.7 / 4, 0.9 / 4], rtol=1e-6)
        np.testing.assert_allclose(ds.ImagePositionPatient, old.ImagePositionPatient, atol=1e-6)
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (16, 16, 15, 0)
        assert ds.ContentDate != old.ContentDate
        for field in KEPT:
            assert ds[field].value == old[field].value, field
        assert not [element for element in elements(ds) if element.tag.is_private]
        assert not [element for element in elements(ds) if 0x6000 <= element.tag.group <= 0x60FF]
        assert not [name for name in STALE if name in ds]
    assert str(made[0].PatientName) == PATIENT


def test_what_a_new_enhanced_image_says_of_itself(tmp_path: Path) -> None:
    volume, files = source(tmp_path, "enhanced")
    old = pydicom.dcmread(files[0])
    write_volume(tmp_path / "out.dcm", finer(volume, 4, "half-pixel"), derivation="ixi-4x, sha256 1234")
    ds = pydicom.dcmread(tmp_path / "out.dcm")
    assert ds.NumberOfFrames == len(ds.PerFrameFunctionalGroupsSequence) == 5
    assert list(ds.ImageType) == ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    assert ds.SOPInstanceUID != old.SOPInstanceUID
    assert ds.PatientName == old.PatientName
    shared = ds.SharedFunctionalGroupsSequence[0]
    assert list(shared.MRImageFrameTypeSequence[0].FrameType)[:2] == ["DERIVED", "PRIMARY"]
    np.testing.assert_allclose(shared.PixelMeasuresSequence[0].PixelSpacing, [0.7 / 4, 0.9 / 4], rtol=1e-6)
    assert shared.MRTimingAndRelatedParametersSequence == (
        old.SharedFunctionalGroupsSequence[0].MRTimingAndRelatedParametersSequence
    )
    assert (
        len({group.PixelValueTransformationSequence[0].RescaleSlope for group in ds.PerFrameFunctionalGroupsSequence})
        == 1
    )
    for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
        assert group.FrameContentSequence[0].InStackPositionNumber == k + 1
        assert list(group.FrameContentSequence[0].DimensionIndexValues) == [1, k + 1, 1]
        derived = group.DerivationImageSequence[0]
        assert derived.DerivationDescription == "ixi-4x, sha256 1234"
        of = derived.SourceImageSequence[0].ReferencedFrameNumber
        assert old.PerFrameFunctionalGroupsSequence[of - 1].FrameContentSequence[0].InStackPositionNumber == k + 1
    assert not [element for element in elements(ds) if element.tag.is_private]


def test_values_beyond_the_source_and_below_zero(tmp_path: Path) -> None:
    volume, _ = source(tmp_path, "classic")
    for low, high in ((0, 1e6), (-700, 90), (0, 3e-4), (5, 5), (-3e5, -2e5)):
        array = np.linspace(low, high, 7 * 6 * 5, dtype=np.float32).reshape(SHAPE)
        write_volume(tmp_path / "out", volume.resampled(array, 1, (0, 1), "origin"))
        step = max(abs(low), abs(high)) / (65535 if low >= 0 else 32767)
        again = read_volume(tmp_path / "out")
        np.testing.assert_allclose(again.array, array, atol=step / 2 * 1.001, rtol=2e-7)
        if low == 0:
            assert again.array[0, 0, 0] == 0


def test_whole_numbers_when_asked_for(tmp_path: Path) -> None:
    volume, _ = source(tmp_path, "classic")
    write_volume(tmp_path / "out", volume, dtype="int16")
    ds = headers(tmp_path / "out")[0]
    assert (ds.RescaleSlope, ds.RescaleIntercept, ds.PixelRepresentation) == (1, 0, 1)
    np.testing.assert_array_equal(read_volume(tmp_path / "out").array, volume.array)
    too_bright = volume.resampled(volume.array * 100, 1, (0, 1), "origin")
    assert "do not fit uint16" in error_of(write_volume, tmp_path / "bright", too_bright, dtype="uint16")
    assert "not float32" in error_of(write_volume, tmp_path / "float", volume, dtype="float32")
    assert "NaN" in error_of(
        write_volume, tmp_path / "nan", Volume(np.full(SHAPE, np.nan), volume.affine, header=volume.header)
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
@pytest.mark.parametrize("grid", GRIDS)
def test_finer_slices(tmp_path: Path, kind: str, grid: str) -> None:
    volume, _ = source(tmp_path, kind)
    out = finer(volume, 2, grid, (1, 2))
    write_volume(tmp_path / "out", out)
    again = read_volume(tmp_path / "out")
    np.testing.assert_allclose(again.array, out.array, atol=out.array.max() / 65535)
    np.testing.assert_allclose(again.affine, out.affine, atol=1e-6)
    ds = headers(tmp_path / "out")[0]
    group = ds if kind == "classic" else ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (float(group.SliceThickness), float(group.SpacingBetweenSlices)) == pytest.approx((1.8, 2.0))
    assert "SliceLocation" not in ds


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_by_slice_is_the_same_series(tmp_path: Path, kind: str, axis: int) -> None:
    volume, _ = source(tmp_path, kind)
    out = finer(volume, 2)
    write_volume(tmp_path / "whole", out)
    place = volume.resampled(volume.array, 2, (0, 1), "origin")  # only its affine is used
    with writing(tmp_path / "sliced", place, out.array.shape, axis=axis) as write:
        for image in np.moveaxis(out.array, axis, 0):
            write(image)
        assert not (tmp_path / "sliced").exists()
    whole, sliced = read_volume(tmp_path / "whole"), read_volume(tmp_path / "sliced")
    np.testing.assert_array_equal(sliced.array, whole.array)
    np.testing.assert_array_equal(sliced.affine, whole.affine)
    assert {p.name for p in tmp_path.iterdir()} <= {"source", "source.dcm", "whole", "sliced"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis"),
    [("out.nii", 0), ("out.nii", 1), ("out.nii", 2), ("out.nii.gz", 2), ("out.mgz", 1), ("out", 0), ("out.dcm", 2)],
)
def test_memory_is_that_of_a_slice(tmp_path: Path, name: str, axis: int) -> None:
    volume, _ = source(tmp_path, "enhanced" if name == "out.dcm" else "classic")
    shape = (256, 256, 24)

    def write_all(shape: tuple[int, int, int]) -> None:
        ramp = np.zeros([n for a, n in enumerate(shape) if a != axis], np.float32)
        with writing(tmp_path / name, volume, shape, axis=axis) as write:
            for k in range(shape[axis]):
                write(ramp + k)

    write_all((4, 4, 4))  # first use loads modules
    tracemalloc.start()
    write_all(shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a slice across the last axis has 0.26 MB, and twice that while it is written; DICOM keeps a data set per slice
    assert peak < (3e6 if name == "out.dcm" else 1.6e6) < np.prod(shape) * 4


@pytest.mark.parametrize("kind", ["classic", "enhanced"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_folder_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    volume, _ = source(tmp_path, kind)
    write_volume(tmp_path / "out", volume)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    names = sorted(path.name for path in tmp_path.iterdir())
    pixels = "deformmamba.volume.dicom_out._Made.pixels"
    planes = iter(range(9))

    def half(made: object, k: int) -> bytes:
        if next(planes) == 3:
            raise error
        return bytes(2 * 7 * 6)

    monkeypatch.setattr(pixels, half)
    with pytest.raises(VolumeError if isinstance(error, OSError) else type(error)):
        write_volume(tmp_path / "out", volume)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    monkeypatch.undo()
    write_volume(tmp_path / "out", volume)  # the earlier output is replaced
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(before)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} != before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_targets_that_are_refused(tmp_path: Path) -> None:
    volume, files = source(tmp_path, "classic")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    (tmp_path / "copy").mkdir()
    shutil.copy(files[0], tmp_path / "copy")
    (tmp_path / "file").write_text("mine")
    write_volume(tmp_path / "ours", volume)
    (tmp_path / "ours" / "link.dcm").symlink_to(files[0])
    (tmp_path / "again").symlink_to(tmp_path / "source")
    plain = Volume(volume.array, volume.affine)
    for name, scan, said in (
        ("source", volume, "output folder is the input folder"),
        ("again", volume, "output folder is the input folder"),
        ("other", volume, "did not write"),
        ("copy", volume, "did not write"),
        ("ours", volume, "did not write"),
        ("file", volume, "is a file"),
        ("out.dcm", volume, "one file per slice"),
        ("out.png", volume, "as DICOM, to a folder"),
        ("no/such", volume, "no folder"),
        ("out", plain, "DICOM output needs DICOM input"),
        ("out.dcm", plain, "DICOM output needs DICOM input"),
        ("out.png", plain, ".mgz; choose"),
    ):
        for action in (lambda path, scan: check_output(path, source=scan), write_volume):
            assert said in error_of(action, tmp_path / name, scan), name
    single, files = source(tmp_path, "enhanced")
    assert "the output is the input file" in error_of(write_volume, files[0], single)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    check_output(tmp_path / "out.nii.gz", source=volume)
    check_output(tmp_path / "empty", source=volume)
    check_output(f"{tmp_path}/v1.2/", source=volume)


def test_an_empty_folder_and_a_link_are_written_to(tmp_path: Path) -> None:
    volume, _ = source(tmp_path, "classic")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_volume(tmp_path / "link", volume)
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "real").iterdir())) == 5
    write_volume(tmp_path / "déjà vu 中", volume)
    np.testing.assert_allclose(read_volume(tmp_path / "déjà vu 中").array, volume.array, atol=0.02)


def test_an_existing_folder_stays_and_its_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = source(tmp_path, "classic")
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2775)
    before = out.stat()
    monkeypatch.chdir(out)
    write_volume(".", finer(volume, 2, axes=(1, 2)))
    assert (len(list(out.iterdir())), Path.cwd()) == (10, out)
    left = out / f".{'0' * 8}-1-{'0' * 8}"  # of a process that was killed on another machine
    left.mkdir()
    write_volume(".", volume)
    left.rmdir()
    assert len(list(out.iterdir())) == 5
    np.testing.assert_allclose(read_volume(out).array, volume.array, atol=0.02)
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_only_the_folder_itself_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = source(tmp_path, "classic")
    for name in ("ours", "closed"):
        (tmp_path / name).mkdir()
    locked = {os.fspath(tmp_path), os.fspath(tmp_path / "closed")}
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) not in locked)
    check_output(tmp_path / "ours", source=volume)
    for name in ("closed", "new"):
        assert "no permission to write to the folder" in error_of(check_output, tmp_path / name, source=volume)


def test_a_file_of_another_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    volume, _ = source(tmp_path, "classic")
    write_volume(tmp_path / "out", finer(volume, 2, axes=(1, 2)))
    with writing(tmp_path / "out", volume, SHAPE) as write:
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        for k in range(SHAPE[2]):
            write(volume.array[:, :, k])
    assert len(list((tmp_path / "out").iterdir())) == 5 + 1
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_more_than_a_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, _ = source(tmp_path, "enhanced")
    monkeypatch.setattr("deformmamba.volume.dicom_out.LARGEST_ELEMENT", 7 * 6 * 5 * 2 - 2)
    assert "4 GB" in error_of(write_volume, tmp_path / "out.dcm", volume)
    assert not (tmp_path / "out.dcm").exists()


def errors_of_validator(path: Path) -> set[str]:
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60)
    return {line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian's dicom3tools) is not installed")
@pytest.mark.parametrize("axes", [(0, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore:.*this is a CT scan")
def test_a_validator_finds_nothing_new(tmp_path: Path, axes: tuple[int, ...]) -> None:
    for kind in ("classic", "enhanced"):
        volume, files = source(tmp_path, kind)
        before = errors_of_validator(files[0])
        assert before == set(), "the test's own series is valid"
        write_volume(tmp_path / kind, finer(volume, 2, "half-pixel", axes), derivation="ixi-4x")
        for path in sorted((tmp_path / kind).iterdir())[:2]:
            assert errors_of_validator(path) == set()
    for name in (
        "MR_small.dcm",
        "MR_small_implicit.dcm",
        "MR_small_bigendian.dcm",
        "examples_overlay.dcm",
        "CT_small.dcm",
    ):
        path = Path(get_testdata_file(name, download=False))
        write_volume(tmp_path / name, finer(read_volume(path), 2))
        assert errors_of_validator(tmp_path / name) <= errors_of_validator(path), name


@pytest.mark.parametrize(("value", "limit"), [(4090, None), (4000, 4095), (4095, 4090)])
def test_padding_becomes_the_lowest_value(tmp_path: Path, value: int, limit: int | None) -> None:
    array = classic(tmp_path / "series", oblique(0), slope=1)
    for path in (tmp_path / "series").iterdir():
        ds = pydicom.dcmread(path)
        pixels = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns).copy()
        pixels[:2] = 4090
        ds.PixelData = pixels.tobytes()
        ds.add_new(0x00280120, "US", value)
        if limit is not None:
            ds.add_new(0x00280121, "US", limit)
        ds.save_as(path)
    with pytest.warns(UserWarning, match=r"padding .* was set to the lowest value, .*: 70 voxels"):
        volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.array[:, 2:], array[:, 2:])
    assert np.all(volume.array[:, :2] == array[:, 2:].min())


def test_padding_as_dark_as_the_background_stays(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    array = classic(tmp_path / "series", oblique(0), slope=1)
    for path in (tmp_path / "series").iterdir():
        ds = pydicom.dcmread(path)
        ds.add_new(0x00280120, "US", int(array.min()))
        ds.save_as(path)
    np.testing.assert_array_equal(read_volume(tmp_path / "series").array, array)
    assert not recwarn.list
