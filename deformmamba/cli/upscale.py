"""upscale: super-resolution of one scan, or of every scan in a folder."""

import argparse
import math
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import (
    add_command,
    add_model,
    add_reading,
    add_running,
    check_target,
    load_model,
    note,
    output_for,
    positive,
    reading,
    refuse,
    running,
    say,
    short,
    sizes,
    sliced,
    with_options,
)
from deformmamba.errors import InvalidArgument, counted

if TYPE_CHECKING:
    from deformmamba.inference import Upscaling
    from deformmamba.inference.cohort import Outcome
    from deformmamba.models import SRModel


# outputs larger than this, in bytes, are announced before they are computed
LARGE = 20e6


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "upscale",
        _upscale,
        "write a sharper version of a scan, or of every scan in a folder",
        "upscale scan.nii.gz -o sharper.nii.gz --figure look.png",
    )
    add_reading(parser, many=True)
    add_model(parser, auto=True)
    add_running(parser)
    parser.add_argument("--ensemble", action="store_true", help="mean over eight flips and rotations; 8 times slower")
    parser.add_argument(
        "--uncertainty",
        metavar="FILE",
        help="also write an uncertainty map: the standard deviation over eight flips and rotations",
    )
    parser.add_argument(
        "--effective",
        action="store_true",
        help="first undo the scanner's zero-filling in k-space",
    )
    parser.add_argument(
        "--tile", type=positive, metavar="N", help="process slices in tiles of N pixels (default: whole slices)"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="M",
        help="overlap of neighbouring tiles in pixels (default: 16, or N / 2 if that is less)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="slices per batch (default: as many as fit into memory)"
    )
    parser.add_argument(
        "--as-image", action="store_true", help="also accept a mask, a phase image or an output of this command"
    )
    parser.add_argument("--report", metavar="HTML", help="also write an HTML report for visual checks")
    parser.add_argument("--figure", metavar="PNG", help="also draw before and after (.png, .pdf or .svg)")


def _upscale(args: argparse.Namespace) -> int | None:
    from deformmamba.inference.cohort import is_cohort

    if is_cohort(args.input):
        return _upscale_folder(args)
    output = output_for(args, "sr")
    if args.figure:
        check_target(args.figure, args.input, figure=True)
    if args.model == "auto":
        args.model = _best_weights(args)
    upscale_and_draw(
        load_model(args.model),
        args.model,
        args.input,
        output,
        figure=args.figure,
        uncertainty=args.uncertainty,
        report=args.report,
        as_image=args.as_image,
        **_options(args),
        **reading(args),
    )
    return None


def _best_weights(args: argparse.Namespace) -> str:
    """The published weights that fit the scan best; prints their name and the reason."""
    from deformmamba.inference.choice import ranked_weights
    from deformmamba.volume import ChoiceNeeded, chosen_axis, read_volume
    from deformmamba.volume.inspection import inspect_volume

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are shown when the scan is read again
        try:
            volume = read_volume(args.input, **reading(args))
        except ChoiceNeeded as choice:
            if choice.argument != "volume" or args.volume is not None:
                raise
            volume = read_volume(args.input, **{**reading(args), "volume": 0})
    axis = chosen_axis(volume, args.axis)
    pixel = inspect_volume(volume, axis=axis).resolution if args.effective else None
    best = ranked_weights(volume, axis, path=args.input, pixel=pixel)[0]
    say(f"--model auto: {best.name}: {best.reason}")
    return best.name


