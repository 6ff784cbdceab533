"""The exported files compared with PyTorch: seconds per slice, ratio, file size and largest difference.

Run: python benchmarks/export.py [--model ixi-4x] [--size 64 64] [--threads 1] [--formats onnx openvino]

Each file is compared with `upscale` when it is exported, and again here on the timed slice; a file that differs is not
timed. The runtimes run in turns, and the table has the fastest run of each, in seconds of processor time, which other
work on the machine affects less. PyTorch runs the steps of `upscale` on the same slice with the same data consistency.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import deformmamba
from deformmamba.export import FORMATS, export, onnx, openvino, pt2
from deformmamba.volume import intensity_scale

TOLERANCE = 1e-4  # as a share of the intensity scale, as in `export`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ixi-4x")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx", "openvino"])
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = deformmamba.from_pretrained(args.model)
    image = np.random.default_rng(0).random(args.size, np.float32)[None] * 1000
    wanted = deformmamba.upscale(model, image, axis=0)
    unit = intensity_scale(image)
    inputs = {"lr": torch.from_numpy(image)[:, None], "units": torch.zeros(3)}
    runs: dict[str, Callable[[], object]] = {"PyTorch (upscale)": lambda: deformmamba.upscale(model, image, axis=0)}
    facts: dict[str, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats:
            path = Path(folder) / f"model.{'xml' if name == 'openvino' else name}"
            start = time.process_time()
            export(model, path, format=name)
            seconds = time.process_time() - start
            run = {"onnx": onnx.runner, "openvino": openvino.runner, "pt2": pt2.runner}[name](path)
            difference = float(np.abs(run(inputs)[:, 0].numpy() - wanted).max()) / unit
            if not difference <= TOLERANCE:
                raise SystemExit(f"{name} differs by {difference:.3g} of the intensity scale; not timed")
            size = sum(part.stat().st_size for part in Path(folder).glob("model.*") if part.stem == "model")
            facts[name] = (size / 1e6, difference, seconds)
            runs[name] = lambda run=run: run(inputs)  # type: ignore[misc]
            for part in Path(folder).glob("model.*"):
                part.unlink()
        best = dict.fromkeys(runs, float("inf"))
        for turn in range(args.runs + 1):  # the first run is a warm-up
            for name, run_once in runs.items():
                start = time.process_time()
                run_once()
                if turn:
                    best[name] = min(best[name], time.process_time() - start)
    print(f"{args.model}, {args.size[0]}x{args.size[1]}, {args.threads} threads, torch {torch.__version__}, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    print("| runtime | CPU seconds a slice | ratio | file, MB | largest difference | CPU seconds of the export |")
    print("|---|---|---|---|---|---|")
    reference = best["PyTorch (upscale)"]
    for name, seconds in best.items():
        size, difference, exporting = facts.get(name, (0.0, 0.0, 0.0))
        rest = f"{size:.2f} | {difference:.1e} | {exporting:.0f}" if name in facts else "- | - | -"
        print(f"| {name} | {seconds:.3f} | {seconds / reference:.2f} | {rest} |")


if __name__ == "__main__":
    main()
