"""What the blocks `Mamba` and `Mamba2` share: sizes, initial step sizes, and the states of `inference_params`."""

import math
from typing import Any

import torch
from torch import nn

from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.mamba.arguments import check_input, check_parameters, check_positive, check_sizes


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
