"""isotropic: makes the slice spacing of a scan equal to its pixel size."""

import argparse
from dataclasses import replace
from typing import Any

from deformmamba.cli.arguments import (
    CONSISTENCIES,
    add_command,
    add_reading,
    check_target,
    device_here,
    is_quiet,
    output_for,
    say,
    series_of,
    short,
    sizes,
)
from deformmamba.errors import counted

DEFAULT = "thick"


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "isotropic",
        _isotropic,
        "make a scan of thick slices isotropic, or every such scan in a folder",
        "isotropic scan.nii.gz -o iso.nii.gz --adapt 3 --figure look.png",
    )
    add_reading(parser, many=True)
    parser.add_argument(
        "--to", type=float, metavar="MM", help="voxel size of the output (default: the in-plane pixel size)"
    )
    parser.add_argument(
        "--thickness",
        type=float,
        metavar="MM",
        help="slice thickness (default: DICOM's SliceThickness, else the slice spacing)",
    )
    parser.add_argument(
        "--profile",
        default="gaussian",
        metavar="PROFILE",
        help="slice profile: gaussian (default), boxcar, or a file of two columns: mm from the slice centre, weight",
    )
    parser.add_argument(
        "--adapt",
        default="0",
        metavar="MINUTES",
        help='minutes for adapting the network to this scan, such as 3, or "400 steps" (default: 0, no adaptation)',
    )
    parser.add_argument("--model", default=DEFAULT, help=f"weights: a name, a path or org/repo (default: {DEFAULT})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    parser.add_argument(
        "--consistency",
        choices=CONSISTENCIES,
        default="object",
        help="make the output's slices equal the input's: exact; only inside the anatomy, reduced by the noise "
        "(object, default); or off",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the adaptation (default: 0)")
    parser.add_argument(
        "--uncertainty",
        metavar="FILE",
        help="also write an uncertainty map: half the difference of the results along the two in-plane axes",
    )
    parser.add_argument(
        "--as-image", action="store_true", help="also accept a mask, a phase image or an output of this package"
    )
    parser.add_argument("--report", metavar="HTML", help="also write an HTML report for visual checks")
    parser.add_argument("--figure", metavar="PNG", help="also draw the sections before and after (.png, .pdf or .svg)")


def _isotropic(args: argparse.Namespace) -> int | None:
    from deformmamba.cli.upscale import check_folder, run_folder
    from deformmamba.inference.cohort import is_cohort
    from deformmamba.inference.isotropic_files import isotropic_cohort, isotropic_file

    settings: dict[str, Any] = {
        "volume": args.volume,
        "nan": args.nan,
        "partial": args.partial,
        "dtype": args.dtype,
        "to": args.to,
        "thickness": args.thickness,
        "profile": args.profile,
        "adapt": args.adapt,
        "model": args.model,
        "seed": args.seed,
        "consistency": args.consistency,
        "axis": args.axis,
        "device": device_here(args.device),
        "progress": not is_quiet(),
    }
    if is_cohort(args.input):
        check_folder(args, ("figure", "uncertainty", "report", "series", "stack"))
        return run_folder(args, "iso", lambda told: isotropic_cohort(args.input, args.output, told=told, **settings))
    args.output = output_for(args, "iso")
    if args.figure:
        check_target(args.figure, args.input, figure=True)
    done = isotropic_file(
        args.input,
        args.output,
        series=series_of(args.series),
        stack=args.stack,
        as_image=args.as_image,
        uncertainty=args.uncertainty,
        report=args.report,
        **settings,
    )
    made = done.report
    how = short(args.model) if made.method == "network" else "cubic spline"
    adapted = f", adapted for {counted(made.adapted, 'step')}" if made.adapted else ""
    what = f"{sizes(done.result)}, from {sizes(done.source)}"
    say(f"{args.output}: {what}; {how}{adapted} on {settings['device']} in {made.seconds:.1f} s")
    say(f"{args.output}: {made}")
    say(f"{args.input}: slice thickness {made.thickness:.3g} mm, {made.thickness_from}; {made.profile} profile")
    for remark in made.remarks:
        say(f"{args.input}: {remark}")
    if args.uncertainty and made.method == "network":
        say(f"{args.uncertainty}: half the difference of the two orientations")
    elif args.uncertainty:
        say(f"{args.uncertainty}: not written, because the spline is the result and has no orientations to compare")
    if args.figure:
        _draw(args, done)
        say(f"{args.figure}: sections before and after")
    if args.report:
        say(f"{args.report}: report for visual checks; open it in a browser")
    return None


def _draw(args: argparse.Namespace, done: Any) -> None:
    import numpy as np

    from deformmamba.inference.isotropic import cubic_spline, derivation
    from deformmamba.inference.provenance import file_name
    from deformmamba.pictures.sections import section_figure

    made = done.report
    plain = cubic_spline(done.source, to=args.to, thickness=args.thickness, profile=args.profile, axis=args.axis)
    volumes = {"input": done.source, "cubic spline": replace(done.result, array=np.asarray(plain))}
    if made.method == "network":
        volumes[short(args.model)] = done.result
    gain = str(made)
    note = [derivation(made).split(", sha256")[0], gain[0].upper() + gain[1:]]
    note += [f"Warning: {text}" for text in made.warned]
    section_figure(volumes, args.figure, axis=made.axis, title=file_name(args.input), note=". ".join(note))
