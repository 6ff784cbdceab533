"""World coordinates of scans with unusual headers, compared with nibabel, SimpleITK and dcm2niix."""

import gzip
import io
import itertools
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tolerances import assert_close

from deformmamba.volume import ChoiceNeeded, Volume, VolumeError, read_volume, slice_axis, to_nibabel, write_volume
from deformmamba.volume.nifti import from_nibabel

CASES = Path(__file__).parents[1] / "cases"
NIBABELS = Path(nibabel.__file__).parent / "nicom" / "tests" / "data"
needs_dcm2niix = pytest.mark.skipif(not shutil.which("dcm2niix"), reason="dcm2niix is not installed")


def finer(volume: Volume, scale: int = 4) -> Volume:
    """Voxels repeated in-plane on the origin grid: voxel i becomes voxel scale * i."""
    array = volume.array.repeat(scale, 0).repeat(scale, 1)
    return volume.resampled(array, scale, (0, 1), "origin")


def corners(shape: tuple[int, ...]) -> np.ndarray:
    return np.array([[*index, 1.0] for index in itertools.product(*((0, n - 1) for n in shape))])


def itk_affine(path: Path) -> np.ndarray:
    """The RAS affine of the file as read by SimpleITK."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine


def rotated(angle: float, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


@pytest.mark.parametrize("codes", list(itertools.product((0, 1, 2, 4), repeat=2)))
@pytest.mark.parametrize("in_memory", [False, True])
def test_anatomy_stays_for_every_pair_of_codes(tmp_path: Path, codes: tuple[int, int], in_memory: bool) -> None:
    array = np.random.default_rng(0).integers(1, 900, (10, 12, 5)).astype(np.int16)
    image = nibabel.Nifti1Image(array, None)
    image.set_qform(rotated(-0.2, (1.5, 2, 4), (-1, -2, -3)), codes[0])
    image.set_sform(rotated(0.3, (1.5, 2, 4), (10, 20, 30)), codes[1])
    before, after = tmp_path / "before.nii", tmp_path / "after.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, None, image.header), before)
    loaded = nibabel.load(before)
    assert (int(loaded.header["qform_code"]), int(loaded.header["sform_code"])) == codes
    if in_memory:
        nibabel.save(to_nibabel(finer(from_nibabel(loaded)), nibabel.Nifti1Image), after)
    else:
        write_volume(after, finer(read_volume(before)))
    old = corners(array.shape)
    new = old * [4, 4, 1, 1]
    for affine_of in (lambda path: nibabel.load(path).affine, itk_affine):
        np.testing.assert_allclose(affine_of(after) @ new.T, affine_of(before) @ old.T, atol=2e-3)
    again = read_volume(after)
    assert again.codes == codes, "no left and right is claimed where the source claims none"
    # upscale a second time
    write_volume(before, finer(again, 2))
    assert read_volume(before).codes == codes
    for affine_of in (lambda path: nibabel.load(path).affine, itk_affine):
        np.testing.assert_allclose(affine_of(before) @ (new * [2, 2, 1, 1]).T, affine_of(after) @ new.T, atol=2e-3)


def test_a_single_slice_states_no_third_size(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5), np.float32), np.diag([3.0, 3, 5, 1])), tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").spacing == (3, 3, 5)
    assert not recwarn.list


def test_of_two_voxel_sizes_the_one_in_use_is_written(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), None)
    image.set_sform(np.diag([2.0, 2, 5, 1]), 2)
    image.header["pixdim"][1:4] = 1, 1, 3
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), None, image.header), path)
    with pytest.warns(UserWarning, match=r"two voxel sizes: 2 x 2 x 5 \(sform, used\) and 1 x 1 x 3 \(pixdim\)"):
        volume = read_volume(path)
    assert volume.spacing == (2, 2, 5)
    write_volume(tmp_path / "b.nii", finer(volume, 2))
    header = nibabel.load(tmp_path / "b.nii").header
    assert_close(header["pixdim"][1:4], (1, 1, 5))  # the qform's code is 0, so it must not set pixdim
    assert_close(header.get_sform(), np.diag([1, 1, 5, 1]))


def test_orientations_that_are_mirror_images_are_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, mirrored = tmp_path / "a.nii", np.diag([-2.0, 2, 5, 1])
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), np.diag([2.0, 2, 5, 1]))
    image.set_sform(rotated(0.3, (2, 2, 5), (1, 2, 3)), 4)
    for code in (0, 1):
        image.set_qform(mirrored, code)
        nibabel.save(image, path)
        notes = read_volume(path).notes
        assert [str(one.message) for one in recwarn] == [f"{path}: {note}" for note in notes]
        assert len(notes) == code
    assert "the qform show left as right" in notes[0]
    image.set_sform(None, 0)
    image.set_qform(None, 0)  # no orientation: the output has two, as different programs assume them
    nibabel.save(image, path)
    write_volume(tmp_path / "b.nii", read_volume(path))
    assert read_volume(tmp_path / "b.nii").notes == ()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("quatern_over1.nii", (20, 16, 5)), ("twod_pix0.nii", (20, 16, 1)), ("one_slice_pix0.nii", (20, 16, 1))],
)
def test_valid_files_that_strict_parsers_refuse(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    volume = read_volume(CASES / "nifti" / name)
    assert volume.array.shape == shape
    assert volume.spacing[:2] == (1.5, 1.5)
    assert slice_axis(volume) == 2
    np.testing.assert_allclose(volume.affine[0], [-1.5, 0, 0, 40], atol=1e-5)
    write_volume(tmp_path / "b.nii", finer(volume))
    np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").affine[:3, 3], volume.affine[:3, 3], atol=1e-4)


@pytest.mark.parametrize("scale", [1.0000004, 1.001, 1.3])
def test_a_quaternion_that_is_too_long_is_scaled_as_the_reference_does(tmp_path: Path, scale: float) -> None:
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), rotated(np.pi, (1, 1, 2), (3, 4, 5)))
    image.set_sform(None, 0)
    image.set_qform(rotated(np.pi, (1, 1, 2), (3, 4, 5)), 1)
    nibabel.save(image, tmp_path / "a.nii")
    data = bytearray((tmp_path / "a.nii").read_bytes())
    quaternion = np.frombuffer(bytes(data[256:268]), "<f4") * scale
    data[256:268] = quaternion.astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, image.affine, atol=1e-5)
    np.testing.assert_allclose(itk_affine(tmp_path / "a.nii"), image.affine, atol=1e-4)


def test_gzip_is_known_by_content_whatever_the_name(tmp_path: Path) -> None:
    packed, plain = (read_volume(CASES / "nifti" / name) for name in ("gz_named_nii.nii", "nii_named_gz.nii.gz"))
    assert packed.array.shape == plain.array.shape == (20, 16, 5)
    mgh = nibabel.MGHImage(np.ones((4, 5, 6), np.float32), np.eye(4))
    nibabel.save(mgh, tmp_path / "a.mgh")
    (tmp_path / "b.mgh").write_bytes(gzip.compress((tmp_path / "a.mgh").read_bytes()))
    shutil.copy(tmp_path / "a.mgh", tmp_path / "c.mgz")
    for name in ("b.mgh", "c.mgz"):
        assert read_volume(tmp_path / name).array.shape == (4, 5, 6)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(np.ones((4, 5, 6), np.float32), np.eye(4)), tmp_path / "pair.img")
    nibabel.save(nibabel.AnalyzeImage(np.ones((4, 5, 6), np.float32), np.eye(4)), tmp_path / "old.img")
    shutil.copy(tmp_path / "pair.hdr", tmp_path / "header.nii")
    shutil.copy(CASES / "nifti" / "gz_named_nii.nii", tmp_path / "scan.gz")
    dicom = (CASES / "dicom" / "rect_eq_thick" / "000.dcm").read_bytes()
    (tmp_path / "bare.dcm").write_bytes(dicom[132:])
    (tmp_path / "dicom.nii").write_bytes(dicom)
    for name, said in (
        ("pair.hdr", "pair .hdr and .img"),
        ("pair.img", "pair .hdr and .img"),
        ("old.hdr", "pair .hdr and .img"),
        ("header.nii", "the header of an .hdr and .img pair"),
        ("scan.gz", "a gzip file under an unknown name"),
        ("bare.dcm", "without the preamble"),
        ("dicom.nii", "a DICOM file with a NIfTI name"),
    ):
        with pytest.raises(VolumeError, match=said):
            read_volume(tmp_path / name)


def test_nan_around_the_head_becomes_zero_on_request() -> None:
    path = CASES / "nifti" / "nan_bg.nii.gz"
    with pytest.raises(VolumeError, match=r"are NaN or infinite; nan=\"zero\" \(--nan zero\) makes them 0"):
        read_volume(path)
    bad = ~np.isfinite(nibabel.load(path).get_fdata())
    with pytest.warns(UserWarning, match=f"{bad.sum()} of 1600 voxels were NaN"):
        volume = read_volume(path, nan="zero")
    assert (volume.array[bad] == 0).all()
    np.testing.assert_allclose(volume.array[~bad], nibabel.load(path).get_fdata()[~bad], rtol=1e-6)
    with pytest.raises(VolumeError, match='"refuse" or "zero"'):
        read_volume(path, nan="mean")  # type: ignore[arg-type]


def test_mgh_without_good_directions_has_no_left_and_right(tmp_path: Path) -> None:
    image = nibabel.MGHImage(np.ones((6, 5, 4), np.float32), rotated(0.2, (1, 1, 2), (3, 4, 5)))
    nibabel.save(image, tmp_path / "good.mgh")
    data = bytearray((tmp_path / "good.mgh").read_bytes())
    data[28:30] = bytes(2)  # goodRASFlag
    (tmp_path / "bad.mgh").write_bytes(data)
    data[30:90] = bytes(60)
    (tmp_path / "none.mgh").write_bytes(data)
    assert read_volume(tmp_path / "good.mgh").codes == (1, 1)
    for name in ("bad.mgh", "none.mgh"):
        volume = read_volume(tmp_path / name)
        assert volume.codes == (0, 0)
        write_volume(tmp_path / "b.nii", finer(volume))
        assert read_volume(tmp_path / "b.nii").codes == (0, 0)
        np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").affine[:3, 3], volume.affine[:3, 3], atol=1e-4)


# ------------------------------------------------------------------------------------------------- the axis of slices


def test_a_dicom_series_is_stacked_along_its_slices() -> None:
    volume = read_volume(CASES / "dicom" / "rect_eq_thick")
    assert volume.array.shape == (32, 24, 6)
    assert volume.spacing == pytest.approx((0.8, 1, 1))
    assert slice_axis(volume) == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nifti_says_its_slices_in_dim_info(tmp_path: Path, axis: int) -> None:
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), np.diag([1.0, 1, 5, 1]))
    image.header.set_dim_info(slice=axis)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert slice_axis(volume) == axis
    assert slice_axis(replace(volume, slices=None)) == 2
    assert slice_axis(finer(volume)) == axis


@pytest.mark.parametrize(("axis", "row_and_column"), [(2, (0, 1)), (1, (None, None))])
def test_a_volume_that_knows_its_slices_says_so_in_dim_info(
    tmp_path: Path, axis: int, row_and_column: tuple[int | None, int | None]
) -> None:
    image = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), np.diag([1.0, 1, 5, 1]))
    image.header.set_dim_info(0, 1, 2)
    image.header["slice_end"], image.header["slice_code"] = 3, 1
    nibabel.save(image, tmp_path / "a.nii")
    write_volume(tmp_path / "b.nii", replace(read_volume(tmp_path / "a.nii"), slices=axis))
    header = nibabel.load(tmp_path / "b.nii").header
    assert header.get_dim_info() == (*row_and_column, axis)
    assert header["slice_code"] == (1 if axis == 2 else 0)


def test_nifti_from_dicom_says_its_slices(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", read_volume(CASES / "dicom" / "rect_eq_thick"))
    assert nibabel.load(tmp_path / "a.nii.gz").header.get_dim_info() == (None, None, 2)


# ---------------------------------------------------------------------------------------------------- folders of DICOM


def test_files_of_a_series_do_not_vanish(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"2 of 6 files are empty or damaged \(004.dcm, 005.dcm\).*--partial"):
        read_volume(CASES / "dicom" / "zero_byte_tail")
    with pytest.warns(UserWarning, match=r"damaged files skipped: 004.dcm, 005.dcm"):
        assert read_volume(CASES / "dicom" / "zero_byte_tail", partial=True).array.shape[2] == 4
    whole = tmp_path / "series"
    shutil.copytree(CASES / "dicom" / "rect_eq_thick", whole)
    (whole / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"not DICOM images: notes.txt"):
        assert read_volume(whole).array.shape[2] == 6
    data = (whole / "005.dcm").read_bytes()
    for broken in (b"", data[:100], data[132:], data[:400], b"text\n" * 50):
        (whole / "005.dcm").write_bytes(broken)
        with pytest.raises(VolumeError, match=r"005.dcm"):
            read_volume(whole)
    (whole / "005.dcm").unlink()
    (whole / "IM0005").write_bytes(b"")
    with pytest.raises(VolumeError, match="IM0005"):
        read_volume(whole)


def test_the_stacks_of_a_localiser_are_listed_and_chosen() -> None:
    folder = CASES / "dicom" / "localiser"
    with pytest.raises(ChoiceNeeded, match=r"3 stacks; choose one with stack=K, from 0 \(0: 3 .* slices of 24x24; 1: "):
        read_volume(folder)
    with pytest.raises(ChoiceNeeded, match="no stack 3"):
        read_volume(folder, stack=3)
    normals = []
    for k in range(3):
        volume = read_volume(folder, stack=k)
        assert volume.array.shape == (24, 24, 3)
        assert volume.spacing == pytest.approx((2, 2, 10))
        normals.append(int(np.argmax(np.abs(volume.affine[:3, 2]))))
    assert sorted(normals) == [0, 1, 2]


def test_a_choice_names_an_option_only_where_there_is_one() -> None:
    with pytest.raises(ChoiceNeeded) as caught:
        read_volume(CASES / "dicom" / "localiser")
    assert "--stack K" in caught.value.for_command({"stack": None, "input": "x"})
    assert "--" not in caught.value.for_command({"input": "x"})


# ------------------------------------------------------------------------------------------------------------- mosaics


def by_dcm2niix(path: Path, out: Path) -> "nibabel.Nifti1Image":
    out.mkdir()
    subprocess.run(["dcm2niix", "-b", "n", "-z", "n", "-o", str(out), str(path)], check=True, capture_output=True)
    (made,) = out.glob("*.nii")
    return nibabel.load(made)


@needs_dcm2niix
@pytest.mark.parametrize("name", ["siemens_dwi_0", "siemens_dwi_1000"])
def test_a_siemens_mosaic_is_what_dcm2niix_makes_of_it(tmp_path: Path, name: str) -> None:
    source = NIBABELS / f"{name}.dcm.gz"
    if not source.is_file():
        pytest.skip("nibabel came without its DICOM test files")
    path = tmp_path / "in" / "mosaic.dcm"
    path.parent.mkdir()
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(gzip.decompress(source.read_bytes())))
    stored = np.random.default_rng(0).integers(1, 900, (dataset.Rows, dataset.Columns)).astype("<u2")
    dataset.PixelData = stored.tobytes()  # the test file has no pixels
    dataset.save_as(path)
    volume = read_volume(path)
    assert volume.array.shape == (128, 128, 48)
    other = by_dcm2niix(path.parent, tmp_path / "out")
    theirs = np.squeeze(np.asarray(other.dataobj))
    # dcm2niix reverses rows; voxels must be equal at equal world coordinates
    to_theirs = np.linalg.inv(other.affine) @ volume.affine
    index = np.random.default_rng(0).integers(0, volume.array.shape, (500, 3))
    there = (to_theirs @ np.c_[index, np.ones(500)].T)[:3].T
    np.testing.assert_allclose(there, there.round(), atol=0.02)
    np.testing.assert_array_equal(volume.array[tuple(index.T)], theirs[tuple(there.round().astype(int).T)])
    with pytest.raises(VolumeError, match="mosaic"):
        write_volume(tmp_path / "series", volume)


def test_a_mosaic_that_does_not_say_how_its_slices_lie_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"mosaic without the private header .*dcm2niix"):
        read_volume(CASES / "dicom" / "mosaic")
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(CASES / "dicom" / "mosaic" / "000.dcm")
    dataset.ImageType = ["DERIVED", "PRIMARY", "DIFFUSION", "MOSAIC"]
    dataset.save_as(tmp_path / "other.dcm")
    with pytest.raises(VolumeError, match="mosaic"):
        read_volume(tmp_path / "other.dcm")


# -------------------------------------------------------------------------------------------------------- other objects


@pytest.mark.parametrize(
    ("modality", "uid"),
    [
        ("SEG", "1.2.840.10008.5.1.4.1.1.66.4"),
        ("RTDOSE", "1.2.840.10008.5.1.4.1.1.481.2"),
        ("MR", "1.2.840.10008.5.1.4.1.1.30"),
    ],
)
def test_objects_with_pixels_that_are_no_scans_are_refused(tmp_path: Path, modality: str, uid: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(CASES / "dicom" / "rect_eq_thick" / "000.dcm")
    dataset.Modality, dataset.SOPClassUID, dataset.file_meta.MediaStorageSOPClassUID = modality, uid, uid
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(VolumeError, match=r"a DICOM object of another kind .*, not a scan"):
        read_volume(tmp_path / "a.dcm")


def test_a_ct_is_warned_of(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(CASES / "dicom" / "rect_eq_thick" / "000.dcm")
    dataset.Modality = "CT"
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.warns(UserWarning, match="a CT scan, and the weights are for MR"):
        read_volume(tmp_path / "a.dcm")


def test_eight_threads_leave_warnings_and_loggers_as_they_were(tmp_path: Path) -> None:
    import logging
    from concurrent.futures import ThreadPoolExecutor

    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]

    def state() -> list[object]:
        of_loggers = [(logger.disabled, logger.level, list(logger.filters)) for logger in loggers]
        return [list(warnings.filters), warnings.showwarning, of_loggers]

    before = state()
    paths = [CASES / "dicom" / "rect_eq_thick", CASES / "nifti" / "quatern_over1.nii", CASES / "nifti" / "missing.nii"]

    def read(k: int) -> None:
        try:
            read_volume(paths[k % 3])
        except VolumeError:
            assert k % 3 == 2

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(48)))
    assert state() == before
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("still heard", stacklevel=1)
    assert len(caught) == 1
    assert os.path.exists(tmp_path)


def test_a_short_description_of_a_volume() -> None:
    plain = Volume(np.zeros((64, 64, 20), np.int16), np.diag([3.76, 3.76, 5, 1]))
    assert repr(plain) == "Volume(64x64x20, 3.76x3.76x5 mm, RAS, int16)"
    for axes in (np.diag([-1.0, 1, -1, 1]), rotated(0.4, (1, -1, 2), (0, 0, 0)), rotated(1.5, (1, 1, 1), (0, 0, 0))):
        assert f", {''.join(nibabel.aff2axcodes(axes))}, " in repr(Volume(np.zeros((2, 3, 4), np.float32), axes))
    assert ", ?, " in repr(replace(plain, codes=(0, 0)))
