"""Assessment: zero-filling gains nothing over itself; large lesions are recovered, small ones not; false ones count."""

import json

import nibabel
import numpy as np
import pytest
import torch

from deformmamba.data.patches import Scan
from deformmamba.evaluation.assessment import (
    APART,
    _changes,
    _largest_nearby,
    _Lesion,
    assess,
    by_spacing,
    lesions,
    out_of_domain,
    turned,
)
from deformmamba.models import ZeroFill
from deformmamba.physics.kspace import degrade, zero_fill
from deformmamba.weights.cards import tables


def volume(contrast: float, size: tuple[int, int] = (96, 88)) -> np.ndarray:
    """(h, w, 3): an ellipse of tissue with smooth texture and some detail, in arbitrary units up to about 1,000."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    head = 1 / (1 + np.exp(40 * (np.hypot(y / 0.85, x / 0.8) - 1)))
    layers = [600 + contrast * np.cos(5 * x + k) * np.cos(4 * y) + 40 * np.cos(40 * x * y + k) for k in range(3)]
    return np.stack([head * layer for layer in layers], -1).astype(np.float32)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    made = []
    for name, group, contrast in (("a", "T2 brain", 150), ("b", "T2 brain", 100), ("c", "T1 brain", -150)):
        path = folder / f"{name}.nii"
        nibabel.save(nibabel.Nifti1Image(volume(contrast), np.diag([1, 1, 4, 1])), path)
        made.append(Scan(path, f"sub-{name}", "val", group))
    return made


def test_spacings_finer_than_the_data_or_too_coarse_to_show_anything_are_skipped(scans):
    model = ZeroFill(scale=2)
    model.provenance = {"spacings_mm": [2.0, 2.6]}
    rows = by_spacing(model, scans[:2], spacings=(0.5, 0.9, 1.0, 1.2, 1.5, 4.0))
    assert [row["truth_mm"] for row in rows] == [1.0, 1.2, 1.5]
    assert [row["input_mm"] for row in rows] == [2.0, 2.4, 3.0]
    assert [row["trained"] for row in rows] == [True, True, False]
    assert all(row["psnr_gain"] == row["ssim_gain"] == 0 for row in rows)  # zero-filling compared with itself
    assert all(row["subjects"] == 2 and row["slices"] == 6 for row in rows)


def test_a_coarser_truth_has_the_brightness_and_the_field_of_view_of_the_data(scans):
    fine, coarse = by_spacing(ZeroFill(scale=2), scans[:1], spacings=(1.0, 1.5))
    assert coarse["trained"] is None
    assert fine["psnr"] > 25
    assert coarse["psnr"] > 25


@pytest.mark.slow
def test_changes_hurt_or_do_not_as_they_should(scans):
    rows = out_of_domain(ZeroFill(scale=2), scans, groups=["T2 brain"])
    assert [row["case"] for row in rows if row["group"] == "T1 brain"] == ["other group"]
    by_case = {row["case"]: row for row in rows if row["group"] == "T2 brain"}
    assert len(by_case) == 1 + len(_changes(2))
    assert all(row["psnr_gain"] == 0 for row in rows)
    plain = by_case["unchanged"]["psnr"]
    assert by_case["in units 1,000 times as large"]["psnr"] == pytest.approx(plain, abs=1e-3)
    assert by_case["turned by 3 degrees"]["psnr"] == pytest.approx(plain, abs=3)
    assert plain > by_case["noise, SNR 30"]["psnr"] > by_case["noise, SNR 15"]["psnr"]
    assert out_of_domain(ZeroFill(scale=2), scans, groups=["T2 brain"]) == rows


def test_an_averaged_input_lies_where_the_model_expects_it():
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    smooth = 0.5 + 0.2 * torch.cos(2 * torch.pi * y / 48) + 0.2 * torch.sin(2 * torch.pi * x / 32)
    averaged = _changes(4)[-1][2](smooth, seed=0)
    assert (zero_fill(averaged, 4) - smooth).abs().max() < 0.02
    assert (zero_fill(degrade(smooth, 4), 4) - smooth).abs().max() < 1e-5


def test_turning_moves_a_blob_to_where_it_belongs_and_back():
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    blob = torch.exp(-((y + 12) ** 2 + (x - 5) ** 2) / 18)
    angle = torch.tensor(10.0).deg2rad()
    there = turned(blob, 10.0)
    centre = [float((there * axis).sum() / there.sum()) for axis in (y, x)]
    wanted = [float(-12 * angle.cos() + 5 * angle.sin()), float(12 * angle.sin() + 5 * angle.cos())]
    assert centre == pytest.approx(wanted, abs=0.05)
    assert (turned(there, -10.0) - blob).abs().max() < 1e-3
    assert there.sum() == pytest.approx(float(blob.sum()), rel=1e-3)


def test_a_lesion_is_as_large_as_it_says_and_the_detector_finds_it():
    lesion = _Lesion(6.0, (0.5, 0.5))
    assert float((lesion.profile > 0.5).sum()) * 0.25 == pytest.approx(np.pi * 9, rel=0.06)
    image = lesion.image([(40, 40)], (80, 80))
    contrast = lesion.contrast(image[None])[0]
    assert contrast[40, 40] == pytest.approx(1, abs=1e-5)
    assert contrast.argmax() == 40 * 80 + 40
    assert lesion.contrast(torch.full((1, 30, 30), 7.0)).abs().max() < 1e-4


def test_lesions_lie_within_tissue_and_apart():
    lesion = _Lesion(4.0, (1.0, 1.0))
    images = torch.zeros(1, 80, 80)
    images[:, 10:70, 10:70] = 1
    mask = lesion.tissue(images, 0.5)[0]
    found = lesion.places(mask, 3, np.random.default_rng(0))
    assert len(found) == 3
    reach = lesion.reach[0]
    assert all(images[0, y - reach + 1 : y + reach, x - reach + 1 : x + reach].all() for y, x in found)
    assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= APART for i, a in enumerate(found) for b in found[:i])
    assert lesion.places(torch.zeros(80, 80, dtype=torch.bool), 3, np.random.default_rng(0)) == []


class Inventor(ZeroFill):
    """Zero-filling that adds a bright spot of 4 mm, always at the same place."""

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        sr = super().forward(lr)
        return sr + 0.25 * _Lesion(4.0, (1.0, 1.0)).image([(48, 44)], sr.shape[-2:])


@pytest.mark.parametrize("size", [2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("spacing", [0.9, 0.94, 1.5])
def test_lesions_stay_within_an_image_that_is_all_tissue(size, spacing):
    lesion = _Lesion(size, (spacing, 1.2 * spacing))
    (mask,) = lesion.tissue(torch.ones(1, 40, 36), 0.5)
    assert mask.any()
    for y, x in mask.nonzero().tolist():
        assert lesion.image([(y, x)], (40, 36)).sum() == pytest.approx(float(lesion.profile.sum()), rel=1e-5)


@pytest.mark.slow
def test_large_lesions_come_through_and_small_ones_do_not(scans):
    rows = lesions(ZeroFill(scale=4), scans[:2], sizes=(2.0, 8.0), per_slice=2)
    assert [(row["size_mm"], row["kind"]) for row in rows] == [
        (2.0, "bright"), (2.0, "dark"), (8.0, "bright"), (8.0, "dark"),
    ]  # fmt: skip
    small, large = rows[0], rows[2]
    assert small["recovered"] < 0.3
    assert 0.75 < large["recovered"] < 1.15
    assert all(row["recovered"] == row["zero_fill_recovered"] for row in rows)
    assert all(row["lesions"] >= 6 for row in rows)
    assert lesions(ZeroFill(scale=4), scans[:2], sizes=(2.0, 8.0), per_slice=2) == rows


def test_what_a_model_invents_is_seen_and_does_not_count_as_recovered(scans):
    bright, dark = lesions(Inventor(scale=2), scans[:1], sizes=(4.0,), per_slice=2)
    assert bright["invented"] == pytest.approx(1, abs=0.3)
    assert bright["zero_fill_invented"] < 0.3
    assert dark["invented"] < 0.6  # caused by the dark ring around the spot
    assert bright["recovered"] == pytest.approx(bright["zero_fill_recovered"], abs=0.02)


def test_a_slight_displacement_is_no_invention():
    image = torch.zeros(1, 16, 16)
    image[0, 8, 8] = 1
    assert (torch.roll(image, (3, -3), (1, 2)) - _largest_nearby(image, 4)).max() <= 0
    assert (torch.roll(image, 4, 1) - _largest_nearby(image, 4)).max() == 1


@pytest.mark.slow
def test_the_whole_is_plain_and_readable(scans):
    found = assess(ZeroFill(scale=2), scans, groups=["T2 brain"], slices=1)
    assert list(found) == ["by_spacing", "out_of_domain", "lesions"]
    assert json.loads(json.dumps(found)) == found
    assert found["by_spacing"][0]["slices"] == 2  # one of each of two volumes; the T1 volume is out of domain
    text = tables(found)
    assert text.count("\n## ") == 3
    assert "| size mm | kind | lesions | recovered: network / zero-filling / bicubic |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(rows) + 2 for rows in found.values())


def test_scans_of_other_groups_alone_are_refused(scans):
    with pytest.raises(ValueError, match="none of the 3 scans belongs to PD knee"):
        assess(ZeroFill(scale=2), scans, groups=["PD knee"])
