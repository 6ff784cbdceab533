"""Draws the figure of docs/training-log.md: validation PSNR over the steps, for the published weights for `upscale`.

Run: python examples/plot_training_log.py [docs/images/training.png]
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
# name, PSNR of zero-filling on its validation subjects, the logs of its stages
NAMES = {
    "ixi-4x": (28.14, ("ixi-4x", *(f"ixi-4x-stage{stage}" for stage in range(2, 8)))),
    "ixi-2x": (33.29, ("ixi-2x", "ixi-2x-stage2", "ixi-2x-stage3")),
    "spine-4x": (23.37, ("spine-4x", "spine-4x-stage2")),
}
LABELS = (
    ("first stage", "C0"),
    ("larger fields", "C1"),
    ("coarser voxels, noise", "C2"),
    ("real scans", "C3"),
    ("deeper", "C4"),
    ("deeper, continued", "C5"),
    ("lesions added", "C6"),
)
FIRST = {"spine-4x": 1}  # the first entry of LABELS for a name, if not 0, because spine-4x continues ixi-4x


def curve(log: Path) -> tuple[list[int], list[float]]:
    """Steps and PSNR of a training log."""
    with open(log, newline="") as file:
        rows = [(int(row["step"]), float(row["psnr"])) for row in csv.DictReader(file) if row["psnr"]]
    return [step for step, _ in rows], [psnr for _, psnr in rows]


def main(path: Path) -> None:
    figure = Figure(figsize=(13.5, 3.6), dpi=100, layout="constrained")
    for axes, (name, (zero_fill, stages)) in zip(figure.subplots(1, len(NAMES)), NAMES.items(), strict=True):
        done = 0
        for stage, (label, colour) in zip(stages, LABELS[FIRST.get(name, 0) :], strict=False):
            steps, values = curve(DOCS / f"{stage}-training.csv")
            axes.plot([done + step for step in steps], values, label=label, color=colour)
            done += steps[-1]
        axes.axhline(zero_fill, color="grey", linestyle="--", linewidth=1)
        axes.text(
            0.02, zero_fill, "zero-filling", transform=axes.get_yaxis_transform(), va="bottom", color="grey", size=8
        )
        axes.set(title=name, xlabel="step", ylabel="PSNR [dB], validation")
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center right")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", type=Path, nargs="?", default=DOCS / "images" / "training.png")
    main(parser.parse_args().figure)
