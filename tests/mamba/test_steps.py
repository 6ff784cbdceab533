"""One step on a CPU: the C functions equal the definitions, and do not run for arguments that they do not support."""

import itertools

import pytest
import torch
from tolerances import assert_close

from deformmamba.mamba import (
    causal_conv1d_update,
    causal_conv1d_update_ref,
    selective_state_update,
    selective_state_update_ref,
    step_cpu,
)

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def step(b: int, heads: int | None, d: int, n: int, groups: int, tied: bool) -> dict[str, Tensor]:
    """Arguments of a step; B, C and x are slices of larger tensors, as in models."""
    sizes = (d,) if heads is None else (heads, d)
    narrow = sizes[:-1] if tied else sizes
    A, dt, bias = -torch.rand(*(narrow if tied else (*sizes, n))), torch.randn(b, *narrow), torch.randn(narrow)
    if tied:
        A, dt, bias = (
            A[..., None, None].expand(*sizes, n),
            dt[..., None].expand(b, *sizes),
            bias[..., None].expand(sizes),
        )
    B, C = (torch.randn(b, *(() if heads is None else (groups,)), n + 3)[..., :n] for _ in range(2))
    x, z = (torch.randn(b, 2, *sizes)[:, 0] for _ in range(2))
    D = torch.randn(sizes)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": bias}


@pytest.mark.parametrize(
    ("b", "heads", "d", "n", "groups", "tied"),
    [(1, None, 20, 16, 1, False), (3, 4, 5, 7, 2, False), (2, 6, 8, 33, 3, True), (2, 4, 3, 1, 1, True)],
)
def test_a_step_of_a_scan_equals_its_definition(
    b: int, heads: int | None, d: int, n: int, groups: int, tied: bool
) -> None:
    given = step(b, heads, d, n, groups, tied)
    state = torch.randn(*given["x"].shape, n)
    for missing in ((), ("D",), ("z", "dt_bias"), ("D", "z", "dt_bias")):
        arguments = {name: None if name in missing else tensor for name, tensor in given.items()}
        theirs, ours = state.double(), state.clone()
        exact = {name: None if tensor is None else tensor.double() for name, tensor in arguments.items()}
        expected = selective_state_update_ref(theirs, **exact, dt_softplus=True)  # type: ignore[arg-type]
        y = step_cpu.scan(ours, **arguments, dt_softplus=True)  # type: ignore[arg-type]
        assert y is not None, "the C function does not run"
        assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_step_decays_to_nothing_and_keeps_nan() -> None:
    A = torch.tensor([-1e30, -200.0, 0.0, torch.nan])[:, None].expand(4, 16).contiguous()
    state, zero, weights = torch.ones(1, 4, 16), torch.zeros(1, 4), torch.ones(1, 16)
    y = step_cpu.scan(state, zero, torch.ones(1, 4), A, weights, weights, None, None, None, False)
    assert y is not None
    assert torch.equal(state[0, :3], torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 16))
    assert state[0, 3].isnan().all()


@pytest.mark.parametrize(("b", "d", "size", "width"), [(1, 5, 4, 4), (3, 40, 6, 3), (2, 7, 3, 4), (2, 3, 1, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_step_of_the_convolution_equals_its_definition(
    b: int, d: int, size: int, width: int, activation: str | None
) -> None:
    state, x, weight, bias = torch.randn(b, d, size), torch.randn(b, d), torch.randn(d, width), torch.randn(d)
    for offset in (bias, None):
        ours, theirs = state.clone(), state.double()
        exact = None if offset is None else offset.double()
        expected = causal_conv1d_update_ref(x.double(), theirs, weight.double(), exact, activation)
        y = step_cpu.convolution(x, ours, weight, offset, activation is not None)
        assert y is not None, "the C function does not run"
        assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.double(), theirs)
        assert causal_conv1d_update(x[..., None], state.clone(), weight, offset, activation).shape == (b, d, 1)


def test_steps_run_in_pytorch_where_the_c_functions_do_not_apply() -> None:
    given = step(2, 4, 3, 5, 2, False)
    state = torch.randn(2, 4, 3, 5)

    def runs(state: Tensor = state, **changed: Tensor) -> bool:
        return step_cpu.scan(state.clone(), **(given | changed), dt_softplus=True) is not None

    assert runs()
    wrong = {name: tensor[..., :0] for name, tensor in given.items()}
    assert not any(runs(**{name: tensor}) for name, tensor in wrong.items())
    assert not any(runs(**{name: tensor.double()}) for name, tensor in given.items())
    assert not any(runs(**{name: tensor.requires_grad_()}) for name, tensor in given.items())
    with torch.no_grad():
        assert runs()
    assert not runs(torch.randn(2, 4, 5, 3).mT)


def test_a_step_tells_autograd_that_the_state_changed() -> None:
    given, state = step(1, None, 4, 16, 1, False), torch.zeros(1, 4, 16)
    for change in (
        lambda: selective_state_update(state, **given),
        lambda: causal_conv1d_update(torch.zeros(1, 4), state, torch.zeros(4, 2)),
    ):
        product = torch.ones(1, requires_grad=True) * state
        with torch.no_grad():
            change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_many_steps_of_the_convolution_agree_with_pytorch() -> None:
    for b, d in itertools.product((1, 4), (1, 17)):
        weight, ours, theirs = torch.randn(d, 4), torch.zeros(b, d, 4), torch.zeros(b, d, 4, dtype=torch.float64)
        for _ in range(5):
            x = torch.randn(b, d)
            y = causal_conv1d_update(x, ours, weight)
            assert_close(y.double(), causal_conv1d_update(x.double(), theirs, weight.double()), rtol=1e-5, atol=1e-5)


def test_steps_keep_their_precision_under_autocast() -> None:
    x, dt, A = torch.randn(2, 4, 8, requires_grad=True), torch.rand(2, 4, 8), -torch.rand(4, 8, 16)
    B, C, state = torch.randn(2, 1, 16), torch.randn(2, 1, 16), torch.randn(2, 4, 8, 16)
    steps, weight, before = torch.randn(2, 6, 5), torch.randn(6, 4), torch.randn(2, 6, 4)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = selective_state_update(state.clone(), x, dt, A, B, C)
            found.append([y, causal_conv1d_update(steps, before.clone(), weight)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
