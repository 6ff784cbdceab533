"""A prepared data set on disk: one safetensors file per volume, and `manifest.json`, which records their provenance.

Reasons for safetensors: it is installed with this package (h5py is not). A file is a header and plain numbers without a
date, so the same numbers give the same bytes. It is memory-mapped, so a data set larger than memory is read slice by
slice. Each volume has its own file, written completely or not at all, so an interrupted preparation resumes.

A file holds `slices`: (n, H, W) float32, or (n, H, W, 2) for complex images (real, imaginary). Its header has one entry
`deformmamba`, JSON: the fields of `Prepared` and the provenance. Values are divided by `unit`, so they are about
[0, 1].

`manifest.json` is written first, with "complete": false, and again at the end. Reading a folder with an incomplete
manifest raises an error; preparing it again completes it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.volume import VolumeError, replacing, write_text

FORMAT = "deformmamba-slices-1"
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Prepared:
    """The slices of one volume, mapped into memory.

    Attributes:
        slices: (n, H, W), float32 or complex64, about [0, 1]; pages are read from the disk as they are used.
        spacing: (height, width) of a pixel in mm.
        facts: everything else in the header: source, unit, axis, first slice ...
    """

    slices: np.ndarray
    spacing: tuple[float, float]
    facts: dict[str, Any]


def read_prepared(path: str | os.PathLike[str]) -> Prepared:
    """Reads one file of a prepared data set.

    Raises:
        VolumeError: missing, truncated, or not written by this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # only the reader for torch maps the file into memory; the reader for numpy copies it
        with safe_open(os.fspath(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["deformmamba"])
            array = file.get_tensor("slices").numpy()
        height, width = facts["spacing_mm"]
        if facts["format"] != FORMAT or array.dtype != np.float32 or array.ndim != (4 if facts["complex"] else 3):
            raise KeyError(FORMAT)
    except FileNotFoundError:
        raise VolumeError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise VolumeError(
            f"{path}: damaged or truncated; run `deformmamba prepare` again ({type(error).__name__})"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise VolumeError(
            f"{path}: contains no prepared slices; give a file written by `deformmamba prepare`"
        ) from None
    if facts["complex"]:
        array = array.view(np.complex64)[..., 0]
    return Prepared(array, (float(height), float(width)), facts)


def write_prepared(path: Path, slices: np.ndarray, facts: Mapping[str, Any]) -> str:
    """Writes slices (n, H, W), float32 or complex64, and `facts`, including "spacing_mm"; returns the file's sha256.

    Raises:
        VolumeError: the file cannot be written; nothing is left at `path`.
    """
    from safetensors.numpy import save

    is_complex = np.iscomplexobj(slices)
    array = np.ascontiguousarray(slices, np.complex64 if is_complex else np.float32)
    if is_complex:
        array = array.view(np.float32).reshape(*array.shape, 2)
    # one entry: safetensors writes several in an order that changes from run to run
    header = {"deformmamba": json.dumps({**facts, "format": FORMAT, "complex": is_complex}, sort_keys=True)}
    content = save({"slices": array}, metadata=header)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def is_prepared(root: str | os.PathLike[str]) -> bool:
    """Whether `root` holds a prepared data set, finished or not."""
    return _load(Path(root)).get("format") == FORMAT


def read_manifest(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a finished preparation.

    Raises:
        VolumeError: no manifest, or the preparation was interrupted.
    """
    manifest = _load(Path(root))
    if manifest.get("format") != FORMAT:
        raise VolumeError(
            f"{root}: not a prepared data set, because it has no valid {MANIFEST}; run `deformmamba prepare`"
        )
    if not manifest.get("complete"):
        raise VolumeError(f"{root}: its preparation was interrupted; run the same `deformmamba prepare` again")
    return manifest


def begun(root: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of `root`, finished or not; empty if there is none."""
    manifest = _load(Path(root))
    return manifest if manifest.get("format") == FORMAT else {}


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **manifest}, indent=1, ensure_ascii=False)
    write_text(root / MANIFEST, text + "\n")


def _load(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
