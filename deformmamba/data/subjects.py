"""Identifies the subject of each scan. Splits are by subject, so scans of one person must never count as two subjects.

The name of a scan's subject comes from, in this order:

1. a regular expression given by the user;
2. the BIDS entity `sub-<label>`, in a folder or the file's name;
3. an explicit number of a person in the path, such as `patient01`, `P001`, `case_3`, `TCGA-02-0003`;
4. the topmost folder that differs between scans, if the same file names repeat in several folders
   (`anna/T1.nii.gz, anna/T2.nii.gz, ben/T1.nii.gz`);
5. the first part of the file's name that differs between scans (`anna_T1.nii.gz, anna_T2.nii.gz`).

Known words for contrasts, sequences, sessions, dates and similar, with their numbers (`ses-01`, `Visit 1`), never name
a subject. Other parts of paths are people or conditions, and look alike where they vary crosswise
(`ketamine/anna.nii, ketamine/ben.nii, saline/anna.nii`): the people are those of whom there are at least twice as
many. If there are not, scans that have either part in common are one subject.

Upper and lower case, and numbers with and without leading zeros, are equal. DICOM series without a `sub-` label but
with the same PatientID are also one subject. If only some paths have a `sub-` label, a path without one belongs to the
labelled subject that it names (`sub-anna/T2.nii.gz, anna_FLAIR.nii.gz`; `sub-01_T2w.nii.gz, sub01_FLAIR.nii.gz`).
Inside the folder of a labelled subject, such as `sub-01/anat`, all scans are of this subject. A link and its
target are of one subject, whatever their names are.

In doubtful cases the rules join scans rather than separate them: users notice too few subjects at once, but not a
person in two splits.
"""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deformmamba.volume import VolumeError

_BIDS = re.compile(r"(?:^|[/_. -])(sub-[A-Za-z0-9]+)", re.IGNORECASE)

# public data sets whose subject names have several parts
_KNOWN = re.compile(r"TCGA-\w{2}-\w{4}|\d{3}_S_\d{4,5}|OAS\d_\d{4,5}|IXI\d{3}", re.IGNORECASE)
_PERSON = "pt|pat|patient|subj|subject|sub|case|volunteer|participant|person|donor|proband"
_NUMBERED = re.compile(rf"(?:^|[_. -])((?:{_PERSON})[_ -]?\d+|p\d{{2,}})(?!\d)", re.IGNORECASE)
_LABEL = re.compile(r"^sub-", re.IGNORECASE)
_WORD = re.compile(rf"^(?:{_PERSON}|p)[_ -]?(?=\d+$)", re.IGNORECASE)

