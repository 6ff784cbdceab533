"""The command `deformmamba`: scans in, sharper scans out, and what belongs to that.

What a user did wrong ends in one line on stderr and exit code 2, with no output file left behind and an existing one
untouched; ctrl-C ends in exit code 130 on the same terms. Results go to stdout, everything else to stderr. Nothing here
imports torch until a command needs it.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deformmamba import __version__

if TYPE_CHECKING:
    from deformmamba.models import SRModel
    from deformmamba.volume import Volume

DEFAULT_MODEL = "ixi-4x"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` as in sys.argv[1:]. Returns the exit code, 0 if all went well."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            args.run(args)
        except KeyboardInterrupt:
            return _stop("interrupted; no half-written file is left", 130)
        except OSError as error:
            return _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except Exception as error:
            if _out_of_memory(error):
                return _stop("out of memory; try --batch-size 1, --device cpu or a machine with more of it")
            if not isinstance(error, _user_errors()):
                raise
            return _stop(str(error))
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    """What this package raises about its user's arguments and files; anything else is a bug and keeps its traceback."""
    errors: list[type[Exception]] = [ValueError, FloatingPointError]  # VolumeError is a ValueError
    for module, name in (
        ("deformmamba.weights", "WeightsError"),
        ("deformmamba.scan", "ScanBackendError"),
        ("deformmamba.extras", "MissingExtra"),
    ):
        if module in sys.modules:  # what was not imported was not raised
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for a GPU, and a plain RuntimeError for the CPU
    cuda = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, (MemoryError, cuda)) or "DefaultCPUAllocator" in str(error)


