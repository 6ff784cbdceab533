"""Real scans of thick slices made isotropic: expected gain, stripes at the slice period, steps at the ends.

Run: python benchmarks/isotropic_real.py SCAN [SCAN ...] [--adapt "150 steps"] [--figures DIR] [--out FILE.csv]

There is no truth. The gain is that on held-out in-plane slices (`IsotropicReport.expected`), without and with
adaptation. The cubic spline is the reference for the rest.

* Stripes: power along the slice direction at the frequency of the slices (1 / spacing), under a Hann window, averaged
  over all lines, divided by the mean power from 0.75 to 0.9 and from 1.1 to 1.25 times that frequency. An image without
  a slice pattern has about 1 or less; a pattern makes a peak.
* Alternation: the same at twice the slice period. It exceeds 1 if odd and even slices differ, as in some interleaved
  scans.
* Steps: the mean absolute difference of the first two planes, and of the planes on both sides of the last slice centre,
  divided by the mean over all neighbouring planes.

A row is printed and appended to --out as soon as it is finished; a scan whose rows are all in --out is skipped, so an
interrupted run resumes. A scan of 256 x 256 x 50 slices without adaptation takes half a minute to a minute of one core.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from isotropic import append_row

from deformmamba.inference.isotropic import cubic_spline, isotropic
from deformmamba.inference.stack import Stack
from deformmamba.pictures.sections import section_figure
from deformmamba.volume import Volume, read_volume


def stripes(image: np.ndarray, ratio: float) -> float:
    """Power of (n, h, w) at the slice period of `ratio` planes over its surroundings along the first axis."""
    n = len(image)
    lines = (image - image.mean(0)).reshape(n, -1) * np.hanning(n)[:, None]

    def power(frequency: float) -> float:
        wave = np.exp(-2j * np.pi * np.arange(n) * frequency / ratio)
        return float(np.mean(np.abs(wave @ lines) ** 2))

    around = [0.75, 0.8, 0.85, 0.9, 1.1, 1.15, 1.2, 1.25]
    return power(1.0) / float(np.mean([power(frequency) for frequency in around]))


def steps(image: np.ndarray, n_slices: int, ratio: float) -> tuple[float, float]:
    """Change of (n, h, w) at the first and at the last slice centre, 1 for an average change between planes."""
    change = np.abs(np.diff(image, axis=0)).mean((1, 2))
    last = min(round((n_slices - 1) * ratio), len(change) - 1)
    return float(change[0] / change.mean()), float(change[last - 1 : last + 1].max() / change.mean())


def finished(path: Path | None, scan: str, methods: Sequence[str]) -> bool:
    """Whether the CSV file has a row for each method on this scan, so that an interrupted run can go on."""
    if path is None or not path.exists():
        return False
    with open(path, newline="") as table:
        found = {row["method"] for row in csv.DictReader(table) if row["scan"] == scan}
    return set(methods) <= found


def measured(scan: Volume, adapt: str | None) -> tuple[Volume, dict[str, Any]]:
    """The isotropic volume by network, or by cubic spline for None, and its row of the table."""
    start = time.process_time()
    facts: dict[str, Any] = {"expected": "", "chosen": "", "steps": ""}
    if adapt is None:
        job = Stack.of(scan)
        volume = replace(job.place, array=np.ascontiguousarray(cubic_spline(scan)))
        axis, ratio = job.axis, job.ratio
    else:
        volume, report = isotropic(scan, adapt=adapt, progress=True)
        axis, ratio = report.axis, report.ratio
        facts = {"expected": report.expected and round(report.expected.db, 2)}
        facts |= {"chosen": report.method, "steps": report.adapted}
    stack = np.moveaxis(volume.array, axis, 0)
    first, last = steps(stack, scan.array.shape[axis], ratio)
    facts |= {"stripes": round(stripes(stack, ratio), 2), "alternation": round(stripes(stack, 2 * ratio), 2)}
    facts |= {"first": round(first, 2), "last": round(last, 2)}
    return volume, {"ratio": round(ratio, 2), **facts, "cpu_s": round(time.process_time() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--adapt", help='minutes, or "150 steps"; default: the weights as they are')
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    methods: dict[str, str | None] = {"cubic spline": None, "thick": "0"}
    if args.adapt is not None:
        methods["adapted"] = args.adapt
    for number, path in enumerate(args.scans, 1):
        print(f"{path.name}: scan {number} of {len(args.scans)}", file=sys.stderr, flush=True)
        if finished(args.out, path.name, list(methods)):
            print(f"{path.name}: its rows are in {args.out} already", file=sys.stderr, flush=True)
            continue
        scan = read_volume(path)
        images = {"input": scan}
        for how, adapt in methods.items():
            images[how], facts = measured(scan, adapt)
            row = {"scan": path.name, "method": how, **facts}
            print(*row.values(), sep="\t", flush=True)
            if args.out:
                append_row(args.out, row)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            figure = args.figures / f"{path.name.removesuffix('.nii.gz')}.png"
            section_figure(images, figure, axis=Stack.of(scan).axis, title=path.name)
            print(f"{path.name}: sections in {figure}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
