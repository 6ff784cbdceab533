"""Atomic file writes: a file appears under its name complete, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PathLike = str | os.PathLike[str]


@contextmanager
def renamed(path: PathLike) -> Iterator[Path]:
    """Yields a temporary name in the folder of `path`; the block writes a file of that name.

    After the block the file is flushed to the disk (fsync) and renamed to `path`; an existing file is replaced. If the
    block raises, the temporary file is removed and `path` is left as it was. A symbolic link at `path` stays, and the
    file that it points to is replaced. The temporary name starts with a dot and keeps the ending of `path`.

    Raises:
        OSError: the operating system refused.
    """
    target = Path(os.path.realpath(path))
    ending = "".join(target.suffixes[-2:]) if target.name.endswith((".gz", ".bz2")) else target.suffix
    temporary = target.with_name(f".{secrets.token_hex(8)}{ending}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # writable: Windows flushes no other
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes one file, which appears complete or not at all.

    Raises:
        OSError: the operating system refused.
    """
    with renamed(path) as temporary:
        temporary.write_bytes(data)
