"""The paper's tables 1 and 2 on data at hand: every row trained alike, scored alike, and kept as it is finished.

All rows of a table share data, patches, batch, seeds, optimiser (AdamW, cosine) and budget, which is a number of steps,
or of minutes, from which each network gets as many steps as it can do in that time. Sizes and learning rates stand in
`SIZES`; the loss belongs to the method: L1, and for Deform-Mamba the paper's.
"""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from deformmamba import __version__
from deformmamba.data.patches import PatchDataset, Scan, subjects
from deformmamba.errors import InvalidArgument
from deformmamba.evaluation.compare import compare, counted, evaluate, mean_scores
from deformmamba.extras import MissingExtra, require
from deformmamba.losses import SRLoss
from deformmamba.metrics import Protocol
from deformmamba.metrics.statistics import Spread, spread
from deformmamba.models import MODELS, SRModel, from_pretrained
from deformmamba.physics.degradations import Degradation, parse
from deformmamba.training import fit
from deformmamba.volume import write_text

OURS = "Deform-Mamba"


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: as the paper prints it, where it does.
        model: of `deformmamba.models.MODELS`.
        changes: constructor arguments beside those of `SIZES`.
        beta: weight of the contrastive edge loss beside L1.
        paper: PSNR in dB and SSIM that the paper prints, by the heading of its column; none where it has no such row.
        trained: False for interpolation, which has nothing to learn.
    """

    name: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trained: bool = True


def _paper(ixi: tuple[float, float], fastmri: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"IXI 4x": ixi, "fastMRI 4x": fastmri}


TABLES: dict[str, tuple[Row, ...]] = {
    "table1": (
        Row("w/o Deform", "DeformMambaSR", {"deform": False}, 0.1, {"scale not stated": (32.42, 0.9250)}),
        Row("w/o MVC", "DeformMambaSR", {"context": False}, 0.1, {"scale not stated": (32.60, 0.9266)}),
        Row("w/o CELoss", "DeformMambaSR", {}, 0.0, {"scale not stated": (32.59, 0.9264)}),
        Row(OURS, "DeformMambaSR", {}, 0.1, {"scale not stated": (32.65, 0.9270)}),
    ),
    "table2": (
        Row("bicubic", "Bicubic", trained=False),
        Row("b-spline", "BSpline", trained=False),
        Row("zero-filled k-space", "ZeroFill", trained=False),
        Row("SRCNN", "SRCNN", paper=_paper((28.12, 0.8357), (19.74, 0.3653))),
        Row("VDSR", "VDSR", paper=_paper((28.34, 0.8392), (20.31, 0.3839))),
        Row("FMISR", "FMISR", paper=_paper((28.27, 0.8349), (24.35, 0.5207))),
        Row("T2Net", "T2Net", paper=_paper((29.73, 0.8773), (30.56, 0.6244))),
        Row("SwinIR", "SwinIR"),
        Row("HAT", "HAT", paper=_paper((30.73, 0.9007), (29.65, 0.6155))),
        Row(OURS, "DeformMambaSR", beta=0.1, paper=_paper((30.60, 0.8965), (32.11, 0.7194))),
    ),
}

SKIP = {"skip": "zero-fill"}

# By preset and class: the learning rate and constructor arguments. "paper": each network as its paper has it, at its
# paper's rate where that is one for Adam. "tiny": sizes that one CPU can train, none above a million parameters; all
# that work on the LR grid then add to the zero-filled image, which a short training would be spent on otherwise.
SIZES: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {
    "paper": {
        "SRCNN": (1e-3, {}),
        "VDSR": (1e-4, {}),
        "FMISR": (1e-3, {}),
        "T2Net": (5e-5, {}),
        "SwinIR": (2e-4, {}),
        "HAT": (2e-4, {}),
        "DeformMambaSR": (1e-4, {"preset": "paper"}),
    },
    "tiny": {
        "SRCNN": (1e-3, {}),
        "VDSR": (1e-3, {"layers": 10, "width": 32}),
        "FMISR": (1e-3, {**SKIP}),
        "T2Net": (1e-3, {"width": 32, "blocks": 4, **SKIP}),
        "SwinIR": (1e-3, {"width": 48, "depths": [4, 4], "heads": [4, 4], "upsampler": "pixelshuffledirect", **SKIP}),
        "HAT": (1e-3, {"width": 48, "depths": [2, 2], "heads": [4, 4], "window": 8, "squeeze": 12, **SKIP}),
        "DeformMambaSR": (1e-3, {"preset": "tiny", **SKIP}),
    },
}


@dataclass(frozen=True)
class Plan:
    """What all rows share.

    Attributes:
        scale: upsampling factor.
        preset: of `SIZES`.
        steps, minutes: the budget of each row and seed, one of the two.
        seeds: how many; they are 0, 1, 2, ...
        batch: patches a step.
        data: arguments of `PatchDataset`: patch, weights, augmentation; and the degradation, on the origin grid.
        protocol: of the scores.
    """

    scale: int = 4
    preset: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    seeds: int = 3
    batch: int = 8
    data: Mapping[str, Any] = field(default_factory=dict)
    protocol: Protocol = "volume"

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
        """What every row is trained and scored on."""
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
    rows: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Path:
    """Trains and scores every row of a table and returns the Markdown file with the result.

    Run again on the same `out` it goes on: finished rows and seeds are kept, a training that was stopped resumes where
    it was. `out` holds `benchmark.json` (what is shared), `rows/` (one JSON a row and seed: scores, seconds, size),
    `runs/` (see `deformmamba.fit`), `<table>.md`, rewritten after each row, and for table 2 `figure2.png`.

    Args:
        table: of `TABLES`.
        train, test: volumes; no subject may be in both.
        rows: names of rows, if not all.
        say: told of each finished row.

    A row whose package is missing is left out, and the table says so.

    Raises:
        ValueError: no such table, row or preset, a budget that is none, a subject in both sets, no volumes, or an `out`
            that holds another benchmark (names what differs).
    """
    chosen = _check(table, train, test, plan, rows)
    folder = Path(out)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    facts = {
        "table": table,
        "plan": {key: value for key, value in asdict(plan).items() if key != "seeds"},
        "degradation": str(plan.degradation()),
        "train": {"subjects": subjects(train), "volumes": [scan.path.name for scan in train]},
        "test": {"subjects": subjects(test), "volumes": [scan.path.name for scan in test]},
    }
    _same(folder / "benchmark.json", facts)
    document = folder / f"{table}.md"

    @cache
    def patches() -> PatchDataset:  # read once, and only if a row is left to train
        return PatchDataset(train, scale=plan.scale, length=1, progress=progress, **plan.data)

    for row in chosen:
        try:
            with torch.device("meta"):  # for its config alone
                config = plan.build(row).config
        except MissingExtra as missing:
            say(f"{row.name}: left out: {missing}")
            continue
        for seed in range(plan.seeds if row.trained else 1):
            path = folder / "rows" / f"{_slug(row)}-{seed}.json"
            if path.exists():
                if json.loads(path.read_text("utf-8"))["config"] != config:
                    raise InvalidArgument(
                        f"{path} is of another network than {row.name} is now; delete it and {folder}/runs"
                    )
                continue
            result = _run(row, seed, patches, test, folder, plan, progress)
            write_text(path, json.dumps(result, indent=1) + "\n")
            scores = mean_scores(result["volumes"])
            say(f"{row.name}, seed {seed}: {scores['psnr']:.2f} dB, {scores['ssim']:.4f}, {result['steps']} steps")
            write_text(document, markdown(folder))
    write_text(document, markdown(folder))
    if table == "table2":
        _figure(chosen, test, folder, plan)
    return document


def _check(
    table: str, train: Sequence[Scan], test: Sequence[Scan], plan: Plan, rows: Sequence[str] | None
) -> list[Row]:
    if table not in TABLES or plan.preset not in SIZES:
        tables, presets = ", ".join(TABLES), ", ".join(SIZES)
        raise InvalidArgument(
            f"benchmark: no {table!r} or preset {plan.preset!r}; tables: {tables}; presets: {presets}"
        )
    names = [row.name for row in TABLES[table]]
    unknown = [name for name in rows or () if name not in names]
    if unknown:
        raise InvalidArgument(f"benchmark: {table} has no row {unknown[0]!r}; rows: {', '.join(names)}")
    budget = [n for n in (plan.steps, plan.minutes) if n is not None]
    if len(budget) != 1 or not 0 < budget[0] < math.inf or plan.seeds < 1 or plan.batch < 1:
        raise InvalidArgument(
            f"benchmark: steps={plan.steps}, minutes={plan.minutes}, seeds={plan.seeds}, batch={plan.batch}; one of "
            "steps and minutes is needed, and all must be positive"
        )
    if (degradation := plan.degradation()).grid != "origin":
        raise InvalidArgument(
            f"benchmark: {degradation} is on the {degradation.grid} grid; the networks are on the origin grid"
        )
    both = sorted({*subjects(train)} & {*subjects(test)})
    if both or not train or not test:
        raise InvalidArgument(
            f"benchmark: {len(train)} volumes to train on and {len(test)} to score, both needed, of different subjects"
            + (f"; in both: {', '.join(both[:5])}" if both else "")
        )
    return [row for row in TABLES[table] if rows is None or row.name in rows]


def _run(
    row: Row,
    seed: int,
    patches: Callable[[], PatchDataset],
    test: Sequence[Scan],
    folder: Path,
    plan: Plan,
    progress: bool,
) -> dict[str, Any]:
    """Trains a row with a seed, if it learns at all, and scores it."""
    torch.manual_seed(seed)
    model = plan.build(row)
    result: dict[str, Any] = {"row": row.name, "seed": seed, "steps": 0, "seconds": 0.0}
    result |= {"parameters": model.num_parameters(), "config": model.config}
    if row.trained:
        device = require("accelerate", extra="train", what="benchmark").Accelerator().device
        dataset, loss, rate = patches(), SRLoss(beta=row.beta), plan.rate(row)
        dataset.seed = seed
        steps = plan.steps or _steps(row, dataset, loss, folder, plan, device)
        dataset.length = steps * plan.batch
        run = folder / "runs" / f"{_slug(row)}-{seed}"
        before, start = _seconds_before(run), time.perf_counter()
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
                every=min(500, steps),
                seed=seed,
                provenance={"row": row.name, "degradation": str(plan.degradation())},
                progress=progress,
            )
        finally:
            seconds = before + time.perf_counter() - start
            if run.is_dir():
                write_text(run / "seconds.json", json.dumps(seconds) + "\n")
        result |= {"steps": steps, "seconds": round(seconds, 1), "beta": row.beta, "lr": rate, "batch": plan.batch}
        model = from_pretrained(checkpoint).to(device)
    rows = evaluate(
        model, test, protocol=plan.protocol, degradation=plan.degradation(), consistency="off", progress=progress
    )
    return {**result, "hardware": hardware(), "version": __version__, "commit": commit(), "volumes": rows}


def _steps(row: Row, dataset: PatchDataset, loss: SRLoss, folder: Path, plan: Plan, device: Any) -> int:
    """How many steps of a row fit into the minutes, timed once and then kept for every seed and for a resumed run."""
    path = folder / "steps.json"
    known: dict[str, int] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if row.name not in known:
        assert plan.minutes is not None
        seconds = seconds_a_step(plan.build(row), dataset, loss, batch=plan.batch, device=device)
        known[row.name] = max(1, round(60 * plan.minutes / seconds))
        write_text(path, json.dumps(known, indent=1) + "\n")
    return known[row.name]


def seconds_a_step(
    model: SRModel,
    dataset: PatchDataset,
    loss: SRLoss,
    *,
    batch: int = 8,
    device: str | torch.device = "cpu",
    at_least: float = 3.0,
) -> float:
    """Wall clock of a training step, data included: the mean of those after the second, for `at_least` seconds."""
    model.to(device).train()
    loss.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    dataset.length = max(dataset.length, batch)
    n, start = -2, time.perf_counter()
    while n < 2 or time.perf_counter() - start < at_least:
        if n == 0:
            start = time.perf_counter()
        lr, hr, base, _ = (
            torch.stack(images).to(device) for images in zip(*(dataset[k] for k in range(batch)), strict=True)
        )
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(lr, base), hr)
        value.backward()
        optimizer.step()
        value.item()  # waits for the device
        n += 1
    return (time.perf_counter() - start) / n


def _seconds_before(run: Path) -> float:
    """What earlier, interrupted calls spent on a run."""
    path = run / "seconds.json"
    return float(json.loads(path.read_text("utf-8"))) if path.exists() else 0.0


def _figure(rows: Sequence[Row], test: Sequence[Scan], folder: Path, plan: Plan) -> None:
    """Figure 2 with the networks of seed 0 and, of the interpolations, zero-filling."""
    from deformmamba.pictures.figures import comparison

    models: dict[str, SRModel] = {}
    for row in rows:
        checkpoint = folder / "runs" / f"{_slug(row)}-0" / "best.safetensors"
        if row.model == "ZeroFill":
            models[row.name] = plan.build(row)
        elif checkpoint.exists():
            models[row.name] = from_pretrained(checkpoint)
    if models:
        shown = compare(models, test[:1], degradation=plan.degradation(), consistency="off", show=True).shown
        assert shown is not None
        title = f"{shown.title}, {plan.scale}x, {_budget(asdict(plan))}"
        comparison(shown.hr, shown.results, folder / "figure2.png", spacing=shown.spacing, title=title)


# ------------------------------------------------------------------------------------------------------- the document


def markdown(out: str | Path) -> str:
    """The table of a benchmark folder as far as it is finished."""
    folder = Path(out)
    facts = json.loads((folder / "benchmark.json").read_text("utf-8"))
    plan, table = facts["plan"], TABLES[facts["table"]]
    done = [json.loads(path.read_text("utf-8")) for path in sorted((folder / "rows").glob("*.json"))]
    by_row = {row.name: sorted((d for d in done if d["row"] == row.name), key=lambda d: d["seed"]) for row in table}
    headings = list(dict.fromkeys(heading for row in table for heading in row.paper))
    if plan["scale"] != 4:
        headings = [heading for heading in headings if "4x" not in heading]
    columns = ["", "parameters", "steps", "seconds", "seeds", "PSNR [dB]", "SSIM", f"PSNR - {OURS}"]
    columns += [f"the paper's, {heading}" for heading in headings]
    on, of = (
        f"{counted(len(facts[k]['volumes']), 'volume')} of {counted(len(facts[k]['subjects']), 'subject')}"
        for k in ("train", "test")
    )
    lines = [
        f"# {facts['table'].replace('table', 'Table ')} at {plan['scale']}x, {_budget(plan)}",
        "",
        f"Scores: {of}, degradation {facts['degradation']}, protocol {plan['protocol']}; the mean over subjects, ± the "
        "standard deviation over seeds.",
        f'Training: {on}, batches of {plan["batch"]}, sizes "{plan["preset"]}", no data consistency. Seconds: of '
        "training, the mean over seeds.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    for row in table:
        cells = [row.name, *_measured(by_row[row.name], by_row[OURS] if row.name != OURS else [])]
        cells += ["{:.2f} / {:.4f}".format(*row.paper[h]) if h in row.paper else "" for h in headings]
        lines.append("| " + " | ".join(cells) + " |")
    for title, key in (("Hardware", "hardware"), ("Version", "version"), ("Commit", "commit")):
        values = sorted({str(d[key]) for d in done if d[key]})
        lines += ["", f"{title}: {'; '.join(values)}."] if values else []
    rates = {row.name: by_row[row.name][0] for row in table if row.trained and by_row[row.name]}
    if rates:
        told = ", ".join(
            f"{name} {d['lr']:g}" + (f" (beta {d['beta']:g})" if d["beta"] else "") for name, d in rates.items()
        )
        lines += ["", f"Learning rates: {told}; loss L1, with CELoss where a beta is named."]
        lines += ["", f"Networks: {'; '.join(_size(row, plan) for row in table if row.name in rates)}."]
    lines += [
        "",
        "The paper's figures are quoted from it: its data, its split, its budget; they are not comparable with ours to "
        "a tenth of a decibel, nor to several where the protocol differs.",
    ]
    return "\n".join(lines) + "\n"


def _budget(plan: Mapping[str, Any]) -> str:
    return f"{plan['steps']} steps each" if plan["steps"] else f"{plan['minutes']:g} minutes each"


def _size(row: Row, plan: Mapping[str, Any]) -> str:
    """How a row's network differs from the defaults of its class, which are its paper's."""
    changes = {**SIZES[plan["preset"]][row.model][1], **row.changes}
    return f"{row.name} " + (", ".join(f"{k}={v}" for k, v in changes.items()) or "as published")


def _measured(done: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells from "parameters" to the difference; empty ones where nothing is finished."""
    if not done:
        return ["", "", "", "0", "not run", "", ""]
    psnr, ssim = ([mean_scores(d["volumes"])[metric] for d in done] for metric in ("psnr", "ssim"))
    trained = done[0]["steps"] > 0
    other = {d["seed"]: mean_scores(d["volumes"])["psnr"] for d in ours}
    pairs = [
        value - (other[d["seed"]] if trained else sum(other.values()) / len(other))
        for value, d in zip(psnr, done, strict=True)
        if other and (d["seed"] in other or not trained)
    ]
    return [
        f"{done[0]['parameters']:,}",
        f"{done[0]['steps']:,}" if trained else "",
        f"{sum(d['seconds'] for d in done) / len(done):.0f}" if trained else "",
        str(len(done)) if trained else "",
        _shown(spread(psnr, over="seeds"), 2),
        _shown(spread(ssim, over="seeds"), 4),
        _shown(spread(pairs, over="seeds"), 2, "+") if pairs else "",
    ]


