"""upscale and degrade: one scan made of another, finer or coarser."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import (
    add_command,
    add_model,
    add_reading,
    add_running,
    check_target,
    device_here,
    load_model,
    positive,
    say,
    short,
    sizes,
)

if TYPE_CHECKING:
    from deformmamba.models import SRModel
    from deformmamba.volume import Volume


def add(commands: Any) -> None:
    upscale = add_command(
        commands,
        "upscale",
        _upscale,
        "write a sharper version of a scan",
        "upscale scan.nii.gz -o sharper.nii.gz --figure look.png",
    )
    add_reading(upscale)
    add_model(upscale)
    add_running(upscale)
    upscale.add_argument("--batch-size", type=positive, metavar="N", help="slices at once (default: as memory allows)")
    upscale.add_argument("--figure", metavar="PNG", help="also draw before and after (.png, .pdf or .svg)")

    degrade = add_command(
        commands,
        "degrade",
        _degrade,
        "write what a coarser scan would have given",
        "degrade scan.nii.gz -o coarse.nii.gz --scale 4",
    )
    add_reading(degrade)
    degrade.add_argument("--scale", type=positive, required=True, metavar="S", help="how many times coarser in-plane")


def _upscale(args: argparse.Namespace) -> None:
    from deformmamba.volume import read_volume, write_volume

    check_target(args.output, args.input, dtype=args.dtype)
    if args.figure:
        check_target(args.figure, args.input, figure=True)
    volume = read_volume(args.input, volume=args.volume)
    model = load_model(args.model)
    sharp, seconds, device = run_model(model, volume, args)
    write_volume(args.output, sharp, dtype=args.dtype)
    say(f"{args.output}: {sizes(sharp)}, from {sizes(volume)}; {short(args.model)} on {device} in {seconds:.1f} s")
    if args.figure:
        draw(args.figure, volume, sharp, model, args.axis, args.input, short(args.model))
        say(f"{args.figure}: before and after")


def run_model(model: "SRModel", volume: "Volume", args: argparse.Namespace) -> tuple["Volume", float, str]:
    """The upscaled volume, the seconds it took and the device."""
    from deformmamba.inference import upscale

    device = device_here(args.device)
    start = time.perf_counter()
    sharp = upscale(
        model,
        volume,
        axis=args.axis,
        batch_size=args.batch_size,
        consistency=args.consistency,
        device=device,
        progress=True,
    )
    return sharp, time.perf_counter() - start, device


def draw(
    path: str | Path, volume: "Volume", sharp: "Volume", model: "SRModel", axis: int | None, source: str, name: str
) -> None:
    """Before, bicubic and after, of the slice in the middle."""
    from deformmamba.figures import before_after, oriented
    from deformmamba.inference import upscale
    from deformmamba.models import Bicubic
    from deformmamba.volume import slice_axis

    axis = slice_axis(volume) if axis is None else axis
    n = volume.array.shape[axis]
    one = replace(volume, array=volume.array.take([n // 2], axis))
    plain = upscale(Bicubic(scale=model.scale, grid=model.grid), one, axis=axis)
    lr = oriented(volume, axis, n // 2)
    before_after(
        lr.image,
        {"bicubic": oriented(plain, axis, 0).image, name: oriented(sharp, axis, n // 2).image},
        path,
        spacing=lr.spacing,
        labels=lr.labels,
        grid=model.grid,
        title=f"{Path(source).name}, slice {n // 2 + 1} of {n}, {model.scale}×",
    )


def _degrade(args: argparse.Namespace) -> None:
    from deformmamba.volume import read_volume, write_volume

    check_target(args.output, args.input, dtype=args.dtype)
    if args.scale < 1:
        raise ValueError(f"--scale must be 1 or more, not {args.scale}")
    volume = read_volume(args.input, volume=args.volume)
    from deformmamba.inference import coarsen

    coarse = coarsen(volume, args.scale, axis=args.axis)
    write_volume(args.output, coarse, dtype=args.dtype)
    say(f"{args.output}: {sizes(coarse)}, from {sizes(volume)}")
