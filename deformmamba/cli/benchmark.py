"""benchmark: computes the paper's tables on local data."""

import argparse
import math
from typing import Any

from deformmamba.cli.arguments import add_command, add_subject, is_quiet, positive, tell
from deformmamba.errors import InvalidArgument, did_you_mean


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "benchmark",
        _benchmark,
        "train and score every row of a table of the paper, with equal budgets and the same data",
        "benchmark table1 --data scans/ --out runs/table1 --minutes 20 --recipe ixi-4x",
    )
    parser.add_argument(
        "table", choices=("table1", "table2", "all"), help="table1: the ablation; table2: the methods; all: both"
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of volumes, split by subject")
    add_subject(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for all results; an interrupted run resumes"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=positive, help="training steps per row and seed")
    budget.add_argument("--minutes", type=_minutes, help="training minutes per row and seed, instead of --steps")
    parser.add_argument(
        "--seeds",
        type=positive,
        default=3,
        metavar="N",
        help="training runs per row, each with its own seed (default: 3)",
    )
    parser.add_argument("--scale", type=positive, default=4, metavar="S", help="scale factor (default: 4)")
    parser.add_argument(
        "--preset", default="tiny", help="sizes of the networks: tiny, or paper for the published sizes (default: tiny)"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="recipe whose [data] section gives patches, group weights and augmentation"
    )
    parser.add_argument("--patch", type=positive, metavar="P", help="side of a patch in LR pixels (default: 32)")
    parser.add_argument("--batch", type=positive, default=8, metavar="B", help="patches per step (default: 8)")
    parser.add_argument(
        "--split",
        nargs="+",
        choices=("val", "test", "external"),
        default=["test"],
        help="splits to score (default: test)",
    )
    parser.add_argument("--people", nargs="+", metavar="NAME", help="score only these subjects of the splits")
    parser.add_argument(
        "--slices", type=positive, metavar="N", help="score at most N slices of a volume, spread evenly (default: all)"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[],
        metavar="F",
        help="factors on each learning rate that are tried with a tenth of the budget, such as 0.3 1 3; the best on "
        "the validation split is used",
    )
    parser.add_argument("--group", metavar="NAME", help='contrast and anatomy to score, such as "T2 brain"')
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument(
        "--protocol",
        choices=("volume", "slice", "foreground"),
        default="volume",
        help="pixels and data range that the metrics use (default: volume)",
    )


def _minutes(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return number


def _benchmark(args: argparse.Namespace) -> None:
    from deformmamba.data.scans import describe_splits, find_scans
    from deformmamba.errors import counted
    from deformmamba.training import load_recipe
    from deformmamba.training.comparison import Plan, benchmark
    from deformmamba.training.from_recipe import forget_groups

    scans = find_scans(args.data, subject=args.subject)
    data = dict(load_recipe(args.recipe)["data"]) if args.recipe else {}
    forget_groups(scans, data, args.data)
    data.pop("validation", None)
    if args.patch:
        data["patch"] = args.patch
    shares = data.get("weights")
    train = [scan for scan in scans if scan.split == "train" and (shares is None or scan.group in shares)]
    test = [
        scan
        for scan in scans
        if scan.split in args.split
        and args.group in (None, scan.group)
        and scan.subject in (args.people or [scan.subject])
    ]
    missing = sorted({*(args.people or ())} - {scan.subject for scan in test})
    if missing:
        people = sorted({scan.subject for scan in scans if scan.split in args.split})
        hint = did_you_mean(missing[0], people)
        raise InvalidArgument(
            f"{args.data} has no volume to score of {missing[0]!r} in split {', '.join(args.split)}{hint}; "
            f"there are: {', '.join(people) or 'none'}"
        )
    val = [scan for scan in scans if scan.split == "val" and args.group in (None, scan.group)] if args.rates else []
    if not train or not test:
        groups = ", ".join(sorted({f"{scan.group or 'no group'} ({scan.split})" for scan in scans}))
        of_group = f" and group {args.group!r}" if args.group else ""
        hint = did_you_mean(args.group or "", {scan.group for scan in scans} - {""})
        raise InvalidArgument(
            f"{args.data}: {counted(len(train), 'volume')} to train on and {len(test)} of split {', '.join(args.split)}"
            f"{of_group} to score{hint}; both are needed; available: {groups}"
        )
    for line in describe_splits([*train, *test]):
        tell(line)
    plan = Plan(
        scale=args.scale,
        preset=args.preset,
        steps=args.steps,
        minutes=args.minutes,
        seeds=args.seeds,
        batch=args.batch,
        data=data,
        protocol=args.protocol,
        rates=tuple(args.rates),
        slices=args.slices,
    )
    given: dict[str, Any] = {"val": val, "rows": args.rows, "say": tell, "progress": not is_quiet()}
    document = benchmark(args.table, train, test, args.out, plan, **given)
    tell(f"table written to {document}")
