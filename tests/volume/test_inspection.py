"""Inspection of a scan: the acquired matrix is found if k-space has a border, and only then."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.data import get_testdata_file

from deformmamba.cli import main
from deformmamba.models import ZeroFill
from deformmamba.physics.kspace import fft2c, ifft2c, pad_spectrum
from deformmamba.volume import Volume, VolumeError, intensity_scale, read_volume
from deformmamba.volume.inspection import _filled, effective_matrix, inspect_volume, stated_matrix

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order() -> None:
    global rng
    rng = np.random.default_rng(0)


def anatomy(h: int, w: int, sigma: float = 5) -> np.ndarray:
    """(4, h, w), up to about 1,000: sharp ellipses, some across the edge of the field of view; texture and noise."""
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    out = np.zeros((4, h, w))
    for image in out:
        for cy, cx, a, b, turn, value in rng.uniform(
            [-0.7, -0.7, 0.1, 0.1, 0, 50], [0.7, 0.7, 0.6, 0.6, 3, 300], (12, 6)
        ):
            u, v = (y - cy) * np.cos(turn) + (x - cx) * np.sin(turn), (x - cx) * np.cos(turn) - (y - cy) * np.sin(turn)
            image += value * ((u / a) ** 2 + (v / b) ** 2 < 1)
    return out * rng.normal(1, 0.03, out.shape) + rng.normal(0, sigma, out.shape)


def measured(images: np.ndarray, size: tuple[int, int], taper: str = "none", sigma: float = 7) -> torch.Tensor:
    """`images` (n, h, w) with phase and noise, complex, zero-filled in k-space to `size`."""
    h, w = images.shape[1:]
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    phase = np.exp(1j * (1.5 * x * y + 2 * x**2 - y + 0.5 * np.sin(3 * x)))
    noise = rng.normal(0, sigma, (2, *images.shape))
    spectrum = fft2c(torch.from_numpy(images * phase + noise[0] + 1j * noise[1]))
    fy, fx = np.meshgrid((np.arange(h) - h // 2) / (h / 2), (np.arange(w) - w // 2) / (w / 2), indexing="ij")
    taps = {
        "none": np.ones((h, w)),
        "hann": (1 + np.cos(np.pi * fy)) * (1 + np.cos(np.pi * fx)) / 4,
        "hamming": (0.54 + 0.46 * np.cos(np.pi * fy)) * (0.54 + 0.46 * np.cos(np.pi * fx)),
        "fermi": 1 / (1 + np.exp((np.hypot(fy, fx) - 0.9) / 0.05)),
    }
    return ifft2c(pad_spectrum(spectrum * torch.from_numpy(taps[taper]), size))


# ------------------------------------------------------------------------------------------------- the filled matrix


@pytest.mark.parametrize("kind", ["complex", "magnitude", "int16", "real"])
@pytest.mark.parametrize("size", [(160, 120), (192, 144), (193, 145), (256, 192), (128, 192), (192, 96)])
def test_a_border_is_found_whatever_is_left_of_the_spectrum(size: tuple[int, int], kind: str) -> None:
    image = measured(anatomy(128, 96), size)
    given = {"complex": image, "magnitude": image.abs(), "int16": image.abs().round().short(), "real": image.real}[kind]
    found = effective_matrix(given)
    assert found == pytest.approx((128, 96), abs=3)
    assert all(n == full for n, full, whole in zip(found, size, (128, 96), strict=True) if full == whole)
    assert effective_matrix(given.numpy() * 1e-4) == pytest.approx(found, abs=2)  # in any unit


@pytest.mark.parametrize("taper", ["hann", "hamming", "fermi"])
@pytest.mark.parametrize("scale", [1.5, 2])
def test_a_faded_border_is_found_where_the_fading_ends(taper: str, scale: float) -> None:
    many = np.concatenate([anatomy(128, 96, sigma=1) for _ in range(4)])
    image = measured(many, (int(128 * scale), int(96 * scale)), taper, sigma=1).abs().round()
    h, w = effective_matrix(image)
    assert 0.75 * 128 <= h <= 1.02 * 128
    assert 0.75 * 96 <= w <= 1.02 * 96


def test_the_edge_of_the_field_does_not_hide_the_border() -> None:
    whole = measured(anatomy(128, 128), (256, 256)).abs()
    cut = whole[:, 40:220, 30:210]
    assert effective_matrix(cut) == pytest.approx((90, 90), rel=0.04)


def test_a_step_is_found_in_the_profile_of_an_interpolated_scan() -> None:
    """512 pixels of a scan with 256 in its header: one axis has a smooth step in a falling profile, the other none."""
    profiles = np.load(Path(__file__).parents[1] / "cases" / "siemens_interp_profile.npz")
    assert abs(_filled(profiles["axis1"]) - 256) <= 3
    assert _filled(profiles["axis0"]) == 512
    # the same for slices that have this spectrum
    phase = np.exp(2j * np.pi * rng.random((6, 512, 512)))
    slices = ifft2c(torch.from_numpy(np.sqrt(profiles["axis1"]) * phase)).real
    rows, columns = effective_matrix(slices)
    assert rows == 512
    assert abs(columns - 256) <= 4


def test_most_slices_decide_where_the_sum_hides_the_border() -> None:
    images = ifft2c(
        pad_spectrum(fft2c(torch.from_numpy(np.concatenate([anatomy(96, 96) for _ in range(3)]))), (128, 128))
    )
    images = images.abs()
    images[::5] = torch.from_numpy(np.random.default_rng(1).normal(0, 4000, (3, 128, 128))).abs()  # three bright ones
    assert _filled((fft2c(images).abs() ** 2).sum((0, 1)).numpy()) == 128, "the sum hides it"
    found = effective_matrix(images)
    assert all(abs(n - 96) <= 3 for n in found)


def test_a_stated_matrix_needs_less_evidence_and_is_named() -> None:
    dataset = dcmread(Path(__file__).parents[1] / "cases" / "dicom" / "rect_eq_thick" / "000.dcm")
    dataset.AcquisitionMatrix = [0, 16, 12, 0]
    volume = read_volume(Path(__file__).parents[1] / "cases" / "dicom" / "rect_eq_thick")
    header = replace(volume.header, datasets={Path("a"): dataset})
    stated = replace(volume, header=header)
    assert stated_matrix(stated, 2) == (16, 12)
    assert stated_matrix(volume, 2) == (None, None)
    assert any("acquisition matrix of 16 x 12" in remark for remark in inspect_volume(stated).remarks)


def test_partial_fourier_counts_by_its_larger_side() -> None:
    spectrum = fft2c(measured(anatomy(128, 96), (128, 96)))
    spectrum[:, :48] = 0
    assert effective_matrix(ifft2c(pad_spectrum(spectrum, (256, 96)))) == pytest.approx((128, 96), rel=0.02)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 48, 65), (2, 9, 12), (8, 33, 7), (5, 1, 1)])
def test_where_nothing_is_to_be_found_the_matrix_is_full(shape: tuple[int, int, int]) -> None:
    for _ in range(20):
        noise = rng.normal(size=shape)
        for images in (noise, np.abs(noise), noise.cumsum(1).cumsum(2), np.zeros(shape), np.ones(shape)):
            assert effective_matrix(images) == shape[1:]
    assert effective_matrix(anatomy(*shape[1:])) == shape[1:]


def test_a_bright_pixel_in_a_corner_is_no_border() -> None:
    images = anatomy(48, 52)
    images[:, 0, 0] = 1e9
    assert effective_matrix(images) == (48, 52)


def test_what_are_no_slices_is_refused() -> None:
    for shape in ((8, 8), (0, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(VolumeError, match=r"takes slices \(n, H, W\)"):
            effective_matrix(np.ones(shape))


@pytest.mark.slow
def test_real_volumes(real_data: Path) -> None:
    """Most are found to fill k-space; after zero-filling, the acquired matrix is found for all."""
    table = csv.DictReader((real_data / "volumes.tsv").read_text().splitlines(), delimiter="\t")
    rows = [row for row in table if row["split"] == "val"]
    full = 0
    for row in rows:
        slices = np.moveaxis(read_volume(real_data / row["file"]).array, -1, 0)[::4]
        h, w = slices.shape[1:]
        found = effective_matrix(slices)
        assert min(found[0] / h, found[1] / w) > 0.7
        full += found == (h, w)
        for scale in (1.25, 1.5, 2):
            zeros = measured(slices, (round(h * scale), round(w * scale))).abs().round()
            assert effective_matrix(zeros) == pytest.approx((h, w), rel=0.03)
    assert full >= 0.7 * len(rows) > 0


# --------------------------------------------------------------------------------------------------- the whole volume


def volume(images: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 4), **given: object) -> Volume:
    return Volume(np.moveaxis(images, 0, -1).astype(np.float32), np.diag([*spacing, 1.0]), **given)  # type: ignore[arg-type]


def test_an_interpolated_scan_is_told_its_true_resolution() -> None:
    scan = volume(measured(anatomy(96, 80), (192, 120)).abs().numpy(), (0.5, 0.6, 4))
    found = inspect_volume(scan)
    assert (found.axis, found.matrix, found.interpolated) == (2, (192, 120), True)
    assert found.effective == pytest.approx((96, 80), rel=0.03)
    assert found.resolution == pytest.approx((1.0, 0.9), rel=0.03)
    assert f"{found.effective[0]} of 192" in found.filling
    assert "not the 0.5 x 0.6 mm" in found.filling
    across = Volume(scan.array.transpose(2, 0, 1), np.diag([4, 0.5, 0.6, 1]))
    assert inspect_volume(across).effective == found.effective


def test_a_plain_scan(phantom: np.ndarray) -> None:
    turn = np.radians(20)
    affine = np.diag([-1.0, -1.0, 4.0, 1.0])
    affine[1:3, 1:3] = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ affine[1:3, 1:3]
    found = inspect_volume(Volume(phantom, affine))
    assert (found.orientation, found.matrix, found.effective) == ("LPS", (48, 40), (48, 40))
    assert found.tilt == pytest.approx(20)
    assert found.resolution == pytest.approx((1, 1))
    assert (found.lowest, found.highest, found.negative) == (phantom.min(), phantom.max(), 0)
    assert found.remarks == ()
    assert not found.interpolated
    assert "no border of a smaller measured matrix is visible" in found.filling


def test_what_it_remarks(phantom: np.ndarray) -> None:
    unknown = inspect_volume(Volume(phantom - 100, np.eye(4), codes=(0, 0)), axis=2)
    assert (unknown.orientation, unknown.tilt) == (None, None)
    assert unknown.negative == pytest.approx((phantom < 100).mean())
    assert ["negative" in unknown.remarks[0], "no patient orientation" in unknown.remarks[1]] == [True, True]
    with pytest.raises(VolumeError, match="axis is 3; it must be 0, 1 or 2"):
        inspect_volume(Volume(phantom, np.eye(4)), axis=3)
    with pytest.raises(VolumeError, match="complex, NaN or infinite"):
        inspect_volume(Volume(phantom + 1j, np.eye(4)))


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">u2", "u2", "f2", "longdouble"])
def test_arrays_of_any_type_are_inspected(phantom: np.ndarray, dtype: str) -> None:
    """MGH files are big-endian, and nibabel's arrays are as the file."""
    array = np.rint(phantom).astype(dtype)
    affine = np.diag([1.0, 1, 4, 1])
    assert inspect_volume(Volume(array, affine)) == inspect_volume(Volume(array.astype(np.float64), affine))
    image = measured(anatomy(64, 64), (128, 64)).abs().round().numpy()
    assert effective_matrix(image.astype(dtype)) == effective_matrix(image)
    assert effective_matrix(image.astype(">c8")) == effective_matrix(image)


