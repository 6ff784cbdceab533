"""inspect: what a scan says about itself, before anything is made of it."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import add_command, load_model, sizes, tell

if TYPE_CHECKING:
    from deformmamba.volume.inspection import Inspection

_TOWARDS = {"R": "right", "L": "left", "A": "front", "P": "back", "S": "head", "I": "feet"}
_PLANES = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}


def add(commands: Any) -> None:
    parser = add_command(
        commands, "inspect", _inspect, "tell what a scan holds and how fine it really is", "inspect scan.nii.gz"
    )
    parser.add_argument("input", metavar="FILE", help=".nii, .nii.gz, .mgz, DICOM file, or folder of one DICOM series")
    parser.add_argument("--volume", type=int, metavar="K", help="which volume of a 4-D file, from 0")
    parser.add_argument(
        "--axis", type=int, choices=(0, 1, 2), help="where slices are stacked (default: as the geometry says)"
    )
    parser.add_argument("--model", metavar="NAME", help="also tell whether the scan is like those it was trained on")
    parser.add_argument("--json", action="store_true", help="for programs")


def _inspect(args: argparse.Namespace) -> None:
    from deformmamba.volume import read_volume
    from deformmamba.volume.inspection import inspect_volume

    volume = read_volume(args.input, volume=args.volume)
    model = load_model(args.model) if args.model else None
    found = inspect_volume(volume, axis=args.axis, model=model)
    if args.json:
        tell(json.dumps(asdict(found)))
        return
    tell(f"{args.input}: {sizes(volume)}")
    for sentence in (_placed(found), _values(found), found.filling, *found.remarks):
        tell(f"  {sentence[0].upper()}{sentence[1:]}.")
    if found.interpolated:
        tell("  deformmamba upscale --effective starts from what was resolved.")


def _placed(found: "Inspection") -> str:
    slices = (
        f"{found.shape[found.axis]} slices of {found.matrix[0]} x {found.matrix[1]} pixels across axis {found.axis}"
    )
    if found.orientation is None or found.tilt is None:
        return slices
    axes = ", ".join(f"{a} towards the {_TOWARDS[letter]}" for a, letter in enumerate(found.orientation))
    tilted = f", tilted by {found.tilt:.0f} degrees" if found.tilt >= 0.5 else ""
    return f"{slices}: {_PLANES[found.orientation[found.axis]]}{tilted}; axis {axes}"


def _values(found: "Inspection") -> str:
    return (
        f"values from {found.lowest:.5g} to {found.highest:.5g}; a model sees them divided by {found.intensity:.5g}, "
        "the 99.9th percentile of the non-zero ones"
    )
