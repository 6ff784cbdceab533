"""File handling: silences foreign parsers, shortens their errors to one line, and writes only complete targets."""

import errno
import io
import logging
import operator
import os
import sys
import tempfile
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deformmamba.atomic import PathLike, renamed, sweep
from deformmamba.volume.image import VolumeError, in_plane

NIFTI_SUFFIXES = (".nii", ".nii.gz")
MGH_SUFFIXES = (".mgh", ".mgz")
# allowed types of written voxels; integers are rounded, never rescaled
DTYPES = ("float32", "float64", "int16", "uint16", "int32", "uint8")
MGH_DTYPES = ("float32", "int16", "int32", "uint8")
DICOM_DTYPES = ("int16", "uint16")


class _Silence(logging.Filter):
    """Drops the log records of the threads that are inside `silenced`."""

    threads: ClassVar[Counter[int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.threads[record.thread or 0]


_SILENCE = _Silence()
_silence_lock = threading.Lock()
# the lists of filters that got the entries of `silenced`, and these entries
_silent_filters: list[tuple[list[Any], list[Any]]] = []


@contextmanager
def silenced() -> Iterator[None]:
    """Suppresses output of nibabel and pydicom, because they quote header fields with patient data.

    Any number of threads may be inside. Warnings of other modules and log records of other threads pass. The filters
    of `warnings` and of the loggers are restored when the last thread leaves.
    """
    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]
    me = threading.get_ident()
    with _silence_lock:
        if not +_Silence.threads:
            for logger in loggers:
                logger.addFilter(_SILENCE)
            filters: list[Any] = warnings.filters  # type: ignore[assignment]
            before = list(filters)
            for module in ("pydicom", "nibabel", "numpy", "gzip", r"deformmamba\.volume"):
                warnings.filterwarnings("ignore", module=module)
            _silent_filters.append((filters, [entry for entry in filters if entry not in before]))
        _Silence.threads[me] += 1
    try:
        yield
    finally:
        with _silence_lock:
            _Silence.threads[me] -= 1
            if not +_Silence.threads:
                _Silence.threads.clear()
                for logger in loggers:
                    logger.removeFilter(_SILENCE)
                for filters, added in _silent_filters:
                    # a `catch_warnings` of another thread may have replaced the list by a copy
                    for entries in (filters, warnings.filters):
                        entries[:] = [entry for entry in entries if entry not in added]  # type: ignore[index]
                _silent_filters.clear()


def warn_of(notes: Iterable[str], path: PathLike | None = None) -> None:
    """Gives a reader's remarks as warnings about the line outside of this package that had the scan read."""
    level, frame = 1, sys._getframe()
    package = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    for note in notes:
        warnings.warn(note if path is None else f"{path}: {note}", stacklevel=level)


@contextmanager
def parsing(path: Path, what: str) -> Iterator[None]:
    """Turns any exception of a foreign parser into a VolumeError that does not quote its text."""
    try:
        yield
    except ChoiceNeeded:
        raise
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except PermissionError:
        raise VolumeError(f"{path}: permission denied") from None
    except MemoryError:
        raise VolumeError(f"{path}: too large for the memory") from None
    except Exception as error:  # malformed bytes raise anything
        raise VolumeError(f"{path}: {what} ({type(error).__name__})") from None


class Bounded(io.BufferedIOBase):
    """`file` for reading, limited to its `n_bytes`.

    With a damaged length field a parser requests gigabytes, and Python allocates them before it reads.
    """

    def __init__(self, file: Any, n_bytes: int) -> None:
        self._file, self._n_bytes = file, n_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._n_bytes - self._file.tell())
        return bytes(self._file.read(left if size is None or size < 0 else min(size, left)))

    def readinto(self, buffer: Any, /) -> int:
        return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._file.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def stem(path: Path) -> str:
    """The name of a file or folder without its `suffix`."""
    return path.name[: len(path.name) - len(suffix(path))]


class ChoiceNeeded(VolumeError):
    """A file or folder holds several volumes, series or stacks, and one must be chosen.

    The message gives the argument of `read_volume`; `for_command` gives the option of a command that has it.
    """

    def __init__(self, problem: str, argument: str, which: str) -> None:
        super().__init__(f"{problem}; choose one with {argument}=K, {which}")
        self.problem, self.argument, self.which = problem, argument, which

    def for_command(self, options: Mapping[str, Any]) -> str:
        """The message for a command with these options."""
        if self.argument in options:
            return f"{self.problem}; choose one with --{self.argument} K, {self.which}"
        return f"{self.problem}; this command takes a single volume; save the wanted one as a separate file"


class NotFinite(VolumeError):
    """Voxels are NaN or infinite. The message gives the argument of `read_volume` that replaces them."""

    def __init__(self, problem: str) -> None:
        super().__init__(f'{problem}; nan="zero" (--nan zero) makes them 0')
        self.problem = problem


