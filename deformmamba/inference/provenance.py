"""Provenance of an output: package, model, weights and their hash, settings."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deformmamba import __version__
from deformmamba.inference.settings import Settings
from deformmamba.volume import MGH_SUFFIXES, NIFTI_SUFFIXES, PathLike, write_text
from deformmamba.volume.dicom import OTHER_MODALITIES
from deformmamba.volume.files import suffix
from deformmamba.volume.selection import PRODUCER, is_generated, is_sidecar_of, read_json, sidecar_of
from deformmamba.weights import WeightsError, load_checkpoint, manifest

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

# what an output is, for the sidecar, by the kind of output
KINDS = {
    "sr": "Made by super-resolution: what the scanner did not measure is an estimate. No diagnosis.",
    "iso": "Made isotropic: what the scanner did not measure between the slices is an estimate. No diagnosis.",
    "degrade": "Made coarser: the simulation of a measurement of lower resolution.",
}


def report_facts(model: "SRModel", settings: Settings, seconds: float, effective: bool) -> dict[str, str]:
    """Provenance as names and values, for a report; `settings` as `Upscaling.settings`."""
    corrected = {
        "off": "off",
        "exact": "exact: degrading the output gives the input back",
        "object": "object: inside the anatomy only, reduced by the estimated noise",
        None: "as the weights recommend",
    }
    tile = settings.tile
    weights = weights_name(model) or "weights without a file"
    return {
        "model": f"{type_name(model)}, {model.scale}x, {weights}",
        "sha256 of the weights": weights_hash(model) or "none: weights without a file",
        "version": f"deformmamba {__version__}",
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "time taken": f"{seconds:.1f} s",
        "data consistency": corrected[settings.consistency],
        "ensemble": "mean over eight flips and rotations" if settings.ensemble else "off",
        "tiles": "whole slices" if tile is None else f"{tile}x{tile} pixels, overlapping by {settings.overlap}",
        "start": "the matrix found in k-space" if effective else "the scan as read",
    }


def describe_weights(model: "SRModel") -> dict[str, Any]:
    """Class, name and hash of a model, for a sidecar."""
    return {
        "model": type_name(model),
        "weights": weights_name(model),
        "sha256": weights_hash(model) or f"no file: {tensor_digest(model)}",
    }


def derivation(model: "SRModel", mark: str = "") -> str:
    """One line of ASCII for an image header: this package, the `mark` of `distrust`, the network, its weights and their
    hash."""
    digest = weights_hash(model)
    weights = f"{weights_name(model)}, sha256 {digest}" if digest else "weights without a file"
    line = f"{PRODUCER} {__version__}, {mark}{type_name(model)} {model.scale}x, {weights}"
    return line.encode("ascii", "replace").decode()


def distrust(cautions: Sequence[str], notes: Sequence[str]) -> str:
    """The words in an image header for a result that deserves distrust, with a comma after it; "" for any other result.

    Args:
        cautions: reasons why the result may be worse than reported.
        notes: `Volume.notes` of the scan.
    """
    if cautions or any(note in OTHER_MODALITIES.values() for note in notes):
        return "UNLIKE TRAINING DATA, "
    return "WITH WARNINGS, " if notes else ""


def unusual(nan: str, partial: bool) -> dict[str, Any]:
    """How a scan was read, for `generated_by`, where it is not the default."""
    return {**({"nan": nan} if nan != "refuse" else {}), **({"partial": True} if partial else {})}


def file_name(path: PathLike) -> str:
    """The name of a file or folder, also of "." and of "folder/.."."""
    return os.path.basename(os.path.abspath(path))


def type_name(model: Any) -> str:
    """The class of a model, without wrappers."""
    return type(getattr(model, "_inside", model)).__name__


def generated_by(model: "SRModel", settings: Settings, reading: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that an output depends on besides its source and this version, as JSON, for BIDS' GeneratedBy."""
    shaping = ("axis", "ensemble", "tile", "overlap")
    return {
        **describe_weights(model),
        "scale": model.scale,
        **reading,
        **{key: value for key in shaping if (value := getattr(settings, key)) is not None},
        "consistency": settings.consistency or model.consistency,
    }


