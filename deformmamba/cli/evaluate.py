"""evaluate: degrade high-resolution scans, upscale them and score the result."""

import argparse
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import (
    add_command,
    add_running,
    add_subject,
    check_target,
    device_here,
    is_quiet,
    load_model,
    positive,
    short,
    tell,
)
from deformmamba.errors import InvalidArgument, did_you_mean

if TYPE_CHECKING:
    from deformmamba.data.patches import Scan
    from deformmamba.models import SRModel
    from deformmamba.physics.degradations import Degradation


# options that --real-scans does not use
_SCORING_ONLY = ("csv", "figure", "against", "degradation", "seed", "scale", "protocol", "metric", "consistency")


def add(commands: Any) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "degrade high-resolution scans, upscale them and score the result",
        "evaluate ixi-4x --data scans/ --split test --json scores.json --figure slice.png",
    )
    evaluate.add_argument(
        "model",
        metavar="MODEL",
        nargs="*",
        help="weights: names, paths or org/repo; interpolation baselines are always included",
    )
    add_volumes(evaluate)
    evaluate.add_argument("--scale", type=positive, metavar="S", help="scale factor; needed only without MODEL")
    add_scoring(evaluate)
    evaluate.add_argument(
        "--degradation",
        default="k-space",
        metavar="TEXT",
        help='degradation model, such as "blur:sigma=1.5 >> subsample >> rician:snr=30" (default: k-space, the '
        "paper's; an unknown name lists all models)",
    )
    evaluate.add_argument("--seed", type=int, default=0, help="random seed of the degradation's noise (default: 0)")
    evaluate.add_argument(
        "--against", metavar="NAME", help="reference model for the paired differences (default: the first MODEL)"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write all results, including each slice")
    evaluate.add_argument("--csv", metavar="FILE", help="also write one line per model and volume")
    evaluate.add_argument("--figure", metavar="FILE", help="also draw a slice of the first volume: .png, .pdf or .svg")
    evaluate.add_argument(
        "--slice", type=int, metavar="K", help="slice of the figure, counted from 0 (default: the middle slice)"
    )
    evaluate.add_argument(
        "--real-scans",
        action="store_true",
        help="instead, test each MODEL on markers, other units, cut fields of view and masked backgrounds, and print "
        "Markdown tables (default split of each folder: val)",
    )
    add_running(evaluate)


def _real_scans(args: argparse.Namespace) -> None:
    """`evaluation.real_scans` of each model, as Markdown; --json has the rows of each model, then the "settings"."""
    from deformmamba.data.scans import describe_splits
    from deformmamba.evaluation.real_scans import markdown, real_scans, settings_of

    unused = [f"--{name}" for name in _SCORING_ONLY if getattr(args, name) != args.parser.get_default(name)]
    if unused:
        raise InvalidArgument(
            f"--real-scans has cases of its own and does not go with {unused[0]}; leave one of them out"
        )
    if not args.model:
        raise InvalidArgument("--real-scans tests models, and no MODEL was given; name one or more, such as ixi-4x")
    scans = chosen(args.data, args.split, args.group, args.subject, default="val")
    models = {name: load_model(name) for name in args.model}
    settings = settings_of(models, scans) if args.json else {}
    for line in describe_splits(scans):
        tell(line)
    found = {}
    for name, model in models.items():
        model.to(device_here(args.device))
        found[name] = real_scans(model, scans)
        for line in ("", f"## {short(name)}", "", *markdown(found[name]).splitlines()):
            tell(line)
    if args.json:
        _write_json(args.json, {**found, "settings": settings})


def _write_json(path: str, result: dict[str, Any]) -> None:
    from deformmamba.evaluation.compare import finite
    from deformmamba.volume import write_text

    write_text(path, json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def add_volumes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="scans, or folders of scans that have no subject in common",
    )
    add_subject(parser)
    parser.add_argument("--split", choices=("train", "val", "test", "external"), help="only volumes of this split")
    parser.add_argument("--group", metavar="NAME", help='only volumes of this contrast and anatomy, such as "T2 brain"')


def add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        choices=("volume", "slice", "foreground"),
        default="volume",
        help="pixels and data range that the metrics use (default: volume)",
    )
    parser.add_argument(
        "--metric", action="append", default=[], choices=("hfen", "lpips"), help="additional metric; can be repeated"
    )


