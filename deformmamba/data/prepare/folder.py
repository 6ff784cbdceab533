"""Prepares any folder tree of NIfTI, MGH or DICOM files."""

import hashlib
import re
from pathlib import Path

from deformmamba.data.prepare.plan import (
    PathLike,
    Plan,
    Source,
    existing_folder,
    relative_name,
    text_digest,
    volume_reader,
)
from deformmamba.data.scans import INDEX, find_scans
from deformmamba.data.splits import read_splits

_LONGEST = 240  # bytes of the name of a prepared file, without its ending; file systems take 255


def plan_folder(
    root: PathLike,
    *,
    axis: int | None = None,
    slices: str = "all",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    splits: PathLike | None = None,
    subject: str | None = None,
) -> Plan:
    """Plans any tree of NIfTI, MGH or DICOM: the scans of `deformmamba.data.patches.find_scans`, split by subject.

    `val` and `test` are the shares of held-out subjects, chosen by a hash with `seed`. A file `splits` replaces this
    rule, see `read_splits`. `subject` is a regular expression that finds the subject in a path, see `find_scans`.

    Raises:
        VolumeError, ValueError: as `find_scans`, or `splits` names an unknown subject, or one subject twice.
    """
    root = existing_folder(root)
    skipped: list[tuple[str, str]] = []

    def passed(path: Path, reason: str) -> None:
        skipped.append((relative_name(path, root), reason))

    scans = find_scans(root, val=val, test=test, seed=seed, subject=subject, passed=passed)
    split = read_splits(splits, {scan.subject for scan in scans}) if splits is not None else None
    sources: list[Source] = []
    names = set()
    for scan in scans:
        source = relative_name(scan.path, root)
        if split is not None and scan.subject not in split:
            skipped.append((source, "its subject is in no split"))
            continue
        name = re.sub(r"\.(nii(\.gz)?|mg[hz])$", "", source).replace("/", "__").strip(".") or "volume"
        name = name.encode("utf-8", "backslashreplace").decode().replace("\\", "_")  # safetensors takes UTF-8 only
        if len(name.encode()) > _LONGEST:  # folders named by UIDs
            digest = hashlib.sha256(name.encode()).hexdigest()[:12]
            name = f"{name.encode()[: _LONGEST - 13].decode('utf-8', 'ignore')}-{digest}"
        while name in names:
            name += "-2"
        names.add(name)
        chosen = scan.split if split is None else split[scan.subject]
        read = volume_reader(scan.path, axis, scan.series, several=slices == "all")
        sources.append(Source(scan.path, source, name, scan.subject, chosen, scan.group, read))
    if split is not None:
        rule = "as in the split file"
    elif (root / INDEX).is_file():
        rule = f"as in the folder's {INDEX}"
    else:
        rule = f"subjects by their hash with seed {seed}: the shares {test:g} test and {val:g} validate"
    options = {
        "axis": axis,
        "slices": slices,
        "val": val,
        "test": test,
        "seed": seed,
        "splits": text_digest(splits),
        **({} if subject is None else {"subject": subject}),
    }
    return Plan("folder", tuple(sources), tuple(skipped), rule, options)
