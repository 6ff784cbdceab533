"""Mamba-2's scan and its definition: values, gradients, packed sequences, states, very small and large step sizes."""

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from deformmamba.mamba import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
    ssd_chunks,
    ssd_factored,
    ssd_ref,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arguments(b: int = 2, length: int = 9, h: int = 4, p: int = 3, g: int = 2, n: int = 5, **kind: Any) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt_bias, initial_states."""
    x, z = (torch.randn(b, length, h, p, **kind) for _ in range(2))
    B, C = (torch.randn(b, length, g, n, **kind) for _ in range(2))
    dt, A, D = torch.randn(b, length, h, **kind), -4 * torch.rand(h, **kind), torch.randn(h, **kind)
    return [x, dt, A, B, C, D, z, torch.randn(h, **kind), torch.randn(b, h, p, n, **kind)]


def both(given: list[Tensor], **options: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(y, last state) of the scan and of its definition."""
    x, dt, A, B, C, D, z, bias, state = given
    keywords = {"D": D, "z": z, "dt_bias": bias, "initial_states": state, "dt_softplus": True} | options
    ours = mamba_chunk_scan_combined(x, dt, A, B, C, 256, return_final_states=True, **keywords)
    return ours, ssd_ref(x, dt, A, B, C, **keywords)


def compare_with_gradients(given: list[Tensor], rtol: float, **options: Any) -> None:
    """Values and gradients agree to `rtol` of the largest number of each tensor."""
    given = [t.clone().requires_grad_() for t in given]
    ours, theirs = both(given, **options)
    grads = [torch.randn_like(t) for t in ours]
    pairs = list(zip(ours, theirs, strict=True))
    pairs += zip(*(torch.autograd.grad(t, given, grads, materialize_grads=True) for t in (ours, theirs)), strict=True)
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * max(e.abs().sum().item() and e.abs().max().item(), 1e-30))


def packed(b: int, *lengths: int) -> Tensor:
    return torch.cat([torch.full((b, length), i) for i, length in enumerate(lengths)], 1)


# with steps of 1e4 every decay underflows in float32, so each is computed separately
@pytest.mark.parametrize("size", [1e-7, 1, 30, 1e4])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_equals_the_definition(size: float, pack: bool, dtype: torch.dtype, rtol: float) -> None:
    given = arguments(length=75, dtype=dtype)
    given[1], given[7] = size * torch.rand_like(given[1]), torch.zeros_like(given[7])
    seq_idx = packed(2, 30, 1, 20, 24) if pack else None
    compare_with_gradients(given, rtol, seq_idx=seq_idx, dt_softplus=False)


def test_spans_and_chunks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_chunks, "SPAN", 32)
    monkeypatch.setattr(ssd_chunks, "_CHUNKS", (16, 8))
    for length in (31, 32, 70):
        given = arguments(length=length, dtype=torch.float64)
        compare_with_gradients(given, 1e-12)
        compare_with_gradients(given, 1e-12, seq_idx=packed(2, 16, 1, length - 17))
        if length > 32:  # a sequence that starts with a span
            compare_with_gradients(given, 1e-12, seq_idx=packed(2, 32, 20, length - 52))
        # spans whose decays underflow, and spans whose decays do not
        given[1][:, 40:] *= 1e3
        compare_with_gradients(given, 1e-11)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rates", [(0.1, 15.0, 0.2, 15.0), (15.0, 15.0, 15.0, 15.0), (0.1, 15.0, 1e4, 0.0)])
def test_heads_with_fast_and_slow_decays_are_computed_apart(
    rates: tuple[float, ...], dtype: torch.dtype, rtol: float
) -> None:
    given = arguments(2, 150, g=1, dtype=dtype)
    given[1], given[2] = 0.2 * torch.rand_like(given[1]), -torch.tensor(rates, dtype=dtype)
    given[7] = torch.zeros_like(given[7])
    sets = ssd_factored.head_sets(given[1][0], given[2], None, 128, gradients=False)
    fits = {head: s.fits for s in sets for head in (range(4) if s.heads is None else s.heads.tolist())}
    assert [fits[head] for head in range(4)] == [rate < 1 for rate in rates]
    compare_with_gradients(given, rtol, dt_softplus=False)
    compare_with_gradients(given, rtol, dt_softplus=False, seq_idx=packed(2, 20, 108, 22))


