"""The norms of Mamba networks: root-mean-square and layer norm, with a residual (Mamba) or with a gate (Mamba-2).

The interface is that of mamba-ssm's `ops.triton.layer_norm` and `ops.triton.layernorm_gated`. A norm is two sums over
channels, so the implementation is the definition in plain PyTorch, computed in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.annotations import is_number
from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, shown
from deformmamba.mamba.arguments import check_parameters, check_residual, check_sizes, check_tensors


def rms_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """x / sqrt(mean of x² + eps) weight + bias over the last axis, after `residual` was added to x.

    Computed in x's dtype, or in float32 with `upcast`. With `prenorm` also returns the sum x + residual."""
    return _normalise(x, weight, bias, residual, eps, prenorm, upcast, False, True)


def layer_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Any:
    """(x - mean) / sqrt(variance + eps) weight + bias over the last axis; the rest as in `rms_norm_ref`."""
    return _normalise(x, weight, bias, residual, eps, prenorm, upcast, False, False)


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Root-mean-square norm of dropout(x) + residual, computed in float32.

    Args:
        x, residual: (..., d). weight, bias: (d,).
        dropout_p: probability of dropping an element of x (not of the residual).
        prenorm: also return the sum, for the next block.
        residual_in_fp32: the sum is returned in float32 when no residual is given.
        x1, weight1, bias1, rowscale, return_dropout_mask: not supported; must keep their defaults.

    Returns:
        The norm in x's dtype, or (norm, sum).
    """
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask,
    )  # fmt: skip


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Layer norm of dropout(x) + residual (`is_rms_norm`: root-mean-square norm); the rest as in `rms_norm_fn`."""
    _refuse(x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale, return_dropout_mask=return_dropout_mask or None)
    _check_dropout(dropout_p)
    if dropout_p:
        check_tensors(x=(x, "... d"))
        x = F.dropout(x, dropout_p)
    return _normalise(x, weight, bias, residual, eps, prenorm, True, residual_in_fp32, is_rms_norm)


def _check_dropout(dropout_p: float) -> None:
    if not torch.compiler.is_compiling() and not (is_number(dropout_p) and 0 <= dropout_p <= 1):
        raise InvalidArgument(f"dropout_p must be between 0 and 1, got {shown(dropout_p)}")


def _check_eps(eps: float) -> None:
    if not torch.compiler.is_compiling() and not is_number(eps):
        raise InvalidType(f"eps must be a number, got {shown(eps)}")


def _check_module(where: str, hidden_size: Any, eps: float, device: Any, dtype: Any) -> None:
    """Checks the arguments of a norm's module; `hidden_size` may be a shape of one number, as in `nn.LayerNorm`."""
    alone = isinstance(hidden_size, tuple | list) and len(hidden_size) == 1
    check_sizes(where, least=0, hidden_size=hidden_size[0] if alone else hidden_size)
    _check_eps(eps)
    check_parameters(where, device, dtype)


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedCall(f"{name} is not supported here; leave it out")


def _normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    prenorm: bool,
    upcast: bool,
    sum_in_float32: bool,
    rms: bool,
) -> Any:
    check_tensors(x=(x, "... d"), weight=(weight, "d"), bias=(bias, "?d"), residual=(residual, "?... d"))
    check_residual(x, residual)
    _check_eps(eps)
    full = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    total = x.to(full) if residual is None else x.to(full) + residual.to(full)
    y = _standardise(total, rms, eps) * weight.to(full)
    y = (y if bias is None else y + bias.to(full)).to(x.dtype)
    if not prenorm:
        return y
    kept = residual.dtype if residual is not None else torch.float32 if sum_in_float32 else x.dtype
    return y, total.to(torch.promote_types(kept, x.dtype) if residual is None else kept)


def _standardise(x: torch.Tensor, rms: bool, eps: float) -> torch.Tensor:
    x = x if rms else x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight; the state_dict is that of mamba-ssm's `ops.triton.layer_norm.RMSNorm`."""

    dropout_p: float = 0.0  # for modules that mamba-ssm pickled, which have `drop` instead

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check_module("RMSNorm", hidden_size, eps, device, dtype)
        _check_dropout(dropout_p)
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        drop = getattr(self, "drop", None)
        dropout_p: float = self.dropout_p if drop is None else drop.p
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


# ---------------------------------------------------------------------------------------------------------- with a gate


def gated_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> torch.Tensor:
    """The definition of `rmsnorm_fn`, group by group: mamba-ssm's `ops.triton.layernorm_gated.rms_norm_ref`."""
    size = _check_gated(x, weight, bias, z, eps, group_size)
    full = torch.promote_types(x.dtype, torch.float32) if upcast else x.dtype
    y = x.to(full)
    gate = None if z is None else F.silu(z.to(full))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.split(size, -1)
    y = torch.cat([group / torch.sqrt((group**2).mean(-1, keepdim=True) + eps) for group in groups], -1)
    y = y * weight.to(full)
    y = y if bias is None else y + bias.to(full)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def _check_gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor | None, eps: float,
    group_size: int | None,
) -> int:  # fmt: skip
    """The channels of a group, after a check of the arguments of a norm with a gate."""
    d = check_tensors(x=(x, "... d"), weight=(weight, "d"), bias=(bias, "?d"), z=(z, "?... d"))["d"]
    _check_eps(eps)
    size = d if group_size is None else group_size
    if not isinstance(size, int) or isinstance(size, bool) or (d and (size < 1 or d % size)):
        raise InvalidArgument(f"group_size is {shown(group_size)}; it must divide the {d} channels of x")
    if z is not None and z.shape != x.shape:
        raise InvalidArgument(f"z must have the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    return size


def layernorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> torch.Tensor:
    """Layer norm (`is_rms_norm`: root-mean-square norm) with a gate, computed in float32.

    Args:
        x: (..., d). weight: (d,). bias: (d,) or None.
        z: like x, or None: the result is norm(x) silu(z), or norm(x silu(z)) with `norm_before_gate=False`.
        group_size: channels that are normalised together; all of them by default. Must divide d.

    Returns:
        (..., d) in x's dtype.
    """
    size = _check_gated(x, weight, bias, z, eps, group_size)
    d = x.shape[-1]
    full = torch.promote_types(x.dtype, torch.float32)
    y = x.to(full)
    gate = None if z is None else F.silu(z.to(full))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = _standardise(y.unflatten(-1, (d // size, size)), is_rms_norm, eps).flatten(-2) if d else y
    y = y * weight.to(full)
    y = y if bias is None else y + bias.to(full)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """Root-mean-square norm with a gate; arguments as in `layernorm_fn`."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class RMSNormGated(nn.Module):
    """`rmsnorm_fn` with a weight; the state_dict is that of mamba-ssm's `ops.triton.layernorm_gated.RMSNorm`."""

    rms = True
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_module(type(self).__name__, hidden_size, eps, device, dtype)
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return layernorm_fn(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
            is_rms_norm=self.rms,
        )


class LayerNormGated(RMSNormGated):
    """`layernorm_fn` with weight and bias: mamba-ssm's `ops.triton.layernorm_gated.LayerNorm`."""

    rms = False