# Words for contrast, protocol, time, condition or site, which never name a subject; a number may follow: `series12`.
_CONTRASTS = (
    "t1|t2|pd|2d|3d|fs|ax|t1w|t2w|t2s|t2star|t1c|t1ce|t1gd|weighted|pdw|flair|dwi|dti|adc|swi|bold|asl|cbf|"
    "mra|mrv|tof|mprage|mpr|spgr|bravo|vibe|dixon|stir|tirm|tse|fse|gre|epi|haste|space|cube|fisp|trufi|ciss|"
    "fiesta|dess|medic|fatsat|post|pre|contrast|nce|trace|echo|mag|magnitude|real|axial|tra|transversal|"
    "transverse|sag|sagittal|cor|coronal|iso|hires|lowres|localizer|localiser|loc|scout|survey|ssfse|mrcp|"
    "frfse|fspgr|ffe|tfe|dark|fluid|ipat|grappa|sense"
)
# words for a time, of which the number may be apart: `ses-01`, `Visit 1`
_TIMES = (
    "ses|sess|session|sessions|visit|visite|besuch|sitzung|seance|tp|timepoint|time ?point|time|zeitpunkt|followup|"
    "follow ?up|fu|hour|day|days|tag|jour|week|weeks|wk|wks|woche|semaine|month|months|mo|mon|monat|mois|year|years|yr|"
    "jahr|run|rep|repeat|repetition|round|phase|stage|series|serie|ser|acq|acquisition|echo|im|slice|frame"
)
_CONDITIONS = (
    "preop|postop|op|before|after|vor|vorher|nach|nachher|avant|apres|après|left|right|links|rechts|gauche|droite|lh|rh|"
    "first|second|third|last|initial|final|basal|control|acute|subacute|chronic|akut|chronisch|aigu|chronique|retest|"
    "drug|placebo|verum|sham|active|treatment|treated|untreated|on|off|rest|task|am|pm|morning|evening|"
    "native|registered|reg|coreg|coregistered|warped|aligned|mni|n3|n4|denoised|biascorrected|corrected|normalized|"
    "normalised|preproc|preprocessed|processed|resampled|skullstripped|stripped|bet|defaced|"
    "canon|toshiba|hitachi|prisma|skyra|aera|avanto|trio|verio|achieva|ingenia|signa"
)
_OTHER = (
    "se|ir|gd|ce|fa|te|hr|lr|baseline|bl|follow|up|date|scan|scans|sequence|seq|study|std|exam|"
    "examination|rec|dir|part|stack|anat|anatomical|func|fmap|perf|raw|rawdata|source|sourcedata|"
    "derivatives|orig|original|nii|nifti|niftis|dicom|dicoms|dcm|mgz|mri|mr|data|dataset|datasets|image|"
    "images|img|file|files|volume|volumes|vol|slices|brain|head|knee|spine|lumbar|prostate|heart|"
    "pelvis|breast|neck|thorax|abdomen|train|training|val|valid|validation|test|testing|external|split|fold|"
    "site|center|centre|hospital|scanner|batch|group|groups|cohort|patients|subjects|controls|cases|healthy|"
    "ge|philips|siemens|3t|15t|7t|64mt|unknown|mask|masks|seg|segmentation|label|labels"
)
_CONTRAST = re.compile(rf"(?:{_CONTRASTS})+\d*", re.IGNORECASE)
# with two digits and more, a word that is no time may be a person's: `training01`, `control03`, `V001`, `T01`
_NO_PERSON = re.compile(
    rf"{_CONTRAST.pattern}|(?:{_TIMES})\d*|(?:{_OTHER}|{_CONDITIONS})\d?|[ebvmwydit]\d|"
    r"\d{1,2}(?:st|nd|rd|th|h|d|w|wks?|weeks?|m|mo|mths?|months?|y|yrs?|years?)",
    re.IGNORECASE,
)
_TIME = re.compile(  # with its number, or a BIDS entity other than sub-
    rf"(?<![^\W_])(?:(?:{_TIMES.replace(' ?', '[-_ ]?')})[-_ .]{{0,2}}\d+(?!\d)|"
    r"(?:ses|task|acq|run|dir|rec|ce|echo|desc|space)-[0-9a-z]+)",
    re.IGNORECASE,
)
_YEAR = r"(?:19[5-9]|20[0-3])\d"
_DATE = re.compile(  # or a DICOM UID, which does not name a subject either
    rf"\d+(?:\.\d+){{4,}}|(?<!\d)(?:{_YEAR}([-_.]?)(?:0[1-9]|1[0-2])\1(?:[0-2]\d|3[01])(?:\d{{4}}|\d{{6}})?"
    rf"|(?:[0-2]\d|3[01])([-_.])(?:0[1-9]|1[0-2])\2{_YEAR}|(?<=[^\W_]){_YEAR}|{_YEAR}(?=[^\W_]))(?!\d)"
)
_IS_YEAR = re.compile(_YEAR)
_NUMBER = re.compile(r"[a-z]?(\d+)", re.IGNORECASE)
_SHORT = re.compile(r"[a-z]?\d{1,3}", re.IGNORECASE)  # the number of a scan or session: `1`, `01`, `s2`
_ATTACHED = re.compile(  # a contrast, a visit or a letter after the number of a person: `P001T1`, `M01V2`, `101b`
    rf"(.*\d)(?:(?:{_CONTRASTS})(?:w|ce|c|gd|fs)?|v\d{{1,2}}|[a-d])|(.*[^\W\d_]{{3,}}?)(?:t1|t2|flair)(?:w|ce|c|gd|fs)?",
    re.IGNORECASE,
)
# the time of an exam, as dcm2niix writes it into names, with the number of the series after it
_EXAM = re.compile(rf"(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{{6}}(?!\d)")
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
    links: Mapping[Path, Path] | None = None,
) -> Subjects:
    """The subject of each of `paths` (files or folders of DICOM series) below `root`; see the top of this file.

    Args:
        pattern: a regular expression, searched in the path relative to `root`, with `/` between folders. The subject
            is the first group, or the whole match without groups.
        patients: the PatientID of DICOM series, by path.
        links: for paths of the same file as another one, this other path; both are of one subject.

    Raises:
        VolumeError: an invalid regular expression, or a path without a match (named in the message).
    """
    found = _named(paths, root, pattern, patients or {})
    originals = {path: [str((links or {}).get(path, path))] for path in found.names}
    return replace(found, names=_merged(found.names, originals))


