"""Files that have two names."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path


def links(paths: Iterable[Path]) -> dict[Path, Path]:
    """Maps each path that leads to the same file as an earlier one, by a symbolic or hard link, to this earlier path.

    A file that is stored twice with equal bytes is not found.
    """
    first: dict[tuple[int, int], Path] = {}
    found: dict[Path, Path] = {}
    for path in paths:
        with suppress(OSError):
            if path.is_file() and (known := first.setdefault(((at := path.stat()).st_dev, at.st_ino), path)) != path:
                found[path] = known
    return found


def of_two_subjects(owners: Mapping[Path, str]) -> tuple[Path, Path] | None:
    """The first link whose file also counts as another subject's, and the path of this other subject; None without one.

    `owners`: the subject of each path.
    """
    pairs = links(owners).items()
    return next(((path, original) for path, original in pairs if owners[path] != owners[original]), None)
