"""The base class of every exception of this package, and functions for their messages.

A message has one line: what was wrong, what was given, what is allowed, what to do next.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any


class DeformMambaError(Exception):
    """Base class of every exception that this package raises on purpose.

    Each one but `WeightsError` also derives from the built-in class that fits (ValueError, TypeError, RuntimeError,
    ImportError), so that `except ValueError` works as usual. Any other exception that leaves this package is a bug.
    """


class InvalidArgument(DeformMambaError, ValueError):
    """An argument has a value or a shape that is not allowed."""


class InvalidType(DeformMambaError, TypeError):
    """An argument has a type or a dtype that is not allowed."""


class UnsupportedCall(DeformMambaError, RuntimeError):
    """A valid call that is not supported in this situation: on this device, under this tool, in this state."""


def shown(value: Any) -> str:
    """`value` for a message: `ascii(value)` in one line, cut to 80 characters. Safe for values that come from a file.

    For arrays and tensors: type, shape and dtype.
    """
    try:
        shape = getattr(value, "shape", ())
        if isinstance(shape, tuple) and shape and hasattr(value, "dtype"):
            text = f"{type(value).__name__} of shape {tuple(shape)}, {value.dtype}"
        else:
            text = _printable(ascii(value))
    except Exception:  # an integer of thousands of digits, a deep nesting, a class with a failing repr
        text = f"a {type(value).__name__}"
    return shortened(text, 80)


def one_line(error: BaseException) -> str:
    """The message of an exception of another package: one line of printable ASCII, cut to 300 characters."""
    text = " ".join(_printable(str(error)).split()).encode("ascii", "backslashreplace").decode()
    return shortened(text, 300)


def innermost(error: BaseException) -> BaseException:
    """The exception at the start of a chain of `raise ... from ...`, which has the reason; `error` itself if alone."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error


# ESC [ ... letter, as for colours, and ESC ] ... BEL or ESC \, as for links
_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")


def _printable(text: str) -> str:
    """`text` without the codes that colour it in a terminal; each run of other control characters is a space."""
    return re.sub(r" *[\x00-\x1f\x7f-\x9f]+ *", " ", _TERMINAL_CODES.sub("", text))


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 volume", "2 volumes"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def shortened(text: str, longest: int) -> str:
    """`text`, cut to `longest` characters that end in three dots if it has more."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6, written: Callable[[str], str] = repr) -> str:
    """A suggestion to put behind a wrong word: " (did you mean X?)" for the nearest known word, else empty.

    Capital and small letters are the same.

    Args:
        cutoff: the least similarity, from 0 to 1, of a word that is suggested.
        written: how the suggested word is written, by default in quotes.
    """
    words = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=cutoff)
    if near and words[near[0]] == word:
        return ""
    return f" (did you mean {written(words[near[0]])}?)" if near else ""
