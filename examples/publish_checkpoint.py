"""Publish a training run: score it, write the checkpoint into the package, and describe it in the manifest.

Run: python examples/publish_checkpoint.py runs/mine/best.safetensors ixi-4x --data scans/ --machine "2 cores" --hours 1
     --limits "What it was not trained for."

`--data` is the folder of the training run, with its volumes.tsv. The mode of data consistency is selected on the
validation split: the highest PSNR among the modes whose SSIM is at most 0.002 below that without consistency, unless
`--consistency` names one, for a reason that was found on validation too. Test and
external scans are scored once, with the published file, for their scores and for `evaluation.assessment` (voxel sizes,
other data, lesions), and every such evaluation is appended to docs/evaluations.csv with the file's hash.
"""

import argparse
import csv
import json
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.data.patches import Scan, find_scans
from deformmamba.evaluation.assessment import assess
from deformmamba.evaluation.compare import evaluate, mean_scores
from deformmamba.models import Bicubic, SRModel, ZeroFill, from_pretrained
from deformmamba.physics.consistency import CONSISTENCIES, Consistency
from deformmamba.weights.cards import tables

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs" / "evaluations.csv"


def best_consistency(model: SRModel, scans: list[Scan]) -> tuple[Consistency, dict[str, dict[str, float]]]:
    """The best mode of data consistency on these (validation) scans, and the scores of all modes."""
    scores = {kind: mean_scores(evaluate(model, scans, consistency=kind)) for kind in CONSISTENCIES}
    allowed = [kind for kind in CONSISTENCIES if scores[kind]["ssim"] >= scores["off"]["ssim"] - 0.002]
    return max(allowed, key=lambda kind: scores[kind]["psnr"]), {str(kind): found for kind, found in scores.items()}


