"""Mamba's selective scan, its fused block and its single step, compared with their definitions."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from deformmamba.mamba import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(b: int, d: int, n: int, length: int, B: str = "bnl", C: str = "bnl", **kind: Any) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias; B and C in the layout "bnl", "bgnl" (two groups) or "dn"."""

    def weights(layout: str) -> Tensor:
        return torch.randn({"bnl": (b, n, length), "bgnl": (b, 2, n, length), "dn": (d, n)}[layout], **kind)

    u, delta, z = (torch.randn(b, d, length, **kind) for _ in range(3))
    A, D, bias = -torch.rand(d, n, **kind) - 0.1, torch.randn(d, **kind), torch.randn(d, **kind)
    return [u, 0.5 * delta, A, weights(B), weights(C), D, z, bias]


LAYOUTS = [("bnl", "bnl"), ("bgnl", "bgnl"), ("bnl", "bgnl"), ("dn", "bnl"), ("bgnl", "dn"), ("dn", "dn")]


@pytest.mark.parametrize(("B", "C"), LAYOUTS)
def test_it_equals_the_definition_in_every_layout(B: str, C: str) -> None:
    given = [t.requires_grad_() for t in arguments(2, 4, 3, 9, B, C, dtype=torch.float64)]
    y, last = selective_scan_fn(*given, True, True)
    expected, expected_last = selective_scan_ref(*given, True, True)
    assert_close(y, expected)
    assert_close(last, expected_last)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    grads = torch.autograd.grad((y, last), given, (dy, dlast))
    for ours, theirs in zip(grads, torch.autograd.grad((expected, expected_last), given, (dy, dlast)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("B", "C"), [("bnl", "bgnl"), ("dn", "bnl"), ("bgnl", "dn"), ("dn", "dn")])
def test_gradients_are_those_of_finite_differences(B: str, C: str) -> None:
    given = [t.requires_grad_() for t in arguments(1, 2, 2, 4, B, C, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan_fn(*t, True, True), given)


def test_a_complex_a_takes_the_definition() -> None:
    u, delta, _, _, _, D, z, bias = arguments(2, 4, 3, 5)
    A = -torch.rand(4, 3, dtype=torch.complex64)
    B, C = torch.randn(2, 3, 10), torch.randn(4, 3, dtype=torch.complex64)
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    # h[0] = dt B u, y = 2 Re(C . h) + D u, gated
    dt = torch.nn.functional.softplus(delta[..., 0] + bias)
    first = torch.view_as_complex(B.unflatten(-1, (5, 2)).contiguous())[:, None, :, 0]
    h = dt[..., None] * first * u[..., :1]
    expected = (2 * (C * h).sum(-1).real + D * u[..., 0]) * torch.nn.functional.silu(z[..., 0])
    assert_close(y[..., 0], expected)
    assert last.is_complex()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_a_float32_state(dtype: torch.dtype) -> None:
    given = arguments(1, 8, 4, 300)
    half = [t.to(dtype) for t in given]
    for i in (2, 5, 7):  # A, D and bias stay in float32, as in mixed precision
        half[i] = given[i]
    y, last = selective_scan_fn(*half, True, True)
    exact, exact_last = selective_scan_ref(*(t.double() for t in half), True, True)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    # y is rounded once; the state has float32 precision
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(last.double(), exact_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("b", "length"), [(2, 0), (0, 5), (1, 1), (1, 65_536)])
def test_lengths_and_batches_at_the_ends(b: int, length: int) -> None:
    given = [t.requires_grad_() for t in arguments(b, 2, 2, length)]
    y, last = selective_scan_fn(*given, True, True)
    assert y.shape == (b, 2, length)
    assert last.shape == (b, 2, 2)
    (y.sum() + last.sum()).backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in given)
    if length < 10:
        assert_close(y, selective_scan_ref(*given, True))


@pytest.mark.parametrize("size", [1e-7, 1e3])
def test_step_sizes_at_the_ends(size: float) -> None:
    u, delta, A, B, C, D, z, _ = arguments(1, 3, 4, 40)
    delta = size * (0.5 + delta.abs())
    y, last = selective_scan_fn(u, delta, A, B, C, D, z, None, False, True)
    exact = [t.double() for t in (u, delta, A, B, C, D, z)]
    expected, expected_last = selective_scan_ref(*exact, None, False, True)
    # sums of float32 products: the error is relative to their largest terms
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(last.double(), expected_last, rtol=1e-4, atol=1e-6 * expected_last.abs().max().item())


def test_memory_layout_does_not_matter() -> None:
    u, delta, A, B, C, D, z, bias = arguments(2, 6, 3, 20)
    expected = selective_scan_fn(u, delta, A, B, C, D, z, bias, True)
    wide = torch.randn(2, 40, 12)
    wide[:, ::2, ::2] = u.transpose(1, 2)
    strided = wide[:, ::2, ::2].transpose(1, 2)
    y = selective_scan_fn(strided, delta.transpose(1, 2).contiguous().transpose(1, 2), A, B, C, D, z, bias, True)
    # with other strides, numbers may be added in another order
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    one = u[:, :1].expand(-1, 6, -1)
    torch.testing.assert_close(
        selective_scan_fn(one, one, A, B, C), selective_scan_fn(one.clone(), one.clone(), A, B, C), rtol=1e-5, atol=1e-5
    )


def test_threads_do_not_disturb_each_other() -> None:
    given = arguments(1, 8, 4, 200)
    expected = selective_scan_fn(*given, True)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: selective_scan_fn(*given, True), range(8)):
            torch.testing.assert_close(y, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the fused block


def block(d: int = 6, n: int = 3, rank: int = 2, length: int = 7, **kind: Any) -> list[Tensor]:
    """xz, conv weight and bias, x_proj, delta_proj, out_proj, its bias, A, then D and delta_bias."""
    return [
        torch.randn(2, 2 * d, length, **kind), torch.randn(d, 1, 3, **kind), torch.randn(d, **kind),
        torch.randn(rank + 2 * n, d, **kind), torch.randn(d, rank, **kind), torch.randn(4, d, **kind),
        torch.randn(4, **kind), -torch.rand(d, n, **kind) - 0.1, torch.randn(d, **kind), torch.randn(d, **kind),
    ]  # fmt: skip


def test_the_fused_block_equals_its_definition() -> None:
    given = [t.requires_grad_() for t in block(dtype=torch.float64)]
    keywords = {"D": given[8], "delta_bias": given[9]}
    y, expected = mamba_inner_fn(*given[:8], **keywords), mamba_inner_ref(*given[:8], **keywords)
    assert y.shape == (2, 7, 4)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(t, given, dy) for t in (y, expected)), strict=True):
        assert_close(ours, theirs)


