"""`real_scans`: the value of each case, on a phantom for which the right value is known."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deformmamba import __version__
from deformmamba.cli import main
from deformmamba.errors import InvalidArgument
from deformmamba.evaluation.real_scans import GAINS, MARKERS, OFFSETS, markdown, real_scans, window_corners
from deformmamba.models import Bicubic, DeformMambaSR, ZeroFill
from deformmamba.physics.phantom import head
from deformmamba.volume import Volume, write_volume

SMALL = {"slices": 2, "window": 12, "tile": 24}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four slices of 64x56 pixels, up to about 900."""
    slices = np.stack([800 * head(64, seed)[:, 4:60] + 10 * seed for seed in range(4)], axis=-1)
    path = tmp_path_factory.mktemp("scans") / "sub-01_T2w.nii.gz"
    write_volume(path, Volume(slices.astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0])))
    return str(path)


@pytest.fixture(scope="module")
def network() -> DeformMambaSR:
    torch.manual_seed(0)
    made = DeformMambaSR(
        scale=2, dims=[8], depths=[1], stem_channels=4, d_state=4, skip="zero-fill-edges", normalise="slice"
    )
    torch.nn.init.normal_(made.project.weight, std=0.1)
    made.provenance = {"consistency": "object"}
    return made.eval()


def test_zero_filling_is_measured_as_what_it_is(scan: str) -> None:
    rows = {row["case"]: row for row in real_scans(ZeroFill(scale=2), [scan], **SMALL)}
    for row in rows.values():
        if "psnr" in row and "deviation" not in row:
            assert row["psnr"] == pytest.approx(row["zero_fill_psnr"], abs=1e-3)
    losses = [rows[f"marker of 2x2 pixels, {times:g} times as bright"]["loss"] for times in MARKERS]
    assert losses[0] < losses[1] < losses[2]  # a marker rings over the whole slice
    assert losses[2] > 0.05
    windows = rows["windows of 12x12 pixels as separate images"]
    assert windows["psnr_without"] - windows["psnr"] == pytest.approx(windows["loss"])
    assert windows["loss"] > 0.5  # a cut field of view rings at its edges
    masked = rows["masked background, well outside of the mask"]
    assert masked["nonzero"] > 0.2
    assert 0 < masked["largest"] < 0.5


@pytest.mark.portable
def test_a_network_for_any_intensity_passes_the_cases_of_units_and_masks(scan: str, network: DeformMambaSR) -> None:
    rows = real_scans(network, [scan], **SMALL)
    units = [row for row in rows if "deviation" in row]
    assert len(units) == len(GAINS) + len(OFFSETS) + 1 + 2
    for row in units:
        assert row["deviation"] < 0.01, row
        assert abs(row["loss"]) < 0.01, row
    for row in rows:
        if "nonzero" in row:
            assert row["nonzero"] == row["largest"] == 0, row


@pytest.mark.slow
def test_a_network_for_images_of_about_one_fails_the_case_of_offsets(scan: str) -> None:
    torch.manual_seed(0)
    plain = DeformMambaSR(scale=2, dims=[8], depths=[1], stem_channels=4, d_state=4, skip="zero-fill")
    torch.nn.init.normal_(plain.project.weight, std=0.1)
    rows = {row["case"]: row for row in real_scans(plain.eval(), [scan], **SMALL)}
    assert rows["+2000 in the scan's units"]["deviation"] > 0.1
    assert rows["times 0.03"]["deviation"] < 0.01  # one scale for the whole scan covers a gain


@pytest.mark.slow
def test_the_command_prints_both_tables_and_writes_json(
    scan: str, network: DeformMambaSR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network.save_pretrained(tmp_path / "net.safetensors")
    path = tmp_path / "rows.json"
    wide = tmp_path / "sub-01_T2w.nii.gz"
    slices = np.stack([800 * head(96, seed) for seed in range(2)], axis=-1)
    write_volume(wide, Volume(slices.astype(np.float32), np.diag([1.0, 1.0, 4.0, 1.0])))
    code = main(
        ["evaluate", str(tmp_path / "net.safetensors"), "--data", str(wide), "--real-scans", "--json", str(path)]
    )
    assert code == 0
    name = str(tmp_path / "net.safetensors")
    told = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    rows = told.pop(name)
    assert told["settings"]["volumes"] == [{"file": wide.name, "subject": "sub-01", "split": "", "group": ""}]
    assert list(told) == ["settings"]
    shown = capsys.readouterr().out
    assert markdown(rows).strip() in shown
    assert all(row["case"] in shown for row in rows)
    assert all(line.count("|") <= 8 for line in shown.splitlines())


def test_the_json_states_what_the_rows_depend_on(scan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, path = tmp_path / "best.safetensors", tmp_path / "rows.json"
    ZeroFill(scale=2).save_pretrained(weights, provenance={"consistency": "exact"})
    case = {"case": "unchanged", "subjects": 1, "psnr": float("inf"), "zero_fill_psnr": 30.0}
    monkeypatch.setattr("deformmamba.evaluation.real_scans.real_scans", lambda *_: [case])
    assert main(["evaluate", str(weights), "--data", scan, "--real-scans", "--json", str(path)]) == 0
    told = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    assert told == {
        str(weights): [{**case, "psnr": None}],
        "settings": {
            "version": __version__,
            "volumes": [{"file": Path(scan).name, "subject": "sub-01", "split": "", "group": ""}],
            "models": {
                str(weights): {
                    "source": str(weights),
                    "scale": 2,
                    "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                    "consistency": "exact",
                }
            },
        },
    }


def test_a_folder_without_a_validation_split_needs_one(scan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "ixi-4x", "--data", str(Path(scan).parent), "--real-scans"]) == 2
    errors = capsys.readouterr().err
    assert "no volume in split 'val', the default; its splits are train: name one with --split" in errors
    assert errors.count("\n") == 1


def test_what_does_not_fit_is_refused(scan: str) -> None:
    with pytest.raises(InvalidArgument, match="twice the window"):
        real_scans(ZeroFill(scale=2), [scan], window=20)
    with pytest.raises(InvalidArgument, match="no scan"):
        real_scans(ZeroFill(scale=2), [])
    with pytest.raises(InvalidArgument, match="half-pixel grid"):
        real_scans(Bicubic(scale=2, grid="half-pixel"), [scan])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--csv", "a.csv"),
        ("--against", "bicubic"),
        ("--degradation", "blur:sigma=1 >> subsample"),
        ("--seed", "1"),
        ("--scale", "4"),
        ("--protocol", "slice"),
        ("--metric", "hfen"),
        ("--consistency", "off"),
    ],
)
def test_the_command_refuses_settings_that_it_would_ignore(
    scan: str, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert main(["evaluate", "ixi-4x", "--data", scan, "--real-scans", option, value]) == 2
    assert f"does not go with {option}; leave one" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(40, 40), (64, 58), (40, 90)])
def test_windows_lie_inside_of_the_slice(size: tuple[int, int]) -> None:
    for corner in window_corners(size, 20):
        assert all(0 <= at <= n - 20 for at, n in zip(corner, size, strict=True))
