"""Scores of a model over volumes: degrade, upscale, compare, by a named protocol."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deformmamba.data import Scan, load_slices
from deformmamba.inference import upscale
from deformmamba.kspace import degrade
from deformmamba.metrics import METRICS, Protocol
from deformmamba.models.base import SRModel


def evaluate(
    model: SRModel,
    volumes: Iterable[Scan | str | os.PathLike[str]],
    *,
    protocol: Protocol = "volume",
    consistency: bool | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Degrades each HR volume (k-space crop, magnitude), upscales it as `upscale` does, and scores it.

    Slices lie across the axis that `volume.slice_axis` finds and are cropped at their ends to a multiple of the scale.
    One row a volume: file, subject, group, slices, and the METRICS by `protocol`.
    """
    rows = []
    for volume in volumes:
        scan = volume if isinstance(volume, Scan) else Scan(Path(volume), Path(volume).name.split(".")[0], "", "")
        hr = torch.from_numpy(load_slices(scan.path, model.scale).array)
        sr = upscale(model, degrade(hr, model.scale), axis=0, consistency=consistency, progress=progress)
        scores = {name: metric(sr, hr, protocol=protocol) for name, metric in METRICS.items()}
        rows.append({"file": scan.path.name, "subject": scan.subject, "group": scan.group, "slices": len(hr), **scores})
    return rows


def mean_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric: over the volumes of a subject first, then over subjects."""
    names = sorted({row["subject"] for row in rows})
    return {
        metric: float(np.mean([np.mean([r[metric] for r in rows if r["subject"] == name]) for name in names]))
        for metric in METRICS
    }
