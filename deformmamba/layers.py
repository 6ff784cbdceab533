"""The blocks of figure 1, in its order: each is an `nn.Module` from (b, c, h, w) to (b, c, h, w) that works alone.

(B) `DeformMambaBlock` = (B-1) `ModulatedDeformBlock` + (B-2) `VisionMambaBlock` around (B-3) `SS2D`; (C)
`MultiViewContext`; and the patch embedding, merging and expanding of the U-shaped shell (VM-UNet's).

Memory format. Every block computes channels last. A tensor in `torch.channels_last` format, which these blocks return,
is not copied; a tensor in any other format is copied once.

Every block takes `device` and `dtype` for its parameters, as PyTorch's own layers do; None: PyTorch's defaults.

Weight decay. Parameters that are usually left out of it (`A_log`, `D`, `dt_bias`, and everything with one axis: norms
and biases) have the attribute `_no_weight_decay`, as in Mamba. `deformmamba.fit` honours it.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from deformmamba.annotations import is_integer, is_number, is_one_of
from deformmamba.deform import modulated_deform_conv2d
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.scan import Discretization, check_backend, scan_checked_map
from deformmamba.tensors import floating_weight, in_autocast, overridable, refuse_tracing, without_autocast
from deformmamba.torch_private import NotScriptable

Device = torch.device | str | int | None
Dtype = torch.dtype | None
Module = TypeVar("Module", bound=nn.Module)

torch.fx.wrap("rearrange")  # einops does not support symbolic values

DIRECTIONS = (1, 2, 4)
# largest dilation rate: the padding grows with it, and the config of a checkpoint is not trusted
LARGEST_RATE = 256
# parameters of a selective scan that are rates and gains, not weights of a linear map
NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")


def exempt_from_weight_decay(module: Module) -> Module:
    """Sets `_no_weight_decay` on every parameter named in `NO_WEIGHT_DECAY` or with fewer than two axes."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or name.rpartition(".")[2] in NO_WEIGHT_DECAY:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return module


def _exempt_again(module: "Block", _: object) -> None:
    module.exempt()


