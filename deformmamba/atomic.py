"""Atomic writes: a file or a folder appears under its name complete, or not at all."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PathLike = str | os.PathLike[str]

# a temporary name: a dot, the machine (hashed), the process, a random part, and the ending of the target
_TEMPORARY = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}(\..*)?")


_own: set[Path] = set()  # temporary names of this process that may exist
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own.clear)


def temporary_name(target: Path, ending: str) -> Path:
    """An unused hidden name in the folder of `target`; `sweep` removes the file if this process is killed."""
    name = target.with_name(f".{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{ending}")
    _own.add(name)
    return name


def remove_temporaries() -> None:
    """Removes the temporary files of this process that are left, for the end of a process whose clean-up failed."""
    for path in list(_own):
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a temporary file or folder of this process, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    _own.discard(path)


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sweep(folder: PathLike) -> None:
    """Removes the temporary files that killed processes of this machine left in `folder`."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or found["machine"] != _machine() or _is_alive(int(found["process"])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # signal 0 would end a process on Windows
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def is_special(path: PathLike) -> bool:
    """Whether something exists at `path` (links are followed) that is neither a file nor a folder."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


@contextmanager
def renamed(path: PathLike) -> Iterator[Path]:
    """Yields a temporary name in the folder of `path`; the block writes a file of that name.

    After the block the file is flushed to the disk (fsync) and renamed to `path`; an existing file is replaced, and its
    permissions stay. If the block raises, the temporary file is removed and `path` is unchanged. A symbolic link at
    `path` stays, and the file that it points to is replaced. The temporary name starts with a dot and keeps the ending
    of `path`.

    Raises:
        OSError: the operating system refused, or `path` is a device, a pipe or a socket, which a file must not replace.
    """
    target = Path(os.path.realpath(path))
    if is_special(target):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file", os.fspath(path))
    ending = "".join(target.suffixes[-2:]) if target.name.endswith((".gz", ".bz2")) else target.suffix
    temporary = temporary_name(target, ending)
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # opened for writing, because Windows flushes only such files
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    finally:
        _remove(temporary)


@contextmanager
def renamed_pair(path: PathLike, beside: PathLike) -> Iterator[tuple[Path, Path]]:
    """Two temporary names in the folder of `path`, equal up to their endings, for two files that belong together.

    After the block they replace `path` and `beside`, which are in the same folder. If the block raises, or a signal
    comes between the two renames, both old files are there again. (Only a process that is killed, or a machine that
    stops, exactly between the two leaves the new `beside` with the old `path`.) A symbolic link is replaced.

    Raises:
        OSError: the operating system refused.
    """
    path, beside = Path(path), Path(beside)
    temporary = temporary_name(path, path.suffix)
    second, before = temporary.with_suffix(beside.suffix), temporary.with_suffix(".before")
    _own.add(second)
    was_there = True
    try:
        yield temporary, second
        for made, target in ((second, beside), (temporary, path)):
            with open(made, "r+b") as file:
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.chmod(made, stat.S_IMODE(target.stat().st_mode))
        was_there = beside.exists()
        if was_there:
            os.replace(beside, before)
        os.replace(second, beside)
        os.replace(temporary, path)
    finally:
        if temporary.exists():  # `path` is still the old one
            if before.exists():
                os.replace(before, beside)
            elif not was_there:
                _remove(beside)
        for name in (temporary, second, before):
            _remove(name)


@contextmanager
def renamed_folder(path: PathLike) -> Iterator[Path]:
    """An empty temporary folder beside `path`; it replaces `path` if the block succeeds, else it is removed.

    The old content of `path` is removed only after the new folder is in place.

    Raises:
        OSError: the operating system refused.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target, "")
    before = temporary.with_name(temporary.name + ".before")
    temporary.mkdir()
    try:
        yield temporary
        if target.is_dir() and any(target.iterdir()):
            os.replace(target, before)
        os.replace(temporary, target)
    finally:
        if before.exists() and not target.exists():  # a signal may come between the two
            os.replace(before, target)
        _remove(temporary)
        _remove(before)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes one file, which appears complete or not at all.

    Raises:
        OSError: the operating system refused.
    """
    with renamed(path) as temporary:
        temporary.write_bytes(data)
