"""The curves of a training run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deformmamba.pictures.lettering import save_figure
from deformmamba.volume import PathLike

NOT_DRAWN = ("step", "lr", "images_per_second")


def training_curve(rows: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Draws the loss and each validation score over the steps, one panel each, from the rows of a run's log.

    `rows` hold "step" and any columns of numbers, as numbers or as text; empty cells are left out.

    Raises:
        VolumeError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in NOT_DRAWN]
    width = 4.0 * len(names)
    figure = Figure(figsize=(width, 3.0), dpi=110)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, bottom=0.16, top=0.9, wspace=0.22)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name) not in (None, "")]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, marker="." if len(values) < 50 else "", color="#1f5fa8", linewidth=1.3)
        axes.set_title(name.upper() if name in ("psnr", "ssim", "nmse") else name, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, format="png")


def curves_over_time(curves: Mapping[str, Sequence[tuple[float, float]]], path: PathLike) -> None:
    """Draws PSNR (dB) over training minutes: one line for each name of `curves`, in one panel.

    Raises:
        VolumeError: `path` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for k, (name, points) in enumerate(curves.items()):
        minutes, values = [minute for minute, _ in points], [value for _, value in points]
        axes.plot(
            minutes, values, label=name, marker=".", linewidth=1.3, color=f"C{k}", linestyle="-" if k < 7 else "--"
        )
    axes.set_xlabel("training, minutes")
    axes.set_ylabel("validation PSNR [dB]")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    save_figure(figure, path, format="png")
