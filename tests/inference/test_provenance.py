"""The provenance of an output in its header, JSON file, report and figure; 4-D scans."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_made import classic, oblique

from deformmamba.cli import main
from deformmamba.inference import upscale, upscale_file
from deformmamba.inference.choice import ranked_weights
from deformmamba.inference.cohort import upscale_cohort
from deformmamba.inference.provenance import derivation, weights_hash, weights_name
from deformmamba.models import VDSR, ZeroFill
from deformmamba.volume import Volume, VolumeError, not_a_scan, read_volume, write_volume

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    ZeroFill(scale=2).save_pretrained(path, {"spacings_mm": [9, 9]})
    return str(path)


def volume(shape: tuple[int, ...] = (12, 10, 3), seed: int = 0) -> Volume:
    array = np.random.default_rng(seed).uniform(1, 900, shape).astype(np.float32)
    return Volume(array, np.diag([-1.0, 1, 4, 1]))


def test_an_output_names_what_made_it_and_its_warnings(tmp_path: Path, weights: str) -> None:
    write_volume(tmp_path / "in.nii", volume())
    with pytest.warns(UserWarning, match="may be worse than reported"):
        done = upscale_file(weights, tmp_path / "in.nii", tmp_path / "out.nii.gz", report=tmp_path / "a.html")
    said = nibabel.load(tmp_path / "out.nii.gz").header["descrip"].item().decode()
    assert said.startswith("deformmamba 0.")
    assert "UNLIKE TRAINING DATA, ZeroFill 2x, plain.safetensors" in said
    beside = json.loads((tmp_path / "out.json").read_text("utf-8"))
    by = beside["GeneratedBy"][0]
    assert (by["Name"], by["model"], by["weights"], by["scale"]) == ("deformmamba", "ZeroFill", "plain.safetensors", 2)
    assert len(by["sha256"]) == 64
    assert beside["Warnings"] == list(done.cautions)
    assert "were trained on 9 to 9 mm" in beside["Warnings"][0]
    page = (tmp_path / "a.html").read_text("utf-8")
    assert page.index("ZeroFill, 2x, plain.safetensors, deformmamba 0.") < page.index("Warning: the pixels are")
    assert page.index("Warning: the pixels are") < page.index("<canvas") if "<canvas" in page else True
    assert "an output of this package" in not_a_scan(tmp_path / "out.nii.gz")
    (tmp_path / "out.json").unlink()
    assert "by its header" in not_a_scan(tmp_path / "out.nii.gz")


def test_what_the_reader_remarks_is_said_everywhere(tmp_path: Path) -> None:
    """A CT scan, and one that was interpolated: in the JSON file, in the report, in the header."""
    for file in (CASES / "dicom" / "rect_eq_thick").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.Modality = "CT"
        (tmp_path / "ct").mkdir(exist_ok=True)
        dataset.save_as(tmp_path / "ct" / file.name)
    wave = np.random.default_rng(0).uniform(1, 900, (48, 48, 3)).astype(np.float32)
    fine = upscale(ZeroFill(scale=2), wave, axis=2).clip(min=0)
    write_volume(tmp_path / "fine.nii", Volume(fine, np.diag([-1.0, 1, 4, 1])))
    for name, words, mark in (
        ("ct", "this is a CT scan", "UNLIKE TRAINING DATA"),
        ("fine.nii", "their k-space is filled to about", "WITH WARNINGS"),
    ):
        with pytest.warns(UserWarning, match=words):
            done = upscale_file(ZeroFill(scale=2), tmp_path / name, tmp_path / "out.nii", report=tmp_path / "r.html")
        facts = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert [words in text for text in facts["Warnings"]] == [True]
        assert facts["Warnings"] == list(done.cautions)
        assert words in (tmp_path / "r.html").read_text("utf-8")
        assert mark in nibabel.load(tmp_path / "out.nii").header["descrip"].item().decode()


@pytest.mark.slow
def test_a_folder_is_named_by_a_dot_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classic(tmp_path / "scan", oblique(3, (0.8, 0.8, 3.0)), (20, 18, 9))
    (tmp_path / "scan.json").write_text('{"SkullStripped": true}')
    monkeypatch.chdir(tmp_path / "scan")
    for command, kind in (("upscale", "sr"), ("isotropic", "iso")):
        words = [command, ".", "-o", f"../{kind}.nii.gz", "--figure", f"../{kind}.png", "--device", "cpu", "--quiet"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main([*words, *(["--model", "ixi-2x"] if kind == "sr" else ["--to", "0.8"])]) == 0
        facts = json.loads((tmp_path / f"{kind}.json").read_text("utf-8"))
        assert facts["Sources"] == ["scan"]
        assert facts["SkullStripped"] is True
        assert (tmp_path / f"{kind}.png").is_file()


def test_an_uncertainty_map_does_not_pass_for_the_image(tmp_path: Path) -> None:
    source = volume()
    image = nibabel.Nifti1Image(source.array, source.affine)
    image.header["cal_min"], image.header["cal_max"] = 100, 700
    nibabel.save(image, tmp_path / "in.nii")
    upscale_file(
        VDSR(scale=2, layers=2, width=4), tmp_path / "in.nii", tmp_path / "sr.nii", uncertainty=tmp_path / "sd.nii"
    )
    image, spread = (nibabel.load(tmp_path / f"{name}.nii").header for name in ("sr", "sd"))
    assert b", uncertainty map, VDSR 2x" in spread["descrip"].item()
    assert b"uncertainty" not in image["descrip"].item()
    assert (spread["cal_min"], spread["cal_max"]) == (0, 0)
    assert (image["cal_min"], image["cal_max"]) == (100, 700)
    assert "an output of this package" in not_a_scan(tmp_path / "sd.nii")


def test_mgh_cannot_keep_an_orientation_unknown(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume().array, None)
    image.header["pixdim"][1:4] = 1, 1, 4
    nibabel.save(image, tmp_path / "in.nii")
    assert read_volume(tmp_path / "in.nii").codes == (0, 0)
    with pytest.warns(UserWarning, match="out.mgz: the scan states no orientation, but MGH files always do"):
        upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.mgz")
    upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "other.nii.gz")
    assert read_volume(tmp_path / "other.nii.gz").codes == (0, 0)


def test_numbers_of_numpy_are_plain_numbers_in_the_json_file(tmp_path: Path) -> None:
    write_volume(tmp_path / "in.nii", volume())
    # 8 bits overflow in the product of tile, tile and scale
    settings = {"volume": np.int8(0), "axis": np.int64(2), "tile": np.uint8(8), "effective": np.False_}
    for run in (
        lambda: upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "in_desc-sr.nii", **settings),
        lambda: upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path / "o", **settings),
    ):
        run()
    for path in (tmp_path / "in_desc-sr.json", tmp_path / "o" / "in_desc-sr.json"):
        by = json.loads(path.read_text("utf-8"))["GeneratedBy"][0]
        assert (by["volume"], by["axis"], by["tile"], by["effective"]) == (0, 2, 8, False)
    again = upscale_cohort(ZeroFill(scale=2), tmp_path, tmp_path / "o", **settings)
    assert [outcome.status for outcome in again if outcome.source == "in.nii"] == ["skipped"]


def test_a_json_file_of_another_origin_stays(tmp_path: Path) -> None:
    write_volume(tmp_path / "in.nii", volume())
    (tmp_path / "out.json").write_text('{"EchoTime": 0.1}')
    with pytest.warns(UserWarning, match="of another origin and stays"):
        upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii")
    assert (tmp_path / "out.json").read_text() == '{"EchoTime": 0.1}'


def test_a_scan_stays_a_scan_beside_an_output_of_the_same_name(tmp_path: Path) -> None:
    """s.json belongs to the output s.nii, not to the scan s.mgz; renamed together, the output stays an output."""
    model = ZeroFill(scale=2)
    write_volume(tmp_path / "s.mgz", volume())
    for _ in range(2):
        upscale_file(model, tmp_path / "s.mgz", tmp_path / "s.nii")
        assert not_a_scan(tmp_path / "s.mgz") == ""
        assert json.loads((tmp_path / "s.json").read_text("utf-8"))["OutputFile"] == "s.nii"
    assert "by the JSON file beside it" in not_a_scan(tmp_path / "s.nii")
    (tmp_path / "s.nii").rename(tmp_path / "t.nii")
    (tmp_path / "s.json").rename(tmp_path / "t.json")
    assert "by the JSON file beside it" in not_a_scan(tmp_path / "t.nii")


def test_the_json_file_of_another_output_of_the_same_name_stays(tmp_path: Path) -> None:
    write_volume(tmp_path / "in.nii", volume())
    upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.mgz")
    with pytest.warns(UserWarning, match="belongs to the output out.mgz and stays"):
        upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii")
    assert "an output of this package" in not_a_scan(tmp_path / "out.mgz")
    (tmp_path / "out.mgz").unlink()
    upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii")
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["OutputFile"] == "out.nii"


def test_weights_in_a_folder_have_its_name_with_and_without_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ZeroFill(scale=2).save_pretrained(tmp_path / "w3")
    model = ZeroFill(scale=2)
    for source in (tmp_path / "w3", f"{tmp_path}/w3/"):
        model.source = str(source)
        assert weights_name(model) == "w3"
    monkeypatch.chdir(tmp_path / "w3")
    model.source = "."
    assert weights_name(model) == "w3"


def test_what_is_no_scan_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    model = ZeroFill(scale=2)
    with pytest.raises(VolumeError, match=r"mask or label image .*--as-image"):
        upscale_file(model, CASES / "nifti" / "label.nii.gz", tmp_path / "out.nii")
    assert not list(tmp_path.iterdir())
    upscale_file(model, CASES / "nifti" / "label.nii.gz", tmp_path / "out.nii", as_image=True)
    with pytest.raises(VolumeError, match="an output of this package"):
        upscale_file(model, tmp_path / "out.nii", tmp_path / "again.nii")


@pytest.mark.parametrize("axis", [0, 2])
def test_every_volume_of_a_4d_scan_goes_into_one_file(tmp_path: Path, axis: int) -> None:
    several = np.stack([volume(seed=k).array for k in range(3)], axis=3)
    image = nibabel.Nifti1Image(several, np.diag([-1.0, 1, 4, 1]))
    image.header.set_zooms((1, 1, 4, 2.5))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "in.nii.gz")
    model = ZeroFill(scale=2)
    done = upscale_file(
        model,
        tmp_path / "in.nii.gz",
        tmp_path / "out.nii.gz",
        axis=axis,
        uncertainty=tmp_path / "u.nii",
        keep=lambda n: {0},
    )
    assert done.n_volumes == 3
    made = nibabel.load(tmp_path / "out.nii.gz")
    assert made.header.get_zooms()[3] == 2.5
    assert made.header.get_xyzt_units() == ("mm", "sec")
    assert nibabel.load(tmp_path / "u.nii").shape == made.shape
    for k in range(3):
        expected = upscale(model, volume(seed=k), axis=axis, ensemble=True)
        # the slices run in other batches
        np.testing.assert_allclose(made.get_fdata()[..., k], expected.array, rtol=1e-4, atol=0.01)
        np.testing.assert_allclose(made.affine, expected.affine, atol=1e-5)  # a NIfTI header holds float32
    upscale_file(model, tmp_path / "in.nii.gz", tmp_path / "one.nii", volume=1, axis=axis)
    assert nibabel.load(tmp_path / "one.nii").shape == made.shape[:3]
    with pytest.raises(VolumeError, match="volume"):
        upscale_file(model, tmp_path / "in.nii.gz", tmp_path / "out.mgz", axis=axis)


@pytest.mark.long
def test_a_4d_scan_takes_the_memory_of_one_volume(tmp_path: Path) -> None:
    shape = (64, 64, 8, 60)
    nibabel.save(
        nibabel.Nifti1Image(np.random.default_rng(0).integers(1, 900, shape).astype(np.int16), np.eye(4)),
        tmp_path / "in.nii.gz",
    )
    script = (
        "import resource, sys; from deformmamba.inference import upscale_file; from deformmamba.models import ZeroFill;"
        "import nibabel, scipy; upscale_file(ZeroFill(scale=2), sys.argv[1], sys.argv[2] + '0.nii', volume=0);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "upscale_file(ZeroFill(scale=2), sys.argv[1], sys.argv[2]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "in.nii.gz"), str(tmp_path / "out.nii")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    output = 4 * 128 * 128 * 8 * 60
    assert os.path.getsize(tmp_path / "out.nii") > output
    assert 1024 * int(done.stdout) < output, "31 MB of output, 8 MB of input in float32"


@pytest.mark.parametrize(
    ("derivation", "label", "purpose"),
    [
        (None, "t2 SR", "super-resolution"),
        ("deformmamba 1, isotropic to 1 mm, thick", "t2 isotropic", "isotropic resampling"),
        ("deformmamba 1, degrade k-space:scale=2", "t2 degraded", "simulated lower resolution"),
    ],
)
def test_a_series_is_labelled_by_what_made_it(tmp_path: Path, derivation: str | None, label: str, purpose: str) -> None:
    scan = read_volume(CASES / "dicom" / "rect_eq_thick")
    write_volume(tmp_path / "out", scan, derivation=derivation)
    image = pydicom.dcmread(tmp_path / "out" / "0001.dcm")
    assert image.SeriesDescription == label
    assert image.ContributingEquipmentSequence[-1].ContributionDescription == purpose


def test_the_deviation_of_dicom_is_a_series_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = CASES / "dicom" / "rect_eq_thick"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upscale_file(VDSR(scale=2, layers=2, width=4), source, tmp_path / "sr", uncertainty=tmp_path / "sd")
    image, deviation = (pydicom.dcmread(tmp_path / name / "0003.dcm") for name in ("sr", "sd"))
    before = pydicom.dcmread(source / "000.dcm")
    assert (image.SeriesNumber, deviation.SeriesNumber) == (before.SeriesNumber + 1000, before.SeriesNumber + 2000)
    assert image.SeriesDescription == "t2 SR"
    assert deviation.SeriesDescription == "t2 SR standard deviation"
    assert image.WindowWidth == before.WindowWidth
    largest = read_volume(tmp_path / "sd").array.max()
    assert deviation.WindowWidth == pytest.approx(largest, rel=1e-3)
    assert deviation.WindowCenter == pytest.approx(largest / 2, rel=1e-3)
    assert image.SeriesInstanceUID != deviation.SeriesInstanceUID


def test_the_file_of_the_weights_is_read_once(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZeroFill.from_pretrained(weights)
    read = []
    monkeypatch.setattr("deformmamba.inference.provenance._hash_if_same", lambda model: read.append(1) or model.sha256)
    monkeypatch.setattr("deformmamba.inference.provenance._compared", {})
    for _ in range(3):
        assert weights_hash(model) == model.sha256
        derivation(model)
    assert len(read) == 1
    os.utime(weights, (2e9, 2e9))
    weights_hash(model)
    assert len(read) == 2


# ------------------------------------------------------------------------------------------- which weights, the command


def test_weights_are_ranked_by_pixel_contrast_and_anatomy(tmp_path: Path) -> None:
    def best(name: str, pixel: float) -> str:
        scan = Volume(np.ones((8, 8, 3), np.float32), np.diag([pixel, pixel, 5, 1]))
        return ranked_weights(scan, 2, path=tmp_path / name)[0].name

    assert best("sub-1_T2w.nii.gz", 3.76) == "ixi-4x"
    assert best("sub-1_T2w.nii.gz", 1.5) == "ixi-2x"
    assert best("lumbar_spine_T2w.nii.gz", 4.0) == "spine-4x"
    (tmp_path / "x.json").write_text('{"BodyPartExamined": "LSPINE"}')
    assert best("x.nii.gz", 4.0) == "spine-4x"
    fits = ranked_weights(volume(), 2)
    assert [fit.distance for fit in fits] == sorted(fit.distance for fit in fits)
    assert "outside the trained" in fits[0].reason


def test_the_command_says_which_weights_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = tmp_path / "sub-1_T2w.nii"
    array = np.random.default_rng(0).uniform(1, 900, (16, 16, 1)).astype(np.float32)
    write_volume(scan, Volume(array, np.diag([3.76, 3.76, 5, 1])))
    assert main(["inspect", str(scan)]) == 0
    said = capsys.readouterr().out
    assert "Slices taken along k (axial), guessed from the voxel size" in said
    assert said.index("ixi-4x: pixels of 3.76 x 3.76 mm are inside the trained") < said.index("ixi-2x: ")
    assert main(["inspect", str(scan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"][0]["name"] == "ixi-4x"
    out = tmp_path / "out" / ""
    assert main(["upscale", str(scan), f"{tmp_path}/out/", "--model", "auto", "--device", "cpu"]) == 0
    assert "--model auto: ixi-4x: pixels of 3.76 x 3.76 mm are inside" in capsys.readouterr().out
    assert sorted(path.name for path in Path(out).iterdir()) == ["sub-1_desc-sr_T2w.json", "sub-1_desc-sr_T2w.nii"]


def test_choices_on_the_command_line(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = ["-o", str(tmp_path / "a.nii"), "--model", weights, "--device", "cpu"]
    for source, said, cure in (
        ("dicom/localiser", "choose one with --stack K", ["--stack", "1"]),
        ("dicom/zero_byte_tail", "--partial", ["--partial"]),
        ("nifti/nan_bg.nii.gz", "--nan zero", ["--nan", "zero"]),
        ("nifti/label.nii.gz", "--as-image", ["--as-image"]),
    ):
        assert main(["upscale", str(CASES / source), *target]) == 2
        assert said in capsys.readouterr().err
        assert main(["upscale", str(CASES / source), *target, *cure]) == 0, source
        capsys.readouterr()
    assert main(["inspect", str(CASES / "dicom" / "localiser")]) == 2
    assert "--stack K" in capsys.readouterr().err
    assert main(["upscale", str(CASES / "dicom" / "rect_eq_thick"), *target]) == 0
    assert "slices taken along k (axial), from the file" in capsys.readouterr().out
    scan = str(CASES / "nifti" / "quatern_over1.nii")
    for kind, cure in (
        ("k-space:scale=2", "give one factor for both"),
        ("blur:sigma=1", "give for example --kind 'k-space >> blur:sigma=1'"),
    ):
        assert main(["degrade", scan, "-o", "x.nii", "--scale", "4", "--kind", kind]) == 2
        assert cure in capsys.readouterr().err
    assert main(["upscale", scan]) == 2
    assert "no output given; give it with -o OUTPUT" in capsys.readouterr().err


def test_advice_names_no_option_that_the_command_lacks() -> None:
    from deformmamba.cli.arguments import with_options

    message = 'a.nii: 3 voxels are NaN; nan="zero" (--nan zero) makes them 0'
    assert with_options(message, {"nan": "refuse"}) == "a.nii: 3 voxels are NaN; --nan zero makes them 0"
    assert with_options(message, {"data": "x"}) == 'a.nii: 3 voxels are NaN; in Python nan="zero" makes them 0'
    assert with_options("as_image=True (--as-image) takes it", {"as_image": False}) == "--as-image takes it"
    assert with_options("nothing (else) here", {}) == "nothing (else) here"
    assert with_options("to is 0; it must be more", {"to": 0.0}) == "--to is 0; it must be more"
    assert with_options("fit: batch_size is 0", {"batch_size": 0}) == "--batch-size is 0"
    assert with_options("recipe a: fit: lr is 0", {"lr": 0.0}) == "--lr is 0"
    assert with_options("recipe a: fit: lr is 0", {"lr": None}) == "recipe a: fit: lr is 0"  # the recipe's
    assert with_options("fit: ema is 2; to is 0", {"to": 0.0}) == "fit: ema is 2; to is 0"


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_leave_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    write_volume(tmp_path / "in.nii", volume((64, 64, 200)))
    out = tmp_path / "out"
    out.mkdir()
    command = ["upscale", str(tmp_path / "in.nii"), "-o", str(out / "a.nii"), "--ensemble", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "deformmamba", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        for _ in range(1800):
            if any(out.iterdir()) or process.poll() is not None:
                break
            time.sleep(0.1)
        assert any(path.name.startswith(".") for path in out.iterdir()), "it writes to a hidden name"
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert any(out.iterdir())
        write_volume(out / "b.nii", volume())  # the next writer removes the leftover
        assert [path.name for path in out.iterdir()] == ["b.nii"]
    else:
        assert process.returncode == 128 + number
        assert "interrupted; no half-written file is left" in errors
        assert not list(out.iterdir())
