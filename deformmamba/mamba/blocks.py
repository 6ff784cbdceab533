"""The residual block around a Mamba layer, and its MLP: mamba-ssm's `modules.block` and `modules.mlp`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.errors import InvalidArgument, UnsupportedCall
from deformmamba.mamba.arguments import (
    check_functions,
    check_input,
    check_parameters,
    check_residual,
    check_sizes,
    check_tensors,
    is_symbol,
)
from deformmamba.mamba.norm import RMSNorm, layer_norm_fn


class Block(nn.Module):
    """Residual sum, norm, mixer, and with `mlp_cls` once more with an MLP. The sum for the next block is returned too.

    Args:
        dim: channels.
        mixer_cls: called with `dim`, makes the mixer, for example a `Mamba`.
        mlp_cls: called with `dim`, makes the MLP; `nn.Identity`: without MLP.
        norm_cls: called with `dim`, makes each norm.
        fused_add_norm: the sum is computed in float32 and rounded once; the norm must be `nn.LayerNorm` or `RMSNorm`.
        residual_in_fp32: the sum is kept in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("Block", dim=dim)
        check_functions("Block", mixer_cls=mixer_cls, mlp_cls=mlp_cls, norm_cls=norm_cls)
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, (nn.LayerNorm, RMSNorm)):
            raise InvalidArgument(
                f"Block: norm_cls makes {type(self.norm).__name__}; with fused_add_norm it must make nn.LayerNorm or "
                "RMSNorm"
            )
        if not isinstance(getattr(self.norm, "weight", None), torch.Tensor):
            raise InvalidArgument(
                f"Block: norm_cls makes {type(self.norm).__name__}, which has no weight; give a norm with one, such as "
                "nn.LayerNorm"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixer's (or MLP's) output and the sum before it, both (b, l, dim); `residual` is the previous sum."""
        x, total = self._add_and_normalise(self.norm, hidden_states, residual)
        x = self.mixer(x, inference_params=inference_params, **mixer_kwargs)
        if getattr(self, "mlp", None) is not None:  # blocks that mamba-ssm 1 pickled have none
            x, total = self._add_and_normalise(self.norm2, x, total)
            x = self.mlp(x)  # type: ignore[misc]
        return x, total

    def _add_and_normalise(
        self, norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_and_normalise(norm, x, residual, self.fused_add_norm, self.residual_in_fp32)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of the mixer."""
        allocate: Any = getattr(self.mixer, "allocate_inference_cache", None)
        if allocate is None:
            raise UnsupportedCall(f"Block: its mixer {type(self.mixer).__name__} defines no allocate_inference_cache")
        return allocate(batch_size, max_seqlen, dtype=dtype, **kwargs)


class BlockWithoutMLP(Block):
    """`Block` with the arguments of mamba-ssm before version 2, which has it in `modules.mamba_simple`."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def add_and_normalise(
    norm: Any, x: torch.Tensor, residual: torch.Tensor | None, fused: bool, sum_in_float32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual (x if that is None), and the sum."""
    if fused:
        pair: tuple[torch.Tensor, torch.Tensor] = layer_norm_fn(
            x, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=sum_in_float32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
        return pair
    if not (torch.jit.is_tracing() or is_symbol(x)):  # a trace has no shapes to compare
        known = isinstance(norm, nn.LayerNorm | RMSNorm) and norm.weight.ndim == 1
        arguments = {"x": (x, "... d"), "residual": (residual, "?... d")}
        if known and not norm.weight.is_meta:  # offloaded weights arrive when their layer is called
            arguments["weight"] = (norm.weight, "d")
        check_tensors({"d": len(norm.weight)} if known else {}, **arguments)
        check_residual(x, residual)
    total = x if residual is None else x + residual
    y = norm(total.to(norm.weight.dtype))
    return y, total.float() if sum_in_float32 else total


class GatedMLP(nn.Module):
    """fc2(a * activation(gate)) with (a, gate) = fc1(x); the state_dict is that of mamba-ssm's `modules.mlp.GatedMLP`.

    Args:
        in_features, out_features: channels in and out; the same by default.
        hidden_features: channels between, 8/3 of `in_features` by default; rounded up to a multiple of `multiple_of`.
        activation: the function of the gate.
        bias: whether both layers have one.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_sizes("GatedMLP", in_features=in_features, multiple_of=multiple_of)
        optional = {"hidden_features": hidden_features, "out_features": out_features}
        check_sizes("GatedMLP", **{name: value for name, value in optional.items() if value is not None})
        check_functions("GatedMLP", activation=activation)
        check_parameters("GatedMLP", device, dtype)
        hidden = 8 * in_features // 3 if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        check_input("GatedMLP", "x", x, "...", self.fc1)
        a, gate = self.fc1(x).chunk(2, -1)
        y: torch.Tensor = self.fc2(a * self.activation(gate))
        return y
