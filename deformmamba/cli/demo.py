"""demo: two scans that came with the installation."""

import argparse
from pathlib import Path
from typing import Any

from deformmamba.cli.arguments import add_command, add_model, add_running, load_model, running, short
from deformmamba.cli.upscale import upscale_and_draw
from deformmamba.errors import InvalidArgument


def add(commands: Any) -> None:
    parser = add_command(
        commands, "demo", _demo, "upscale two scans that came with the installation", "demo -o look-here"
    )
    parser.add_argument("-o", "--output", default="deformmamba-demo", metavar="DIR", help="default: deformmamba-demo")
    add_model(parser)
    add_running(parser)


def _demo(args: argparse.Namespace) -> None:
    import nibabel
    from pydicom.data import get_testdata_file

    brain = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    samples = [(Path(str(get_testdata_file("MR_small.dcm", download=False))), None), (brain, 0)]
    if not all(path.is_file() for path, _ in samples):
        raise InvalidArgument(
            "the test scans that pydicom and nibabel bring along are not installed; reinstall both with pip"
        )
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{folder}: cannot be made: {error.strerror}; choose another folder with -o") from None
    model = load_model(args.model)
    for path, index in samples:
        stem = folder / f"{path.name.split('.')[0]}_{short(args.model)}"
        output, figure = (stem.with_name(stem.name + ending) for ending in (".nii.gz", ".png"))
        upscale_and_draw(model, args.model, path, output, volume=index, figure=figure, **running(args))