def test_the_fused_block_normalises_b_c_and_delta_as_asked() -> None:
    given = block(dtype=torch.float64)
    plain = mamba_inner_fn(*given[:8])
    rows = {"b_rms_weight": torch.ones(3).double(), "c_rms_weight": 2 * torch.ones(3).double()}
    normed = mamba_inner_fn(*given[:8], **rows, b_c_dt_rms_eps=0.0)
    assert not torch.allclose(plain, normed, atol=1e-6)
    # twice the weight of C gives twice the y, before D and the gate
    halved = mamba_inner_fn(*given[:8], b_rms_weight=rows["b_rms_weight"], c_rms_weight=torch.ones(3).double(),
                            b_c_dt_rms_eps=0.0)  # fmt: skip
    assert_close(normed - given[6], 2 * (halved - given[6]))


def test_both_directions_are_two_scans() -> None:
    given = block(dtype=torch.float64)
    A_b = -torch.rand(6, 3).double()
    both = bimamba_inner_fn(*given[:8], A_b)
    forward = mamba_inner_fn(*given[:8])
    assert both.shape == forward.shape
    # these rates are so fast that the state keeps only the current element, so both directions give the same
    given[7] = A_b = torch.full((6, 3), -1e9).double()
    bias = given[6]
    assert_close(bimamba_inner_fn(*given[:8], A_b) - bias, 2 * (mamba_inner_fn(*given[:8]) - bias))


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_equals_its_definition(heads: int | None, tied: bool) -> None:
    b, d, n, g = 2, 5, 3, 2
    middle = () if heads is None else (heads,)
    state = torch.randn(b, *middle, d, n)
    x, z = torch.randn(b, *middle, d), torch.randn(b, *middle, d)
    B, C = (torch.randn(b, *(() if heads is None else (g,)), n) for _ in range(2))
    D = torch.randn(*middle, d)
    if tied:
        dt, bias = (torch.randn(*shape, 1).expand(*shape, d) for shape in ((b, *middle), middle))
        A = -torch.rand(*middle, 1, 1).expand(*middle, d, n)
    else:
        dt, bias, A = torch.randn(b, *middle, d), torch.randn(*middle, d), -torch.rand(*middle, d, n)
    ours, theirs = state.clone(), state.clone()
    y = selective_state_update(ours, x, dt, A, B, C, D, z, bias, True)
    assert_close(y, selective_state_update_ref(theirs, x, dt, A, B, C, D, z, bias, True))
    assert_close(ours, theirs)