def _printable(text: str) -> str:
    """One line that any terminal can show: file names may hold newlines, escape codes and broken characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _stop(message: str, code: int = 2) -> int:
    print(f"deformmamba: {_printable(message)}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"deformmamba: warning: {_printable(str(message))}", file=sys.stderr)


def _say(text: str) -> None:
    print(_printable(text), flush=True)


# ---------------------------------------------------------------------------------------------------------- commands


def _upscale(args: argparse.Namespace) -> None:
    from deformmamba.volume import read_volume, write_volume

    _check_target(args.output, args.input, dtype=args.dtype)
    if args.figure:
        _check_target(args.figure, args.input, figure=True)
    volume = read_volume(args.input, volume=args.volume)
    model = _model(args.model)
    sharp, seconds, device = _run(model, volume, args)
    write_volume(args.output, sharp, dtype=args.dtype)
    _say(f"{args.output}: {_sizes(sharp)}, from {_sizes(volume)}; {_short(args.model)} on {device} in {seconds:.1f} s")
    if args.figure:
        _figure(args.figure, volume, sharp, model, args.axis, args.input, _short(args.model))
        _say(f"{args.figure}: before and after")


def _run(model: "SRModel", volume: "Volume", args: argparse.Namespace) -> tuple["Volume", float, str]:
    """The upscaled volume, the seconds it took and the device."""
    from deformmamba.inference import upscale

    device = _device(args.device)
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


def _figure(
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

    _check_target(args.output, args.input, dtype=args.dtype)
    if args.scale < 1:
        raise ValueError(f"--scale must be 1 or more, not {args.scale}")
    volume = read_volume(args.input, volume=args.volume)
    from deformmamba.inference import coarsen

    coarse = coarsen(volume, args.scale, axis=args.axis)
    write_volume(args.output, coarse, dtype=args.dtype)
    _say(f"{args.output}: {_sizes(coarse)}, from {_sizes(volume)}")


def _evaluate(args: argparse.Namespace) -> None:
    from deformmamba.volume import check_output

    if args.json:
        check_output(args.json, (".json",))
    from deformmamba.data import Scan, find_scans
    from deformmamba.models import Bicubic, ZeroFill
    from deformmamba.training import evaluate, mean_scores

    scans: list[Scan | str] = []
    for path in args.data:
        if os.path.isdir(path):
            found = find_scans(path)
            scans += [scan for scan in found if args.split in (None, scan.split)]
        else:
            scans.append(path)
    if not scans:
        raise ValueError(f"no volume of split {args.split!r} in {', '.join(args.data)}")
    models = {name: _model(name) for name in args.model}
    scales = sorted({model.scale for model in models.values()} | ({args.scale} if args.scale else set()))
    if len(scales) != 1:
        raise ValueError(
            f"one scale at a time: {scales or 'none'} given by MODEL and --scale; evaluate them one by one"
        )
    baselines: dict[str, SRModel] = {
        "bicubic": Bicubic(scale=scales[0]),
        "zero-filled k-space": ZeroFill(scale=scales[0]),
    }
    report = {}
    for name, model in {**baselines, **models}.items():
        model.to(_device(args.device))
        report[name] = evaluate(model, scans, protocol=args.protocol, consistency=args.consistency, progress=True)
    width = max(map(len, report))
    metrics = list(mean_scores(next(iter(report.values()))))
    n_subjects = len({row["subject"] for row in next(iter(report.values()))})
    _say(f"{len(scans)} volumes of {n_subjects} subjects at {scales[0]}x, protocol {args.protocol}: mean over subjects")
    _say(f"{'':{width}}  " + "  ".join(f"{metric:>7}" for metric in metrics))
    for name, rows in report.items():
        means = mean_scores(rows)
        _say(
            f"{name:{width}}  " + "  ".join(f"{means[m]:7.2f}" if m == "psnr" else f"{means[m]:7.4f}" for m in metrics)
        )
    if args.json:
        result = {
            "scale": scales[0],
            "protocol": args.protocol,
            "models": {
                name: {"source": (baselines | models)[name].source, "mean": mean_scores(rows), "volumes": rows}
                for name, rows in report.items()
            },
        }
        _write_text(args.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _train(args: argparse.Namespace) -> None:
    from deformmamba.training import train_recipe

    best = train_recipe(args.recipe, args.data, args.out, steps=args.steps, seed=args.seed)
    _say(f"{best}: the best checkpoint on the validation split")


def _weights_list(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, manifest

    entries = list_weights()
    if args.json:
        _say(json.dumps(entries))
        return
    for entry in entries:
        _say(f"{entry['name']:16} {entry['scale']}x  {entry['parameters'] / 1e6:6.2f} M parameters  {entry['summary']}")
    for name, plan in manifest()["planned"].items():
        _say(f"{name:16} planned: {plan['why']}")


def _weights_show(args: argparse.Namespace) -> None:
    from deformmamba.weights import card, weights_entry

    entry = weights_entry(args.name)
    for line in (json.dumps(entry, indent=2) if args.json else card(entry)).splitlines():
        _say(line)


def _weights_verify(args: argparse.Namespace) -> None:
    from deformmamba.weights import list_weights, verify

    for name in args.name or [entry["name"] for entry in list_weights()]:
        _say(f"{name}: ok, sha256 {verify(name)}")


def _backends(args: argparse.Namespace) -> None:
    from deformmamba.scan import backend_report

    rows = backend_report()
    if args.json:
        keys = ("name", "usable", "why", "cure")
        _say(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    for name, usable, why, cure in rows:
        _say(f"{name:12} {'yes' if usable else 'no':4} {why}{f'; {cure}' if cure else ''}")


def _export(args: argparse.Namespace) -> None:
    from deformmamba.export import export

    model = _model(args.model)
    done = export(model, args.output, format=args.format, size=args.size and tuple(args.size))
    compared = " and ".join(f"{h}x{w}" for h, w in done.sizes)
    _say(f"{args.output}: {_short(args.model)} as {args.format}, input size {done.facts['size']}")
    _say(f"  largest difference from the model on {compared} pixels of a real scan: {done.difference:.3g}")


def _demo(args: argparse.Namespace) -> None:
    import nibabel
    from pydicom.data import get_testdata_file

    from deformmamba.volume import read_volume, write_volume

    brain = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    samples = [(Path(str(get_testdata_file("MR_small.dcm", download=False))), None), (brain, 0)]
    if not all(path.is_file() for path, _ in samples):
        raise ValueError(
            "the test scans that pydicom and nibabel bring along are not installed; reinstall both with pip"
        )
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made: {error.strerror}; choose another folder with -o") from None
    model = _model(args.model)
    name = _short(args.model)
    for path, index in samples:
        volume = read_volume(path, volume=index)
        sharp, seconds, device = _run(model, volume, args)
        stem = folder / f"{path.name.split('.')[0]}_{name}"
        output, figure = stem.with_name(stem.name + ".nii.gz"), stem.with_name(stem.name + ".png")
        write_volume(output, sharp)
        _figure(figure, volume, sharp, model, args.axis, path.name, name)
        _say(f"{path.name}: {_sizes(volume)}")
        _say(f"  {output}: {_sizes(sharp)}, {name} on {device} in {seconds:.1f} s")
        _say(f"  {figure}: before and after")


# ---------------------------------------------------------------------------------------------------------- arguments


def _model(name: str) -> "SRModel":
    from deformmamba.models import from_pretrained

    return from_pretrained(name)


def _short(model: str) -> str:
    """What a model is called in a figure or a file name."""
    return Path(model).name.removesuffix(".safetensors")


def _device(name: str) -> str:
    """The device to run on: "auto" is CUDA where there is one, else the CPU; a name is obeyed or refused."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        available = "cpu" + (f", cuda (0 to {torch.cuda.device_count() - 1})" if torch.cuda.is_available() else "")
        raise ValueError(f"--device {name}: no such device here; there are: {available}") from None
    return name


