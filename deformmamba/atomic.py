"""Atomic writes: a file or a folder appears under its name complete, or not at all."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
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
    with suppress(OSError):
        _settle(path)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    _own.discard(path)


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `temporary_name` gives, on any machine."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(folder: PathLike) -> None:
    """Removes the temporary files that killed processes of this machine left in `folder`.

    A `renamed_folder` that was killed between two renames is brought to its old or its new state.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or found["machine"] != _machine() or _is_alive(int(found["process"])):
                continue
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    _settle(Path(folder, entry.name.removesuffix(found[3] or "")))
                else:
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
def renamed_folder(path: PathLike, replaces: Callable[[Path], bool] = lambda old: True) -> Iterator[Path]:
    """An empty temporary folder; its files are the content of the folder `path` if the block succeeds.

    A new folder appears with its files. An existing folder stays the same one, which may be a mount point or the
    working directory of a shell: the temporary folder is inside it, and new files take the place of old ones. If the
    block raises, or a signal comes at any moment, the old files are there again. If the process is killed between two
    renames, `sweep` puts the old files back, or moves the rest of the new files in once all old ones are set aside.

    Args:
        path: the folder.
        replaces: called with each old file, whether the new ones replace it. Other files stay.

    Raises:
        FileExistsError: a new file has the name of an old one that stays.
        OSError: the operating system refused.
    """
    target = Path(os.path.realpath(path))
    inside = temporary_name(target / "new", "")
    temporary = inside if target.is_dir() else temporary_name(target, "")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())
        if not target.is_dir():
            os.replace(temporary, target)
        else:
            if temporary != inside:  # the folder was made meanwhile
                os.replace(temporary, inside)
            _fill(target, inside, replaces)
    finally:
        _remove(temporary)
        _remove(inside)


# Beside a temporary folder, inside the folder that it fills: the old files, while they are collected, and all of them.
_COLLECTED, _ALL = ".aside", ".before"


def _fill(target: Path, temporary: Path, replaces: Callable[[Path], bool]) -> None:
    """Moves the files of `temporary`, a folder inside `target`, to `target`; if this fails, the old files are back."""
    aside, before = _beside(temporary)
    old = [path.name for path in target.iterdir() if not is_temporary(path.name) and replaces(path)]
    new = [path.name for path in temporary.iterdir()]
    for name in new:
        if name not in old and os.path.lexists(target / name):
            raise FileExistsError(errno.EEXIST, f"the file {name} in it was not written by this program")
    try:
        aside.mkdir()
        for name in old:
            os.replace(target / name, aside / name)
        os.replace(aside, before)
        for name in new:
            os.replace(temporary / name, target / name)
        temporary.rmdir()  # from here on the new files count
    except BaseException:
        if temporary.exists() and before.exists():
            for name in new:
                if not os.path.lexists(temporary / name):
                    os.replace(target / name, temporary / name)
            os.replace(before, aside)
        raise


def _beside(temporary: Path) -> tuple[Path, Path]:
    return temporary.with_name(temporary.name + _COLLECTED), temporary.with_name(temporary.name + _ALL)


def _settle(temporary: Path) -> None:
    """Removes a temporary folder after it has brought the folder that it fills to its old or its new state.

    Only the names on the disk decide, so that another process can do it. Old files that are not all collected are put
    back. If they are, the new files are all there, and the rest of them is moved in.
    """
    aside, before = _beside(temporary)
    if aside.is_dir():
        _empty(aside)
    elif before.is_dir():
        if temporary.is_dir():
            _empty(temporary)
        shutil.rmtree(before, ignore_errors=True)
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Moves the files of `folder` to its parent, and removes it."""
    for path in list(folder.iterdir()):
        os.replace(path, folder.parent / path.name)
    folder.rmdir()


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes one file, which appears complete or not at all.

    Raises:
        OSError: the operating system refused.
    """
    with renamed(path) as temporary:
        temporary.write_bytes(data)