def write_sidecar(
    target: PathLike,
    source: PathLike,
    kind: str,
    made_by: Mapping[str, Any],
    cautions: Sequence[str],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes the JSON file beside a NIfTI or MGH output: provenance, and why it may be worse than reported.

    `kind` is a key of `KINDS`. `made_by` is the entry of GeneratedBy without program and version; `facts` holds further
    entries of the file. A file of another origin, or of another output of the same name (scan.mgz beside scan.nii),
    stays, with a warning.
    """
    path = Path(target)
    if suffix(path) not in (*NIFTI_SUFFIXES, *MGH_SUFFIXES):
        return  # DICOM stores this in its own elements
    beside = sidecar_of(path)
    if (reason := _kept(beside, path)) is not None:
        warnings.warn(f"{beside}: {reason} and stays; nothing is written to it", stacklevel=4)
        return
    made = {
        "Description": KINDS[kind],
        "OutputFile": shown_path(path.name),
        "Sources": [shown_path(file_name(source))],
        "SkullStripped": skull_stripped(source),
        "GeneratedBy": [{"Name": PRODUCER, "Version": __version__, **made_by}],
        **({"Warnings": list(cautions)} if cautions else {}),
        **(facts or {}),
    }
    write_text(beside, json_text(made))


def json_text(facts: Mapping[str, Any]) -> str:
    """`facts` as a JSON file; numbers of numpy are plain numbers."""
    return json.dumps(facts, indent=2, ensure_ascii=False, default=lambda value: value.item()) + "\n"


def skull_stripped(source: PathLike) -> bool:
    """Whether the JSON file beside a scan states that it is skull-stripped; BIDS requires this for derivatives."""
    facts = read_json(sidecar_of(os.path.abspath(source)))  # "." has no name
    return isinstance(facts, dict) and bool(facts.get("SkullStripped", False))


def _kept(sidecar: Path, output: Path) -> str | None:
    """Why the JSON file beside an output is not replaced; None: it is, or it is missing."""
    facts = read_json(sidecar)
    if not sidecar.exists() or is_sidecar_of(facts, output):
        return None
    if not is_generated(facts):
        return "is of another origin"
    named = facts["OutputFile"]
    other = output.with_name(sidecar.stem + named[len(named) - len(suffix(Path(named))) :])
    return f"belongs to the output {other.name}" if other.exists() else None


def shown_path(path: PathLike) -> str:
    """A path as valid UTF-8 text: other bytes become escapes."""
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def tensor_digest(model: "SRModel") -> str:
    """A hash of class, config and tensors."""
    digest = hashlib.sha256(json.dumps([type_name(model), model.config], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# the last comparison of a model with its file: (path, size, time of change, digest of the tensors) to the answer
_compared: dict[tuple[Any, ...], str | None] = {}


def weights_hash(model: "SRModel") -> str | None:
    """The sha256 of the model's checkpoint; None for weights without a file, or if the weights or the file changed
    after loading. The file is read again only after a change of either."""
    if model.source is None or model.sha256 is None:
        return None
    with contextlib.suppress(OSError):
        state = os.stat(model.source) if os.path.exists(model.source) else None
        key = (model.source, model.sha256, state and (state.st_size, state.st_mtime_ns), tensor_digest(model))
        if key not in _compared:
            _compared.clear()
            _compared[key] = _hash_if_same(model)
        return _compared[key]
    return None


def _hash_if_same(model: "SRModel") -> str | None:
    try:
        assert model.source is not None
        checkpoint = load_checkpoint(model.source, local_files_only=True)
    except WeightsError:
        return None
    state, stored = model.state_dict(), checkpoint.tensors
    same = checkpoint.sha256 == model.sha256 and state.keys() == stored.keys()
    return model.sha256 if same and all(torch.equal(state[name].cpu(), stored[name]) for name in stored) else None


def weights_name(model: "SRModel") -> str | None:
    """The manifest name, org/repo@commit, or the name of the file or folder; None for weights without a source.

    A path has more than its name: a folder may have a person's.
    """
    source = model.source
    if source is None or source in manifest()["weights"] or source == model.provenance.get("hub"):
        return source
    return file_name(source)
