"""The tests' function for comparing numbers; every test uses it or gives a tolerance."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close

DEFAULTS = {"torch.testing.assert_close", "np.testing.assert_allclose", "torch.allclose", "np.allclose"}


def test_every_comparison_has_a_tolerance() -> None:
    found = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in DEFAULTS) else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in DEFAULTS:
                named = {keyword.arg for keyword in node.keywords}
                if not named & {"atol", "rtol", None}:
                    found.append(f"{path}:{node.lineno}: use assert_close of tolerances.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("size", [1e-3, 1.0, 900.0, 1e6])
def test_another_order_of_the_same_sum_is_close(size: float) -> None:
    x = torch.rand(64, 4096, generator=torch.Generator().manual_seed(0)) * size
    y = x - x.mean(1, keepdim=True)  # large numbers whose sum is about zero
    halves = torch.stack([y[:, ::2].mean(1), y[:, 1::2].mean(1)]).mean(0)
    assert_close(torch.cat([y.mean(1), x[0]]), torch.cat([halves, x[0]]))


@pytest.mark.parametrize("size", [1.0, 900.0])
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_what_rounding_does_not_explain_is_not_close(size: float, dtype: torch.dtype, step: float) -> None:
    x = torch.linspace(0, size, 50, dtype=dtype)
    assert_close(x, x.clone())
    for wrong in (x + step * size, x.flip(0), x[:-1], x.to(torch.float16), x * torch.nan):
        with pytest.raises(AssertionError):
            assert_close(wrong, x)
    with pytest.raises(AssertionError):
        assert_close([x, x + size], [x, x])
    with pytest.raises(AssertionError):
        assert_close({"a": x}, {"b": x})


def test_arrays_numbers_and_nested_results() -> None:
    a = np.linspace(0, 1, 5)
    assert_close(a.astype(np.float32), a)
    assert_close((torch.ones(2), None, [torch.zeros(1)]), (torch.ones(2), None, [torch.zeros(1)]))
    assert_close(a, list(a))
    assert_close(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        assert_close(a + 1e-3, list(a))