def test_steps_continue_a_scan() -> None:
    u, delta, A, B, C, D, z, bias = arguments(2, 4, 3, 6, dtype=torch.float64)
    expected = selective_scan_fn(u, delta, A, B, C, D, z, bias, True)
    start = selective_scan_fn(u[..., :4], delta[..., :4], A, B[..., :4], C[..., :4], D, z[..., :4], bias, True, True)
    state = start[1].clone()
    for t in (4, 5):
        y = selective_state_update(state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True)
        assert_close(y, expected[..., t])


def test_a_step_has_gradients() -> None:
    u, delta, A, B, C, D, z, bias = (
        t[..., 0] if t.ndim == 3 else t for t in arguments(2, 4, 3, 1, dtype=torch.float64)
    )
    given = [t.clone().requires_grad_() for t in (torch.randn(2, 4, 3).double(), u, delta, A, B, C, D, z, bias)]
    assert torch.autograd.gradcheck(lambda s, *t: selective_state_update(s.clone(), *t, True), given)


def test_a_step_uses_the_rows_it_is_given() -> None:
    u, delta, A, B, C, *_ = (t[..., 0] if t.ndim == 3 else t for t in arguments(3, 4, 3, 1))
    states = torch.randn(10, 4, 3)
    expected, before = states[[7, 2]].clone(), states.clone()
    y = selective_state_update(states, u, delta, A, B, C, state_batch_indices=torch.tensor([7, -1, 2]))
    rows = [0, 2]
    assert_close(y[rows], selective_state_update(expected, u[rows], delta[rows], A, B[rows], C[rows]))
    assert (y[1] == 0).all()
    assert_close(states[[7, 2]], expected)
    others = [0, 1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(states[others], before[others])


@pytest.mark.parametrize(
    ("name", "wrong"), [("dt", torch.zeros(2, 3)), ("A", torch.zeros(4, 9)), ("B", torch.zeros(2, 9))]
)
def test_a_step_names_what_does_not_fit(name: str, wrong: Tensor) -> None:
    given = {"x": torch.zeros(2, 4), "dt": torch.zeros(2, 4), "A": torch.zeros(4, 3), "B": torch.zeros(2, 3)}
    given |= {"C": torch.zeros(2, 3), name: wrong}
    with pytest.raises(ValueError, match=rf"^{name} must have shape"):
        selective_state_update(torch.zeros(2, 4, 3), **given)
