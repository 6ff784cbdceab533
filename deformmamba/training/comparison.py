"""Trains and scores the rows of the paper's tables on given data; each row is saved as soon as it is finished.

All rows of a table share data, patches, batch, seeds, optimizer (AdamW, cosine) and budget. The budget is a number of
steps, or a number of minutes. Minutes are CPU time of one thread, so other programs on the machine do not change it.
`deformmamba.evaluation.tables` defines the rows and writes the result.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from deformmamba import __version__
from deformmamba.data.patches import PatchDataset
from deformmamba.data.scans import Scan, subjects
from deformmamba.errors import InvalidArgument, counted, did_you_mean, shortened
from deformmamba.evaluation.compare import compare, evaluate, mean_scores
from deformmamba.evaluation.machine import commit, hardware
from deformmamba.evaluation.tables import SIZES, TABLES, Row, budget, markdown
from deformmamba.extras import MissingExtra, require
from deformmamba.losses import SRLoss
from deformmamba.metrics import Protocol
from deformmamba.models import MODELS, SRModel, from_pretrained
from deformmamba.physics.degradations import Degradation, parse
from deformmamba.training.budget import StepTimer, Validation, seconds_a_step
from deformmamba.training.curves import curves_over_time
from deformmamba.training.loop import NotFinite, fit
from deformmamba.volume import write_text


@dataclass(frozen=True)
class Plan:
    """The settings that all rows share.

    Attributes:
        scale: upsampling factor.
        preset: a key of `SIZES`.
        steps, minutes: the budget of each row and seed; exactly one of the two.
        seeds: the number of seeds, which are 0, 1, 2, ...
        batch: patches per step.
        data: arguments of `PatchDataset`: patch, weights, augmentation; and the degradation, on the origin grid.
        protocol: protocol of the scores.
        rates: factors on the learning rate of each row that are tried first, such as (0.3, 1, 3). The best by PSNR on
            validation scans is used for every seed. Empty: the rate of `SIZES`.
        tuning: share of a row's budget that each trial of a rate takes.
        slices: largest number of slices of a scored volume, spread evenly over it; None: all.
    """

    scale: int = 4
    preset: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    seeds: int = 3
    batch: int = 8
    data: Mapping[str, Any] = field(default_factory=dict)
    protocol: Protocol = "volume"
    rates: tuple[float, ...] = ()
    tuning: float = 0.1
    slices: int | None = None

    def build(self, row: Row) -> SRModel:
        """The network of a row, with random weights (or none)."""
        changes = dict(row.changes)
        made: Any = MODELS[row.model]
        if not row.trained:
            return cast(SRModel, made(scale=self.scale, **changes))
        arguments = {**SIZES[self.preset][row.model][1], **changes, "scale": self.scale}
        preset = arguments.pop("preset", None)
        return cast(SRModel, made.from_preset(preset, **arguments) if preset else made(**arguments))

    def degradation(self) -> Degradation:
        """The degradation with which every row is trained and scored."""
        return parse(str(self.data.get("degradation") or "k-space"), scale=self.scale)

    def rate(self, row: Row) -> float:
        """The learning rate of a row."""
        return SIZES[self.preset][row.model][0]


def benchmark(
    table: str,
    train: Sequence[Scan],
    test: Sequence[Scan],
    out: str | Path,
    plan: Plan,
    *,
    val: Sequence[Scan] = (),
    rows: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Trains and scores every row of a table and returns the Markdown file with the result.

    An interrupted benchmark resumes from the same `out`: finished rows and seeds are kept, and an interrupted training
    resumes. `out` holds `benchmark.json` (shared settings), `rows/` (one JSON per row and seed: scores, seconds, size),
    `runs/` (see `deformmamba.fit`), `<table>.md`, rewritten after each row, `curves.png` (validation PSNR
    over minutes, with `val`), and `figure2.png` except for table 1.

    Args:
        table: a key of `TABLES`.
        train, test: volumes; no subject may be in both.
        val: volumes of other subjects for the choice of learning rates (`Plan.rates`), of the best checkpoint of a
            training, and for its curve; a few slices of each are used.
        rows: names of the rows to train; None: all.
        say: called with one line of text for each finished row.

    A row whose package is missing is skipped, and the table notes it.

    Raises:
        InvalidArgument: an unknown table, row or preset, an invalid budget, a subject in both sets, no volumes, or an
            `out` that holds another benchmark (the message lists the difference).
    """
    chosen = _check(table, train, test, val, plan, rows)
    folder = Path(out)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    facts = {
        "table": table,
        "plan": {key: value for key, value in asdict(plan).items() if key not in _unset(plan)},
        "degradation": str(plan.degradation()),
        "train": {"subjects": subjects(train), "volumes": [scan.path.name for scan in train]},
        "test": {"subjects": subjects(test), "volumes": [scan.path.name for scan in test]},
        **({"val": {"subjects": subjects(val), "volumes": [scan.path.name for scan in val]}} if val else {}),
    }
    _check_folder(folder / "benchmark.json", facts)
    document = folder / f"{table}.md"

    @cache
    def patches() -> PatchDataset:  # read once, and only if a row remains to be trained
        return PatchDataset(train, scale=plan.scale, length=1, progress=progress, **plan.data)

    for row in chosen:
        try:
            with torch.device("meta"):  # only to get its config
                config = plan.build(row).config
        except MissingExtra as missing:
            say(f"{row.name}: skipped: {missing}")
            continue
        for seed in range(plan.seeds if row.trained else 1):
            path = folder / "rows" / f"{_slug(row)}-{seed}.json"
            if path.exists():
                if json.loads(path.read_text("utf-8"))["config"] != config:
                    raise InvalidArgument(
                        f"{path} belongs to another version of the network {row.name}; delete it and {folder}/runs"
                    )
                continue
            result = _run(row, seed, patches, test, val, folder, plan, progress)
            write_text(path, json.dumps(result, indent=1) + "\n")
            scores = mean_scores(result["volumes"])
            steps = counted(result["steps"], "step")
            say(f"{row.name}, seed {seed}: {scores['psnr']:.2f} dB, {scores['ssim']:.4f}, {steps}")
            write_text(document, markdown(folder))
    write_text(document, markdown(folder))
    if val:
        curves_over_time(_curves(TABLES[table], folder), folder / "curves.png")
    if table != "table1":
        _figure(TABLES[table], test, folder, plan)
    return document


