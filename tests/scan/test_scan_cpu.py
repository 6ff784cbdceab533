"""The CPU backend and its process: threads, forks, compiled code on disk."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch.utils.data import DataLoader, Dataset

import deformmamba
from deformmamba.scan import cpu, cpu_kernels, selective_scan_2d


def given(seed: int = 0, d: int = 50) -> list[torch.Tensor]:
    """Arguments of `selective_scan_2d` for two images of 9 x 8 and four directions.

    They are so small that PyTorch's own operations use one thread, because its OpenMP hangs in a forked process.
    """
    make = torch.Generator().manual_seed(seed)
    shapes = ((2, 9, 8, d), (4, 2, 9, 8, d), (4 * d, 3), (2, 9, 8, 4, 3), (2, 9, 8, 4, 3))
    u, delta, A, B, C = (torch.randn(shape, generator=make) for shape in shapes)
    return [u, delta, -A.abs(), B, C]


def in_a_process(*command: str, **environment: str) -> str:
    """The stderr of `python command`."""
    folders = Path(deformmamba.__file__).parents[1], Path(__file__).parents[1]  # the package; shared test code
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **environment}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def gradients(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result, and the gradients of all arguments."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    y = selective_scan_2d(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("images", [1, 2])
def test_any_number_of_threads_agrees(images: int) -> None:
    arguments = given()
    arguments = [arguments[0][:images], arguments[1][:, :images], arguments[2], *(x[:images] for x in arguments[3:])]
    results = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        results.append(gradients(arguments))
    for result in results[1:]:
        *exact, dB, dC = result
        assert all(x.equal(y) for x, y in zip(exact, results[0], strict=False))
        # sums over channels in another order
        torch.testing.assert_close([dB, dC], results[0][-2:], rtol=1e-5, atol=1e-3)


def test_one_image_occupies_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[int] = []
    run = cpu._run_kernel
    monkeypatch.setattr(cpu, "_run_kernel", lambda *given: jobs.append(len(given[5].rows)) or run(*given))
    torch.set_num_threads(4)
    selective_scan_2d(*(x[:, :1] if x.ndim == 5 and x.shape[0] == 4 else x[:1] if x.ndim > 2 else x for x in given()))
    assert jobs == [4]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_jobs_share_the_work(threads: int, images: int) -> None:
    """Each channel is in one job. There are a few jobs per thread, none too small, and one per group for one thread."""
    groups, channels = 2, 40 * cpu._lanes() - 3
    jobs = cpu._jobs(images, groups, channels, threads).rows
    for image in range(images):
        for group in range(groups):
            mine = [(part, first, end) for part, *at, first, end in jobs if at == [image, group]]
            assert [part for part, *_ in mine] == list(range(len(mine)))
            assert [c for _, first, end in mine for c in range(first, end)] == list(range(channels))
            sizes = [-(-(end - first) // cpu._lanes()) for _, first, end in mine]
            assert min(sizes) >= max(sizes) - 1 >= 4
    assert len(jobs) == images * groups if threads == 1 else 2 * threads < len(jobs) <= 6 * threads


def test_python_threads_may_call_at_once() -> None:
    """A web server or DataParallel does this; numba's own thread layer would abort the process."""
    torch.set_num_threads(2)
    expected = [gradients(given(seed)) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: gradients(given(i % 4)), range(48)))
    for i, result in enumerate(results):
        assert all(x.equal(y) for x, y in zip(result, expected[i % 4], strict=True))


