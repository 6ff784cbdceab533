"""Shared fixtures and settings: real volumes if they are available, small synthetic ones otherwise."""

import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pytest
import torch
from skipping import skipped_without_extra


def pytest_configure() -> None:
    # a shell's background job ignores ctrl-C, and one under nohup SIGHUP; so would every process that a test interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """The garbage collector does not walk over what was imported and collected, because it stays until the end."""
    gc.collect()
    gc.freeze()
    try:
        return (yield)
    finally:
        gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("portable"):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    with skipped_without_extra():  # what a fixture needs
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with skipped_without_extra():
        return (yield)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real MR volumes: $DEFORMMAMBA_DATA, or shared/data beside the checkout; skips if both are missing."""
    root = Path(os.environ.get("DEFORMMAMBA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "volumes.tsv").is_file():
        pytest.skip("no real volumes here; DEFORMMAMBA_DATA names their folder")
    return root


@pytest.fixture
def phantom() -> np.ndarray:
    """(48, 40, 6): smooth ellipses with edges and texture, positive, in arbitrary units up to about 1,000."""
    rng = np.random.default_rng(0)
    y, x, z = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 40), np.linspace(-0.5, 0.5, 6), indexing="ij")
    head = (y**2 / 0.8 + x**2 / 0.6 + z**2) < 0.9
    inner = ((y - 0.1) ** 2 / 0.1 + (x + 0.1) ** 2 / 0.05) < 0.9
    texture = np.cos(9 * x + 7 * y) * np.cos(11 * y - 5 * x)
    return (head * (500 + 120 * texture) + inner * 300 + rng.random(y.shape) * 5).astype(np.float32)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium under selenium, one per test file, with logs; skips if either is missing."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    missing += ["selenium"] if importlib.util.find_spec("selenium") is None else []
    if missing:
        pytest.skip(f"no browser to test with: {', '.join(missing)} missing")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="session", autouse=True)
def _workers_compile_in_turn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With pytest-xdist, one worker compiles a kernel; others that need it wait and load it from the cache."""
    if "PYTEST_XDIST_WORKER" not in os.environ or importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    from numba.core.dispatcher import Dispatcher

    folder, thread, compiles, depth = tmp_path_factory.getbasetemp().parent, RLock(), Dispatcher.compile, 0

    def in_turn(self: Any, signature: Any) -> Any:
        nonlocal depth
        with thread:
            depth += 1  # a kernel compiles the functions that it calls
            try:
                if depth > 1:
                    return compiles(self, signature)
                function = self.py_func
                with (folder / f"compiling-{function.__module__}.{function.__qualname__}").open("w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    return compiles(self, signature)
            finally:
                depth -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", in_turn)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, because small tensors on many threads are slow. Tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
