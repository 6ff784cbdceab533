"""Renders a comparison: a table for the terminal, a CSV file, and one slice of each result."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from deformmamba.data.scans import Scan, load_volume
from deformmamba.errors import InvalidArgument, counted
from deformmamba.metrics.statistics import FEWEST, Spread
from deformmamba.pictures.figures import Slice, oriented_like

if TYPE_CHECKING:
    from deformmamba.evaluation.compare import Comparison


def terminal_table(compared: "Comparison") -> str:
    """The lines of the table: settings, scores and differences."""
    s, n_subjects = compared.settings, len({row["subject"] for row in compared.any_rows})
    few = n_subjects < FEWEST
    lines = [
        f"{counted(len(compared.any_rows), 'volume')} of {counted(n_subjects, 'subject')} at {s['scale']}x, "
        f"protocol {s['protocol']}, degradation {s['degradation']}"
    ]
    spreads = {metric: [row[metric].over for row in compared.summary.values()] for metric in compared.metrics}
    over_subjects = [metric for metric, over in spreads.items() if set(over) != {"slices"}]
    if few and len(over_subjects) < len(compared.metrics):
        note = f" (with fewer than {FEWEST} subjects: no interval)" + ("; *: over subjects" if over_subjects else "")
        lines.append(f"mean over subjects ± standard deviation over slices{note}")
    else:
        over_subjects = []
        interval = f" (fewer than {FEWEST}: no interval)" if few else " [95% confidence interval of the mean]"
        lines.append(f"mean over subjects ± standard deviation over subjects{interval}")
    lines += ["", *_columns(compared.metrics, compared.summary, marked=over_subjects)]
    if compared.differences:
        count = f" ({counted(n_subjects, 'subject')}: no interval)" if few else " [95% confidence interval]"
        lines += ["", f"difference from {compared.against}, paired by subject{count}"]
        lines += ["", *_columns(compared.metrics, compared.differences, sign="+")]
    return "\n".join(lines)


def csv_text(compared: "Comparison") -> str:
    """One line per model and volume, with the settings."""
    text, own = io.StringIO(), compared.own_settings
    shared = [*compared.settings, *dict.fromkeys(key for settings in own.values() for key in settings)]
    columns = ["model", "source", *shared, "subject", "file", "group", "slices", *compared.metrics]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, rows in compared.rows.items():
        facts = {"model": name, "source": compared.sources[name], **compared.settings, **own[name]}
        writer.writerows({**facts, **row} for row in rows)
    return text.getvalue()


class Shown:
    """A slice of a volume and of each model's result, in radiological orientation.

    Attributes:
        hr: (H, W), row 0 on top.
        results: the SR images, by the name of the model.
        spacing: mm between rows and between columns.
        title: file name and slice number.
    """

    def __init__(self, scan: Scan, hr: torch.Tensor, index: int | None) -> None:
        """`index`: slice number along the slice axis, from 0; None: the middle slice. Raises ValueError if it is
        absent."""
        self._index = len(hr) // 2 if index is None else index
        if not 0 <= self._index < len(hr):
            raise InvalidArgument(f"{scan.path}: no slice {index}; slices: 0 to {len(hr) - 1}")
        self._volume, self._axis = load_volume(scan)
        self.hr, self.spacing, _ = self._seen(hr)
        self.results: dict[str, np.ndarray] = {}
        self.title = f"{scan.path.name}, slice {self._index}"

    def add(self, name: str, sr: torch.Tensor) -> None:
        """Adds the result (n, H, W) of the model `name`; only the first volume is used."""
        if name not in self.results:
            self.results[name] = self._seen(sr).image

    def _seen(self, slices: torch.Tensor) -> Slice:
        return oriented_like(slices[self._index].numpy(), self._volume, self._axis)


def _columns(
    metrics: Sequence[str], scores: Mapping[str, Mapping[str, Spread]], sign: str = "", marked: Sequence[str] = ()
) -> list[str]:
    """Lines of a table: names on the left, one column per metric; the names of the `marked` ones end in *."""
    titles = [metric + " [dB]" * (metric == "psnr") + "*" * (metric in marked) for metric in metrics]
    cells = [["", *titles]]
    for name, row in scores.items():
        cells.append([name, *(_cell(row[metric], 2 if metric == "psnr" else 4, sign) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(spread: Spread, digits: int, sign: str) -> str:
    mean, *ends = (f"{value:{sign}.{digits}f}" for value in (spread.mean, *(spread.interval or ())))
    around = "" if spread.std is None else f" ± {spread.std:.{digits}f}"
    return mean + around + (f" [{', '.join(ends)}]" if ends else "")
