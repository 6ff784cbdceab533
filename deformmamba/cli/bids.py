"""bids: a BIDS App, the command line that BIDS pipelines and containers expect: INPUT OUTPUT participant."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import add_command, add_model, add_running, load_model, running
from deformmamba.cli.upscale import run_folder
from deformmamba.errors import InvalidArgument

if TYPE_CHECKING:
    from deformmamba.inference.cohort import Outcome


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "bids",
        _bids,
        "upscale the anatomical scans of a BIDS data set, as a BIDS App does",
        "bids /data /out participant --participant-label 01 02 --suffix T2w",
    )
    parser.add_argument("input", metavar="BIDS_DIR", help="the data set: a folder with dataset_description.json")
    parser.add_argument("output", metavar="OUTPUT_DIR", help="the derivative data set; created if it does not exist")
    parser.add_argument(
        "level",
        metavar="participant",
        choices=("participant",),
        help="each scan is upscaled separately; there is no group level",
    )
    parser.add_argument(
        "--participant-label",
        "--participant_label",
        nargs="+",
        metavar="LABEL",
        help="these participants only, with or without sub- (default: all)",
    )
    parser.add_argument(
        "--suffix", nargs="+", metavar="NAME", help="these kinds of scan only, such as T2w (default: all in anat/)"
    )
    add_model(parser)
    add_running(parser)


def _bids(args: argparse.Namespace) -> int:
    from deformmamba.inference.cohort import upscale_cohort

    root = Path(args.input)
    if not (root / "dataset_description.json").is_file():
        raise InvalidArgument(
            f"{root}: not a BIDS data set, because dataset_description.json is missing; for a plain folder of scans "
            "use: deformmamba upscale FOLDER -o FOLDER"
        )
    labels = {f"sub-{label.removeprefix('sub-')}" for label in args.participant_label or ()}
    there = sorted(path.name for path in root.glob("sub-*") if path.is_dir())
    for label in sorted(labels):
        if label not in there:
            raise InvalidArgument(f"{root}: no participant {label}; participants: {', '.join(there) or 'none'}")

    def wanted(name: Path) -> bool:
        suffix = name.name.split(".")[0].rpartition("_")[2]
        return (
            "anat" in name.parts
            and name.parts[0].startswith("sub-")
            and (not labels or name.parts[0] in labels)
            and (not args.suffix or suffix in args.suffix)
        )

    model, settings = load_model(args.model), running(args)

    def made(told: Any) -> list["Outcome"]:
        return upscale_cohort(model, root, args.output, told=told, only=wanted, **settings)

    return run_folder(args, "sr", made)
