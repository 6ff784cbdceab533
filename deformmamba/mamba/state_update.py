"""One step of a selective scan, for generating a sequence element by element: mamba-ssm's `selective_state_update`.

state = exp(dt A) state + dt B x        y = (C . state + D x) silu(z)        dt = softplus(dt + dt_bias)
"""

import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument
from deformmamba.mamba import step_cpu
from deformmamba.mamba.arguments import check_rows, check_tensors, check_written
from deformmamba.tensors import without_autocast


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next y; updates `state` in place. Computed in float32 (float64 for a float64 state).

    Args:
        state: (b, d, n), or (b, heads, d, n); written to.
        x, dt, z: (b, d), or (b, heads, d).
        A: (d, n), or (heads, d, n). D, dt_bias: (d,), or (heads, d), or None.
        B, C: (b, n), or (b, g, n); head i belongs to group i // (heads / g).
        dt_softplus: dt = softplus(dt + dt_bias), else without softplus.
        state_batch_indices: (b,) integers: the rows of a larger state that belong to the rows of x; a negative index
            gives 0 and leaves the state unchanged.

    Returns:
        y like x.

    Raises:
        InvalidArgument: a shape that does not fit, naming the argument and the rule.
    """
    if state_batch_indices is not None:
        _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
        check_rows("state_batch_indices", state_batch_indices, len(state))
        rows = state_batch_indices.long()
        used = (rows >= 0).nonzero()[:, 0]
        picked = state[rows[used]]
        x_, dt_, B_, C_ = (tensor[used] for tensor in (x, dt, B, C))
        z_ = None if z is None else z[used]
        y = selective_state_update(picked, x_, dt_, A, B_, C_, D, z_, dt_bias, dt_softplus)
        state[rows[used]] = picked
        return torch.zeros_like(x).index_copy(0, used, y)
    stepped = step_cpu.scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if stepped is not None:
        return stepped
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    heads = state if state.ndim == 4 else state[:, None]
    u, step, gate, A_, D_, bias, B_, C_ = _with_heads(state.ndim == 4, x, dt, z, A, D, dt_bias, B, C)
    full = torch.promote_types(torch.promote_types(state.dtype, x.dtype), torch.float32)
    # Mamba-2 has one rate and one dt per head, expanded, so one exponential serves all states of the head
    narrow = (A_, step) if bias is None else (A_, step, bias)
    if all(tensor.stride(-1) == 0 for tensor in narrow) and A_.stride(-2) == 0:
        A_, step = A_[..., :1, :1], step[..., :1]
        bias = None if bias is None else bias[..., :1]
    A_ = A_.to(full)
    step = step.to(full) if bias is None else step.to(full) + bias.to(full)
    step = F.softplus(step) if dt_softplus else step
    u, per_group = u.to(full), heads.shape[1] // B_.shape[1]
    B_, C_ = B_.to(full), C_.to(full)
    if per_group > 1:
        B_, C_ = B_.repeat_interleave(per_group, 1), C_.repeat_interleave(per_group, 1)
    given = (state, u, step, A_, B_)
    before = heads.clone() if torch.is_grad_enabled() and any(t.requires_grad for t in given) else heads
    new = torch.addcmul(before * torch.exp(step[..., None] * A_), (step * u)[..., None], B_[:, :, None])
    with without_autocast(state.device.type):
        y = torch.matmul(new, C_[..., None])[..., 0]
    y = y if D_ is None else torch.addcmul(y, u, D_.to(full))
    y = (y if gate is None else y * F.silu(gate.to(full))).to(x.dtype)
    heads.copy_(new)  # last, because an input may be a view of the state
    return y if state.ndim == 4 else y[:, 0]


def selective_state_update_ref(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """The definition of `selective_state_update`, head by head."""
    _check(state, x, dt, A, B, C, D, z, dt_bias)
    heads = state if state.ndim == 4 else state[:, None]
    x_, dt_, z_, A_, D_, bias, B_, C_ = _with_heads(state.ndim == 4, x, dt, z, A, D, dt_bias, B, C)
    outputs = []
    for i in range(heads.shape[1]):
        group = i // (heads.shape[1] // B_.shape[1])
        step = dt_[:, i] if bias is None else dt_[:, i] + bias[i]
        step = F.softplus(step) if dt_softplus else step
        h = torch.exp(step[..., None] * A_[i]) * heads[:, i] + (step * x_[:, i])[..., None] * B_[:, group, None]
        heads[:, i] = h.to(heads.dtype)
        y = (h * C_[:, group, None]).sum(-1)
        y = y if D_ is None else y + D_[i] * x_[:, i]
        outputs.append(y if z_ is None else y * F.silu(z_[:, i]))
    y = torch.stack(outputs, 1).to(x.dtype)
    return y if state.ndim == 4 else y[:, 0]


def _check(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None, z: torch.Tensor | None, dt_bias: torch.Tensor | None, rows: torch.Tensor | None = None,
) -> None:  # fmt: skip
    own = "b" if rows is None else "rows"
    check_tensors(state=(state, f"{own} d n | {own} heads d n"))
    heads = state.ndim == 4
    each = "heads d" if heads else "d"
    sizes = check_tensors(
        state=(state, f"{own} {each} n"), x=(x, f"b {each}"), dt=(dt, f"b {each}"), A=(A, f"{each} n"),
        D=(D, f"?{each}"), z=(z, f"?b {each}"), dt_bias=(dt_bias, f"?{each}"), state_batch_indices=(rows, "?int:b"),
        B=(B, "b n | b g n" if heads else "b n | b 1 n"),
    )  # fmt: skip
    g = sizes.setdefault("g", 1)
    check_tensors(sizes, x=(x, f"b {each}"), C=(C, "b g n" if g != 1 else "b n | b 1 n"))
    if heads and (not g or sizes["heads"] % g):
        raise InvalidArgument(f"B {tuple(B.shape)} has {g} groups; they must divide the {sizes['heads']} heads of x")
    check_written("state", state)


def _with_heads(
    heads: bool, x: torch.Tensor, dt: torch.Tensor, z: torch.Tensor | None, A: torch.Tensor,
    D: torch.Tensor | None, dt_bias: torch.Tensor | None, B: torch.Tensor, C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None,
           torch.Tensor, torch.Tensor]:  # fmt: skip
    """All arguments with an axis of heads (or groups)."""
    B, C = (weights[:, None] if weights.ndim == 2 else weights for weights in (B, C))
    if heads:
        return x, dt, z, A, D, dt_bias, B, C
    D, dt_bias = (None if weights is None else weights[None] for weights in (D, dt_bias))
    return x[:, None], dt[:, None], None if z is None else z[:, None], A[None], D, dt_bias, B, C
