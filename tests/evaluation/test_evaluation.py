"""Evaluation: one degradation for all models, values by subject, intervals for enough subjects, files, a figure."""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.cli import main
from deformmamba.cli.evaluate import chosen
from deformmamba.data.patches import PatchDataset, Scan, load_slices
from deformmamba.data.prepared import write_prepared
from deformmamba.data.thick_slices import ThickSliceDataset
from deformmamba.errors import InvalidArgument
from deformmamba.evaluation.assessment import assess, lesions, out_of_domain
from deformmamba.evaluation.compare import compare, evaluate, finite, mean_scores
from deformmamba.inference import upscale
from deformmamba.metrics import hfen, psnr, ssim
from deformmamba.models import Bicubic, BSpline, SRModel, ZeroFill, from_pretrained
from deformmamba.physics.consistency import Consistency
from deformmamba.physics.degradations import Degradation, parse
from deformmamba.physics.kspace import degrade
from deformmamba.volume import Volume, write_volume


def smooth(seed: int, n: int = 3) -> np.ndarray:
    """(16, 24, n): a few waves and a bright block, in a scanner's units."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:24] / 8
    image = 300 + 80 * np.sin(rng.uniform(1, 3) * x + seed) + 60 * np.cos(rng.uniform(1, 3) * y)
    image[5:10, 8:14] += 250
    return (image[:, :, None] * rng.uniform(0.8, 1.2, n)).astype(np.float32)


@pytest.fixture
def scans(tmp_path: Path) -> list[Scan]:
    """Seven volumes of six subjects."""
    made = []
    for k, subject in enumerate(["a", "a", "b", "c", "d", "e", "f"]):
        path = tmp_path / "scans" / f"sub-{subject}_run-{k}_T2w.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_volume(path, Volume(smooth(k), np.diag([-1.0, -1, 5, 1])))
        made.append(Scan(path, subject, "test", "T2 brain"))
    return made


MODELS: dict[str, SRModel] = {"bicubic": Bicubic(scale=2), "zero-fill": ZeroFill(scale=2)}


def test_a_row_is_the_scores_of_what_upscale_gives(scans: list[Scan]) -> None:
    seen: list[Any] = []
    (row,) = evaluate(MODELS["bicubic"], scans[:1], metrics=["hfen"], slices=True, visit=lambda *all: seen.append(all))
    hr = torch.from_numpy(load_slices(scans[0].path, 2).array)
    sr = upscale(MODELS["bicubic"], degrade(hr, 2), axis=0)
    assert row["psnr"] == pytest.approx(psnr(sr, hr), abs=1e-3)
    assert row["ssim"] == pytest.approx(ssim(sr, hr), abs=1e-5)
    assert row["hfen"] == pytest.approx(hfen(sr, hr), abs=1e-5)
    assert (row["file"], row["subject"], row["group"], row["slices"]) == (scans[0].path.name, "a", "T2 brain", 3)
    assert {name: len(values) for name, values in row["by_slice"].items()} == {"psnr": 3, "ssim": 3, "nmse": 3}
    ((scan, given, result),) = seen
    assert scan == scans[0]
    assert torch.equal(given, hr)
    assert_close(result, sr)


def test_means_are_over_subjects(scans: list[Scan]) -> None:
    rows = evaluate(MODELS["bicubic"], scans)
    by_hand = np.mean([np.mean([r["psnr"] for r in rows if r["subject"] == s]) for s in "abcdef"])
    assert mean_scores(rows)["psnr"] == pytest.approx(by_hand)
    assert mean_scores(rows)["psnr"] != pytest.approx(np.mean([r["psnr"] for r in rows]))
    assert "by_slice" not in rows[0]


def test_the_degradation_is_the_one_named(scans: list[Scan]) -> None:
    rician = parse("k-space >> rician:snr=10", scale=2)
    plain = evaluate(MODELS["bicubic"], scans[:2])
    noisy, other = (evaluate(MODELS["bicubic"], scans[:2], degradation=rician, seed=seed) for seed in (0, 1))
    assert noisy[0]["psnr"] < plain[0]["psnr"] - 1
    assert noisy[0]["psnr"] != other[0]["psnr"], "the seed matters"
    again = evaluate(MODELS["bicubic"], scans[1::-1], degradation=rician)
    assert [r["psnr"] for r in again] == [r["psnr"] for r in noisy[::-1]], "and the order of the volumes does not"


def test_noise_is_relative_to_the_brightness_of_the_volume(tmp_path: Path) -> None:
    scores = []
    for factor in (1, 1024):  # a power of two: bit-equal after normalisation
        path = tmp_path / "same.nii.gz"
        write_volume(path, Volume(smooth(0) * np.float32(factor), np.eye(4)))
        scores += evaluate(MODELS["bicubic"], [path], degradation=parse("k-space >> noise:snr=20", scale=2))
    assert scores[0]["psnr"] == pytest.approx(scores[1]["psnr"], abs=1e-3)


def test_half_pixel_models_are_for_half_pixel_degradations(scans: list[Scan]) -> None:
    area = parse("area", scale=2)
    with pytest.raises(ValueError, match=r"area:scale=2 shrinks by 2 on the half-pixel grid, but Bicubic .* origin"):
        evaluate(Bicubic(scale=2), scans[:1], degradation=area)
    with pytest.raises(ValueError, match="shrinks by 4"):
        evaluate(Bicubic(scale=2), scans[:1], degradation=parse("k-space", scale=4))
    (row,) = evaluate(Bicubic(scale=2, grid="half-pixel"), scans[:1], degradation=area)
    assert row["psnr"] > 25


def test_data_consistency_is_for_the_k_space_crop_alone(scans: list[Scan]) -> None:
    believer = Bicubic(scale=2)
    believer.provenance = {"consistency": True}
    crop, blur = parse("k-space", scale=2), parse("blur:sigma=1 >> subsample", scale=2)
    for degradation, differs in ((crop, True), (blur, False)):
        with_it, without = (evaluate(m, scans[:1], degradation=degradation) for m in (believer, Bicubic(scale=2)))
        assert (with_it[0]["psnr"] != without[0]["psnr"]) == differs


def test_an_interval_from_five_subjects_on(scans: list[Scan]) -> None:
    many = compare(MODELS, scans)
    assert many.against == "bicubic"
    assert set(many.differences) == {"zero-fill"}
    spread, difference = many.summary["zero-fill"]["psnr"], many.differences["zero-fill"]["psnr"]
    assert (spread.n, spread.over, difference.n) == (6, "subjects", 6)
    assert spread.interval is not None
    assert spread.interval[0] < spread.mean < spread.interval[1]
    means = [mean_scores(many.rows[name])["psnr"] for name in MODELS]
    assert difference.mean == pytest.approx(means[1] - means[0])
    assert difference.interval is not None
    table = many.table()
    assert "7 volumes of 6 subjects at 2x, protocol volume, degradation k-space:scale=2,output=magnitude" in table
    assert f"{spread.mean:.2f} ± {spread.std:.2f} [{spread.interval[0]:.2f}, {spread.interval[1]:.2f}]" in table
    assert f"{difference.mean:+.2f} ± " in table
    assert "confidence interval" in table

    few = compare(MODELS, scans[:4], against="zero-fill")
    spread = few.summary["bicubic"]["psnr"]
    assert (spread.n, spread.over, spread.interval) == (12, "slices", None)
    assert few.differences["bicubic"]["psnr"].interval is None
    table = few.table()
    assert "standard deviation over slices (with fewer than 5 subjects: no interval)" in table
    assert "difference from zero-fill, paired by subject (3 subjects: no interval)" in table
    assert "[" not in table.replace("[dB]", "")


def test_a_column_without_values_by_slice_is_marked(scans: list[Scan]) -> None:
    few = compare(MODELS, scans[:4], metrics=["hfen"])
    table = few.table()
    assert "standard deviation over slices (with fewer than 5 subjects: no interval); *: over subjects\n" in table
    assert table.splitlines()[3].split() == ["psnr", "[dB]", "ssim", "nmse", "hfen*"]
    assert few.summary["bicubic"]["hfen"].over == "subjects"
    assert "*" not in compare(MODELS, scans, metrics=["hfen"]).table()


def test_no_rows_have_no_mean() -> None:
    with pytest.raises(ValueError, match="mean_scores: there are no rows"):
        mean_scores([])


def test_what_is_written_can_be_read_and_joined(scans: list[Scan]) -> None:
    result = compare(MODELS, scans[:3], metrics=["hfen"], protocol="slice", seed=3)
    told = json.loads(json.dumps(result.to_dict()))
    assert (told["protocol"], told["degradation"], told["seed"]) == ("slice", "k-space:scale=2,output=magnitude", 3)
    ours = told["models"]["zero-fill"]
    assert set(ours["subjects"]["psnr"]) == {"a", "b"}
    assert ours["mean"] == mean_scores(result.rows["zero-fill"])
    assert ours["difference"]["hfen"]["n"] == 2
    assert told["models"]["bicubic"]["difference"] is None
    lines = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert len(lines) == 6
    assert {line["model"] for line in lines} == {"bicubic", "zero-fill"}
    assert {line["protocol"] for line in lines} == {"slice"}
    assert float(lines[3]["psnr"]) == result.rows["zero-fill"][0]["psnr"]
    assert "by_slice" not in lines[0]


def test_the_weights_and_the_consistency_of_each_model_are_written(scans: list[Scan], tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    Bicubic(scale=2).save_pretrained(path, provenance={"consistency": "exact"})
    models = {"bicubic": Bicubic(scale=2), "mine": from_pretrained(path)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blur = parse("blur:sigma=1 >> subsample", scale=2)
    seen = []
    cases: list[tuple[Consistency | None, Degradation | None, list[str]]] = [
        (None, None, ["off", "exact"]),  # the default of each model
        (None, blur, ["off", "off"]),  # which is for k-space crops only
        ("off", None, ["off", "off"]),
    ]
    for consistency, degradation, applied in cases:
        made = compare(models, scans[:1], consistency=consistency, degradation=degradation)
        told = made.to_dict()["models"]
        assert [told[name]["consistency"] for name in models] == applied
        assert [told[name]["sha256"] for name in models] == [None, digest]
        lines = list(csv.DictReader(io.StringIO(made.to_csv())))
        assert [(line["sha256"], line["consistency"]) for line in lines] == [("", applied[0]), (digest, applied[1])]
        assert list(lines[0])[:2] == ["model", "source"]
        seen.append(float(lines[1]["psnr"]))
    assert len({*seen}) == 3


def test_json_has_null_for_a_value_that_is_not_finite(scans: list[Scan], tmp_path: Path) -> None:
    slices = smooth(0)
    slices[..., 1] = 0
    write_volume(tmp_path / "sub-a_T2w.nii.gz", Volume(slices, np.diag([-1.0, -1, 5, 1])))
    command = ["evaluate", "--scale", "2", "--data", str(tmp_path / "sub-a_T2w.nii.gz"), "--json"]
    assert main([*command, str(tmp_path / "scores.json")]) == 0
    told = json.loads((tmp_path / "scores.json").read_text("utf-8"), parse_constant=pytest.fail)
    first, empty, last = told["models"]["bicubic"]["volumes"][0]["by_slice"]["psnr"]
    assert first > 20
    assert empty is None
    assert last > 20
    assert finite({"a": [np.inf, (1.0, np.nan)], "b": 3, "c": "inf"}) == {"a": [None, [1.0, None]], "b": 3, "c": "inf"}


def test_a_name_in_two_folders_is_refused_and_a_pattern_separates_single_scans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(("siteA/sub-01", "siteA/sub-02", "siteB/sub-01", "siteC/sub-03")):
        path = tmp_path / f"{name}_T2w.nii.gz"
        path.parent.mkdir(exist_ok=True)
        write_volume(path, Volume(smooth(k), np.diag([-1.0, -1, 5, 1])))
    a, b, c = (str(tmp_path / f"site{name}") for name in "ABC")
    one, two = f"{a}/sub-01_T2w.nii.gz", f"{b}/sub-01_T2w.nii.gz"
    for places, folders in (
        ((a, b), f"{a} and {b}"),
        ((a, two), f"{a} and the single scans"),
        ((a, a), f"{a} (again)"),
    ):
        assert main(["evaluate", "--scale", "2", "--data", *places]) == 2
        errors = capsys.readouterr().err
        assert f"{folders}: both have a subject sub-01, which may be one person or two" in errors
        assert errors.count("\n") == 1
    assert [scan.subject for scan in chosen([c, a], None, None)] == ["sub-03", "sub-01", "sub-02"]
    assert [scan.subject for scan in chosen([one, two], None, None)] == ["sub-01"] * 2
    pattern = r"site.[/\\]sub-\d+"
    assert [scan.subject[:5] for scan in chosen([one, two], None, None, pattern)] == ["siteA", "siteB"]
    assert main(["evaluate", "--scale", "2", "--data", one, "--subject", "((("]) == 2
    assert "'(((' is not a regular expression" in capsys.readouterr().err


def test_the_default_split_is_that_of_each_folder(tmp_path: Path) -> None:
    for name, splits in (("one", ("train", "val")), ("two", ("val", "val")), ("none", ("train", "test"))):
        (tmp_path / name).mkdir()
        lines = ["participant_id\tfile\tsplit\tcontrast"]
        for k, split in enumerate(splits):
            (tmp_path / name / f"{k}.nii").touch()
            lines.append(f"{name}-{k}\t{k}.nii\t{split}\tT2")
        (tmp_path / name / "volumes.tsv").write_text("\n".join(lines) + "\n")
    one, two, none, single = (str(tmp_path / name) for name in ("one", "two", "none", "single.nii"))
    found = chosen([one, single, two], None, None, default="val")
    assert [(scan.path.parent.name, scan.split) for scan in found if scan.split] == [
        ("one", "val"),
        ("two", "val"),
        ("two", "val"),
    ]
    assert [str(scan.path) for scan in found if not scan.split] == [single]
    refused = "none: no volume in split 'val', the default; its splits are test, train: name one with --split$"
    with pytest.raises(InvalidArgument, match=refused):
        chosen([one, none], None, None, default="val")
    with pytest.raises(InvalidArgument, match="none: no volume of group 'T2' in split 'val'"):
        chosen([none], None, "T2", default="val")
    assert len(chosen([none], "test", None, default="val")) == 1
    assert len(chosen([one, none], None, None)) == 4


def test_the_slice_that_is_shown_is_turned_as_a_radiologist_sees_it(scans: list[Scan]) -> None:
    shown = compare(MODELS, scans[:2], show=True, at=2).shown
    assert shown is not None
    hr = torch.from_numpy(load_slices(scans[0].path, 2).array)
    np.testing.assert_array_equal(shown.hr, hr[2].numpy().T)  # axes L, P, S: columns already run to the left
    assert set(shown.results) == set(MODELS)
    for name, image in shown.results.items():
        expected = upscale(MODELS[name], degrade(hr, 2), axis=0)[2].numpy().T
        np.testing.assert_allclose(image, expected, rtol=1e-4)
    assert shown.title == "sub-a_run-0_T2w.nii.gz, slice 2"
    middle = compare(MODELS, scans[:1], show=True).shown
    assert middle is not None
    assert middle.title.endswith("slice 1")
    assert compare(MODELS, scans[:1]).shown is None
    with pytest.raises(ValueError, match="no slice 3; slices: 0 to 2"):
        compare(MODELS, scans[:1], show=True, at=3)


@pytest.mark.parametrize("phase", [False, True])
def test_prepared_slices_are_scored_as_magnitudes(phase: bool, tmp_path: Path) -> None:
    """fastMRI's slices are complex, and the phase takes part in the degradation."""
    slices = np.moveaxis(smooth(0), 2, 0) / 500
    turned = slices * np.exp(0.3j * np.arange(24)) if phase else slices
    path = tmp_path / "a.safetensors"
    write_prepared(path, turned, {"spacing_mm": [0.5, 0.7]})
    result = compare({"bicubic": Bicubic(scale=2)}, [path], show=True)
    lr = degrade(torch.from_numpy(turned), 2)
    expected = psnr(upscale(Bicubic(scale=2), lr.float(), axis=0), slices)
    assert result.rows["bicubic"][0]["psnr"] == pytest.approx(expected, abs=1e-2)
    assert result.shown is not None
    np.testing.assert_allclose(result.shown.hr, slices[1], atol=1e-6)
    assert result.shown.spacing == (0.5, 0.7)


