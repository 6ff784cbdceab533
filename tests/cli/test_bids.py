"""The BIDS App: which scans it processes, which files it writes, which inputs it refuses."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from deformmamba.cli import main
from deformmamba.models import ZeroFill

NAMES = (
    "sub-01/anat/sub-01_T2w.nii.gz",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/func/sub-01_task-rest_bold.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz",
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(0).integers(1, 900, (8, 6, 2)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([3.0, 3, 4, 1])), root / name)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    ZeroFill(scale=2).save_pretrained(tmp_path / "plain.safetensors")
    return root


def run(data: Path, *more: str) -> tuple[int, list[str]]:
    out = data.parent / "out"
    weights = str(data.parent / "plain.safetensors")
    code = main(["bids", str(data), str(out), "participant", "--model", weights, "--device", "cpu", *more])
    return code, sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))


def test_the_anatomical_scans_of_all(data: Path) -> None:
    code, made = run(data)
    assert code == 0
    assert made == [
        "sub-01/anat/sub-01_desc-sr_T1w.nii.gz",
        "sub-01/anat/sub-01_desc-sr_T2w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_desc-sr_T2w.nii.gz",
    ]
    described = json.loads((data.parent / "out" / "dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"


@pytest.mark.parametrize("option", ["--participant-label", "--participant_label"])
def test_some_participants_and_kinds(option: str, data: Path) -> None:
    assert run(data, option, "01", "--suffix", "T2w") == (0, ["sub-01/anat/sub-01_desc-sr_T2w.nii.gz"])


def test_what_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--participant-label", "09")[0] == 2
    assert "no participant sub-09; participants: sub-01, sub-02" in capsys.readouterr().err
    assert run(data, "--suffix", "FLAIR")[0] == 2
    assert "none of the requested scans" in capsys.readouterr().err
    (data / "dataset_description.json").unlink()
    assert run(data)[0] == 2
    assert "not a BIDS data set" in capsys.readouterr().err
    assert main(["bids", str(data), str(data), "group"]) == 2