def _unset(plan: Plan) -> list[str]:
    """Settings that a benchmark's folder does not record: the number of seeds, and options that are not used."""
    return ["seeds", *(["rates", "tuning"] if not plan.rates else []), *(["slices"] if plan.slices is None else [])]


def _curves(rows: Sequence[Row], folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Validation PSNR over training minutes of each trained row, seed 0."""
    found = {}
    for row in rows:
        log, done = folder / "runs" / f"{_slug(row)}-0" / "log.csv", folder / "rows" / f"{_slug(row)}-0.json"
        if row.trained and log.exists() and done.exists():
            result = json.loads(done.read_text("utf-8"))
            minutes = result["seconds"] / result["steps"] / 60
            with open(log, newline="") as file:
                lines = [line for line in csv.DictReader(file) if line.get("psnr")]
            found[row.name] = [(minutes * int(line["step"]), float(line["psnr"])) for line in lines]
    return found


def _check(
    table: str,
    train: Sequence[Scan],
    test: Sequence[Scan],
    val: Sequence[Scan],
    plan: Plan,
    rows: Sequence[str] | None,
) -> list[Row]:
    for argument, chosen, known in (("table", table, TABLES), ("preset", plan.preset, SIZES)):
        if chosen not in known:
            raise InvalidArgument(f"{argument} is {chosen!r}; it must be one of {', '.join(known)}")
    names = [row.name for row in TABLES[table]]
    unknown = [name for name in rows or () if name not in names]
    if unknown:
        raise InvalidArgument(
            f"benchmark: {table} has no row {unknown[0]!r}{did_you_mean(unknown[0], names)}; rows: {', '.join(names)}"
        )
    if (kind := plan.data.get("kind")) is not None:
        raise InvalidArgument(
            f"benchmark: the recipe's data are of kind {kind!r}, and these networks upscale slices; give a recipe "
            "such as ixi-4x"
        )
    given = [n for n in (plan.steps, plan.minutes) if n is not None]
    if len(given) != 1 or not 0 < given[0] < math.inf or plan.seeds < 1 or plan.batch < 1:
        raise InvalidArgument(
            f"benchmark: steps={plan.steps}, minutes={plan.minutes}, seeds={plan.seeds}, batch={plan.batch}; give "
            "either steps or minutes, and only positive numbers"
        )
    if (degradation := plan.degradation()).grid != "origin":
        raise InvalidArgument(
            f"benchmark: {degradation} is on the {degradation.grid} grid; the networks need the origin grid"
        )
    if plan.rates and (not val or min(plan.rates) <= 0 or not 0 < plan.tuning <= 1):
        raise InvalidArgument(
            f"benchmark: rates={list(plan.rates)}, tuning={plan.tuning}, {counted(len(val), 'volume')} to validate on; "
            "rates must be positive, tuning in (0, 1], and learning rates are chosen on validation volumes: give some"
        )
    if plan.slices is not None and plan.slices < 1:
        raise InvalidArgument(f"benchmark: slices={plan.slices}; wanted a positive number, or None for all")
    both = sorted({*subjects(train)} & {*subjects(test)} | {*subjects(val)} & {*subjects(train), *subjects(test)})
    if both or not train or not test:
        raise InvalidArgument(
            f"benchmark: {counted(len(train), 'volume')} to train on and {len(test)} to score; both are needed, from "
            "different subjects" + (f"; in both: {', '.join(both[:5])}" if both else "")
        )
    return [row for row in TABLES[table] if rows is None or row.name in rows]


def _run(
    row: Row,
    seed: int,
    patches: Callable[[], PatchDataset],
    test: Sequence[Scan],
    val: Sequence[Scan],
    folder: Path,
    plan: Plan,
    progress: bool,
) -> dict[str, Any]:
    """Trains a row with one seed, if it has parameters, and scores it."""
    model = _new(row, seed, plan)
    result: dict[str, Any] = {"row": row.name, "seed": seed, "steps": 0, "seconds": 0.0}
    result |= {"parameters": model.num_parameters(), "config": model.config}
    if row.trained:
        device = require("accelerate", extra="train", what="benchmark").Accelerator().device
        dataset, loss = patches(), SRLoss(beta=row.beta)
        steps = plan.steps or _steps(row, dataset, loss, folder, plan, device)
        validation = Validation(val, plan.degradation(), plan.protocol, device) if val else None
        rate, tried = _rate(row, dataset, steps, folder, plan, validation, progress)
        steps = _steps_by_trials(row, steps, [name for name, psnr in tried.items() if psnr is not None], folder, plan)
        run = folder / "runs" / f"{_slug(row)}-{seed}"
        checkpoint, seconds = _trained(model, row, dataset, run, steps, rate, seed, plan, validation, device, progress)
        result |= {"steps": steps, "seconds": round(seconds, 1), "beta": row.beta, "lr": rate, "batch": plan.batch}
        result |= {"tried": tried} if tried else {}
        model = from_pretrained(checkpoint).to(device)
    rows = evaluate(
        model,
        test,
        protocol=plan.protocol,
        degradation=plan.degradation(),
        consistency="off",
        most=plan.slices,
        progress=progress,
    )
    return {**result, "hardware": hardware(), "version": __version__, "commit": commit(), "volumes": rows}


def _new(row: Row, seed: int, plan: Plan) -> SRModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plan.build(row)


def _trained(
    model: SRModel,
    row: Row,
    dataset: PatchDataset,
    run: Path,
    steps: int,
    rate: float,
    seed: int,
    plan: Plan,
    validation: Validation | None,
    device: Any,
    progress: bool,
) -> tuple[Path, float]:
    """Trains in the folder `run`; the best checkpoint, and the seconds of training without its validations.

    The seconds are those of a step, times the steps. A step that an interruption lost counts as a timed step too.
    """
    dataset.seed, dataset.length = seed, steps * plan.batch
    loss = SRLoss(beta=row.beta)
    before, timer = _timed(run), StepTimer(loss, validation, device)
    try:
        checkpoint = fit(
            model,
            dataset,
            out=run,
            steps=steps,
            batch=plan.batch,
            loss=loss,
            lr=rate,
            warmup=min(100, steps // 10),
            validate=validation,
            every=max(1, math.ceil(steps / 8)) if validation else min(500, steps),
            seed=seed,
            provenance={"row": row.name, "degradation": str(plan.degradation())},
            progress=progress,
        )
    finally:
        timed = _Timed(before.steps + timer.steps, before.seconds + timer.seconds)
        if run.is_dir():
            write_text(run / "time.json", json.dumps(timed._asdict()) + "\n")
    return checkpoint, timed.seconds / max(timed.steps, 1) * steps


def _rate(
    row: Row,
    dataset: PatchDataset,
    steps: int,
    folder: Path,
    plan: Plan,
    validation: Validation | None,
    progress: bool,
) -> tuple[float, dict[str, float | None]]:
    """The learning rate of a row, and the validation PSNR of each rate that was tried; kept for all seeds.

    The PSNR is None for a rate at which the training diverged.
    """
    if not plan.rates or validation is None:
        return plan.rate(row), {}
    path = folder / "rates.json"
    known: dict[str, dict[str, float | None]] = _stored(path, {})
    found = known.setdefault(row.name, {})
    few = _trial_steps(steps, plan)
    for factor in plan.rates:
        rate = f"{factor * plan.rate(row):g}"
        if rate not in found:
            model = _new(row, 0, plan)
            run = _trial(folder, row, rate)
            try:
                checkpoint, _ = _trained(
                    model, row, dataset, run, few, float(rate), 0, plan, None, model.device, progress
                )
                found[rate] = round(validation(from_pretrained(checkpoint))["psnr"], 4)
            except NotFinite:
                found[rate] = None
            write_text(path, json.dumps(known, indent=1) + "\n")
    scores = {rate: score for rate, score in found.items() if score is not None}
    if not scores:
        raise NotFinite(f"benchmark: {row.name} diverged at each learning rate, {', '.join(found)}; give lower ones")
    return float(max(scores, key=lambda rate: scores[rate])), found


def _trial(folder: Path, row: Row, rate: str) -> Path:
    """The folder of a short training with a learning rate."""
    return folder / "trials" / f"{_slug(row)}-{rate}"


def _trial_steps(steps: int, plan: Plan) -> int:
    """The number of steps of each trial of a learning rate."""
    return max(1, round(steps * plan.tuning))


def _steps_by_trials(row: Row, steps: int, rates: Sequence[str], folder: Path, plan: Plan) -> int:
    """The number of steps that fit into the minutes, by the time that the trials of learning rates took for theirs.

    The trials take minutes, and everything that a training does; `steps`, from a timing of seconds, was up to a third
    too high or too low. It remains without trials, and if the budget is a number of steps.
    """
    timed = [_timed(_trial(folder, row, rate)) for rate in rates]
    n_steps, seconds = sum(trial.steps for trial in timed), sum(trial.seconds for trial in timed)
    if plan.minutes is None or not n_steps or not seconds:
        return steps
    return max(1, round(60 * plan.minutes * n_steps / seconds))


def _steps(row: Row, dataset: PatchDataset, loss: SRLoss, folder: Path, plan: Plan, device: Any) -> int:
    """The number of steps of a row that fit into the minutes; timed once and kept for all seeds and resumed runs."""
    path = folder / "steps.json"
    known: dict[str, int] = _stored(path, {})
    if row.name not in known:
        assert plan.minutes is not None
        seconds = seconds_a_step(plan.build(row), dataset, loss, batch=plan.batch, device=device)
        known[row.name] = max(1, round(60 * plan.minutes / seconds))
        write_text(path, json.dumps(known, indent=1) + "\n")
    return known[row.name]


class _Timed(NamedTuple):
    """A number of training steps, and the seconds that they took."""

    steps: int
    seconds: float


def _timed(run: Path) -> _Timed:
    """The steps that all calls so far have timed in the folder of a training."""
    return _Timed(**_stored(run / "time.json", {"steps": 0, "seconds": 0.0}))


def _stored(path: Path, without: Any) -> Any:
    """The content of a JSON file, or `without` if there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else without


def _figure(rows: Sequence[Row], test: Sequence[Scan], folder: Path, plan: Plan) -> None:
    """Figure 2 with zero-filling and the finished networks of seed 0, also those of former calls."""
    from deformmamba.pictures.figures import comparison

    models: dict[str, SRModel] = {}
    for row in rows:
        checkpoint = folder / "runs" / f"{_slug(row)}-0" / "best.safetensors"
        finished = (folder / "rows" / f"{_slug(row)}-0.json").exists()
        if row.model == "ZeroFill":
            models[row.name] = plan.build(row)
        elif finished and checkpoint.exists():
            with suppress(MissingExtra):  # as in `benchmark`, which prints it
                models[row.name] = from_pretrained(checkpoint)
    if models:
        shown = compare(models, test[:1], degradation=plan.degradation(), consistency="off", show=True).shown
        assert shown is not None
        title = f"{shown.title}, {plan.scale}x, {budget(asdict(plan))}"
        comparison(shown.hr, shown.results, folder / "figure2.png", spacing=shown.spacing, title=title)


def _slug(row: Row) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.name.lower())


def _check_folder(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes `facts` to a folder; refuses one in which a benchmark with other facts has begun."""
    plain = json.loads(json.dumps(facts))
    begun = any(any((path.parent / name).glob("*")) for name in ("rows", "runs", "trials"))
    if not path.exists() or not begun:
        write_text(path, json.dumps(plain, indent=1) + "\n")
        return
    found = json.loads(path.read_text("utf-8"))
    for part in ("table", "plan", "train", "test", "val"):
        if found.get(part) != plain.get(part):
            ours, theirs = plain.get(part), found.get(part)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                key = next(k for k in {**ours, **theirs} if ours.get(k, "not given") != theirs.get(k, "not given"))
                part, ours, theirs = f"{part} {key}", ours.get(key, "not given"), theirs.get(key, "not given")
            raise InvalidArgument(
                f"{path.parent} holds another benchmark: {part} was {_brief(theirs)}, now it is "
                f"{_brief(ours)}; choose another folder, or delete it"
            )


def _brief(value: Any) -> str:
    return "none" if value is None else shortened(json.dumps(value), 80)
