"""Volumes on disk: finds them below a folder, identifies their subjects, and reads them as slices."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deformmamba.annotations import check_types
from deformmamba.data.links import links, of_two_subjects
from deformmamba.data.prepared import MANIFEST, SUFFIX, is_prepared, read_manifest, read_prepared
from deformmamba.data.splits import SPLITS, by_share, check_shares, check_splits, read_table
from deformmamba.data.subjects import name_subjects, patient_id, same_person
from deformmamba.errors import InvalidArgument, InvalidType, counted, shown
from deformmamba.volume import (
    Candidate,
    ChoiceNeeded,
    NotFinite,
    Volume,
    VolumeError,
    in_plane,
    read_volumes,
    scans_below,
    slice_axis,
)

INDEX = "volumes.tsv"
Passed = Callable[[Path, str], None]


@dataclass(frozen=True)
class Scan:
    """One volume on disk: its file, or the folder of its DICOM series; its subject (the unit of a split), its split,
    and a group such as "T2 brain". `series` is the SeriesInstanceUID if a folder holds several series."""

    path: Path
    subject: str
    split: str
    group: str
    series: str | None = None


def find_scans(
    root: str | os.PathLike[str],
    *,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    subject: str | None = None,
    passed: Passed | None = None,
) -> list[Scan]:
    """The volumes below `root`, sorted by path, each with its subject and the split of its subject.

    1. A folder written by `deformmamba prepare`: its manifest lists volumes, subjects and splits.
    2. A folder with a `volumes.tsv` (columns participant_id, file and split; contrast and anatomy are optional): the
       table lists them.
    3. Any other folder: all NIfTI files, MGH files and DICOM series that `volume.scans_below` accepts as scans. It
       leaves out masks, label images, phase images, outputs of this package and links to another scan, each with a
       reason. The subject is the BIDS entity `sub-<label>`. Without that entity the subject is guessed from folder and
       file names, and a warning names the rule (see `subjects.py`). Subjects are split by a hash, see
       `splits.by_share`.

    Args:
        root: the folder.
        val, test: shares of the SUBJECTS that validate and test, for case 3.
        seed: of the hash, for case 3.
        subject: a regular expression, such as "patient[0-9]+", that finds the subject in each path relative to `root`,
            for case 3. The subject is its first group, or the whole match without groups.
        passed: called with each file that is left out and the reason; without it, one warning lists these files.

    Raises:
        VolumeError: no volume, a subject in two splits, an expression that finds no subject in a path, or an
            interrupted preparation.
        ValueError: shares outside [0, 1] or above 1 in total; `subject` for a folder whose table names the subjects.
    """
    check_types(find_scans, locals())
    root = Path(root)
    check_shares(val, test)
    if not root.is_dir():
        raise VolumeError(f"{root}: no such folder")
    table = MANIFEST if is_prepared(root) else INDEX if (root / INDEX).is_file() else None
    if table and subject is not None:
        raise InvalidArgument(
            f"{root}: subject={subject!r} was given, but {table} already assigns the subjects; leave subject out"
        )
    if table == MANIFEST:
        scans = _from_manifest(root)
    elif table == INDEX:
        scans = _from_index(root)
    else:
        scans = _from_tree(root, val, test, seed, subject, passed)
    if not scans:
        raise VolumeError(f"{root}: no volume found; wanted .nii, .nii.gz, .mgh, .mgz or DICOM files, or {INDEX}")
    check_splits(((scan.subject, scan.split) for scan in scans), root / (table or ""))
    return sorted(scans, key=lambda scan: scan.path)


def named_scans(sources: Iterable[Scan | str | os.PathLike[str]], *, subject: str | None = None) -> list[Scan]:
    """Turns paths of files or DICOM folders into scans, with the subject from the path and no split; keeps scans.

    `subject`: a regular expression that finds the subject in a path as it is given; None: the name is guessed.
    """
    try:
        sources = list(sources)
    except TypeError:
        raise InvalidType(f"scans must be a list of paths, not {shown(sources)}") from None
    for source in sources:
        if not isinstance(source, Scan | str | os.PathLike):
            raise InvalidType(f"a scan must be a path, or one found by find_scans, not {shown(source)}")
    given = [Path(source) for source in sources if not isinstance(source, Scan)]
    if not given:
        return [source for source in sources if isinstance(source, Scan)]
    paths = [Path(os.path.abspath(path)) if subject is None else path for path in given]
    root = "." if subject is not None else os.path.commonpath([path.parent for path in paths])
    found = name_subjects(paths, root, pattern=subject).names
    names = {path: found[named] for path, named in zip(given, paths, strict=True)}
    return [
        source if isinstance(source, Scan) else Scan(Path(source), names[Path(source)], "", "") for source in sources
    ]


def describe_splits(scans: Sequence[Scan], *, most: int = 40) -> list[str]:
    """One line for each split with scans: numbers of volumes and subjects, and the first `most` subjects' names."""
    lines = []
    for split in dict.fromkeys((*SPLITS, "")):
        own = [scan for scan in scans if scan.split == split]
        if own:
            names = subjects(own)
            shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
            counts = f"{counted(len(own), 'volume')} of {counted(len(names), 'subject')}"
            lines.append(f"{split or 'no split'}: {counts}: {shown}")
    return lines


