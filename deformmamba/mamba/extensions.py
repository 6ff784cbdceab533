"""The compiled extensions that Mamba code calls directly, with their own signatures: `fwd` and `bwd` pairs.

`selective_scan_cuda` belongs to mamba-ssm, `causal_conv1d_cuda` to causal-conv1d, and the `selective_scan_cuda_*` to
VMamba. Programs with their own autograd functions (Vision Mamba, SegMamba, VMamba) call them. A backward pass here
recomputes the forward pass and differentiates it.
"""

from typing import Any

import torch

from deformmamba.errors import InvalidType
from deformmamba.mamba.causal_conv import causal_conv1d_fn, causal_conv1d_update
from deformmamba.mamba.selective_scan import selective_scan_fn


def scan_fwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, delta_bias: torch.Tensor | None, delta_softplus: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """selective_scan_cuda.fwd: [y before the gate, x, and y with the gate if there is z].

    x is (b, d, 1, 2 n): the last state in every second place, as `x[:, :, -1, 1::2]` reads it."""
    with torch.no_grad():
        y, last = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=True)
        x = torch.stack([torch.zeros_like(last), last], -1).flatten(-2)[:, :, None]
        return [y, x] if z is None else [y, x, (y.to(x.dtype) * torch.nn.functional.silu(z.to(x.dtype))).to(y.dtype)]


def scan_bwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, delta_bias: torch.Tensor | None, dout: torch.Tensor, x: torch.Tensor | None,
    out: torch.Tensor | None, dz: torch.Tensor | None, delta_softplus: bool, recompute_out_z: bool,
) -> list[torch.Tensor | None]:  # fmt: skip
    """selective_scan_cuda.bwd: [du, ddelta, dA, dB, dC, dD, ddelta_bias, and dz and y with the gate, if there is z]."""
    given = [u, delta, A, B, C, D, z, delta_bias]
    y, grads = _differentiate(
        lambda u, delta, A, B, C, D, z, bias: selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus),
        given,
        dout,
    )
    du, ddelta, dA, dB, dC, dD, dz_new, dbias = grads
    results = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is None:
        return results
    results.append(dz_new if dz is None or dz_new is None else dz.copy_(dz_new))
    return [*results, y] if recompute_out_z else results


