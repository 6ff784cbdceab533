"""prepare: converts downloaded data sets to slices, with a split by subject."""

import argparse
from typing import Any

from deformmamba.cli.arguments import add_command, add_subject, is_quiet, say


def add(commands: Any) -> None:
    prepare = add_command(
        commands,
        "prepare",
        _folder,
        "convert downloaded scans to a data set of slices",
        "prepare ixi IXI-T2/ -o ixi-slices",
    )
    kinds = prepare.add_subparsers(metavar="ixi | fastmri | folder", required=True)
    ixi = add_command(
        kinds,
        "ixi",
        _ixi,
        "prepare IXI's .nii.gz files: 368 subjects for training, 92 for testing",
        "prepare ixi IXI-T2/ -o ixi-slices",
    )
    fastmri = add_command(
        kinds,
        "fastmri",
        _fastmri,
        "prepare fastMRI's single-coil knees: 227 volumes for training, 45 for testing",
        "prepare fastmri knees/ -o knee-slices",
    )
    folder = add_command(
        kinds,
        "folder",
        _folder,
        "prepare any folder of NIfTI, MGH or DICOM scans",
        "prepare folder scans/ -o slices --test 0.2",
    )
    for made in (ixi, fastmri, folder):
        _add_shared(made, slices="central:100" if made is ixi else "all")
    ixi.add_argument("--contrast", choices=("T2", "T1", "PD"), default="T2", help="contrast (default: T2)")
    folder.add_argument(
        "--test", type=float, default=0.1, metavar="SHARE", help="share of the subjects used for testing (default: 0.1)"
    )
    add_subject(folder)
    folder.add_argument("--seed", type=int, default=0, help="random seed of the split (default: 0)")
    for made in (ixi, folder):
        made.add_argument(
            "--axis",
            type=int,
            choices=(0, 1, 2),
            help="axis along which slices are stacked (default: from the geometry)",
        )
        made.add_argument(
            "--splits",
            metavar="FILE",
            help="CSV or TSV file with the columns subject and split, which replaces the random split",
        )
    for made in (ixi, fastmri):
        made.add_argument("--skip-unusable", action="store_true", help="skip damaged files instead of stopping")
    fastmri.add_argument(
        "--crop", type=int, default=320, metavar="N", help="keep the central N x N pixels (default: 320)"
    )
    fastmri.add_argument("--train-list", metavar="FILE", help="text file with the names of the training files")
    fastmri.add_argument("--test-list", metavar="FILE", help="text file with the names of the test files")


def _add_shared(command: argparse.ArgumentParser, *, slices: str) -> None:
    """The arguments of every kind of data set; `slices`: the default of --slices."""
    command.add_argument("root", metavar="DIR", help="folder of the downloaded files; subfolders are searched")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="new folder for the data set; an interrupted preparation resumes",
    )
    command.add_argument(
        "--slices",
        default=slices,
        metavar="RANGE",
        help="slices to keep: all, central:100 (the middle 100) or from:to, such as 20:110 (default: %(default)s)",
    )
    command.add_argument(
        "--val",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the training subjects (folder: of all subjects) used for validation (default: %(default)s)",
    )


def _ixi(args: argparse.Namespace) -> None:
    from deformmamba.data.prepare import plan_ixi

    options = {"contrast": args.contrast, "axis": args.axis, "splits": args.splits}
    _prepare(plan_ixi(args.root, slices=args.slices, val=args.val, **options), args, args.skip_unusable)


def _fastmri(args: argparse.Namespace) -> None:
    from deformmamba.data.prepare import plan_fastmri

    lists = {"train_list": args.train_list, "test_list": args.test_list, "skip_unusable": args.skip_unusable}
    plan = plan_fastmri(args.root, crop=args.crop, slices=args.slices, val=args.val, **lists)
    _prepare(plan, args, args.skip_unusable)


def _folder(args: argparse.Namespace) -> None:
    from deformmamba.data.prepare import plan_folder

    options = {"axis": args.axis, "splits": args.splits, "test": args.test, "seed": args.seed, "subject": args.subject}
    _prepare(plan_folder(args.root, slices=args.slices, val=args.val, **options), args, None)


def _prepare(plan: Any, args: argparse.Namespace, skip_unusable: bool | None) -> None:
    from deformmamba.data.prepare import prepare
    from deformmamba.data.scans import describe_splits, find_scans
    from deformmamba.errors import counted

    manifest = prepare(plan, args.output, skip_unusable=skip_unusable, progress=not is_quiet())
    volumes, skipped = manifest["volumes"], manifest["skipped"]
    slices = sum(row["slices"] for row in volumes)
    written = f"{counted(slices, 'slice')} of {counted(len(volumes), 'volume')}"
    say(f"{args.output}: {written}, {counted(len(skipped), 'file')} skipped; see manifest.json")
    for line in describe_splits(find_scans(args.output)):
        say(line)
    say(f"rule: {manifest['rule']}")
