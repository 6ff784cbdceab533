"""Compiles functions with numba, once for each machine where the code can be kept on disk."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from deformmamba.torch_private import constant_when_compiled

PATIENCE = 1  # seconds of compilation before a line on stderr announces it


def why_numba_does_not_compile() -> str | None:
    """Why numba cannot be used, and the cure, separated by a semicolon; None: it can."""
    try:
        import numba
    except Exception as error:  # a numpy that is too new for numba raises ImportError, a broken llvmlite OSError
        return f"numba cannot be imported ({error}); pip install --upgrade numba"
    settings: Any = numba.config
    if settings.DISABLE_JIT:
        return "numba compiles nothing because NUMBA_DISABLE_JIT is set; unset it, or use backend 'eager'"
    return None


@constant_when_compiled
def numba_compiles() -> bool:
    """Whether numba can be imported and compiles."""
    return why_numba_does_not_compile() is None


def compiled(function: Callable[..., None], signature: Any, what: str, **options: Any) -> Any:
    """The kernel for one signature, which runs without Python's lock; `what` and errors as in `kept_on_disk`.

    `options`: further arguments of `numba.njit`.
    """
    from numba import njit

    def kernel(keep: bool) -> Any:
        settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, **options}
        made: Any = njit(cache=keep, **settings)(function)
        made.compile(signature)
        made.disable_compile()
        return made

    return kept_on_disk(kernel, what)


def kept_on_disk(make: Callable[[bool], Any], what: str) -> Any:
    """`make(True)`, which loads the code from numba's disk cache or compiles and keeps it; else `make(False)`.

    A compilation of more than a second is announced on stderr; `what` names the code there.
    """
    with _announced(what):
        try:
            return make(True)
        except Exception as error:  # of the cache: nowhere to write, a full disk, a damaged file; any other again
            made = make(False)
            _say_once_that_nothing_is_kept(type(error).__name__)
            return made


@contextmanager
def _announced(what: str) -> Iterator[None]:
    from numba.core import event

    def announce() -> None:
        print(f"deformmamba: compiling the {what}, once", file=sys.stderr)

    notice = threading.Timer(PATIENCE, announce)
    notice.daemon = True

    class Announce(event.Listener):
        """Called on compilation, not when the code comes from the disk cache."""

        def on_start(self, _: Any) -> None:
            if notice.ident is None:
                notice.start()

        def on_end(self, _: Any) -> None:
            pass

    try:
        with event.install_listener("numba:compile", Announce()):
            yield
    finally:
        notice.cancel()


@cache
def _say_once_that_nothing_is_kept(reason: str) -> None:
    print(
        f"deformmamba: the compiled kernels cannot be kept on disk ({reason}), so that every process compiles them "
        "again; delete damaged files (*.nbi), or set NUMBA_CACHE_DIR to a folder that you may write to",
        file=sys.stderr,
    )
