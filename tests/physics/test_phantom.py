"""The phantom: equal numbers in every call, within its range, with air around it."""

import numpy as np
import pytest

from deformmamba.physics.phantom import head


@pytest.mark.parametrize("size", [64, 97])
def test_a_head_in_air(size: int) -> None:
    image = head(size)
    assert image.shape == (size, size)
    assert np.array_equal(image, head(size))
    assert not np.array_equal(image, head(size, seed=1))
    assert image.min() >= 0
    assert 0.9 < image.max() < 1.1
    assert not image[0].any()
    assert not image[:, -1].any()
    assert 0.3 < (image > 0.02).mean() < 0.7


def test_edges_hold_partial_volumes() -> None:
    image = head(64)
    inner = np.unique(np.round(image, 3))
    assert len(inner) > 50
