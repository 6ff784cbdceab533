"""Divides torch's threads among slices that are computed in parallel.

`torch.set_num_threads` is a setting of the whole process. It is changed while at least one job runs, and restored when
the last job ends.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_n_jobs = 0
_before = 0


@contextmanager
def shared_threads(n_workers: int) -> Iterator[int]:
    """Yields the number of torch threads for each of `n_workers`; new threads of the process use the same number."""
    global _n_jobs, _before
    with _lock:
        if _n_jobs == 0:
            _before = torch.get_num_threads()
        _n_jobs += 1
        share = max(1, _before // n_workers)
        torch.set_num_threads(share)
    try:
        yield share
    finally:
        with _lock:
            _n_jobs -= 1
            torch.set_num_threads(_before)
