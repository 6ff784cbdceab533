"""Checks of calls that must be refused: with one of our errors, in one line."""

from collections.abc import Callable
from typing import Any

import pytest

from deformmamba.errors import DeformMambaError


def refused(call: Callable[[], Any], message: str, kind: type[DeformMambaError] = DeformMambaError) -> str:
    """Asserts that `call` raises an error of this kind, in one line that matches `message`; returns the line."""
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
