"""Around every file: foreign parsers kept quiet, their errors made one line, and targets whole or not there at all."""

import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from deformmamba.volume.image import VolumeError

PathLike = str | os.PathLike[str]
NIFTI_SUFFIXES = (".nii", ".nii.gz")
MGH_SUFFIXES = (".mgh", ".mgz")
# what a voxel may be written as; integers are rounded, never rescaled
DTYPES = ("float32", "float64", "int16", "uint16", "int32", "uint8")
MGH_DTYPES = ("float32", "int16", "int32", "uint8")


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing from nibabel and pydicom on the terminal: they quote header fields, a patient's among them."""
    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def parsing(path: Path, what: str) -> Iterator[None]:
    """Any exception of a foreign parser becomes a VolumeError that does not quote it."""
    try:
        yield
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    except PermissionError:
        raise VolumeError(f"{path}: permission denied") from None
    except MemoryError:
        raise VolumeError(f"{path}: does not fit into memory") from None
    except Exception as error:  # malformed bytes raise anything
        raise VolumeError(f"{path}: {what} ({type(error).__name__})") from None


def suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def volume_index(path: Path, n: int, volume: int | None) -> int:
    if volume is None:
        if n > 1:
            raise VolumeError(f"{path}: holds {n} volumes; choose one with volume=K (--volume K), 0 to {n - 1}")
        return 0
    if not 0 <= volume < n:
        allowed = f"0 to {n - 1}" if n > 1 else "only volume 0"
        raise VolumeError(f"{path}: has no volume {volume}; it holds {n}: {allowed}")
    return volume


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` if the block succeeds and vanishes if not.

    Raises:
        VolumeError: the operating system refused.
    """
    target = Path(os.path.realpath(path))  # a link is written through, not replaced
    temporary = target.parent / f".{secrets.token_hex(8)}{suffix(target)}"
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written: {error.strerror or type(error).__name__}") from error
    finally:
        temporary.unlink(missing_ok=True)


def as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return array.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    lowest, highest = float(array.min()), float(array.max())
    if not (limits.min <= np.rint(lowest) and np.rint(highest) <= limits.max):
        raise VolumeError(
            f"values from {lowest:g} to {highest:g} do not fit {dtype} ({limits.min} to {limits.max}); use float32"
        )
    return np.rint(array).astype(dtype)
