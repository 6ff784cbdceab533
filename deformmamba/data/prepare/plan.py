"""The plan of a preparation, and the steps shared by all kinds of data set: finding files, choosing slices, hashes."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba.atomic import PathLike
from deformmamba.data.scans import folders_below, volumes_of
from deformmamba.data.splits import read_text
from deformmamba.errors import InvalidArgument
from deformmamba.volume import VolumeError, chosen_axis, in_plane


@dataclass(frozen=True)
class Source:
    """One volume to prepare: its path, its `source` in the manifest (relative to the root), and its output file's name.

    `read` returns all slices (n, H, W), float32 or complex64, the pixel (height, width) in mm, and the slice axis.
    """

    path: Path
    source: str
    name: str
    subject: str
    split: str
    group: str
    read: Callable[[], tuple[np.ndarray, tuple[float, float], int]]


@dataclass(frozen=True)
class Plan:
    """The plan of a preparation; `skipped` lists the files that are left out, each with the reason."""

    kind: str
    sources: tuple[Source, ...]
    skipped: tuple[tuple[str, str], ...]
    rule: str
    options: Mapping[str, Any]


class Unusable(VolumeError):
    """A source that cannot be used, as opposed to a target that cannot be written."""


def chosen_slices(rule: str, n: int) -> range:
    """The indices of the chosen slices out of n. Rules: "all"; "central:K", the K middle slices (all if fewer than K);
    "A:B", a Python range from A to B - 1, where negative numbers count from the end and A or B may be omitted."""
    if rule == "all":
        return range(n)
    central = re.fullmatch(r"central:([1-9]\d*)", rule)
    if central:
        k = min(int(central[1]), n)
        return range((n - k) // 2, (n - k) // 2 + k)
    part = re.fullmatch(r"(-?\d+)?:(-?\d+)?", rule)
    if not part:
        raise InvalidArgument(f'slices: {rule!r} is not a range; wanted "all", "central:100" or such as "20:110"')
    return range(n)[slice(*(None if end is None else int(end) for end in part.groups()))]


def volume_reader(
    path: Path, axis: int | None, series: str | None = None, *, several: bool = False
) -> Callable[[], tuple[np.ndarray, tuple[float, float], int]]:
    """A function that reads the slices of a file or series; with `several`, of all its volumes, one after another."""

    def read() -> tuple[np.ndarray, tuple[float, float], int]:
        volumes = list(volumes_of(path, series))
        if len(volumes) > 1 and not several:
            raise Unusable(f"{path}: holds {len(volumes)} prepared volumes; use all slices of these")
        along = chosen_axis(volumes[0], axis)
        height, width = (volumes[0].spacing[a] for a in in_plane(along))
        slices = [np.moveaxis(volume.array, along, 0) for volume in volumes]
        return slices[0] if len(slices) == 1 else np.concatenate(slices), (height, width), along

    return read


def existing_folder(root: PathLike) -> Path:
    if not os.path.isdir(root):
        raise VolumeError(f"{root}: no such folder")
    return Path(root)


def files_below(root: Path, endings: Sequence[str]) -> list[Path]:
    found = (path for _, files in folders_below(root) for path in files)
    return sorted(path for path in found if path.name.lower().endswith(tuple(endings)))


def relative_name(path: Path, root: Path) -> str:
    """The path of a scan relative to `root`, with `/`; a list of scans may name one outside of it."""
    return Path(os.path.relpath(path, root)).as_posix()


def file_digest(path: Path) -> str:
    """SHA-256 of a file; for a folder, SHA-256 of its files' SHA-256s in name order."""
    try:
        if path.is_dir():
            return hashlib.sha256(
                "".join(file_digest(p) for p in sorted(path.iterdir()) if p.is_file()).encode()
            ).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unusable(f"{path}: cannot be read: {error.strerror}") from None


def text_digest(path: PathLike | None) -> str | None:
    """Identifies a split file in the manifest by its content, not its path."""
    return None if path is None else hashlib.sha256(read_text(path).encode()).hexdigest()
