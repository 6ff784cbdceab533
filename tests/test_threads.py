"""Work on PyTorch's own threads, and on a thread pool if those are not available."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deformmamba import threads


@pytest.fixture(params=["PyTorch's", "the pool's"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "the pool's":
        monkeypatch.setattr(threads, "_parallel_region", lambda: None)
    elif threads._parallel_region() is None:
        pytest.skip("PyTorch's threads are no GNU OpenMP here")
    torch.set_num_threads(3)
    return str(request.param)


def seen_by(n: int) -> list[tuple[int, int]]:
    """(thread id, result of a torch operation: 2) of each of `n` runs at the same time."""
    seen: list[tuple[int, int]] = []
    all_here = threading.Barrier(n, timeout=60)

    def work() -> None:
        all_here.wait()
        inside = torch.ones(1 << 20)
        inside.add_(1)  # large enough for torch to start threads for it elsewhere
        seen.append((threading.get_ident(), int(inside[0])))

    threads.run_on_threads(work, n)
    return seen


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_on_so_many_threads_at_once(n: int) -> None:
    seen = seen_by(n)
    assert len({thread for thread, _ in seen}) == len(seen) == n
    assert all(value == 2 for _, value in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_torch_starts_no_threads_of_its_own_in_them() -> None:
    before = len(os.listdir("/proc/self/task"))
    seen_by(3)
    assert len(os.listdir("/proc/self/task")) <= before + 3


def test_torch_has_one_thread_in_each_and_as_many_as_before_elsewhere(kind: str) -> None:
    def elsewhere() -> list[int]:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found

    seen_by(3)
    assert [torch.get_num_threads()] == elsewhere() == [3]
    if kind == "the pool's":
        pool = threads._workers(3)
        assert {pool.submit(torch.get_num_threads).result() for _ in range(9)} == {1}


def test_an_error_reaches_the_caller_when_all_are_done() -> None:
    all_here, done = threading.Barrier(2, timeout=60), []

    def work() -> None:
        if all_here.wait():
            raise ZeroDivisionError
        time.sleep(0.05)
        done.append(True)

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            threads.run_on_threads(work, 2)
    assert done == [True] * 3


def test_python_threads_may_call_at_once() -> None:
    taken: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: threads.run_on_threads(lambda: taken.append(i), 2), range(100)))
    assert sorted(set(taken)) == list(range(100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_finds_threads_of_its_own() -> None:
    assert len(seen_by(2)) == 2
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        runs: list[bool] = []
        threads.run_on_threads(lambda: runs.append(True), 2)
        os._exit(0 if runs == [True, True] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_settings_that_break_pytorchs_own_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_DYNAMIC", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    assert threads.environment_warnings() == []
    monkeypatch.setenv("OMP_DYNAMIC", "TRUE")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    dynamic, limit = threads.environment_warnings()
    assert dynamic.startswith("OMP_DYNAMIC is set")
    assert limit.startswith("OMP_THREAD_LIMIT=1")