def _named(
    paths: Sequence[Path], root: str | os.PathLike[str], pattern: str | None, patients: Mapping[Path, str]
) -> Subjects:
    """`name_subjects` without links; names of one subject may differ in case and zeros."""
    relative = {path: _relative(path, Path(root)) for path in paths}
    if pattern is not None:
        return Subjects(_by_pattern(relative, pattern), f"the expression {pattern!r}", True)
    names: dict[Path, str] = {}
    for path, text in relative.items():
        if found := _BIDS.search(text):
            names[path] = re.sub(r"(?<=\d)ses\d+$", "", found[1], flags=re.IGNORECASE)  # a forgotten underscore
    if not names and (inside := _labelled_folder(root)):
        names = dict.fromkeys(paths, inside)
    rest = {path: text for path, text in relative.items() if path not in names}
    if not rest:
        return Subjects(names, "the BIDS entity sub-<label>", True)
    guessed, rule = _guessed(rest)
    if names:
        guessed = _with_labels(guessed, rest, names.values())
    guessed = _joined(guessed, {path: patient for path, patient in patients.items() if path in rest})
    whole = Path(root).resolve().name or "all"
    return Subjects({path: names.get(path) or guessed[path] or whole for path in paths}, rule, False)


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
    return _key(_WORD.sub("", _LABEL.sub("", name)))


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
    names, doubt = _from_columns(relative)
    rule = "the names of folders and files"
    if doubt:
        rule += ", in which two parts may be the person, so that scans with either in common are one subject"
    return names, rule


def _from_columns(relative: Mapping[Path, str]) -> tuple[dict[Path, str], bool]:
    """Rules 4 and 5: names, and whether scans were joined in doubt.

    The parts of the paths are columns of a table, from the top folder to the end of the file's name. Each column that
    varies is compared with the names so far.
    """
    levels = _levels(relative)
    folders = [column for level in levels[:-1] for column in _columns(level)]
    files = _columns(levels[-1])
    shapes = {path: _shape(_stem(text.split("/")[-1])) for path, text in relative.items()}
    contrasts = {path: " ".join(filter(_CONTRAST.fullmatch, _words(text))).lower() for path, text in relative.items()}
    names: dict[Path, str] = {}
    doubt = False
    for number, column in enumerate(folders + files):
        if _count(names) < 2:
            names = column if _count(column) > 1 else names
            continue
        choice = _choice(names, column, contrasts)
        if choice == "nested":  # numbered files in a person's folder, or people in the folder of a site or year
            apart = number == len(folders) and not _repeated(shapes, names)
            apart = apart or (_all_years(names.values()) and not all(map(_SHORT.fullmatch, column.values())))
            choice = "lower" if apart else "upper"
        first, second = (column, names) if choice == "lower" else (names, column)
        names = {path: first.get(path) or second.get(path, "") for path in relative}
        if choice == "both":
            doubt = True
            names = _merged(names, {path: [_key(name)] for path, name in column.items()})
            if _count(names) < 2:
                return dict.fromkeys(relative, ""), True
    if not names and files:
        names = files[0]
    years = _all_years(names.values()) and not _numbered_scans(levels)
    series = all(map(_SHORT.fullmatch, names.values())) and all(map(_EXAM.search, relative.values()))
    names = {path: "" if years or series else names.get(path, "") for path in relative}
    held = _merged(names, _held(names, levels))
    joined = _count(held) < _count(names)
    if joined and _count(held) < 2:
        held = dict.fromkeys(relative, "")
    return held, doubt or joined