def test_an_error_on_another_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def kernel(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(60)
        else:
            begun.set()
            raise ZeroDivisionError

    monkeypatch.setattr(cpu, "_kernel", lambda *_: kernel)
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        selective_scan_2d(*given())


class Scanned(Dataset[torch.Tensor]):
    """A data set whose items are results of a scan, with threads and gradients."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        torch.set_num_threads(2)
        return gradients(given(index))[1]


def scan_in_workers(start: str) -> None:
    torch.set_num_threads(2)
    expected = [Scanned()[i] for i in range(4)]
    loader: Any = DataLoader(Scanned(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    assert_close(list(loader), expected)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_of_a_data_loader(start: str) -> None:
    """In a separate process, because threads of other tests (PyTorch's OpenMP and autograd) do not survive a fork."""
    in_a_process(__file__, start)


# ----------------------------------------------------------------------------------------------------- compiled code

SCAN = """
import sys, torch
from deformmamba.scan import selective_scan, reference
assert "numba" not in sys.modules
one = torch.ones(1, 3, 5)
y = selective_scan(one, one, -one[0, :, :2], one[:, None, :2], one[:, None, :2])
z = selective_scan(one, one, -one[0, :, :2], one[:, None, :2], one[:, None, :2], backend="reference")
torch.testing.assert_close(y, z)
"""


def scan_in_a_process(**environment: str) -> str:
    """The stderr of a scan in a new process."""
    # -P: import the package from PYTHONPATH, not from the working folder
    return in_a_process("-P", "-c", SCAN, **{"NUMBA_CACHE_DIR": ""} | environment)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the compiled code of two processes that began at once, and their stderr. Tests use copies."""
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(2) as pool:
        return folder, list(pool.map(lambda _: scan_in_a_process(NUMBA_CACHE_DIR=str(folder)), range(2)))


@pytest.mark.long
def test_compiled_once_and_said_so(compiled: tuple[Path, list[str]]) -> None:
    folder, said = compiled
    # "" if fast
    assert set(said) <= {"", "deformmamba: compiling the CPU scan (forward pass, float32), once\n"}
    index, code = (list(folder.rglob(f"*forward*.{kind}")) for kind in ("nbi", "nbc"))
    assert len(index) == len(code) == 1
    written = code[0].stat().st_mtime_ns
    assert scan_in_a_process(NUMBA_CACHE_DIR=str(folder)) == ""
    assert code[0].stat().st_mtime_ns == written


@pytest.mark.long
def test_damaged_cache_files_are_named(compiled: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = shutil.copytree(compiled[0], tmp_path / "damaged")
    files = [*folder.rglob("*.nbi"), *folder.rglob("*.nbc")]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert scan_in_a_process(NUMBA_CACHE_DIR=str(folder)).count("delete damaged files") == 1


@pytest.mark.long
def test_nowhere_to_cache(tmp_path: Path) -> None:
    """A read-only installation without a home folder: every cache folder that numba tries is a file."""
    package = tmp_path / "deformmamba"
    skip = shutil.ignore_patterns("__pycache__", "checkpoints")
    shutil.copytree(Path(deformmamba.__file__).parent, package, ignore=skip)
    (package / "scan" / "__pycache__").write_text("not a folder")
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "IPYTHONDIR": "/dev/null/ipython"}
    said = scan_in_a_process(
        PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **nowhere
    )
    assert not list(tmp_path.rglob("*.nbi"))
    assert "set NUMBA_CACHE_DIR to a folder that you may write to" in said


def nothing(inputs, outputs, scratch, jobs, taken, pair, softplus, zoh):  # type: ignore[no-untyped-def]
    """Stands in for a kernel; numba compiles it at once."""


@pytest.mark.slow
def test_compiling_is_announced_after_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Impatient:
        def __init__(self, seconds: float, announce: Any) -> None:
            assert seconds == 1
            self.announce, self.cancel, self.ident = announce, lambda: None, None

        def start(self) -> None:
            self.ident = 1
            self.announce()

    monkeypatch.setattr("deformmamba.compiled.threading.Timer", Impatient)
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "forward", nothing)
    cpu._compile("forward", torch.float32, False)
    assert capsys.readouterr().err == "deformmamba: compiling the CPU scan (forward pass, float32), once\n"
    cpu._compile("forward", torch.float32, False)
    assert capsys.readouterr().err == ""


if __name__ == "__main__":
    scan_in_workers(sys.argv[1])
