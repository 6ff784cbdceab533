"""Publish weights for the slice direction: write the checkpoint into the package, and describe it in the manifest.

Run: python examples/publish_thick.py runs/thick/best.safetensors --data scans/ --machine "2 cores" --hours 1
     --limits "What it was not trained for."
     python benchmarks/isotropic.py --data scans/ --out scores.csv
     python examples/publish_thick.py --scores scores.csv

The first command writes file and entry with the scores on the validation split. The test subjects are scored with the
published file by the benchmark; the last command puts these scores into the entry.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from publish_checkpoint import ROOT, description, read_manifest, trained_on, write_manifest

from deformmamba.models import from_pretrained

NAME = "thick"
FINAL = ROOT / "deformmamba" / "checkpoints" / f"{NAME}.safetensors"


def publish(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the checkpoint into the package and returns its entry for the manifest."""
    model = from_pretrained(args.checkpoint)
    facts = {
        **model.provenance,
        "name": NAME,
        "trained_on": trained_on(args.data, model),
        "consistency": "off",
        "budget": {"machine": args.machine, "hours": args.hours},
    }
    sha256 = model.save_pretrained(FINAL, provenance=facts)
    return {
        "license": args.license,
        "limits": args.limits,
        "meant_for": "thick-slice scans of any contrast, slices 2 to 8 pixels apart",
        "summary": "Slice direction of thick-slice scans of any contrast, for `deformmamba isotropic`: 2 to 8 "
        "times finer, applied after a cubic spline. `isotropic` has its own data consistency (default: object). Scores "
        "named adapted: after 200 steps on the scan itself.",
        **description(model, facts, FINAL, sha256),
        "scores": [
            {
                "split": "val",
                "group": "all",
                "input": "in-plane images, made 2.7 to 5.5 times as coarse",
                "protocol": "each image by its own maximum",
                **{"_".join(reversed(key.split("_"))): round(value, 4) for key, value in facts["validation"].items()},
            }
        ],
    }


def described(mm: str, gap: str) -> str:
    """The slices of a case as text."""
    return f"slices of {float(mm):g} mm" + (f", gap of {float(gap):.0%}" if float(gap) else "")


def scored(entry: dict[str, Any], table: Path) -> None:
    """Puts the rows of benchmarks/isotropic.py beside those of the validation split."""
    cases: dict[tuple[str, ...], dict[str, Any]] = {}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            if row.get("block", "0") != "0":  # scored in a part of the scan only
                continue
            if row["method"] == "network" and row["adapted"] == "0" and not entry["sha256"].startswith(row["sha256"]):
                raise SystemExit(f"{table}: a row was made with other weights, {row['sha256']}")
            # the rows before the network's row hold the baselines; the network's row states whether it was adapted
            case = cases.setdefault((row["subject"], row["mm"], row["gap"]), {})
            if row["method"] == "cubic spline":
                case |= {"spline_psnr": float(row["psnr"]), "spline_ssim": float(row["ssim"])}
            elif row["method"] == "network":
                prefix = "" if row["adapted"] == "0" else "adapted_"
                case |= {f"{prefix}psnr": float(row["psnr"]), f"{prefix}ssim": float(row["ssim"])}
    rows = [
        {"split": "test", "group": f"{subject} brain", "input": described(mm, gap), "protocol": "volume", **case}
        for (subject, mm, gap), case in cases.items()
    ]
    entry["scores"] = [row for row in entry["scores"] if row["split"] == "val"] + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--machine", default="")
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--license", default="cc-by-sa-4.0")
    parser.add_argument("--limits", default="")
    parser.add_argument("--scores", type=Path, help="a table of benchmarks/isotropic.py")
    args = parser.parse_args()
    if not args.checkpoint and not args.scores:
        parser.error("nothing to do: give a checkpoint, --scores, or both")
    manifest = read_manifest()
    if args.checkpoint:
        manifest["weights"][NAME] = publish(args)
    if args.scores:
        scored(manifest["weights"][NAME], args.scores)
    write_manifest(manifest)
    print(f"{FINAL}: sha256 {manifest['weights'][NAME]['sha256']}")


if __name__ == "__main__":
    main()