@pytest.mark.parametrize(("length", "rate"), [(2, 30.0), (4, 15.0), (8, 8.0), (16, 4.5), (132, 15.0), (75, 1.0)])
def test_gradients_of_fast_decays_keep_their_digits(length: int, rate: float) -> None:
    """Equal steps: the gradient of A is about exp(-rate) times the sums over steps from which it can be computed, and a
    few steps are within the range of factors. The last four of 132 steps are a separate span."""
    given = arguments(2, length, p=16, g=1, n=16)[:5]
    given[1], given[2] = torch.ones_like(given[1]), torch.full_like(given[2], -rate)
    dy = torch.randn_like(given[0])
    ours = [t.clone().requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    mamba_chunk_scan_combined(*ours, 64).backward(dy)
    ssd_ref(*exact)[0].backward(dy.double())
    for a, e in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert e.grad is not None
        # 1e-4: the loss of digits that `gradients_are_exact` allows, before exact decays are used
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=0, atol=1e-4 * e.grad.abs().max().item())


def test_gradients_are_those_of_finite_differences() -> None:
    given = [t.requires_grad_() for t in arguments(1, 5, 2, 2, 1, 2, dtype=torch.float64)]

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, s: Tensor
    ) -> Any:
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, 16, D, z, bias, s, dt_softplus=True, return_final_states=True
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, given)


def test_plain_pytorch_agrees_and_serves_transforms() -> None:
    x, dt, A, B, C, *_, state = arguments(length=75, dtype=torch.float64)
    dt = dt.abs()
    run = packed(2, 40, 35)
    for given in ((None, None), (state, run)):
        ours = ssd_chunks.scan(x, dt, A, B, C, *given, False)
        for a, e in zip(ours[:2], ssd_chunks.scan_eager(x, dt, A, B, C, *given), strict=True):
            assert_close(a, e)
    grad = torch.func.grad(lambda A: mamba_chunk_scan_combined(x, dt, A, B, C, 64).square().sum())(A)
    rows = torch.vmap(lambda x: mamba_chunk_scan_combined(x, dt, A, B, C, 64))(torch.stack([x, 2 * x]))
    assert_close(rows[1], mamba_chunk_scan_combined(2 * x, dt, A, B, C, 64))
    leaf = A.clone().requires_grad_()
    mamba_chunk_scan_combined(x, dt, leaf, B, C, 64).square().sum().backward()
    assert_close(grad, leaf.grad)


def test_options_of_steps_and_d() -> None:
    given = arguments(dtype=torch.float64)
    given[5] = torch.randn(4, 3).double()
    compare_with_gradients(given, 1e-12, dt_limit=(0.1, 0.9))


@pytest.mark.parametrize(("b", "length"), [(2, 0), (0, 4), (1, 1)])
def test_lengths_and_batches_at_the_ends(b: int, length: int) -> None:
    compare_with_gradients(arguments(b, length, dtype=torch.float64), 1e-12)


@pytest.mark.portable
def test_a_long_sequence() -> None:
    given = [t.requires_grad_() for t in arguments(1, 65_536, 2, 4, 1, 4)]
    ours, _ = mamba_chunk_scan_combined(*given[:5], 64, dt_softplus=True, return_final_states=True)
    part = [t[:, -300:] if t.ndim > 1 else t for t in given[:5]]
    # after 300 steps of about 0.7, nothing remains of earlier states
    torch.testing.assert_close(ours[:, -100:], ssd_ref(*part, dt_softplus=True)[0][:, -100:], rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in given[:5] if t.grad is not None)


def test_half_precision_sums_in_float32() -> None:
    given = arguments(length=40)
    half = [t.bfloat16() if t.ndim == 4 and i < 5 else t for i, t in enumerate(given)]
    y, last = both(half)[0]
    exact, exact_last = both([t.double() for t in half])[1]
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), exact, rtol=4e-3, atol=1e-3)
    torch.testing.assert_close(last.double(), exact_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 20.0])
