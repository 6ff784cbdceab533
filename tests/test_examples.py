"""The examples run: our blocks in other networks (their loss falls), one scan, a folder of scans, and a figure."""

import runpy
from pathlib import Path
from statistics import mean

import nibabel
import numpy as np
import pytest

from deformmamba import from_pretrained

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = ("ss2d_in_a_vit", "deform_in_a_resnet", "context_in_a_unet", "edge_loss_in_a_loop")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_trains_and_its_loss_falls(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(FOLDER / f"{example}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    losses = names["history"]
    assert mean(losses[-5:]) < 0.7 * mean(losses[:5])
    assert f"after {len(losses)} steps" in said


def run(example: str, *arguments: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [example, *map(str, arguments)])
    monkeypatch.syspath_prepend(FOLDER)
    runpy.run_path(str(FOLDER / f"{example}.py"), run_name="__main__")


@pytest.fixture
def scans(tmp_path: Path, phantom: np.ndarray) -> Path:
    for subject in range(12):
        image = nibabel.Nifti1Image(np.roll(phantom, subject, 0), np.diag([3.6, 3.6, 5, 1]))
        (tmp_path / "scans" / f"sub-{subject:02d}").mkdir(parents=True)
        nibabel.save(image, tmp_path / "scans" / f"sub-{subject:02d}" / "T2w.nii.gz")
    return tmp_path / "scans"


@pytest.mark.parametrize("example", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in EXAMPLES))
def test_the_arguments_are_explained(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(example, "--help", monkeypatch=monkeypatch)
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_a_volume_is_upscaled(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = scans / "sub-00" / "T2w.nii.gz", tmp_path / "sharper.nii.gz"
    run("upscale_a_volume", source, target, monkeypatch=monkeypatch)
    assert nibabel.load(target).shape == (192, 160, 6)
    assert (tmp_path / "sharper.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_folder_trains_a_network(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    run("train_on_a_folder", scans, tmp_path / "run", "2", monkeypatch=monkeypatch)
    assert from_pretrained(tmp_path / "run" / "best.safetensors").scale == 2


@pytest.mark.slow
def test_models_are_compared_and_drawn(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("evaluate_and_draw", scans / "sub-00" / "T2w.nii.gz", tmp_path / "figure.png", monkeypatch=monkeypatch)
    assert "difference from zero-filled k-space" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000
