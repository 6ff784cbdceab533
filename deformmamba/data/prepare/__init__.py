"""Data sets as people download them, made into slices with a split by subject: IXI, fastMRI, any folder of scans.

Nobody published how IXI's files became the pictures of the papers, or who was tested. Here the rules are stated, each
prepared set says in its `manifest.json` what was used, skipped and why, and the same files give the same bytes (of
fastMRI, whose images are computed: with the same numpy). See `deformmamba.data.prepared` for what is written.

Which slices of a volume count moves PSNR by decibels (empty ones are easy), so axis and range are arguments, and stand
in the manifest. Intensities are divided by the 99.9th percentile of the non-zero voxels that were kept, and the divisor
is written down. Slices keep their size; whoever trains crops them to a multiple of the scale, see `load_slices`.
"""

import csv
import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deformmamba import __version__
from deformmamba.data.prepared import SUFFIX, begun, read_prepared, write_manifest, write_prepared
from deformmamba.data.scans import INDEX, SPLITS, find_scans, folders_below
from deformmamba.extras import require
from deformmamba.volume import VolumeError, chosen_axis, in_plane, intensity_scale, read_volume

PathLike = str | os.PathLike[str]

# subjects to train on and to test on, as the paper counts them (section 3.1); which ones it does not say
IXI_SUBJECTS = (368, 92)
FASTMRI_SUBJECTS = (227, 45)
FASTMRI_CROP = 320


