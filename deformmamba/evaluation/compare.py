"""Scores of models over volumes: degrade, upscale, compare, by a named protocol.

`evaluate` scores one model; `compare` scores several on the same volumes and gives their differences with the spread
over subjects.
"""

import hashlib
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deformmamba import __version__
from deformmamba.annotations import check_seed, check_types, is_one_of
from deformmamba.data.scans import Scan, load_slices, named_scans
from deformmamba.errors import InvalidArgument, counted, did_you_mean, shown
from deformmamba.evaluation.rendering import Shown, csv_text, terminal_table
from deformmamba.inference import upscale, weights_hash
from deformmamba.metrics import METRICS, ON_REQUEST, Protocol, by_slice
from deformmamba.metrics.statistics import Spread, paired_difference, subject_means, summarise
from deformmamba.models.base import SRModel
from deformmamba.physics.consistency import Consistency
from deformmamba.physics.degradations import Degradation, KSpaceCrop, gives_magnitudes
from deformmamba.tensors import on_cpu_by_default
from deformmamba.volume import intensity_scale
from deformmamba.volume.inspection import too_negative

Source = Scan | str | os.PathLike[str]
Visit = Callable[[Scan, torch.Tensor, torch.Tensor], None]


@on_cpu_by_default
def evaluate(
    model: SRModel,
    volumes: Iterable[Source],
    *,
    protocol: Protocol = "volume",
    degradation: Degradation | None = None,
    metrics: Sequence[str] = (),
    slices: bool = False,
    most: int | None = None,
    consistency: Consistency | None = None,
    seed: int = 0,
    visit: Visit | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Degrades each HR volume, upscales it as `upscale` does, and scores it.

    Slices are those of `data.load_slices`, cropped at their ends to a multiple of the scale; complex ones are degraded
    with their phase and scored as magnitudes.

    The result has one row per volume: file, subject, group, slices, and the METRICS by `protocol`.

    Args:
        model: on any device.
        volumes: files, or the scans found by `deformmamba.data.patches.find_scans`.
        protocol: see `deformmamba.metrics`.
        degradation: the k-space crop of the paper if not given: with magnitudes, and of a scan with negative voxels
            (more than 1 %) the real part. Its noise refers to the volume's own brightness ("p99.9").
        metrics: names of additional metrics from `deformmamba.metrics.ON_REQUEST`.
        slices: whether rows also have "by_slice", the values of each slice by metric, see
            `deformmamba.metrics.by_slice`.
        most: largest number of slices of a volume, spread evenly over it; None: all.
        consistency: see `upscale`. The default of the weights applies to k-space crops only; for other degradations the
            default is "off".
        seed: random seed of the degradation's noise, which also depends on the scan's voxels but not on its path.
        visit: called with each scan and its HR and SR slices (n, H, W).
        progress: show a progress bar over the volumes.

    Raises:
        ValueError: the degradation has another scale or grid than the model, or a metric is unknown.
    """
    check_types(evaluate, locals())
    seed = check_seed(seed)
    if most is not None and most < 1:
        raise InvalidArgument(f"evaluate: most must be at least 1, or None for all slices, not {most}")
    most = None if most is None else operator.index(most)
    degradation = degradation or KSpaceCrop(model.scale)
    unknown = [name for name in metrics if not is_one_of(name, ON_REQUEST)]
    if unknown:
        raise InvalidArgument(
            f"evaluate: unknown metric {shown(unknown[0])}; additional metrics: {', '.join(ON_REQUEST)}"
        )
    if (degradation.scale, degradation.grid) != (model.scale, model.grid):
        raise InvalidArgument(
            f"evaluate: {degradation} shrinks by {degradation.scale} on the {degradation.grid} grid, but "
            f"{type(model).__name__} enlarges by {model.scale} on the {model.grid} grid; use one scale and grid"
        )
    consistency = _in_effect(consistency, model, degradation)
    wanted = METRICS | {name: ON_REQUEST[name] for name in metrics}
    rows = []
    for scan in named_scans(volumes):
        measured = torch.from_numpy(load_slices(scan, model.scale, phase=True).array)
        if most is not None and most < len(measured):
            measured = measured[[(2 * k + 1) * len(measured) // (2 * most) for k in range(most)]]
        hr = measured.abs() if measured.is_complex() else measured
        unit = intensity_scale(hr.numpy(), "p99.9")
        scaled = measured / unit
        content = int.from_bytes(hashlib.sha256(scaled.numpy().tobytes()).digest()[:4])
        lr = _keeping_signs(degradation, hr, scan.path)(scaled, seed=(seed, content)) * unit
        sr = upscale(model, lr, axis=0, consistency=consistency, progress=progress)
        try:
            scores = {name: metric(sr, hr, protocol=protocol) for name, metric in wanted.items()}
        except InvalidArgument as error:
            raise InvalidArgument(f"{scan.path}: {error}") from None
        row = {"file": scan.path.name, "subject": scan.subject, "group": scan.group, "slices": len(hr), **scores}
        rows.append(row | ({"by_slice": by_slice(sr, hr, protocol=protocol)} if slices else {}))
        if visit:
            visit(scan, hr, sr)
    return rows


def _keeping_signs(degradation: Degradation, hr: torch.Tensor, path: Path) -> Degradation:
    """The degradation for the slices `hr` of a scan: with the real part where the k-space crop would fold their signs.

    Other degradations that give magnitudes stay. There is a warning in both cases.
    """
    if not gives_magnitudes(degradation) or not too_negative(hr.numpy()):
        return degradation
    said = f"{path}: the scan has negative voxels, and {degradation} gives magnitudes"
    if degradation == KSpaceCrop(degradation.scale):
        degradation = replace(degradation, output="real")
        warnings.warn(f"{said}; {degradation} is used instead", stacklevel=3)
    else:
        cure = "output=real and noise instead of rician keep them"
        warnings.warn(f"{said}, so the scores are those of a scan without signs; {cure}", stacklevel=3)
    return degradation


def _in_effect(given: Consistency | None, model: SRModel, degradation: Degradation) -> Consistency:
    """The data consistency that `evaluate` applies."""
    return given or (model.consistency if isinstance(degradation, KSpaceCrop) else "off")


def _own_settings(model: SRModel, degradation: Degradation, consistency: Consistency | None) -> dict[str, Any]:
    return {"sha256": weights_hash(model), "consistency": _in_effect(consistency, model, degradation)}


def finite(value: Any) -> Any:
    """`value`, of dictionaries, lists and numbers, with None for each number that is infinite or NaN.

    JSON has neither. They occur in scores: the PSNR of a slice without signal is infinite.
    """
    if isinstance(value, Mapping):
        return {key: finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric: over the volumes of a subject first, then over subjects.

    Raises:
        InvalidArgument: no rows.
    """
    if not rows:
        raise InvalidArgument("mean_scores: there are no rows; give those of evaluate for one volume or more")
    return {metric: float(np.mean(list(subject_means(rows, metric).values()))) for metric in _metrics(rows)}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (*METRICS, *ON_REQUEST) if name in rows[0]]


