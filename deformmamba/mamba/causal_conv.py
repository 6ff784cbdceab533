"""Mamba's short convolution: depthwise, along time, causal. The interface is that of the package causal-conv1d.

    y[b, d, t] = bias[d] + sum over k of weight[d, k] x[b, d, t - (width - 1) + k]

`causal_conv1d_ref` and `causal_conv1d_update_ref` are the definitions (loops over steps); the other functions give the
same results. Half-precision inputs are computed in float32.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument, shown
from deformmamba.mamba import causal_conv_cpu, step_cpu
from deformmamba.mamba.arguments import check_boundaries, check_choice, check_rows, check_tensors, check_written
from deformmamba.tensors import keeps_precision
from deformmamba.torch_private import constant_when_compiled, differentiates_by_transform, transforms_are_active

_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """The convolution of whole sequences.

    Args:
        x: (b, d, l), with time or channels consecutive in memory (other layouts are copied).
        weight: (d, width). bias: (d,) or None.
        seq_idx: (b, l) integers; a step uses only steps with the same number, and is 0 if the number is negative
            (padding). Not together with states. (For old callers, the activation may be passed here.)
        initial_states: (b, d, width - 1), the steps before the first; zero by default.
        return_final_states: also return the last steps (b, d, width - 1), with which a later call can continue.
        final_states_out: a tensor to write the final states to.
        activation: None, "silu" or "swish" (the same as "silu").

    Returns:
        y (b, d, l) in x's dtype, or (y, final states).

    Raises:
        InvalidArgument, InvalidType: a shape or dtype that does not fit, naming the argument and the rule.
    """
    if isinstance(seq_idx, str):  # causal-conv1d before 1.1 had the activation at this position
        seq_idx, activation = None, seq_idx
    b, d, length, width = _check(
        x, weight, bias, activation, seq_idx=(seq_idx, "?int:b l"), initial_states=(initial_states, "?b d width-1"),
        final_states_out=(final_states_out, "?b d width-1"),
    )  # fmt: skip
    full = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    kernel, offset = weight.to(full), None if bias is None else bias.to(full)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise InvalidArgument(
                "seq_idx cannot be combined with initial_states or return_final_states; leave one of them out"
            )
        y = _packed(x.to(full), kernel, offset, seq_idx)
    elif initial_states is not None:
        extended = torch.cat([initial_states.to(full), x.to(full)], -1)
        y = _convolve(extended, kernel, offset)[..., width - 1 :]
    else:
        y = _convolve(x.to(full), kernel, offset)
    y = y if activation is None else F.silu(y)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0)
    y = y.to(x.dtype)
    if not return_final_states:
        return y
    before = x.new_zeros(b, d, width - 1) if initial_states is None else initial_states.to(x.dtype)
    last = torch.cat([before, x[..., max(length - width + 1, 0) :]], -1)[..., -(width - 1) :] if width > 1 else before
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """The definition of `causal_conv1d_fn`: step by step, in the dtype of the weight."""
    b, d, length, width = _check(x, weight, bias, activation, initial_states=(initial_states, "?b d width-1"))
    state = x.new_zeros(b, d, width - 1) if initial_states is None else initial_states
    seen = torch.cat([state, x], -1).to(weight.dtype)
    y = seen.new_zeros(b, d, length) if bias is None else bias[:, None].to(seen.dtype).expand(b, d, length)
    for t in range(length):
        step = (weight * seen[..., t : t + width]).sum(-1)
        y = y.index_add(2, torch.tensor([t], device=x.device), step[..., None])
    y = (y if activation is None else F.silu(y)).to(x.dtype)
    if not return_final_states:
        return y
    last = seen[..., length:].to(x.dtype)
    return y, last if final_states_out is None else final_states_out.copy_(last)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of the next steps; updates `conv_state` in place.

    Args:
        x: (b, d) or (b, d, l), the next steps.
        conv_state: (b, d, s) with s >= width - 1, the last steps; written to.
        weight: (d, width). bias: (d,) or None. activation: None, "silu" or "swish".
        cache_seqlens: (b,) integers: conv_state is a ring, and the next step goes to place cache_seqlens % s.
        conv_state_indices: (b,) integers: the rows of a larger conv_state that belong to the rows of x; a negative
            index gives 0 and leaves the states unchanged.

    Returns:
        y like x.
    """
    known = activation is None or (isinstance(activation, str) and activation in _ACTIVATIONS)
    if known and cache_seqlens is None and conv_state_indices is None:
        y = step_cpu.convolution(x, conv_state, weight, bias, activation is not None)
        if y is not None:
            return y
    _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    steps = x[..., None] if x.ndim == 2 else x
    if conv_state_indices is None:
        y = _update(steps, conv_state, weight, bias, activation, cache_seqlens)
    else:
        check_rows("conv_state_indices", conv_state_indices, len(conv_state))
        rows = conv_state_indices.long()
        used = (rows >= 0).nonzero()[:, 0]
        picked = conv_state[rows[used]]
        lengths = None if cache_seqlens is None else cache_seqlens[used]
        y = torch.zeros_like(steps).index_copy(0, used, _update(steps[used], picked, weight, bias, activation, lengths))
        conv_state[rows[used]] = picked
    return y[..., 0] if x.ndim == 2 else y


