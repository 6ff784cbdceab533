"""upscale and degrade: one scan made of another, finer or coarser; or a folder of scans, all of them finer."""

import argparse
import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba import __version__
from deformmamba.cli.arguments import (
    CONSISTENCIES,
    add_command,
    add_model,
    add_reading,
    add_running,
    check_not_input,
    check_target,
    device_here,
    load_model,
    positive,
    refuse,
    say,
    series_of,
    short,
    sizes,
)

if TYPE_CHECKING:
    from deformmamba.inference import Settings, Upscaled
    from deformmamba.inference.cohort import Outcome
    from deformmamba.models import SRModel


def add(commands: Any) -> None:
    upscale = add_command(
        commands,
        "upscale",
        _upscale,
        "write a sharper version of a scan, or of every scan in a folder",
        "upscale scan.nii.gz -o sharper.nii.gz --figure look.png",
    )
    add_reading(upscale)
    add_model(upscale)
    add_running(upscale)
    upscale.add_argument(
        "--ensemble", action="store_true", help="mean over eight reflections and transposes; 8 x slower"
    )
    upscale.add_argument(
        "--uncertainty", metavar="FILE", help="also write where these eight disagree, in the same units"
    )
    upscale.add_argument("--effective", action="store_true", help="first undo the scanner's own zero-filling")
    upscale.add_argument(
        "--tile", type=positive, metavar="N", help="cut slices into tiles of N pixels (default: whole)"
    )
    upscale.add_argument(
        "--overlap", type=int, metavar="M", help="pixels that tiles share (default: 16, at most N / 2)"
    )
    upscale.add_argument("--batch-size", type=positive, metavar="N", help="slices at once (default: as memory allows)")
    upscale.add_argument("--report", metavar="HTML", help="also write a page to look at input, output and what changed")
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
    degrade.add_argument(
        "--kind",
        default="k-space",
        metavar="TEXT",
        help='how, such as "blur:sigma=1.5 >> subsample >> rician:snr=30" (default: k-space, a scanner that measured '
        "less; a wrong name lists all)",
    )
    degrade.add_argument("--crop", action="store_true", help="leave out rows and columns beyond a multiple of S")
    degrade.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")


def _upscale(args: argparse.Namespace) -> int | None:
    from deformmamba.inference.cohort import is_cohort

    if is_cohort(args.input):
        return _upscale_folder(args)
    if args.figure:
        check_target(args.figure, args.input, figure=True)
    upscale_and_draw(load_model(args.model), args.input, args.output, args)
    return None


def upscale_and_draw(model: "SRModel", source: str | Path, output: str | Path, args: argparse.Namespace) -> None:
    """One scan to its file, and to args.figure before and after of the slice in the middle."""
    from deformmamba.inference import upscale_file

    settings = _settings(args)
    done = upscale_file(
        model,
        source,
        output,
        volume=args.volume,
        series=series_of(args.series),
        dtype=args.dtype,
        uncertainty=args.uncertainty,
        report=args.report,
        effective=args.effective,
        keep=lambda n: (n // 2,) if args.figure else (),
        **settings,
    )
    name = short(args.model)
    what = f"{sizes(done.place, done.shape)}, from {sizes(done.source)}"
    say(f"{output}: {what}; {name} on {settings['device']} in {done.seconds:.1f} s")
    say(f"{source}: {done.remark}")
    if args.uncertainty:
        say(f"{args.uncertainty}: standard deviation of the eight")
    if args.figure:
        _draw(args.figure, done, model, f"{Path(source).name}, slice", name)
        say(f"{args.figure}: before and after")
    if args.report:
        say(f"{args.report}: a page to look at; open it in a browser")


def _settings(args: argparse.Namespace) -> "Settings":
    return {
        "axis": args.axis,
        "batch_size": args.batch_size,
        "consistency": CONSISTENCIES.get(args.consistency),
        "ensemble": args.ensemble,
        "tile": args.tile,
        "overlap": args.overlap,
        "device": device_here(args.device),
        "progress": True,
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
    from deformmamba.inference.cohort import SUMMARY, upscale_cohort
    from deformmamba.volume import VolumeError

    for option in ("figure", "uncertainty", "report", "series"):
        if getattr(args, option):
            raise VolumeError(f"{args.input}: is a folder of scans, and --{option} is for one scan; leave it out")
    if os.path.splitext(args.output)[1] and not os.path.isdir(args.output):
        raise VolumeError(
            f"{args.input}: holds no DICOM image, so it is a folder of scans, and the output is a folder too; "
            f"not {args.output}"
        )

    def told(outcome: "Outcome") -> None:
        if outcome.status != "failed":  # these come at the end, together
            took = f" in {outcome.seconds:.1f} s; {outcome.remark}" if outcome.status == "made" else ""
            say(f"{outcome.status}: {outcome.output}{took}")

    model = load_model(args.model)
    # a scheduler's time limit ends as ctrl-C does: nothing half-written, and the summary of what was done
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = upscale_cohort(
            model,
            args.input,
            args.output,
            volume=args.volume,
            dtype=args.dtype,
            effective=args.effective,
            told=told,
            **_settings(args),
        )
        _wait_for_others()
    finally:
        signal.signal(signal.SIGTERM, before)
    count = {status: sum(o.status == status for o in outcomes) for status in ("made", "skipped", "failed")}
    say(f"{args.output}: {', '.join(f'{n} {status}' for status, n in count.items())}; see {SUMMARY}*.csv")
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


def _degrade(args: argparse.Namespace) -> None:
    from deformmamba.inference import coarsen
    from deformmamba.physics.degradations import parse
    from deformmamba.volume import check_output, read_volume, write_volume

    degradation = parse(args.kind, scale=args.scale)
    volume = read_volume(args.input, volume=args.volume, series=series_of(args.series))
    check_output(args.output, source=volume, dtype=args.dtype)
    check_not_input(args.output, args.input)
    coarse = coarsen(volume, degradation, axis=args.axis, crop=args.crop, seed=args.seed)
    write_volume(args.output, coarse, dtype=args.dtype, derivation=f"deformmamba {__version__}, degrade {degradation}")
    say(f"{args.output}: {sizes(coarse)}, from {sizes(volume)}")