def _shown(found: Spread, digits: int, sign: str = "") -> str:
    around = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{around}"


def hardware() -> str:
    """The accelerator, or the processor and how many threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    n = torch.get_num_threads()
    return f"{name}, {n} thread{'s' * (n != 1)}"


def commit() -> str | None:
    """The commit of the checkout that this file is tracked in, "+changes" if there are any; None without one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--error-unmatch", here.name):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "") or None
    except (OSError, subprocess.SubprocessError):  # no git here
        return None


# -------------------------------------------------------------------------------------------------------------- files


def _slug(row: Row) -> str:
    return "".join(c if c.isalnum() else "-" for c in row.name.lower())


def _same(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes what a folder is for, or refuses one that is for something else."""
    plain = json.loads(json.dumps(facts))
    if not path.exists():
        write_text(path, json.dumps(plain, indent=1) + "\n")
        return
    found = json.loads(path.read_text("utf-8"))
    for part in ("table", "plan", "train", "test"):
        if found.get(part) != plain[part]:
            ours, theirs = plain[part], found.get(part)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                key = next(k for k in {**ours, **theirs} if ours.get(k, "not given") != theirs.get(k, "not given"))
                part, ours, theirs = f"{part} {key}", ours.get(key, "not given"), theirs.get(key, "not given")
            raise InvalidArgument(
                f"{path.parent} holds another benchmark: {part} is {_brief(theirs)} there and {_brief(ours)} here; "
                "choose another folder, or delete it"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
