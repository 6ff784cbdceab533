"""Folders of scans: all are found, output names follow BIDS, nothing runs twice, a bad file or a kill loses nothing."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.data import get_testdata_file

from deformmamba.cli import main
from deformmamba.errors import InvalidType, UnsupportedCall
from deformmamba.extras import MissingExtra
from deformmamba.inference.cohort import is_cohort, output_name, processes, upscale_cohort
from deformmamba.inference.files import upscale_file
from deformmamba.models import VDSR, ZeroFill
from deformmamba.volume import ChoiceNeeded, VolumeError, read_volume, write_text
from deformmamba.weights import WeightsError


def scan(path: Path, seed: int = 0, shape: tuple[int, ...] = (8, 6, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(1, 900, shape).astype(np.int16)
    kind = nibabel.MGHImage if path.suffix == ".mgz" else nibabel.Nifti1Image
    nibabel.save(kind(array, np.diag([-1.0, 1, 4, 1])), path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two subjects, three file formats, and files that are not scans."""
    root = tmp_path / "raw é"
    scan(root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T2w.nii.gz", 1)
    scan(root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_acq-a_T2w.nii", 2)
    scan(root / "sub-02" / "anat" / "sub-02_T2w.mgz", 3, (8, 10, 4))
    series = root / "scanner" / "t2 tse"
    series.mkdir(parents=True)
    dataset = dcmread(str(get_testdata_file("MR_small.dcm", download=False)))
    dataset.PatientName, dataset.PatientID = "SECRET^NAME", "SECRET-ID"
    dataset.save_as(series / "IM0001")
    (root / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_T2w.json").write_text('{"PatientName": "SECRET"}')
    (root / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    (root / ".hidden.nii").write_bytes(b"x")
    (root / "README").write_text("words")
    return root


OUTPUTS = [
    "scanner/t2 tse_desc-sr",
    "sub-01/ses-1/anat/sub-01_ses-1_desc-sr_T2w.nii.gz",
    "sub-01/ses-2/anat/sub-01_ses-2_acq-a_desc-sr_T2w.nii",
    "sub-02/anat/sub-02_desc-sr_T2w.mgz",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    ZeroFill(scale=2).save_pretrained(path)
    return str(path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_scan_is_found_and_named(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "deep"
    outcomes = upscale_cohort(ZeroFill(scale=2), tree, out)
    assert [(o.output, o.status) for o in outcomes] == [(name, "made") for name in OUTPUTS]
    for name in OUTPUTS:
        written, source = read_volume(out / name), read_volume(tree / name.replace("_desc-sr", ""))
        assert written.array.shape == (*(2 * n for n in source.array.shape[:2]), source.array.shape[2])
        np.testing.assert_allclose(written.affine, source.affine @ np.diag([0.5, 0.5, 1, 1]), atol=1e-4)
        np.testing.assert_allclose(written.array[::2, ::2], source.array, atol=0.05)
    assert json.loads((out / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    assert [row["status"] for row in table(out / "desc-sr_summary.csv")] == ["made"] * 4
    text = b"".join(data for name, data in content(out).items() if name.endswith((".json", ".csv")))
    assert b"SECRET" not in text
    assert not any(path.name.startswith(".") and path.name != ".bidsignore" for path in out.rglob("*"))


def test_the_sidecar_says_what_made_it(tree: Path, tmp_path: Path, weights: str) -> None:
    model = ZeroFill.from_pretrained(weights)
    upscale_cohort(model, tree, tmp_path / "out", ensemble=True, consistency="exact", dtype="float32")
    name = "sub-01/ses-1/anat/sub-01_ses-1_desc-sr_T2w.json"
    said = json.loads((tmp_path / "out" / name).read_text())
    assert said["Sources"] == [OUTPUTS[1].replace("_desc-sr", "")]
    by = said["GeneratedBy"][0]
    assert by["weights"] == "plain.safetensors"  # the name only, not the path
    assert re.fullmatch("[0-9a-f]{64}", by["sha256"])
    assert (by["Name"], by["model"], by["scale"], by["ensemble"], by["consistency"]) == (
        "deformmamba", "ZeroFill", 2, True, "exact",
    )  # fmt: skip


def test_what_is_done_is_skipped_and_what_has_changed_is_not(tree: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", ZeroFill(scale=2)

    def made(**settings: Any) -> list[str]:
        return [
            o.output for o in upscale_cohort(settings.pop("model", model), tree, out, **settings) if o.status == "made"
        ]

    assert made() == OUTPUTS
    before = content(out)
    assert made() == []
    assert {k: v for k, v in content(out).items() if "summary" not in k} == {
        k: v for k, v in before.items() if "summary" not in k
    }
    scan(tree / "sub-02" / "anat" / "sub-02_T2w.mgz", 4, (8, 10, 4))  # the same size, later
    os.utime(tree / "sub-02" / "anat" / "sub-02_T2w.mgz", (2e9, 2e9))
    assert made() == [OUTPUTS[3]]
    (out / OUTPUTS[1]).unlink()
    (out / "sub-01/ses-2/anat/sub-01_ses-2_acq-a_desc-sr_T2w.json").write_text("{")
    assert made() == [OUTPUTS[1], OUTPUTS[2]]
    assert made(axis=2) == OUTPUTS
    assert made(axis=2, batch_size=1, ensemble=False, consistency="off") == []  # changes nothing
    assert made(axis=2, model=ZeroFill(scale=3)) == OUTPUTS
    assert made(axis=2, model=ZeroFill(scale=3, intensity="max")) == OUTPUTS  # also with weights that have no file
    torch.manual_seed(0)
    small = VDSR(scale=2, layers=2, width=4).eval()
    assert made(axis=2, model=small) == OUTPUTS
    assert made(axis=2, model=small) == []
    with torch.no_grad():
        next(small.parameters()).add_(1e-3)
    assert made(axis=2, model=small) == OUTPUTS


def test_a_bad_file_does_not_stop_the_others(tree: Path, tmp_path: Path, weights: str, capsys: Any) -> None:
    (tree / "broken.nii.gz").write_bytes(b"no scan")
    scan(tree / "four.nii", shape=(8, 6, 3, 2))
    scan(tree / "twice.nii")
    scan(tree / "twice.nii.gz")
    scan(tmp_path / "elsewhere.nii")
    (tree / "link.nii").symlink_to(tmp_path / "elsewhere.nii")
    (tree / "dangling.nii").symlink_to(tree / "nowhere.nii")
    (tree / "inside.nii").symlink_to(tree / "twice.nii")
    (tree / "loop").symlink_to(tree)
    out = tmp_path / "out"
    assert main(["upscale", str(tree), "-o", str(out), "--model", weights, "--device", "cpu"]) == 1
    said, errors = capsys.readouterr()
    assert f"{out}: 7 made, 0 skipped, 4 failed, 0 ignored; see desc-sr_summary*.csv" in said
    failed = {row["source"]: row["reason"] for row in table(out / "desc-sr_summary.csv") if row["status"] == "failed"}
    expected = {
        "broken.nii.gz": "not a NIfTI file",
        "dangling.nii": "No such file",
        "link.nii": "a file outside the folder",
        "twice.nii.gz": "another scan has the output twice_desc-sr.json already",
    }
    assert failed.keys() == expected.keys()
    for name, words in expected.items():
        assert words in failed[name]
        assert f"deformmamba: failed: {name}: " in errors
    assert errors.count("\n") == 4
    assert "Traceback" not in errors
    assert not (out / "broken_desc-sr.nii.gz").exists()
    assert main(["upscale", str(tree), "-o", str(out), "--model", weights, "--device", "cpu"]) == 1
    assert "0 made, 7 skipped, 4 failed" in capsys.readouterr().out


def test_each_scan_with_a_warning_is_named(tmp_path: Path, capsys: Any) -> None:
    """On stderr, in the table and in the JSON file; the others are not."""
    root, out, weights = tmp_path / "in", tmp_path / "out", str(tmp_path / "small.safetensors")
    VDSR(scale=2, layers=2, width=4).save_pretrained(weights)
    for k, offset in enumerate((0, -500, -500)):
        scan(root / f"{k}.nii", k)
        image = nibabel.load(root / f"{k}.nii")
        nibabel.save(nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) + offset, image.affine), root / f"{k}.nii")
    assert main(["upscale", str(root), "-o", str(out), "--model", weights, "--device", "cpu"]) == 0
    errors = capsys.readouterr().err
    rows = {row["source"]: row for row in table(out / "desc-sr_summary.csv")}
    for k in range(3):
        facts = json.loads((out / f"{k}_desc-sr.json").read_text("utf-8"))
        assert ("does not look like a magnitude image" in rows[f"{k}.nii"]["warnings"]) == (k > 0)
        assert errors.count(f"deformmamba: warning: {k}.nii: the scan does not look like a magnitude image") == (k > 0)
        assert facts.get("Warnings", []) == ([rows[f"{k}.nii"]["warnings"]] if k else [])
    assert "warning: the scan" not in errors


def test_a_bug_in_one_scan_is_named_but_not_quoted(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: ZeroFill, lr: torch.Tensor, base: Any = None) -> torch.Tensor:
        raise KeyError("SECRET")

    monkeypatch.setattr(ZeroFill, "forward", bug)
    outcomes = upscale_cohort(ZeroFill(scale=2), tree, tmp_path / "out")
    assert {o.reason for o in outcomes} == {"an unexpected KeyError; run the command on this scan alone to see where"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MissingExtra("pip install deformmamba[dicom]"), "pip install deformmamba[dicom]"),
        (UnsupportedCall("no such call here"), "no such call here"),
        (WeightsError("no such weights"), "no such weights"),
        (InvalidType("a wrong type"), "a wrong type"),
        (ValueError("SECRET"), "an unexpected ValueError; run the command on this scan alone to see where"),
        (OSError("SECRET"), "an unexpected OSError; run the command on this scan alone to see where"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ChoiceNeeded("two stacks", "stack", "0 to 1"), "two stacks; run the command on this scan alone"),
        (ChoiceNeeded("two volumes", "volume", "0 to 1"), "two volumes; choose one with volume=K (--volume K), 0 to 1"),
    ],
)
def test_only_messages_of_this_package_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    scan(tmp_path / "a.nii")
    monkeypatch.setattr("deformmamba.inference.cohort.upscale_file", fails)
    assert [o.reason for o in upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path / "out")] == [reason]


def test_a_scan_stays_a_scan_beside_its_output(tmp_path: Path) -> None:
    """The output of a folder's scan has the name of another scan in another format."""
    scan(tmp_path / "a.mgz")
    scan(tmp_path / "a_desc-sr.nii", 1)
    upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path, only=lambda path: path.name == "a.mgz")
    outcomes = upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path)
    assert [(o.source, o.status) for o in outcomes] == [
        ("a.mgz", "skipped"), ("a_desc-sr.mgz", "ignored"), ("a_desc-sr.nii", "made")
    ]  # fmt: skip
    # a scan of the user is not replaced because the JSON file belongs to an output in another format
    scan(tmp_path / "a.nii")
    (tmp_path / "a.mgz").unlink()
    failed = upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path, only=lambda path: path.name == "a.nii")
    assert "a_desc-sr.nii: exists and was not written by this package" in failed[0].reason


def test_outputs_are_no_inputs(tree: Path) -> None:
    """The outputs go into the input folder itself, or into a folder below it."""
    for out in (tree, tree / "derivatives" / "sr"):
        for _ in range(2):
            outcomes = upscale_cohort(ZeroFill(scale=2), tree, out)
            assert [o.output for o in outcomes if o.status != "ignored"] == OUTPUTS
        assert {o.status for o in outcomes} <= {"skipped", "ignored"}
        own = [o for o in outcomes if o.status == "ignored"]
        assert len(own) == 4, "what the first round wrote into the folder itself"
        assert all("an output of this package" in o.reason for o in own)


def test_ctrl_c_keeps_the_summary_of_what_was_done(tree: Path, tmp_path: Path) -> None:
    def told(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscale_cohort(ZeroFill(scale=2), tree, tmp_path / "out", told=told)
    assert [row["status"] for row in table(tmp_path / "out" / "desc-sr_summary.csv")] == ["made"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sub-01_T2w.nii.gz", "sub-01_desc-sr_T2w.nii.gz"),
        ("sub-01_ses-1_run-02_part-mag_T1w.nii", "sub-01_ses-1_run-02_part-mag_desc-sr_T1w.nii"),
        ("sub-01_space-MNI_desc-preproc_T1w.nii.gz", "sub-01_space-MNI_desc-preprocsr_T1w.nii.gz"),
        ("brain.nii", "brain_desc-sr.nii"),
        ("a.b.NII.GZ", "a.b_desc-sr.NII.GZ"),
        ("sub-01 T2.mgz", "sub-01 T2_desc-sr.mgz"),
        ("series 中", "series 中_desc-sr"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert output_name(name) == expected


def test_a_folder_of_dicom_is_a_scan_and_no_cohort(tree: Path, tmp_path: Path) -> None:
    assert is_cohort(tree)
    assert not is_cohort(tree / "scanner" / "t2 tse")
    assert not is_cohort(tree / "README")
    with pytest.raises(VolumeError, match="one scan, not a folder of scans; give its parent"):
        upscale_cohort(ZeroFill(scale=2), tree / "scanner" / "t2 tse", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VolumeError, match="contains no scan"):
        upscale_cohort(ZeroFill(scale=2), tmp_path / "empty", tmp_path / "out")
    with pytest.raises(VolumeError, match="no such folder"):
        upscale_cohort(ZeroFill(scale=2), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(VolumeError, match="cannot create this folder"):
        upscale_cohort(ZeroFill(scale=2), tree, tree / "README" / "out")
    assert not (tmp_path / "out").exists()


def test_options_for_one_scan_are_refused(tree: Path, tmp_path: Path, capsys: Any) -> None:
    for option, value, said in (
        ("--figure", "a.png", "give a folder here"),
        ("--uncertainty", "u.nii", "give a folder here"),
        ("--report", "a.html", "give a folder here"),
        ("--series", "0", "--series works on one scan"),
        ("--stack", "0", "--stack works on one scan"),
        ("--model", "auto", "--model auto works on one scan"),
    ):
        assert main(["upscale", str(tree), "-o", str(tmp_path / "out"), option, value]) == 2
        assert said in capsys.readouterr().err
    assert main(["upscale", str(tree), "-o", str(tmp_path / "out"), "--as-image"]) == 2
    assert "--as-image works on one scan only" in capsys.readouterr().err
    assert main(["upscale", str(tree)]) == 2
    assert "no output" in capsys.readouterr().err
    assert main(["upscale", str(tree), "-o", str(tmp_path / "out.nii.gz")]) == 2
    assert "the output must be a folder too" in capsys.readouterr().err


def test_what_is_no_scan_is_listed_with_the_reason(tree: Path, tmp_path: Path, weights: str, capsys: Any) -> None:
    labels = np.kron(np.arange(4).reshape(2, 2, 1), np.ones((4, 4, 3))).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tree / "sub-01" / "atlas.nii.gz")
    scan(tree / "sub-01" / "sub-01_desc-brain_mask.nii.gz")
    scan(tree / "derivatives" / "fsl" / "sub-01_T2w.nii.gz")
    out = tmp_path / "out"
    assert main(["upscale", str(tree), str(out), "--model", weights, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "4 made, 0 skipped, 0 failed, 3 ignored" in said
    rows = {row["source"]: row["reason"] for row in table(out / "desc-sr_summary.csv") if row["status"] == "ignored"}
    assert "few integers" in rows["sub-01/atlas.nii.gz"]
    assert "mask" in rows["sub-01/sub-01_desc-brain_mask.nii.gz"]
    assert "derivatives" in rows["derivatives/fsl/sub-01_T2w.nii.gz"]


def test_each_series_of_a_folder_is_a_scan_of_its_own(tree: Path, tmp_path: Path) -> None:
    series = tree / "scanner" / "t2 tse"
    dataset = dcmread(series / "IM0001")
    dataset.SeriesInstanceUID, dataset.SeriesNumber = "1.2.3", 99
    dataset.save_as(series / "IM0002")
    (tree / "scanner" / "DICOMDIR").write_bytes(Path(str(get_testdata_file("DICOMDIR", download=False))).read_bytes())
    outcomes = upscale_cohort(ZeroFill(scale=2), tree / "scanner", tmp_path / "out")
    assert [(o.output, o.status) for o in outcomes] == [
        ("t2 tse_series-0_desc-sr", "made"), ("t2 tse_series-1_desc-sr", "made")
    ]  # fmt: skip


def test_an_output_that_was_changed_is_made_again(tree: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", ZeroFill(scale=2)
    upscale_cohort(model, tree, out)
    whole = (out / OUTPUTS[1]).read_bytes()
    for content in (b"", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        (out / OUTPUTS[1]).write_bytes(content)
        assert [o.output for o in upscale_cohort(model, tree, out) if o.status == "made"] == [OUTPUTS[1]]
    next((out / OUTPUTS[0]).iterdir()).unlink()
    assert [o.output for o in upscale_cohort(model, tree, out) if o.status == "made"] == [OUTPUTS[0]]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_no_text_ends_nothing(tmp_path: Path, weights: str, capsys: Any) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    scan(root / "sub-1_T2w.nii")
    name = os.path.join(os.fsencode(root), b"caf\xe9 $a$.nii")
    try:
        os.rename(scan(root / "x.nii", 1), name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    figures = tmp_path / "figures"
    command = ["upscale", str(root), "-o", str(out), "--model", weights, "--device", "cpu", "--figure", str(figures)]
    assert main(command) == 0
    assert "2 made" in capsys.readouterr().out
    assert [row["source"] for row in table(out / "desc-sr_summary.csv")] == ["caf\\xe9 $a$.nii", "sub-1_T2w.nii"]
    assert len(list(figures.iterdir())) == 2
    one = [os.fsdecode(name), "-o", str(tmp_path / "one.nii"), "--figure", str(tmp_path / "one.png")]
    assert main(["upscale", *one, "--model", weights]) == 0
    (root / "loop.nii").symlink_to("loop.nii")
    assert main(command) == 1, "the link fails alone"
    assert "0 made, 2 skipped, 1 failed" in capsys.readouterr().out
    assert main(["prepare", "folder", str(root), "-o", str(tmp_path / "prepared")]) == 0
    write_text(tmp_path / "table.csv", os.fsdecode(name))  # as those of evaluate and train
    assert r"caf\udce9" in (tmp_path / "table.csv").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bids-validator-deno"), reason="bids-validator-deno is not installed")
def test_a_validator_finds_no_error(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    scan(root / "sub-01" / "anat" / "sub-01_T2w.nii.gz")
    scan(root / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_acq-fine_T1w.nii.gz", 2)
    (root / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    upscale_cohort(ZeroFill(scale=2), root, tmp_path / "out")
    command = ["bids-validator-deno", "--ignoreWarnings", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "[ERROR]" not in done.stdout
    assert done.returncode == 0, done.stdout
    stripped = json.loads((tmp_path / "out/sub-01/anat/sub-01_desc-sr_T2w.json").read_text())["SkullStripped"]
    assert stripped is False


@pytest.mark.slow
def test_further_files_of_each_scan(tree: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("uncertainty", "figure", "report")}
    upscale_cohort(ZeroFill(scale=2), tree, tmp_path / "out", **places)  # type: ignore[arg-type]
    stem = "sub-01/ses-1/anat/sub-01_ses-1_desc-sr_T2w"
    assert (tmp_path / "figure" / f"{stem}.png").stat().st_size > 1000
    assert "Super-resolution report" in (tmp_path / "report" / f"{stem}.html").read_text("utf-8")
    spread = read_volume(tmp_path / "uncertainty" / f"{stem}_uncertainty.nii.gz")
    assert spread.array.shape == read_volume(tmp_path / "out" / f"{stem}.nii.gz").array.shape
    # a run without further files would make the outputs again, because its ensemble setting differs
    again = upscale_cohort(ZeroFill(scale=2), tree, tmp_path / "out", **places)  # type: ignore[arg-type]
    assert {o.status for o in again} == {"skipped"}


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script without srun
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 2)),
    ],
)
def test_the_share_of_a_process(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert processes(environment) == expected


@pytest.mark.parametrize("bad", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}])
def test_no_share(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="one of several processes"):
        processes(bad)


def test_shares_are_all_of_it_and_none_twice(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "broken.nii").write_bytes(b"x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    outputs = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        outputs += [o.output for o in upscale_cohort(ZeroFill(scale=2), tree, tmp_path / "out")]
    assert sorted(outputs) == sorted([*OUTPUTS, "broken_desc-sr.nii"])
    rows = [row for rank in range(3) for row in table(tmp_path / "out" / f"desc-sr_summary_rank-{rank}.csv")]
    assert sorted(row["output"] for row in rows) == sorted(outputs)


SLOW_SCRIPT = """
import os, sys, time
from deformmamba.models import VDSR, ZeroFill
forward = ZeroFill.forward
def slow(self, lr, base=None):
    # the second process hangs in its second scan until it is killed
    if os.environ["RANK"] == "1" and os.path.exists(sys.argv[1] + "/first"):
        open(sys.argv[1] + "/hangs", "w").close()
        time.sleep(120)
    return forward(self, lr, base)
ZeroFill.forward = slow
from deformmamba.inference.cohort import upscale_cohort
def told(outcome):
    print(outcome.output, outcome.status, flush=True)
    if os.environ["RANK"] == "1":
        open(sys.argv[1] + "/first", "w").close()
upscale_cohort(ZeroFill(scale=2), sys.argv[2], sys.argv[3], told=told)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_one_of_two_processes_killed_and_the_run_repeated(tmp_path: Path) -> None:
    root, out, notes = tmp_path / "in", tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    for k in range(7):
        scan(root / f"sub-{k}_T2w.nii", k)

    def start(rank: int) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", SLOW_SCRIPT, str(notes), str(root), str(out)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    with start(0) as first, start(1) as second:
        for _ in range(600):
            if (notes / "hangs").exists():
                break
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=100)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL)
    assert [text.count(" made") for text in said] == [4, 1]
    done = {
        name: (out / name).stat().st_mtime_ns for name in os.listdir(out) if name.endswith(".nii") and name[0] != "."
    }
    assert len(done) == 5

    outcomes = upscale_cohort(ZeroFill(scale=2), root, out)
    assert [o.status for o in outcomes].count("made") == 2
    assert [o.status for o in outcomes].count("skipped") == 5
    assert all((out / name).stat().st_mtime_ns == changed for name, changed in done.items())
    for k in range(7):
        assert read_volume(out / f"sub-{k}_desc-sr_T2w.nii").array.shape == (16, 12, 3)


@pytest.mark.long
def test_under_torchrun_a_bad_file_stops_nobody(tmp_path: Path, weights: str) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    scan(root / "sub-0_T2w.nii", 0, (6, 6, 1))
    # the largest scan goes to the first process, the bad file to the second, which ends much earlier
    (root / "sub-0_T1w.nii").write_bytes(b"no scan at all" * 100)
    for k in range(1, 4):
        scan(root / f"sub-{k}_T2w.nii", k, (256, 256, 40) if k == 1 else (6, 6, 1))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deformmamba"]
    command = ["upscale", str(root), "-o", str(out), "--model", weights, "--device", "cpu", "--ensemble"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, check=False, env=environment, timeout=200
    )
    assert done.returncode == 1, done.stderr
    assert sorted(path.name for path in out.glob("*.nii")) == [f"sub-{k}_desc-sr_T2w.nii" for k in range(4)]
    rows = [row for rank in range(2) for row in table(out / f"desc-sr_summary_rank-{rank}.csv")]
    assert sorted((row["source"], row["status"]) for row in rows) == [
        ("sub-0_T1w.nii", "failed"),
        *((f"sub-{k}_T2w.nii", "made") for k in range(4)),
    ]
    assert "failed: sub-0_T1w.nii: " in done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_files_of_others_are_not_replaced(tmp_path: Path, inside: bool) -> None:
    """Neither in the input folder itself nor in another one."""
    source = tmp_path / "scans"
    for k, name in enumerate(("a.nii", "b.nii", "c.mgz", "d.nii", "e.nii")):
        scan(source / name, k)
    out = source if inside else tmp_path / "out"
    scan(out / "a_desc-sr.nii", 7)
    (out / "b_desc-sr.json").write_text("{}")
    scan(out / "c_desc-sr.mgz", 8)
    model = ZeroFill(scale=2)
    upscale_file(model, source / "d.nii", out / "d_desc-sr.nii", sidecar=False)  # as after a kill before the sidecar
    before = {name: (out / name).read_bytes() for name in ("a_desc-sr.nii", "b_desc-sr.json", "c_desc-sr.mgz")}
    for name in ("a.nii", "b.nii", "c.mgz", "d.nii", "e.nii"):
        before[f"../scans/{name}"] = (source / name).read_bytes()
    outcomes = {o.source: o for o in upscale_cohort(model, source, out) if not o.source.endswith("_desc-sr.nii")}
    failed = [name for name, outcome in outcomes.items() if outcome.status == "failed"]
    assert [name for name in failed if "_desc-sr" not in name] == ["a.nii", "b.nii", "c.mgz"]
    assert "exists and was not written by this package; move it" in outcomes["a.nii"].reason
    assert (outcomes["d.nii"].status, outcomes["e.nii"].status) == ("made", "made")
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("ending", [".mgz", ".nii.gz"])
def test_a_run_that_stopped_after_an_output_resumes(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out, figures = tmp_path / "in", tmp_path / "out", tmp_path / "figures"
    scan(root / f"a{ending}", shape=(16, 12, 3))
    model = ZeroFill(scale=2)
    with monkeypatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("deformmamba.inference.cohort.draw_slice", stop)
        with pytest.raises(KeyboardInterrupt):
            upscale_cohort(model, root, out, figure=figures)
    assert (out / f"a_desc-sr{ending}").exists()
    assert [outcome.status for outcome in upscale_cohort(model, root, out, figure=figures)] == ["made"]
    assert [outcome.status for outcome in upscale_cohort(model, root, out, figure=figures)] == ["skipped"]


def test_a_scan_that_fails_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(tmp_path / "in" / "a.mgz")
    (tmp_path / "in" / "a.mgz").write_bytes((tmp_path / "in" / "a.mgz").read_bytes()[:60])
    assert [outcome.status for outcome in upscale_cohort(ZeroFill(scale=2), tmp_path / "in", tmp_path / "out")] == [
        "failed"
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["desc-sr_summary.csv"]


@pytest.mark.parametrize("kind", ["figure", "report"])
def test_further_files_that_are_missing_are_made(tmp_path: Path, kind: str) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    scan(root / "a.nii.gz", shape=(16, 12, 3))
    model = ZeroFill(scale=2)
    for folder, status in (("one", "made"), ("two", "made"), ("two", "skipped")):
        outcomes = upscale_cohort(model, root, out, **{kind: tmp_path / folder})
        assert [outcome.status for outcome in outcomes] == [status]
        assert len(list((tmp_path / folder).iterdir())) == 1


def test_a_folder_names_the_option_for_a_volume(tmp_path: Path, capsys: Any) -> None:
    scan(tmp_path / "in" / "a.nii.gz", shape=(16, 12, 9, 3))
    words = ["isotropic", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "choose one with --volume K, 0 to 2" in said
    assert "volume=K" not in said
