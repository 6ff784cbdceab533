"""Provenance of an output: package, model, weights and their hash, settings."""

import os
from datetime import datetime
from typing import TYPE_CHECKING

import torch

from deformmamba import __version__
from deformmamba.inference.settings import Settings
from deformmamba.weights import WeightsError, load_checkpoint

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel


def report_facts(model: "SRModel", settings: Settings, seconds: float, effective: bool) -> dict[str, str]:
    """Name and value of what ran, for a report; `settings` as `Upscaling.settings`."""
    corrected = {
        "off": "off",
        "exact": "exact: degrading the output gives the input back",
        "object": "object: inside the anatomy only, reduced by the estimated noise",
        None: "as the weights recommend",
    }
    tile = settings.tile
    weights = weights_name(model) or "weights without a file"
    return {
        "model": f"{type(model).__name__}, {model.scale}x, {weights}",
        "sha256 of the weights": weights_hash(model) or "none: weights without a file",
        "version": f"deformmamba {__version__}",
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "time taken": f"{seconds:.1f} s",
        "data consistency": corrected[settings.consistency],
        "ensemble": "mean over eight reflections and transposes" if settings.ensemble else "off",
        "tiles": "whole slices" if tile is None else f"{tile}x{tile} pixels, overlapping by {settings.overlap}",
        "start": "the matrix found in k-space" if effective else "the scan as read",
    }


def derivation(model: "SRModel") -> str:
    """One line of ASCII for an image header: this package, the network, its weights and their hash."""
    digest = weights_hash(model)
    weights = f"{weights_name(model)}, sha256 {digest}" if digest else "weights without a file"
    line = f"deformmamba {__version__}, {type(model).__name__} {model.scale}x, {weights}"
    return line.encode("ascii", "replace").decode()


def weights_hash(model: "SRModel") -> str | None:
    """The sha256 of the checkpoint that the model was loaded from; None for weights from nowhere, weights that were
    changed since, and a file that is gone or another one by now."""
    if model.source is None or model.sha256 is None:
        return None
    try:
        checkpoint = load_checkpoint(model.source, local_files_only=True)
    except WeightsError:
        return None
    state, stored = model.state_dict(), checkpoint.tensors
    same = checkpoint.sha256 == model.sha256 and state.keys() == stored.keys()
    return model.sha256 if same and all(torch.equal(state[name].cpu(), stored[name]) for name in stored) else None


def weights_name(model: "SRModel") -> str | None:
    """The manifest name, org/repo@commit, or the file's name without its folder; None for weights from nowhere."""
    return os.path.basename(model.source) if model.source and os.path.exists(model.source) else model.source
