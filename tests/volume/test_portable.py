"""Without functions that macOS or Windows lack, the same files are written."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from deformmamba.inference.files import _reserve
from deformmamba.volume.files import slice_file


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_without_preadv(axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)

    def planes() -> list[np.ndarray]:
        with slice_file(tmp_path / "x.nii", array.shape, axis, "float32") as store:
            for image in np.moveaxis(array, axis, 0):
                store.put(image)
            return [store.plane(k) for k in range(array.shape[2])]

    expected = planes()
    assert all(np.array_equal(plane, array[:, :, k]) for k, plane in enumerate(expected))
    monkeypatch.delattr(os, "preadv", raising=False)
    assert all(np.array_equal(a, b) for a, b in zip(planes(), expected, strict=True))


@pytest.mark.parametrize("n", [0, 7, (1 << 20) + 3])
def test_room_without_posix_fallocate(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with tempfile.TemporaryFile() as file:
        _reserve(file, n)
        assert os.fstat(file.fileno()).st_size == n