def _choice(upper: Mapping[Path, str], lower: Mapping[Path, str], contrasts: Mapping[Path, str]) -> str:
    """Which of two columns names the people: "upper", "lower", "both" in doubt, or "nested" if no part of the lower
    one repeats."""
    owners, owned, marks = defaultdict(set), defaultdict(set), defaultdict(set)
    for path, name in lower.items():
        if upper.get(path):
            owners[_key(name)].add(_key(upper[path]))
            owned[_key(upper[path])].add(_key(name))
            marks[_key(name)].add(contrasts[path])
    uppers = {_key(name) for name in upper.values() if name}
    alone = {_key(name) for path, name in upper.items() if name and path not in lower}
    n, m = len(uppers), len(owners)
    several = sum(len(found) > 1 for found in owners.values())
    if m < 2:
        return "upper"
    if not several:
        return "nested"
    if 2 * len(alone) >= n or sum(map(len, marks.values())) == len(set.union(*marks.values())):
        return "upper"  # many scans have no lower part, or each lower part has contrasts of its own: a protocol's name
    if all(map(_WORD.match, uppers)):  # P1, P2
        return "upper"
    words = len({re.sub(r"\d+", "#", name) for name in owners}) > 1 and not any(map(_SHORT.fullmatch, owners))
    if m >= n and words and _all_years(uppers):
        return "lower"
    digits = _width(name for name in upper.values() if name)
    if (short := _width(lower.values())) <= 2 and short < digits:  # the numbers of scans, else of people
        known = digits in (3, 5) or 6 < digits < float("inf")  # 6 may be a date
        known = known or (digits == 4 and not _all_years(uppers))
        # many names with not many more scans; numbers of people often have a leading zero
        known = known or (n >= 4 and m < 2 * n and not any(name.startswith("0") for name in lower.values()))
        return "upper" if known or n >= m else "both"
    crosswise = any(len(found) > 1 for found in owned.values())
    if n >= (2 if crosswise else 3) * m:
        return "upper"
    return "lower" if m >= 2 * n and 2 * several > m and words else "both"


def _width(names: Iterable[str]) -> float:
    """The most digits of names that are numbers, also after one letter; infinite if one is a word."""
    numbers = [_NUMBER.fullmatch(name) for name in names]
    return max(len(number[1]) if number else float("inf") for number in numbers)


def _count(names: Mapping[Path, str]) -> int:
    return len({_key(name) for name in names.values() if name})


def _repeated(shapes: Mapping[Path, str], names: Mapping[Path, str]) -> bool:
    """Whether a shape occurs with several names."""
    owners = defaultdict(set)
    for path, name in names.items():
        if name:
            owners[shapes[path]].add(_key(name))
    return any(len(found) > 1 for found in owners.values())


def _held(names: Mapping[Path, str], levels: Sequence[Mapping[Path, Sequence[str]]]) -> dict[Path, list[str]]:
    """For each path, its name and the names of other paths that it holds in another place: `anna.nii, x_anna.nii`."""
    known = {_key(name) for name in names.values() if name}
    whole = _whole(levels)
    held = {}
    for path, name in names.items():
        own = _key(name)
        parts = {_key(token) for token in whole[path]} & known
        held[path] = [own, *(part for part in parts if not (_NUMBER.fullmatch(part) and _NUMBER.fullmatch(own)))]
    return {path: found for path, found in held.items() if names[path]}


def _numbered(text: str) -> str | None:
    """The topmost explicit number of a person in a path, such as `patient01`; that of a case only if there is no other,
    as in `case_01_subject_03`."""
    stems = [_stem(part) for part in text.split("/")]
    known = [found[0] for stem in stems for found in _KNOWN.finditer(stem)]
    numbered = [re.sub(r"[_ -](?=\d+$)", "", found[1]) for stem in stems for found in _NUMBERED.finditer(stem)]
    people = [name for name in numbered if not name.lower().startswith("case")]
    return next(iter([*known, *people, *numbered]), None)


def _stem(name: str) -> str:
    return re.sub(r"\.(nii|mg[hz]|gz|dcm|img|hdr)$", "", re.sub(r"\.gz$", "", name, flags=re.I), flags=re.I)


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^0-9A-Za-z\u0080-\uffff^]+", text) if word]


def _tokens(text: str) -> list[str]:
    """The parts of a name that may name a subject: no contrasts, sessions or dates."""
    kept = []
    for token in _words(_TIME.sub(" ", _DATE.sub(" ", text))):
        if not _NO_PERSON.fullmatch(token):
            attached = _ATTACHED.fullmatch(token)  # P001T1
            kept.append((attached[1] or attached[2]) if attached else token)
    return kept


def _shape(stem: str) -> str:
    """A file's name without contrasts and with every number replaced by "#", so that numbered names are equal."""
    return re.sub(r"\d+", "#", " ".join(_tokens(stem))).lower()


