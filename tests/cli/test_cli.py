"""The command line: on success it prints the path of the output; an error is one line, exit code 2 and no file."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydicom.data import get_testdata_file
from tolerances import assert_close

import deformmamba
import deformmamba.weights
from deformmamba.cli import _message, main
from deformmamba.models import ZeroFill
from deformmamba.volume import read_volume, slice_axis

COMMANDS = ["upscale", "degrade", "evaluate", "benchmark", "inspect", "train", "weights", "backends", "export", "demo"]
KEPT = b"the output of yesterday"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    ZeroFill(scale=4).save_pretrained(path, provenance={"spacings_mm": [0.5, 4.0]})
    return str(path)


def scan(path: Path, shape: tuple[int, ...] = (16, 12, 3), array: np.ndarray | None = None) -> str:
    if array is None:
        array = np.random.default_rng(0).integers(1, 900, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, 1, 4, 1])), path)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- what works


def test_upscale(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = scan(tmp_path / "in é.nii.gz")
    output, figure = tmp_path / "out 中.nii.gz", tmp_path / "look ü.png"
    assert main(["upscale", source, "-o", str(output), "--model", weights, "--figure", str(figure)]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert "slices taken along k (axial), guessed from the voxel size" in said
    assert said.splitlines()[0].startswith(f"{output}: 64 x 48 x 3 voxels of 0.25 x 0.25 x 4 mm, from 16 x 12 x 3")
    assert str(figure) in said
    assert figure.read_bytes().startswith(b"\x89PNG")
    sharp, lr = nibabel.load(output), nibabel.load(source)
    assert sharp.get_data_dtype() == np.float32
    assert_close(sharp.affine, lr.affine @ np.diag([0.25, 0.25, 1, 1]))
    np.testing.assert_allclose(sharp.get_fdata()[::4, ::4], lr.get_fdata(), atol=1)


def test_upscale_with_everything_chosen(tmp_path: Path, weights: str) -> None:
    source = scan(tmp_path / "in.nii", (12, 16, 10, 3))
    output = tmp_path / "out.nii"
    output.write_bytes(KEPT)
    arguments = ["--volume", "1", "--axis", "0", "--dtype", "int16", "--batch-size", "1", "--device", "cpu"]
    assert main(["upscale", source, "-o", str(output), "--model", weights, "--consistency", "exact", *arguments]) == 0
    image = nibabel.load(output)
    assert image.shape == (12, 64, 40)
    assert image.get_data_dtype() == np.int16
    lr = nibabel.load(source).get_fdata()[..., 1]
    consistent, plain = (deformmamba.upscale(ZeroFill(scale=4), lr, axis=0, consistency=c) for c in ("exact", "off"))
    assert np.abs(consistent - plain).max() > 10
    np.testing.assert_allclose(image.get_fdata(), consistent, atol=0.51)


def test_upscale_of_dicom(tmp_path: Path, weights: str) -> None:
    source = get_testdata_file("MR_small.dcm", download=False)
    assert main(["upscale", str(source), "-o", str(tmp_path / "out.nii.gz"), "--model", weights]) == 0
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (256, 256, 1)


def test_dicom_in_dicom_out(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    import pydicom

    source, output = tmp_path / "series", tmp_path / "sharper series"
    source.mkdir()
    dataset = pydicom.dcmread(str(get_testdata_file("MR_small.dcm", download=False)))
    dataset.save_as(source / "a")
    assert main(["upscale", str(source), "-o", str(output), "--model", weights]) == 0
    (written,) = [pydicom.dcmread(path) for path in output.iterdir()]
    assert (written.Rows, written.Columns) == (4 * dataset.Rows, 4 * dataset.Columns)
    digest = deformmamba.weights.load_checkpoint(weights).sha256
    assert written.DerivationDescription == (
        f"deformmamba {deformmamba.__version__}, UNLIKE TRAINING DATA, ZeroFill 4x, plain.safetensors, sha256 {digest}"
    )
    assert written.SeriesInstanceUID != dataset.SeriesInstanceUID
    both = read_volume(output), read_volume(source)
    np.testing.assert_allclose(both[0].array[::4, ::4], both[1].array, atol=0.05)
    assert main(["degrade", str(output), "-o", str(tmp_path / "back"), "--scale", "4"]) == 0
    np.testing.assert_allclose(read_volume(tmp_path / "back").array, both[1].array, atol=60)  # Nyquist lines differ
    other = pydicom.dcmread(source / "a")
    other.SeriesInstanceUID, other.SeriesNumber = "1.2.3.4", 99
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = "1.2.3.5"
    other.save_as(source / "b")
    capsys.readouterr()
    assert "series" in stopped(["upscale", str(source), "-o", str(tmp_path / "x.nii"), "--model", weights], capsys)
    for series in ("1", "1.2.3.4"):
        arguments = ["-o", str(tmp_path / "x.nii"), "--model", weights, "--series", series]
        assert main(["upscale", str(source), *arguments]) == 0


def test_an_ensemble_its_spread_and_a_report(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, spread, page = scan(tmp_path / "in.nii"), tmp_path / "u.nii.gz", tmp_path / "page.html"
    options = ["--uncertainty", str(spread), "--report", str(page), "--tile", "8", "--overlap", "4"]
    assert main(["upscale", source, "-o", str(tmp_path / "out.nii"), "--model", weights, *options]) == 0
    assert str(spread) in (said := capsys.readouterr().out)
    assert str(page) in said
    assert nibabel.load(spread).shape == (64, 48, 3)
    assert nibabel.load(spread).get_fdata().max() < 30  # only one frequency breaks zero-filling's symmetry
    assert "8x8 pixels, overlapping by 4" in page.read_text("utf-8")


def test_degrade_then_upscale_gives_the_scan_back(tmp_path: Path, weights: str) -> None:
    smooth = np.cos(np.arange(32) / 32 * 2 * np.pi)[:, None, None] * np.ones((32, 24, 3)) * 100 + 300
    source = scan(tmp_path / "in.nii", array=smooth.astype(np.float32))
    assert main(["degrade", source, "-o", str(tmp_path / "lr.nii"), "--scale", "4"]) == 0
    assert nibabel.load(tmp_path / "lr.nii").shape == (8, 6, 3)
    assert nibabel.load(tmp_path / "lr.nii").header.get_zooms() == (4, 4, 4)
    assert main(["upscale", str(tmp_path / "lr.nii"), "-o", str(tmp_path / "sr.nii"), "--model", weights]) == 0
    again = nibabel.load(tmp_path / "sr.nii")
    np.testing.assert_allclose(again.get_fdata(), smooth, atol=0.01)
    assert_close(again.affine, nibabel.load(source).affine)


def test_a_scan_made_coarser_than_its_slices_are_thick_keeps_its_axis(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((16, 16, 6), np.float32), np.diag([0.9, 0.85, 3.0, 1]))
    nibabel.save(image, tmp_path / "fine.nii")
    assert main(["degrade", str(tmp_path / "fine.nii"), "-o", str(tmp_path / "coarse.nii"), "--scale", "4"]) == 0
    coarse = read_volume(tmp_path / "coarse.nii")
    assert coarse.array.shape == (4, 4, 6)
    assert slice_axis(coarse) == 2
    assert slice_axis(replace(coarse, slices=None)) == 0  # the guess: the pixels are larger than the slices are thick


def test_a_warning_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ZeroFill(scale=2).save_pretrained(tmp_path / "far.safetensors", provenance={"spacings_mm": [9.0]})
    source = scan(tmp_path / "in.nii")
    output = str(tmp_path / "out.nii")
    assert main(["upscale", source, "-o", output, "--model", str(tmp_path / "far.safetensors")]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("deformmamba: warning: the pixels are 1 x 1 mm, the weights were trained on 9 to 9 mm")
    assert errors.count("\n") == 1


def test_evaluate(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    for k in (1, 2):
        scan(tmp_path / f"sub-{k}_T2w.nii", array=np.random.default_rng(k).uniform(1, 9, (32, 33, 2)))
    report = tmp_path / "scores é.json"
    assert main(["evaluate", weights, "--data", str(tmp_path), "--json", str(report)]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert said.startswith(
        "train: 1 volume of 1 subject: sub-1\nval: 1 volume of 1 subject: sub-2\n2 volumes of 2 subjects at"
    )
    assert "at 4x, protocol volume" in said
    result = json.loads(report.read_text("utf-8"))
    assert set(result["models"]) == {"bicubic", "b-spline", "zero-filled k-space", weights}
    ours, plain = result["models"][weights], result["models"]["zero-filled k-space"]
    assert ours["source"] == weights
    assert [row["subject"] for row in ours["volumes"]] == ["sub-1", "sub-2"]
    assert ours["mean"] == plain["mean"]  # the network of these weights is zero-filling
    assert result["models"]["bicubic"]["mean"]["psnr"] != plain["mean"]["psnr"]
    assert f"{ours['mean']['psnr']:.2f}" in said


def test_evaluate_baselines_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scan(tmp_path / "a.nii", (32, 32, 2))
    assert main(["evaluate", "--data", source, "--scale", "2", "--protocol", "slice"]) == 0
    assert "at 2x, protocol slice" in capsys.readouterr().out


def test_train_hands_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []

    def train_recipe(*args: Any, **overrides: Any) -> Path:
        calls.append((args, overrides))
        return tmp_path / "best.safetensors"

    monkeypatch.setattr("deformmamba.training.train_recipe", train_recipe)
    assert main(["train", "ixi-4x", "--data", "scans", "--out", "runs", "--steps", "3"]) == 0
    assert calls[0][0] == ("ixi-4x", "scans", "runs")
    assert calls[0][1].items() >= {"init": None, "steps": 3, "subject": None}.items()
    assert str(tmp_path / "best.safetensors") in capsys.readouterr().out


def test_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries == deformmamba.list_weights()
    assert main(["weights", "list"]) == 0
    assert all(entry["name"] in capsys.readouterr().out for entry in entries[:1])
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out.count(": ok, sha256 ") == len(entries)
    entry = {
        "name": "made-2x",
        "scale": 2,
        "parameters": 1500000,
        "size": 6100000,
        "summary": "for this test",
        "license": "cc0-1.0",
    }
    monkeypatch.setattr("deformmamba.weights.manifest", lambda: {"weights": {"made-2x": entry}, "planned": {}})
    assert main(["weights", "list"]) == 0
    assert re.fullmatch(r"made-2x +2x +1\.50 M parameters +6\.10 MB  for this test\n", capsys.readouterr().out)
    assert main(["weights", "show", "made-2x"]) == 0
    assert "# made-2x\n" in capsys.readouterr().out
    assert main(["weights", "show", "made-2x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == entry


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(("CPU kernels:", "threads:", "warning:"))]
    assert "reference" in names
    assert any(line.startswith(f"threads: {torch.get_num_threads()}, CPUs allowed: ") for line in lines)
    assert main(["backends", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names
    assert set(rows[0]) == {"name", "usable", "why", "cure"}
    assert all(row["usable"] == (not row["why"]) == (not row["cure"]) for row in rows)


def test_backends_names_settings_that_break_pytorch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    assert main(["backends"]) == 0
    assert "warning: OMP_THREAD_LIMIT=1: OpenMP may start fewer threads" in capsys.readouterr().out


@pytest.mark.slow
def test_demo(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "look here" / "é"
    assert main(["demo", "-o", str(folder), "--model", weights, "--device", "cpu"]) == 0
    said, errors = capsys.readouterr()
    assert errors == "" or errors.startswith("deformmamba: warning")
    kinds = ("coarse.nii.gz", "plain.nii.gz", "truth.nii.gz")
    names = [f"{case}_{kind}" for case in ("brain", "phantom") for kind in kinds]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "brain.png", "phantom.png"])
    assert all(str(folder / f"{case}.png") in said for case in ("brain", "phantom"))
    assert read_volume(folder / "phantom_plain.nii.gz").array.shape == (256, 256, 1)
    assert read_volume(folder / "brain_coarse.nii.gz").array.shape == (32, 24, 24)
    assert said.count("PSNR against the truth: bicubic") == 2
    assert "kernels ready in" in said
    assert said.splitlines()[-1].split()[:3] == ["deformmamba", "upscale", "scan.nii.gz"]


@pytest.mark.long
def test_the_demo_shows_a_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path), "--device", "cpu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "PSNR against the truth" in line]
    for line, network in zip(lines, ("ixi-4x", "ixi-2x"), strict=True):
        scores = {name: float(value) for name, value in re.findall(r"([\w-]+) ([\d.]+) dB", line)}
        assert scores[network] > max(scores["bicubic"], scores["zero-filled"]) + 0.5


# ---------------------------------------------------------------------------------------------------------- help


def test_help_is_short_and_gives_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    for command in [[name] for name in COMMANDS] + [["weights", kind] for kind in ("list", "show", "verify")]:
        assert main([*command, "--help"]) == 0
        text = capsys.readouterr().out
        # a line that can be copied, with nothing else in it
        example = re.search(rf"\n(example: deformmamba {' '.join(command)}.*)\n(.*)", text)
        assert example
        assert example[2].startswith(("every command also takes --threads", "for several GPUs: ")) or not example[2]
        assert text.count("\n") < 60
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deformmamba {deformmamba.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from deformmamba.cli import main; main(['--help']); main(['nonsense'])\n"
        "heavy = {'torch', 'numpy', 'nibabel', 'pydicom', 'matplotlib', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------- what cannot


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """{name: (arguments of `upscale` without -o and --model, text that the error line must contain)}."""
    good = scan(folder / "good.nii.gz")
    data = (folder / "good.nii.gz").read_bytes()
    (folder / "text.nii.gz").write_text("no voxels\n")
    (folder / "cut.nii.gz").write_bytes(data[:-30])
    (folder / "cut.nii").write_bytes(gzip.decompress(data)[:-30])
    (folder / "a\nb.nii").write_bytes(b"x")
    (folder / "notes.txt").write_text("no scan")
    nan = np.ones((16, 12, 3), np.float32)
    nan[1, 1, 1] = np.nan
    made = {
        "complex": scan(folder / "complex.nii", array=np.ones((16, 12, 3), np.complex64)),
        "nan": scan(folder / "nan.nii", array=nan),
        "inf": scan(folder / "inf.nii", array=nan * np.inf),
        "zero": scan(folder / "zero.nii", array=np.zeros((16, 12, 3), np.int16)),
        "pixel": scan(folder / "pixel.nii", array=np.ones((1, 1, 1), np.int16)),
        "four": scan(folder / "four.nii", (16, 12, 3, 2)),
    }
    return {
        "missing file": ([str(folder / "no.nii.gz")], "no such file"),
        "empty folder": ([str(folder / "empty")], "no DICOM image"),
        "text as NIfTI": ([str(folder / "text.nii.gz")], "not a NIfTI file"),
        "truncated gzip": ([str(folder / "cut.nii.gz")], "damaged"),
        "truncated": ([str(folder / "cut.nii")], "truncated"),
        "another format": ([str(folder / "notes.txt")], "not a scan that can be read"),
        "newline in the name": ([str(folder / "a\nb.nii")], r"a\nb.nii"),
        "complex": ([made["complex"]], "complex"),
        "NaN": ([made["nan"]], "NaN"),
        "infinite": ([made["inf"]], "infinite"),
        "all zero": ([made["zero"]], "zero"),
        "no such volume": ([made["four"], "--volume", "2"], "no volume 2"),
        "one volume": ([good, "--volume", "1"], "no volume 1"),
        "too small": ([made["pixel"], "--model", str(folder / "small.safetensors")], "smallest"),
        "axis": ([good, "--axis", "3"], "axis"),
        "axis too thin": ([good, "--axis", "0", "--model", str(folder / "small.safetensors")], "smallest"),
        "dtype": ([good, "--dtype", "float16"], "not as float16"),
        "overflow": ([good, "--dtype", "uint8"], "do not fit uint8"),
        "device": ([good, "--device", "abacus"], "not available on this machine"),
        "batch size": ([good, "--batch-size", "0"], "1 or more"),
        "no tile": ([good, "--overlap", "4"], "--tile N"),
        "large overlap": ([good, "--tile", "8", "--overlap", "8"], "overlap of 8 does not go with tiles of 8"),
        "negative overlap": ([good, "--tile", "8", "--overlap", "-1"], "overlap must be an integer of 0 or more"),
        "series of a file": ([good, "--series", "1"], "a single file"),
        "report": ([good, "--report", str(folder / "a.pdf")], ".html"),
        "uncertainty": ([good, "--uncertainty", str(folder / "a.png")], ".nii.gz"),
        "input as uncertainty": ([good, "--uncertainty", good], "the output is the input file"),
        "figure": ([good, "--figure", str(folder / "a.bmp")], ".png"),
        "figure folder": ([good, "--figure", str(folder / "nowhere" / "a.png")], "no folder"),
        "unknown option": ([good, "--sharpness", "11"], "--sharpness"),
        "unknown weights": ([good, "--model", "ixi-4y"], "unknown weights"),
        "missing weights": ([good, "--model", str(folder / "no.safetensors")], "no file"),
        "corrupted weights": ([good, "--model", str(folder / "bad.safetensors")], "not a usable checkpoint"),
        "pickled weights": ([good, "--model", str(folder / "weights.pth")], "pickle"),
    }


def stopped(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(arguments) == code
    said, errors = capsys.readouterr()
    assert said == ""
    assert errors.startswith("deformmamba: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    return errors


def test_bad_input_gets_one_line_and_leaves_no_file(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZeroFill, "minimum_size", 8)
    folder, out = tmp_path / "in", tmp_path / "out"
    for path in (folder, out, folder / "empty"):
        path.mkdir()
    content = Path(weights).read_bytes()
    (folder / "small.safetensors").write_bytes(content)
    (folder / "bad.safetensors").write_bytes(content[:-8] + b"\xff" * 8)
    (folder / "weights.pth").write_bytes(b"\x80\x02")
    cases = bad_inputs(folder)
    assert len(cases) == 34
    kept = out / "kept.nii.gz"
    kept.write_bytes(KEPT)
    for name, (arguments, said) in cases.items():
        for output in (kept, out / "new.nii.gz"):
            line = stopped(["upscale", "--model", weights, *arguments, "-o", str(output)], capsys)
            assert said in line, name
            assert [p.name for p in out.iterdir()] == ["kept.nii.gz"], name
            assert kept.read_bytes() == KEPT, name


def test_bad_outputs(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = scan(tmp_path / "in.nii.gz")
    before = Path(source).read_bytes()
    (tmp_path / "series").mkdir()
    (tmp_path / "same.nii.gz").symlink_to(source)
    (tmp_path / "file").write_bytes(KEPT)
    for output, said in (
        ("out.png", ".nii.gz"),
        ("out", "DICOM output needs DICOM input"),
        ("out.dcm", "DICOM output needs DICOM input"),
        ("no/out.nii", "no folder"),
        ("file/out.nii", "no folder"),
        ("in.nii.gz", "the output is the input file"),
        ("same.nii.gz", "the output is the input file"),
        ("x" * 300 + ".nii", "File name too long"),
    ):
        for command in (["upscale", "--model", weights], ["degrade", "--scale", "2"]):
            assert said in stopped([*command, source, "-o", str(tmp_path / output)], capsys), output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "in.nii.gz", "same.nii.gz", "series"]
    assert Path(source).read_bytes() == before
    assert main(["degrade", "--scale", "2", source, "-o", str(tmp_path / "series")]) == 0
    names = sorted(p.name for p in (tmp_path / "series").iterdir())
    assert names == ["in_desc-degraded.json", "in_desc-degraded.nii.gz"], "a folder that exists"


def test_a_closed_folder(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scan(tmp_path / "in.nii.gz")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root could write anywhere
    line = stopped(["upscale", source, "-o", str(tmp_path / "a.nii"), "--model", weights], capsys)
    assert f"no permission to write to the folder {tmp_path}" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["sharpen"], "sharpen"),
        (["upscale"], "INPUT"),
        (["upscale", "a.nii"], "-o"),
        (["degrade", "IN", "-o", "OUT"], "--scale"),
        (["degrade", "IN", "-o", "OUT", "--scale", "0"], "1 or more"),
        (["degrade", "IN", "-o", "OUT", "--scale", "two"], "--scale"),
        (["degrade", "IN", "-o", "OUT", "--scale", "60"], "too small"),
        (["degrade", "IN", "-o", "OUT", "--scale", "2", "--kind", "rician:snr=9"], "--kind 'k-space >> rician:snr=9'"),
        (["isotropic", "IN", "-o", "OUT", "--to", "0"], "--to is 0.0"),
        (["isotropic", "IN", "-o", "OUT", "--to", "9"], "close enough for voxels of 9 mm; smaller ones need --to MM"),
        (["upscale", "FOUR", "-o", "four.mgz"], "only a NIfTI file (.nii.gz) can contain the results of all"),
        (["evaluate", "--data", "IN"], "no MODEL given; name one or more"),
        (["evaluate", "WEIGHTS", "--data", "IN", "--scale", "2"], "[2, 4]"),
        (["evaluate", "WEIGHTS", "--data", "no.nii"], "no.nii: no such file"),
        (["evaluate", "WEIGHTS", "--data", "EMPTY"], "no volume found"),
        (["evaluate", "WEIGHTS", "--data", "IN", "--json", "no/such/a.json"], "no folder"),
        (["evaluate", "WEIGHTS", "--data", "IN", "--json", "a.txt"], ".json"),
        (["evaluate", "nothing-4x", "--data", "IN"], "unknown weights"),
        (["train", "no-recipe", "--data", "EMPTY", "--out", "EMPTY"], "no recipe"),
        (["train", "ixi-4x", "--data", "EMPTY", "--out", "EMPTY"], "no volume found"),
        (["weights"], "list"),
        (["weights", "show", "nothing-4x"], "unknown weights"),
        (["weights", "verify", "nothing-4x"], "unknown weights"),
        (["demo", "-o", "IN"], "cannot create this folder"),
        (["demo", "-o", "DIR", "--model", "nothing-4x"], "unknown weights"),
    ],
)
def test_other_commands_end_in_one_line_too(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    weights: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    source = scan(tmp_path / "in.nii")
    (tmp_path / "empty").mkdir()
    four = scan(tmp_path_factory.mktemp("four") / "four.nii", (16, 12, 3, 2))
    names = {
        "IN": source,
        "FOUR": four,
        "OUT": str(tmp_path / "out.nii"),
        "WEIGHTS": weights,
        "EMPTY": str(tmp_path / "empty"),
    }
    names["DIR"] = str(tmp_path / "empty" / "demo")
    assert said in stopped([names.get(argument, argument) for argument in arguments], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "in.nii"]


def test_a_bug_keeps_its_traceback(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(ZeroFill, "forward", bug)
    with pytest.raises(KeyError):
        main(["upscale", scan(tmp_path / "in.nii"), "-o", str(tmp_path / "out.nii"), "--model", weights])
    assert not (tmp_path / "out.nii").exists()


def test_advice_for_more_memory_is_what_the_command_has() -> None:
    for options, advice in (
        ({"batch_size": None, "device": "auto"}, "try --batch-size 1, --device cpu or a machine with more of it"),
        ({"batch": None, "accumulate": None}, "try --accumulate 4 or a machine with more of it"),
        ({}, "try a machine with more of it"),
    ):
        assert _message(MemoryError(), options) == f"out of memory; {advice}"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 2, "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"), 2, "out of memory"),
        (OSError(28, "No space left on device", "/a/b"), 2, "/a/b: No space left on device"),
    ],
)
def test_interrupted(
    tmp_path: Path,
    weights: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    source, output = scan(tmp_path / "in.nii"), tmp_path / "out.nii"
    output.write_bytes(KEPT)

    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ZeroFill, "forward", stop)
    assert said in stopped(["upscale", source, "-o", str(output), "--model", weights], capsys, code)
    assert output.read_bytes() == KEPT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii", "out.nii"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_for_real(tmp_path: Path, weights: str) -> None:
    """An interrupt during writing: exit code 130, one line, the old file unchanged, no other file."""
    source = scan(tmp_path / "in.nii", (256, 256, 40))
    output = tmp_path / "out.nii.gz"
    output.write_bytes(KEPT)
    command = [sys.executable, "-m", "deformmamba", "upscale", source, "-o", str(output), "--model", weights]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1200):
            if any(p.name.startswith(".") for p in tmp_path.iterdir()):
                break
            time.sleep(0.05)
        else:
            pytest.fail("it never began to write")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "deformmamba: interrupted; no half-written file is left"
    assert "Traceback" not in errors
    assert output.read_bytes() == KEPT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii", "out.nii.gz"]


def test_no_patient_in_any_line(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    import pydicom

    intact = pydicom.dcmread(str(get_testdata_file("MR_small.dcm", download=False)))
    intact.PatientName, intact.PatientID = "SECRET^NAME", "SECRET-ID"
    path, output = tmp_path / "a.dcm", tmp_path / "out.nii.gz"
    intact.save_as(path)
    assert main(["upscale", str(path), "-o", str(output), "--model", weights]) == 0
    assert "SECRET" not in "".join(capsys.readouterr())
    assert b"SECRET" not in gzip.decompress(output.read_bytes())
    path.write_bytes(path.read_bytes()[:2000])
    assert "SECRET" not in stopped(["upscale", str(path), "-o", str(output), "--model", weights], capsys)