@dataclass
class Comparison:
    """Several models on the same volumes.

    Attributes:
        rows: the rows of `evaluate`, by model name.
        sources: the source of the weights, by model name; None for a model without weights.
        against: the reference model of the differences.
        settings: scale, degradation, protocol, seed and version, on which the scores of all models depend.
        own_settings: the same of each model, by model name: "sha256" of the file of its weights (see
            `inference.weights_hash`; None for a model without a file) and "consistency", the data consistency applied.
        shown: one slice for `figures.comparison`, if requested.
    """

    rows: dict[str, list[dict[str, Any]]]
    sources: dict[str, str | None]
    against: str
    settings: dict[str, Any]
    own_settings: dict[str, dict[str, Any]]
    shown: Shown | None = None

    @cached_property
    def metrics(self) -> list[str]:
        return _metrics(self.any_rows)

    @property
    def any_rows(self) -> list[dict[str, Any]]:
        """The rows of one model, for facts about the volumes, which are the same for all models."""
        return next(iter(self.rows.values()))

    @cached_property
    def summary(self) -> dict[str, dict[str, Spread]]:
        """By model and metric: the mean over subjects with its spread, see `statistics.summarise`."""
        return {name: {metric: summarise(rows, metric) for metric in self.metrics} for name, rows in self.rows.items()}

    @cached_property
    def differences(self) -> dict[str, dict[str, Spread]]:
        """By model and metric: the paired difference from `against` over subjects. Empty for the model `against`
        itself."""
        reference = self.rows[self.against]
        return {
            name: {
                metric: paired_difference(subject_means(rows, metric), subject_means(reference, metric))
                for metric in self.metrics
            }
            for name, rows in self.rows.items()
            if name != self.against
        }

    def table(self) -> str:
        """Text for a terminal: settings, scores and differences."""
        return terminal_table(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: settings, and for each model its rows, values by subject, means, spreads and differences.

        A value that is infinite or NaN is None, see `finite`.
        """

        def spreads(of: Mapping[str, Spread]) -> dict[str, Any]:
            return {metric: spread.to_dict() for metric, spread in of.items()}

        result = {
            **self.settings,
            "against": self.against,
            "models": {
                name: {
                    "source": self.sources[name],
                    **self.own_settings[name],
                    "mean": mean_scores(rows),
                    "spread": spreads(self.summary[name]),
                    "difference": spreads(self.differences[name]) if name in self.differences else None,
                    "subjects": {metric: subject_means(rows, metric) for metric in self.metrics},
                    "volumes": rows,
                }
                for name, rows in self.rows.items()
            },
        }
        made: dict[str, Any] = finite(result)
        return made

    def to_csv(self) -> str:
        """One line per model and volume, with the settings as columns, so that files can be joined.

        An infinite value is written as inf.
        """
        return csv_text(self)


def compare(
    models: Mapping[str, SRModel],
    volumes: Iterable[Source],
    *,
    against: str | None = None,
    protocol: Protocol = "volume",
    degradation: Degradation | None = None,
    metrics: Sequence[str] = (),
    consistency: Consistency | None = None,
    seed: int = 0,
    show: bool = False,
    at: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Scores every model on every volume, with the same degradation.

    Args:
        models: by the name to show in tables.
        against: the reference model of the differences; the first of `models` if not given.
        protocol, degradation, metrics, consistency, seed, progress: see `evaluate`.
        show: keep slice `at` of the first volume, along its slice axis, for a figure; None: the middle one.

    Raises:
        ValueError: no model, no volume, models of different scales, an unknown name or slice; and as `evaluate`.
    """
    check_types(compare, locals())
    seed = check_seed(seed)
    volumes = list(volumes)
    scales = {model.scale for model in models.values()}
    if not volumes or len(scales) != 1:
        raise InvalidArgument(
            f"compare: {counted(len(volumes), 'volume')} and models of the scales {sorted(scales)}; wanted volumes, "
            "and models of one scale"
        )
    against = next(iter(models)) if against is None else against
    if against not in models:
        raise InvalidArgument(
            f"against is {against!r}{did_you_mean(against, models)}; it must be one of {', '.join(models)}"
        )
    degradation = degradation or KSpaceCrop(scales.pop())
    own_settings = {name: _own_settings(model, degradation, consistency) for name, model in models.items()}
    shown: Shown | None = None
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, model in models.items():

        def visit(scan: Scan, hr: torch.Tensor, sr: torch.Tensor, name: str = name) -> None:
            nonlocal shown
            shown = shown or Shown(scan, hr, at)
            shown.add(name, sr)

        rows[name] = evaluate(
            model,
            volumes,
            protocol=protocol,
            degradation=degradation,
            metrics=metrics,
            slices=True,
            consistency=consistency,
            seed=seed,
            visit=visit if show else None,
            progress=progress,
        )
    settings = {
        "scale": degradation.scale,
        "protocol": protocol,
        "degradation": str(degradation),
        "seed": seed,
        "version": __version__,
    }
    sources = {name: model.source for name, model in models.items()}
    return Comparison(rows, sources, against, settings, own_settings, shown)
