"""The blocks `Mamba` and `Mamba2`, with the arguments and the state_dict of those of mamba-ssm.

Both map (b, l, d_model) to the same shape, a whole sequence at once or, with states, element by element (`step`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.annotations import is_number
from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, shown
from deformmamba.mamba.arguments import (
    check_boundaries,
    check_choice,
    check_input,
    check_not_negative,
    check_parameters,
    check_positive,
    check_range,
    check_sizes,
    check_tensors,
)
from deformmamba.mamba.causal_conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from deformmamba.mamba.norm import RMSNormGated
from deformmamba.mamba.selective_scan import bimamba_inner_fn, mamba_inner_fn_no_out_proj, selective_scan_fn
from deformmamba.mamba.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from deformmamba.mamba.state_update import selective_state_update

BIMAMBA_TYPES = ("none", "v1", "v2", "v3")


def _initial_dt(channels: int, dt_min: float, dt_max: float, floor: float, device: Any, dtype: Any) -> torch.Tensor:
    """Bias whose softplus is log-uniform between dt_min and dt_max."""
    span = math.log(dt_max) - math.log(dt_min)
    dt = torch.exp(torch.rand(channels, device=device, dtype=dtype) * span + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def _initialise_dt(dt_proj: nn.Linear, scale: float, dt_init: str, bias: torch.Tensor) -> None:
    """Sets the weight of the step size projection to `scale`, or at random up to it, and its bias."""
    if dt_init == "constant":
        nn.init.constant_(dt_proj.weight, scale)
    else:
        nn.init.uniform_(dt_proj.weight, -scale, scale)
    with torch.no_grad():
        dt_proj.bias.copy_(bias)
    dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]


def _initial_A_log(channels: int, states: int, device: Any) -> nn.Parameter:
    """(channels, states): the rates -A of state n are n + 1; float32, without weight decay."""
    rates = torch.arange(1, states + 1, dtype=torch.float32, device=device).repeat(channels, 1)
    A_log = nn.Parameter(rates.log())
    A_log._no_weight_decay = True  # type: ignore[attr-defined]
    return A_log


def _inner_channels(where: str, d_model: int, expand: float, dt_min: float, dt_max: float, **sizes: Any) -> int:
    """expand * d_model, after a check of all sizes of a block and of the range of its initial step sizes."""
    check_sizes(where, d_model=d_model, **sizes)
    check_positive(where, expand=expand, dt_min=dt_min, dt_max=dt_max)
    if dt_min > dt_max:
        raise InvalidArgument(f"{where}: dt_min {dt_min:g} is above dt_max {dt_max:g}")
    if int(expand * d_model) < 1:
        raise InvalidArgument(f"{where}: expand {expand:g} leaves no inner channel for d_model {d_model}")
    return int(expand * d_model)


def _check_mamba(
    bimamba_type: str, dt_init: str, dt_scale: float, dt_init_floor: float, init_layer_scale: float | None, device: Any,
    dtype: Any,
) -> None:  # fmt: skip
    check_choice("Mamba: bimamba_type", bimamba_type, BIMAMBA_TYPES)
    check_choice("Mamba: dt_init", dt_init, ("random", "constant"))
    check_not_negative("Mamba", dt_scale=dt_scale, dt_init_floor=dt_init_floor)
    check_parameters("Mamba", device, dtype)
    if init_layer_scale is not None and not is_number(init_layer_scale):
        raise InvalidType(f"Mamba: init_layer_scale must be a number or None, got {shown(init_layer_scale)}")


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Mamba(nn.Module):
    """Mamba's block: projection, causal convolution, selective scan, gate, projection.

    Args:
        d_model: channels in and out.
        d_state: states of each inner channel.
        d_conv: width of the convolution.
        expand: inner channels = expand * d_model.
        dt_rank: rank of the projection that gives the step sizes; "auto": ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: range of the initial step sizes, log-uniform.
        dt_init: initialisation of the step size projection, "random" or "constant"; dt_scale: its size.
        conv_bias, bias: whether the convolution and the projections have one.
        use_fast_path: accepted, without effect, because there is only one path here.
        layer_idx: key of this layer's states in `inference_params`.
        bimamba_type: "none": mamba-ssm's block. "v1": adds a reversed scan with its own rates A, "v2": with its own
            weights (both Vision Mamba). "v3": adds also a third scan across `nslices` slices (SegMamba).
        nslices: for "v3": the sequence is this many slices of equal length.
        if_divide_out: for "v2": the sum of both directions is halved.
        init_layer_scale: initial value of a factor `gamma` for each channel of the output (Vision Mamba); None: no
            factor.
        bimamba, if_devide_out: other names, of VideoMamba for bimamba_type="v2" and of earlier versions of Vision Mamba
            for `if_divide_out`.
        device, dtype: of the parameters; A_log and D are float32.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    A_b_log: nn.Parameter
    # for modules that mamba-ssm pickled, which has no such attributes
    bimamba_type: str = "none"
    nslices: int = 5
    if_divide_out: bool = False
    if_devide_out: bool = False

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        bimamba_type: str = "none",
        nslices: int = 5,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool = False,
        if_devide_out: bool = False,
    ) -> None:
        super().__init__()
        self.bimamba_type = bimamba_type = "v2" if bimamba else bimamba_type
        _check_mamba(bimamba_type, dt_init, dt_scale, dt_init_floor, init_layer_scale, device, dtype)
        rank = 1 if isinstance(dt_rank, str) and dt_rank == "auto" else dt_rank
        sizes = {"d_state": d_state, "d_conv": d_conv, "dt_rank": rank}
        self.d_inner = _inner_channels("Mamba", d_model, expand, dt_min, dt_max, **sizes, nslices=nslices)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx, self.nslices = use_fast_path, layer_idx, nslices
        self.if_divide_out = if_divide_out or if_devide_out
        self.activation, self.act = "silu", nn.SiLU()
        where = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        dt = {"dt_min": dt_min, "dt_max": dt_max, "floor": dt_init_floor}
        for suffix in {"v2": ("", "_b"), "v3": ("", "_b", "_s")}.get(bimamba_type, ("",)):
            conv = nn.Conv1d(
                self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **where
            )
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, **where)
            if not suffix:  # the others keep PyTorch's initial values, as in Vision Mamba
                scale = self.dt_rank**-0.5 * dt_scale
                _initialise_dt(dt_proj, scale, dt_init, _initial_dt(self.d_inner, **dt, **where))
            D = nn.Parameter(torch.ones(self.d_inner, device=device))
            D._no_weight_decay = True  # type: ignore[attr-defined]
            names = ("conv1d", "x_proj", "dt_proj", "D")
            for name, part in zip(names, (conv, x_proj, dt_proj, D), strict=True):
                setattr(self, f"{name}{suffix}", part)
            setattr(self, f"A{suffix}_log", _initial_A_log(self.d_inner, d_state, device))
        if bimamba_type == "v1":
            self.A_b_log = _initial_A_log(self.d_inner, d_state, device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), device=device))

    def forward(self, hidden_states: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        """(b, l, d_model) to (b, l, d_model).

        `inference_params` (with `key_value_memory_dict` and `seqlen_offset`, as in mamba-ssm) keeps the states: a
        call with an offset of 0 fills them, a later one makes one step."""
        check_input("Mamba", "hidden_states", hidden_states, "b l", self.in_proj)
        if inference_params is not None:
            _check_inference("Mamba", inference_params)
            conv_state, ssm_state = self._get_states_from_cache(inference_params, len(hidden_states))
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = self.in_proj(hidden_states).transpose(1, 2)
        if inference_params is not None:
            return self._fill(xz, conv_state, ssm_state)
        if self.bimamba_type == "v1":
            return self._scaled(self._scan_with_two_rates(xz))
        y = self._scan(xz, "")
        if self.bimamba_type != "none":
            y = y + self._scan(xz.flip(-1), "_b").flip(-1)
        if self.bimamba_type == "v3":
            if xz.shape[-1] % self.nslices:
                raise InvalidArgument(
                    f"Mamba: a sequence of {xz.shape[-1]} steps does not divide into {self.nslices} slices"
                )
            across = xz.unflatten(-1, (self.nslices, -1)).transpose(-1, -2).flatten(-2)
            y = y + self._scan(across, "_s").unflatten(-1, (-1, self.nslices)).transpose(-1, -2).flatten(-2)
        if self.bimamba_type == "v2" and (self.if_divide_out or self.if_devide_out):
            y = y / 2
        return self._project(y)

    def _project(self, y: torch.Tensor) -> torch.Tensor:
        """(b, d, l) to the output (b, l, d_model)."""
        return self._scaled(self.out_proj(y.transpose(1, 2)))

    def _scaled(self, output: torch.Tensor) -> torch.Tensor:
        gamma = getattr(self, "gamma", None)
        return output if gamma is None else output * gamma

    def _scan_with_two_rates(self, xz: torch.Tensor) -> torch.Tensor:
        """(b, 2 d, l) to the projected sum (b, l, d_model) of both directions, which share all weights but A."""
        A, A_b = (-torch.exp(_at_least_float32(A_log)) for A_log in (self.A_log, self.A_b_log))
        return bimamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, A, A_b, D=_at_least_float32(self.D), delta_bias=_at_least_float32(self.dt_proj.bias),
        )  # fmt: skip

    def _scan(self, xz: torch.Tensor, suffix: str) -> torch.Tensor:
        """(b, 2 d, l) to (b, d, l) with the weights of one direction."""
        conv, x_proj, dt_proj, D = (getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj", "D"))
        A = -torch.exp(_at_least_float32(getattr(self, f"A{suffix}_log")))
        bias = _at_least_float32(dt_proj.bias)
        return mamba_inner_fn_no_out_proj(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, D=_at_least_float32(D), delta_bias=bias
        )

    def _refuse_two_directions(self, instead: str) -> None:
        if self.bimamba_type != "none":
            raise UnsupportedCall(f"Mamba: a bidirectional scan has no state to continue from; {instead}")

    def _fill(self, xz: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> torch.Tensor:
        self._refuse_two_directions("leave inference_params out")
        check_tensors(
            {"d_inner": self.d_inner, "d_conv": self.d_conv, "d_state": self.d_state}, xz=(xz, "b channels l"),
            conv_state=(conv_state, "b d_inner d_conv"), ssm_state=(ssm_state, "b d_inner d_state"),
        )  # fmt: skip
        x, z = xz.chunk(2, 1)
        conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))
        x = causal_conv1d_fn(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation=self.activation)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
        y, last = selective_scan_fn(
            x,
            self.dt_proj.weight @ dt.transpose(1, 2),
            -torch.exp(_at_least_float32(self.A_log)),
            B.transpose(1, 2),
            C.transpose(1, 2),
            _at_least_float32(self.D),
            z=z,
            delta_bias=_at_least_float32(self.dt_proj.bias),
            delta_softplus=True,
            return_last_state=True,
        )
        ssm_state.copy_(last)
        return self._project(y)

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output for the next element, (b, 1, d_model), and the states, which are updated in place."""
        self._refuse_two_directions("call the block with the whole sequence")
        check_input("Mamba.step", "hidden_states", hidden_states, "b 1", self.in_proj)
        if hidden_states.shape[1] != 1:
            raise InvalidArgument(
                f"Mamba.step takes one element at a time, (b, 1, d_model), got {tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(_at_least_float32(self.A_log))
        bias = self.dt_proj.bias
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D, z=z, dt_bias=bias, dt_softplus=True)
        return self._scaled(self.out_proj(y))[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(conv_state (b, d_inner, d_conv), ssm_state (b, d_inner, d_state)), zero."""
        _check_cache("Mamba", batch_size, dtype)
        make = self.conv1d.weight.new_zeros
        conv_state = make(batch_size, self.d_inner, self.d_conv, dtype=dtype or self.conv1d.weight.dtype)
        return conv_state, make(batch_size, self.d_inner, self.d_state, dtype=dtype or self.dt_proj.weight.dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _states(self, inference_params, batch_size, initialize_states)


def _check_cache(where: str, batch_size: int, dtype: torch.dtype | None) -> None:
    check_sizes(f"{where}.allocate_inference_cache", least=0, batch_size=batch_size)
    check_parameters(f"{where}.allocate_inference_cache", None, dtype)


def _states(
    block: Any, inference_params: Any, batch_size: int, initialize_states: bool
) -> tuple[torch.Tensor, torch.Tensor]:
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


def _check_inference(where: str, inference_params: Any) -> None:
    found = getattr(inference_params, "key_value_memory_dict", None)
    if found is None or getattr(inference_params, "seqlen_offset", None) is None:
        raise InvalidType(
            f"{where}: inference_params must have key_value_memory_dict and seqlen_offset, as "
            f"deformmamba.mamba.generation.InferenceParams has, got {shown(inference_params)}"
        )


def _check_mamba2(
    d_ssm: int, d_inner: int, headdim: int, ngroups: int, A_init_range: tuple[float, float], process_group: Any
) -> None:
    if process_group is not None:
        raise UnsupportedCall("Mamba2: process_group is not supported; leave it out")
    if d_ssm % headdim or (d_ssm // headdim) % ngroups or d_ssm > d_inner:
        raise InvalidArgument(
            f"Mamba2: d_ssm {d_ssm}, headdim {headdim}, ngroups {ngroups}: headdim must divide d_ssm, ngroups the "
            f"number of heads, and d_ssm be at most {d_inner}"
        )
    low, high = check_range("Mamba2: A_init_range", A_init_range)
    if low <= 0 or high == math.inf:
        raise InvalidArgument(f"Mamba2: A_init_range is {shown(A_init_range)}; it must be positive and finite")


def _check_initial_mamba2(dt_init_floor: float, conv_init: float | None, device: Any, dtype: Any) -> None:
    check_not_negative("Mamba2", dt_init_floor=dt_init_floor, conv_init=0 if conv_init is None else conv_init)
    check_parameters("Mamba2", device, dtype)


def _numbered(cu_seqlens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(1, l): the number of the sequence of each step of a pack `rows` (1, l, d).

    Raises:
        InvalidArgument, InvalidType: several packs, or boundaries that are not those of l steps.
    """
    if len(rows) != 1:
        raise InvalidArgument(f"cu_seqlens is for one pack, (1, l, d), but the batch has {len(rows)} rows; pack them")
    check_boundaries("cu_seqlens", cu_seqlens, rows.shape[1])
    steps = torch.arange(rows.shape[1], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, steps, right=True, out_int32=True).to(rows.device)[None]


class Mamba2(nn.Module):
    """Mamba-2's block: one input projection, causal convolution, scan with one rate per head, gated norm.

    Args:
        d_model: channels in and out.
        d_state: states of each inner channel.
        d_conv: width of the convolution; conv_init: range of its initial weights, PyTorch's by default.
        expand: inner channels = expand * d_model.
        headdim: channels of a head. ngroups: groups of heads, each with its own B and C.
        d_ssm: inner channels that are scanned; the others form a gated MLP. All of them by default.
        A_init_range: range of the initial rates -A, uniform.
        D_has_hdim: D has one value per channel, not one per head.
        rmsnorm, norm_before_gate: whether there is a norm, and whether it comes before the gate.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes, log-uniform.
        dt_limit: range to which step sizes are clamped.
        bias, conv_bias: whether the projections and the convolution have one.
        chunk_size, use_mem_eff_path, sequence_parallel: accepted, without effect.
        layer_idx: key of this layer's states in `inference_params`.
        process_group: must be None, because splitting over processes is not supported.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.conv_init, self.expand = conv_init, expand
        sizes = {"d_state": d_state, "headdim": headdim, "ngroups": ngroups, "d_ssm": 1 if d_ssm is None else d_ssm}
        self.d_inner = _inner_channels("Mamba2", d_model, expand, dt_min, dt_max, d_conv=d_conv, **sizes)
        self.headdim, self.ngroups, self.D_has_hdim, self.rmsnorm = headdim, ngroups, D_has_hdim, rmsnorm
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        _check_mamba2(self.d_ssm, self.d_inner, headdim, ngroups, A_init_range, process_group)
        self.nheads = self.d_ssm // headdim
        self.norm_before_gate, self.dt_limit = norm_before_gate, check_range("Mamba2: dt_limit", dt_limit)
        _check_initial_mamba2(dt_init_floor, conv_init, device, dtype)
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        where = {"device": device, "dtype": dtype}
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **where)
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **where
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(_initial_dt(self.nheads, dt_min, dt_max, dt_init_floor, device, dtype))
        A = torch.empty(self.nheads, device=device, dtype=torch.float32).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, eps=1e-5, norm_before_gate=norm_before_gate, group_size=self.d_ssm // ngroups, **where
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)

    def forward(
        self,
        u: torch.Tensor,
        seqlen: int | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        inference_params: Any = None,
    ) -> torch.Tensor:
        """(b, l, d_model), or (b * l, d_model) with `seqlen` = l, to the same shape.

        Args:
            seq_idx: (b, l) integers that separate the sequences of a pack.
            cu_seqlens: (sequences + 1,), the start of each sequence of a pack and its length. It separates them too,
                if `seq_idx` is not given (mamba-ssm then lets them run into each other). With `inference_params`, the
                states are those after each sequence.
            inference_params: as in `Mamba.forward`.
        """
        rows = self._rows(u, seqlen)
        if inference_params is not None:
            out = self._with_states(rows, seq_idx, cu_seqlens, inference_params)
        else:
            if cu_seqlens is not None and seq_idx is None:
                seq_idx = _numbered(cu_seqlens, rows)
            out = mamba_split_conv1d_scan_combined(
                self.in_proj(rows),
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                self.dt_bias,
                -torch.exp(_at_least_float32(self.A_log)),
                self._D(),
                self.chunk_size,
                seq_idx=seq_idx,
                dt_limit=self.dt_limit,
                activation=self.activation,
                rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
                rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
                outproj_weight=self.out_proj.weight,
                outproj_bias=self.out_proj.bias,
                headdim=self.headdim,
                ngroups=self.ngroups,
                norm_before_gate=self.norm_before_gate,
            )
        return out if seqlen is None else out.flatten(0, 1)

    def _rows(self, u: torch.Tensor, seqlen: int | None) -> torch.Tensor:
        """The checked input as (b, l, d_model)."""
        if seqlen is None:
            check_input("Mamba2", "u", u, "b l", self.in_proj)
            return u
        if not torch.compiler.is_compiling():
            check_sizes("Mamba2", seqlen=seqlen)
        check_input("Mamba2", "u", u, "b*l", self.in_proj)
        if len(u) % seqlen:
            raise InvalidArgument(
                f"Mamba2: u has {len(u)} rows (b * l), which seqlen {seqlen} does not divide; give the length of the "
                "sequences, or u as (b, l, d_model) without seqlen"
            )
        return u.unflatten(0, (len(u) // seqlen, seqlen))

    def _with_states(
        self, rows: torch.Tensor, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None, inference_params: Any
    ) -> torch.Tensor:
        """The output for (b, l, d_model) with the states of `inference_params`: a whole sequence, or one step."""
        _check_inference("Mamba2", inference_params)
        stepping = inference_params.seqlen_offset > 0
        check_tensors(cu_seqlens=(cu_seqlens, "?int:sequences+1"))
        if cu_seqlens is not None and not stepping:
            numbered = _numbered(cu_seqlens, rows)
            seq_idx = numbered if seq_idx is None else seq_idx
        sequences = len(rows) if cu_seqlens is None else len(cu_seqlens) - 1
        states = self._get_states_from_cache(inference_params, sequences)
        if stepping:
            return self.step(rows, *states)[0]
        return self._fill(self.in_proj(rows), seq_idx, cu_seqlens, *states)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """(.., h p) as (.., h, p)."""
        return x.unflatten(-1, (-1, self.headdim))

    def _D(self) -> torch.Tensor:
        return self._by_head(self.D) if self.D_has_hdim else self.D

    def _parts(self, zxbcdt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The MLP's gate and value, the gate z, the inputs of the convolution, dt."""
        mlp = self.d_inner - self.d_ssm
        conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state
        return zxbcdt.split([mlp, mlp, self.d_ssm, conv_dim, self.nheads], -1)

    def _fill(
        self, zxbcdt: torch.Tensor, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
        conv_state: torch.Tensor, ssm_state: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        z0, x0, z, xBC, dt = self._parts(zxbcdt)
        by_channel = xBC.transpose(1, 2)
        sizes = {"channels": xBC.shape[-1], "d_conv": self.d_conv}
        sizes |= {"heads": self.nheads, "headdim": self.headdim, "d_state": self.d_state}
        check_tensors(
            sizes, zxbcdt=(zxbcdt, "rows l projected"), conv_state=(conv_state, "b channels d_conv"),
            ssm_state=(ssm_state, "b heads headdim d_state"),
        )  # fmt: skip
        if cu_seqlens is None:
            conv_state.copy_(F.pad(by_channel, (self.d_conv - by_channel.shape[-1], 0)))
        else:
            conv_state.copy_(causal_conv1d_varlen_states(xBC[0], cu_seqlens, conv_state.shape[-1]))
        weight = self.conv1d.weight.squeeze(1)
        convolved = causal_conv1d_fn(by_channel, weight, self.conv1d.bias, seq_idx, activation=self.activation)
        x, B, C = self._split_conv(convolved.transpose(1, 2))
        y, *states = mamba_chunk_scan_combined(
            x,
            dt,
            -torch.exp(_at_least_float32(self.A_log)),
            B,
            C,
            self.chunk_size,
            D=self._D(),
            z=None if self.rmsnorm else self._by_head(z),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            dt_limit=self.dt_limit,
            return_final_states=True,
            return_varlen_states=cu_seqlens is not None,
        )
        ssm_state.copy_(states[-1])
        return self._finish(y.flatten(-2), z, z0, x0)

    def _split_conv(self, xBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rest = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, rest, rest], -1)
        B, C = (weights.unflatten(-1, (self.ngroups, self.d_state)) for weights in (B, C))
        return self._by_head(x), B, C

    def _finish(self, y: torch.Tensor, z: torch.Tensor, z0: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        if z0.shape[-1]:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y)

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output for the next element, (b, 1, d_model), and the states, which are updated in place."""
        check_input("Mamba2.step", "hidden_states", hidden_states, "b 1", self.in_proj)
        if hidden_states.shape[1] != 1:
            raise InvalidArgument(
                f"Mamba2.step takes one element at a time, (b, 1, d_model), got {tuple(hidden_states.shape)}"
            )
        z0, x0, z, xBC, dt = self._parts(self.in_proj(hidden_states[:, 0]))
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        x, B, C = self._split_conv(xBC)
        A = -torch.exp(_at_least_float32(self.A_log))[:, None, None].expand(-1, self.headdim, self.d_state)
        dt = dt[..., None].expand(-1, -1, self.headdim)
        bias: torch.Tensor | None = self.dt_bias[:, None].expand(-1, self.headdim)
        if tuple(self.dt_limit) != (0.0, math.inf):
            dt, bias = (
                F.softplus(_at_least_float32(dt) + _at_least_float32(self.dt_bias)[:, None]).clamp(*self.dt_limit),
                None,
            )
        D = self._D() if self.D_has_hdim else self.D[:, None].expand(-1, self.headdim)
        gate = None if self.rmsnorm else self._by_head(z)
        y = selective_state_update(ssm_state, x, dt, A, B, C, D, z=gate, dt_bias=bias, dt_softplus=bias is not None)
        return self._finish(y.flatten(-2), z, z0, x0)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(conv_state (b, conv channels, d_conv), ssm_state (b, h, p, n)), zero."""
        _check_cache("Mamba2", batch_size, dtype)
        make = self.conv1d.weight.new_zeros
        size = (batch_size, self.d_conv, len(self.conv1d.weight))
        conv_state = make(size, dtype=dtype or self.conv1d.weight.dtype).transpose(1, 2)
        state = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state, make(state, dtype=dtype or self.in_proj.weight.dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _states(self, inference_params, batch_size, initialize_states)
