"""Real scans of thick slices made isotropic: expected gain, stripes at the slice period, steps at the ends.

Run: python benchmarks/isotropic_real.py SCAN [SCAN ...] [--adapt "150 steps"] [--figures DIR] [--out FILE.csv]

There is no truth. The gain is that on held-out in-plane slices (`IsotropicReport.expected`), without and with
adaptation. Stripes: power along the slice direction at the frequency of the slices (1 / spacing), under a Hann window,
averaged over all lines, divided by the mean power from 0.75 to 0.9 and from 1.1 to 1.25 times that frequency. An image
without a slice pattern has about 1 or less, a pattern makes a peak. The cubic spline is the reference. Steps: the mean
absolute difference of the first two planes, and of the planes on both sides of the last slice centre, divided by the
mean over all neighbouring planes.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from isotropic import append_row

from deformmamba.inference.isotropic import cubic_spline, isotropic
from deformmamba.pictures.sections import section_figure
from deformmamba.volume import read_volume


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--adapt", default="0")
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for path in args.scans:
        scan = read_volume(path)
        made = {adapt: isotropic(scan, adapt=adapt) for adapt in dict.fromkeys(("0", args.adapt))}
        plain, report = made["0"]
        images = {"cubic spline": replace(plain, array=np.ascontiguousarray(cubic_spline(scan)))}
        images |= {"thick" if adapt == "0" else "adapted": out for adapt, (out, _) in made.items()}
        n_slices = scan.array.shape[report.axis]
        for how, volume in images.items():
            stack = np.moveaxis(volume.array, report.axis, 0)
            first, last = steps(stack, n_slices, report.ratio)
            found = made["0" if how == "thick" else args.adapt][1]
            row: dict[str, Any] = {
                "scan": path.name,
                "ratio": round(report.ratio, 2),
                "method": how,
                "expected": "" if how == "cubic spline" or not found.expected else round(found.expected.db, 2),
                "chosen": "" if how == "cubic spline" else found.method,
                "adapted": "" if how == "cubic spline" else found.adapted,
                "stripes": round(stripes(stack, report.ratio), 2),
                "first": round(first, 2),
                "last": round(last, 2),
            }
            print(*row.values(), sep="\t", flush=True)
            if args.out:
                append_row(args.out, row)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            figure = args.figures / f"{path.name.removesuffix('.nii.gz')}.png"
            section_figure({"input": scan, **images}, figure, axis=report.axis, title=f"{path.name}: {report}")


if __name__ == "__main__":
    main()