def _from_manifest(root: Path) -> list[Scan]:
    try:
        rows = read_manifest(root)["volumes"]
        scans = [Scan(root / row["file"], row["subject"], row["split"], row["group"]) for row in rows]
    except (KeyError, TypeError):
        raise VolumeError(f"{root / MANIFEST}: damaged: no list of volumes; run `deformmamba prepare` again") from None
    for scan in scans:
        if not scan.path.is_file():
            raise VolumeError(f"{scan.path}: missing, although the manifest lists it; run `deformmamba prepare` again")
    return scans


def _from_index(root: Path) -> list[Scan]:
    table = root / INDEX
    scans: list[Scan] = []
    spelled: dict[str, str] = {}  # the first spelling counts
    lines: dict[str, int] = {}
    for number, row in read_table(table, ("participant_id", "file", "split")):
        subject, split = row["participant_id"], row["split"]
        if split not in SPLITS:
            raise VolumeError(f"{table}, line {number}: split {split!r} of {subject}; splits are {', '.join(SPLITS)}")
        path = root / row["file"]
        if not path.exists():  # a DICOM series is a folder
            raise VolumeError(f"{table}, line {number}: missing file {row['file']} of {subject}")
        if (before := lines.setdefault(os.path.realpath(path), number)) != number:
            raise VolumeError(f"{table}, line {number}: {row['file']} is in line {before} too; list each file once")
        subject = spelled.setdefault(same_person(subject), subject)
        scans.append(Scan(path, subject, split, f"{row.get('contrast', '')} {row.get('anatomy', '')}".strip()))
    owners = {scan.path: scan.subject for scan in scans}
    if (pair := of_two_subjects(owners)) is not None:
        (line, subject), (before, other) = ((lines[os.path.realpath(path)], owners[path]) for path in pair)
        raise VolumeError(
            f"{table}, line {line}: the file of {subject} is a link to that of {other} in line {before}; list it once, "
            "or give both lines one participant_id"
        )
    return scans


def _from_tree(
    root: Path, val: float, test: float, seed: int, pattern: str | None, passed: Passed | None
) -> list[Scan]:
    found, left_out = _candidates(root)
    same = links([one.path for one in found])
    for one in found:
        if (original := same.get(one.path)) is not None:
            left_out.append(replace(one, reason=f"a link to the file {original.relative_to(root)}"))
    if passed is not None:
        for candidate in left_out:
            passed(candidate.path, candidate.reason)
    elif left_out:
        named = "; ".join(f"{one.path.relative_to(root)}: {one.reason}" for one in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(f"{root}: {counted(len(left_out), 'file')} left out: {named}{more}", stacklevel=4)
    if not found:
        return []
    # a series that shares its folder gets its own key, folder/series
    keys = {(one.path / one.series if one.series else one.path): one for one in found}
    patients = {key: patient_id(one.path, one.series) for key, one in keys.items() if one.path.is_dir()}
    named_by = name_subjects(list(keys), root, pattern=pattern, patients=patients, links=same)
    split = by_share(named_by.names.values(), val=val, test=test, seed=seed)
    if not named_by.certain:
        names = sorted(split)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"{root}: neither {INDEX} nor sub-<label> gives the subjects; they were guessed from "
            f"{named_by.rule}: {shown}. If that is wrong, one person can be in two splits: give --subject REGEX "
            f"(subject= in Python) or write a {INDEX}",
            stacklevel=4,
        )
    return [
        Scan(one.path, (name := named_by.names[key]), split[name], "", one.series)
        for key, one in keys.items()
        if key not in same
    ]