def volume_index(path: Path, n: int, volume: int | None) -> int:
    if volume is None:
        if n > 1:
            raise ChoiceNeeded(f"{path}: holds {n} volumes", "volume", f"0 to {n - 1}")
        return 0
    if not 0 <= volume < n:
        allowed = f"its volumes are 0 to {n - 1}" if n > 1 else "its only volume is 0"
        raise VolumeError(f"{path}: has no volume {volume}; {allowed}")
    return operator.index(volume)  # numpy's integers of a few bits would overflow


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` if the block succeeds, else it is removed.

    Raises:
        VolumeError: the operating system refused.
    """
    with refusals(path), renamed(path) as temporary:
        yield temporary


def make_folder(path: PathLike) -> None:
    """Makes a folder and those above it, unless they exist.

    Raises:
        VolumeError: the operating system refused.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{os.fspath(path)}: cannot create this folder: {error.strerror}; choose another folder"
        ) from None


def write_text(path: PathLike, text: str) -> None:
    """Writes UTF-8 without newline translation; an existing file is replaced only by a complete one.

    Raises:
        VolumeError: the operating system refused.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # file names may not be UTF-8


class Unfit(VolumeError):
    """Values that a type cannot hold; the message names no file."""


@contextmanager
def refusals(path: PathLike) -> Iterator[None]:
    """Turns errors of the operating system into a VolumeError of one line, and names the file of an `Unfit`."""
    try:
        yield
    except Unfit as error:
        raise VolumeError(f"{path}: {error}") from None
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written: {error.strerror or type(error).__name__}") from error


@contextmanager
def closed(file: Any) -> Iterator[Any]:
    """Closes `file` at the end. After another error, an error while closing (such as a full disk) is ignored."""
    try:
        yield file
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    file.close()


class CompressedFile:
    """A gzip file for writing, level 1, without a date in its header.

    `gzip.GzipFile` holds what a full disk refused, and tries to write it once more when it is deleted, which prints a
    traceback (Python 3.12 and later). This class holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._compressor = zlib.compressobj(1, wbits=zlib.MAX_WBITS + 16)  # + 16: a gzip header and checksum
        self._position = 0

    def write(self, data: bytes) -> int:
        self._file.write(self._compressor.compress(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        """Uncompressed bytes so far."""
        return self._position

    def seek(self, position: int) -> None:
        """Forward only: the bytes between are zeros."""
        if position < self._position:
            raise io.UnsupportedOperation("a compressed file is written in order")
        self.write(bytes(position - self._position))

    def close(self) -> None:
        try:
            self._file.write(self._compressor.flush())
        finally:
            self._file.close()


class SliceFile:
    """A file of slices across one axis, written in order; read as planes across the last axis."""

    def __init__(self, file: Any, shape: Sequence[int], axis: int, dtype: str) -> None:
        self.shape = tuple(shape)
        self._file, self._axis, self._dtype = file, axis, dtype

    def put(self, image: np.ndarray) -> None:
        self._file.write(as_dtype(image, self._dtype).tobytes(order="F"))

    def plane(self, k: int) -> np.ndarray:
        """Plane k (i, j) across the last axis; only after all slices are written."""
        self._file.flush()
        h, w = (self.shape[a] for a in in_plane(self._axis))
        if self._axis == 2:
            return self._read((w, h), k * w).T
        # column k of each slice; reading needs less memory than mapping the file
        columns = np.concatenate([self._read((1, h), n * w + k) for n in range(self.shape[self._axis])])
        return columns if self._axis == 0 else columns.T

    def _read(self, shape: tuple[int, int], start: int) -> np.ndarray:
        """Columns of a slice, counted through all slices from `start`."""
        columns = np.empty(shape, self._dtype)
        offset = start * shape[1] * columns.itemsize
        if hasattr(os, "preadv"):
            n_read = os.preadv(self._file.fileno(), [columns.data], offset)
        else:  # Windows
            before = self._file.tell()
            self._file.seek(offset)
            n_read = self._file.readinto(columns.data)
            self._file.seek(before)
        if n_read != columns.nbytes:
            raise OSError(errno.EIO, "the temporary file is shorter than what was written to it")
        return columns


@contextmanager
def slice_file(path: PathLike, shape: Sequence[int], axis: int, dtype: str) -> Iterator[SliceFile]:
    """A `SliceFile` in a temporary file without a name beside `path`, which disappears with the process."""
    with closed(tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path)))) as file:
        yield SliceFile(file, shape, axis, dtype)


def check_folder_of(path: PathLike) -> None:
    """Checks that the parent folder of `path` exists and is writable."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise VolumeError(f"{path}: there is no folder {folder}; create it first")
    check_folder(path, folder)


def check_folder(path: PathLike, folder: PathLike) -> None:
    """Checks that `folder`, in which `path` is to be written, is writable, and removes what killed processes left."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VolumeError(f"{path}: no permission to write to the folder {folder}; choose another folder")
    sweep(folder)


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as `dtype`, integers rounded; values that do not fit raise `Unfit` and never wrap around."""
    if array.dtype.kind not in "biuf":
        raise VolumeError(f"voxels are {array.dtype}, not real numbers; take the magnitude of complex voxels first")
    extremes = float(array.min()), float(array.max())
    if not np.isfinite(extremes).all():
        raise VolumeError(f"NaN or infinite values do not fit {dtype}; replace them first")
    is_float = np.dtype(dtype).kind == "f"
    limits: Any = np.finfo(dtype) if is_float else np.iinfo(dtype)
    lowest, highest = extremes if is_float else np.rint(extremes).tolist()
    if lowest < float(limits.min) or highest > float(limits.max):
        raise Unfit(
            f"values from {lowest:g} to {highest:g} do not fit {dtype} ({limits.min} to {limits.max}); use float32"
        )
    return (array if is_float else np.rint(array)).astype(dtype, copy=False)
