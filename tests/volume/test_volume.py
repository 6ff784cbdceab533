"""Files: arrays and affines agree with independent readers, anatomy keeps its position, no file is half-written."""

import gzip
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_made import rotation
from tolerances import assert_close

from deformmamba.volume import (
    DTYPES,
    Volume,
    VolumeError,
    check_output,
    intensity_scale,
    normalise,
    read_volume,
    replacing,
    restore,
    slice_axis,
    upscaled_affine,
    write_volume,
    writing,
)


def oblique(seed: int, spacing: tuple[float, float, float] = (0.9, 0.7, 4.0)) -> np.ndarray:
    """An affine with a random orientation; every second seed mirrors."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) @ np.diag(spacing) * (-1) ** seed
    affine[:3, 3] = np.random.default_rng(seed + 100).normal(scale=80, size=3)
    return affine


def voxels(shape: tuple[int, ...] = (9, 8, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def patch(path: Path, **fields: list[float]) -> Path:
    """Writes raw header fields of an uncompressed NIfTI file; nibabel would correct invalid values."""
    places = {"pixdim": (76, "<f4"), "qform_code": (252, "<i2"), "sform_code": (254, "<i2"), "srow": (280, "<f4")}
    data = bytearray(path.read_bytes())
    for name, values in fields.items():
        start, dtype = places[name]
        new = np.array(values, dtype).tobytes()
        data[start : start + len(new)] = new
    path.write_bytes(data)
    return path


def world(affine: np.ndarray, *index: float) -> np.ndarray:
    return affine[:3, :3] @ index + affine[:3, 3]


def error_of(path: Path, **arguments: int) -> str:
    with pytest.raises(VolumeError) as caught:
        read_volume(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "SECRET" not in message
    assert caught.value.__cause__ is None  # a chained error of the parser would be printed too
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2), (2,)])
def test_a_point_of_anatomy_keeps_its_world_coordinate(seed: int, scale: int, axes: tuple[int, ...]) -> None:
    affine = oblique(seed)
    index = np.array([3.0, 5.0, 2.0])
    for grid, offset in (("origin", 0.0), ("half-pixel", (scale - 1) / 2)):
        fine = index.copy()
        fine[list(axes)] = scale * fine[list(axes)] + offset
        assert_close(world(upscaled_affine(affine, scale, axes, grid), *fine), world(affine, *index))


def test_half_pixel_keeps_the_outer_edges_and_origin_the_translation() -> None:
    affine, shape, scale = oblique(1), np.array([6, 7, 5]), 4
    half = upscaled_affine(affine, scale, (0, 1, 2), "half-pixel")
    assert_close(world(half, -0.5, -0.5, -0.5), world(affine, -0.5, -0.5, -0.5))
    assert_close(world(half, *(shape * scale - 0.5)), world(affine, *(shape - 0.5)))
    origin = upscaled_affine(affine, scale, (0, 1), "origin")
    np.testing.assert_array_equal(origin[:, 3], affine[:, 3])
    assert_close(np.linalg.norm(origin[:3, :3], axis=0), [0.9 / 4, 0.7 / 4, 4.0])


@pytest.mark.parametrize("grid", ["origin", "half-pixel"])
def test_a_fraction_undoes_a_scale(grid: str) -> None:
    affine = oblique(2)
    there = upscaled_affine(affine, 4, (0, 1), grid)
    assert_close(upscaled_affine(there, 1 / 4, (0, 1), grid), affine)


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(ValueError, match='"origin" or "half-pixel"'):
        upscaled_affine(np.eye(4), 2, (0,), "corner")


@pytest.mark.parametrize("grid", ["origin", "half-pixel"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz"])
def test_independent_readers_find_anatomy_where_it_was(tmp_path: Path, seed: int, suffix: str, grid: str) -> None:
    affine = oblique(seed)
    source = read_volume(save(tmp_path / "in.nii", voxels(), affine))
    scale, axes = 4, (0, 1)
    offset = 0 if grid == "origin" else (scale - 1) / 2
    sharp = source.resampled(source.array.repeat(4, 0).repeat(4, 1), scale, axes, grid)
    path = tmp_path / f"out{suffix}"
    write_volume(path, sharp)
    again = nibabel.load(path)
    for index in ((0, 0, 0), (8, 0, 0), (3, 5, 2), (8, 7, 4)):
        fine = (scale * index[0] + offset, scale * index[1] + offset, index[2])
        np.testing.assert_allclose(world(again.affine, *fine), world(affine, *index), atol=2e-4)
    if suffix == ".mgz":
        return
    np.testing.assert_allclose(again.get_qform(), again.get_sform(), atol=2e-4)
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    for index in ((0, 0, 0), (3, 5, 2), (8, 7, 4)):
        fine = (scale * index[0] + offset, scale * index[1] + offset, float(index[2]))
        x, y, z = image.TransformContinuousIndexToPhysicalPoint(fine)
        np.testing.assert_allclose((-x, -y, z), world(affine, *index), atol=2e-3)  # ITK is LPS+
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, sharp.array)


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((9, 8, 5), (1, 1, 5), 2),
        ((9, 8, 5), (1, 5, 1), 1),
        ((9, 8, 5), (5, 1, 1), 0),
        ((9, 8, 5), (1, 1, 1), 2),
        ((9, 8, 5), (1.004, 1, 1), 2),
        ((9, 8, 5), (2, 1, 2), 1),
        ((9, 8, 5), (4, 4, 1.2), 2),
        ((9, 8, 5), (1.2, 4, 4), 0),
        ((9, 8, 5), (3, 2, 1), 0),
        ((9, 8, 5), (1, 3, 2), 1),
        ((9, 8, 1), (1, 1, 0.5), 2),
        ((1, 8, 9), (0.5, 1, 1), 0),
        ((9, 1, 1), (1, 1, 1), 2),
    ],
)
def test_slices_lie_across_the_axis_that_differs(shape: tuple[int, ...], spacing: tuple[float, ...], axis: int) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(3) @ np.diag(spacing)
    assert slice_axis(Volume(voxels(shape), affine)) == axis


@pytest.mark.parametrize(
    ("affine", "said"),
    [
        (np.eye(3), "4x4"),
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1.0, 0, 1, 1]), "spacing is zero along axis 1"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
    ],
)
def test_a_volume_needs_a_geometry(affine: np.ndarray, said: str) -> None:
    with pytest.raises(VolumeError, match=said):
        Volume(voxels(), affine)


def test_a_volume_is_three_dimensional() -> None:
    for shape in ((4, 4), (4, 4, 4, 4), (0, 4, 4)):
        with pytest.raises(VolumeError, match="3-D"):
            Volume(np.zeros(shape), np.eye(4))


# ---------------------------------------------------------------------------------------------------------- intensity


def test_intensity_is_a_robust_maximum_of_what_is_not_zero() -> None:
    array = np.zeros((10, 10, 20))
    array[:, :, 10:] = np.linspace(1, 1000, 1000).reshape(10, 10, 10)
    assert intensity_scale(array) == pytest.approx(np.percentile(np.linspace(1, 1000, 1000), 99.9))
    assert intensity_scale(array, "max") == 1000
    assert intensity_scale(array, "p50") == pytest.approx(500.5)
    array[0, 0, 0] = np.nan
    array[0, 0, 1] = np.inf
    assert intensity_scale(array, "max") == 1000
    assert_close(restore(normalise(array, 7.0), 7.0), array)


@pytest.mark.parametrize(("array", "scale"), [(np.zeros(9), 1.0), (np.full(9, 5.0), 5.0), (np.full(9, -5.0), 5.0)])
def test_intensity_of_odd_volumes_is_positive(array: np.ndarray, scale: float) -> None:
    assert intensity_scale(array) == scale
    assert intensity_scale(np.zeros(0)) == 1.0


@pytest.mark.parametrize("rule", ["p", "pp", "p0", "p101", "mean", ""])
def test_unknown_intensity_rules_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=r"p99\.9"):
        intensity_scale(np.ones(3), rule)


# ---------------------------------------------------------------------------------------------------------- NIfTI, MGH


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_a_header_said_is_said_again(tmp_path: Path, suffix: str) -> None:
    image = nibabel.Nifti1Image(voxels(), oblique(0))
    image.set_qform(oblique(0), 1)
    image.set_sform(oblique(2), 4)  # another position, as after a registration
    image.header["descrip"] = b"a scanner's words"
    image.header["cal_max"] = 900
    image.header.set_intent("estimate", name="a map")
    image.header.set_dim_info(0, 1, 2)
    image.header["slice_end"], image.header["slice_code"] = 4, 1
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept"))
    path = tmp_path / f"scan{suffix}"
    nibabel.save(image, path)
    volume = read_volume(path)
    assert volume.codes == (1, 4)
    np.testing.assert_array_equal(volume.array, voxels())
    fine = volume.resampled(volume.array.repeat(2, 0).repeat(2, 1), 2, (0, 1), "origin")
    write_volume(path, fine)
    again = nibabel.load(path)
    assert (int(again.header["qform_code"]), int(again.header["sform_code"])) == (1, 4)
    np.testing.assert_allclose(again.get_qform(), upscaled_affine(oblique(0), 2, (0, 1), "origin"), atol=1e-4)
    np.testing.assert_allclose(again.get_sform(), upscaled_affine(oblique(2), 2, (0, 1), "origin"), atol=1e-4)
    assert again.header.get_xyzt_units() == ("mm", "sec")
    assert bytes(again.header["descrip"]).startswith(b"a scanner's words")
    assert again.header["cal_max"] == 900
    assert again.header.get_intent()[::2] == ("estimate", "a map")
    assert (again.header["slice_end"], again.header["slice_code"]) == (4, 1)
    assert again.header.extensions[0].get_content() == b"kept"
    np.testing.assert_allclose(again.header.get_zooms(), (0.45, 0.35, 4.0), rtol=1e-5)
    np.testing.assert_array_equal(again.get_fdata(), fine.array)


def test_the_order_of_slices_is_not_that_of_others(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), oblique(0))
    image.header.set_dim_info(0, 1, 2)
    image.header["slice_end"], image.header["slice_code"] = 4, 1
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    write_volume(tmp_path / "out.nii", volume.resampled(volume.array.repeat(2, 2), 2, (2,), "origin"))
    again = nibabel.load(tmp_path / "out.nii").header
    assert (again["slice_end"], again["slice_code"]) == (0, 0)


def test_a_file_without_a_place_gets_no_left_and_right(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii", voxels(), np.diag([2.0, 2, 5, 1])), qform_code=[0], sform_code=[0])
    volume = read_volume(path)
    assert volume.codes == (0, 0)
    assert volume.spacing == pytest.approx((2, 2, 5))
    write_volume(path, volume.resampled(volume.array.repeat(2, 0).repeat(2, 1), 2, (0, 1), "origin"))
    again = nibabel.load(path)
    assert_close(again.header.get_zooms(), (1, 1, 5))
    assert_close(again.affine[:3, 3], volume.affine[:3, 3])
    assert read_volume(path).codes == (0, 0), "no left and right, though the place is explicit now"


def test_slope_and_intercept_are_applied_once(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    path = tmp_path / "scaled.nii"
    image.to_filename(path)
    raw = nibabel.load(path).get_fdata()
    volume = read_volume(path)
    np.testing.assert_allclose(volume.array, raw, rtol=1e-6)
    write_volume(path, volume)
    np.testing.assert_array_equal(nibabel.load(path).get_fdata(), volume.array)


def test_an_integer_header_does_not_requantise(tmp_path: Path) -> None:
    path = save(tmp_path / "int16.nii", voxels())
    volume = read_volume(path)
    fractions = Volume(volume.array / np.float32(7), volume.affine, header=volume.header)
    write_volume(path, fractions)
    assert nibabel.load(path).get_data_dtype() == np.float32
    np.testing.assert_array_equal(nibabel.load(path).get_fdata(dtype=np.float32), fractions.array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chosen_type_is_rounded_not_rescaled(tmp_path: Path, dtype: str) -> None:
    array = np.array([0, 1.4, 1.6, 200], np.float32).reshape(2, 2, 1)
    path = tmp_path / "out.nii.gz"
    write_volume(path, Volume(array, np.eye(4)), dtype=dtype)
    image = nibabel.load(path)
    assert image.get_data_dtype() == np.dtype(dtype)
    assert image.header.get_slope_inter() in ((1.0, 0.0), (None, None))
    np.testing.assert_array_equal(image.get_fdata(), np.rint(array) if np.dtype(dtype).kind in "iu" else array)


def test_a_type_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.nii"
    for value, dtype in (
        (40000, "int16"),
        (-1, "uint16"),
        (255.6, "uint8"),
        (np.nan, "int16"),
        (np.nan, "float32"),
        (1e300, "float32"),
    ):
        with pytest.raises(VolumeError, match="do not fit"):
            write_volume(path, Volume(np.full((2, 2, 2), value), np.eye(4)), dtype=dtype)
    with pytest.raises(VolumeError, match="take the magnitude"):
        write_volume(path, Volume(np.full((2, 2, 2), 1j), np.eye(4)))
    with pytest.raises(VolumeError, match="at most 32767"):
        write_volume(path, Volume(np.ones((40000, 1, 1)), np.eye(4)))
    with pytest.raises(VolumeError, match="not as float16"):
        write_volume(path, Volume(voxels(), np.eye(4)), dtype="float16")
    with pytest.raises(VolumeError, match="not as float64"):
        write_volume(tmp_path / "out.mgz", Volume(voxels(), np.eye(4)), dtype="float64")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_big_endian_and_nifti2(tmp_path: Path, make: type) -> None:
    header = make.header_class(endianness=">")
    path = tmp_path / "big é 中.nii.gz"
    header.set_data_dtype(np.int16)
    nibabel.save(make(voxels(), oblique(1), header), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, voxels())
    write_volume(path, volume)
    assert isinstance(nibabel.load(path), make)
    np.testing.assert_array_equal(read_volume(path).array, voxels())


def test_other_units_of_length(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), np.diag([50.0, 50, 300, 1]))
    image.header.set_xyzt_units("micron")
    path = tmp_path / "micron.nii"
    nibabel.save(image, path)
    volume = read_volume(path)
    assert volume.spacing == pytest.approx((0.05, 0.05, 0.3))
    write_volume(path, volume)
    assert_close(nibabel.load(path).affine, image.affine)
    assert nibabel.load(path).header.get_xyzt_units()[0] == "micron"


# nibabel.load leaves an .mgh file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mgh_and_back(tmp_path: Path) -> None:
    affine = oblique(3)
    path = tmp_path / "scan.mgz"
    nibabel.save(nibabel.freesurfer.mghformat.MGHImage(voxels(), affine), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, voxels())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    for name in ("out.mgz", "out.mgh", "out.nii.gz"):
        write_volume(tmp_path / name, volume)
        again = nibabel.load(tmp_path / name)
        np.testing.assert_allclose(again.affine, affine, atol=1e-4)
        assert again.get_data_dtype().newbyteorder("=") == np.float32
        np.testing.assert_array_equal(again.get_fdata(), voxels())


def test_which_volume_of_several(tmp_path: Path) -> None:
    path = save(tmp_path / "four.nii.gz", voxels((6, 5, 4, 3)))
    for k in range(3):
        np.testing.assert_array_equal(read_volume(path, volume=k).array, voxels((6, 5, 4, 3))[..., k])
    assert "3 volumes" in error_of(path)
    assert "0 to 2" in error_of(path, volume=3)
    assert "no volume -1" in error_of(path, volume=-1)
    save(path, voxels((6, 5, 4, 1, 3)))
    np.testing.assert_array_equal(read_volume(path, volume=2).array, voxels((6, 5, 4, 1, 3))[..., 0, 2])
    save(path, voxels((6, 5, 4, 1)))
    assert read_volume(path).array.shape == (6, 5, 4)
    assert "no volume 1" in error_of(path, volume=1)
    save(path, voxels((6, 5, 4, 2, 3)))
    assert "at most 4" in error_of(path, volume=0)


def test_one_slice_is_a_volume(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "flat.nii", voxels((7, 6)))).array.shape == (7, 6, 1)


def test_reading_leaves_the_terminal_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "odd.nii", voxels())
    read_volume(patch(path, pixdim=[1, -1, 1, 1], qform_code=[99]))
    assert capfd.readouterr() == ("", "")


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """{kind of damage: (file, text that the message must contain)}."""
    good = save(folder / "good.nii", voxels())
    data = good.read_bytes()
    packed = gzip.compress(data)
    files: dict[str, tuple[Path, str]] = {}

    def add(name: str, content: bytes, said: str) -> None:
        path = folder / name
        path.write_bytes(content)
        files[name] = (path, said)

    flipped = bytearray(packed)
    flipped[len(flipped) // 2] ^= 255
    huge = bytearray(data)
    huge[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    add("text.nii.gz", b"these are no voxels\n" * 50, "not a NIfTI file")
    add("text.nii", b"these are no voxels\n" * 50, "not a NIfTI file")
    add("text.mgz", b"these are no voxels\n" * 50, "not a MGH file")
    add("empty.nii", b"", "not a NIfTI file")
    add("empty.nii.gz", b"", "not a NIfTI file")
    add("truncated.nii", data[:-40], "truncated")
    add("header.nii", data[:200], "not a NIfTI file")
    add("truncated.nii.gz", packed[:-100], "damaged")
    add("shorter.nii.gz", gzip.compress(data[:-40]), "truncated")
    add("flipped.nii.gz", bytes(flipped), "damaged")
    add("huge.nii.gz", gzip.compress(bytes(huge)), "truncated")
    add("scan.jpg", b"\xff\xd8\xff\xe0" + bytes(200), "not a scan that can be read")
    add("text.dcm", b"no DICOM", "not a scan that can be read")
    add("magic.dcm", bytes(128) + b"DICM" + b"\x02\x00rubbish" * 9, "DICOM")
    (folder / "folder").mkdir()
    files["folder"] = (folder / "folder", "no DICOM image")
    files["missing"] = (folder / "missing.nii", "no such file")
    files["link"] = (folder / "link.nii", "no such file")
    (folder / "link.nii").symlink_to(folder / "nowhere.nii")
    os.mkfifo(folder / "pipe.nii")
    files["pipe"] = (folder / "pipe.nii", "neither a file nor a folder")
    return files


def test_damaged_files_get_a_line_each(tmp_path: Path) -> None:
    files = broken(tmp_path)
    assert len(files) == 18
    for path, said in files.values():
        assert said in error_of(path), path


def test_contents_that_are_no_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nan = np.ones((4, 4, 4), np.float32)
    nan[1, 2, 3] = np.nan
    for array, said in (
        (np.ones((4, 4, 4), np.complex64), "complex"),
        (rgb, "colours"),
        (nan, "1 of 64 voxels are NaN"),
        (nan * np.inf, "NaN or infinite"),
        (np.full((4, 4, 4), 1e300), "largest voxel is 1e+300, beyond float32"),
        (np.full((4, 4, 4), 1e-300), "largest voxel is 1e-300, beyond float32"),
        (np.zeros((4, 4, 4), np.int16), "every voxel is zero"),
    ):
        assert said in error_of(save(path, array))


def test_geometry_that_is_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels())
    # nibabel would read a pixel size of 0 as 1
    assert "spacing" in error_of(patch(path, pixdim=[1, 0], qform_code=[1], sform_code=[0]))
    assert "spacing" in error_of(patch(path, pixdim=[1, np.nan], qform_code=[1], sform_code=[0]))
    patch(path, pixdim=[1, 1], qform_code=[0], sform_code=[1])
    assert "singular" in error_of(patch(path, srow=[1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0]))
    assert "zero along axis 0" in error_of(patch(path, srow=[0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0]))
    assert "finite" in error_of(patch(path, srow=[np.nan, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0]))


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    path = save(tmp_path / "out.nii.gz", voxels())
    before = path.read_bytes()

    volume = read_volume(path)
    planes = iter(range(volume.array.shape[2]))

    def half(array: np.ndarray, dtype: str) -> np.ndarray:
        if next(planes) == 3:
            raise error
        return array

    monkeypatch.setattr("deformmamba.volume.nifti.as_dtype", half)
    with pytest.raises(VolumeError if isinstance(error, OSError) else type(error)) as caught:
        write_volume(path, volume)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_by_slice_is_the_same_file(tmp_path: Path, suffix: str, axis: int) -> None:
    image = nibabel.Nifti1Image(voxels(), oblique(0), nibabel.Nifti1Header(endianness=">"))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept"))
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    (tmp_path / "out").mkdir()
    whole, sliced = tmp_path / "out" / f"whole{suffix}", tmp_path / "out" / f"sliced{suffix}"
    write_volume(whole, volume)
    with writing(sliced, volume, volume.array.shape, axis=axis) as write:
        for image_slice in np.moveaxis(volume.array, axis, 0):
            write(image_slice)
        assert not sliced.exists()
    assert sliced.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([whole.name, sliced.name])
    again = nibabel.load(sliced)
    np.testing.assert_array_equal(np.asarray(again.dataobj), voxels())
    np.testing.assert_allclose(again.affine, oblique(0), atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the model's"), OSError(2, "a file of the model")])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException, axis: int) -> None:
    path = save(tmp_path / "out.nii.gz", voxels())
    before, volume = path.read_bytes(), read_volume(path)

    def fail() -> None:
        with writing(path, volume, (9, 8, 5), axis=axis) as write:
            write(volume.array.take(0, axis))
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert [p.name for p in tmp_path.iterdir()] == ["out.nii.gz"]
    assert path.read_bytes() == before


def test_slices_that_do_not_make_the_volume(tmp_path: Path) -> None:
    volume = Volume(voxels(), np.eye(4))

    def write_some(n: int, size: tuple[int, int]) -> None:
        with writing(tmp_path / "a.nii", volume, (9, 8, 5)) as write:
            for _ in range(n):
                write(np.zeros(size, np.float32))

    for n, size, said in ((4, (9, 8), "only 4"), (6, (9, 8), "slice 5"), (5, (8, 9), "slice 0 has shape")):
        with pytest.raises(ValueError, match=said):
            write_some(n, size)
    for shape, axis in (((9, 8), 0), ((9, 8, 5), 3), ((9, 0, 5), 1)):
        with pytest.raises(ValueError, match="three sizes"), writing(tmp_path / "a.nii", volume, shape, axis=axis):
            pass
    assert not list(tmp_path.iterdir())


def test_a_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def write() -> None:
        with replacing(tmp_path / "a.nii") as temporary, open("/dev/full", "wb") as file:
            temporary.touch()
            file.write(bytes(1 << 20))

    with pytest.raises(VolumeError, match="No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    volume = Volume(voxels(), np.eye(4))
    (tmp_path / "dir.nii").mkdir()
    for name, said in (
        ("out.png", ".nii.gz"),
        ("out", ".nii.gz"),
        ("out.dcm", ".nii.gz"),
        ("dir.nii", "is a folder"),
        ("no/such/out.nii", "no folder"),
        ("x" * 300 + ".nii", "cannot be written"),
    ):
        with pytest.raises(VolumeError, match=said):
            write_volume(tmp_path / name, volume)
    assert [p.name for p in tmp_path.iterdir()] == ["dir.nii"]
    with pytest.raises(VolumeError, match=r"\.png"):
        check_output(tmp_path / "a.nii", (".png",))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.nii").symlink_to(tmp_path / "real" / "scan.nii")
    write_volume(tmp_path / "link.nii", Volume(voxels(), np.eye(4)))
    assert (tmp_path / "link.nii").is_symlink()
    np.testing.assert_array_equal(read_volume(tmp_path / "real" / "scan.nii").array, voxels())


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_volume(tmp_path / "a.nii", Volume(voxels(), np.eye(4)))
    assert (tmp_path / "a.nii").stat().st_mode == (tmp_path / "plain").stat().st_mode
