"""evaluate: degrade high-resolution scans, upscale them and score the result."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import add_command, add_running, device_here, load_model, positive, say, write_text

if TYPE_CHECKING:
    from deformmamba.models import SRModel


def add(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "degrade high-resolution scans, upscale them and score the result",
        "evaluate ixi-4x --data scans/ --split test --json scores.json",
    )
    evaluate.add_argument(
        "model", metavar="MODEL", nargs="*", help="names, paths or org/repo; baselines are always there"
    )
    evaluate.add_argument("--data", nargs="+", required=True, metavar="PATH", help="scans, or folders of scans")
    evaluate.add_argument(
        "--split", choices=("train", "val", "test", "external"), help="only this split of the folders"
    )
    evaluate.add_argument("--scale", type=positive, metavar="S", help="needed if no MODEL is given")
    evaluate.add_argument(
        "--protocol", choices=("volume", "slice"), default="volume", help="of the metrics (default: volume)"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write every row")
    add_running(evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from deformmamba.volume import check_output

    if args.json:
        check_output(args.json, (".json",))
    from deformmamba.data import Scan, find_scans
    from deformmamba.evaluation import evaluate, mean_scores
    from deformmamba.models import Bicubic, ZeroFill

    scans: list[Scan | str] = []
    for path in args.data:
        if os.path.isdir(path):
            found = find_scans(path)
            scans += [scan for scan in found if args.split in (None, scan.split)]
        else:
            scans.append(path)
    if not scans:
        raise ValueError(f"no volume of split {args.split!r} in {', '.join(args.data)}")
    models = {name: load_model(name) for name in args.model}
    scales = sorted({model.scale for model in models.values()} | ({args.scale} if args.scale else set()))
    if len(scales) != 1:
        raise ValueError(
            f"one scale at a time: {scales or 'none'} given by MODEL and --scale; evaluate them one by one"
        )
    baselines: dict[str, SRModel] = {
        "bicubic": Bicubic(scale=scales[0]),
        "zero-filled k-space": ZeroFill(scale=scales[0]),
    }
    report = {}
    for name, model in {**baselines, **models}.items():
        model.to(device_here(args.device))
        report[name] = evaluate(model, scans, protocol=args.protocol, consistency=args.consistency, progress=True)
    width = max(map(len, report))
    metrics = list(mean_scores(next(iter(report.values()))))
    n_subjects = len({row["subject"] for row in next(iter(report.values()))})
    say(f"{len(scans)} volumes of {n_subjects} subjects at {scales[0]}x, protocol {args.protocol}: mean over subjects")
    say(f"{'':{width}}  " + "  ".join(f"{metric:>7}" for metric in metrics))
    for name, rows in report.items():
        means = mean_scores(rows)
        say(f"{name:{width}}  " + "  ".join(f"{means[m]:7.2f}" if m == "psnr" else f"{means[m]:7.4f}" for m in metrics))
    if args.json:
        result = {
            "scale": scales[0],
            "protocol": args.protocol,
            "models": {
                name: {"source": (baselines | models)[name].source, "mean": mean_scores(rows), "volumes": rows}
                for name, rows in report.items()
            },
        }
        write_text(args.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
