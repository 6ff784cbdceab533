"""Volumes on disk: find them below a folder, say whose they are, read them as slices."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deformmamba.data.prepared import MANIFEST, SUFFIX, is_prepared, read_manifest, read_prepared
from deformmamba.data.splits import SPLITS, by_share, check_shares, check_splits, read_table
from deformmamba.data.subjects import name_subjects, patient_id
from deformmamba.errors import InvalidArgument
from deformmamba.volume import Volume, VolumeError, holds_dicom, in_plane, read_volume, slice_axis

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


def find_scans(
    root: str | os.PathLike[str],
    *,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    subject: str | None = None,
) -> list[Scan]:
    """The volumes below `root`, sorted by path, each with its subject and the split of its subject.

    1. A folder that `deformmamba prepare` wrote: its manifest lists volumes, subjects and splits.
    2. A folder with a `volumes.tsv` (columns participant_id, file and split; contrast and anatomy are optional): that
       table decides.
    3. Any other folder: every NIfTI or MGH file counts, and every folder that holds DICOM files. The subject is the
       BIDS entity `sub-<label>`; without one it is guessed from the names of folders and files, with a warning that
       says how (see `subjects.py`). Subjects are split by a hash, see `splits.by_share`.

    Args:
        root: the folder.
        val, test: shares of the SUBJECTS that validate and test, for case 3.
        seed: of the hash, for case 3.
        subject: a regular expression that finds the subject in each path relative to `root`, for case 3; its first
            group if it has one. Such as "patient[0-9]+".

    Raises:
        VolumeError: no volume there, a subject in two splits, an expression that finds no subject in a path, or a
            preparation that was interrupted.
        ValueError: shares outside [0, 1] or above 1 together; `subject` for a folder whose table names the subjects.
    """
    root = Path(root)
    check_shares(val, test)
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder of volumes")
    table = MANIFEST if is_prepared(root) else INDEX if (root / INDEX).is_file() else None
    if table and subject is not None:
        raise InvalidArgument(
            f"{root}: subject={subject!r} was given, but its {table} names the subjects; leave it out"
        )
    if table == MANIFEST:
        scans = _from_manifest(root)
    elif table == INDEX:
        scans = _from_index(root)
    else:
        scans = _from_tree(root, val, test, seed, subject)
    if not scans:
        raise VolumeError(f"{root}: no volume there; wanted files ending in {', '.join(ENDINGS)}, DICOM, or {INDEX}")
    check_splits(((scan.subject, scan.split) for scan in scans), root / (table or ""))
    return sorted(scans, key=lambda scan: scan.path)


def describe_splits(scans: Sequence[Scan], *, most: int = 40) -> list[str]:
    """A line for each split that has scans: how many volumes and subjects, and the first `most` subjects' names."""
    lines = []
    for split in dict.fromkeys((*SPLITS, "")):
        own = [scan for scan in scans if scan.split == split]
        if own:
            names = subjects(own)
            shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
            counts = f"{_count(len(own), 'volume')} of {_count(len(names), 'subject')}"
            lines.append(f"{split or 'no split'}: {counts}: {shown}")
    return lines


def _count(n: int, name: str) -> str:
    return f"{n} {name}{'s' * (n != 1)}"


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
    table = root / INDEX
    scans = []
    for number, row in read_table(table, ("participant_id", "file", "split")):
        subject, split = row["participant_id"], row["split"]
        if split not in SPLITS:
            raise VolumeError(f"{table}, line {number}: split {split!r} of {subject}; splits are {', '.join(SPLITS)}")
        path = root / row["file"]
        if not path.exists():  # a DICOM series is a folder
            raise VolumeError(f"{table}, line {number}: missing file {row['file']} of {subject}")
        scans.append(Scan(path, subject, split, f"{row.get('contrast', '')} {row.get('anatomy', '')}".strip()))
    return scans


def _from_tree(root: Path, val: float, test: float, seed: int, pattern: str | None) -> list[Scan]:
    paths = []
    for folder, files in folders_below(root):
        paths += [path for path in files if path.name.endswith(ENDINGS)]
        if holds_dicom(path for path in files if not path.name.endswith((*ENDINGS, *NO_IMAGES))):
            paths.append(folder)
    if not paths:
        return []
    found = name_subjects(paths, root, pattern=pattern, patient_id=patient_id)
    split = by_share(found.names.values(), val=val, test=test, seed=seed)
    if not found.certain:
        names = sorted(split)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"{root}: no {INDEX} and no sub-<label> says whose scans these are; subjects were guessed from "
            f"{found.rule}: {shown}. If that is wrong, one person can be in two splits: give --subject REGEX (subject= "
            f"in Python) or write a {INDEX}",
            stacklevel=4,
        )
    return [Scan(path, found.names[path], split[found.names[path]], "") for path in paths]


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
