"""The remarks of the reader are given as warnings for every kind of scan, about the line that has the scan read."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from deformmamba.inference import upscale, upscale_with_uncertainty
from deformmamba.inference.isotropic import isotropic
from deformmamba.models import DeformMambaSR, ZeroFill
from deformmamba.volume import from_nibabel, read_volume, write_volume

NOTE = r"the header has two voxel sizes: 0.4 x 0.4 x {0} \(sform, used\) and 1 x 1 x {0} \(pixdim\)"


def image(slices: float = 4) -> nibabel.Nifti1Image:
    """An image whose sform and pixdim state two voxel sizes."""
    array = np.random.default_rng(0).uniform(1, 900, (16, 16, 12)).astype(np.float32)
    made = nibabel.Nifti1Image(array, np.diag([0.4, 0.4, slices, 1]))
    made.header["pixdim"][1:4] = 1, 1, slices
    return made


def upscaled(scan: Any) -> None:
    upscale(ZeroFill(scale=2), scan)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "upscale": upscaled,
    "uncertainty": lambda scan: upscale_with_uncertainty(ZeroFill(scale=2), scan),
    "list": lambda scan: upscale(ZeroFill(scale=2), [scan]),
    "isotropic": lambda scan: isotropic(
        scan, to=1, model=DeformMambaSR.from_preset("tiny", scale=1, dims=[4, 4], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("kind", ["path", "nibabel"])
@pytest.mark.parametrize("action", list(ACTIONS))
def test_two_voxel_sizes_are_said_once_for_a_path_and_an_image(action: str, kind: str, tmp_path: Path) -> None:
    nibabel.save(image(), tmp_path / "two.nii")
    scan: Any = tmp_path / "two.nii" if kind == "path" else nibabel.load(tmp_path / "two.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ACTIONS[action](scan)
    told = [one for one in caught if "two voxel sizes" in str(one.message)]
    assert len(told) == 1
    assert told[0].filename == __file__


def test_a_volume_is_warned_about_when_it_is_made(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=NOTE.format(4)) as caught:
        volume = from_nibabel(image())
    assert caught[0].filename == __file__
    assert len(volume.notes) == 1
    upscaled(volume)  # no second warning
    with pytest.warns(UserWarning, match=NOTE.format(4)):
        write_volume(tmp_path / "out.nii", image())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = read_volume(tmp_path / "out.nii")
    upscaled(volume)