def test_autocast_around_the_backward_pass_changes_nothing(rate: float) -> None:
    given = [torch.randn(1, 40, 4, 3), rate * torch.rand(1, 40, 4), -torch.rand(4), *torch.randn(2, 1, 40, 2, 5)]
    found = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mamba_chunk_scan_combined(*leaves, 8)
            once = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            twice = torch.autograd.grad(once[0].square().sum(), leaves)
        found.append([y, *once, *twice])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_states_of_a_pack() -> None:
    given = arguments(1, 20, dtype=torch.float64)
    x, dt, A, B, C, *_ = given
    starts = [0, 7, 8, 20]
    seq_idx = packed(1, 7, 1, 12)
    _, last, states = mamba_chunk_scan_combined(
        x, dt, A, B, C, 64, seq_idx=seq_idx, cu_seqlens=torch.tensor(starts), dt_softplus=True,
        return_final_states=True, return_varlen_states=True,
    )  # fmt: skip
    for i in range(3):
        at = slice(starts[i], starts[i + 1])
        _, expected = ssd_ref(x[:, at], dt[:, at], A, B[:, at], C[:, at], dt_softplus=True)
        assert_close(states[i : i + 1], expected)
    assert_close(last, states[-1:])
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        mamba_chunk_scan_combined(x, dt, A, B, C, 64, return_varlen_states=True)


@pytest.mark.parametrize(("norm", "mlp", "project"), [(True, 0, True), (False, 0, True), (True, 4, False)])
def test_the_fused_block_equals_its_definition(norm: bool, mlp: int, project: bool) -> None:
    h, p, g, n, m = 4, 3, 2, 2, mlp
    conv = h * p + 2 * g * n
    kind: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    given = [
        torch.randn(2, 11, 2 * m + h * p + conv + h, **kind), torch.randn(conv, 4, **kind), torch.randn(conv, **kind),
        torch.randn(h, **kind), torch.randn(h, **kind), torch.randn(h, **kind),
    ]  # fmt: skip
    options: dict[str, Any] = {"headdim": p, "ngroups": g, "norm_before_gate": False}
    if norm:
        options["rmsnorm_weight"] = torch.randn(h * p, **kind)
    if project:
        options |= {"outproj_weight": torch.randn(5, h * p + m, **kind), "outproj_bias": torch.randn(5, **kind)}
    y = mamba_split_conv1d_scan_combined(*given, 64, **options)
    expected = mamba_split_conv1d_scan_ref(*given, 64, **options)
    assert_close(y, expected)
    assert y.shape == (2, 11, 5 if project else h * p + m)
    dy = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(t, given, dy) for t in (y, expected)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (1, torch.zeros(2, 9, 3), "dt must have shape"),
        (2, torch.zeros(5), "A must have shape"),
        (3, torch.zeros(2, 9, 3, 5), "3 groups"),
        (4, torch.zeros(2, 9, 2, 6), "C must have shape"),
        (0, torch.zeros(2, 9, 12), "x must have shape"),
        (4, torch.zeros(2, 9, 2, 5, dtype=torch.long), "C must be floating point"),
    ],
)
def test_what_does_not_fit_is_named(place: int, wrong: Tensor, match: str) -> None:
    given = arguments()[:5]
    given[place] = wrong
    with pytest.raises((ValueError, TypeError), match=match):
        mamba_chunk_scan_combined(*given, 64)


@pytest.mark.parametrize("mode", ["compile", "export"])
@pytest.mark.portable
def test_compiled_and_exported_it_is_one_operator(mode: str) -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            y: Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, 64, dt_softplus=True)
            return y

    given = tuple(arguments(length=40)[:5])
    expected = Scan()(*given)
    if mode == "export":
        y = torch.export.export(Scan(), given).module()(*given)
    else:
        y = torch.compile(Scan(), backend="aot_eager", fullgraph=True)(*given)
    assert_close(y, expected)
