"""What the blocks `Mamba` and `Mamba2` share: sizes, initial step sizes, layers that a user replaced, and states."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, shown
from deformmamba.layers import Block
from deformmamba.mamba.arguments import check_input, check_parameters, check_positive, check_sizes
from deformmamba.mamba.causal_conv import causal_conv1d_fn, causal_conv1d_update
from deformmamba.tensors import floating_weight


class Mixer(Block):
    """Marks the rates and gains of the scan, and nothing else, with `_no_weight_decay`, as mamba-ssm does."""

    def exempt(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name != "gamma":
                parameter._no_weight_decay = True  # type: ignore[attr-defined]


def inner_channels(where: str, d_model: int, expand: float, dt_min: float, dt_max: float, **sizes: Any) -> int:
    """expand * d_model, after a check of all sizes of a block and of the range of its initial step sizes."""
    check_sizes(where, d_model=d_model, **sizes)
    check_positive(where, expand=expand, dt_min=dt_min, dt_max=dt_max)
    if dt_min > dt_max:
        raise InvalidArgument(f"{where}: dt_min {dt_min:g} is above dt_max {dt_max:g}")
    if int(expand * d_model) < 1:
        raise InvalidArgument(f"{where}: expand {expand:g} leaves no inner channel for d_model {d_model}")
    return int(expand * d_model)


def initial_dt(channels: int, dt_min: float, dt_max: float, floor: float, device: Any, dtype: Any) -> torch.Tensor:
    """Bias whose softplus is log-uniform between dt_min and dt_max."""
    span = math.log(dt_max) - math.log(dt_min)
    dt = torch.exp(torch.rand(channels, device=device, dtype=dtype) * span + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_plain(layer: Any) -> bool:
    """Whether a call of the layer computes with its weight and bias alone, so that these may be used instead.

    It does not if a user replaced the layer (an adapter such as LoRA, a quantised layer) or gave it hooks.
    """
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    replaced = "forward" in layer.__dict__ or type(layer).forward not in (nn.Linear.forward, nn.Conv1d.forward)
    return not (replaced or any(hooks))


def causal_convolution(
    conv: Any, x: torch.Tensor, activation: str, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """The causal convolution of x (b, d, l) and its activation."""
    if is_plain(conv):
        y: torch.Tensor = causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, seq_idx, activation=activation)
        return y
    if seq_idx is not None:
        raise UnsupportedCall(
            f"Mamba2: conv1d is a {type(conv).__name__}, or has hooks; a pack of sequences needs a plain convolution: "
            "merge the adapter, remove the hooks, or give the sequences as rows of a batch"
        )
    return F.silu(conv(x)[..., : x.shape[-1]])


def convolution_step(block: str, conv: Any, x: torch.Tensor, state: torch.Tensor, activation: str) -> torch.Tensor:
    """The convolution of one step, (b, d), which updates its state."""
    if not isinstance(conv, nn.Conv1d):
        raise UnsupportedCall(
            f"{block}.step: conv1d is a {type(conv).__name__}; a step needs the weight of a convolution, so merge the "
            "adapter first"
        )
    y: torch.Tensor = causal_conv1d_update(x, state, conv.weight.squeeze(1), conv.bias, activation)
    return y


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype of a layer's weight; PyTorch's default where it has none of floating point (a quantised layer)."""
    weight = floating_weight(layer)
    return torch.get_default_dtype() if weight is None else weight.dtype


def check_step(where: str, hidden_states: Any, first: nn.Module) -> None:
    """Checks the input of one step, (b, 1, d_model), of a block that begins with the layer `first`."""
    check_input(where, "hidden_states", hidden_states, "b 1", first)
    if hidden_states.shape[1] != 1:
        raise InvalidArgument(f"{where} takes one element at a time, (b, 1, d_model), got {tuple(hidden_states.shape)}")


def check_cache(where: str, batch_size: int, dtype: torch.dtype | None) -> None:
    """Checks the arguments of `allocate_inference_cache`."""
    check_sizes(f"{where}.allocate_inference_cache", least=0, batch_size=batch_size)
    check_parameters(f"{where}.allocate_inference_cache", None, dtype)


def kept_states(
    block: Any, inference_params: Any, batch_size: int, initialize_states: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (conv_state, ssm_state) of a block in `inference_params`, which get zero ones where needed."""
    if block.layer_idx is None:
        raise InvalidArgument(
            f"{type(block).__name__}: inference_params needs layer_idx; give it when the block is built"
        )
    kept = inference_params.key_value_memory_dict
    if block.layer_idx not in kept:
        kept[block.layer_idx] = block.allocate_inference_cache(batch_size, 0)
    elif not _is_pair_of_tensors(kept[block.layer_idx]):
        raise InvalidType(
            f"{type(block).__name__}: inference_params has {shown(kept[block.layer_idx])} for layer {block.layer_idx}; "
            "it must be (conv_state, ssm_state), as allocate_inference_cache returns"
        )
    elif (before := len(kept[block.layer_idx][0])) != batch_size:
        if inference_params.seqlen_offset > 0:
            raise InvalidArgument(
                f"{type(block).__name__}: inference_params has the states of {before} sequences, but the input has "
                f"{batch_size}; call its reset before the first step of other sequences"
            )
        kept[block.layer_idx] = tuple(x.new_zeros(batch_size, *x.shape[1:]) for x in kept[block.layer_idx])
    elif initialize_states:
        for state in kept[block.layer_idx]:
            state.zero_()
    return kept[block.layer_idx]


def _is_pair_of_tensors(states: Any) -> bool:
    pair = isinstance(states, tuple | list) and len(states) == 2
    return pair and all(isinstance(state, torch.Tensor) and state.ndim > 0 for state in states)


def check_inference(where: str, inference_params: Any) -> None:
    """Checks that `inference_params` can keep states."""
    found = getattr(inference_params, "key_value_memory_dict", None)
    if found is None or getattr(inference_params, "seqlen_offset", None) is None:
        raise InvalidType(
            f"{where}: inference_params must have key_value_memory_dict and seqlen_offset, as "
            f"deformmamba.mamba.generation.InferenceParams has, got {shown(inference_params)}"
        )