class Block(NotScriptable, nn.Module):
    """A module whose parameters keep their attribute `_no_weight_decay` in copies, pickles, loaded states and moves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_exempt_again)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.exempt()

    def _apply(self, *args: Any, **kwargs: Any) -> "Block":
        super()._apply(*args, **kwargs)  # `to_empty` makes new parameters
        self.exempt()
        return self

    def exempt(self) -> None:
        """Sets `_no_weight_decay` on the parameters that are usually left out of weight decay."""
        exempt_from_weight_decay(self)


def check_map(
    block: nn.Module, x: torch.Tensor, channels: int, *, multiple: int = 1, first: nn.Module | None = None
) -> None:
    """Checks that `x` is a floating point (b, channels, h, w) map with h and w multiples of `multiple`, and not 0.

    Outside autocast, it must also have the dtype of the weight of `first`, a layer that it meets. (A layer that a user
    has put there, such as a quantised one or a LoRA adapter, may have no weight, and has its own rules.)

    Raises:
        InvalidArgument: it is not; one line that names the block.
    """
    if isinstance(x, torch.fx.Proxy):  # a symbolic trace has no shapes
        return
    if (
        not isinstance(x, torch.Tensor)
        or x.ndim != 4
        or x.shape[1] != channels
        or not x.is_floating_point()
        or any(n < multiple or n % multiple for n in x.shape[2:])
    ):
        given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        sizes = f"h and w multiples of {multiple}" if multiple > 1 else "h and w at least 1"
        raise InvalidArgument(
            f"{type(block).__name__}: given {given}; wanted floating point (b, {channels}, h, w), {sizes}"
        )
    weight = floating_weight(first)
    if weight is not None and x.dtype != weight.dtype and not in_autocast(x.device.type):
        raise InvalidArgument(
            f"{type(block).__name__}: given {x.dtype}, and its weights are {weight.dtype}; convert one of the two "
            "(x.to(...) or block.to(...)), or use torch.autocast"
        )


_FRACTIONAL = ("expand", "dt_min", "dt_max")
_OPTIONAL = ("dt_rank", "branch_channels")


def _positive(block: str, **arguments: Any) -> list[Any]:
    """The arguments as Python's numbers, because numpy's small integers overflow; the `_OPTIONAL` ones may be None.

    Raises:
        InvalidType, InvalidArgument: one is not a number above 0.
    """
    found: list[Any] = []
    for name, value in arguments.items():
        if value is None and name in _OPTIONAL:
            found.append(None)
            continue
        kind, accepts = ("a number", is_number) if name in _FRACTIONAL else ("an integer", is_integer)
        if not accepts(value):
            raise InvalidType(f"{block}: {name} must be {kind} above 0, not {shown(value)}")
        if not 0 < value < math.inf:
            raise InvalidArgument(f"{block}: {name} is {value}; it must be greater than 0 and finite")
        found.append(float(value) if name in _FRACTIONAL else operator.index(value))
    return found


def _last(x: torch.Tensor) -> torch.Tensor:
    """(b, c, h, w) as contiguous (b, h, w, c): a view where the memory format is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _first(x: torch.Tensor) -> torch.Tensor:
    """(b, h, w, c) as (b, c, h, w), a view in channels_last format."""
    return x.permute(0, 3, 1, 2)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _first(super().forward(_last(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of a sample with probability `p`, else scale by 1/(1-p)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not is_number(p):
            raise InvalidType(f"DropPath: p must be a number from 0 to less than 1, not {shown(p)}")
        if not 0 <= p < 1:
            raise InvalidArgument(f"DropPath: p is {p}; it must be in [0, 1)")
        self.p = float(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ChannelAttention(Block):
    """A factor for each channel from the channel means: pool, 1x1, ReLU, 1x1, sigmoid. Keeps (b, channels, h, w).

    Source: section 2.2 names channel attention only. The form is RCAN's (Zhang et al. 2018), with channels / reduction
    inner channels, at least 4.
    """

    def __init__(self, channels: int, reduction: int = 16, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        channels, reduction = _positive("ChannelAttention", channels=channels, reduction=reduction)
        self.channels = channels
        squeezed = max(channels // reduction, 4)
        self.squeeze = nn.Linear(channels, squeezed, device=device, dtype=dtype)
        self.excite = nn.Linear(squeezed, channels, device=device, dtype=dtype)
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_map(self, x, self.channels, first=self.squeeze)
        weight = self.excite(F.relu(self.squeeze(x.mean((-2, -1))))).sigmoid()
        return x * weight[:, :, None, None]


class _ZeroConvolution(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws as many random numbers as a plain convolution
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ModulatedDeformBlock(Block):
    """Figure 1 (B-1): a convolution that learns, from the image, where to sample and how much each sample counts.

    Y(p) = sum over k of w_k * X(p + p_k + dp_k) * dm_k, the offsets dp (2 a tap, in pixels, ordered dy, dx) and
    modulations dm in (0, 1) from one convolution of X. That convolution starts at zero: no offset, every dm = 0.5.

    Args:
        channels: channels in.
        out_channels: channels out; as many as in by default.
        kernel_size, stride, dilation: of the sampling, "same" padding; (h, w) becomes (ceil(h / stride), ...).
        groups: of the weighted sum, as in `nn.Conv2d`; divides both channel counts.
        deform_groups: groups of channels, each with its own offsets; divides `channels`.
        bias: whether the weighted sum has one.
        norm: of the output: "layer" (over channels), anything that makes a module of a channel count
            (`nn.BatchNorm2d`), or None (the paper's).
        activation: a module for the output after `norm`, or None (the paper's).

    Source: equation 5; DCNv2 (Zhu et al. 2019). Departure: the printed sizes of dp and dm, 2C and C channels, cannot be
    built; they are 2K and K for K taps. Positions outside the map count as zero.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        norm: str | Callable[[int], nn.Module] | None = None,
        activation: nn.Module | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        channels, out_channels, kernel_size, stride, dilation, groups, deform_groups = _positive(
            "ModulatedDeformBlock",
            channels=channels,
            out_channels=channels if out_channels is None else out_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            deform_groups=deform_groups,
        )
        if channels % deform_groups or channels % groups or out_channels % groups or kernel_size % 2 == 0:
            raise InvalidArgument(
                f"ModulatedDeformBlock: channels={channels}, out_channels={out_channels}, groups={groups}, "
                f"deform_groups={deform_groups}, kernel_size={kernel_size}; groups must divide both channel counts, "
                "deform_groups divide channels, kernel_size be odd"
            )
        _check_activation("ModulatedDeformBlock", activation)
        self.channels = channels
        self.stride, self.dilation, self.padding = stride, dilation, dilation * (kernel_size // 2)
        self.taps = deform_groups * kernel_size**2
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_channels, channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None
        self.offset_mask = _ZeroConvolution(
            channels, 3 * self.taps, kernel_size, stride=stride, padding=self.padding, dilation=dilation, **factory
        )
        self.norm = _norm(norm, out_channels, factory)
        self.activation = activation
        self.reset_parameters()
        exempt_from_weight_decay(self)

    def reset_parameters(self) -> None:
        """Draws new initial weights; the offsets have their own `reset_parameters`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def offsets_and_mask(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dp (b, 2 * groups * taps, h', w') in pixels and dm (b, groups * taps, h', w') that `forward` uses for `x`."""
        offset, mask = self.offset_mask(x).split([2 * self.taps, self.taps], dim=1)
        return offset, mask.sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_tracing("ModulatedDeformBlock")
        check_map(self, x, self.channels, first=self.offset_mask)
        offset, mask = self.offsets_and_mask(x)
        y = modulated_deform_conv2d(
            x, offset, mask, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation
        )
        if self.norm is not None:
            y = self.norm(y)
        return y if self.activation is None else self.activation(y)


def _norm(norm: Any, channels: int, factory: dict[str, Any]) -> nn.Module | None:
    """The normalisation that `ModulatedDeformBlock` takes as `norm`."""
    if norm is None:
        return None
    if is_one_of(norm, ("layer",)):
        return _ChannelNorm(channels, **factory)
    made = norm(channels) if callable(norm) and not isinstance(norm, nn.Module) else None
    if not isinstance(made, nn.Module):
        raise InvalidArgument(
            f'ModulatedDeformBlock: norm is {shown(norm)}; it must be "layer", None, or something that makes a module '
            "of a channel count, such as the class nn.BatchNorm2d"
        )
    return made.to(**factory)


def _check_activation(block: str, activation: Any) -> None:
    if not (activation is None or isinstance(activation, nn.Module)):
        raise InvalidType(f"{block}: activation is {shown(activation)}; it must be a module such as nn.ReLU(), or None")


@overridable
def scan_map(
    x: torch.Tensor,
    x_proj: torch.Tensor,
    dt_proj: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    *,
    discretization: Discretization = "euler",
    backend: str | None = None,
) -> torch.Tensor:
    """The computation of `SS2D`, from a (b, channels, h, w) map and the parameters."""
    k, n, r = x_proj.shape[0], A_log.shape[1], dt_proj.shape[2]
    with without_autocast(x.device.type):
        u = _last(x.to(torch.promote_types(x.dtype, torch.float32)))
        projected = F.linear(u, x_proj.flatten(0, 1).to(u.dtype)).unflatten(-1, (k, r + 2 * n))
        dt, B, C = projected.split([r, n, n], dim=-1)
        y = scan_checked_map(
            u,
            dt.permute(3, 0, 1, 2, 4),
            -A_log.to(u.dtype).exp(),
            B,
            C,
            D.to(u.dtype),
            dt_bias.flatten().to(u.dtype),
            delta_softplus=True,
            delta_weight=dt_proj.flatten(0, 1).to(u.dtype),
            discretization=discretization,
            backend=backend,
        )
    return _first(y.to(x.dtype))


class SS2D(Block):
    """Figure 1 (B-3): scan expanding, S6 in each direction, scan merging. (b, channels, h, w) to (b, channels, h, w).

    Every output pixel depends on every input pixel, along rows and columns, forwards and backwards. The cost is linear
    in the number of pixels. Gate, norm and expansion are in `VisionMambaBlock`, not here.

    Args:
        channels: D, channels in and out.
        d_state: N, size of the hidden state of each channel.
        dt_rank: rank of the projection that gives the time steps; ceil(channels / 16) by default.
        directions: 4 (rows, columns, both reversed), 2 (rows, rows reversed) or 1 (rows).
        dt_min, dt_max: range of the initial time steps, log-uniform.
        discretization: "euler" (as in released Mamba kernels) or "zoh" (equation 2 of the paper).
        backend: name of a scan backend; None chooses by the tensor's device.

    Parameters have VMamba's shapes: x_proj (K, R + 2N, D), dt_proj (K, D, R), dt_bias (K, D), A_log (K * D, N) and
    D (K * D) for K directions; A = -exp(A_log) starts at -(1..N), D at 1. Computed in float32 (float64 for a float64
    input) with autocast off: time steps in half precision are the known cause of NaN in Mamba networks. Returns the
    input's dtype.

    Source: section 2.1, equations 1 to 3, and section 2.2; the four directions are summed (VMamba's cross merge).
    """

    allowed_directions: tuple[int, ...] = DIRECTIONS  # SS3D has others

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        dt_rank: int | None = None,
        directions: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Discretization = "euler",
        backend: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        directions = operator.index(directions) if is_integer(directions) else directions
        if not is_one_of(directions, self.allowed_directions):
            raise InvalidArgument(
                f"{name}: directions is {shown(directions)}; it must be one of {self.allowed_directions}"
            )
        channels, d_state, dt_rank, dt_min, dt_max = _positive(
            name, channels=channels, d_state=d_state, dt_rank=dt_rank, dt_min=dt_min, dt_max=dt_max
        )
        if dt_max < dt_min:
            raise InvalidArgument(f"{name}: dt_min is {dt_min} and dt_max {dt_max}; dt_max must be at least dt_min")
        if not is_one_of(discretization, ("euler", "zoh")):
            raise InvalidArgument(f'{name}: discretization is {shown(discretization)}; it must be "euler" or "zoh"')
        if backend is not None:
            check_backend(backend)
        self.channels, self.d_state, self.directions = channels, d_state, directions
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_rank = dt_rank or math.ceil(channels / 16)
        self.discretization: Discretization = discretization
        self.backend = backend
        k, n, r = directions, d_state, self.dt_rank
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x_proj = nn.Parameter(torch.empty(k, r + 2 * n, channels, **factory))
        self.dt_proj = nn.Parameter(torch.empty(k, channels, r, **factory))
        self.dt_bias = nn.Parameter(torch.empty(k, channels, **factory))
        self.A_log = nn.Parameter(torch.empty(k * channels, n, **factory))
        self.D = nn.Parameter(torch.empty(k * channels, **factory))
        self.reset_parameters()
        exempt_from_weight_decay(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new initial values, also after `to_empty` of a block that was made on the device "meta"."""
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.uniform_(self.dt_proj, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        wide = torch.promote_types(self.x_proj.dtype, torch.float32)  # rounded once, at the end
        uniform = torch.rand(self.dt_bias.shape, device=self.dt_bias.device, dtype=wide)
        dt = torch.exp(uniform * math.log(self.dt_max / self.dt_min) + math.log(self.dt_min))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=wide).log())
        nn.init.ones_(self.D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_tracing("SS2D")
        check_map(self, x, self.channels)
        weights = self.x_proj, self.dt_proj, self.dt_bias, self.A_log, self.D
        return scan_map(x, *weights, discretization=self.discretization, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, d_state={self.d_state}, dt_rank={self.dt_rank}, directions={self.directions}, "
            f"discretization={self.discretization}"
        )


class VisionMambaBlock(Block):
    """Figure 1 (B-2): global context by SS2D, gated, with channel attention and a residual. Keeps (b, channels, h, w).

    LayerNorm -> (Linear, SiLU) * (Linear, depthwise 3x3, SiLU, SS2D, LayerNorm) -> Linear -> channel attention -> + x.

    Args:
        channels: channels in and out.
        d_state, dt_rank, directions, discretization, backend: as in `SS2D`.
        expand: inner channels = round(expand * channels).
        kernel_size: of the depthwise convolution before the scan; odd.
        separable: a 1x1 convolution follows the depthwise one (a depthwise separable convolution, as in the paper's
            text).
        channel_attention: whether to use channel attention.
        drop_path: probability of stochastic depth.

    Source: section 2.2 and figure 1 (B-2); sizes not printed are Mamba's (expand 2, depthwise 3x3 as in VMamba).
    """

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        kernel_size: int = 3,
        dt_rank: int | None = None,
        directions: int = 4,
        discretization: Discretization = "euler",
        channel_attention: bool = True,
        drop_path: float = 0.0,
        separable: bool = False,
        backend: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        channels, expand, kernel_size = _positive(
            "VisionMambaBlock", channels=channels, expand=expand, kernel_size=kernel_size
        )
        (inner,) = _positive("VisionMambaBlock", inner_channels=round(expand * channels))
        if kernel_size % 2 == 0:
            raise InvalidArgument(f"VisionMambaBlock: kernel_size is {kernel_size}; it must be odd")
        self.channels = channels
        self.norm = nn.LayerNorm(channels, **factory)
        self.gate = nn.Linear(channels, inner, **factory)
        self.inner = nn.Linear(channels, inner, **factory)
        self.depthwise = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, **factory)
        self.pointwise = nn.Conv2d(inner, inner, 1, **factory) if separable else nn.Identity()
        self.ss2d = SS2D(
            inner,
            d_state=d_state,
            dt_rank=dt_rank,
            directions=directions,
            discretization=discretization,
            backend=backend,
            **factory,
        )
        self.inner_norm = nn.LayerNorm(inner, **factory)
        self.out = nn.Linear(inner, channels, **factory)
        self.attention = ChannelAttention(channels, **factory) if channel_attention else nn.Identity()
        self.drop_path = DropPath(drop_path)
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_tracing("VisionMambaBlock")
        check_map(self, x, self.channels, first=self.inner)
        z = self.norm(_last(x))
        context = self.ss2d(F.silu(self.pointwise(self.depthwise(_first(self.inner(z))))))
        mixed = self.out(self.inner_norm(_last(context)) * F.silu(self.gate(z)))
        return x + self.drop_path(self.attention(_first(mixed)))


class DeformMambaBlock(Block):
    """Figure 1 (B): the modulated deform block and the vision Mamba block side by side, summed. Keeps (b, c, h, w).

    Args:
        deform: False is the paper's ablation "w/o Deform": the vision Mamba block alone.
        deform_groups: as in `ModulatedDeformBlock`.
        activation: whether a SiLU follows the deformable convolution; False is the paper as printed.
        others: as in `VisionMambaBlock`.

    Source: section 2.2, "we add output features of two branches". Departure: the SiLU of the deform branch. Without it
    the branch is nearly linear at first, and training made no progress in the first 200 steps.
    """

    def __init__(
        self,
        channels: int,
        *,
        deform: bool = True,
        deform_groups: int = 1,
        d_state: int = 16,
        expand: float = 2.0,
        dt_rank: int | None = None,
        directions: int = 4,
        discretization: Discretization = "euler",
        channel_attention: bool = True,
        drop_path: float = 0.0,
        activation: bool = True,
        separable: bool = False,
        backend: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.deform = None
        if deform:
            self.deform = ModulatedDeformBlock(
                channels,
                deform_groups=deform_groups,
                activation=nn.SiLU() if activation else None,
                device=device,
                dtype=dtype,
            )
        self.mamba = VisionMambaBlock(
            channels,
            d_state=d_state,
            expand=expand,
            dt_rank=dt_rank,
            directions=directions,
            discretization=discretization,
            channel_attention=channel_attention,
            drop_path=drop_path,
            separable=separable,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_tracing("DeformMambaBlock")
        check_map(self, x, self.channels)
        y = self.mamba(x)
        return y if self.deform is None else y + self.deform(x)


def start_as_identity(block: VisionMambaBlock | DeformMambaBlock) -> None:
    """Sets the last layer of each branch to zero: until it is trained, `block` returns its input."""
    mamba = block.mamba if isinstance(block, DeformMambaBlock) else block
    last: list[nn.Module] = [mamba.out]
    if isinstance(block, DeformMambaBlock) and block.deform is not None:
        last.append(block.deform)
    for module in last:
        for parameter in (module.weight, module.bias):
            nn.init.zeros_(parameter)  # type: ignore[arg-type]


class MultiViewContext(Block):
    """Figure 1 (C): parallel atrous 3x3 convolutions, concatenated, fused by a 1x1, added to the input.

    Args:
        channels: channels in and out.
        rates: one dilation rate per branch. With a rate near the size of the map, a branch gets only padding.
        branch_channels: channels of a branch; channels / len(rates) by default, so that all branches together cost no
            more than one plain 3x3 convolution ("without increasing the number of parameters").
        activation: a module before the fusion; None: SiLU. `nn.Identity()` is the paper as printed.

    Source: section 2.2 after DeepLab. The rates are not printed; DeepLab's 6, 12, 18 do not fit an 8x8 bottleneck.
    Departure: the SiLU before the fusion. Without it the module is one linear filter.
    """

    def __init__(
        self,
        channels: int,
        *,
        rates: Sequence[int] = (1, 2, 3, 4),
        branch_channels: int | None = None,
        activation: nn.Module | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        channels, branch_channels = _positive("MultiViewContext", channels=channels, branch_channels=branch_channels)
        rates = getattr(rates, "tolist", lambda: rates)()  # of an array of numpy or PyTorch
        if not isinstance(rates, Sequence) or isinstance(rates, str):
            raise InvalidType(f"MultiViewContext: rates must be a list of integers, not {shown(rates)}")
        rates = _positive("MultiViewContext", **{f"rates[{k}]": rate for k, rate in enumerate(rates)})
        _check_activation("MultiViewContext", activation)
        if not rates or not 1 <= min(rates) <= max(rates) <= LARGEST_RATE:
            raise InvalidArgument(
                f"MultiViewContext: rates is {tuple(rates)}; it must hold at least one rate, from 1 to {LARGEST_RATE}"
            )
        width = branch_channels or max(channels // len(rates), 1)
        self.channels = channels
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, width, 3, padding=rate, dilation=rate, **factory) for rate in rates
        )
        self.activation = nn.SiLU() if activation is None else activation
        self.fuse = nn.Conv2d(width * len(rates), channels, 1, **factory)
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_map(self, x, self.channels, first=self.fuse)
        return x + self.fuse(self.activation(torch.cat([branch(x) for branch in self.branches], dim=1)))


class _PatchConvolution(nn.Conv2d):
    """A convolution with kernel = stride, correct in bfloat16 too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _patch_convolution(x, self.weight, self.bias)


@torch.fx.wrap  # a symbolic trace has neither device nor dtype, so the traced network chooses when it runs
def _patch_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`conv2d` with stride = kernel size.

    oneDNN's bfloat16 convolution gives wrong numbers for kernel = stride = 4 and 16 channels, on CPUs with AMX (torch
    2.13 and 2.14), so bfloat16 is computed as a matrix product there.
    """
    patch, on = weight.shape[-1], x.device.type
    autocast = in_autocast(on)
    if on == "cpu" and torch.bfloat16 == (torch.get_autocast_dtype(on) if autocast else x.dtype):
        return _first(F.linear(_last(F.pixel_unshuffle(x, patch)), weight.flatten(1), bias))
    return F.conv2d(x, weight, bias, stride=patch)


class PatchEmbed(Block):
    """Non-overlapping patches to vectors: convolution with kernel = stride = patch, LayerNorm. h and w / patch,
    which must divide them."""

    def __init__(
        self, in_channels: int, channels: int, patch: int, *, device: Device = None, dtype: Dtype = None
    ) -> None:
        super().__init__()
        in_channels, channels, patch = _positive("PatchEmbed", in_channels=in_channels, channels=channels, patch=patch)
        self.in_channels, self.patch = in_channels, patch
        self.project = _PatchConvolution(in_channels, channels, patch, stride=patch, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(channels, device=device, dtype=dtype)
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_map(self, x, self.in_channels, multiple=self.patch, first=self.project)
        return _first(self.norm(_last(self.project(x))))


class PatchMerge(Block):
    """Half the size: four neighbours concatenated, LayerNorm, Linear without bias. h and w must be even."""

    def __init__(self, channels: int, out_channels: int, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        channels, out_channels = _positive("PatchMerge", channels=channels, out_channels=out_channels)
        self.channels = channels
        self.norm = nn.LayerNorm(4 * channels, device=device, dtype=dtype)
        self.reduce = nn.Linear(4 * channels, out_channels, bias=False, device=device, dtype=dtype)
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_map(self, x, self.channels, multiple=2, first=self.reduce)
        return _first(self.reduce(self.norm(rearrange(x, "b c (h i) (w j) -> b h w (i j c)", i=2, j=2))))


class PatchExpand(Block):
    """`factor` times the size: Linear without bias, channels rearranged to space, LayerNorm (unless `norm=False`)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        factor: int = 2,
        *,
        norm: bool = True,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        channels, out_channels, factor = _positive(
            "PatchExpand", channels=channels, out_channels=out_channels, factor=factor
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.factor = channels, factor
        self.expand = nn.Linear(channels, factor**2 * out_channels, bias=False, **factory)
        self.norm = nn.LayerNorm(out_channels, **factory) if norm else nn.Identity()
        exempt_from_weight_decay(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_map(self, x, self.channels, first=self.expand)
        grown = rearrange(self.expand(_last(x)), "b h w (i j c) -> b (h i) (w j) c", i=self.factor, j=self.factor)
        return _first(self.norm(grown))
