"""Work on several threads of the CPU: those of PyTorch where they can be had, else some of our own.

After each of its operations PyTorch's OpenMP threads spin for milliseconds, in case another follows. Threads of our own
would have to share the cores with them; so the spinning threads are given the work, through the function that compilers
call for a parallel region. They do not survive a fork, and what is no GNU OpenMP is left alone: there a pool works.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def together(work: Callable[[], None], n: int) -> None:
    """Run `work()` on `n` threads at once and wait for all of them; in each of several, torch uses no further ones.

    Fewer threads may come, at least one does: `work` takes what there is to do from where all of them look, until there
    is nothing left. Torch's modes (inference mode, autocast) belong to a thread; `work` sets those that it needs.

    Raises what `work` raised, on whichever thread.
    """
    if n == 1:
        return work()
    errors: list[BaseException] = []

    def one() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    if region := _region():
        region(_REGION(lambda _: one()), None, n, 0)
    else:
        for done in [_workers(n).submit(one) for _ in range(n)]:
            done.result()
    if errors:
        raise errors[0]


def _region() -> Callable[..., None] | None:
    """GOMP_parallel(function, its argument, threads, flags) of the library whose threads PyTorch uses, if it does."""
    return None if _forked else _found()


@cache
def _found() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    try:  # only if PyTorch has loaded it
        region: Any = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):  # not loaded, or a system without such a thing
        return None
    region.argtypes, region.restype = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return region


_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None
_forked = False


def _after_fork() -> None:
    """A forked process has the objects, but none of the threads, and a lock may be held by one of them."""
    global _lock, _pool, _forked
    _lock, _pool, _forked = threading.Lock(), None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _workers(n: int) -> ThreadPoolExecutor:
    """At least n threads, in each of which torch uses no further ones."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] < n:
            before, started = torch.get_num_threads(), threading.Barrier(n + 1, timeout=60)

            def begin() -> None:
                torch.get_num_threads()  # or torch would set this thread's number when it first needs it
                torch.set_num_threads(1)
                started.wait()

            pool = ThreadPoolExecutor(n, "deformmamba", initializer=begin)
            for _ in range(n):
                pool.submit(int)
            started.wait()
            # each thread has its own number, but a new one starts with the last that was set
            torch.set_num_threads(before)
            _pool = n, pool
        return _pool[1]
