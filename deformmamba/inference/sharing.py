"""Torch's threads, shared out to slices that are computed side by side.

`torch.set_num_threads` is a setting of the whole process. Here it is changed while at least one job runs, and is as
before afterwards, whatever the number of jobs and the order in which they end.
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
    """Yields how many of torch's threads each of `n_workers` may use; new threads of the process use as many."""
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
