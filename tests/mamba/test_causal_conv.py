"""Mamba's short convolution: kernels, packed sequences and states, compared with the definitions."""

from typing import Any

import pytest
import torch
from tolerances import assert_close

from deformmamba.mamba import (
    causal_conv,
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
    causal_conv_cpu,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def maps(channels_last: bool, b: int = 2, d: int = 5, length: int = 11, **kind: Any) -> torch.Tensor:
    x = torch.randn(b, d, length, **kind)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_it_equals_the_definition(channels_last: bool, width: int, length: int, activation: str | None) -> None:
    x = maps(channels_last, length=length, dtype=torch.float64)
    given = [t.requires_grad_() for t in (x, torch.randn(5, width).double(), torch.randn(5).double())]
    y = causal_conv1d_fn(*given, activation=activation)
    expected = causal_conv1d_ref(*given, activation=activation)
    assert_close(y, expected)
    assert y.stride() == x.stride() or length == 1
    y += 0  # callers may change the result in place
    dy = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(t, given, dy) for t in (y, expected)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_are_those_of_finite_differences(channels_last: bool) -> None:
    x = maps(channels_last, 2, 3, 5, dtype=torch.float64)
    given = [t.requires_grad_() for t in (x, torch.randn(3, 4).double(), torch.randn(3).double())]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d_fn(*t, activation="silu"), given)


def test_the_kernels_run_where_they_can() -> None:
    assert causal_conv_cpu.usable(torch.zeros(1))
    assert not causal_conv_cpu.usable(torch.zeros(1, dtype=torch.float16))
    assert not causal_conv_cpu.usable(torch.zeros(1, device="meta"))


@pytest.mark.portable
def test_the_kernels_as_plain_python_and_pytorch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = maps(False), torch.randn(5, 4), torch.randn(5)
    compiled = causal_conv1d_fn(x, weight, bias)
    monkeypatch.setattr(causal_conv_cpu, "usable", lambda x: False)
    # float32 sums of four products in another order
    torch.testing.assert_close(compiled, causal_conv1d_fn(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_channels_beyond_one_job_and_slices_of_larger_maps(threads: int) -> None:
    torch.set_num_threads(threads)
    wide = torch.randn(2, 700, 9)
    weight, bias = torch.randn(600, 4), torch.randn(600)
    expected = causal_conv1d_ref(wide[:, 50:650], weight, bias)
    # float32 sums of four products in another order
    torch.testing.assert_close(causal_conv1d_fn(wide[:, 50:650], weight, bias), expected, rtol=1e-5, atol=1e-5)
    last = wide.transpose(1, 2).contiguous()[:, :, 50:650].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d_fn(last, weight, bias), expected, rtol=1e-5, atol=1e-5)
    one = torch.randn(2, 1, 9).expand(-1, 600, -1)
    torch.testing.assert_close(
        causal_conv1d_fn(one, weight, bias), causal_conv1d_ref(one, weight, bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("b", "length"), [(0, 4), (2, 0)])
def test_nothing_gives_nothing(b: int, length: int) -> None:
    given = [t.requires_grad_() for t in (torch.randn(b, 3, length), torch.randn(3, 4), torch.randn(3))]
    y = causal_conv1d_fn(*given)
    assert y.shape == (b, 3, length)
    y.sum().backward()
    assert all((t.grad == 0).all() for t in given if t.grad is not None)
    assert given[1].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 4])
def test_no_steps_give_no_steps_and_leave_the_states(width: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 3, 0, dtype=dtype), torch.randn(3, width).to(dtype), torch.randn(3).to(dtype)
    state = torch.randn(2, 3, 4, dtype=dtype)
    y, last = causal_conv1d_fn(x, weight, bias, initial_states=state[..., : width - 1], return_final_states=True)
    assert y.shape == (2, 3, 0)
    assert torch.equal(last, state[..., : width - 1])
    assert causal_conv1d_fn(x, weight, bias, activation="silu").shape == (2, 3, 0)
    for seen in (None, torch.tensor([4, 11])):
        for update in (causal_conv1d_update, causal_conv1d_update_ref):
            kept = state.clone()
            assert update(x, kept, weight, bias, "silu", seen).shape == (2, 3, 0)
            assert torch.equal(kept, state)


def test_half_precision_is_rounded_once() -> None:
    x, weight, bias = torch.randn(2, 3, 9).bfloat16(), torch.randn(3, 4), torch.randn(3)
    y = causal_conv1d_fn(x, weight, bias, activation="silu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), causal_conv1d_fn(x.float(), weight, bias, activation="silu"), rtol=4e-3, atol=0
    )