def chosen(
    data: list[str], split: str | None, group: str | None, subject: str | None = None, *, default: str | None = None
) -> "list[Scan]":
    """The volumes selected by --data, --split, --group and --subject; other files are skipped and listed.

    `default`: the split of each folder if `split` is None; None: all splits.

    Raises:
        InvalidArgument: no volume, a folder without the `default` split, a name of a subject in two folders, or a split
            or group for a single scan.
    """
    from deformmamba.data.scans import find_scans, named_scans
    from deformmamba.volume import not_a_scan

    sources: list[Scan | str] = []
    places: list[str] = []  # where each source was found
    groups = set()
    for number, path in enumerate(data):
        if os.path.isdir(path):
            found = find_scans(path, subject=subject)
            groups |= {scan.group for scan in found if scan.group}
            grouped = [scan for scan in found if group in (None, scan.group)]
            own = [scan for scan in grouped if (split or default) in (None, scan.split)]
            if grouped and not own and split is None:
                raise _without(default, path, grouped, group)
            sources += own
            places += [path if path not in data[:number] else f"{path} (again)"] * len(own)
        elif split is not None or group is not None:
            raise InvalidArgument(f"{path}: --split and --group select from a folder; leave them out for a single scan")
        elif os.path.isfile(path) and (reason := not_a_scan(path)):
            warnings.warn(f"{path}: left out: {reason}", stacklevel=2)
        else:
            sources.append(path)
            places.append("the single scans")
    if not sources:
        given = [f"{name} {value!r}" for name, value in (("split", split), ("group", group)) if value]
        where = ", ".join(data)
        if not given:
            raise InvalidArgument(f"{where}: no volume to score; give scans, or a folder of scans")
        of = " and ".join(given) + did_you_mean(group or "", groups)
        known = f"its groups are {', '.join(sorted(groups))}" if groups else "no volume there has a group"
        raise InvalidArgument(f"{where}: no volume of {of}; {known}; change --split or --group")
    scans = named_scans(sources, subject=subject)
    _check_people(scans, places)
    return scans


def _without(split: str | None, folder: str, scans: "list[Scan]", group: str | None) -> InvalidArgument:
    """The error for a folder whose `scans` are all of other splits than the default one."""
    of_group = "" if group is None else f" of group {group!r}"
    there = ", ".join(sorted({scan.split for scan in scans}))
    return InvalidArgument(
        f"{folder}: no volume{of_group} in split {split!r}, the default; its splits are {there}: name one with --split"
    )


def _check_people(scans: "list[Scan]", places: list[str]) -> None:
    """Refuses a name of a subject that was found in two places, and a file of two subjects: means over subjects need to
    count each person once."""
    from deformmamba.data.links import of_two_subjects
    from deformmamba.data.subjects import same_person

    first: dict[str, str] = {}
    for scan, place in zip(scans, places, strict=True):
        other = first.setdefault(same_person(scan.subject), place)
        if other != place:
            raise InvalidArgument(
                f"{other} and {place}: both have a subject {scan.subject}, which may be one person or two; evaluate "
                "them one at a time, or list their people in a volumes.tsv of the folder above and give that folder"
            )
    owners = {scan.path: scan.subject for scan in scans}
    if (pair := of_two_subjects(owners)) is not None:
        path, original = pair
        raise InvalidArgument(
            f"{path} is a link to {original}, but counts as another subject ({owners[path]}, not {owners[original]}); "
            "leave one of them out"
        )


def interpolations(degradation: "Degradation") -> "dict[str, SRModel]":
    """The interpolation baselines on the grid of `degradation`; zero-filling only if it fits that grid."""
    from deformmamba.models import Bicubic, BSpline, ZeroFill

    scale, grid = degradation.scale, degradation.grid
    made: dict[str, SRModel] = {"bicubic": Bicubic(scale=scale, grid=grid), "b-spline": BSpline(scale=scale, grid=grid)}
    return made | ({"zero-filled k-space": ZeroFill(scale=scale)} if grid == "origin" else {})


def _evaluate(args: argparse.Namespace) -> None:
    from deformmamba.volume import check_output, write_text

    for path, suffix in ((args.json, ".json"), (args.csv, ".csv")):
        if path:
            check_output(path, (suffix,))
    if args.figure:
        check_target(args.figure, "", figure=True)
    if args.slice is not None and not args.figure:
        raise InvalidArgument("--slice needs --figure, because it chooses the slice of the figure; give --figure FILE")
    if args.real_scans:
        _real_scans(args)
        return
    from deformmamba.data.scans import describe_splits
    from deformmamba.evaluation.compare import compare
    from deformmamba.physics.degradations import parse

    scans = chosen(args.data, args.split, args.group, args.subject)
    models = {name: load_model(name) for name in args.model}
    scales = sorted({model.scale for model in models.values()} | ({args.scale} if args.scale else set()))
    if not scales:
        raise InvalidArgument("no MODEL given; name one or more, or give --scale S to evaluate the interpolations only")
    if len(scales) > 1:
        raise InvalidArgument(f"the scales of MODEL and --scale differ: {scales}; evaluate one scale at a time")
    degradation = parse(args.degradation, scale=scales[0])
    models = interpolations(degradation) | models
    for model in models.values():
        model.to(device_here(args.device))
    result = compare(
        models,
        scans,
        against=args.against or next(iter(args.model), None),
        protocol=args.protocol,
        degradation=degradation,
        metrics=args.metric,
        consistency=args.consistency,
        seed=args.seed,
        show=bool(args.figure),
        at=args.slice,
        progress=not is_quiet(),
    )
    for line in [*describe_splits(scans), *result.table().splitlines()]:
        tell(line)
    if args.json:
        _write_json(args.json, result.to_dict())
    if args.csv:
        write_text(args.csv, result.to_csv())
    if args.figure:
        from deformmamba.pictures.figures import comparison

        shown = result.shown
        assert shown is not None
        names = [short(name) for name in shown.results]
        names = names if len({*names}) == len(names) else list(shown.results)
        pictures = dict(zip(names, shown.results.values(), strict=True))
        title = f"{shown.title}, {scales[0]}x, {degradation}"
        comparison(shown.hr, pictures, args.figure, spacing=shown.spacing, title=title)
