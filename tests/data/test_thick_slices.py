"""Training data for the slice direction: the content of a sample, which depends on its index only."""

import numpy as np
import pytest
import torch

from deformmamba.data.scans import Scan
from deformmamba.data.thick_slices import ThickSliceDataset, n_slices, robust_range, thick, thick_cases
from deformmamba.physics.slice_profile import SliceProfile
from deformmamba.volume import Volume, VolumeError, write_volume


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Scan]:
    """A volume of thick slices and an isotropic one."""
    folder = tmp_path_factory.mktemp("thick")
    rng = np.random.default_rng(0)
    found = []
    for name, shape, size in (("flat", (40, 44, 5), 4.0), ("cube", (40, 42, 36), 1.0)):
        array = 100 + 50 * rng.random(shape, np.float32)
        path = folder / f"{name}.nii.gz"
        write_volume(path, Volume(array, np.diag([1.0, 1.0, size, 1.0])))
        found.append(Scan(path, name, "train", name))
    return found


def made(scans: list[Scan], **settings: object) -> ThickSliceDataset:
    return ThickSliceDataset(scans, **{"patch": 32, "length": 20, "contrast": 1.2, "gain": 1.2, **settings})  # type: ignore[arg-type]


def test_samples_are_functions_of_their_index(scans: list[Scan]) -> None:
    first, second = made(scans), made(scans)
    for index in (0, 7, 19):
        a, b = first[index], second[index]
        assert torch.equal(a.lr, b.lr)
        assert torch.equal(a.hr, b.hr)
        assert (a.lr.shape, a.hr.shape, a.lr.dtype) == ((1, 32, 32), (1, 32, 32), torch.float32)
        assert first.describe(index) == second.describe(index)
    assert not torch.equal(first[0].hr, made(scans, seed=1)[0].hr)
    assert first.spacings == (1.0, 1.0)


def test_only_the_first_axis_is_coarse(scans: list[Scan]) -> None:
    """In white noise, neighbours across the slices become correlated; neighbours within a slice stay independent."""
    along, across = [], []
    for sample in (made(scans, ratio=[4.0, 4.0])[index] for index in range(20)):
        image = sample.lr[0] - sample.lr.mean()
        across.append(float((image[1:] * image[:-1]).mean() / image.square().mean()))
        along.append(float((image[:, 1:] * image[:, :-1]).mean() / image.square().mean()))
    assert np.mean(across) > 0.7
    assert abs(np.mean(along)) < 0.2


def test_isotropic_volumes_give_sections_too(scans: list[Scan]) -> None:
    groups = made(scans).groups
    assert [len(stacks) for stacks in groups["flat"]] == [1, 0]
    assert [len(stacks) for stacks in groups["cube"]] == [1, 2]


def test_thick_keeps_a_constant_and_a_smooth_curve() -> None:
    rows = torch.arange(60.0)
    image = torch.stack([torch.ones(60), torch.sin(rows / 12)], dim=1)
    got = thick(image, ratio=3.5, profile=SliceProfile("gaussian", 3.5), phase=1.2)
    torch.testing.assert_close(got[:, 0], image[:, 0], atol=1e-5, rtol=0)
    # the Gaussian of FWHM 3.5 rows attenuates this curve by 1 - exp(-(sigma / 12)^2 / 2) = 0.8 %; the ends are mirrored
    torch.testing.assert_close(got[8:-8, 1], image[8:-8, 1], atol=0.012, rtol=0)
    assert [n_slices(9, 4.0, phase) for phase in (0.0, 0.5, 1.5)] == [3, 2, 2]


@pytest.mark.parametrize("offset", [0.0, -500.0, 2000.0])
@pytest.mark.parametrize("gain", [0.01, 1.0, 300.0])
def test_the_range_follows_offset_and_gain_and_no_marker(offset: float, gain: float) -> None:
    rng = np.random.default_rng(3)
    array = np.where(rng.random(40_000) < 0.6, 0, rng.random(40_000)).astype(np.float32)
    low, high = robust_range(array)
    array[:50] = 30  # a marker
    marked = robust_range(gain * array + offset)
    assert marked[0] == pytest.approx(gain * low + offset, abs=1e-3 * gain)
    assert marked[1] == pytest.approx(gain * high + offset, rel=1e-3, abs=0.01 * gain)
    assert robust_range(np.full(9, 7.0)) == (7.0, 8.0)


def test_validation_cases_are_fixed(scans: list[Scan]) -> None:
    first, second = (thick_cases(scans, images=2) for _ in range(2))
    assert [case.place for case in first] == ["flat.nii.gz, slice 1", "flat.nii.gz, slice 3",
                                              "cube.nii.gz, slice 12", "cube.nii.gz, slice 23"]  # fmt: skip
    assert all(torch.equal(a.lr, b.lr) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"ratio": [0.5, 4.0]}, "ratio"), ({"thickness": [1.0]}, "thickness"), ({"boxcar": 2.0}, "boxcar"),
     ({"patch": 4}, "patch"), ({"gain": 0.5}, "gain")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(scans: list[Scan], settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(scans, **settings)


def test_images_smaller_than_a_patch_are_no_data(scans: list[Scan]) -> None:
    with pytest.raises(VolumeError, match="100x100"):
        made(scans, patch=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 7}, "ThickSliceDataset: patch is 7; wanted a number of 8 or more"),
        ({"boxcar": 1.5}, "ThickSliceDataset: boxcar is 1.5; wanted a number from 0 to 1"),
        ({"gain": np.inf}, "ThickSliceDataset: gain is inf"),
        ({"weights": {"flat": -1.0, "cube": 2.0}}, "ThickSliceDataset: the weight of flat is -1.0"),
        ({"weights": {"flat": np.nan}}, "ThickSliceDataset: the weight of flat is nan"),
        ({"weights": {"flat": 0.0, "cube": 0.0}}, "ThickSliceDataset: all weights are 0"),
        ({"weights": {"flat": 0.0, "other": 1.0}}, r"groups that have samples \(flat\) all have the weight 0"),
    ],
)
def test_numbers_and_weights_out_of_range_are_refused(
    scans: list[Scan], change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(scans, **change)
