"""Identifies the subject of each scan. Splits are by subject, so scans of one person must never count as two subjects.

The name of a scan's subject comes from, in this order:

1. a regular expression given by the user;
2. the BIDS entity `sub-<label>`, in a folder or the file's name;
3. an explicit number of a person in the path, such as `patient01`, `P001`, `case_3`, `TCGA-02-0003`;
4. the topmost folder that differs between scans, if the same file names repeat in several folders
   (`anna/T1.nii.gz, anna/T2.nii.gz, ben/T1.nii.gz`);
5. the first part of the file's name that differs between scans (`anna_T1.nii.gz, anna_T2.nii.gz`).

Words for contrasts, sequences, sessions, dates and similar never name a subject. Upper and lower case, and numbers with
and without leading zeros, are equal. DICOM series without a `sub-` label but with the same PatientID are also one
subject. If only some paths have a `sub-` label, a path without one belongs to the labelled subject that it names
(`sub-anna/T2.nii.gz, anna_FLAIR.nii.gz`; `sub-01_T2w.nii.gz, sub01_FLAIR.nii.gz`). Inside the folder of a labelled
subject, such as `sub-01/anat`, all scans are of this subject.

In doubtful cases the rules join scans rather than separate them: users notice too few subjects at once, but not a
person in two splits.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deformmamba.volume import VolumeError

_BIDS = re.compile(r"(?:^|[/_. -])(sub-[A-Za-z0-9]+)", re.IGNORECASE)

# public data sets whose subject names have several parts
_KNOWN = re.compile(r"TCGA-\w{2}-\w{4}|\d{3}_S_\d{4,5}|OAS\d_\d{4,5}|IXI\d{3}", re.IGNORECASE)
_PERSON = "pt|pat|patient|subj|subject|sub|case|volunteer|participant|person|donor|proband"
_NUMBERED = re.compile(rf"(?:^|[_. -])((?:{_PERSON})[_ -]?\d+|p\d{{2,}})(?!\d)", re.IGNORECASE)
_WORD = re.compile(rf"^(?:{_PERSON}|p)[_ -]?(?=\d+$)", re.IGNORECASE)

# Words for contrast, protocol, time or site, which never name a subject; a number may follow: `ses2`, `series12`.
_CONTRASTS = (
    "t1|t2|pd|2d|3d|fs|ax|t1w|t2w|t2s|t2star|t1c|t1ce|t1gd|weighted|pdw|flair|dwi|dti|adc|swi|bold|asl|cbf|"
    "mra|mrv|tof|mprage|mpr|spgr|bravo|vibe|dixon|stir|tirm|tse|fse|gre|epi|haste|space|cube|fisp|trufi|ciss|"
    "fiesta|dess|medic|fatsat|post|pre|contrast|nce|trace|echo|mag|magnitude|real|axial|tra|transversal|"
    "transverse|sag|sagittal|cor|coronal|iso|hires|lowres"
)
_OTHER = (
    "se|ir|gd|ce|fa|te|hr|lr|ses|session|visit|tp|timepoint|time|baseline|bl|followup|fu|follow|up|month|"
    "months|week|year|day|date|scan|scans|series|ser|sequence|seq|study|std|exam|examination|acq|acquisition|"
    "run|rep|repeat|rec|dir|part|stack|anat|anatomical|func|fmap|perf|raw|rawdata|source|sourcedata|"
    "derivatives|orig|original|nii|nifti|niftis|dicom|dicoms|dcm|mgz|mri|mr|data|dataset|datasets|image|"
    "images|img|im|file|files|volume|volumes|vol|slice|slices|brain|head|knee|spine|lumbar|prostate|heart|"
    "pelvis|breast|neck|thorax|abdomen|train|training|val|valid|validation|test|testing|external|split|fold|"
    "site|center|centre|hospital|scanner|batch|group|groups|cohort|patients|subjects|controls|cases|healthy|"
    "ge|philips|siemens|3t|15t|7t|64mt|unknown"
)
_NO_PERSON = re.compile(rf"(?:(?:{_CONTRASTS})+|{_OTHER})\d*|[ebvmwydi]\d+", re.IGNORECASE)
_DATE = re.compile(  # or a DICOM UID, which does not name a subject either
    r"\d+(?:\.\d+){4,}|(?<!\d)(?:(?:19[5-9]|20[0-3])\d(?:([-_.]?)(?:0[1-9]|1[0-2])\1(?:[0-2]\d|3[01])(?:\d{4}|\d{6})?)?"
    r"|(?:[0-2]\d|3[01])([-_.])(?:0[1-9]|1[0-2])\2(?:19[5-9]|20[0-3])\d)(?!\d)"
)
_ATTACHED = re.compile(r"(.*\d)(?:t1|t2|pd|flair|dwi|adc|swi)(?:w|ce|c|gd|fs)?", re.IGNORECASE)
# values that anonymisers write for every patient
_PLACEHOLDER = re.compile(
    r"(anon\w*|unknown|none|null|na|n/a|no ?name|patient ?id|patient|id|test|phantom|x+|0+|\W*)", re.IGNORECASE
)


@dataclass(frozen=True)
class Subjects:
    """The subject of each scan, and the source of the names.

    Attributes:
        names: subject by path.
        rule: the naming rule in words, for a message.
        certain: whether the names come from the user or BIDS; otherwise they are guessed from file and folder names.
    """

    names: Mapping[Path, str]
    rule: str
    certain: bool


def name_subjects(
    paths: Sequence[Path],
    root: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    patients: Mapping[Path, str] | None = None,
) -> Subjects:
    """The subject of each of `paths` (files or folders of DICOM series) below `root`; see the top of this file.

    Args:
        pattern: a regular expression, searched in the path relative to `root`, with `/` between folders. The subject
            is the first group, or the whole match without groups.
        patients: the PatientID of DICOM series, by path.

    Raises:
        VolumeError: an invalid regular expression, or a path without a match (named in the message).
    """
    relative = {path: _relative(path, Path(root)) for path in paths}
    if pattern is not None:
        return Subjects(_one_case(_by_pattern(relative, pattern)), f"the expression {pattern!r}", True)
    names: dict[Path, str] = {}
    for path, text in relative.items():
        if found := _BIDS.search(text):
            names[path] = found[1]
    if not names and (inside := _labelled_folder(root)):
        names = dict.fromkeys(paths, inside)
    rest = {path: text for path, text in relative.items() if path not in names}
    if not rest:
        return Subjects(_one_case(names), "the BIDS entity sub-<label>", True)
    guessed, rule = _guessed(rest)
    if names:
        guessed = _with_labels(guessed, rest, names.values())
    guessed = _joined(guessed, {path: patient for path, patient in (patients or {}).items() if path in rest})
    whole = Path(root).resolve().name or "all"
    return Subjects(_one_case({path: names.get(path) or guessed[path] or whole for path in paths}), rule, False)


def _labelled_folder(root: str | os.PathLike[str]) -> str | None:
    """The BIDS label of the subject whose folder `root` is, or is in, as `sub-01/ses-1/anat`; None outside of one."""
    root = Path(os.path.abspath(root))
    folders = (root, *root.parents)[:3]
    return next((folder.name for folder in folders if re.fullmatch(r"sub-[A-Za-z0-9]+", folder.name, re.I)), None)


def _with_labels(guessed: Mapping[Path, str], texts: Mapping[Path, str], labels: Iterable[str]) -> dict[Path, str]:
    """The guessed names, replaced by one of the BIDS `labels` where a path (`texts`) names the same person.

    It does if its number of a person or its guessed name equals the label, or if a part of it equals a label with a
    letter. Words such as `sub` and `patient` before a number do not count.
    """
    known: dict[str, str] = {}
    for label in labels:
        known.setdefault(_person(label), label)
    found = {}
    for path, name in guessed.items():
        parts = [part for folder in texts[path].split("/") for part in _tokens(_stem(folder))]
        words = [word for word in map(_person, parts) if not word.isdigit()]
        keys = [_person(_numbered(texts[path]) or ""), _person(name), *words]
        found[path] = next((known[key] for key in keys if key in known), name)
    return found


def _person(name: str) -> str:
    """As `_key`, without `sub-` and a word for a person before the number: equal for `sub-01`, `patient1` and `1`."""
    return _key(_WORD.sub("", re.sub(r"^sub-", "", name, flags=re.I)))


def _relative(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def _by_pattern(relative: Mapping[Path, str], pattern: str) -> dict[Path, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise VolumeError(
            f"subject: {pattern!r} is not a regular expression ({error}); wanted one such as 'patient[0-9]+'"
        ) from None
    names = {}
    for path, text in relative.items():
        found = expression.search(text)
        name = next((group for group in found.groups() if group), found[0]) if found else ""
        if not name:
            raise VolumeError(
                f"subject: {pattern!r} finds no subject in {text}; widen the pattern, or list the scans in volumes.tsv"
            )
        names[path] = name
    return names


def _guessed(relative: Mapping[Path, str]) -> tuple[dict[Path, str], str]:
    """Rules 3 to 5: names (empty if no rule applies to a path) and the rule in words."""
    numbered = {path: _numbered(text) for path, text in relative.items()}
    if all(numbered.values()):
        return {path: name or "" for path, name in numbered.items()}, "the patient numbers in the paths"
    parts = {path: text.split("/") for path, text in relative.items()}
    stems = {path: _stem(names[-1]) for path, names in parts.items()}
    folders = _first_difference({path: names[:-1] for path, names in parts.items()})
    files = _person_parts(stems)
    shapes = defaultdict(set)
    for path, stem in stems.items():
        if folders[path]:
            shapes[_shape(stem)].add(_key(folders[path]))
    if any(len(owners) > 1 for owners in shapes.values()):
        return {path: folders[path] or files[path] for path in relative}, "the folders, over which file names repeat"
    return {path: files[path] or folders[path] for path in relative}, "the file names"


def _numbered(text: str) -> str | None:
    """The topmost explicit number of a person in a path, such as `patient01`."""
    for part in text.split("/"):
        stem = _stem(part)
        if found := _KNOWN.search(stem) or _NUMBERED.search(stem):
            return re.sub(r"[_ -](?=\d+$)", "", found[1]) if found.lastindex else found[0]
    return None


def _stem(name: str) -> str:
    return re.sub(r"\.(nii|mg[hz]|gz|dcm|img|hdr)$", "", re.sub(r"\.gz$", "", name, flags=re.I), flags=re.I)


def _tokens(text: str) -> list[str]:
    """The parts of a name that may name a subject: no contrasts, sessions or dates."""
    kept = []
    for token in re.split(r"[^0-9A-Za-z\u0080-\uffff^]+", _DATE.sub(" ", text)):
        if token and not _NO_PERSON.fullmatch(token):
            attached = _ATTACHED.fullmatch(token)  # P001T1
            kept.append(attached[1] if attached else token)
    return kept


def _shape(stem: str) -> str:
    """A file's name without contrasts and with every number replaced by "#", so that numbered names are equal."""
    return re.sub(r"\d+", "#", " ".join(_tokens(stem))).lower()