@pytest.mark.parametrize("length", [1, 2, 9])
def test_states_carry_a_sequence_on(length: int) -> None:
    x, weight, bias = torch.randn(2, 3, 6 + length).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    _, state = causal_conv1d_fn(x[..., :6], weight, bias, return_final_states=True)
    room = torch.empty_like(state)
    y, last = causal_conv1d_fn(x[..., 6:], weight, bias, None, state, True, room, "silu")
    assert_close(y, whole[..., 6:])
    assert last is room
    assert_close(last, x[..., -3:])
    given = [t.clone().requires_grad_() for t in (x[..., 6:], weight, bias, state)]
    results = causal_conv1d_fn(*given[:3], None, given[3], True)
    expected = causal_conv1d_ref(*given, True)
    grads = [torch.randn_like(t) for t in results]
    for ours, theirs in zip(*(torch.autograd.grad(t, given, grads) for t in (results, expected)), strict=True):
        assert_close(ours, theirs)


def test_packed_sequences_do_not_see_each_other() -> None:
    x, weight, bias = torch.randn(1, 3, 10).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    seq_idx = torch.tensor([[0] * 4 + [1] * 1 + [2] * 3 + [-1] * 2])
    y = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    parts = [causal_conv1d_ref(part, weight, bias, activation="silu") for part in x[..., :8].split([4, 1, 3], -1)]
    assert_close(y[..., :8], torch.cat(parts, -1))
    assert (y[..., 8:] == 0).all()
    with pytest.raises(ValueError, match="seq_idx cannot be combined with initial_states"):
        causal_conv1d_fn(x, weight, bias, seq_idx, torch.zeros(1, 3, 3))


def test_the_activation_in_its_old_place_is_understood() -> None:
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    assert torch.equal(causal_conv1d_fn(x, weight, None, "silu"), causal_conv1d_fn(x, weight, activation="silu"))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("size", [3, 6])
@pytest.mark.parametrize("length", [None, 1, 2, 8])
def test_updates_equal_their_definition(ring: bool, size: int, length: int | None) -> None:
    shape = (2, 3) if length is None else (2, 3, length)
    x, state = torch.randn(shape).double(), torch.randn(2, 3, size).double()
    weight, bias = torch.randn(3, 4).double(), torch.randn(3).double()
    seen = torch.tensor([4, 11]) if ring else None
    ours, theirs = state.clone(), state.clone()
    y = causal_conv1d_update(x, ours, weight, bias, "silu", seen)
    assert_close(y, causal_conv1d_update_ref(x, theirs, weight, bias, "silu", seen))
    assert torch.equal(ours, theirs)


def test_updates_use_the_rows_they_are_given() -> None:
    x, states, weight = torch.randn(3, 4), torch.randn(9, 4, 3), torch.randn(4, 4)
    before, expected = states.clone(), states[[5, 0]].clone()
    y = causal_conv1d_update(x, states, weight, conv_state_indices=torch.tensor([5, -1, 0]))
    assert_close(y[[0, 2]], causal_conv1d_update(x[[0, 2]], expected, weight))
    assert (y[1] == 0).all()
    assert torch.equal(states[[5, 0]], expected)
    assert torch.equal(states[1:5], before[1:5])


def test_states_of_a_pack() -> None:
    x, starts = torch.randn(12, 3), torch.tensor([0, 5, 6, 6, 12])
    states = causal_conv1d_varlen_states(x, starts, 4)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, starts, 4))
    assert (states[2] == 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": "relu"}, "activation must be"),
        ({"weight": torch.zeros(2, 4)}, "weight must have shape"),
        ({"bias": torch.zeros(2)}, "bias must have shape"),
        ({"x": torch.zeros(2, 3)}, "x must have shape"),
        ({"x": torch.zeros(1, 3, 5, dtype=torch.long)}, "x must be floating point"),
        ({"seq_idx": torch.zeros(1, 4, dtype=torch.long)}, "seq_idx must have shape"),
        ({"initial_states": torch.zeros(1, 3, 4)}, "initial_states must have shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], match: str) -> None:
    given = {"x": torch.zeros(1, 3, 5), "weight": torch.zeros(3, 4)} | change
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=match):
        causal_conv.causal_conv1d_fn(**given)


def test_transforms_take_the_plain_form() -> None:
    x, weight = torch.randn(2, 3, 6).double(), torch.randn(3, 4).double()
    grad = torch.func.grad(lambda w: causal_conv1d_fn(x, w, activation="silu").sum())(weight)
    leaf = weight.clone().requires_grad_()
    causal_conv1d_ref(x, leaf, activation="silu").sum().backward()
    assert_close(grad, leaf.grad)