def cross_scan_fwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    delta_bias: torch.Tensor | None, delta_softplus: bool, nrows: int = 1, out_float: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """The fwd of selective_scan_cuda_core, _oflex and _nrow: [y, x]. `out_float`: y is always float32."""
    u = u.float() if out_float and u.dtype != torch.float64 else u
    return scan_fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def cross_scan_bwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    delta_bias: torch.Tensor | None, dout: torch.Tensor, x: torch.Tensor | None, delta_softplus: bool, nrows: int = 1,
) -> list[torch.Tensor | None]:  # fmt: skip
    """The bwd of selective_scan_cuda_core, _oflex and _nrow: [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return scan_bwd(u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False)


def one_state_fwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    delta_bias: torch.Tensor | None, delta_softplus: bool, nrows: int = 1,
) -> list[torch.Tensor]:  # fmt: skip
    """selective_scan_cuda_ndstate.fwd: [y, x] of a scan with one state per channel, A (d,) and B, C (b, g, l)."""
    return cross_scan_fwd(u, delta, A[:, None], B[:, :, None], C[:, :, None], D, delta_bias, delta_softplus)


def one_state_bwd(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    delta_bias: torch.Tensor | None, dout: torch.Tensor, x: torch.Tensor | None, delta_softplus: bool, nrows: int = 1,
) -> list[torch.Tensor | None]:  # fmt: skip
    """selective_scan_cuda_ndstate.bwd: [du, ddelta, dA (d,), dB and dC (b, g, l), dD, ddelta_bias]."""
    du, ddelta, dA, dB, dC, *rest = cross_scan_bwd(
        u, delta, A[:, None], B[:, :, None], C[:, :, None], D, delta_bias, dout, x, delta_softplus
    )
    squeezed = (dA if dA is None else dA[:, 0], *(w if w is None else w[:, :, 0] for w in (dB, dC)))
    return [du, ddelta, *squeezed, *rest]


def conv_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    """causal_conv1d_cuda.causal_conv1d_fwd of any version: the arguments after bias are

    (silu), or (seq_idx, silu), or (seq_idx, initial_states, final_states_out, silu), or with out before the last two.
    """
    seq_idx, initial, out, final = _conv_arguments(rest)
    with torch.no_grad():
        y = causal_conv1d_fn(
            x, weight, bias, seq_idx, initial, final is not None, final, activation="silu" if rest[-1] else None
        )
        y = y if isinstance(y, torch.Tensor) else y[0]
        return y if out is None else out.copy_(y)


def _conv_arguments(rest: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """(seq_idx, initial states, out, final states) among the arguments after bias."""
    if len(rest) not in (1, 2, 4, 5):
        raise InvalidType(f"causal_conv1d_fwd takes 4, 5, 7 or 8 arguments, got {3 + len(rest)}")
    given = dict(
        zip(
            {1: (), 2: ("seq_idx",), 4: ("seq_idx", "initial", "final"), 5: ("seq_idx", "initial", "out", "final")}[
                len(rest)
            ],
            rest,
            strict=False,
        )
    )
    return given.get("seq_idx"), given.get("initial"), given.get("out"), given.get("final")


def conv_bwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dout: torch.Tensor, *rest: Any) -> Any:
    """causal_conv1d_cuda.causal_conv1d_bwd of versions before 1.6: the arguments after dout are

    (dx, silu), or (seq_idx, dx, silu), or (seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu);
    returns [dx, dweight, dbias], and the gradient of the initial states in the last form.
    """
    if len(rest) not in (2, 3, 6):
        raise InvalidType(f"causal_conv1d_bwd takes 6, 7 or 10 arguments, got {4 + len(rest)}")
    seq_idx = rest[0] if len(rest) > 2 else None
    initial, dfinal = rest[1:3] if len(rest) == 6 else (None, None)
    dx_given = rest[{2: 0, 3: 1, 6: 3}[len(rest)]]
    given = [x, weight, bias, initial]

    def run(x: Any, weight: Any, bias: Any, initial: Any) -> Any:
        activation = "silu" if rest[-1] else None
        return causal_conv1d_fn(x, weight, bias, seq_idx, initial, dfinal is not None, None, activation)

    _, grads = _differentiate(run, given, dout if dfinal is None else (dout, dfinal))
    dx, dweight, dbias, dinitial = grads
    if dx_given is not None:
        dx = dx_given.copy_(dx)
    if dbias is None:
        dbias = torch.zeros(len(weight), device=x.device)
    return [dx, dweight, dbias, *([dinitial] if len(rest) == 6 else [])]


def conv_fwd_function(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None, final_states_out: torch.Tensor | None, silu_activation: bool,
) -> torch.Tensor:  # fmt: skip
    """causal_conv1d.cpp_functions.causal_conv1d_fwd_function."""
    return conv_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def conv_bwd_function(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dout: torch.Tensor, seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None, dfinal_states: torch.Tensor | None, dx: torch.Tensor | None,
    return_dinitial_states: bool, silu_activation: bool,
) -> Any:  # fmt: skip
    """causal_conv1d.cpp_functions.causal_conv1d_bwd_function: dx, dweight, dbias, dinitial_states."""
    rest = (seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation)
    dx, dweight, dbias, dinitial = conv_bwd(x, weight, bias, dout, *rest)
    return dx, dweight, None if bias is None else dbias, dinitial if return_dinitial_states else None


def conv_update_function(
    x: torch.Tensor, conv_state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu_activation: bool,
    cache_seqlens: torch.Tensor | None = None, conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """causal_conv1d_cuda.causal_conv1d_update before 1.6, and causal_conv1d.cpp_functions' function of that name."""
    activation = "silu" if silu_activation else None
    with torch.no_grad():
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def _differentiate(run: Any, given: list[torch.Tensor | None], douts: Any) -> tuple[Any, list[torch.Tensor | None]]:
    """The outputs of run(*given) and the gradients of all inputs that are not None."""
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        outputs = run(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        douts = (douts.to(outputs.dtype),) if isinstance(douts, torch.Tensor) else douts
        found = iter(torch.autograd.grad(outputs, wanted, douts))
    y = outputs.detach() if isinstance(outputs, torch.Tensor) else outputs[0].detach()
    return y, [None if leaf is None else next(found) for leaf in leaves]
