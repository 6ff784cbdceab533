"""Splits of subjects into training, validation and test sets: the rules, and the tables that users write.

Every rule depends on the subjects' names alone, so the same data always give the same split.
"""

import csv
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from deformmamba.errors import InvalidArgument
from deformmamba.volume import VolumeError

SPLITS = ("train", "val", "test", "external")


def check_shares(val: float, test: float = 0.0) -> None:
    """Refuses invalid shares of subjects.

    Raises:
        ValueError: a share outside [0, 1], or more than 1 in total.
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share <= 1:
            raise InvalidArgument(
                f"{name}: the share of subjects is {share:g}; wanted a number from 0 to 1, such as 0.1"
            )
    if val + test > 1:
        raise InvalidArgument(
            f"val and test: shares of {val:g} and {test:g} are more than all subjects; wanted at most 1"
        )


def check_splits(pairs: Iterable[tuple[str, str]], where: str | os.PathLike[str]) -> None:
    """Refuses a subject in two splits, given pairs of subject and split; the message names `where`.

    Raises:
        VolumeError: names the first such subject.
    """
    splits = defaultdict(set)
    for subject, split in pairs:
        splits[subject].add(split)
    for subject, found in splits.items():
        if len(found) > 1:
            raise VolumeError(
                f"{where}: subject {subject} is in {' and '.join(sorted(found))}; assign each subject to one split"
            )


def by_share(subjects: Iterable[str], *, val: float, test: float, seed: int = 0) -> dict[str, str]:
    """The split of each subject: a hash of `seed` and name gives a place in [0, 1). Subjects below `test` test, those
    below `test + val` validate, and the others train.

    A new subject therefore does not change the split of any other. Small sets are the exception. With two or more
    subjects, at least one validates (unless `val` is 0) and at least one trains (unless `val + test` is 1). With three
    or more, at least one tests (unless `test` is 0). The subjects nearest in the order of places are used for that.
    """
    texts = {name: f"{seed}:{name}".encode("utf-8", "surrogateescape") for name in sorted(set(subjects))}
    places = {name: int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 for name, text in texts.items()}
    order = sorted(places, key=lambda name: places[name])
    n = len(order)
    n_test = sum(place < test for place in places.values())
    n_val = sum(place < test + val for place in places.values()) - n_test
    if n >= 3 and test > 0:
        n_test = max(n_test, 1)
    if n >= 2 and val > 0:
        most = n - 1 if val + test < 1 else n  # one trains
        n_val = max(n_val, 1)
        n_test = min(n_test, most - 1)
        n_val = min(n_val, most - n_test)
    elif n >= 2 and val + test < 1:
        n_test = min(n_test, n - 1)
    return {name: "test" if k < n_test else "val" if k < n_test + n_val else "train" for k, name in enumerate(order)}


def by_count(subjects: Iterable[str], wanted: tuple[int, int], val: float) -> tuple[dict[str, str], str]:
    """The split of each subject by published numbers of training and test subjects, and the rule in one sentence.

    Subjects are sorted by the SHA-256 of their names; the first `wanted[0]` train and the next `wanted[1]` test. Fewer
    subjects are split in the same proportion. See `validating` for `val`.
    """
    check_shares(val)
    order = sorted(set(subjects), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    n = min(len(order), sum(wanted))
    n_train = max(1, min(n - 1, round(n * wanted[0] / sum(wanted))))
    if n == 2 and val:  # else no subject would remain for validation
        n_train = 2
    split = {name: "train" if k < n_train else "test" for k, name in enumerate(order[:n])}
    rule = f"{len(order)} subjects by the SHA-256 of their id: the first {n_train} train, the next {n - n_train} test"
    if n < sum(wanted):
        rule += f": the proportion of {wanted[0]} to {wanted[1]}, of whom there are too few"
    split = validating(split, val)
    n_val = list(split.values()).count("val")
    return split, rule + (f"; the last {n_val} of those who train validate instead" if n_val else "")


def validating(split: Mapping[str, str], val: float) -> dict[str, str]:
    """Moves the share `val` of the training subjects, rounded up, to "val": the last in the order of their hashes. At
    least one subject keeps training."""
    check_shares(val)
    train = [name for name, where in split.items() if where == "train"]
    train.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    n_val = max(0, min(math.ceil(val * len(train)), len(train) - 1))
    moved = set(train[len(train) - n_val :])
    return {name: "val" if name in moved else where for name, where in split.items()}


def read_splits(path: str | os.PathLike[str], known: Iterable[str]) -> dict[str, str]:
    """The split of each subject from a CSV or TSV file with the columns subject (or participant_id) and split.

    Raises:
        VolumeError: no such file or column, an empty cell, a split not in `SPLITS`, a subject in two splits, or a
            subject not in `known`.
    """
    known = set(known)
    header = read_header(path)
    column = next((name for name in ("subject", "participant_id") if name in header), None)
    if column is None or "split" not in header:
        raise VolumeError(f"{path}: wanted a CSV or TSV file with the columns subject and split")
    pairs = []
    for number, row in read_table(path, (column, "split")):
        name, where = row[column], row["split"]
        if where not in SPLITS:
            raise VolumeError(f"{path}, line {number}: split {where!r} of {name}; splits are {', '.join(SPLITS)}")
        if name not in known:
            raise VolumeError(
                f"{path}, line {number}: no volume belongs to subject {name}; correct the name or remove the line"
            )
        pairs.append((name, where))
    check_splits(pairs, path)
    return dict(pairs)


def read_header(path: str | os.PathLike[str]) -> list[str]:
    """The column names of a CSV or TSV file; empty for an empty file."""
    text = read_text(path)
    return [name.strip() for name in next(csv.reader(text.splitlines(), delimiter=_delimiter(text)), [])]


def read_table(path: str | os.PathLike[str], needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV or TSV file with their line numbers, without blank lines; cells are stripped of blanks.

    A byte order mark, which spreadsheets write, is ignored. Every row must fill the columns of `needed`. "n/a", BIDS'
    word for a missing value, is an empty cell.

    Raises:
        VolumeError: the file cannot be read, a column of `needed` is missing or there twice, a row leaves one empty, or
            a quoted cell continues in the next line (names file, line and column).
    """
    text = read_text(path)
    header = read_header(path)
    missing = [name for name in needed if name not in header]
    if missing:
        raise VolumeError(f"{path}: no column {missing[0]!r}; wanted {', '.join(needed)}, there are: {header}")
    if twice := [name for name in needed if header.count(name) > 1]:
        raise VolumeError(f"{path}: several columns are named {twice[0]!r}; remove all but one")
    reader = csv.reader(text.splitlines(), delimiter=_delimiter(text))
    next(reader)
    read = reader.line_num
    for cells in reader:
        read += 1
        if reader.line_num != read:  # else a quotation mark that is not closed would hide rows
            raise VolumeError(
                f"{path}, line {read}: a cell in quotation marks continues in the next line; remove the quotation mark "
                "or the line break"
            )
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header):
            raise VolumeError(
                f"{path}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns; remove the extra cells"
            )
        filled = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        row = dict.fromkeys(header, "") | {name: cell for name, cell in filled.items() if cell.lower() != "n/a"}
        empty = [name for name in needed if not row[name]]
        if empty:
            raise VolumeError(
                f"{path}, line {reader.line_num}: the cell {empty[0]} is empty; fill it or remove the line"
            )
        yield reader.line_num, row


def _delimiter(text: str) -> str:
    first = text.partition("\n")[0]
    return max("\t;,", key=first.count) if any(mark in first for mark in "\t;,") else ","


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        VolumeError: it cannot be read.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VolumeError(f"{path}: cannot be read ({type(error).__name__}); wanted a text file in UTF-8") from None