def upscale_and_draw(
    model: "SRModel",
    name: str,
    source: str | Path,
    output: str | Path,
    *,
    figure: str | Path | None = None,
    uncertainty: str | None = None,
    report: str | None = None,
    axis: int | None = None,
    **options: Any,
) -> None:
    """Upscales one scan to a file and prints a line for each file.

    Args:
        model, source, output, uncertainty, report, axis, options: as `inference.upscale_file`.
        name: of the model, as the user gave it.
        figure: .png, .pdf or .svg: the middle slice before and after.
    """
    from deformmamba.inference import Upscaling, upscale_file
    from deformmamba.inference.drawing import draw_slice
    from deformmamba.inference.provenance import file_name

    def started(job: Upscaling, n_volumes: int) -> None:
        size = math.prod(job.shape) * n_volumes * (1 if uncertainty is None else 2)
        n_bytes = size * _itemsize(options.get("dtype"))
        several = f"{n_volumes} volumes, " if n_volumes > 1 else ""
        if n_bytes > LARGE:
            slices = counted(job.shape[job.axis], "slice")
            note(f"{source}: {several}{slices}, on {_cores(job)}; writes {n_bytes / 1e6:.0f} MB")

    done = upscale_file(
        model,
        source,
        output,
        uncertainty=uncertainty,
        report=report,
        axis=axis,
        keep=lambda n: (n // 2,) if figure else (),
        started=started,
        **options,
    )
    what = f"{sizes(done.place, done.shape)}, from {sizes(done.source)}"
    several = f"{done.n_volumes} volumes of " if done.n_volumes > 1 else ""
    say(f"{output}: {several}{what}; {short(name)} on {done.settings.device or 'cpu'} in {done.seconds:.1f} s")
    say(f"{source}: {sliced(done.source, done.axis, axis)}")
    say(f"{source}: {done.remark}")
    if uncertainty:
        say(f"{uncertainty}: standard deviation of the self-ensemble")
    if figure:
        draw_slice(figure, done, model, title=f"{file_name(source)}, slice", name=short(name))
        say(f"{figure}: before and after")
    if report:
        say(f"{report}: report for visual checks; open it in a browser")


def _itemsize(dtype: str | None) -> int:
    import numpy as np

    return np.dtype(dtype or "float32").itemsize


def _cores(job: "Upscaling") -> str:
    import torch

    n = torch.get_num_threads()
    return str(job.settings.device) if "cuda" in str(job.settings.device) else counted(n, "core")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options common to one scan and a folder, for `upscale_file`."""
    return {
        "dtype": args.dtype,
        "effective": args.effective,
        "axis": args.axis,
        "batch_size": args.batch_size,
        "ensemble": args.ensemble,
        "tile": args.tile,
        "overlap": args.overlap,
        **running(args),
    }


def _upscale_folder(args: argparse.Namespace) -> int:
    from deformmamba.inference.cohort import upscale_cohort

    check_folder(args, ("series", "stack"))
    if args.model == "auto":
        raise InvalidArgument(f"{args.input}: a folder of scans; --model auto works on one scan only; name the weights")
    folders = {name: getattr(args, name) for name in ("uncertainty", "figure", "report")}
    for name, path in folders.items():
        if path and os.path.splitext(path)[1] and not os.path.isdir(path):
            raise InvalidArgument(f"--{name} {path}: the input is a folder of scans; give a folder here, not a file")
    model = load_model(args.model)
    options = {**_options(args), **folders, "progress": False}
    options |= {name: value for name, value in reading(args).items() if name in ("volume", "nan", "partial")}
    return run_folder(args, "sr", lambda told: upscale_cohort(model, args.input, args.output, told=told, **options))


def check_folder(args: argparse.Namespace, for_one_scan: Sequence[str]) -> None:
    """Refuses options for single scans, and an output that is not a folder."""
    from deformmamba.volume import VolumeError

    if not args.output:
        raise InvalidArgument("no output given; give a folder with -o OUTPUT, or after the input")
    for option in (*for_one_scan, "as-image"):
        given = getattr(args, option.replace("-", "_"))
        if given is not None and given is not False:
            raise VolumeError(f"{args.input}: a folder of scans; --{option} works on one scan only; leave it out")
    if os.path.splitext(args.output)[1] and not os.path.isdir(args.output):
        raise VolumeError(
            f"{args.input}: contains no DICOM image, so it is read as a folder of scans; the output must be a folder "
            f"too, not {args.output}"
        )


def run_folder(
    args: argparse.Namespace, kind: str, made: Callable[[Callable[["Outcome"], None]], list["Outcome"]]
) -> int:
    """Runs `made` on a folder of scans and prints each outcome; returns the exit code."""
    from deformmamba.inference.cohort import summary

    def told(outcome: "Outcome") -> None:
        if outcome.status == "ignored":
            say(f"ignored: {outcome.source}: {outcome.reason}")
        elif outcome.status != "failed":  # failures are listed together at the end
            took = f" in {outcome.seconds:.1f} s; {outcome.remark}" if outcome.status == "made" else ""
            say(f"{outcome.status}: {outcome.output}{took}")

    outcomes = made(told)
    _wait_for_others()
    count = {status: sum(o.status == status for o in outcomes) for status in ("made", "skipped", "failed", "ignored")}
    say(f"{args.output}: {', '.join(f'{n} {status}' for status, n in count.items())}; see {summary(kind)}*.csv")
    for outcome in outcomes:
        if outcome.status == "failed":
            refuse(with_options(f"failed: {outcome.source}: {outcome.reason}", vars(args)))
    return 1 if count["failed"] else 0


def _wait_for_others() -> None:
    """Waits for all processes, because torchrun stops all of them as soon as one returns a nonzero exit code."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
    distributed.destroy_process_group()
