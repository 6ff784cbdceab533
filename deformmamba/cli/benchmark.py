"""benchmark: computes the paper's tables on local data."""

import argparse
import math
from typing import Any

from deformmamba.cli.arguments import add_command, add_subject, positive, tell
from deformmamba.errors import InvalidArgument


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "benchmark",
        _benchmark,
        "train and score every row of a table of the paper, for the same budget on the same data",
        "benchmark table1 --data scans/ --out runs/table1 --minutes 20 --recipe ixi-4x",
    )
    parser.add_argument("table", choices=("table1", "table2"), help="table1: the ablation; table2: the methods")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of volumes, split by subject")
    add_subject(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where all goes; goes on with what is there")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=positive, help="training steps of each row and seed")
    budget.add_argument("--minutes", type=_minutes, help="or as many steps as fit into so many minutes")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="trainings of each row (default: 3)")
    parser.add_argument("--scale", type=positive, default=4, metavar="S", help="(default: 4)")
    parser.add_argument(
        "--preset", default="tiny", help="sizes of the networks: tiny, or paper, as published (default: tiny)"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="take patches, shares of groups and augmentation from its [data]"
    )
    parser.add_argument("--patch", type=positive, metavar="P", help="LR pixels of a patch's side (default: 32)")
    parser.add_argument("--batch", type=positive, default=8, metavar="B", help="patches a step (default: 8)")
    parser.add_argument(
        "--split", choices=("val", "test", "external"), default="test", help="scored on this one (default: test)"
    )
    parser.add_argument("--group", metavar="NAME", help='scored on this contrast and anatomy, such as "T2 brain"')
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these rows only")
    parser.add_argument(
        "--protocol", choices=("volume", "slice", "foreground"), default="volume", help="(default: volume)"
    )


def _minutes(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return number


def _benchmark(args: argparse.Namespace) -> None:
    from deformmamba.data.scans import describe_splits, find_scans
    from deformmamba.training import load_recipe
    from deformmamba.training.comparison import Plan, benchmark

    scans = find_scans(args.data, subject=args.subject)
    data = dict(load_recipe(args.recipe)["data"]) if args.recipe else {}
    data.pop("validation", None)
    if args.patch:
        data["patch"] = args.patch
    shares = data.get("weights")
    train = [scan for scan in scans if scan.split == "train" and (shares is None or scan.group in shares)]
    test = [scan for scan in scans if scan.split == args.split and args.group in (None, scan.group)]
    if not train or not test:
        groups = ", ".join(sorted({f"{scan.group or 'no group'} ({scan.split})" for scan in scans}))
        raise InvalidArgument(
            f"{args.data} has {len(train)} volumes to train on and {len(test)} of split {args.split!r} to score; "
            f"both needed; there are: {groups}"
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
    )
    document = benchmark(args.table, train, test, args.out, plan, rows=args.rows, say=tell)
    tell(f"{document}: the table")
