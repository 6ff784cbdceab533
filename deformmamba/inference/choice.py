"""Ranks the published weights for a scan by pixel size, contrast and anatomy, as far as these are known."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.annotations import check_types
from deformmamba.volume import PathLike, Volume, in_plane
from deformmamba.volume.dicom import DicomSeries
from deformmamba.volume.files import stem
from deformmamba.volume.selection import read_json, sidecar_of
from deformmamba.weights import list_weights
from deformmamba.weights.cards import pixel_range

# whole words in names, protocols and body parts
_CONTRASTS = {"FLAIR": r"flair", "T2": r"t2w?", "T1": r"t1w?|mprage", "PD": r"pdw?"}
_ANATOMIES = {
    "brain": r"brain|head|cranium|skull",
    "spine": r"l?spine|[lct]spine|lumbar|cervical|thoracic|sacrum",
    "knee": r"knee",
}


@dataclass(frozen=True)
class Fit:
    """How well weights fit a scan; a lower `distance` is better.

    Attributes:
        name: name of the weights.
        distance: 0 if pixel size, contrast and anatomy match the training data.
        reason: one sentence, without a full stop.
    """

    name: str
    distance: float
    reason: str


def ranked_weights(
    volume: Volume,
    axis: int,
    *,
    path: PathLike | None = None,
    scale: int | None = None,
    pixel: tuple[float, float] | None = None,
) -> list[Fit]:
    """The published weights, best first.

    The distance of a pixel size is the logarithm of the factor by which it lies outside the trained range. An untrained
    anatomy counts as much as a factor of 2, an untrained contrast as a factor of 1.5. Contrast and anatomy are taken
    from BIDS names, from the JSON file beside the scan, or DICOM's body part, protocol and description. If unknown,
    they do not count. Weights with equal distance keep the order of the manifest.

    Args:
        volume: the scan.
        axis: where its slices are stacked.
        path: of the scan, whose name may state contrast or anatomy.
        scale: only weights of this factor; None: all.
        pixel: the pixel size (mm, mm) to compare, such as the true resolution of an interpolated scan; None: that of
            the volume.
    """
    check_types(ranked_weights, locals())
    words = " ".join(_words(volume, path)).lower()
    contrast, anatomy = _found(_CONTRASTS, words), _found(_ANATOMIES, words)
    first, second = in_plane(axis)
    pixel = (volume.spacing[first], volume.spacing[second]) if pixel is None else pixel
    fits = [
        _fit(entry, pixel if any(volume.codes) else None, contrast, anatomy)
        for entry in list_weights()
        if entry.get("class") == "DeformMambaSR" and entry.get("scale", 1) > 1 and scale in (None, entry.get("scale"))
    ]
    return sorted(fits, key=lambda fit: fit.distance)


def _fit(entry: dict[str, Any], pixel: tuple[float, float] | None, contrast: str, anatomy: str) -> Fit:
    trained = np.ravel(entry.get("spacings_mm") or [])
    said, distance = [], 0.0
    if pixel is not None and trained.size:
        low, high = float(trained.min()), float(trained.max())
        outside = max(np.log(low / min(pixel)), np.log(max(pixel) / high), 0.0)
        distance += outside
        where = "inside" if outside == 0 else "outside"
        said.append(f"pixels of {pixel[0]:.3g} x {pixel[1]:.3g} mm are {where} the trained {pixel_range(low, high)}")
    made_for = str(entry.get("meant_for") or str(entry.get("summary") or entry["name"]).split(".")[0]).lower()
    for kind, wanted, table, cost in (("contrast", contrast, _CONTRASTS, 1.5), ("anatomy", anatomy, _ANATOMIES, 2.0)):
        theirs = _found(table, made_for)
        if wanted and theirs:
            distance += 0.0 if wanted == theirs else float(np.log(cost))
            said.append(f"{kind} {wanted}" + ("" if wanted == theirs else f", trained for {theirs}"))
        elif theirs:
            said.append(f"trained for {theirs}, and the {kind} of the scan is unknown")
    return Fit(str(entry["name"]), float(distance), "; ".join(said) or "nothing is known about its training data")


def _found(table: dict[str, str], words: str) -> str:
    for name, pattern in table.items():
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", words):
            return name
    return ""


def _words(volume: Volume, path: PathLike | None) -> Iterator[str]:
    """Texts that may name contrast and anatomy. They are searched for the words above and never shown."""
    if isinstance(volume.header, DicomSeries):
        dataset = next(iter(volume.header.datasets.values()))
        for name in ("BodyPartExamined", "ProtocolName", "SeriesDescription", "StudyDescription"):
            yield re.sub(r"[_\-.]", " ", str(dataset.get(name) or ""))
    if path is None:
        return
    yield re.sub(r"[_\-.]", " ", stem(Path(path)))
    if isinstance(beside := read_json(sidecar_of(path)), dict):
        yield from (re.sub(r"[_\-.]", " ", str(beside.get(key) or "")) for key in ("BodyPartExamined", "ProtocolName"))
