"""Pictures of training runs are valid PNG files, also for a log with gaps and for a scan with its slice axis first."""

import nibabel
import numpy as np

from deformmamba.data.prepared import write_prepared
from deformmamba.models import Bicubic
from deformmamba.training.curves import training_curve
from deformmamba.training.sample import sample_picture

PNG = b"\x89PNG"


def test_a_curve_of_a_log_with_gaps(tmp_path):
    rows = [
        {"step": "2", "loss": "0.5", "lr": "0.1", "psnr": ""},
        {"step": 4, "loss": 0.25, "lr": 0.1, "psnr": 28.5},
        {"step": 6, "loss": float("inf"), "lr": 0.1, "psnr": 29.0},
    ]
    training_curve(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_a_curve_of_a_score_with_a_name_in_any_script(tmp_path):
    training_curve([{"step": 2, "头部": 28.5}, {"step": 4, "头部": 29.0}], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_a_sample_picture_of_an_odd_slice(tmp_path, phantom):
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(phantom[:47, :39], 2, 0), np.diag([3, 1, 1, 1])), path)
    sample_picture(Bicubic(scale=2), path, tmp_path / "sample.png", title="sub-1")
    assert (tmp_path / "sample.png").read_bytes().startswith(PNG)


def test_a_sample_picture_without_its_middle_slice(tmp_path, phantom, monkeypatch):
    array = np.moveaxis(phantom, 2, 0).copy()
    array[2:5] = 0
    nibabel.save(nibabel.Nifti1Image(array, np.diag([3, 1, 1, 1])), tmp_path / "scan.nii")
    drawn = []
    monkeypatch.setattr("deformmamba.training.sample.comparison", lambda truth, *_, **__: drawn.append(truth))
    sample_picture(Bicubic(scale=2), tmp_path / "scan.nii", tmp_path / "sample.png")
    assert drawn[0].any()


def test_a_sample_picture_of_a_prepared_volume(tmp_path, phantom):
    path = tmp_path / "a.safetensors"
    write_prepared(path, np.moveaxis(phantom, 2, 0) / 1000, {"spacing_mm": [1.0, 1.0]})
    sample_picture(Bicubic(scale=2), path, tmp_path / "sample.png")
    assert (tmp_path / "sample.png").read_bytes().startswith(PNG)
