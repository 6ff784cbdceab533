"""The exported files compared with PyTorch: seconds per slice, ratio, file size and largest difference.

Run: python benchmarks/export.py [--model ixi-4x] [--sizes 64x64 96x128] [--threads 1] [--formats onnx openvino pt2]
     [--fixed] [--exported FOLDER]

Each file is compared with `upscale` when it is exported, and again here on every timed slice; a file that differs is
not timed. The runtimes run in turns, so other work on the machine affects all of them. The table has the medians over
the rounds: of each runtime's seconds of processor time, and of its ratio to PyTorch within a round. PyTorch runs the
steps of `upscale` on the same slice with the same data consistency; for weights for the slice direction, which
`upscale` refuses, it runs the network on the same section.

With --exported, files that an earlier run left in the folder are not exported again; "CPU s of export" is of that run.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import deformmamba
from deformmamba.export import FORMATS, export, onnx, openvino, pt2
from deformmamba.volume import intensity_scale

Runner = Callable[[dict[str, torch.Tensor]], torch.Tensor]
TOLERANCE = 1e-4  # as a share of the intensity scale, as in `export`
REFERENCE = "PyTorch"
BUDGET = 60.0  # seconds that all rounds of one size may take, after the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ixi-4x")
    parser.add_argument("--sizes", nargs="+", default=["64x64", "96x128"], metavar="HxW")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx", "openvino"])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--fixed", action="store_true", help="export for each size alone (`export --size H W`)")
    parser.add_argument("--exported", type=Path, metavar="FOLDER", help="keep exports in this folder, and take them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = deformmamba.from_pretrained(args.model)
    files: dict[str, Runner] = {}
    facts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.exported or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{args.model}, {args.threads} threads, torch {torch.__version__}, "
              f"{platform.processor() or platform.machine()}")  # fmt: skip
        print("| weights | pixels | runtime | CPU s per slice | ratio | difference | file, MB | CPU s of export |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for size in args.sizes:
            h, w = (int(n) for n in size.split("x"))
            if args.fixed or not files:
                for name in args.formats:
                    file = f"{args.model}-{size if args.fixed else 'free'}"
                    files[name], facts[name] = exported(model, folder / file, name, (h, w) if args.fixed else None)
            for name, seconds, ratio, difference in timed(model, files, h, w, args.runs):
                print(f"| {args.model} | {h}x{w} | {name} | {seconds:.3f} | {ratio:.2f} | {difference:.1e} | "
                      f"{facts.get(name, '- | -')} |", flush=True)  # fmt: skip


def exported(model: deformmamba.SRModel, stem: Path, name: str, size: tuple[int, int] | None) -> tuple[Runner, str]:
    """The file `stem` with the ending of format `name` as a function of its inputs, exported if it is not there.

    Also its size in MB, and the seconds of processor time of its export, as cells.
    """
    path = stem.with_suffix(".xml" if name == "openvino" else f".{name}")
    took = stem.with_suffix(f".{name}-seconds")
    if not took.exists():
        start = time.process_time()
        export(model, path, format=name, size=size)
        took.write_text(f"{time.process_time() - start:.0f}")
    run: Runner = {"onnx": onnx.runner, "openvino": openvino.runner, "pt2": pt2.runner}[name](path)
    parts = (path, path.with_suffix(".bin")) if name == "openvino" else (path,)
    return run, f"{sum(part.stat().st_size for part in parts) / 1e6:.2f} | {took.read_text()}"


def reference(model: deformmamba.SRModel, image: np.ndarray) -> np.ndarray:
    """The result of PyTorch for one slice (1, h, w) without negative values."""
    if model.scale > 1:
        return deformmamba.upscale(model, image, axis=0)
    unit = np.float32(intensity_scale(image, model.intensity))
    with torch.inference_mode():
        return np.maximum(model(torch.from_numpy(image / unit)[:, None])[:, 0].numpy() * unit, 0)


def timed(
    model: deformmamba.SRModel, files: dict[str, Runner], h: int, w: int, runs: int
) -> list[tuple[str, float, float, float]]:
    """(runtime, CPU seconds per slice, ratio to PyTorch, largest difference as a share of the intensity scale)."""
    image = np.random.default_rng(0).random((1, h, w), np.float32) * 1000
    wanted = reference(model, image)
    unit = intensity_scale(image)
    inputs = {"lr": torch.from_numpy(image)[:, None], "units": torch.zeros(3)}
    differences = {name: float(np.abs(run(inputs)[:, 0].numpy() - wanted).max()) / unit for name, run in files.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} differs by {difference:.3g} of the intensity scale at {h}x{w}; not timed")
    calls: dict[str, Callable[[], object]] = {REFERENCE: lambda: reference(model, image)}
    calls.update({name: lambda run=run: run(inputs) for name, run in files.items()})  # type: ignore[misc]
    rounds: list[dict[str, float]] = []
    begin = time.process_time()
    while len(rounds) < runs and (not rounds or time.process_time() - begin < BUDGET):
        rounds.append({name: _cpu_seconds(call) for name, call in calls.items()})
    return [
        (
            name,
            statistics.median(seconds[name] for seconds in rounds),
            statistics.median(seconds[name] / seconds[REFERENCE] for seconds in rounds),
            differences.get(name, 0.0),
        )
        for name in calls
    ]


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