def _levels(relative: Mapping[Path, str]) -> list[dict[Path, list[str]]]:
    """For each level of folders, and last for the files, the parts of the names that may name a subject.

    A number such as 2021 is a year and left out, unless every path begins with one, or it may be a person's as in
    `2001_01.nii`.
    """
    parts = {path: text.split("/") for path, text in relative.items()}
    found = [
        {path: _tokens(names[level]) for path, names in parts.items() if level < len(names) - 1}
        for level in range(max(map(len, parts.values())) - 1)
    ]
    found.append({path: _tokens(_stem(names[-1])) for path, names in parts.items()})
    if _numbered_scans(found) or all(tokens and _IS_YEAR.fullmatch(tokens[0]) for tokens in _whole(found).values()):
        return found
    return [
        {path: [token for token in tokens if not _IS_YEAR.fullmatch(token)] for path, tokens in level.items()}
        for level in found
    ]


def _whole(levels: Sequence[Mapping[Path, Sequence[str]]]) -> dict[Path, list[str]]:
    """All parts of each path."""
    return {path: [token for level in levels for token in level.get(path, ())] for path in levels[-1]}


def _numbered_scans(levels: Sequence[Mapping[Path, Sequence[str]]]) -> bool:
    """Whether some path is a number like a year and then only short numbers, so that the first is a person's."""
    return any(
        len(tokens) > 1 and _IS_YEAR.fullmatch(tokens[0]) and all(map(_SHORT.fullmatch, tokens[1:]))
        for tokens in _whole(levels).values()
    )


def _all_years(names: Iterable[str]) -> bool:
    return all(map(_IS_YEAR.fullmatch, filter(None, names)))


def _columns(level: Mapping[Path, Sequence[str]]) -> list[dict[Path, str]]:
    """The first parts of the names, the second, and so on, without those that occur in all of several names.

    A word goes into the last column in which it occurs, so that `anna` is in the second of `anna.nii, x_anna.nii`.
    """
    lists = [{token.lower() for token in tokens} for tokens in level.values()]
    differ = len({" ".join(tokens) for tokens in level.values()}) > 1
    common = set.intersection(*lists) if differ else set()
    kept = {path: [token for token in tokens if token.lower() not in common] for path, tokens in level.items()}
    last: dict[str, int] = {}
    for tokens in kept.values():
        for place, token in enumerate(tokens):
            if not _NUMBER.fullmatch(token):
                last[_key(token)] = max(place, last.get(_key(token), 0))
    columns: dict[int, dict[Path, str]] = defaultdict(dict)
    for path, tokens in kept.items():
        place = -1
        for token in tokens:
            place = max(place + 1, last.get(_key(token), 0))
            columns[place][path] = token
    return [columns[place] for place in sorted(columns)]


def folded(name: str) -> str:
    """A name without the differences of upper and lower case, and of the two Unicode forms of one letter, as in ü."""
    return unicodedata.normalize("NFC", name).casefold()


def _key(name: str) -> str:
    """A key that ignores leading zeros too, equal for all spellings of a name."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", folded(name))


def same_person(name: str) -> str:
    """A key that is equal for `sub-01`, `01` and `1`, which a table may mix."""
    return _key(_LABEL.sub("", name))


def _joined(names: Mapping[Path, str], patients: Mapping[Path, str]) -> dict[Path, str]:
    """Joins the `names` that share a PatientID; an empty name is replaced by one from the PatientID."""
    usable = {path: text.strip() for path, text in patients.items() if not _PLACEHOLDER.fullmatch(text.strip())}
    filled = {
        path: name or (f"patient-{hashlib.sha256(usable[path].encode()).hexdigest()[:8]}" if path in usable else "")
        for path, name in names.items()
    }
    return _merged(filled, {path: [patient] for path, patient in usable.items()})


def _merged(names: Mapping[Path, str], shared: Mapping[Path, Iterable[str]]) -> dict[Path, str]:
    """Gives one name to paths that have an item of `shared` in common, and one spelling, the first, to names with the
    same `_key`."""
    same_as: dict[str, str] = {}  # by key of a name: the key that it has become

    def final(key: str) -> str:
        while key in same_as:
            key = same_as[key]
        return key

    first: dict[str, str] = {}  # by item
    for path, items in shared.items():
        key = _key(names[path])
        for item in items:
            mine, other = final(key), final(first.setdefault(item, key))
            if mine != other:
                same_as[mine] = other
    spelled = {_key(name): name for name in reversed([*names.values()])}
    return {path: spelled[final(_key(name))] for path, name in names.items()}


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
