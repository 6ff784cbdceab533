"""inspect: shows the properties of a scan before processing."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deformmamba.cli.arguments import PLANES, add_command, add_source, load_model, reading, sizes, sliced, tell
from deformmamba.errors import counted

if TYPE_CHECKING:
    from deformmamba.models import SRModel
    from deformmamba.volume import Volume
    from deformmamba.volume.inspection import Inspection

_TOWARDS = {"R": "right", "L": "left", "A": "front", "P": "back", "S": "head", "I": "feet"}


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "print the properties of a scan, its true resolution and the weights that fit",
        "inspect scan.nii.gz",
    )
    add_source(parser)
    parser.add_argument("--model", metavar="NAME", help="also compare the scan with the training data of these weights")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _inspect(args: argparse.Namespace) -> None:
    from deformmamba.inference.choice import ranked_weights
    from deformmamba.volume import no_scan
    from deformmamba.volume.inspection import inspect_volume

    volume, n_volumes = _read(args)
    model = load_model(args.model) if args.model else None
    found = inspect_volume(volume, axis=args.axis, model=model)
    fits = ranked_weights(volume, found.axis, path=args.input)
    effective = ranked_weights(volume, found.axis, path=args.input, pixel=found.resolution)
    kind = no_scan(args.input, volume)
    taken = sliced(volume, found.axis, args.axis)
    if args.json:
        ranked = {"weights": fits, "weights_effective": effective}
        shown = {name: [asdict(fit) for fit in ranking] for name, ranking in ranked.items()}
        facts = {"not_a_scan": kind or None, "axis_from": taken, "interpolated": found.interpolated}
        tell(json.dumps({**asdict(found), **facts, "notes": volume.notes, "volumes": n_volumes, **shown}))
        return
    several = f"{n_volumes} volumes; of the first: " if n_volumes > 1 else ""
    tell(f"{args.input}: {several}{sizes(volume)}")
    for sentence in (
        *([f"not a scan: {kind}"] if kind else []),
        _placed(found),
        taken,
        _values(found, volume, model),
        found.filling,
        *found.remarks,
    ):
        tell(f"  {sentence[0].upper()}{sentence[1:]}.")
    if found.interpolated:
        tell("  deformmamba upscale --effective removes this interpolation first.")
    rankings = {"": fits} | ({" after --effective": effective} if found.interpolated else {})
    for when, ranking in rankings.items():
        tell(f"  Published weights for upscale{when}, best first:")
        for fit in ranking:
            tell(f"    {fit.name}: {fit.reason}")


def _read(args: argparse.Namespace) -> "tuple[Volume, int]":
    """The volume to inspect (the first if none is chosen), and the number of volumes."""
    from deformmamba.volume import ChoiceNeeded, count_volumes, read_volume

    try:
        return read_volume(args.input, **reading(args)), 1
    except ChoiceNeeded as choice:
        if choice.argument != "volume" or args.volume is not None:
            raise
    n_volumes = count_volumes(args.input, **{k: v for k, v in reading(args).items() if k not in ("nan", "volume")})
    return read_volume(args.input, **{**reading(args), "volume": 0}), n_volumes


def _placed(found: "Inspection") -> str:
    n, (h, w) = found.shape[found.axis], found.matrix
    slices = f"{counted(n, 'slice')} of {h} x {w} pixels across axis {found.axis}"
    if found.orientation is None or found.tilt is None:
        return slices
    axes = ", ".join(f"{a} towards the {_TOWARDS[letter]}" for a, letter in enumerate(found.orientation))
    tilted = f", tilted by {found.tilt:.0f} degrees" if found.tilt >= 0.5 else ""
    return f"{slices}: {PLANES[found.orientation[found.axis]]}{tilted}; axis {axes}"


def _values(found: "Inspection", volume: "Volume", model: "SRModel | None") -> str:
    """The range of the voxels; for a model that upscales slices and does not normalise each itself, also its unit."""
    from deformmamba.data.thick_slices import trained_on
    from deformmamba.volume import intensity_scale

    said = f"values from {found.lowest:.5g} to {found.highest:.5g}"
    if model is None or model.any_intensity or trained_on(model.provenance) is not None:
        return said
    percentile = "largest" if model.intensity == "max" else f"{model.intensity.removeprefix('p')}th percentile"
    scale = intensity_scale(volume.array, model.intensity)
    return f"{said}; the model gets them divided by {scale:.5g}, the {percentile} of the non-zero ones"
