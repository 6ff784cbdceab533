"""Run one function on several CPU threads: PyTorch's own OpenMP threads if possible, else a thread pool.

PyTorch's OpenMP threads spin for milliseconds after each operation. A second set of threads would compete with them for
the cores. So the function runs on the spinning threads, as an OpenMP parallel region. The pool is used after a fork
(OpenMP threads do not survive it) and with an OpenMP library other than GNU's.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from deformmamba.torch_private import PARALLEL_REGION, gomp_parallel

T = TypeVar("T")


def run_on_threads(work: Callable[[], None], n: int) -> None:
    """Runs `work()` on `n` threads at once and waits for all of them. With n > 1, torch uses one thread in each.

    The system may provide fewer threads, at least one. So `work` takes its tasks from a shared queue until it is empty.
    Torch's modes (inference mode, autocast) are per thread; `work` sets the ones it needs.

    Raises the first exception that `work` raised on any thread.
    """
    if n == 1:
        return work()
    errors: list[BaseException] = []

    def one() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    if region := _parallel_region():
        region(PARALLEL_REGION(lambda _: one()), None, n, 0)
    else:
        for done in [_workers(n).submit(one) for _ in range(n)]:
            done.result()
    if errors:
        raise errors[0]


def run_each(work: Callable[[T], object], tasks: Iterable[T], n: int) -> None:
    """`work(task)` for each task, on `n` threads that take the next task when they are free; else as `run_on_threads`.

    After an exception in a task, its thread takes no more.
    """
    waiting = deque(tasks)

    def take() -> None:
        while True:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            work(task)

    run_on_threads(take, n)


def _parallel_region() -> Callable[..., None] | None:
    """GOMP_parallel, unless this process is a fork, in which PyTorch's threads do not exist."""
    return None if _forked else _gomp_parallel()


_gomp_parallel = cache(gomp_parallel)


class ForkLock:
    """A lock for `with`, re-entrant. In a forked child it is new, because a thread of the parent that holds the old one
    does not exist there and never releases it."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_lock = ForkLock()
_pool: tuple[int, ThreadPoolExecutor] | None = None
_forked = False


def _after_fork() -> None:
    """Resets the pool, because a forked process has no threads."""
    global _pool, _forked
    _pool, _forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _workers(n: int) -> ThreadPoolExecutor:
    """A pool of at least n threads; in each of them torch uses one thread."""
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


def waiting_policy() -> str:
    """How PyTorch's OpenMP threads wait for the next operation, from the environment, and advice if they spin."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if value := os.environ.get(name):
            return f"{name}={value}"
    return "they spin; on a busy machine set OMP_WAIT_POLICY=passive in the environment before torch is imported"


def environment_warnings() -> list[str]:
    """One line for each OpenMP setting in the environment that makes PyTorch's own operations unsafe or slow."""
    found = []
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        found.append(
            "OMP_DYNAMIC is set: OpenMP may start fewer threads than PyTorch asks for, and then PyTorch's own "
            "convolutions can return wrong results; unset it"
        )
    if "OMP_THREAD_LIMIT" in os.environ:
        found.append(
            f"OMP_THREAD_LIMIT={os.environ['OMP_THREAD_LIMIT']}: OpenMP may start fewer threads than PyTorch asks for, "
            "and then PyTorch's own convolutions can return wrong results; unset it and use OMP_NUM_THREADS"
        )
    return found