def _candidates(root: Path) -> tuple[list[Candidate], list[Candidate]]:
    """The scans below `root`, and the candidates that are not scans."""

    def reason(one: Candidate) -> str:
        if not one.path.exists():
            return "a link to a file that is not there"
        return one.reason or _not_anatomy(one.path, root)

    candidates = [replace(one, reason=reason(one)) for one in scans_below(root)]
    return [one for one in candidates if not one.reason], [one for one in candidates if one.reason]


def _not_anatomy(path: Path, root: Path) -> str:
    """Why a scan of a BIDS data set is left out: many volumes of coarse voxels would outweigh the anatomical scans.

    The folder `root` itself, which the user chose, may be one of these.
    """
    kind, folders = path.parent.name, path.parent.parent.parts[-2:]
    is_other = kind in ("func", "dwi", "fmap", "perf") and path.parent != root
    if is_other and any(name.startswith("sub-") for name in folders):
        return f"a scan in {kind}/ of a BIDS data set; {INDEX} can list it"
    return ""


def folders_below(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """`root` and each folder below it with its files, sorted; links are followed, and each folder is visited once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(folder), [path for name in sorted(names) if (path := Path(folder, name)).is_file()]


def load_volume(source: Scan | str | os.PathLike[str], *, phase: bool = False) -> tuple[Volume, int]:
    """A volume and its slice axis: from `deformmamba.volume.slice_axis`, or 0 for a prepared file.

    A prepared file stores neither patient orientation (`Volume.codes` are 0) nor slice distance (set to 1 mm). Complex
    slices (fastMRI) are returned as magnitudes, or with `phase` as complex64. A file with several volumes gives the
    first one.
    """
    check_types(load_volume, locals())
    if not _path(source).name.endswith(SUFFIX):
        volume = next(volumes_of(source))
        return volume, slice_axis(volume)
    prepared = read_prepared(_path(source))
    slices = prepared.slices
    if np.iscomplexobj(slices) and not phase:
        slices = np.abs(slices)
    return Volume(slices, np.diag([1.0, *prepared.spacing, 1.0]), codes=(0, 0)), 0


def _path(source: Scan | str | os.PathLike[str]) -> Path:
    return source.path if isinstance(source, Scan) else Path(source)


def volumes_of(source: Scan | str | os.PathLike[str], series: str | None = None) -> Iterator[Volume]:
    """Every 3-D volume of a scan, or of a file or a `series` in a folder.

    Raises:
        VolumeError: it cannot be read, or reading it needs a choice, which a data set cannot store.
    """
    path, series = _path(source), source.series if isinstance(source, Scan) else series
    try:
        yield from read_volumes(path, series=series)
    except NotFinite as error:
        raise VolumeError(f"{error.problem}; replace them and save the file") from None
    except ChoiceNeeded as error:
        raise VolumeError(f"{error.problem}; save the one for the data set as a separate file") from None


class Slices(NamedTuple):
    """Slices (n, H, W), float32, in scanner units (prepared: about [0, 1]), and the pixel (height, width) in mm."""

    array: np.ndarray
    spacing: tuple[float, float]


def load_slices(source: Scan | str | os.PathLike[str], multiple: int = 1, *, phase: bool = False) -> Slices:
    """The slices of a file or series, all its volumes one after another; see `load_volume`.

    H and W are cropped at their ends to a multiple of `multiple`, because the scale does not divide every image size.
    Pixel 0 keeps its place.
    """
    check_types(load_slices, locals())
    if multiple < 1:
        raise VolumeError(f"load_slices: multiple must be at least 1, not {multiple}")
    path = _path(source)
    if path.name.endswith(SUFFIX):
        volume, axis = load_volume(source, phase=phase)
        stacks = [volume.array]
    else:
        stacks = []
        for volume in volumes_of(source):
            axis = slice_axis(volume)
            stacks.append(np.moveaxis(volume.array, axis, 0))
    slices = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
    first, second = in_plane(axis)
    h, w = (n - n % multiple for n in slices.shape[1:])
    if not h or not w:
        raise VolumeError(f"{path}: slices of {slices.shape[1]}x{slices.shape[2]}, smaller than {multiple}x{multiple}")
    return Slices(np.ascontiguousarray(slices[:, :h, :w]), (volume.spacing[first], volume.spacing[second]))


def subjects(scans: Sequence[Scan]) -> list[str]:
    """The distinct subjects, sorted."""
    return sorted({scan.subject for scan in scans})
