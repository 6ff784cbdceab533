"""Reads IXI's brain scans as downloaded: one .nii.gz file per volume."""

import re
from pathlib import Path

from deformmamba.data.prepare.plan import (
    PathLike,
    Plan,
    Source,
    existing_folder,
    files_below,
    relative_name,
    text_digest,
    volume_reader,
)
from deformmamba.data.splits import by_count, check_shares, read_splits
from deformmamba.volume import VolumeError

# numbers of training and test subjects in the paper (section 3.1), which does not list the subjects
IXI_SUBJECTS = (368, 92)


def plan_ixi(
    root: PathLike,
    *,
    contrast: str = "T2",
    axis: int | None = None,
    slices: str = "central:100",
    val: float = 0.1,
    splits: PathLike | None = None,
) -> Plan:
    """Plans IXI's .nii.gz files (IXI002-Guys-0828-T2.nii.gz ...), anywhere below `root`.

    Split rule: the subjects with a volume of `contrast` are sorted by the SHA-256 of their id ("IXI002"). Of the first
    460, 368 train and the next 92 test. With fewer subjects, 4 in 5 train. The split depends on the ids alone, so every
    copy of IXI gives the same subjects. The paper has no validation set: `val` is the share of the training subjects,
    the last in that order, that validate; 0 for all 368 to train.

    Args:
        root: the folder.
        contrast: T2, T1 or PD.
        axis: slice axis; None: `volume.slice_axis`, which is 2 in IXI's T2 and PD.
        slices: which slices, see `chosen_slices`. The default leaves out both ends of the head.
        val: see above.
        splits: a file that replaces this rule, see `read_splits`.

    Raises:
        VolumeError: no volume of `contrast`; `splits` names an unknown subject, or one subject twice.
    """
    check_shares(val)
    root = existing_folder(root)
    pattern = re.compile(r"(IXI\d{3})-[A-Za-z]+-\d+-([A-Z0-9]+)(-\d+)?\.nii(\.gz)?")
    by_subject: dict[str, Path] = {}
    skipped = []
    for path in files_below(root, (".nii", ".nii.gz")):
        found = pattern.fullmatch(path.name)
        if not found:
            skipped.append((relative_name(path, root), "its name is not one of IXI's"))
        elif found[2] != contrast:
            skipped.append((relative_name(path, root), f"not {contrast}"))
        elif found[1] in by_subject:
            skipped.append((relative_name(path, root), f"another {contrast} volume of {found[1]} is used"))
        else:
            by_subject[found[1]] = path
    if not by_subject:
        raise VolumeError(
            f"{root}: no {contrast} volume of IXI; wanted names such as IXI002-Guys-0828-{contrast}.nii.gz"
        )
    if splits is None:
        split, rule = by_count(by_subject, IXI_SUBJECTS, val)
    else:
        split, rule = read_splits(splits, by_subject), "as in the split file"
    sources = []
    for subject, path in by_subject.items():
        if subject in split:
            read = volume_reader(path, axis)
            sources.append(
                Source(path, relative_name(path, root), subject, subject, split[subject], f"{contrast} brain", read)
            )
        else:
            skipped.append((relative_name(path, root), "its subject is in no split"))
    options = {"contrast": contrast, "axis": axis, "slices": slices, "val": val, "splits": text_digest(splits)}
    return Plan("ixi", tuple(sources), tuple(skipped), rule, options)