def _person_parts(names: Mapping[Path, str]) -> dict[Path, str]:
    """The first part of each name that may name a subject and does not occur in all names; empty if there is none."""
    tokens = {path: _tokens(name) for path, name in names.items()}
    lists = [{token.lower() for token in found} for found in tokens.values()]
    common = set.intersection(*lists) if len({*names.values()}) > 1 else set()
    return {path: next((t for t in found if t.lower() not in common), "") for path, found in tokens.items()}


def _key(name: str) -> str:
    """A key that ignores upper and lower case and leading zeros, equal for all spellings of a name."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", name.lower())


def _first_difference(folders: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """For each list of folders, the topmost that may name a subject, from the first level with two different names."""
    depth = max(map(len, folders.values()))
    levels = [
        _person_parts({path: names[level] for path, names in folders.items() if level < len(names)})
        for level in range(depth)
    ]
    while levels and len({_key(name) for name in levels[0].values() if name}) < 2:
        levels.pop(0)
    return {path: next((level[path] for level in levels if level.get(path)), "") for path in folders}


def _joined(names: Mapping[Path, str], patients: Mapping[Path, str]) -> dict[Path, str]:
    """Joins the `names` that share a PatientID; an empty name is replaced by one from the PatientID."""
    usable = {path: text.strip() for path, text in patients.items() if not _PLACEHOLDER.fullmatch(text.strip())}
    filled = {
        path: name or (f"patient-{hashlib.sha256(usable[path].encode()).hexdigest()[:8]}" if path in usable else "")
        for path, name in names.items()
    }
    same_as: dict[str, str] = {}  # by key of a name: the key that it has become

    def final(key: str) -> str:
        while key in same_as:
            key = same_as[key]
        return key

    first: dict[str, str] = {}  # by PatientID
    for path, patient in usable.items():
        key = _key(filled[path])
        mine, other = final(key), final(first.setdefault(patient, key))
        if mine != other:
            same_as[mine] = other
    spelled = {_key(name): name for name in reversed(filled.values())}
    return {path: spelled[final(_key(name))] for path, name in filled.items()}


def _one_case(names: Mapping[Path, str]) -> dict[Path, str]:
    """Gives names with the same `_key` one spelling, the first."""
    spelled: dict[str, str] = {}
    return {path: spelled.setdefault(_key(name), name) for path, name in names.items()}


def patient_id(folder: Path, series: str | None = None) -> str:
    """The PatientID of the first readable DICOM file of a folder, or of one series in it; empty if there is none."""
    import pydicom

    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "SeriesInstanceUID"])
        except Exception:
            continue
        if series in (None, header.get("SeriesInstanceUID")):
            return str(header.get("PatientID", "") or "")
    return ""
