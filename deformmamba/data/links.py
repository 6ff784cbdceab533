"""Files that are there under two names."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path


def links(paths: Iterable[Path]) -> dict[Path, Path]:
    """For each path of a file that an earlier path leads to as well, by a symbolic or hard link: this earlier path.

    Files with equal bytes that are stored twice are not found.
    """
    first: dict[tuple[int, int], Path] = {}
    found: dict[Path, Path] = {}
    for path in paths:
        with suppress(OSError):
            if path.is_file() and (known := first.setdefault(((at := path.stat()).st_dev, at.st_ino), path)) != path:
                found[path] = known
    return found


def of_two_subjects(owners: Mapping[Path, str]) -> tuple[Path, Path] | None:
    """The first path in `owners` (the subject of each path) that is a link to a path of another subject, and this path.

    None if there is none.
    """
    pairs = links(owners).items()
    return next(((path, original) for path, original in pairs if owners[path] != owners[original]), None)