def _check_target(output: str, source: str, *, dtype: str | None = None, figure: bool = False) -> None:
    from deformmamba.volume import VolumeError, check_output

    if figure:
        from deformmamba.figures import SUFFIXES

        check_output(output, SUFFIXES)
    elif output.lower().endswith((".dcm", ".ima")) or os.path.isdir(output):
        raise VolumeError(f"{output}: DICOM cannot be written yet; name a file ending in .nii.gz")
    else:
        check_output(output, dtype=dtype)
    if os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
        raise VolumeError(f"{output}: is the input itself; a scan is not overwritten by what was made of it")


def _sizes(volume: "Volume") -> str:
    shape, spacing = (
        " x ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in ns)
        for ns in (volume.array.shape, volume.spacing)
    )
    return f"{shape} voxels of {spacing} mm"


def _write_text(path: str, text: str) -> None:
    from deformmamba.volume import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(_stop(f"{message}; see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deformmamba",
        description="MR image super-resolution. Research software, not a medical device.",
        epilog="example: deformmamba upscale scan.nii.gz -o sharper.nii.gz",
    )
    parser.add_argument("--version", action="version", version=f"deformmamba {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, example: str, group: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: deformmamba {example}"
        )
        made.set_defaults(run=run)
        return made

    def reading(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "input", metavar="INPUT", help=".nii, .nii.gz, .mgz, DICOM file, or folder of one DICOM series"
        )
        made.add_argument("-o", "--output", required=True, help=".nii, .nii.gz or .mgz; replaced if it exists")
        made.add_argument("--volume", type=int, metavar="K", help="which volume of a 4-D file, from 0")
        made.add_argument(
            "--axis", type=int, choices=(0, 1, 2), help="where slices are stacked (default: as the geometry says)"
        )
        made.add_argument("--dtype", help="float32 (default), float64, int16, uint16, int32 or uint8")

    def running(made: argparse.ArgumentParser) -> None:
        made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
        made.add_argument(
            "--consistency",
            action=argparse.BooleanOptionalAction,
            help="make degrading the output give the input back (default: as found best for the weights)",
        )

    upscale = command(
        "upscale",
        _upscale,
        "write a sharper version of a scan",
        "upscale scan.nii.gz -o sharper.nii.gz --figure look.png",
    )
    reading(upscale)
    upscale.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"a name, a path or org/repo (default: {DEFAULT_MODEL})"
    )
    running(upscale)
    upscale.add_argument("--batch-size", type=_positive, metavar="N", help="slices at once (default: as memory allows)")
    upscale.add_argument("--figure", metavar="PNG", help="also draw before and after (.png, .pdf or .svg)")

    degrade = command(
        "degrade",
        _degrade,
        "write what a coarser scan would have given",
        "degrade scan.nii.gz -o coarse.nii.gz --scale 4",
    )
    reading(degrade)
    degrade.add_argument("--scale", type=_positive, required=True, metavar="S", help="how many times coarser in-plane")

    evaluate = command(
        "evaluate",
        _evaluate,
        "degrade high-resolution scans, upscale them and score the result",
        "evaluate ixi-4x --data scans/ --split test --json scores.json",
    )
    evaluate.add_argument(
        "model", metavar="MODEL", nargs="*", help="names, paths or org/repo; baselines are always there"
    )
    evaluate.add_argument("--data", nargs="+", required=True, metavar="PATH", help="scans, or folders of scans")
    evaluate.add_argument(
        "--split", choices=("train", "val", "test", "external"), help="only this split of the folders"
    )
    evaluate.add_argument("--scale", type=_positive, metavar="S", help="needed if no MODEL is given")
    evaluate.add_argument(
        "--protocol", choices=("volume", "slice"), default="volume", help="of the metrics (default: volume)"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write every row")
    running(evaluate)

    train = command("train", _train, "train a model by a recipe", "train ixi-4x --data scans/ --out runs/mine")
    train.add_argument("recipe", metavar="RECIPE", help="a name, or the path of a TOML file")
    train.add_argument("--data", required=True, metavar="DIR", help="folder of volumes, split by subject")
    train.add_argument("--out", required=True, metavar="DIR", help="where checkpoints go; resumes what is there")
    train.add_argument("--steps", type=_positive, help="instead of the recipe's")
    train.add_argument("--seed", type=int, help="instead of the recipe's")

    weights = command("weights", _weights_list, "list, show or verify published weights", "weights list")
    kinds = weights.add_subparsers(metavar="list | show | verify", required=True)
    listing = command("list", _weights_list, "what there is", "weights list", kinds)
    show = command("show", _weights_show, "the model card of one", "weights show ixi-4x", kinds)
    show.add_argument("name", metavar="NAME")
    for made in (listing, show):
        made.add_argument("--json", action="store_true", help="for programs")
    verify = command("verify", _weights_verify, "compare files with their hashes", "weights verify ixi-4x", kinds)
    verify.add_argument("name", metavar="NAME", nargs="*", help="default: all")

    backends = command("backends", _backends, "which scan kernels run here, and why not", "backends --json")
    backends.add_argument("--json", action="store_true", help="for programs")

    export = command(
        "export",
        _export,
        "write a model as a file for other programs, once the file has given what the model gives",
        "export --format onnx --model ixi-4x -o ixi-4x.onnx",
    )
    export.add_argument("--format", choices=("onnx", "pt2"), required=True, help="ONNX, or torch.export's own")
    export.add_argument("--model", default=DEFAULT_MODEL, help=f"a name, a path or org/repo (default: {DEFAULT_MODEL})")
    export.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="replaced if it exists; takes lr and, for a model with a global skip, base: the zero-filled whole slice",
    )
    export.add_argument("--size", type=_positive, nargs=2, metavar=("H", "W"), help="fixed (default: any size)")

    demo = command("demo", _demo, "upscale two scans that came with the installation", "demo -o look-here")
    demo.add_argument("-o", "--output", default="deformmamba-demo", metavar="DIR", help="default: deformmamba-demo")
    demo.add_argument("--model", default=DEFAULT_MODEL, help=f"a name, a path or org/repo (default: {DEFAULT_MODEL})")
    running(demo)
    demo.set_defaults(axis=None, batch_size=None)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number
