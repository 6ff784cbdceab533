"""Skipping what needs an optional package that is not installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deformmamba.extras import MissingExtra


@contextmanager
def skipped_without_extra() -> Iterator[None]:
    """Skips if an optional package is not installed. If it is installed but cannot be imported, the test fails."""
    try:
        yield
    except MissingExtra as missing:
        cause = missing.__context__
        absent = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if absent and importlib.util.find_spec(absent.partition(".")[0]) is None:
            pytest.skip(str(missing))
        raise