def _check_update(
    x: Any, conv_state: Any, weight: Any, bias: Any, activation: Any, cache_seqlens: Any, rows: Any = None
) -> None:
    check_choice("activation", activation, _ACTIVATIONS)
    own = "b" if rows is None else "rows"
    sizes = check_tensors(
        x=(x, "b d | b d l"), weight=(weight, "d width"), bias=(bias, "?d"), conv_state=(conv_state, f"{own} d s"),
        cache_seqlens=(cache_seqlens, "?int:b"), conv_state_indices=(rows, "?int:b"),
    )  # fmt: skip
    if not sizes["width"] or sizes["s"] < sizes["width"] - 1 or (not sizes["s"] and cache_seqlens is not None):
        raise InvalidArgument(
            f"conv_state {tuple(conv_state.shape)} has {sizes['s']} steps; a weight of width {sizes['width']} needs at "
            "least width - 1, and cache_seqlens at least 1"
        )
    check_written("conv_state", conv_state)


def causal_conv1d_update_ref(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition of `causal_conv1d_update`: step by step, sequence by sequence."""
    _check_update(x, conv_state, weight, bias, activation, cache_seqlens)
    steps = x[..., None] if x.ndim == 2 else x
    width, size = weight.shape[1], conv_state.shape[2]
    rows = []
    for b in range(len(steps)):
        start = 0 if cache_seqlens is None else int(cache_seqlens[b])
        # the oldest step first: in a ring buffer the next position to write holds the oldest step
        ring = conv_state[b] if cache_seqlens is None else conv_state[b].roll(-(start % size), -1)
        outputs = []
        for t in range(steps.shape[2]):
            seen = torch.cat([ring, steps[b, :, t : t + 1].to(ring.dtype)], -1)
            outputs.append((seen[:, -width:].to(weight.dtype) * weight).sum(-1))
            ring = seen[:, 1:]
        turned = 0 if cache_seqlens is None else (start + steps.shape[2]) % size
        conv_state[b].copy_(ring.roll(turned, -1))
        rows.append(torch.stack(outputs, -1) if outputs else steps[b].to(weight.dtype))
    y = torch.stack(rows) if rows else steps.to(weight.dtype)
    y = y if bias is None else y + bias[:, None]
    y = (y if activation is None else F.silu(y)).to(x.dtype)
    return y[..., 0] if x.ndim == 2 else y


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last `state_len` steps of every sequence in a pack, zero before its start.

    Args:
        x: (total length, d), sequences one after the other.
        cu_seqlens: (sequences + 1,) sorted integers: the start of each sequence, and the total length.
        state_len: steps to keep.

    Returns:
        (sequences, d, state_len).

    Raises:
        InvalidArgument, InvalidType: x is no (total length, d), or cu_seqlens is not as described.
    """
    _check_pack(x, cu_seqlens, state_len)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    steps = ends - state_len + torch.arange(state_len, device=x.device)
    states = x[steps.clamp(min=0)] if len(x) else x.new_zeros(*steps.shape, x.shape[1])
    return states.masked_fill((steps < starts)[..., None], 0).transpose(1, 2)


def _check_pack(x: Any, cu_seqlens: Any, state_len: Any) -> None:
    check_tensors(x=(x, "any:l d"), cu_seqlens=(cu_seqlens, "int:sequences+1"))
    check_boundaries("cu_seqlens", cu_seqlens, len(x))
    if not isinstance(state_len, int) or isinstance(state_len, bool) or state_len < 0:
        raise InvalidArgument(f"state_len must be a whole number of at least 0, got {shown(state_len)}")


def causal_conv1d_varlen_states_ref(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The definition of `causal_conv1d_varlen_states`, sequence by sequence."""
    _check_pack(x, cu_seqlens, state_len)
    ends = cu_seqlens.tolist()
    states = x.new_zeros(len(ends) - 1, x.shape[1], state_len)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        for place in range(1, min(state_len, end - start) + 1):
            states[i, :, -place] = x[end - place]
    return states


def _check(x: Any, weight: Any, bias: Any, activation: Any, **others: Any) -> tuple[int, int, int, int]:
    """(b, d, l, width), after a check of the arguments; the patterns of `others` may contain "width-1"."""
    check_choice("activation", activation, _ACTIVATIONS)
    given = {"x": (x, "b d l"), "weight": (weight, "d width"), "bias": (bias, "?d")}
    sizes = check_tensors(**given)
    if not sizes["width"]:
        raise InvalidArgument(
            f"weight must have shape (d, width) with a width of at least 1, got {tuple(weight.shape)}"
        )
    check_tensors({**sizes, "width-1": sizes["width"] - 1}, **given, **others)
    return sizes["b"], sizes["d"], sizes["l"], sizes["width"]


@constant_when_compiled
def needs_transforms() -> bool:
    """Whether torch.func or forward-mode differentiation is active, for which the operators have no rules."""
    return transforms_are_active() or differentiates_by_transform()


def _of_no_steps(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y (b, d, 0) of x (b, d, 0), for which PyTorch has no convolution."""
    y = x * weight[:, -1:]
    return y if bias is None else y + bias[:, None]


@keeps_precision
def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y (b, d, l) of x (b, d, l), all in one dtype."""
    if not x.shape[-1]:
        return _of_no_steps(x, weight, bias)
    if causal_conv_cpu.usable(x) and not needs_transforms():
        return causal_conv_cpu.causal_conv(x, weight, bias)
    return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))


def _packed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor) -> torch.Tensor:
    """The same, but a step uses only steps with the same number in seq_idx."""
    width = weight.shape[1]
    y = x * weight[:, -1:]
    for back in range(1, min(width, x.shape[-1])):
        same = (seq_idx[:, back:] == seq_idx[:, :-back])[:, None]
        y = y + F.pad(x[..., :-back] * same, (back, 0)) * weight[:, width - 1 - back, None]
    return y if bias is None else y + bias[:, None]


@keeps_precision
def _update(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    cache_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """y (b, d, l) of x (b, d, l); writes to state."""
    b, d, length = x.shape
    width, size = weight.shape[1], state.shape[2]
    full = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if cache_seqlens is None:
        seen = torch.cat([state, x.to(state.dtype)], -1)
        state.copy_(seen[..., seen.shape[-1] - size :])
    else:
        steps = torch.arange(1 - width, length, device=x.device) + cache_seqlens[:, None]
        places = steps.remainder(size)[:, None].expand(b, d, -1).long()
        seen = torch.cat([state.gather(2, places[..., : width - 1]), x.to(state.dtype)], -1)
        newest = slice(max(length - size, 0), None)  # the others would be overwritten at once
        state.scatter_(2, places[..., width - 1 :][..., newest], x[..., newest].to(state.dtype))
    seen, kernel = seen[..., seen.shape[-1] - (length + width - 1) :].to(full), weight.to(full)
    if not length:
        y = _of_no_steps(x.to(full), kernel, None if bias is None else bias.to(full))
    elif length == 1:
        y = (seen * kernel).sum(-1, keepdim=True)
        y = y if bias is None else y + bias.to(full)[:, None]
    else:
        y = F.conv1d(seen, kernel[:, None], None if bias is None else bias.to(full), groups=d)
    return (y if activation is None else F.silu(y)).to(x.dtype)