def score(model: SRModel, scans: list[Scan], groups: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    """The model compared with zero-filling and bicubic, volume protocol: one row per split and group, and per subject.

    `scores`: the mean over the volumes of a subject, then over subjects. `by_subject`: the subjects of `groups`.
    """
    members = defaultdict(list)
    for scan in scans:
        members[scan.split, scan.group].append(scan)
    table, people = [], []
    others = {"zero_fill_": ZeroFill(scale=model.scale), "bicubic_": Bicubic(scale=model.scale)}
    for (split, group), chosen in sorted(members.items()):
        own = evaluate(model, chosen, slices=True)
        compared = {name: evaluate(made, chosen) for name, made in others.items()}
        table.append(
            {
                "split": split,
                "group": group,
                "subjects": len({scan.subject for scan in chosen}),
                "slices": sum(row["slices"] for row in own),
                "protocol": "volume",
                **_scores(own, compared),
                **spread_over_slices(own),
            }
        )
        print(json.dumps(table[-1]), flush=True)
        for subject in sorted({scan.subject for scan in chosen}) if groups is None or group in groups else ():
            mine = [row for row in own if row["subject"] == subject]
            theirs = {name: [row for row in rows if row["subject"] == subject] for name, rows in compared.items()}
            facts = {"split": split, "subject": subject, "group": group, "slices": sum(row["slices"] for row in mine)}
            people.append({**facts, **_scores(mine, theirs)})
    return {"scores": table, "by_subject": people}


def _scores(own: list[dict[str, Any]], compared: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Rounded PSNR and SSIM of the model and of the baselines."""
    means = {name: mean_scores(rows) for name, rows in {"": own, **compared}.items()}
    return {f"{name}{metric}": round(mean[metric], 4) for name, mean in means.items() for metric in ("psnr", "ssim")}


def spread_over_slices(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Standard deviation of each metric over all slices of all volumes, without empty slices (infinite PSNR)."""
    found = {}
    for name in rows[0]["by_slice"]:
        values = np.array([value for row in rows for value in row["by_slice"][name]], np.float64)
        found[f"{name}_sd_over_slices"] = round(float(np.std(values[np.isfinite(values)], ddof=1)), 4)
    return found


COLUMNS = [
    "date", "name", "sha256", "split", "group", "subjects", "slices", "protocol", "psnr", "ssim", "zero_fill_psnr",
    "zero_fill_ssim", "bicubic_psnr", "bicubic_ssim", "psnr_sd_over_slices", "ssim_sd_over_slices",
]  # fmt: skip


def log(rows: list[dict[str, Any]], name: str, sha256: str) -> None:
    new = not LOG.exists()
    LOG.parent.mkdir(exist_ok=True)
    with open(LOG, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({"date": date.today().isoformat(), "name": name, "sha256": sha256, **row} for row in rows)


def as_logged(assessment: dict[str, list[dict[str, Any]]], groups: list[str] | None) -> list[dict[str, Any]]:
    """The rows of an assessment; the column `protocol` distinguishes them."""
    split, meant = "test+external", ", ".join(groups or ["all"])
    return [
        *(
            {"split": split, "group": meant, **row, "protocol": f"volume, middle slices, truth at {row['truth_mm']} mm"}
            for row in assessment["by_spacing"]
        ),
        *(
            {"split": split, **row, "protocol": f"volume, middle slices, {row['case']}"}
            for row in assessment["out_of_domain"]
        ),
        *(
            {"split": split, "group": meant, "protocol": f"lesions, {row['size_mm']} mm {row['kind']}"}
            for row in assessment["lesions"]
        ),
    ]


def trained_on(data: Path, model: SRModel) -> list[dict[str, Any]]:
    """Sources, licences and sizes of the training split, from volumes.tsv: for this training and the previous
    stages."""
    if "converted" in model.provenance:  # the weights are unchanged since a previous publication
        return list(model.provenance["trained_on"])
    stages = [model.provenance, *model.provenance.get("init", [])]
    shares = [stage.get("recipe", {}).get("data", {}).get("weights") for stage in stages]
    wanted = None if None in shares else {group for share in shares for group in share}
    sources: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    with open(data / "volumes.tsv", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            group = f"{row['contrast']} {row['anatomy']}"
            if row["split"] == "train" and (wanted is None or group in wanted):
                sources[row["source"], row["licence"], group].add(row["participant_id"])
    return [
        {"source": source, "licence": licence, "group": group, "subjects": len(people)}
        for (source, licence, group), people in sorted(sources.items())
    ]


def description(model: SRModel, facts: dict[str, Any], file: Path, sha256: str) -> dict[str, Any]:
    """The facts of a manifest entry about a published file, except its scores and the sentences for readers."""
    before = [{key: stage.get(key) for key in ("steps", "batch", "seed", "sha256")} for stage in facts.get("init", [])]
    return {
        "file": file.name,
        "sha256": sha256,
        "size": file.stat().st_size,
        "repo": None,
        "revision": None,
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "preset": facts["recipe"]["model"].get("preset"),
        "config": model.config,
        "scale": model.scale,
        "grid": model.grid,
        "degradation": facts["degradation"],
        "spacings_mm": facts.get("spacings_mm"),
        "trained_on": facts["trained_on"],
        "seed": facts["seed"],
        "steps": facts["steps"],
        "batch": facts["batch"],
        "trained_before": before or None,
        "converted": facts.get("converted"),
        "budget": facts["budget"],
        "consistency": facts["consistency"],
        "validation": facts["validation"],
    }


def read_manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((ROOT / "weights_manifest.json").read_text("utf-8"))
    return manifest


def write_manifest(manifest: dict[str, Any]) -> None:
    (ROOT / "weights_manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--machine", required=True, help="what it was trained on")
    parser.add_argument("--hours", type=float, required=True, help="how long")
    parser.add_argument("--meant-for", default="", help="contrast and anatomy, in a few words (as before)")
    parser.add_argument("--consistency", choices=CONSISTENCIES, help="the mode, instead of the best on validation")
    parser.add_argument("--slices", type=int, default=8, help="from the middle of each volume, for the assessment")
    parser.add_argument("--summary", default="", help="what it is for, in a sentence (default: as before)")
    parser.add_argument("--license", default="", help="of the weights (default: as before)")
    parser.add_argument("--limits", required=True, help="what it was not trained or measured for; look at its numbers")
    args = parser.parse_args()

    model = from_pretrained(args.checkpoint)
    scans = find_scans(args.data)
    groups = model.provenance["recipe"]["data"].get("validation")
    val = [scan for scan in scans if scan.split == "val" and (groups is None or scan.group in groups)]
    best, validation = best_consistency(model, val)
    consistency = args.consistency or best
    print(f"data consistency {consistency}: {json.dumps(validation)}")
    facts = {
        **model.provenance,
        "name": args.name,
        "trained_on": trained_on(args.data, model),
        "consistency": consistency,
        "validation": validation,
        "budget": {"machine": args.machine, "hours": args.hours},
    }
    final = ROOT / "deformmamba" / "checkpoints" / f"{args.name}.safetensors"
    path = final.with_suffix(
        ".new.safetensors"
    )  # moved into place together with the manifest, after all scores are computed
    sha256 = model.save_pretrained(path, provenance=facts)

    published = from_pretrained(path)
    kept_aside = [scan for scan in scans if scan.split in ("test", "external")]
    scored = score(published, kept_aside, groups)
    log(scored["scores"], args.name, sha256)
    log([{**row, "protocol": f"volume, {row['subject']}"} for row in scored["by_subject"]], args.name, sha256)
    assessment = assess(published, kept_aside, groups=groups, slices=args.slices)
    log(as_logged(assessment, groups), args.name, sha256)
    print(tables(assessment))
    manifest = read_manifest()
    manifest["planned"].pop(args.name, None)
    before = manifest["weights"].get(args.name, {})
    path.replace(final)
    manifest["weights"][args.name] = {
        "license": args.license or before.get("license", ""),
        "meant_for": args.meant_for or before.get("meant_for", ""),
        "limits": args.limits,
        "summary": args.summary or before.get("summary", ""),
        **description(published, facts, final, sha256),
        **scored,
        **assessment,
    }
    write_manifest(manifest)
    print(f"{final}: sha256 {sha256}")


if __name__ == "__main__":
    main()
