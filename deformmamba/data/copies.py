"""Files that hold the same scan under two names."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

_BLOCKS, _BLOCK = 16, 4096  # read of each file of the same size before whole files are compared


def copies(paths: Iterable[Path]) -> dict[Path, Path]:
    """The earlier file that a file is a copy of, or a link to, by the path of the later one.

    Copies have equal bytes. Folders and files that are empty or cannot be read are left out.
    """
    sized = defaultdict(list)
    for path in paths:
        with suppress(OSError):
            if path.is_file() and (size := path.stat().st_size):
                sized[size].append(path)
    found: dict[Path, Path] = {}
    for size, alike in sized.items():
        for sampled in _grouped(alike, partial(_sample, size)):
            for same in _grouped(sampled, _whole):
                found |= dict.fromkeys(same[1:], same[0])
    return found


def _grouped(paths: Sequence[Path], content: Callable[[Path], bytes]) -> list[list[Path]]:
    """The groups of several paths with the same `content`, in the given order."""
    groups = defaultdict(list)
    for path in paths if len(paths) > 1 else ():
        with suppress(OSError):
            groups[content(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _sample(size: int, path: Path) -> bytes:
    """Blocks of a file, spread evenly over its `size` bytes."""
    with open(path, "rb") as file:
        blocks = []
        for k in range(_BLOCKS):
            file.seek(size * k // _BLOCKS)
            blocks.append(file.read(_BLOCK))
    return b"".join(blocks)


def _whole(path: Path) -> bytes:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
