"""The tables of the paper at a very small size: every row, resuming after a stop, the document, refused arguments."""

import json
import re
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deformmamba.cli import main
from deformmamba.data.patches import PatchDataset, Scan, find_scans
from deformmamba.evaluation import machine
from deformmamba.evaluation.machine import commit, hardware
from deformmamba.evaluation.tables import OURS, SIZES, TABLES, markdown
from deformmamba.losses import SRLoss
from deformmamba.models import MODELS, ZeroFill, from_pretrained
from deformmamba.training import budget
from deformmamba.training import comparison as tables
from deformmamba.training.budget import StepTimer, Validation, clock, seconds_a_step
from deformmamba.training.comparison import Plan, benchmark
from deformmamba.volume import Volume, write_volume

DATA = {"patch": 8}
NANO = {
    "SRCNN": (1e-3, {"kernels": [3, 1, 3], "widths": [4, 4]}),
    "VDSR": (1e-3, {"layers": 3, "width": 4}),
    "FMISR": (1e-3, {"widths": [4]}),
    "T2Net": (1e-3, {"width": 4, "blocks": 1}),
    "SwinIR": (1e-3, {"width": 8, "depths": [2], "heads": [2], "window": 4}),
    "HAT": (1e-3, {"width": 8, "depths": [2], "heads": [2], "window": 4, "squeeze": 2}),
    "DeformMambaSR": (1e-3, {"dims": [8, 12], "depths": [1, 1], "patch": 2, "d_state": 4, "skip": "zero-fill"}),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four volumes of 32 x 32 x 2 voxels of four people, two for training and two for scoring; very small networks."""
    monkeypatch.setitem(SIZES, "nano", NANO)
    root = tmp_path / "data"
    root.mkdir()
    y, x = np.mgrid[0:32, 0:32] / 8
    lines = ["participant_id\tfile\tsplit\tcontrast\tanatomy"]
    for k, split in enumerate(["train", "train", "test", "test"]):
        image = 200 + 90 * np.sin(x * (k + 1)) + 60 * np.cos(y)
        image[10:18, 12:20] += 150
        write_volume(root / f"{k}.nii", Volume(np.stack([image, image.T], 2).astype(np.float32), np.eye(4)))
        lines.append(f"sub-{k}\t{k}.nii\t{split}\tT2\tbrain")
    (root / "volumes.tsv").write_text("\n".join(lines) + "\n")
    return root


def split(folder: Path) -> tuple[list[Scan], list[Scan]]:
    scans = find_scans(folder)
    return [s for s in scans if s.split == "train"], [s for s in scans if s.split == "test"]


def plan(**changes: Any) -> Plan:
    return Plan(**{"scale": 2, "preset": "nano", "steps": 2, "seeds": 2, "batch": 2, "data": DATA, **changes})


def cells(document: str) -> dict[str, list[str]]:
    """The rows of the first Markdown table, by their first cell."""
    first = document[document.index("\n|") + 1 :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("preset", SIZES)
def test_every_row_has_a_size(preset: str) -> None:
    for table in TABLES.values():
        for row in table:
            assert row.model in MODELS
            assert not row.trained or row.model in SIZES[preset]
        assert [row.name for row in table].count(OURS) == 1


def test_the_ablation_takes_out_what_it_says() -> None:
    full, *_ = (row for row in TABLES["table1"] if row.name == OURS)
    built = {row.name: plan(preset="tiny").build(row).config for row in TABLES["table1"]}
    assert full.beta == 0.1
    differ = {name: {k for k in config if config[k] != built[OURS][k]} for name, config in built.items()}
    assert differ == {"w/o Deform": {"deform"}, "w/o MVC": {"context"}, "w/o CELoss": set(), OURS: set()}
    assert [row.beta for row in TABLES["table1"]] == [0.1, 0.1, 0, 0.1]


def test_the_figures_of_the_paper_are_those_it_prints() -> None:
    printed = {row.name: dict(row.paper) for rows in TABLES.values() for row in rows if row.name != OURS}
    assert printed["w/o MVC"] == {"scale not stated": (32.60, 0.9266)}
    assert printed["HAT"] == {"IXI 4x": (30.73, 0.9007), "fastMRI 4x": (29.65, 0.6155)}
    assert printed["SwinIR"] == {}, "which table 2 does not have"


@pytest.mark.slow
def test_the_ablation_from_start_to_document(folder: Path, tmp_path: Path) -> None:
    train, test = split(folder)
    said: list[str] = []
    rows = ["w/o Deform", OURS]
    document = benchmark("table1", train, test, tmp_path / "out", plan(), rows=rows, say=said.append, progress=False)
    text = document.read_text("utf-8")
    assert len(said) == 4
    table = cells(text)
    assert len({len(row) for row in table.values()}) == 1
    assert table[""] == [
        "parameters", "steps", "seconds", "seeds", "PSNR [dB]", "SSIM", f"PSNR - {OURS}",
        "the paper's, scale not stated",
    ]  # fmt: skip
    row = table["w/o Deform"]
    done = [json.loads(p.read_text("utf-8")) for p in sorted((tmp_path / "out" / "rows").glob("w-o-deform-*.json"))]
    ours = [json.loads(p.read_text("utf-8")) for p in sorted((tmp_path / "out" / "rows").glob("deform-mamba-*.json"))]
    psnr, other = ([np.mean([v["psnr"] for v in d["volumes"]]) for d in runs] for runs in (done, ours))
    assert row[0] == f"{done[0]['parameters']:,}"
    assert (row[1], row[3]) == ("2", "2")
    assert row[4] == f"{np.mean(psnr):.2f} ± {np.std(psnr, ddof=1):.2f}"
    gaps = np.subtract(psnr, other)
    assert row[6] == f"{gaps.mean():+.2f} ± {gaps.std(ddof=1):.2f}"
    assert row[7] == "32.42 / 0.9250"
    assert table[OURS][6] == ""
    assert table["w/o MVC"][3:5] == ["0", "not run"]
    assert "2 volumes of 2 subjects" in text
    assert "2 steps each" in text
    assert hardware() in text
    assert "w/o Deform dims=[8, 12], depths=[1, 1], patch=2, d_state=4, skip=zero-fill, deform=False; " in text
    assert "quoted from it" in text
    assert [d["beta"] for d in ours] == [0.1, 0.1]
    assert {d["seed"] for d in done} == {0, 1}
    assert psnr[0] != psnr[1], "seeds are seeds"


@pytest.mark.slow
def test_a_stopped_benchmark_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = split(folder)
    out, rows = tmp_path / "out", ["bicubic", "SRCNN", "FMISR"]
    fitted, evaluate, fit = [], tables.evaluate, tables.fit

    def stops(model: Any, *args: Any, **kwargs: Any) -> Any:
        if type(model).__name__ == "FMISR" and len(fitted) == 3:
            raise KeyboardInterrupt
        return evaluate(model, *args, **kwargs)

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        fitted.append(type(model).__name__)
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(tables, "fit", counted)
    monkeypatch.setattr(tables, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        benchmark("table2", train, test, out, plan(), rows=rows, say=lambda _: None, progress=False)
    assert fitted == ["SRCNN", "SRCNN", "FMISR"]
    table = cells((out / "table2.md").read_text("utf-8"))
    assert table["SRCNN"][3] == "2"
    assert table["FMISR"][4] == "not run"
    kept = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    benchmark("table2", train, test, out, plan(), rows=rows, say=lambda _: None, progress=False)
    assert fitted == ["SRCNN", "SRCNN", "FMISR", "FMISR", "FMISR"]
    assert {name: (out / "rows" / name).read_bytes() for name in kept} == kept
    table = cells(markdown(out))
    assert table["FMISR"][3] == "2"
    assert table["bicubic"][0:4] == ["0", "", "", ""]
    assert "±" not in table["bicubic"][4]
    assert (out / "figure2.png").stat().st_size > 10_000
    assert from_pretrained(out / "runs" / "fmisr-1" / "best.safetensors").provenance["row"] == "FMISR"
    monkeypatch.setitem(NANO, "FMISR", (1e-3, {"widths": [5]}))
    with pytest.raises(ValueError, match=r"fmisr-0\.json belongs to another version of the network FMISR"):
        benchmark("table2", train, test, out, plan(), rows=rows, say=lambda _: None, progress=False)
    with pytest.raises(ValueError, match=r"another benchmark: plan batch was 2, now it is 4; choose another folder"):
        benchmark("table2", train, test, out, plan(batch=4), say=lambda _: None, progress=False)
    with pytest.raises(ValueError, match=r"another benchmark: train subjects was .*sub-0"):
        benchmark("table2", train[1:], test, out, plan(), say=lambda _: None, progress=False)
    with pytest.raises(ValueError, match=r"another benchmark: val was none, now it is .*sub-9"):
        benchmark(
            "table2",
            train,
            test,
            out,
            plan(),
            val=[replace(test[0], subject="sub-9")],
            say=lambda _: None,
            progress=False,
        )


@pytest.mark.slow
def test_all_methods_with_a_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["benchmark", "table2", "--data", str(folder), "--out", str(out), "--scale", "2", "--preset", "nano"]
    assert main([*command, "--steps", "1", "--seeds", "1", "--patch", "8", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"table written to {out / 'table2.md'}\n")
    table = cells((out / "table2.md").read_text("utf-8"))
    assert list(table)[2:] == [row.name for row in TABLES["table2"]]
    assert len(table["SRCNN"]) == 7, "no figures of the paper at 2x"
    for row in TABLES["table2"]:
        left_out = f"{row.name}: skipped: {row.name} needs spandrel" in said
        assert (table[row.name][4] == "not run") == left_out
        assert row.name in ("SwinIR", "HAT") or not left_out


def test_a_package_that_is_missing_leaves_its_row_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("deformmamba.models.transformers.require", broken)
    said: list[str] = []
    document = benchmark(
        "table2", *split(folder), tmp_path / "out", plan(), rows=["bicubic", "HAT"], say=said.append, progress=False
    )
    assert said[1].startswith("HAT: skipped: HAT needs spandrel")
    assert cells(document.read_text("utf-8"))["HAT"][3:5] == ["0", "not run"]


@pytest.mark.slow
def test_minutes_become_steps_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = split(folder)
    monkeypatch.setattr(tables, "seconds_a_step", lambda *_, **__: 20.0)
    minutes = plan(steps=None, minutes=1.0, seeds=1)
    benchmark("table2", train, test, tmp_path / "out", minutes, rows=["FMISR"], say=lambda _: None, progress=False)
    assert json.loads((tmp_path / "out" / "steps.json").read_text("utf-8")) == {"FMISR": 3}
    document = (tmp_path / "out" / "table2.md").read_text("utf-8")
    assert cells(document)["FMISR"][1] == "3"
    assert "1 minute each" in document
    monkeypatch.setattr(tables, "seconds_a_step", lambda *_, **__: pytest.fail("timed already"))
    more = plan(steps=None, minutes=1.0, seeds=2)
    benchmark("table2", train, test, tmp_path / "out", more, rows=["FMISR"], say=lambda _: None, progress=False)
    assert cells(markdown(tmp_path / "out"))["FMISR"][3] == "2"


def test_the_trials_of_learning_rates_tell_how_many_steps_fit(tmp_path: Path) -> None:
    row = next(row for row in TABLES["table2"] if row.name == "FMISR")
    equal = plan(steps=None, minutes=10.0, rates=(0.1, 1), tuning=0.1)
    for rate, seconds in (("0.0001", 30.0), ("0.001", 50.0)):  # 10 steps each, so 4 s a step
        run = tmp_path / "trials" / f"fmisr-{rate}"
        run.mkdir(parents=True)
        (run / "time.json").write_text(json.dumps({"steps": 10, "seconds": seconds}))
    assert tables._steps_by_trials(row, 100, ["0.0001", "0.001"], tmp_path, equal) == 150
    assert tables._steps_by_trials(row, 100, [], tmp_path, equal) == 100
    assert tables._steps_by_trials(row, 100, ["0.0001"], tmp_path, plan(steps=100, rates=(0.1,))) == 100


def test_a_step_is_timed(folder: Path) -> None:
    dataset = PatchDataset(split(folder)[0], scale=2, patch=8, length=1)
    row = next(row for row in TABLES["table2"] if row.name == "FMISR")
    taken = seconds_a_step(plan().build(row), dataset, SRLoss(0.0), batch=2, at_least=0.01)
    assert 1e-5 < taken < 20


def test_the_commit_is_that_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = commit()
    assert here is None or re.fullmatch(r"[0-9a-f]{12}(\+changes)?", here)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert commit() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "table3"}, "table is .table3.; it must be one of table1, table2"),
        ({"plan": plan(preset="huge")}, "preset is .huge.; it must be one of paper, tiny"),
        ({"rows": ["best"]}, r"no row 'best'; rows: w/o Deform"),
        ({"plan": plan(minutes=3.0)}, "give either steps or minutes"),
        ({"plan": plan(steps=None)}, "give either steps or minutes"),
        ({"plan": plan(seeds=0)}, "only positive numbers"),
        ({"plan": plan(data={"degradation": "area"})}, "half-pixel grid; the networks need the origin grid"),
        ({"plan": plan(data={"degradation": "magic"})}, "degradations: k-space"),
        ({"plan": plan(data={"kind": "thick"})}, "data are of kind 'thick', and these networks upscale slices"),
        ({"test": []}, "2 volumes to train on and 0 to score"),
        ({"test": "train"}, "in both: sub-0, sub-1"),
    ],
)
def test_what_is_no_benchmark(change: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    train, test = split(folder)
    given = {"table": "table1", "train": train, "test": test, "plan": plan(), "rows": None, **change}
    given["test"] = train if given["test"] == "train" else given["test"]
    with pytest.raises(ValueError, match=message) as caught:
        benchmark(given["table"], given["train"], given["test"], tmp_path / "out", given["plan"], rows=given["rows"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steps", "1", "--group", "knee"],
            "0 of split test and group 'knee' to score; both are needed; available: T2 brain (test)",
        ),
        (["--steps", "1", "--minutes", "1"], "not allowed with"),
        ([], "--steps --minutes is required"),
        (["--minutes", "0"], "must be positive, not 0"),
        (["--steps", "1", "--recipe", "none-4x"], "no recipe 'none-4x'"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "table1", "--data", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.long
def test_learning_rates_are_chosen_on_validation_and_written_down(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "seconds_a_step", partial(seconds_a_step, at_least=0.1))
    train, test = split(folder)
    val = [replace(test[0], split="val")]
    out = tmp_path / "out"
    equal = plan(steps=None, minutes=0.002, seeds=1, rates=(0.1, 1, 10), tuning=0.5, slices=1)
    rows = ["SRCNN", "FMISR", OURS]
    document = benchmark("all", train, test[1:], out, equal, val=val, rows=rows, say=lambda _: None, progress=False)
    text = document.read_text("utf-8")
    rates = json.loads((out / "rates.json").read_text("utf-8"))
    for name in rows:
        assert list(rates[name]) == ["0.0001", "0.001", "0.01"]
        result = json.loads((out / "rows" / f"{name.lower()}-0.json").read_text("utf-8"))
        assert result["tried"] == rates[name]
        assert rates[name][f"{result['lr']:g}"] == max(rates[name].values())
        assert result["seconds"] > 0
        row = next(row for row in TABLES["all"] if row.name == name)
        first = json.loads((out / "steps.json").read_text("utf-8"))[name]
        assert result["steps"] == tables._steps_by_trials(row, first, list(rates[name]), out, equal)
        assert [v["slices"] for v in result["volumes"]] == [1]
        assert f"{name} 0.0001: {rates[name]['0.0001']:.2f}" in text
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    curves = tables._curves(TABLES["all"], out)
    assert set(curves) == set(rows)
    for points in curves.values():
        assert points == sorted(points)
        assert points[-1][0] > 0


@pytest.mark.slow
def test_differences_are_paired_over_people(folder: Path, tmp_path: Path) -> None:
    train, test = split(folder)
    document = benchmark("table2", train, test, tmp_path / "out", plan(seeds=1), rows=["SRCNN", OURS],
                         say=lambda _: None, progress=False)  # fmt: skip
    scores = {
        name: [v["psnr"] for v in json.loads((tmp_path / "out" / "rows" / f"{name}-0.json").read_text())["volumes"]]
        for name in ("srcnn", "deform-mamba")
    }
    gaps = np.subtract(scores["srcnn"], scores["deform-mamba"])
    line = document.read_text("utf-8").rpartition("| SRCNN |")[2].splitlines()[0]
    assert f"{gaps.mean():.2f} ± {gaps.std(ddof=1):.2f} (2 subjects)" in line


def stored(row: str, seed: int, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    volumes = [{"subject": one, "psnr": psnr, "ssim": 0.9, "slices": 1} for one, psnr in scores.items()]
    return {"row": row, "seed": seed, "steps": 10, "seconds": 60.0, "parameters": 5, "beta": 0.0, "lr": 1e-3,
            "batch": 2, "hardware": "", "version": "", "commit": "", "volumes": volumes, **changes}  # fmt: skip


def test_differences_are_between_the_same_seeds(tmp_path: Path) -> None:
    """Our network has two seeds and the other one, so only seed 0 is compared, in both tables."""
    facts = {"table": "table2", "plan": asdict(plan(seeds=2, preset="tiny")), "degradation": "k-space:scale=2",
             **{name: {"subjects": ["a"], "volumes": ["a"]} for name in ("train", "test")}}  # fmt: skip
    (tmp_path / "rows").mkdir()
    (tmp_path / "benchmark.json").write_text(json.dumps(facts))
    results = [
        stored(OURS, 0, {"a": 30.0, "b": 31.0}),
        stored(OURS, 1, {"a": 34.0, "b": 35.0}, steps=99, lr=3e-3),
        stored("SRCNN", 0, {"a": 30.1, "b": 31.1}, tried={"0.001": 29.0, "0.01": None}),
    ]
    for k, result in enumerate(results):
        (tmp_path / "rows" / f"{k}.json").write_text(json.dumps(result))
    text = markdown(tmp_path)
    assert cells(text)["SRCNN"][6] == "+0.10"
    assert "| SRCNN | 0.10 ± 0.00" in text
    assert cells(text)[OURS][1] == "10 to 99"
    assert f"{OURS} 0.001 to 0.003" in text
    assert "SRCNN 0.001: 29.00, 0.01: diverged" in text


@pytest.mark.slow
def test_a_rate_that_diverges_is_left_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = split(folder)
    honest = tables.fit

    def fit(*arguments: Any, lr: float, **settings: Any) -> Path:
        if lr > 0.005:
            raise tables.NotFinite("the loss is nan")
        return honest(*arguments, lr=lr, **settings)

    monkeypatch.setattr(tables, "fit", fit)
    common = {"val": [replace(test[0], split="val")], "rows": ["SRCNN"], "say": lambda _: None, "progress": False}
    benchmark("all", train, test[1:], tmp_path / "some", plan(seeds=1, rates=(1, 10), slices=1), **common)
    assert json.loads((tmp_path / "some" / "rates.json").read_text("utf-8"))["SRCNN"]["0.01"] is None
    with pytest.raises(tables.NotFinite, match=r"SRCNN diverged at each learning rate, 0\.01; give lower ones"):
        benchmark("all", train, test[1:], tmp_path / "all", plan(seeds=1, rates=(10,), slices=1), **common)


@pytest.mark.slow
def test_the_curves_show_the_rows_of_former_calls(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = split(folder)
    drawn: list[list[str]] = []
    monkeypatch.setattr(tables, "curves_over_time", lambda curves, _: drawn.append(sorted(curves)))
    for name in ("SRCNN", "FMISR"):
        benchmark("table2", train, test[1:], tmp_path / "out", plan(seeds=1, slices=1),
                  val=[replace(test[0], split="val")], rows=[name], say=lambda _: None, progress=False)  # fmt: skip
    assert drawn == [["SRCNN"], ["FMISR", "SRCNN"]]


def test_a_folder_in_which_nothing_began_takes_another_benchmark(tmp_path: Path) -> None:
    tables._check_folder(tmp_path / "benchmark.json", {"plan": 1})
    tables._check_folder(tmp_path / "benchmark.json", {"plan": 2})
    (tmp_path / "trials" / "srcnn-0.001").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another benchmark: plan was 2, now it is 3"):
        tables._check_folder(tmp_path / "benchmark.json", {"plan": 3})


def test_steps_are_timed_between_calls_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, which loads and compiles, does not count, and neither does a validation."""
    ticks, validation = iter([100.0, 102.0, 107.0]), SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(budget, "clock", lambda _: lambda: next(ticks))
    loss = SRLoss(0.0)
    timer = StepTimer(loss, validation, "cpu")  # type: ignore[arg-type]
    image = torch.rand(1, 1, 4, 4)
    for spent in (0.0, 0.0, 3.0):
        validation.seconds += spent
        loss(image, image)
    assert (timer.steps, timer.seconds) == (2, 4.0)


def test_time_is_cpu_time_on_one_thread_only() -> None:
    assert clock("cpu") is time.process_time
    torch.set_num_threads(2)
    assert clock("cpu") is time.perf_counter
    assert clock("meta") is time.perf_counter


def test_the_time_of_validations_is_known(folder: Path) -> None:
    validation = Validation(split(folder)[1], plan().degradation(), "volume", "cpu")
    scores = validation(ZeroFill(scale=2))
    assert scores["psnr"] > 10
    assert validation.seconds > 0


def test_the_command_scores_chosen_people(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["benchmark", "table2", "--data", str(folder), "--out", str(tmp_path / "out"), "--scale", "2", "--preset"]
    common += ["nano", "--steps", "1", "--seeds", "1", "--patch", "8", "--batch", "2", "--rows", "bicubic"]
    assert main([*common, "--people", "sub-3", "--slices", "1"]) == 0
    facts = json.loads((tmp_path / "out" / "benchmark.json").read_text("utf-8"))
    assert facts["test"]["subjects"] == ["sub-3"]
    assert main([*common, "--people", "sub-9"]) == 2
    assert "sub-2, sub-3" in capsys.readouterr().err
