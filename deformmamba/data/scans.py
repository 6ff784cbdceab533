"""Volumes on disk: find them below a folder, say whose they are, read them as slices."""

import csv
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deformmamba.data.prepared import MANIFEST, SUFFIX, is_prepared, read_manifest, read_prepared
from deformmamba.volume import Volume, VolumeError, holds_dicom, in_plane, read_volume, slice_axis

SPLITS = ("train", "val", "test", "external")
INDEX = "volumes.tsv"
ENDINGS = (".nii", ".nii.gz", ".mgz")
NO_IMAGES = (".json", ".tsv", ".csv", ".txt", ".bval", ".bvec", ".png", ".jpg", ".pdf", ".zip", ".h5", SUFFIX)


@dataclass(frozen=True)
class Scan:
    """One volume on disk: its file, or the folder of its DICOM series; its subject (splits go by it), its split, and a
    group such as "T2 brain"."""

    path: Path
    subject: str
    split: str
    group: str


def find_scans(root: str | os.PathLike[str], *, val: float = 0.1, test: float = 0.1, seed: int = 0) -> list[Scan]:
    """The volumes below `root`, sorted by path, each with the split of its subject.

    A folder that `deformmamba prepare` made says all of it itself. Otherwise a `volumes.tsv` at the root (columns
    participant_id, file, split; contrast and anatomy if there) decides. Without one, every NIfTI or MGZ file counts,
    and every folder that holds DICOM files; a subject is the BIDS entity `sub-<label>` in the path (else the name of
    the file or folder), and `val` and `test` are the fractions of SUBJECTS held out: those whose name, hashed with
    `seed`, comes first, so that a new subject never moves another.

    Raises:
        VolumeError: no volume there, a subject in two splits, or a preparation that was interrupted.
    """
    root = Path(root)
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder of volumes")
    if is_prepared(root):
        scans = _from_manifest(root)
    else:
        scans = _from_index(root) if (root / INDEX).is_file() else _from_tree(root, val, test, seed)
    if not scans:
        raise VolumeError(f"{root}: no volume there; wanted files ending in {', '.join(ENDINGS)}, DICOM, or {INDEX}")
    splits = defaultdict(set)
    for scan in scans:
        splits[scan.subject].add(scan.split)
    for subject, found in splits.items():
        if len(found) > 1:
            raise VolumeError(
                f"{root / INDEX}: subject {subject} is in {' and '.join(sorted(found))}; wanted one split"
            )
    return sorted(scans, key=lambda scan: scan.path)


def _from_manifest(root: Path) -> list[Scan]:
    try:
        rows = read_manifest(root)["volumes"]
        scans = [Scan(root / row["file"], row["subject"], row["split"], row["group"]) for row in rows]
    except (KeyError, TypeError):
        raise VolumeError(f"{root / MANIFEST}: damaged: no list of volumes; prepare the folder again") from None
    for scan in scans:
        if not scan.path.is_file():
            raise VolumeError(f"{scan.path}: its manifest names it, and it is missing; prepare the folder again")
    return scans


def _from_index(root: Path) -> list[Scan]:
    scans = []
    with open(root / INDEX, newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                path, subject, split = root / row["file"], row["participant_id"], row["split"]
            except KeyError as error:
                raise VolumeError(f"{root / INDEX}: no column {error}; wanted participant_id, file, split") from None
            if split not in SPLITS or not path.exists():  # a DICOM series is a folder
                problem = f"split {split!r}" if split not in SPLITS else f"missing file {row['file']}"
                raise VolumeError(f"{root / INDEX}: {problem} of {subject}; splits are {', '.join(SPLITS)}")
            scans.append(Scan(path, subject, split, f"{row.get('contrast', '')} {row.get('anatomy', '')}".strip()))
    return scans


def _from_tree(root: Path, val: float, test: float, seed: int) -> list[Scan]:
    paths = []
    for folder, files in folders_below(root):
        paths += [path for path in files if path.name.endswith(ENDINGS)]
        if holds_dicom(path for path in files if not path.name.endswith((*ENDINGS, *NO_IMAGES))):
            paths.append(folder)

    def subject(path: Path) -> str:
        entity = re.search(r"sub-[A-Za-z0-9]+", str(path.relative_to(root)))
        return entity[0] if entity else path.name.split(".")[0]

    def position(name: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64

    def split(name: str) -> str:
        where = position(name)
        return "test" if where < test else "val" if where < test + val else "train"

    return [Scan(path, subject(path), split(subject(path)), "") for path in paths]


def folders_below(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`root` and each folder below it with its files, sorted; links are followed, each folder comes once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(folder), [path for name in sorted(names) if (path := Path(folder, name)).is_file()]


def load_volume(path: str | os.PathLike[str], *, phase: bool = False) -> tuple[Volume, int]:
    """A volume and the axis of its slices, which `deformmamba.volume.slice_axis` finds; of a prepared file it is 0.

    A prepared file knows neither how its slices lie in the patient (`Volume.codes` are 0) nor how far they are apart
    (1 mm here). Complex slices (fastMRI) come as their magnitude, with `phase` as they are, complex64.
    """
    if not Path(path).name.endswith(SUFFIX):
        volume = read_volume(path)
        return volume, slice_axis(volume)
    prepared = read_prepared(path)
    slices = prepared.slices
    if np.iscomplexobj(slices) and not phase:
        slices = np.abs(slices)
    return Volume(slices, np.diag([1.0, *prepared.spacing, 1.0]), codes=(0, 0)), 0


class Slices(NamedTuple):
    """(slices, H, W) in scanner units (prepared ones: about [0, 1]), float32, and the pixel's (height, width) in mm."""

    array: np.ndarray
    spacing: tuple[float, float]


def load_slices(path: str | os.PathLike[str], multiple: int = 1, *, phase: bool = False) -> Slices:
    """The slices of a volume, see `load_volume`.

    H and W are cropped at their ends to `multiple`: the scale does not divide every image, and pixel 0 stays where it
    is.
    """
    volume, axis = load_volume(path, phase=phase)
    slices = np.moveaxis(volume.array, axis, 0)
    first, second = in_plane(axis)
    h, w = (n - n % multiple for n in slices.shape[1:])
    if not h or not w:
        raise VolumeError(f"{path}: slices of {slices.shape[1]}x{slices.shape[2]}, smaller than {multiple}x{multiple}")
    return Slices(np.ascontiguousarray(slices[:, :h, :w]), (volume.spacing[first], volume.spacing[second]))


def subjects(scans: Sequence[Scan]) -> list[str]:
    """The distinct subjects, sorted."""
    return sorted({scan.subject for scan in scans})
