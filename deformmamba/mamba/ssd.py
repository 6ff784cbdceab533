"""Mamba-2's scan (state space duality), with the interface of mamba-ssm's `ops.triton.ssd_combined`.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]'        y[t] = (h[t] C[t] + D x[t]) silu(z[t])

Each head has one rate A, so that each chunk of a sequence needs only a few matrix products (`ssd_chunks`). `ssd_ref` is
the definition, a loop over steps. Sums are always computed in float32 (float64 for float64 inputs).
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.mamba import ssd_chunks
from deformmamba.mamba.arguments import check_boundaries, check_range, check_tensors
from deformmamba.mamba.causal_conv import causal_conv1d_fn, causal_conv1d_ref, needs_transforms
from deformmamba.mamba.norm import gated_norm_ref, rmsnorm_fn
from deformmamba.tensors import refuse_tracing, without_autocast


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """Mamba-2's scan.

    Args:
        x: (b, l, h, p): h heads of p channels.
        dt: (b, l, h) step sizes, before bias, softplus and limits.
        A: (h,) rates; negative in a Mamba network.
        B, C: (b, l, g, n); head i belongs to group i // (h / g).
        chunk_size: accepted, without effect, because a suitable size is chosen automatically.
        D: (h,) or (h, p), factor of the direct path x -> y.
        z: (b, l, h, p) gate: y is multiplied by silu(z).
        dt_bias: (h,) added to dt.
        initial_states: (b, h, p, n) before the first step, zero by default.
        seq_idx: (b, l) integers: the state is reset at each step where the number changes.
        cu_seqlens: (sequences + 1,) integers: the start of each sequence of a pack (b = 1), and l. Used for
            `return_varlen_states` only; `seq_idx` separates the sequences.
        dt_softplus: dt = softplus(dt + dt_bias), else without softplus.
        dt_limit: dt is clamped to this range, after softplus.
        return_final_states: also return the state after the last step, (b, h, p, n).
        return_varlen_states: also return the state after each sequence of cu_seqlens, (sequences, h, p, n).
        state_dtype: dtype of the returned states; float32 by default (float64 for float64 inputs).

    Returns:
        y (b, l, h, p) in x's dtype, or a tuple of it and the requested states, in this order.

    Raises:
        InvalidArgument, InvalidType: a shape or dtype that does not fit, naming the argument and the rule.
    """
    refuse_tracing("mamba_chunk_scan_combined", "length")
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        raise InvalidType(f"state_dtype must be a floating point torch.dtype or None, got {shown(state_dtype)}")
    if return_varlen_states:
        if cu_seqlens is None or len(x) != 1:
            raise InvalidArgument(f"return_varlen_states needs cu_seqlens and a batch of 1 (one pack), x has {len(x)}")
        check_boundaries("cu_seqlens", cu_seqlens, x.shape[1])
    full = torch.promote_types(x.dtype, torch.float32)
    step = _step_sizes(dt, dt_bias, dt_softplus, dt_limit, full)
    u, A, B, C = (t.to(full) for t in (x, A, B, C))
    state = None if initial_states is None else initial_states.to(full)
    y, last = _scan(u, step, A, B, C, state, seq_idx)
    y = _finish(y, u, D, z).to(x.dtype)
    states = []
    if return_final_states:
        states.append(last)
    if cu_seqlens is not None and return_varlen_states:
        states.append(_states_at(u[0], step[0], A, B[0], state, cu_seqlens))
    return (y, *(s if state_dtype is None else s.to(state_dtype) for s in states)) if states else y


def ssd_ref(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `mamba_chunk_scan_combined`, a loop over steps. Returns (y, state after the last step)."""
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    full = torch.promote_types(x.dtype, torch.float32)
    step = _step_sizes(dt, dt_bias, dt_softplus, dt_limit, full)
    u, A, B, C = (t.to(full) for t in (x, A, B, C))
    per_group = x.shape[2] // B.shape[2]
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=full)
    h = h if initial_states is None else initial_states.to(full)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        B_t, C_t = (weights[:, t].repeat_interleave(per_group, 1)[:, :, None] for weights in (B, C))  # (b, h, 1, n)
        dt_t = step[:, t, :, None, None]
        h = torch.exp(dt_t * A[:, None, None]) * h + dt_t * u[:, t, :, :, None] * B_t
        outputs.append((h * C_t).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u
    return _finish(y, u, D, z).to(x.dtype), h


def mamba_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """`mamba_chunk_scan_combined` without states."""
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus)


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """A Mamba-2 block between its input projection and its output: convolution, scan, gated norm, projection.

    Args:
        zxbcdt: (b, l, 2 m + 2 d + 2 g n + h): a gated MLP of m channels (0 in Mamba-2 proper), the gate z, the inputs
            x, B and C of the convolution, dt; d = h * p.
        conv1d_weight: (d + 2 g n, width). conv1d_bias: (d + 2 g n,) or None.
        dt_bias, A: (h,). D: (h,), together with `headdim`, or (h, p).
        chunk_size, initial_states, seq_idx, dt_limit, return_final_states, state_dtype: as in
            `mamba_chunk_scan_combined`; dt passes through softplus.
        activation: of the convolution: "silu", "swish" or None.
        rmsnorm_weight: (d,) of a root-mean-square norm over groups, gated by z; None: y silu(z) without a norm.
        rmsnorm_eps, norm_before_gate: of that norm.
        outproj_weight: (m', m + d). outproj_bias: (m',). None: no output projection.
        headdim: p; required if D is (h,).
        ngroups: g.

    Returns:
        y (b, l, m') or (b, l, m + d); with `return_final_states`, (y, state after the last step (b, h, p, n)).
    """
    refuse_tracing("mamba_split_conv1d_scan_combined", "length")
    mlp, z, xBC, dt, p = _split(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, headdim, ngroups)
    by_channel = xBC.transpose(1, 2)
    xBC = causal_conv1d_fn(by_channel, conv1d_weight, conv1d_bias, seq_idx, activation=activation).transpose(1, 2)
    x, B, C = _heads(xBC, z.shape[-1], p, ngroups)
    y = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, None if rmsnorm_weight is not None else z.unflatten(-1, (-1, p)), dt_bias,
        initial_states, seq_idx, dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states,
        state_dtype=state_dtype,
    )  # fmt: skip
    y, rest = (y[0], y[1:]) if return_final_states else (y, ())
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, z.shape[-1] // ngroups, norm_before_gate)
    out = _project(y, mlp, outproj_weight, outproj_bias)
    return (out, *rest) if return_final_states else out


