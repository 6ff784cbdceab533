"""What several test files share: real volumes where they are at hand, small synthetic ones where they are not."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    # a shell's background job ignores ctrl-C, and one under nohup SIGHUP; so would every process that a test interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real MR volumes: $DEFORMMAMBA_DATA, or shared/data beside the checkout; skips where neither is."""
    root = Path(os.environ.get("DEFORMMAMBA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "volumes.tsv").is_file():
        pytest.skip("no real volumes here; DEFORMMAMBA_DATA names their folder")
    return root


@pytest.fixture
def phantom() -> np.ndarray:
    """(48, 40, 6): smooth ellipses with edges and texture, positive, in made-up scanner units up to about 1,000."""
    rng = np.random.default_rng(0)
    y, x, z = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 40), np.linspace(-0.5, 0.5, 6), indexing="ij")
    head = (y**2 / 0.8 + x**2 / 0.6 + z**2) < 0.9
    inner = ((y - 0.1) ** 2 / 0.1 + (x + 0.1) ** 2 / 0.05) < 0.9
    texture = np.cos(9 * x + 7 * y) * np.cos(11 * y - 5 * x)
    return (head * (500 + 120 * texture) + inner * 300 + rng.random(y.shape) * 5).astype(np.float32)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on many threads are slow, on a busy machine very; tests of threads set what they need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