def test_what_cannot_be_compared(scans: list[Scan]) -> None:
    with pytest.raises(ValueError, match=r"scales \[2, 4\]"):
        compare({**MODELS, "other": BSpline(scale=4)}, scans)
    with pytest.raises(ValueError, match="0 volumes"):
        compare(MODELS, [])
    with pytest.raises(ValueError, match="against is 'best'; it must be one of bicubic, zero-fill"):
        compare(MODELS, scans, against="best")
    with pytest.raises(ValueError, match=r"unknown metric 'vif'.*hfen"):
        evaluate(MODELS["bicubic"], scans, metrics=["vif"])


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_writes_table_files_and_figure(
    scans: list[Scan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Bicubic(scale=2, a=-0.75).save_pretrained(tmp_path / "sharp.safetensors")
    files = [tmp_path / name for name in ("scores.json", "scores.csv", "figure.png")]
    command = ["evaluate", str(tmp_path / "sharp.safetensors"), "--data", str(scans[0].path.parent), "--slice", "0"]
    for path in files:
        command += [f"--{path.stem if path.stem == 'figure' else path.suffix[1:]}", str(path)]
    assert main(command) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    result = json.loads(files[0].read_text("utf-8"))
    name = str(tmp_path / "sharp.safetensors")
    assert list(result["models"]) == ["bicubic", "b-spline", "zero-filled k-space", name]
    assert result["against"] == name
    assert f"difference from {name}, paired by subject" in said
    assert len(files[1].read_text("utf-8").splitlines()) == 1 + 4 * 7
    assert files[2].stat().st_size > 10_000


def test_the_command_takes_other_degradations(
    scans: list[Scan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["evaluate", "--scale", "2", "--data", str(scans[0].path)]
    assert main([*one, "--degradation", "area", "--metric", "hfen", "--protocol", "foreground"]) == 0
    said = capsys.readouterr().out
    assert "degradation area:scale=2" in said
    assert "hfen" in said
    assert "zero-filled" not in said, "which is not on the half-pixel grid"
    assert main([*one, "--degradation", "blur:sigma=1 >> subsample >> rician:snr=30", "--seed", "2"]) == 0
    assert "blur:sigma=1.0 >> subsample:scale=2 >> rician:snr=30.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "2", "--degradation", "magic"], "degradations: k-space"),
        (["--scale", "2", "--slice", "1"], "--figure"),
        (["--scale", "2", "--figure", "a.gif"], ".png"),
        (["--scale", "2", "--csv", "a.txt"], ".csv"),
        (["--scale", "2", "--against", "best"], "--against is 'best'"),
        (["--scale", "2", "--figure", "a.png", "--slice", "9"], "no slice 9"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    message: str,
    scans: list[Scan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--data", str(scans[0].path), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_split_or_group_without_volumes_is_said(scans: list[Scan], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(scans[0].path.parent)
    assert main(["evaluate", "--scale", "2", "--data", folder, "--group", "knee"]) == 2
    assert "group 'knee'" in capsys.readouterr().err


def test_a_seed_that_generators_do_not_take_is_refused_before_a_volume_is_read(scans: list[Scan]) -> None:
    model = ZeroFill(scale=2)
    for run in (
        lambda seed: evaluate(model, scans, seed=seed),
        lambda seed: compare({"a": model}, scans, seed=seed),
        lambda seed: assess(model, scans, seed=seed),
        lambda seed: out_of_domain(model, scans, seed=seed),
        lambda seed: lesions(model, scans, seed=seed),
        lambda seed: PatchDataset(scans, scale=2, patch=8, length=4, seed=seed),
        lambda seed: ThickSliceDataset(scans, patch=8, length=4, seed=seed),
    ):
        with pytest.raises(InvalidArgument, match=r"^seed is -1; it must be a whole number, 0 or more$"):
            run(-1)


def test_a_seed_of_numpy_is_written_as_a_number(scans: list[Scan]) -> None:
    made = compare({"a": ZeroFill(scale=2)}, scans, seed=np.int64(3))
    assert json.loads(json.dumps(made.to_dict()))["seed"] == 3
