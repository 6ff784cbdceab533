"""Files of lower resolution: their provenance and warnings, what is no intensity image, what stood there before."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from deformmamba.cli import main
from deformmamba.inference.degrade_files import degrade_file
from deformmamba.inference.files import upscale_file
from deformmamba.models import VDSR, Bicubic, ZeroFill
from deformmamba.volume import VolumeError, not_a_scan, read_volume, write_volume


def scan(path: Path, array: np.ndarray | None = None, intent: int = 0) -> Path:
    array = np.random.default_rng(0).uniform(1, 900, (16, 12, 3)) if array is None else array
    image = nibabel.Nifti1Image(array.astype(np.float32), np.diag([-1.0, 1, 4, 1]))
    image.header["intent_code"] = intent
    nibabel.save(image, path)
    return path


def beside(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text("utf-8"))


def test_a_coarser_scan_says_how_it_was_made_and_is_a_scan(tmp_path: Path) -> None:
    source, target = scan(tmp_path / "in.nii"), tmp_path / "out.nii"
    upscale_file(Bicubic(scale=2), source, target)
    assert "an output of this package" in not_a_scan(target)
    assert main(["degrade", str(source), "-o", str(target), "--scale", "2", "--seed", "5"]) == 0
    facts = beside(target)
    assert "Made coarser" in facts["Description"]
    assert facts["GeneratedBy"][0]["degradation"].startswith("k-space")
    assert facts["GeneratedBy"][0]["seed"] == 5
    assert not_a_scan(target) == ""
    upscale_file(ZeroFill(scale=2), target, tmp_path / "again.nii")


def test_a_coarser_scan_that_deserves_distrust_says_so(tmp_path: Path) -> None:
    source = scan(tmp_path / "in.nii", np.random.default_rng(0).uniform(0, 1, (16, 12, 3)))
    with pytest.warns(UserWarning, match="int16"):
        degrade_file(source, tmp_path / "out.nii", 2, dtype="int16")
    assert "int16" in beside(tmp_path / "out.nii")["Warnings"][0]
    assert "WITH WARNINGS" in nibabel.load(tmp_path / "out.nii").header["descrip"].item().decode()
    header = bytearray(scan(tmp_path / "two.nii").read_bytes())
    header[80:88] = np.array([0.4, 0.4], "<f4").tobytes()  # pixdim[1:3]; the sform states 1 mm
    header[252:254] = bytes(2)  # no qform
    (tmp_path / "two.nii").write_bytes(header)
    with pytest.warns(UserWarning, match="two voxel sizes"):
        degrade_file(tmp_path / "two.nii", tmp_path / "coarse.nii", 2)
    assert "two voxel sizes" in beside(tmp_path / "coarse.nii")["Warnings"][0]


def test_labels_are_not_averaged_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = scan(tmp_path / "seg.nii", np.random.default_rng(0).integers(0, 2, (16, 12, 3)), intent=1002)
    assert main(["degrade", str(labels), "-o", str(tmp_path / "out.nii"), "--scale", "2"]) == 2
    assert "--as-image degrades it anyway" in capsys.readouterr().err
    assert not (tmp_path / "out.nii").exists()
    with pytest.raises(VolumeError, match="label image"):
        degrade_file(labels, tmp_path / "out.nii", 2)
    degrade_file(labels, tmp_path / "out.nii", 2, as_image=True)
    upscale_file(ZeroFill(scale=2), labels, tmp_path / "fine.nii", as_image=True)
    for name in ("out.nii", "fine.nii"):
        assert nibabel.load(tmp_path / name).header["intent_code"] == 0  # averaged labels are no labels


def test_an_own_output_can_be_made_coarser(tmp_path: Path) -> None:
    upscale_file(Bicubic(scale=2), scan(tmp_path / "in.nii"), tmp_path / "fine.nii")
    degrade_file(tmp_path / "fine.nii", tmp_path / "coarse.nii", 2)
    assert nibabel.load(tmp_path / "coarse.nii").shape == (16, 12, 3)


def test_a_volume_written_over_an_output_loses_its_json_file(tmp_path: Path) -> None:
    source, target = scan(tmp_path / "in.nii"), tmp_path / "out.nii"
    upscale_file(Bicubic(scale=2), source, target)
    write_volume(target, read_volume(source))
    assert not (tmp_path / "out.json").exists()
    assert not_a_scan(target) == ""


def test_an_uncertainty_map_has_no_json_file_of_a_former_output(tmp_path: Path) -> None:
    source, spread = scan(tmp_path / "in.nii"), tmp_path / "sd.nii"
    upscale_file(Bicubic(scale=2), source, spread)
    assert (tmp_path / "sd.json").exists()
    (tmp_path / "other.json").write_text("{}")
    model = VDSR(scale=2, layers=2, width=4)
    upscale_file(model, source, tmp_path / "out.nii", uncertainty=spread)
    upscale_file(model, source, tmp_path / "out.nii", uncertainty=tmp_path / "other.nii")
    assert not (tmp_path / "sd.json").exists()
    assert (tmp_path / "other.json").read_text() == "{}"
    assert (tmp_path / "out.json").exists()