@pytest.mark.parametrize("n_negative", [1, 30])
def test_few_negative_voxels_do_not_make_another_kind_of_image(phantom: np.ndarray, n_negative: int) -> None:
    """Interpolation makes some; `upscale` has the same limit."""
    array = phantom.copy()
    array.flat[:n_negative] = -1e-5
    found = inspect_volume(Volume(array, np.diag([1.0, 1, 4, 1])))
    assert found.negative == n_negative / array.size < 0.01
    assert found.remarks == ()


def test_a_phase_image_gets_a_remark() -> None:
    phase = np.random.default_rng(0).integers(0, 4096, (32, 32, 4)).astype(np.float32)
    found = inspect_volume(Volume(phase, np.diag([1.0, 1, 4, 1])))
    assert "not look like a magnitude image" in found.remarks[0]
    assert "as those of a phase image do" in found.remarks[0]


def test_what_it_says_about_a_model(phantom: np.ndarray) -> None:
    model = ZeroFill(scale=2)
    scan = Volume(phantom, np.diag([1.0, 1, 4, 1]))

    def said(**provenance: object) -> str:
        model.provenance = provenance
        return inspect_volume(scan, model=model).remarks[-1]

    assert "do not record" in said()
    for odd in ("1 mm", [], {"T2": 1}, [[1], 2], [None, 1], [0, 1], 3):
        assert "do not record" in said(spacings_mm=odd)
    assert "are among them" in said(spacings_mm=[0.8, 1.2])
    assert "are near that" in said(spacings_mm=[1.2, 1.4])
    assert "far from that" in said(spacings_mm=[2.0, 3.0])
    scan = replace(scan, codes=(0, 0))
    assert "of this file is of unknown origin" in said(spacings_mm=[0.8, 1.2])


