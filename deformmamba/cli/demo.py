"""demo: degrades two images and upscales them, compares with the truth, and prints the command for the user's scan."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import (
    DEFAULT_MODEL,
    add_command,
    add_model,
    add_running,
    load_model,
    running,
    say,
    short,
    sizes,
)
from deformmamba.errors import InvalidArgument

if TYPE_CHECKING:
    from deformmamba.models import SRModel
    from deformmamba.volume import Volume

SECOND_MODEL = "ixi-2x"
PIXEL = 0.9  # mm of the phantom, as IXI's T2 scans have


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        _demo,
        "upscale a phantom and a real scan, compare both with the truth, and draw figures",
        "demo -o look-here",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="deformmamba-demo",
        metavar="DIR",
        help="folder for the results (default: deformmamba-demo)",
    )
    add_model(parser)
    add_running(parser)


def _demo(args: argparse.Namespace) -> None:
    from deformmamba.volume.files import make_folder

    settings = running(args)
    # the real scan has coarse pixels: cropped by 2 they are inside the trained range of the 2x weights, by 4 at its end
    second = SECOND_MODEL if args.model == DEFAULT_MODEL else args.model
    models = {name: load_model(name) for name in (args.model, second)}
    folder = Path(args.output)
    make_folder(folder)
    for name, model in models.items():
        if model.grid != "origin":
            raise InvalidArgument(
                f"--model {name}: trained on the {model.grid} grid; the demo crops k-space and needs the origin grid"
            )
    _prepare_kernels(models[args.model], settings["device"])
    cases = (
        ("phantom", "a synthetic head drawn by this package, not a scan", _phantom, args.model),
        ("brain", "a real scan, nibabel's example4d.nii.gz, not in the training data", _brain, second),
    )
    for name, what, read, network in cases:
        say("")
        say(f"{name}: {what}")
        _show(name, read(), models[network], short(network), folder, settings)
    chosen = "" if args.model == DEFAULT_MODEL else f" --model {args.model}"
    say("")
    say("next, your own scan: first its properties and whether the weights fit, then the result")
    say("  deformmamba inspect scan.nii.gz")
    say(f"  deformmamba upscale scan.nii.gz -o sharper.nii.gz{chosen} --figure look.png")


def _prepare_kernels(model: "SRModel", device: str) -> None:
    """Runs the model once on a small image, so that the times below do not include compilation."""
    import torch

    start = time.monotonic()
    side = max(model.minimum_size, 8)
    with torch.inference_mode():
        model.placed(device)(torch.zeros(1, model.channels or 1, side, side, device=device))
    say(f"kernels ready in {time.monotonic() - start:.1f} s (compiled once on a machine, then read from disk)")


def _phantom() -> "Volume":
    import numpy as np

    from deformmamba.physics.phantom import head
    from deformmamba.volume import Volume

    # radiological orientation: rows run to the back, columns to the patient's left
    array = 1000 * head().T[::-1, ::-1, None]
    return Volume(np.ascontiguousarray(array), np.diag([PIXEL, PIXEL, 3.0, 1.0]))


def _brain() -> "Volume":
    import nibabel

    from deformmamba.volume import read_volume

    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise InvalidArgument(
            "nibabel's example scan, tests/data/example4d.nii.gz, is missing; reinstall nibabel with pip"
        )
    return read_volume(path, volume=0)


def _show(name: str, truth: "Volume", model: "SRModel", network: str, folder: Path, settings: dict[str, Any]) -> None:
    """Degrades `truth` to a shorter scan, upscales it, and writes files, a figure and scores."""
    import numpy as np

    from deformmamba.inference import coarsen, upscale
    from deformmamba.metrics import psnr
    from deformmamba.models import Bicubic, ZeroFill
    from deformmamba.physics.degradations import parse
    from deformmamba.pictures.figures import comparison, oriented
    from deformmamba.volume import chosen_axis, write_volume

    axis = chosen_axis(truth, None)
    coarse = coarsen(truth, parse("k-space", scale=model.scale), axis=axis)
    start = time.monotonic()
    sharp = upscale(model, coarse, axis=axis, **settings)
    seconds = time.monotonic() - start
    results = {
        "bicubic": upscale(Bicubic(scale=model.scale), coarse, axis=axis),
        "zero-filled": upscale(ZeroFill(scale=model.scale), coarse, axis=axis),
        network: sharp,
    }
    for kind, volume in (("truth", truth), ("coarse", coarse), (network, sharp)):
        write_volume(folder / f"{name}_{kind}.nii.gz", volume)
    middle = truth.array.shape[axis] // 2
    seen = oriented(truth, axis, middle)
    comparison(
        seen.image,
        {kind: oriented(volume, axis, middle).image for kind, volume in results.items()},
        folder / f"{name}.png",
        spacing=seen.spacing,
        title=f"{name}: slice {middle + 1} of {truth.array.shape[axis]}, {model.scale}×",
    )
    say(f"  {sizes(coarse)}, made by cropping k-space, to {sizes(sharp)} in {seconds:.1f} s")
    hr = np.moveaxis(np.asarray(truth.array, np.float64), axis, 0)
    decibels = {kind: psnr(np.moveaxis(volume.array, axis, 0), hr) for kind, volume in results.items()}
    say("  PSNR against the truth: " + ", ".join(f"{kind} {value:.2f} dB" for kind, value in decibels.items()))
    say(f"  {folder / f'{name}.png'}: the truth, results, errors; {folder / f'{name}_*.nii.gz'}: the volumes")