@dataclass(frozen=True)
class Source:
    """One volume to prepare: where it is, as what the manifest knows it (relative to its root), and its file's name.

    `read` gives all slices (n, H, W), float32 or complex64, the (height, width) of a pixel in mm, and the axis.
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
    """What a preparation is about to do; `skipped` are the files that it leaves out, with the reason."""

    kind: str
    sources: tuple[Source, ...]
    skipped: tuple[tuple[str, str], ...]
    rule: str
    options: Mapping[str, Any]


# ----------------------------------------------------------------------------------------------------------- the three


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
    root = _folder(root)
    pattern = re.compile(r"(IXI\d{3})-[A-Za-z]+-\d+-([A-Z0-9]+)(-\d+)?\.nii(\.gz)?")
    by_subject: dict[str, Path] = {}
    skipped = []
    for path in _files(root, (".nii", ".nii.gz")):
        found = pattern.fullmatch(path.name)
        if not found:
            skipped.append((_relative(path, root), "its name is not one of IXI's"))
        elif found[2] != contrast:
            skipped.append((_relative(path, root), f"not {contrast}"))
        elif found[1] in by_subject:
            skipped.append((_relative(path, root), f"another {contrast} volume of {found[1]} is used"))
        else:
            by_subject[found[1]] = path
    if not by_subject:
        raise VolumeError(
            f"{root}: no {contrast} volume of IXI; wanted names such as IXI002-Guys-0828-{contrast}.nii.gz"
        )
    if splits is None:
        split, rule = _by_hash(by_subject, IXI_SUBJECTS, val)
    else:
        split, rule = read_splits(splits, by_subject), "as the split file says"
    sources = []
    for subject, path in by_subject.items():
        if subject in split:
            read = _reader(path, axis)
            sources.append(
                Source(path, _relative(path, root), subject, subject, split[subject], f"{contrast} brain", read)
            )
        else:
            skipped.append((_relative(path, root), "its subject is in no split"))
    options = {"contrast": contrast, "axis": axis, "slices": slices, "val": val, "splits": _digest_of(splits)}
    return Plan("ixi", tuple(sources), tuple(skipped), rule, options)


def plan_fastmri(
    root: PathLike,
    *,
    crop: int = FASTMRI_CROP,
    slices: str = "all",
    val: float = 0.1,
    train_list: PathLike | None = None,
    test_list: PathLike | None = None,
    skip_unusable: bool = False,
) -> Plan:
    """fastMRI's single-coil knee files (file1000001.h5 ...), anywhere below `root`; needs the extra `data`.

    The complex image of each slice is the inverse FFT of its k-space (centred, orthonormal: fastMRI's own), cropped to
    the central `crop` x `crop` pixels. It stays complex: its k-space is then cropped, and only the result's magnitude
    taken, as a scanner would.

    The split of 227 and 45 that the paper counts is that of MINet and SANet: lists of file names (CSV, pairs of PD and
    PD-FS), which are theirs and not in this package. Given as `train_list` and `test_list` they decide, and other files
    are skipped. Without them: subjects (fastMRI's patient id, or the file's name where it has none) sorted by SHA-256,
    the first 272: 227 to train, 45 to test; with fewer, in that proportion. `val` as in `plan_ixi`. With
    `skip_unusable` a file that cannot be used is skipped and does not count.

    Raises:
        VolumeError: no .h5 there, a file that cannot be opened, that holds another kind of data (names what is
            missing), or a list that names a file that is not there.
        MissingExtra: h5py is not installed.
    """
    root = _folder(root)
    require("h5py", extra="data", what="fastMRI")
    paths = _files(root, (".h5",))
    if not paths:
        raise VolumeError(f"{root}: no .h5 file; wanted fastMRI's single-coil knees, such as file1000001.h5")
    if (train_list is None) != (test_list is None):
        raise VolumeError("fastmri: give both lists, of files to train and to test on, or none")
    skipped: list[tuple[str, str]] = []
    by_name: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_name:
            skipped.append((_relative(path, root), f"another {path.name} is used"))
        else:
            by_name[path.stem] = path
    listed: dict[str, str] = {}
    if train_list is not None and test_list is not None:
        for file, split in ((train_list, "train"), (test_list, "test")):
            for name in _listed(file):
                if name not in by_name:
                    raise VolumeError(f"{file}: names {name}, and there is no {name}.h5 below {root}")
                if listed.setdefault(name, split) != split:
                    raise VolumeError(f"{file}: {name} is in both lists; wanted one split")
    headers = {}
    for name, path in by_name.items():
        if listed and name not in listed:
            skipped.append((_relative(path, root), "in no list"))
            continue
        try:
            headers[name] = _fastmri_header(path)
        except Unusable as error:
            if not skip_unusable:
                raise
            skipped.append((_relative(path, root), str(error).replace(str(path), path.name)))
    subject = {name: patient for name, (patient, _) in headers.items()}
    if listed:
        by_subject: dict[str, str] = {}
        for name in headers:
            if by_subject.setdefault(subject[name], listed[name]) != listed[name]:
                raise VolumeError(f"{test_list}: a patient of {name} is in both lists; wanted one split")
        split_of = _validating(by_subject, val)
        rule = "file lists given by the user"
    else:
        split_of, rule = _by_hash(subject.values(), FASTMRI_SUBJECTS, val)
    sources = []
    for name, (patient, contrast) in headers.items():
        if patient in split_of:
            path, read = by_name[name], _fastmri_reader(by_name[name], crop)
            group = f"{contrast} knee"
            sources.append(Source(path, _relative(path, root), name, patient, split_of[patient], group, read))
        else:
            skipped.append((_relative(by_name[name], root), "its subject is in no split"))
    options = {
        "crop": crop,
        "slices": slices,
        "val": val,
        "train_list": _digest_of(train_list),
        "test_list": _digest_of(test_list),
    }
    return Plan("fastmri", tuple(sources), tuple(skipped), rule, options)


def plan_folder(
    root: PathLike,
    *,
    axis: int | None = None,
    slices: str = "all",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    splits: PathLike | None = None,
) -> Plan:
    """Any tree of NIfTI, MGH or DICOM: what `deformmamba.data.patches.find_scans` finds, with its split by subject.

    `val` and `test` are the shares of subjects held out, by a hash with `seed`; `splits` decides instead, see
    `read_splits`.

    Raises:
        VolumeError: as `find_scans`, or `splits` names a subject who is not there, or one twice.
    """
    root = _folder(root)
    scans = find_scans(root, val=val, test=test, seed=seed)
    split = read_splits(splits, {scan.subject for scan in scans}) if splits is not None else None
    sources: list[Source] = []
    skipped, names = [], set()
    for scan in scans:
        source = _relative(scan.path, root)
        if split is not None and scan.subject not in split:
            skipped.append((source, "its subject is in no split"))
            continue
        name = re.sub(r"\.(nii(\.gz)?|mg[hz])$", "", source).replace("/", "__").strip(".") or "volume"
        while name in names:
            name += "-2"
        names.add(name)
        chosen = scan.split if split is None else split[scan.subject]
        sources.append(Source(scan.path, source, name, scan.subject, chosen, scan.group, _reader(scan.path, axis)))
    if split is not None:
        rule = "as the split file says"
    elif (root / INDEX).is_file():
        rule = f"as the folder's {INDEX} says"
    else:
        rule = f"subjects by their hash with seed {seed}: the shares of {test:g} test and {val:g} validate"
    options = {
        "axis": axis,
        "slices": slices,
        "val": val,
        "test": test,
        "seed": seed,
        "splits": _digest_of(splits),
    }
    return Plan("folder", tuple(sources), tuple(skipped), rule, options)


# ------------------------------------------------------------------------------------------------------------- writing


def prepare(plan: Plan, out: PathLike, *, skip_unusable: bool | None = None, progress: bool = False) -> dict[str, Any]:
    """Carries out a plan into the folder `out`, and returns the manifest that is now there.

    Volumes that are there already, made of the same file in the same way, are not made again: an interrupted
    preparation goes on where it was. What was made of files that are gone is removed. A file that cannot be used ends
    the preparation with one line, and what was finished stays; with `skip_unusable` it is left out instead, and the
    manifest says why (None: so for "folder", whose files nobody promised to be scans).

    Raises:
        VolumeError: an unusable file, no usable one, `out` holding something else, or a disk that is full.
    """
    out = Path(out)
    skip_unusable = plan.kind == "folder" if skip_unusable is None else skip_unusable
    chosen_slices(plan.options["slices"], 1)  # a wrong rule is refused before anything is written
    facts = {"version": __version__, "kind": plan.kind, "options": dict(plan.options), "rule": plan.rule}
    _check_target(out, facts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"{out}: cannot be made: {error.strerror}; choose another folder") from None
    for leftover in (*out.glob(f".*{SUFFIX}"), *out.glob(".*.json")):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    write_manifest(out, {"complete": False, **facts})
    skipped = list(plan.skipped)
    rows = []
    sources: Iterable[Source] = sorted(plan.sources, key=lambda source: source.name)
    if progress:
        from tqdm import tqdm

        sources = tqdm(sources, desc=f"preparing {plan.kind}", unit="volume", disable=None)
    for source in sources:
        try:
            rows.append(_prepare_one(source, out, plan))
        except Unusable as error:
            if not skip_unusable:
                raise VolumeError(f"{error}; repair or remove it, and run again: what is finished stays") from None
            skipped.append((source.source, str(error).replace(str(source.path), source.path.name)))
    if not rows:
        reason = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise VolumeError(f"{out}: no usable volume, {len(skipped)} skipped{reason}")
    for orphan in set(out.glob(f"*{SUFFIX}")) - {out / row["file"] for row in rows}:
        orphan.unlink(missing_ok=True)
    manifest = {
        "complete": True,
        **facts,
        "subjects": {
            split: sorted({row["subject"] for row in rows if row["split"] == split})
            for split in SPLITS
            if any(row["split"] == split for row in rows)
        },
        "volumes": rows,
        "skipped": [{"source": name, "reason": reason} for name, reason in sorted(skipped)],
    }
    write_manifest(out, manifest)
    return manifest


class Unusable(VolumeError):
    """A source that cannot be used, as opposed to a target that cannot be written."""


def _prepare_one(source: Source, out: Path, plan: Plan) -> dict[str, Any]:
    """Its row of the manifest, after its file is there."""
    target = out / f"{source.name}{SUFFIX}"
    made_of = {"source": source.source, "source_sha256": _digest(source.path), "options": dict(plan.options)}
    if _is_made(target, made_of):
        digest = _digest(target)
    else:
        try:
            slices, spacing, axis = source.read()
            kept = chosen_slices(plan.options["slices"], len(slices))
            if not len(kept):
                raise VolumeError(f"{source.path}: {len(slices)} slices, none of them in {plan.options['slices']}")
            slices = slices[kept.start : kept.stop]
            unit = intensity_scale(np.abs(slices) if np.iscomplexobj(slices) else slices)
        except VolumeError as error:
            raise Unusable(str(error)) from None
        facts = {
            **made_of,
            "axis": axis,
            "first": kept.start,
            "unit": unit,
            "spacing_mm": [round(size, 6) for size in spacing],
        }
        digest = write_prepared(target, slices / np.float32(unit), facts)
    read = read_prepared(target)
    n, h, w = read.slices.shape
    row = {"file": target.name, "subject": source.subject, "split": source.split, "group": source.group}
    row |= {key: read.facts[key] for key in ("source", "source_sha256", "axis", "first", "unit", "spacing_mm")}
    return row | {"slices": n, "size": [h, w], "complex": read.facts["complex"], "sha256": digest}


def _is_made(target: Path, made_of: Mapping[str, Any]) -> bool:
    try:
        facts = read_prepared(target).facts
    except VolumeError:
        return False
    return all(facts.get(key) == value for key, value in made_of.items())


def _check_target(out: Path, facts: Mapping[str, Any]) -> None:
    """Refuses a folder that holds a set prepared in another way, or anything else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise VolumeError(f"{out}: is a file; name a folder")
    known = begun(out)
    if not known and any(out.iterdir()):
        raise VolumeError(f"{out}: is not empty, and holds no prepared data set; name a new folder")
    for key in ("kind", "options"):
        if known and known.get(key) != facts[key]:
            raise VolumeError(f"{out}: was prepared with {key} {known.get(key)}, not {facts[key]}; name a new folder")


# --------------------------------------------------------------------------------------------------- splits and slices


def chosen_slices(rule: str, n: int) -> range:
    """Which of n slices: "all"; "central:K", the K in the middle (all if there are fewer); "A:B", from A up to, not
    including, B, counted from 0, negative ones from the end, either left out."""
    if rule == "all":
        return range(n)
    central = re.fullmatch(r"central:([1-9]\d*)", rule)
    if central:
        k = min(int(central[1]), n)
        return range((n - k) // 2, (n - k) // 2 + k)
    part = re.fullmatch(r"(-?\d+)?:(-?\d+)?", rule)
    if not part:
        raise ValueError(f'slices: {rule!r} is no range; wanted "all", "central:100", or from:to such as "20:110"')
    return range(n)[slice(*(None if end is None else int(end) for end in part.groups()))]


def _by_hash(names: Iterable[str], wanted: tuple[int, int], val: float) -> tuple[dict[str, str], str]:
    """The split of each subject, and the rule in a sentence."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    n = min(len(order), sum(wanted))
    n_train = max(1, min(n - 1, round(n * wanted[0] / sum(wanted))))
    split = {name: "train" if k < n_train else "test" for k, name in enumerate(order[:n])}
    rule = f"{len(order)} subjects by the SHA-256 of their id: the first {n_train} train, the next {n - n_train} test"
    if n < sum(wanted):
        rule += f": the proportion of {wanted[0]} to {wanted[1]}, of whom there are too few"
    split = _validating(split, val)
    n_val = list(split.values()).count("val")
    return split, rule + (f"; the last {n_val} of those who train validate instead" if n_val else "")


def _validating(split: Mapping[str, str], val: float) -> dict[str, str]:
    """The share `val` of the training subjects, rounded up, the last in the order of their hashes, moved to "val"."""
    if not 0 <= val < 1:
        raise ValueError(f"val: the share of training subjects that validate must lie in [0, 1), not {val}")
    train = [name for name, where in split.items() if where == "train"]
    train.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    n_val = max(0, min(math.ceil(val * len(train)), len(train) - 1))  # one of them keeps training
    moved = set(train[len(train) - n_val :])
    return {name: "val" if name in moved else where for name, where in split.items()}


def read_splits(path: PathLike, known: Iterable[str]) -> dict[str, str]:
    """The split of each subject from a CSV or TSV file with the columns subject (or participant_id) and split.

    Raises:
        VolumeError: no such file or column, a split that is none of `SPLITS`, a subject in two splits or who is not
            among the `known`.
    """
    known = set(known)
    rows = _table(path)
    column = next((name for name in ("subject", "participant_id") if rows and name in rows[0]), None)
    if column is None or "split" not in rows[0]:
        raise VolumeError(f"{path}: wanted a CSV or TSV file with the columns subject and split")
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        name, where = row[column], row["split"]
        if where not in SPLITS:
            raise VolumeError(f"{path}: split {where!r} of {name}; splits are {', '.join(SPLITS)}")
        if name not in known:
            raise VolumeError(f"{path}: names the subject {name}, of whom there is no volume")
        splits[name].add(where)
        if len(splits[name]) > 1:
            raise VolumeError(f"{path}: subject {name} is in {' and '.join(sorted(splits[name]))}; wanted one split")
    return {name: where.pop() for name, where in splits.items()}


def _table(path: PathLike) -> list[dict[str, str]]:
    text = _text(path)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    return [
        {k: (v or "").strip() for k, v in row.items() if k}
        for row in csv.DictReader(text.splitlines(), delimiter=delimiter)
    ]


def _listed(path: PathLike) -> list[str]:
    """File names, without their ending, in the order of a list: one or several a line, numbers between them ignored."""
    fields = [field.strip() for line in _text(path).splitlines() for field in line.split(",")]
    return [field.removesuffix(".h5") for field in fields if field and not re.fullmatch(r"[-+.\deE]+", field)]


def _text(path: PathLike) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VolumeError(f"{path}: cannot be read ({type(error).__name__}); wanted a text file") from None


# ------------------------------------------------------------------------------------------------------------- reading


def _reader(path: Path, axis: int | None) -> Callable[[], tuple[np.ndarray, tuple[float, float], int]]:
    def read() -> tuple[np.ndarray, tuple[float, float], int]:
        volume = read_volume(path)
        along = chosen_axis(volume, axis)
        height, width = (volume.spacing[a] for a in in_plane(along))
        return np.moveaxis(volume.array, along, 0), (height, width), along

    return read


def _opened(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError:
        raise Unusable(f"{path}: not an HDF5 file, or a truncated one") from None


def _fastmri_header(path: Path) -> tuple[str, str]:
    """Who was scanned, and the contrast; "PD" and "PDFS" are what the two protocols of the knees are called."""
    with _opened(path) as file:
        missing = [key for key in ("kspace", "ismrmrd_header") if key not in file]
        if missing:
            raise Unusable(
                f"{path}: has no data set {missing[0]!r}, only {', '.join(sorted(file)) or 'none'}; wanted a fastMRI "
                "single-coil file with kspace and ismrmrd_header (the challenge's test files have no full k-space)"
            )
        if "mask" in file:
            raise Unusable(f"{path}: its k-space is undersampled (it has a mask); wanted a fully sampled one")
        acquisition = str(file.attrs.get("acquisition", ""))
        contrast = {"CORPD_FBK": "PD", "CORPDFS_FBK": "PDFS"}.get(acquisition, acquisition)
        return str(file.attrs.get("patient_id", path.stem)), contrast


def _fastmri_reader(path: Path, crop: int) -> Callable[[], tuple[np.ndarray, tuple[float, float], int]]:
    def read() -> tuple[np.ndarray, tuple[float, float], int]:
        with _opened(path) as file:
            try:
                kspace, header = file["kspace"][()], file["ismrmrd_header"][()]
            except OSError:
                raise Unusable(f"{path}: a truncated file: its k-space cannot be read") from None
        if kspace.ndim != 3 or not np.iscomplexobj(kspace):
            raise Unusable(f"{path}: k-space of shape {kspace.shape}; wanted single-coil (slices, rows, columns)")
        if min(kspace.shape[1:]) < crop:
            raise Unusable(f"{path}: slices of {kspace.shape[1]}x{kspace.shape[2]}, smaller than the crop of {crop}")
        if not np.isfinite(kspace).all() or not kspace.any():
            raise Unusable(f"{path}: its k-space is all zero, or holds NaN or infinite values")
        image = complex_image(kspace)
        top, left = ((n - crop) // 2 for n in image.shape[1:])
        return image[:, top : top + crop, left : left + crop], ismrmrd_spacing(header, path), 0

    return read


def complex_image(kspace: np.ndarray) -> np.ndarray:
    """The image of centred k-space (..., H, W), complex64, centred and orthonormal as fastMRI defines its own."""
    axes = (-2, -1)
    image = np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho")
    return np.fft.fftshift(image, axes=axes).astype(np.complex64)


def ismrmrd_spacing(header: bytes | str, path: PathLike) -> tuple[float, float]:
    """(height, width) of a pixel in mm: field of view over matrix of the encoded space of an ISMRMRD header (XML).

    The first axis of fastMRI's k-space is the readout, x, which is encoded twice as wide as it is reconstructed; a crop
    in image space leaves the pixel as it is.
    """
    from xml.etree import ElementTree

    try:
        space = ElementTree.fromstring(header).find(".//{*}encoding/{*}encodedSpace")
        height, width = (
            float(space.findtext(f"{{*}}fieldOfView_mm/{{*}}{axis}") or 0)  # type: ignore[union-attr]
            / float(space.findtext(f"{{*}}matrixSize/{{*}}{axis}") or 0)  # type: ignore[union-attr]
            for axis in "xy"
        )
        if not (0 < height < math.inf and 0 < width < math.inf):
            raise ValueError(header)
    except (ElementTree.ParseError, AttributeError, ValueError, ZeroDivisionError):
        raise Unusable(f"{path}: its ISMRMRD header has no field of view and matrix of the encoded space") from None
    return height, width


# --------------------------------------------------------------------------------------------------------------- files


def _folder(root: PathLike) -> Path:
    if not os.path.isdir(root):
        raise VolumeError(f"{root}: no such folder")
    return Path(root)


def _files(root: Path, endings: Sequence[str]) -> list[Path]:
    found = (path for _, files in folders_below(root) for path in files)
    return sorted(path for path in found if path.name.lower().endswith(tuple(endings)))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its files' own in the order of their names."""
    try:
        if path.is_dir():
            return hashlib.sha256(
                "".join(_digest(p) for p in sorted(path.iterdir()) if p.is_file()).encode()
            ).hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unusable(f"{path}: cannot be read: {error.strerror}") from None


def _digest_of(path: PathLike | None) -> str | None:
    """What identifies a split file in the manifest: its content, not where it lies."""
    return None if path is None else hashlib.sha256(_text(path).encode()).hexdigest()