# -------------------------------------------------------------------------------------------------------- the command


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.moveaxis(measured(anatomy(64, 64), (128, 64)).abs().round().numpy(), 0, -1)
    path = tmp_path / "scan é.nii.gz"
    nibabel.save(nibabel.Nifti1Image(images.astype(np.int16), np.diag([-1.0, 1, 4, 1])), path)
    ZeroFill(scale=2).save_pretrained(tmp_path / "z.safetensors", provenance={"spacings_mm": [0.5, 4.0]})
    assert main(["inspect", str(path), "--model", str(tmp_path / "z.safetensors")]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    for text in (
        "128 x 64 x 4 voxels of 1 x 1 x 4 mm",
        "axial; axis 0 towards the left",
        "Values from",
        f"divided by {intensity_scale(images):.5g}, the 99.9th percentile of the non-zero ones",
        "of 128",
        "are",
        "Published weights for upscale, best first",
        "Published weights for upscale after --effective, best first",
        "pixels of 1 x 1 mm are outside the trained 1.33",
        "pixels of 2 x 1 mm are outside the trained 1.33",
    ):
        assert text in said
    assert main(["inspect", str(path), "--json", "--axis", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"] == [128, 64, 4]
    assert found["effective"] == pytest.approx([64, 64], rel=0.04)
    assert len(found["weights"]) == len(found["weights_effective"]) > 1
    assert (found["interpolated"], found["not_a_scan"], found["notes"]) == (True, None, [])
    assert "given by --axis" in found["axis_from"]
    mask = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image((images > images.mean()).astype(np.uint8), np.diag([-1.0, 1, 4, 1])), mask)
    assert main(["inspect", str(mask), "--json"]) == 0
    assert "a mask" in json.loads(capsys.readouterr().out)["not_a_scan"]
    # the smaller pixel decides here: it is 1 mm with and without interpolation
    assert found["weights"][0]["distance"] == pytest.approx(found["weights_effective"][0]["distance"], rel=1e-6)


def test_weights_are_also_ranked_for_the_true_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 mm, interpolated from 4 mm: as read, it is outside the pixels of ixi-4x; after --effective, inside."""
    images = np.moveaxis(measured(anatomy(64, 64), (128, 128)).abs().round().numpy(), 0, -1)
    nibabel.save(nibabel.Nifti1Image(images.astype(np.int16), np.diag([-2.0, 2, 8, 1])), tmp_path / "a_T2w.nii")
    assert main(["inspect", str(tmp_path / "a_T2w.nii"), "--json", "--axis", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = ({fit["name"]: fit["distance"] for fit in found[key]} for key in ("weights", "weights_effective"))
    assert before["ixi-4x"] == pytest.approx(np.log(2.67 / 2), abs=0.01)
    assert after["ixi-4x"] == 0


def test_the_division_is_stated_for_models_that_need_it(phantom: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    nibabel.save(nibabel.Nifti1Image(phantom, np.diag([-1.0, 1, 4, 1])), tmp_path / "a.nii")
    ZeroFill(scale=2, intensity="max").save_pretrained(tmp_path / "z.safetensors")
    for model, said in (
        ([], False),
        (["--model", "ixi-4x"], False),
        (["--model", str(tmp_path / "z.safetensors")], True),
    ):
        assert main(["inspect", str(tmp_path / "a.nii"), *model]) == 0
        words = f"the model gets them divided by {phantom.max():.5g}, the largest of the non-zero ones"
        assert (words in capsys.readouterr().out) == said


def test_inspect_says_nothing_of_the_patient(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(get_testdata_file("MR_small.dcm", download=False))
    assert main(["inspect", path]) == 0
    assert main(["inspect", path, "--json"]) == 0
    said = "".join(capsys.readouterr())
    dataset = dcmread(path, stop_before_pixels=True)
    for field in ("PatientName", "PatientID", "StudyDate", "StudyInstanceUID"):
        assert str(dataset[field].value) not in said


def test_inspect_of_what_is_no_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.nii").write_bytes(b"no scan")
    assert main(["inspect", str(tmp_path / "x.nii")]) == 2
    said, errors = capsys.readouterr()
    assert (said, errors.count("\n")) == ("", 1)
