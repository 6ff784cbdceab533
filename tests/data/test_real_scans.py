"""Samples with bright markers, masked backgrounds and cut fields of view."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.data.patches import PatchDataset
from deformmamba.data.scans import Scan
from deformmamba.models.normalise import slice_range
from deformmamba.models.skip import BASES

SCALE = 2


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    y, x, z = np.meshgrid(np.linspace(-1, 1, 256), np.linspace(-1, 1, 224), np.arange(3), indexing="ij")
    head = np.hypot(y, x) < 0.8
    image = (1 + 0.3 * np.cos(29 * x + z) * np.cos(27 * y)) * head
    path = tmp_path_factory.mktemp("scan") / "a.nii"
    nibabel.save(nibabel.Nifti1Image((100 * image).astype(np.float32), np.diag([1, 1, 3, 1])), path)
    return Scan(Path(path), "a", "train", "T2")


def samples(scan: Scan, **options: object) -> PatchDataset:
    return PatchDataset([scan], scale=SCALE, patch=48, length=12, **options)  # type: ignore[arg-type]


def test_norm_is_that_of_the_whole_slice(scan: Scan) -> None:
    whole = samples(scan, flips=False)
    norms = {tuple(sample.norm[0].tolist()) for sample in whole}
    assert len(norms) == 3  # one per slice, for every patch
    assert all(sample.norm.shape == (1, 2) for sample in whole)


@pytest.mark.parametrize("base", list(BASES))
def test_a_cut_sample_is_an_image_of_its_own(scan: Scan, base: str) -> None:
    for cut, plain in zip(samples(scan, cut=1.0, base=base), samples(scan, base=base), strict=True):
        assert_close(cut.base, BASES[base](cut.lr, SCALE))
        assert_close(cut.norm, slice_range(cut.lr))
        assert torch.equal(cut.lr, plain.lr)


def test_markers_are_bright_and_few_and_hardly_move_the_norm(scan: Scan) -> None:
    plain, marked = samples(scan, flips=False), samples(scan, flips=False, markers=1.0)
    assert max(float(sample.hr.max()) for sample in marked) > 2.5
    spreads = [[float(sample.norm[0, 1]) for sample in dataset] for dataset in (plain, marked)]
    assert np.mean(spreads[1]) == pytest.approx(np.mean(spreads[0]), rel=0.15)


def test_a_masked_background_is_zero_in_lr_and_hr(scan: Scan) -> None:
    emptied = 0
    for sample in samples(scan, masked=1.0):
        outside = torch.nn.functional.max_pool2d((sample.lr != 0).float(), 5, 1, 2) == 0
        fine = outside.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2)
        assert not sample.hr[fine].any()
        emptied += int(outside.sum())
    assert emptied


@pytest.mark.parametrize("option", ["markers", "masked", "cut"])
def test_shares_are_checked(scan: Scan, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is 1.5; wanted a number from 0 to 1"):
        samples(scan, **{option: 1.5})
    with pytest.raises(ValueError, match="base is 'cubic'"):
        samples(scan, base="cubic")
