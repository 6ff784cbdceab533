"""IXI's brain scans as downloaded: one .nii.gz file a volume."""

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

# subjects to train and to test on, as the paper counts them (section 3.1); which ones it does not say
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
    """IXI's .nii.gz files (IXI002-Guys-0828-T2.nii.gz ...), anywhere below `root`.

    The rule of the split: the subjects that have such a volume, sorted by the SHA-256 of their id ("IXI002"); the first
    460 count: 368 to train, then 92 to test. With fewer, 4 in 5 of all train. It depends on nothing but the ids, so
    whoever has IXI gets the same subjects. The paper has no validation set: `val` is the share of the training
    subjects, the last of them in that order, that validate; 0 for all 368 to train.

    Args:
        root: the folder.
        contrast: T2, T1 or PD.
        axis: of the slices; None: `volume.slice_axis`, which is 2 in IXI's T2 and PD.
        slices: which of them, see `chosen_slices`. The default leaves out the ends of the head.
        val: see above.
        splits: a file that decides instead, see `read_splits`.

    Raises:
        VolumeError: no such file there; `splits` names a subject who is not there, or one twice.
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
        split, rule = read_splits(splits, by_subject), "as the split file says"
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
