"""export: writes a model to a file for other programs."""

import argparse
from typing import Any

from deformmamba.cli.arguments import add_command, add_model, load_model, positive, say, short


def add(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        _export,
        "write a model as a file for other programs, once the file has given what the model gives",
        "export --format onnx --model ixi-4x -o ixi-4x.onnx",
    )
    export.add_argument(
        "--format", choices=("onnx", "openvino", "pt2"), required=True, help="ONNX, OpenVINO, or torch.export's own"
    )
    add_model(export)
    export.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="replaced if it exists; OpenVINO: ends in .xml, with a .bin file beside it",
    )
    export.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="fixed (default: any size)")
    export.add_argument(
        "--inputs",
        choices=("lr", "lr,units", "lr,base"),
        default="lr",
        help="lr: whole slices in the scanner's units (default); lr,units: the intensities of the scan must be given; "
        "lr,base: the network alone, for tiles",
    )
    export.add_argument(
        "--consistency",
        choices=("exact", "object", "off"),
        help="data consistency inside the file (default: what was found best for the weights)",
    )


def _export(args: argparse.Namespace) -> None:
    from deformmamba.export import export

    model = load_model(args.model)
    done = export(
        model,
        args.output,
        format=args.format,
        size=args.size and tuple(args.size),
        inputs=args.inputs,
        consistency=args.consistency,
    )
    compared = " and ".join(f"{h}x{w}" for h, w in done.sizes)
    say(f"{args.output}: {short(args.model)} as {args.format}, input size {done.facts['size']}")
    say(f"  largest difference from the model on {compared} pixels of a real scan: {done.difference:.3g}")
