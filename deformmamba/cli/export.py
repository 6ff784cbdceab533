"""export: writes a model to a file for other programs."""

import argparse
from typing import Any

from deformmamba.cli.arguments import add_command, add_model, load_model, positive, say, short


def add(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        _export,
        "export a model to a file for other programs, and check the file's results against the model's",
        "export --format onnx --model ixi-4x -o ixi-4x.onnx",
    )
    export.add_argument(
        "--format",
        choices=("onnx", "openvino", "pt2"),
        required=True,
        help="ONNX, OpenVINO, or torch.export's .pt2; takes about a minute of processor time",
    )
    add_model(export)
    export.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="output file, replaced if it exists; OpenVINO: .xml, with a .bin file beside it",
    )
    export.add_argument(
        "--size", type=positive, nargs=2, metavar=("H", "W"), help="fixed input size (default: any size)"
    )
    export.add_argument(
        "--inputs",
        choices=("lr", "lr,units", "lr,base"),
        metavar="NAMES",
        default="lr",
        help="inputs of the file. lr (default): whole slices in scanner units; lr,units: slices and the intensities of "
        "the whole scan, both required; lr,base: the network alone, for tiles",
    )
    export.add_argument(
        "--consistency",
        choices=("exact", "object", "off"),
        help="data consistency inside the file (default: the best on validation data)",
    )
    export.add_argument(
        "--variant",
        choices=("scan", "linear-attention"),
        default="scan",
        help="ONNX only. scan: fast on a CPU (default); linear-attention: the operator of opset 27, for GPUs",
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
        variant=args.variant,
    )
    compared = " and ".join(f"{h}x{w}" for h, w in done.sizes)
    say(f"{args.output}: {short(args.model)} as {args.format}, input size {done.facts['size']}")
    say(f"  largest difference from the model on {compared} pixels of a real scan: {done.difference:.3g}")