def mamba_split_conv1d_scan_ref(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """The definition of `mamba_split_conv1d_scan_combined`: the definitions of its parts, one after the other."""
    mlp, z, xBC, dt, p = _split(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, headdim, ngroups)
    convolved = causal_conv1d_ref(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = _heads(convolved.transpose(1, 2), z.shape[-1], p, ngroups)
    gate = None if rmsnorm_weight is not None else z.unflatten(-1, (-1, p))
    y, _ = ssd_ref(x, dt, A, B, C, D, gate, dt_bias, dt_softplus=True, dt_limit=dt_limit)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_norm_ref(y, rmsnorm_weight, None, z, rmsnorm_eps, z.shape[-1] // ngroups, norm_before_gate)
    return _project(y, mlp, outproj_weight, outproj_bias)


def _split(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    headdim: int | None,
    ngroups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The parts of an input projection: MLP, gate, inputs of the convolution, dt; and the channels of a head."""
    check_tensors(
        zxbcdt=(zxbcdt, "b l channels"), conv1d_weight=(conv1d_weight, "c width"), conv1d_bias=(conv1d_bias, "?c"),
        dt_bias=(dt_bias, "h"), A=(A, "h"), D=(D, "h | h p"),
    )  # fmt: skip
    p = D.shape[1] if D.ndim == 2 else headdim
    if p is None:
        raise InvalidArgument("headdim must be given, because D has one axis; or give D as (h, p)")
    for name, size in (("headdim", p), ("ngroups", ngroups)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidArgument(f"{name} must be a whole number of at least 1, got {shown(size)}")
    heads, d = len(D), len(D) * p
    mlp = zxbcdt.shape[-1] - d - len(conv1d_weight) - heads
    rest = len(conv1d_weight) - d
    if heads % ngroups or mlp < 0 or mlp % 2 or rest < 0 or rest % (2 * ngroups):
        raise InvalidArgument(
            f"zxbcdt {tuple(zxbcdt.shape)}, conv1d_weight {tuple(conv1d_weight.shape)} and D {tuple(D.shape)} do not "
            f"fit together: with headdim {p} and ngroups {ngroups}, zxbcdt has 2 m + 2 d + 2 g n + h channels"
        )
    mlp_part, z, xBC, dt = zxbcdt.split([mlp, d, len(conv1d_weight), heads], -1)
    return mlp_part, z, xBC, dt, p


def _heads(xBC: torch.Tensor, d: int, p: int, ngroups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rest = (xBC.shape[-1] - d) // 2
    x, B, C = xBC.split([d, rest, rest], -1)
    return x.unflatten(-1, (-1, p)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))


def _project(
    y: torch.Tensor, mlp: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if mlp.shape[-1]:
        gate, value = mlp.chunk(2, -1)
        y = torch.cat([F.silu(gate) * value, y], -1)
    check_tensors(y=(y, "b l d"), outproj_weight=(weight, "?m d"), outproj_bias=(bias, "?m"))
    if weight is None:
        return y
    return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))


def _step_sizes(
    dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float], full: torch.dtype
) -> torch.Tensor:
    dt = dt.to(full) if bias is None else dt.to(full) + bias.to(full)
    dt = F.softplus(dt) if softplus else dt
    limit = check_range("dt_limit", limit)
    return dt if limit == (0.0, math.inf) and softplus else dt.clamp(*limit)


def _scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    run = None
    if seq_idx is not None and seq_idx.shape[1]:
        run = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(1), (1, 0))
    with without_autocast(x.device.type):
        if needs_transforms():
            return ssd_chunks.scan_eager(x, dt, A, B, C, state, run)
        keep = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, dt, A, B, C, state)
        )  # fmt: skip
        y, last, _ = ssd_chunks.scan(x, dt, A, B, C, state, run, keep)
        return y, last


def _finish(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    if D is not None:
        y = torch.addcmul(y, x, (D if D.ndim == 2 else D[:, None]).to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))


def _states_at(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The state after each sequence of a pack: x (l, h, p), dt (l, h), B (l, g, n); (sequences, h, p, n)."""
    if cu_seqlens.is_meta:
        raise InvalidArgument('cu_seqlens is on the device "meta", so its numbers cannot be read; give it on the CPU')
    ends = cu_seqlens.tolist()
    states = []
    for start, end in itertools.pairwise(ends):
        at = slice(start, end)
        s = (dt[at] * A).double().cumsum(0)
        last = s[-1:] if end > start else s.new_zeros(1, s.shape[1])
        decay = torch.exp(last - s).to(x.dtype)
        B_ = B[at].repeat_interleave(x.shape[1] // B.shape[1], 1)
        h = torch.einsum("lhp,lhn->hpn", x[at] * (dt[at] * decay)[..., None], B_)
        if state is not None and start == 0:  # a pack may begin with empty sequences
            h = h + torch.exp(last[0]).to(x.dtype)[:, None, None] * state[0]
        states.append(h)
    return torch.stack(states) if states else x.new_zeros(0, *x.shape[1:], B.shape[2])


def _check(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    z: torch.Tensor | None, dt_bias: torch.Tensor | None, initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> None:  # fmt: skip
    sizes = check_tensors(x=(x, "b l h p"), dt=(dt, "b l h"), A=(A, "h"), B=(B, "b l g n"))
    if not sizes["g"] or sizes["h"] % sizes["g"]:
        raise InvalidArgument(
            f"B {tuple(B.shape)} has {sizes['g']} groups; they must divide the {sizes['h']} heads of x"
        )
    check_tensors(
        sizes, x=(x, "b l h p"), C=(C, "b l g n"), D=(D, "?h | h p"), z=(z, "?b l h p"), dt_bias=(dt_bias, "?h"),
        initial_states=(initial_states, "?b h p n"), seq_idx=(seq_idx, "?int:b l"),
    )  # fmt: skip
