"""degrade: reduces the resolution of a scan, as in a faster measurement."""

import argparse
from typing import Any

from deformmamba.cli.arguments import (
    add_command,
    add_reading,
    output_for,
    positive,
    reading,
    say,
    sizes,
)
from deformmamba.errors import InvalidArgument


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "degrade",
        _degrade,
        "simulate a measurement of lower resolution from a scan",
        "degrade scan.nii.gz -o coarse.nii.gz --scale 4",
    )
    add_reading(parser)
    parser.add_argument(
        "--scale", type=positive, required=True, metavar="S", help="reduction of the in-plane resolution"
    )
    parser.add_argument(
        "--kind",
        default="k-space",
        metavar="TEXT",
        help='degradation model, such as "blur:sigma=1.5 >> subsample >> rician:snr=30" (default: k-space, which keeps '
        "the low frequencies, and the signs of negative voxels; an unknown name lists all models)",
    )
    parser.add_argument("--crop", action="store_true", help="crop rows and columns to a multiple of S")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the noise (default: 0)")
    parser.add_argument("--as-image", action="store_true", help="also accept a mask, a label image or a phase image")


def _degrade(args: argparse.Namespace) -> None:
    from deformmamba.inference.degrade_files import degrade_file
    from deformmamba.physics.degradations import parse

    degradation = parse(args.kind, scale=args.scale)
    if degradation.scale != args.scale:
        first = f"k-space >> {args.kind}"
        advice = f"for example --kind {first!r}" if degradation.scale == 1 else "one factor for both"
        raise InvalidArgument(
            f"--kind {args.kind!r} divides the size by {degradation.scale}, --scale is {args.scale}; give {advice}"
        )
    args.output = output_for(args, "degraded")
    volume, coarse = degrade_file(
        args.input,
        args.output,
        args.scale if args.kind == "k-space" else degradation,
        dtype=args.dtype,
        as_image=args.as_image,
        axis=args.axis,
        crop=args.crop,
        seed=args.seed,
        **reading(args),
    )
    say(f"{args.output}: {sizes(coarse)}, from {sizes(volume)}")
