"""Compiles the kernels of this folder with numba, if numba can be imported."""

from collections.abc import Callable
from typing import Any

from deformmamba.torch_private import constant_when_compiled


@constant_when_compiled
def numba_compiles() -> bool:
    """Whether numba can be imported and compiles."""
    try:
        import numba
    except Exception:  # a numpy that is too new for numba raises ImportError, a broken llvmlite OSError
        return False
    settings: Any = numba.config
    return not settings.DISABLE_JIT


def compiled(function: Callable[..., None], signature: Any, fastmath: set[str]) -> Any:
    """The kernel for one signature, loaded from numba's disk cache or compiled now. It runs without Python's lock."""
    from numba import njit

    def kernel(cache: bool) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
        made: Any = njit(fastmath=fastmath, cache=cache, **options)(function)
        made.compile(signature)
        made.disable_compile()
        return made

    try:
        return kernel(cache=True)
    except Exception:  # of the cache: no writable folder, a full disk, a damaged file; other errors occur again below
        return kernel(cache=False)
