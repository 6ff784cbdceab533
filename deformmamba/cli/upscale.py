"""upscale: one scan, or every scan in a folder, at a finer resolution."""

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    positive,
    refuse,
    running,
    say,
    series_of,
    short,
    sizes,
)

if TYPE_CHECKING:
    from deformmamba.inference import Upscaled
    from deformmamba.inference.cohort import Outcome
    from deformmamba.models import SRModel


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "upscale",
        _upscale,
        "write a sharper version of a scan, or of every scan in a folder",
        "upscale scan.nii.gz -o sharper.nii.gz --figure look.png",
    )
    add_reading(parser)
    add_model(parser)
    add_running(parser)
    parser.add_argument(
        "--ensemble", action="store_true", help="mean over eight reflections and transposes; 8 x slower"
    )
    parser.add_argument(
        "--uncertainty", metavar="FILE", help="also write the standard deviation of these eight, in the same units"
    )
    parser.add_argument(
        "--effective", action="store_true", help="first undo the scanner's interpolation (zero-filling)"
    )
    parser.add_argument("--tile", type=positive, metavar="N", help="cut slices into tiles of N pixels (default: whole)")
    parser.add_argument("--overlap", type=int, metavar="M", help="pixels that tiles share (default: 16, at most N / 2)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="slices at once (default: as memory allows)")
    parser.add_argument("--report", metavar="HTML", help="also write a page for visual checks")
    parser.add_argument("--figure", metavar="PNG", help="also draw before and after (.png, .pdf or .svg)")


def _upscale(args: argparse.Namespace) -> int | None:
    from deformmamba.inference.cohort import is_cohort

    if is_cohort(args.input):
        return _upscale_folder(args)
    if args.figure:
        check_target(args.figure, args.input, figure=True)
    upscale_and_draw(
        load_model(args.model),
        args.model,
        args.input,
        args.output,
        figure=args.figure,
        uncertainty=args.uncertainty,
        report=args.report,
        series=series_of(args.series),
        **_options(args),
    )
    return None


def upscale_and_draw(
    model: "SRModel",
    name: str,
    source: str | Path,
    output: str | Path,
    *,
    figure: str | Path | None = None,
    uncertainty: str | None = None,
    report: str | None = None,
    **options: Any,
) -> None:
    """Upscales one scan to a file and prints a line for each file.

    Args:
        model, source, output, uncertainty, report, options: as `inference.upscale_file`.
        name: of the model, as the user gave it.
        figure: .png, .pdf or .svg: the middle slice before and after.
    """
    from deformmamba.inference import upscale_file

    done = upscale_file(
        model,
        source,
        output,
        uncertainty=uncertainty,
        report=report,
        keep=lambda n: (n // 2,) if figure else (),
        **options,
    )
    what = f"{sizes(done.place, done.shape)}, from {sizes(done.source)}"
    say(f"{output}: {what}; {short(name)} on {done.settings.device or 'cpu'} in {done.seconds:.1f} s")
    say(f"{source}: {done.remark}")
    if uncertainty:
        say(f"{uncertainty}: standard deviation of the eight")
    if figure:
        _draw(figure, done, model, f"{Path(source).name}, slice", short(name))
        say(f"{figure}: before and after")
    if report:
        say(f"{report}: a page for visual checks; open it in a browser")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that one scan and a folder share, as `upscale_file` takes them."""
    return {
        "volume": args.volume,
        "dtype": args.dtype,
        "effective": args.effective,
        "axis": args.axis,
        "batch_size": args.batch_size,
        "ensemble": args.ensemble,
        "tile": args.tile,
        "overlap": args.overlap,
        **running(args),
    }


def _draw(path: str | Path, done: "Upscaled", model: "SRModel", title: str, name: str) -> None:
    """Before, bicubic and after, of the slice that was kept."""
    from deformmamba.inference import upscale
    from deformmamba.models import Bicubic
    from deformmamba.pictures.figures import before_after, oriented, oriented_like

    ((k, (image, _)),) = done.kept.items()
    n = done.source.array.shape[done.axis]
    lr = oriented(done.source, done.axis, k)
    one = replace(done.source, array=done.source.array.take([k], done.axis))
    plain = upscale(Bicubic(scale=model.scale, grid=model.grid), one, axis=done.axis)
    sharp = oriented_like(image, done.place, done.axis)
    before_after(
        lr.image,
        {"bicubic": oriented(plain, done.axis, 0).image, name: sharp.image},
        path,
        spacing=lr.spacing,
        labels=lr.labels,
        grid=model.grid,
        title=f"{title} {k + 1} of {n}, {model.scale}×",
    )


def _upscale_folder(args: argparse.Namespace) -> int:
    from deformmamba.inference.cohort import upscale_cohort

    check_folder(args, ("figure", "uncertainty", "report", "series"))
    model = load_model(args.model)
    return run_folder(
        args, "sr", lambda told: upscale_cohort(model, args.input, args.output, told=told, **_options(args))
    )


def check_folder(args: argparse.Namespace, for_one_scan: Sequence[str]) -> None:
    """Refuses options that are for one scan, and an output that is no folder."""
    from deformmamba.volume import VolumeError

    for option in for_one_scan:
        if getattr(args, option):
            raise VolumeError(f"{args.input}: is a folder of scans, and --{option} is for one scan; leave it out")
    if os.path.splitext(args.output)[1] and not os.path.isdir(args.output):
        raise VolumeError(
            f"{args.input}: holds no DICOM image, so it is a folder of scans, and the output is a folder too; "
            f"not {args.output}"
        )


def run_folder(
    args: argparse.Namespace, kind: str, made: Callable[[Callable[["Outcome"], None]], list["Outcome"]]
) -> int:
    """Runs `made` over a folder of scans and prints what became of each; the exit code."""
    from deformmamba.inference.cohort import summary

    def told(outcome: "Outcome") -> None:
        if outcome.status != "failed":  # these come at the end, together
            took = f" in {outcome.seconds:.1f} s; {outcome.remark}" if outcome.status == "made" else ""
            say(f"{outcome.status}: {outcome.output}{took}")

    # a scheduler's time limit ends as ctrl-C does: nothing half-written, and the summary of what was done
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = made(told)
        _wait_for_others()
    finally:
        signal.signal(signal.SIGTERM, before)
    count = {status: sum(o.status == status for o in outcomes) for status in ("made", "skipped", "failed")}
    say(f"{args.output}: {', '.join(f'{n} {status}' for status, n in count.items())}; see {summary(kind)}*.csv")
    for outcome in outcomes:
        if outcome.status == "failed":
            refuse(f"failed: {outcome.source}: {outcome.reason}")
    return 1 if count["failed"] else 0


def _wait_for_others() -> None:
    """torchrun stops all processes as soon as one of them ends in an exit code: none ends before all are done."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
    distributed.destroy_process_group()
