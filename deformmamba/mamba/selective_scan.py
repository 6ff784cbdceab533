"""Mamba's selective scan (S6) and the fused inner part of its block, with the interface of the package mamba-ssm.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]        y[t] = (C[t] . h[t] + D u[t]) silu(z[t])

`selective_scan_ref` and `mamba_inner_ref` are the definitions, a loop over steps; the other functions give the same
results with `deformmamba.scan`. The state is always float32 (float64 for float64 inputs).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument
from deformmamba.mamba.arguments import check_tensors
from deformmamba.mamba.causal_conv import causal_conv1d_fn, causal_conv1d_ref
from deformmamba.mamba.norm import rms_norm_ref
from deformmamba.scan import selective_scan


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The selective scan along the last axis.

    Args:
        u: (b, d, l) input.
        delta: (b, d, l) step sizes, before bias and softplus.
        A: (d, n) rates, real or complex.
        B, C: (b, g, n, l), or (b, n, l) for one group, or (d, n) if they do not change with time. Channel i belongs to
            group i // (d / g). With a complex A, B and C that change with time hold real and imaginary parts
            alternately along an axis of 2 l; constant ones are complex.
        D: (d,) factor of the direct path u -> y.
        z: (b, d, l) gate: y is multiplied by silu(z).
        delta_bias: (d,) added to delta.
        delta_softplus: dt = softplus(delta + delta_bias), else without softplus.
        return_last_state: also return the state after the last step.

    Returns:
        y (b, d, l) in u's dtype, or (y, last state (b, d, n)). The last state has a gradient, unlike in mamba-ssm.

    A complex A uses the definition (a loop over steps), which is slow. A constant B or C needs n times the memory of u.

    Raises:
        InvalidArgument, InvalidType: a shape, dtype or device that does not fit, naming the argument and the rule.
    """
    if isinstance(A, torch.Tensor) and A.is_complex():
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if not (isinstance(B, torch.Tensor) and isinstance(C, torch.Tensor)) or (B.ndim > 2 and C.ndim > 2):
        return selective_scan(
            u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=bool(delta_softplus),
            return_last_state=return_last_state,
        )  # fmt: skip
    _check(u, delta, A, B, C, D, z, delta_bias)
    return _scan_of_states(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def selective_scan_ref(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """The definition of `selective_scan_fn`, a loop over steps, with the same arguments and results."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    full = torch.promote_types(u.dtype, torch.float32)
    x, dt = u.to(full), delta.to(full)
    dt = dt if delta_bias is None else dt + delta_bias[:, None].to(full)
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (_by_step(weights, A, u.shape[1], full) for weights in (B, C))
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype if A.is_complex() else full, device=u.device)
    B, C = (weights.expand(*weights.shape[:3], u.shape[2]) for weights in (B, C))
    steps = []
    # not by index: the gradient of x[..., t] is a tensor of the size of x, for each t
    for x_t, dt_t, B_t, C_t in zip(*(tensor.unbind(-1) for tensor in (x, dt, B, C)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + dt_t[..., None] * B_t * x_t[..., None]
        y = (C_t * h).sum(-1)
        steps.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(steps, -1) if steps else x
    y = y if D is None else y + D[:, None].to(full) * x
    y = (y if z is None else y * F.silu(z.to(full))).to(u.dtype)
    return (y, h) if return_last_state else y


def _check(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, delta_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    real = {
        "u": (u, "b d l"),
        "delta": (delta, "b d l"),
        "D": (D, "?d"),
        "z": (z, "?b d l"),
        "bias": (delta_bias, "?d"),
    }
    real["delta_bias"] = real.pop("bias")
    sizes = check_tensors(A=(A, "any:d n"), **real)
    steps, constant = "l", "d n"
    if A.is_complex():
        steps, sizes["2*l"], constant = "2*l", 2 * sizes["l"], "any:d n"
    for name, weights in (("B", B), ("C", C)):
        changing = isinstance(weights, torch.Tensor) and weights.ndim != 2
        axes = f"b g n {steps} | b n {steps}" if changing else constant
        g = check_tensors(sizes, u=(u, "b d l"), **{name: (weights, axes)}).get("g", 1)
        if not g or sizes["d"] % g:
            raise InvalidArgument(
                f"{name} {tuple(weights.shape)} has {g} groups; they must divide the {sizes['d']} channels of u"
            )


def _by_step(weights: torch.Tensor, A: torch.Tensor, d: int, full: torch.dtype) -> torch.Tensor:
    """B or C in any of its forms as (b, d, n, l), or (1, d, n, 1) if it does not change with time."""
    if weights.ndim == 2:
        return (weights if A.is_complex() else weights.to(full))[None, :, :, None]
    grouped = weights.to(full)[:, None] if weights.ndim == 3 else weights.to(full)
    if A.is_complex():
        grouped = torch.view_as_complex(grouped.unflatten(-1, (-1, 2)).contiguous())
    return grouped.repeat_interleave(d // grouped.shape[1], 1)


def _scan_of_states(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, delta_bias: torch.Tensor | None, delta_softplus: bool, return_last_state: bool,
) -> Any:  # fmt: skip
    """The scan if B or C does not change with time: each state becomes a channel of a scan with one state."""
    (b, d, length), n = u.shape, A.shape[1]
    full = torch.promote_types(u.dtype, torch.float32)
    x = u.to(full)
    dt = delta.to(full) if delta_bias is None else delta.to(full) + delta_bias[:, None].to(full)
    dt = F.softplus(dt) if delta_softplus else dt
    ones = torch.ones(1, 1, 1, device=u.device, dtype=full).expand(b, 1, length)
    states, last = selective_scan(
        (x[:, :, None] * _by_step(B, A, d, full)).reshape(b, d * n, length),
        dt[:, :, None].expand(b, d, n, length).reshape(b, d * n, length),
        A.to(full).reshape(d * n, 1),
        ones,
        ones,
        return_last_state=True,
    )
    y = (states.reshape(b, d, n, length) * _by_step(C, A, d, full)).sum(2)
    y = y if D is None else y + D[:, None].to(full) * x
    y = (y if z is None else y * F.silu(z.to(full))).to(u.dtype)
    return (y, last.reshape(b, d, n)) if return_last_state else y


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """A Mamba block between its input projection and its output: convolution, projections, scan, gate, projection.

    Args:
        xz: (b, 2 d, l): the inner channels, then the gate.
        conv1d_weight: (d, 1, width). conv1d_bias: (d,) or None.
        x_proj_weight: (r + 2 n, d), which gives dt, B and C; without the rows of B or C if they are given.
        delta_proj_weight: (d, r).
        out_proj_weight: (m, d). out_proj_bias: (m,) or None.
        A, B, C, D, delta_bias, delta_softplus: as in `selective_scan_fn`; B and C come from x unless they are given.
        B_proj_bias, C_proj_bias: (n,) added to B and C, or None.
        checkpoint_lvl: accepted, without effect, because nothing is recomputed in the backward pass. b_rms_weight,
        c_rms_weight (n,), dt_rms_weight (d,): weights of a root-mean-square norm of B, C and delta.
        b_c_dt_rms_eps: its epsilon.

    Returns:
        (b, l, m).
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return _project(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> torch.Tensor:
    """`mamba_inner_fn` before the output projection, (b, d, l): a name that Vision Mamba and SegMamba add."""
    x, z, delta, B, C = _scan_inputs(
        causal_conv1d_fn, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias,
        C_proj_bias, (b_rms_weight, c_rms_weight, dt_rms_weight), b_c_dt_rms_eps,
    )  # fmt: skip
    return selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)


def bimamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    A_b: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """`mamba_inner_fn` with the scan in both directions, rates A_b backwards: a name that Vision Mamba adds."""
    x, z, delta, B, C = _scan_inputs(
        causal_conv1d_fn, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias,
        C_proj_bias,
    )  # fmt: skip
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    B, C = (weights.flip(-1) if weights.ndim > 2 else weights for weights in (B, C))
    y_b = selective_scan_fn(x.flip(-1), delta.flip(-1), A_b, B, C, D, z.flip(-1), delta_bias, delta_softplus)
    return _project((y + y_b.flip(-1)).transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
) -> torch.Tensor:
    """The definition of `mamba_inner_fn`: the definitions of its parts, one after the other."""
    x, z, delta, B, C = _scan_inputs(
        causal_conv1d_ref, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias,
        C_proj_bias,
    )  # fmt: skip
    y = selective_scan_ref(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _project(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _scan_inputs(
    convolve: Callable[..., torch.Tensor], xz: torch.Tensor, conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None, x_proj_weight: torch.Tensor, delta_proj_weight: torch.Tensor, A: torch.Tensor,
    B: torch.Tensor | None, C: torch.Tensor | None, B_bias: torch.Tensor | None, C_bias: torch.Tensor | None,
    rms_weights: tuple[torch.Tensor | None, ...] = (None, None, None), eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x after the convolution, the gate z, delta (all (b, d, l)), B and C."""
    sizes = check_tensors(xz=(xz, "b 2*d l"), conv1d_weight=(conv1d_weight, "d 1 width"))
    if sizes["2*d"] != 2 * sizes["d"]:
        raise InvalidArgument(
            f"xz must have shape (b, 2 d, l) with d = {sizes['d']} as in conv1d_weight, got {tuple(xz.shape)}"
        )
    sizes = check_tensors(
        sizes, xz=(xz, "b 2*d l"), conv1d_bias=(conv1d_bias, "?d"), delta_proj_weight=(delta_proj_weight, "d r"),
        A=(A, "any:d n"),
    )  # fmt: skip
    columns = sizes["n"] * (2 if A.is_complex() else 1)
    own = columns * ((B is None) + (C is None))
    b_rms, c_rms, dt_rms = rms_weights
    check_tensors(
        {**sizes, "r+n+n": sizes["r"] + own, "n": columns}, xz=(xz, "b 2*d l"),
        x_proj_weight=(x_proj_weight, "r+n+n d"), B_proj_bias=(B_bias, "?n"), C_proj_bias=(C_bias, "?n"),
        b_rms_weight=(b_rms, "?n"), c_rms_weight=(c_rms, "?n"), dt_rms_weight=(dt_rms, "?d"),
    )  # fmt: skip
    x, z = xz.chunk(2, 1)
    x = convolve(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = _linear(
        x.transpose(1, 2), x_proj_weight, None
    )  # (b, l, r + 2 n), without the columns of a given B or C

    def from_x(columns: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor | None) -> torch.Tensor:
        columns = columns if bias is None else columns + bias.to(columns.dtype)
        columns = columns if weight is None else rms_norm_ref(columns, weight, None, eps=eps, upcast=True)
        if A.is_complex():
            return columns.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2)
        return columns.transpose(1, 2)

    if B is None:
        B = from_x(projected[..., rank : rank + n], B_bias, b_rms)
    if C is None:
        C = from_x(projected[..., projected.shape[-1] - n :], C_bias, c_rms)
    # one product per sequence, with channels before time, as the scan and the gate have them
    delta = torch.matmul(delta_proj_weight.to(x.dtype), projected[..., :rank].transpose(1, 2))
    if dt_rms is not None:
        delta = rms_norm_ref(delta.transpose(1, 2), dt_rms, None, eps=eps, upcast=True).transpose(1, 2)
    return x, z, delta, B, C


def _project(y: torch.Tensor, out_proj_weight: torch.Tensor, out_proj_bias: torch.Tensor | None) -> torch.Tensor:
    check_tensors(y=(y, "b l d"), out_proj_weight=(out_proj_weight, "m d"), out_proj_bias=(out_proj_bias, "?m"))
    return _linear(y, out_proj_weight, out_proj_bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear in the dtype of x, as autocast and mixed models need it."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
