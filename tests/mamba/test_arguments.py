"""Wrong arguments of every function of `deformmamba.mamba` raise one sentence; unusual ones give right results."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import deformmamba.mamba as m
from deformmamba.errors import DeformMambaError
from deformmamba.mamba.arguments import check_range, check_tensors


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def scan() -> dict[str, Any]:
    u, delta, z = (torch.randn(2, 4, 5) for _ in range(3))
    B, C, A = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5), -torch.rand(4, 3)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": torch.randn(4), "z": z, "delta_bias": torch.randn(4)}


def constant_scan() -> dict[str, Any]:
    return scan() | {"B": torch.randn(4, 3), "C": torch.randn(4, 3)}


def complex_scan() -> dict[str, Any]:
    return scan() | {"A": -torch.rand(4, 3) + 0j, "B": torch.randn(2, 2, 3, 10), "C": torch.randn(2, 2, 3, 10)}


def ssd(length: int = 5) -> dict[str, Any]:
    x, z, B, C = torch.randn(2, length, 4, 3), torch.randn(2, length, 4, 3), torch.randn(2, length, 2, 5), None
    C = torch.randn(2, length, 2, 5)
    return {"x": x, "dt": torch.rand(2, length, 4), "A": -torch.rand(4), "B": B, "C": C, "chunk_size": 64,
            "D": torch.randn(4), "z": z, "dt_bias": torch.randn(4), "initial_states": torch.randn(2, 4, 3, 5),
            "seq_idx": torch.zeros(2, length, dtype=torch.int32)}  # fmt: skip


def pack() -> dict[str, Any]:
    given = {name: value[:1] if name in ("x", "dt", "B", "C", "z") else value for name, value in ssd().items()}
    return given | {"initial_states": None, "seq_idx": None, "return_varlen_states": True,
                    "cu_seqlens": torch.tensor([0, 2, 5])}  # fmt: skip


def conv() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 5), "weight": torch.randn(3, 4), "bias": torch.randn(3)}


def conv_step() -> dict[str, Any]:
    return {"x": torch.randn(2, 3), "conv_state": torch.randn(2, 3, 4), "weight": torch.randn(3, 4)}


def conv_rows() -> dict[str, Any]:
    return conv_step() | {"conv_state": torch.randn(6, 3, 4), "conv_state_indices": torch.tensor([5, -1])}


def last_states() -> dict[str, Any]:
    return {"x": torch.randn(5, 3), "cu_seqlens": torch.tensor([0, 2, 5]), "state_len": 2}


def step() -> dict[str, Any]:
    state, x, dt, A = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5), torch.rand(2, 4, 5), -torch.rand(4, 5, 3)
    return {"state": state, "x": x, "dt": dt, "A": A, "B": torch.randn(2, 2, 3), "C": torch.randn(2, 2, 3),
            "D": torch.randn(4, 5), "z": torch.randn(2, 4, 5), "dt_bias": torch.randn(4, 5)}  # fmt: skip


def step_rows() -> dict[str, Any]:
    return step() | {"state": torch.randn(6, 4, 5, 3), "state_batch_indices": torch.tensor([5, -1])}


def inner() -> dict[str, Any]:
    return {
        "xz": torch.randn(2, 8, 5), "conv1d_weight": torch.randn(4, 1, 3), "conv1d_bias": torch.randn(4),
        "x_proj_weight": torch.randn(8, 4), "delta_proj_weight": torch.randn(4, 2),
        "out_proj_weight": torch.randn(6, 4), "out_proj_bias": None, "A": -torch.rand(4, 3), "D": torch.randn(4),
        "B_proj_bias": torch.randn(3), "C_proj_bias": torch.randn(3), "b_rms_weight": torch.randn(3),
        "c_rms_weight": torch.randn(3), "dt_rms_weight": torch.randn(4),
    }  # fmt: skip


def inner_without_projection() -> dict[str, Any]:
    return {name: value for name, value in inner().items() if not name.startswith("out_proj")}


def split() -> dict[str, Any]:
    return {
        "zxbcdt": torch.randn(2, 5, 12 + 32 + 4), "conv1d_weight": torch.randn(32, 4), "conv1d_bias": None,
        "dt_bias": torch.randn(4), "A": -torch.rand(4), "D": torch.randn(4), "chunk_size": 64, "headdim": 3,
        "ngroups": 2,
    }  # fmt: skip


def norm() -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 6), "weight": torch.randn(6), "bias": None}


def gated() -> dict[str, Any]:
    return norm() | {"z": torch.randn(2, 5, 6)}


FUNCTIONS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (m.selective_scan_fn, scan), (m.selective_scan_ref, scan), (m.selective_scan_fn, constant_scan),
    (m.selective_scan_fn, complex_scan), (m.mamba_chunk_scan_combined, ssd), (m.mamba_chunk_scan_combined, pack),
    (m.causal_conv1d_fn, conv), (m.causal_conv1d_update, conv_step), (m.causal_conv1d_update, conv_rows),
    (m.causal_conv1d_varlen_states, last_states), (m.selective_state_update, step),
    (m.selective_state_update, step_rows), (m.mamba_inner_fn, inner),
    (m.mamba_inner_fn_no_out_proj, inner_without_projection), (m.gated_norm_ref, gated),
    (m.mamba_split_conv1d_scan_combined, split),
    (m.rms_norm_fn, norm), (m.layer_norm_fn, norm), (m.rmsnorm_fn, gated), (m.layernorm_fn, gated),
]  # fmt: skip


def message(function: Callable[..., Any], given: dict[str, Any]) -> str:
    with pytest.raises(DeformMambaError) as caught:
        function(**given)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_tensor_is_checked_for_type_shape_numbers_and_device() -> None:
    for function, make in FUNCTIONS:
        function(**make())
        for name, value in make().items():
            if not isinstance(value, Tensor):
                continue
            whole = not (value.is_floating_point() or value.is_complex())
            first = name == next(iter(make()))
            for wrong in ([1.0], 3.0, value[..., None, None], value.float() if whole else value.real.long()):
                text = message(function, make() | {name: wrong})
                # where one size of the first argument is wrong, the next one may be named
                assert first or name in text, (function, name, text)
            if not first and name != "cu_seqlens":  # whose device may be another one
                text = message(function, make() | {name: value.to("meta")})
                assert "device" in text, (function, name, text)


def test_sizes_are_checked() -> None:
    free = {  # a last axis that no other argument has
        m.causal_conv1d_fn: ("x", "weight"), m.causal_conv1d_update: ("conv_state",),
        m.mamba_inner_fn: ("xz", "conv1d_weight"), m.mamba_inner_fn_no_out_proj: ("xz", "conv1d_weight"),
        m.causal_conv1d_varlen_states: ("x", "cu_seqlens"),
        m.mamba_split_conv1d_scan_combined: ("zxbcdt", "conv1d_weight"),
    }  # fmt: skip
    for function, make in FUNCTIONS:
        for name, value in make().items():
            if isinstance(value, Tensor) and name not in free.get(function, ()):
                message(function, make() | {name: torch.cat([value] * 3, -1)})


def test_a_bias_of_one_number_is_not_repeated() -> None:
    text = message(m.mamba_inner_fn_no_out_proj, inner_without_projection() | {"B_proj_bias": torch.randn(1)})
    assert text == "B_proj_bias must have shape (n,) with n = 3, got (1,)"
    assert "weight must have shape (d,) with d = 6" in message(m.gated_norm_ref, gated() | {"weight": torch.randn(1)})
    assert "group_size is 4; it must divide the 6" in message(m.gated_norm_ref, gated() | {"group_size": 4})


def test_values_that_are_not_tensors() -> None:
    cases: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (m.causal_conv1d_fn, conv() | {"activation": "relu"}, "activation must be one of None, 'silu', 'swish'"),
        (m.causal_conv1d_fn, conv() | {"activation": ["silu"]}, "activation must be one of"),
        (m.causal_conv1d_fn, conv() | {"weight": torch.zeros(3, 0)}, "a width of at least 1"),
        (m.causal_conv1d_fn, conv() | {"return_final_states": True, "final_states_out": torch.zeros(9, 2, 3, 3)},
         r"final_states_out must have shape \(b, d, width-1\) with b = 2, d = 3, width-1 = 3, got \(9, 2, 3, 3\)"),
        (m.causal_conv1d_update, conv_step() | {"conv_state": torch.zeros(2, 3, 2)}, "needs at least width - 1"),
        (m.causal_conv1d_update, conv_step() | {"conv_state": torch.zeros(1, 3, 4).expand(2, 3, 4)}, r"\.clone\(\)"),
        (m.causal_conv1d_update, conv_rows() | {"conv_state_indices": torch.tensor([0, 6])}, "index 6; .* 0 to 5"),
        (m.selective_state_update, step() | {"state": torch.zeros(1, 4, 5, 3).expand(2, 4, 5, 3)}, r"\.clone\(\)"),
        (m.selective_state_update, step() | {"B": torch.zeros(2, 3, 3), "C": torch.zeros(2, 3, 3)}, "3 groups"),
        (m.selective_state_update, step_rows() | {"state_batch_indices": torch.tensor([6, 0])}, "index 6; .* 0 to 5"),
        (m.selective_scan_fn, constant_scan() | {"B": torch.zeros(2, 3, 3, 5)}, "3 groups"),
        (m.mamba_chunk_scan_combined, ssd() | {"dt_limit": (1.0, 0.0)}, "lowest <= highest"),
        (m.mamba_chunk_scan_combined, ssd() | {"dt_limit": None}, "two numbers"),
        (m.mamba_chunk_scan_combined, ssd() | {"dt_limit": (0, 1, 2)}, "two numbers"),
        (m.mamba_chunk_scan_combined, ssd() | {"state_dtype": torch.int32}, "state_dtype must be a floating point"),
        (m.mamba_split_conv1d_scan_combined, split() | {"ngroups": 0}, "ngroups must be a whole number"),
        (m.mamba_split_conv1d_scan_combined, split() | {"headdim": None}, "headdim must be given"),
        (m.rms_norm_fn, norm() | {"residual": torch.zeros(5, 6)}, "residual must have the shape of x"),
        (m.rms_norm_fn, norm() | {"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
        (m.rmsnorm_fn, gated() | {"group_size": 4}, "must divide the 6 channels"),
        (m.rmsnorm_fn, gated() | {"group_size": 0}, "must divide the 6 channels"),
        (m.causal_conv1d_varlen_states, last_states() | {"state_len": -1}, "state_len must be a whole number"),
    ]  # fmt: skip
    for function, make in ((m.mamba_chunk_scan_combined, pack), (m.causal_conv1d_varlen_states, last_states)):
        for ends in ([0, 4, 3, 5], [1, 5], [0, 6], [-1, 5], []):
            expected = "must start at 0, never decrease and end" if ends else "at least one number"
            cases.append((function, make() | {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}, expected))
    for function, given, expected in cases:
        text = message(function, given)
        assert re.search(expected, text), (function, text)


def test_a_pattern_says_what_is_allowed() -> None:
    x = torch.zeros(2, 3)
    assert check_tensors(x=(x, "a b | a b c"), y=(None, "?a"), z=(x[0], "... b")) == {"a": 2, "b": 3}
    with pytest.raises(DeformMambaError, match=r"^y must have shape \(b,\) with b = 3, got \(2,\)$"):
        check_tensors(x=(x, "a b"), y=(x[:, 0], "b"))
    with pytest.raises(DeformMambaError, match=r"^y must be a tensor or None, \(a, a\), got 'no'$"):
        check_tensors(x=(x, "a b"), y=("no", "?a a"))
    with pytest.raises(DeformMambaError, match=r"^x must have shape \(a, 1\) or \(a, b, c\), got \(2, 3\)$"):
        check_tensors(x=(x, "a 1 | a b c"))
    with pytest.raises(DeformMambaError, match="complex numbers are not supported"):
        check_tensors(x=(x + 0j, "a b"))
    assert check_range("limit", [0, float("inf")]) == (0.0, float("inf"))


def test_an_argument_may_be_a_view_of_the_state_that_is_written() -> None:
    for name, view in (
        ("x", lambda s: s[:, :, 0]),
        ("z", lambda s: s[:, :, 1]),
        ("B", lambda s: s[:, 0]),
        ("C", lambda s: s[:, 4]),
    ):
        state = torch.randn(2, 5, 3)
        given = {"x": torch.randn(2, 5), "dt": torch.rand(2, 5), "A": -torch.rand(5, 3), "B": torch.randn(2, 3),
                 "C": torch.randn(2, 3), "z": torch.randn(2, 5), "D": torch.randn(5)}  # fmt: skip
        expected_state = state.clone()
        expected = m.selective_state_update(expected_state, **given | {name: view(state).clone()})
        y = m.selective_state_update(state, **given | {name: view(state)})
        assert_close(y, expected)
        assert_close(state, expected_state)


def test_gradients_reach_inputs_of_any_memory_layout() -> None:
    """Also where the pieces of a sequence are so regular that nothing is padded, and so copied."""
    for length, rate in ((128, 1.0), (128, 40.0), (140, 40.0)):
        given = {name: value for name, value in ssd(length).items() if name != "seq_idx"}
        given["A"] = rate * given["A"]
        tensors = {name: value.requires_grad_() for name, value in given.items() if isinstance(value, Tensor)}
        turned = {
            name: value.detach().mT.contiguous().mT.requires_grad_() if value.ndim > 2 else value
            for name, value in tensors.items()
        }
        dy = torch.randn(2, length, 4, 3)
        found = []
        for leaves, gradient in ((tensors, dy), (turned, dy.mT.contiguous().mT)):
            y = m.mamba_chunk_scan_combined(**leaves, chunk_size=64, dt_softplus=True)
            found.append([y, *torch.autograd.grad(y, list(leaves.values()), gradient)])
        assert_close(found[1], found[0], rtol=1e-4)


def test_no_heads_no_steps_no_batch() -> None:
    for b, length, heads in ((2, 5, 0), (2, 0, 4), (0, 5, 4)):
        x, dt, A = torch.randn(b, length, heads, 3), torch.rand(b, length, heads), -torch.rand(heads)
        B = torch.randn(b, length, 1, 2)
        leaves = [t.requires_grad_() for t in (x, dt, A, B)]
        y, last = m.mamba_chunk_scan_combined(x, dt, A, B, B, 64, return_final_states=True)
        assert (y.shape, last.shape) == (x.shape, (b, heads, 3, 2))
        assert all(t is not None for t in torch.autograd.grad(y.sum() + last.sum(), leaves))
    state = torch.zeros(0, 4, 5, 3)
    empty = torch.zeros(0, 4, 5)
    assert m.selective_state_update(state, empty, empty, -torch.rand(4, 5, 3), *[torch.zeros(0, 2, 3)] * 2).shape == (
        0,
        4,
        5,
    )


def test_a_pack_may_begin_with_an_empty_sequence_and_end_with_padding() -> None:
    x, dt, A, B, C = (torch.randn(1, 9, 4, 3), torch.rand(1, 9, 4), -torch.rand(4), *torch.randn(2, 1, 9, 2, 5))
    state = torch.randn(1, 4, 3, 5)
    first, second = m.mamba_chunk_scan_combined(
        x, dt, A, B, C, 64, initial_states=state, cu_seqlens=torch.tensor([0, 0, 6]), return_varlen_states=True
    )[1]
    _, expected = m.ssd_ref(x[:, :6], dt[:, :6], A, B[:, :6], C[:, :6], initial_states=state)
    assert_close(first, state[0])
    assert_close(second, expected[0])


def test_second_derivatives() -> None:
    kind: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias, state = (torch.randn(*size, **kind) for size in ((1, 2, 3), (2, 3), (2,), (1, 2, 2)))

    def convolve(*given: Tensor) -> Any:
        return m.causal_conv1d_fn(*given[:3], None, given[3], True, activation="silu")

    assert torch.autograd.gradgradcheck(convolve, (x, weight, bias, state), fast_mode=True)
    run = torch.tensor([[0, 0, 1]])
    given = [torch.randn(*size, **kind) for size in ((1, 3, 2, 1), (1, 3, 2), (2,), (1, 3, 1, 2), (1, 3, 1, 2))]
    first = torch.randn(1, 2, 1, 2, **kind)
    for options in ({}, {"seq_idx": run}):

        def scan(*t: Tensor, options: dict[str, Any] = options) -> Any:
            return m.mamba_chunk_scan_combined(
                *t[:5], 64, initial_states=t[5], dt_softplus=True, return_final_states=True, **options
            )  # fmt: skip

        assert torch.autograd.gradgradcheck(scan, (*given, first), fast_mode=True)


def test_modules_on_the_meta_device_give_shapes() -> None:
    x = torch.empty(2, 5, 8, device="meta")
    for module in (m.Mamba(8, device="meta"), m.Mamba2(8, headdim=4, device="meta")):
        assert module(x).shape == x.shape
    volume = torch.empty(1, 4, 2, 3, 5, device="meta")
    assert m.SS3D(4, device="meta")(volume).shape == volume.shape


@pytest.mark.parametrize("block", [m.Mamba, m.Mamba2])
@pytest.mark.parametrize(
    "given",
    [
        *({"d_model": value} for value in (0, -16, 16.5, float("inf"), "16", None, True)),
        *({"expand": value} for value in (0, -1, float("inf"), float("nan"), "2", 0.001)),
        {"d_state": 0}, {"d_state": -1}, {"d_conv": 0}, {"dt_min": 0}, {"dt_max": float("inf")}, {"dt_min": 1},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_a_block(block: type[torch.nn.Module], given: dict[str, Any]) -> None:
    with pytest.raises(DeformMambaError, match=f"^{block.__name__}: {next(iter(given))}"):
        block(**{"d_model": 64} | given)


@pytest.mark.parametrize(
    ("block", "given"),
    [
        *((m.Mamba, given) for given in ({"dt_rank": 0}, {"dt_rank": "all"}, {"nslices": 0}, {"bimamba_type": "v9"})),
        (m.Mamba, {"dt_init": "zero"}),
        *((m.Mamba2, given) for given in ({"headdim": 0}, {"ngroups": 0}, {"d_ssm": 0}, {"d_ssm": 64.0})),
    ],
    ids=str,
)
def test_sizes_of_one_block(block: type[torch.nn.Module], given: dict[str, Any]) -> None:
    with pytest.raises(DeformMambaError, match=f"^{block.__name__}: {next(iter(given))}"):
        block(64, **given)
