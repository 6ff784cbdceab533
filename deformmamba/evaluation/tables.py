"""The paper's tables 1 and 2: their rows, the paper's figures, and Markdown with this package's results beside them.

`SIZES` holds sizes and learning rates of the networks. The loss is L1, and for Deform-Mamba the paper's loss.
`deformmamba.training.comparison` trains and scores the rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deformmamba.errors import counted
from deformmamba.evaluation.compare import mean_scores
from deformmamba.metrics.statistics import FEWEST, Spread, paired_difference, spread, subject_means

OURS = "Deform-Mamba"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: the name in the paper, if the paper has this row.
        model: a name in `deformmamba.models.MODELS`.
        changes: constructor arguments in addition to those of `SIZES`.
        beta: weight of the contrastive edge loss, which is added to L1.
        paper: the paper's PSNR in dB and SSIM, by the heading of its column; empty if the paper has no such row.
        trained: False for interpolation, which has no parameters.
    """

    name: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    paper: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trained: bool = True


def _paper(ixi: tuple[float, float], fastmri: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"IXI 4x": ixi, "fastMRI 4x": fastmri}


ABLATIONS = (
    Row("w/o Deform", "DeformMambaSR", {"deform": False}, 0.1, {"scale not stated": (32.42, 0.9250)}),
    Row("w/o MVC", "DeformMambaSR", {"context": False}, 0.1, {"scale not stated": (32.60, 0.9266)}),
    Row("w/o CELoss", "DeformMambaSR", {}, 0.0, {"scale not stated": (32.59, 0.9264)}),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "table1": (
        *ABLATIONS,
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

# table 2 with the ablations of table 1, for a comparison at equal time
TABLES["all"] = (*TABLES["table2"], *ABLATIONS)

TITLES = {"table1": "Table 1", "table2": "Table 2", "all": "All networks"}

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


def markdown(out: str | Path) -> str:
    """The table of a benchmark folder, with empty cells for unfinished rows."""
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
        f"# {TITLES[facts['table']]} at {plan['scale']}x, {budget(plan)}",
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
        cells = [row.name, *_score_cells(by_row[row.name], by_row[OURS] if row.name != OURS else [])]
        cells += ["{:.2f} / {:.4f}".format(*row.paper[h]) if h in row.paper else "" for h in headings]
        lines.append("| " + " | ".join(cells) + " |")
    lines += _differences_over_people(by_row)
    for title, key in (("Hardware", "hardware"), ("Version", "version"), ("Commit", "commit")):
        values = sorted({str(d[key]) for d in done if d[key]})
        lines += ["", f"{title}: {'; '.join(values)}."] if values else []
    rates = {row.name: by_row[row.name][0] for row in table if row.trained and by_row[row.name]}
    if rates:
        told = ", ".join(
            f"{name} {_range(by_row[name], 'lr')}" + (f" (beta {d['beta']:g})" if d["beta"] else "")
            for name, d in rates.items()
        )
        lines += ["", f"Learning rates: {told}; loss L1, with CELoss where a beta is named."]
        tried = {name: d["tried"] for name, d in rates.items() if d.get("tried")}
        if tried:
            lines += [
                "",
                "Each rate is the best of those tried, by PSNR on validation scans after a shorter training: "
                + "; ".join(f"{name} {', '.join(_tried(r, v) for r, v in of.items())}" for name, of in tried.items())
                + ".",
            ]
        lines += ["", f"Networks: {'; '.join(_size(row, plan) for row in table if row.name in rates)}."]
    lines += [
        "",
        "The paper's figures are quoted from it: its data, its split, its budget; they are not comparable with ours to "
        "a tenth of a decibel, nor to several where the protocol differs.",
    ]
    return "\n".join(lines) + "\n"


def _differences_over_people(by_row: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A table of the paired differences from our network over people; nothing for fewer than two people or rows."""
    reference = by_row.get(OURS, [])
    shared = {
        name: (_with_seeds(done, reference), _with_seeds(reference, done))
        for name, done in by_row.items()
        if done and reference and name != OURS
    }
    people = {name: (_by_person(own), _by_person(ours)) for name, (own, ours) in shared.items() if own}
    n_people = len(next(iter(people.values()))[1]["psnr"]) if people else 0
    if n_people < 2:
        return []
    lines = [
        "",
        f"Paired differences from {OURS} over {n_people} people, with the seeds that both networks have: mean ± "
        f"standard deviation, with the 95 % interval of the mean from {FEWEST} people on:",
        "",
        "| | PSNR [dB] | SSIM |",
        "|---|---:|---:|",
    ]
    for name, (own, ours) in people.items():
        psnr, ssim = (paired_difference(own[metric], ours[metric]) for metric in ("psnr", "ssim"))
        lines.append(f"| {name} | {psnr.show(2)} | {ssim.show(4)} |")
    return lines


def _tried(rate: str, psnr: float | None) -> str:
    return f"{rate}: {'diverged' if psnr is None else f'{psnr:.2f}'}"


def _range(done: Sequence[Mapping[str, Any]], key: str) -> str:
    """A number of all seeds, such as "1,000", or its lowest and highest value where seeds differ."""
    found = sorted({d[key] for d in done})
    ends = found if len(found) == 1 else [found[0], found[-1]]
    return " to ".join(f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in ends)


def _with_seeds(done: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`done` with the seeds that `ours` has too; all of it if one of the two was not trained."""
    if not done[0]["steps"] or not ours[0]["steps"]:
        return list(done)
    seeds = {d["seed"] for d in ours}
    return [d for d in done if d["seed"] in seeds]


def _by_person(done: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean over seeds of each person's scores, by metric."""
    found: dict[str, dict[str, float]] = {}
    for metric in ("psnr", "ssim"):
        means = [subject_means(d["volumes"], metric) for d in done]
        found[metric] = {one: sum(mean[one] for mean in means) / len(means) for one in means[0]}
    return found


def budget(plan: Mapping[str, Any]) -> str:
    if plan["steps"]:
        return f"{counted(plan['steps'], 'step')} each"
    return f"{plan['minutes']:g} minute{'s' * (plan['minutes'] != 1)} each"


def _size(row: Row, plan: Mapping[str, Any]) -> str:
    """The constructor arguments by which a row's network differs from the defaults of its class (its paper's)."""
    changes = {**SIZES[plan["preset"]][row.model][1], **row.changes}
    return f"{row.name} " + (", ".join(f"{k}={v}" for k, v in changes.items()) or "as published")


def _score_cells(done: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells from "parameters" to the difference; empty if no seed is finished."""
    if not done:
        return ["", "", "", "0", "not run", "", ""]
    psnr, ssim = ([mean_scores(d["volumes"])[metric] for d in done] for metric in ("psnr", "ssim"))
    trained = done[0]["steps"] > 0
    other = {d["seed"]: mean_scores(d["volumes"])["psnr"] for d in ours}
    pairs = [
        mean_scores(d["volumes"])["psnr"] - (other[d["seed"]] if trained else sum(other.values()) / len(other))
        for d in (_with_seeds(done, ours) if ours else ())
    ]
    return [
        f"{done[0]['parameters']:,}",
        _range(done, "steps") if trained else "",
        f"{sum(d['seconds'] for d in done) / len(done):.0f}" if trained else "",
        str(len(done)) if trained else "",
        _shown(spread(psnr, over="seeds"), 2),
        _shown(spread(ssim, over="seeds"), 4),
        _shown(spread(pairs, over="seeds"), 2, "+") if pairs else "",
    ]


def _shown(found: Spread, digits: int, sign: str = "") -> str:
    around = "" if found.std is None else f" ± {found.std:.{digits}f}"
    return f"{found.mean:{sign}.{digits}f}{around}"
