"""The block `Mamba`, with the arguments and the state_dict of that of mamba-ssm.

It maps (b, l, d_model) to the same shape, a whole sequence at once or, with states, element by element (`step`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.annotations import is_number
from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, shown
from deformmamba.mamba.arguments import check_choice, check_input, check_not_negative, check_parameters, check_tensors
from deformmamba.mamba.mamba_parts import (
    Mixer,
    at_least_float32,
    causal_convolution,
    check_cache,
    check_inference,
    check_step,
    convolution_step,
    dtype_of,
    initial_dt,
    inner_channels,
    is_plain,
    kept_states,
)
from deformmamba.mamba.selective_scan import bimamba_inner_fn, mamba_inner_fn_no_out_proj, selective_scan_fn
from deformmamba.mamba.state_update import selective_state_update
from deformmamba.tensors import refuse_tracing

BIMAMBA_TYPES = ("none", "v1", "v2", "v3")


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
    """(channels, states): the rates -A of state n are n + 1; float32."""
    rates = torch.arange(1, states + 1, dtype=torch.float32, device=device).repeat(channels, 1)
    return nn.Parameter(rates.log())


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


class Mamba(Mixer):
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
        self.d_inner = inner_channels("Mamba", d_model, expand, dt_min, dt_max, **sizes, nslices=nslices)
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
                _initialise_dt(dt_proj, scale, dt_init, initial_dt(self.d_inner, **dt, **where))
            D = nn.Parameter(torch.ones(self.d_inner, device=device))
            names = ("conv1d", "x_proj", "dt_proj", "D")
            for name, part in zip(names, (conv, x_proj, dt_proj, D), strict=True):
                setattr(self, f"{name}{suffix}", part)
            setattr(self, f"A{suffix}_log", _initial_A_log(self.d_inner, d_state, device))
        if bimamba_type == "v1":
            self.A_b_log = _initial_A_log(self.d_inner, d_state, device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), device=device))
        self.exempt()

    def forward(self, hidden_states: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        """(b, l, d_model) to (b, l, d_model).

        `inference_params` (with `key_value_memory_dict` and `seqlen_offset`, as in mamba-ssm) keeps the states: a
        call with an offset of 0 fills them, a later one makes one step."""
        refuse_tracing("Mamba", "length")
        check_input("Mamba", "hidden_states", hidden_states, "b l", self.in_proj)
        if inference_params is not None:
            check_inference("Mamba", inference_params)
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
        A, A_b = (-torch.exp(at_least_float32(A_log)) for A_log in (self.A_log, self.A_b_log))
        D = at_least_float32(self.D)
        if not all(map(is_plain, (self.conv1d, self.x_proj, self.dt_proj, self.out_proj))):
            *given, bias = self._by_layers(xz, "")
            x, delta, B, C, z = (tensor.flip(-1) for tensor in given)
            y_b: torch.Tensor = selective_scan_fn(x, delta, A_b, B, C, D, z, bias, True)
            x, delta, B, C, z = given
            y: torch.Tensor = selective_scan_fn(x, delta, A, B, C, D, z, bias, True) + y_b.flip(-1)
            return self.out_proj(y.transpose(1, 2))
        return bimamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, A, A_b, D=D, delta_bias=at_least_float32(self.dt_proj.bias),
        )  # fmt: skip

    def _layers(self, suffix: str) -> list[Any]:
        """The convolution, both projections of step sizes, and D, of one direction."""
        return [getattr(self, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj", "D")]

    def _scan(self, xz: torch.Tensor, suffix: str) -> torch.Tensor:
        """(b, 2 d, l) to (b, d, l) with the weights of one direction."""
        conv, x_proj, dt_proj, D = self._layers(suffix)
        A, D = -torch.exp(at_least_float32(getattr(self, f"A{suffix}_log"))), at_least_float32(D)
        if not all(map(is_plain, (conv, x_proj, dt_proj))):
            x, delta, B, C, z, bias = self._by_layers(xz, suffix)
            y: torch.Tensor = selective_scan_fn(x, delta, A, B, C, D, z, bias, True)
            return y
        bias = at_least_float32(dt_proj.bias)
        return mamba_inner_fn_no_out_proj(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, D=D, delta_bias=bias
        )

    def _by_layers(self, xz: torch.Tensor, suffix: str) -> tuple[Any, ...]:
        """x after the convolution, delta, B, C, the gate z, and the bias of delta, by calls of the layers."""
        conv, x_proj, dt_proj, _ = self._layers(suffix)
        x, z = xz.chunk(2, 1)
        x = causal_convolution(conv, x, self.activation)
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], -1)
        plain = is_plain(dt_proj)
        delta = dt_proj.weight @ dt.transpose(1, 2) if plain else dt_proj(dt).transpose(1, 2)
        bias = at_least_float32(dt_proj.bias) if plain else None
        return x, delta, B.transpose(1, 2), C.transpose(1, 2), z, bias

    def _refuse_two_directions(self, instead: str) -> None:
        if self.bimamba_type != "none":
            raise UnsupportedCall(f"Mamba: a bidirectional scan has no state to continue from; {instead}")

    def _fill(self, xz: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> torch.Tensor:
        self._refuse_two_directions("leave inference_params out")
        check_tensors(
            {"d_inner": self.d_inner, "d_conv": self.d_conv, "d_state": self.d_state}, xz=(xz, "b channels l"),
            conv_state=(conv_state, "b d_inner d_conv"), ssm_state=(ssm_state, "b d_inner d_state"),
        )  # fmt: skip
        conv_state.copy_(F.pad(xz.chunk(2, 1)[0], (self.d_conv - xz.shape[-1], 0)))
        x, delta, B, C, z, bias = self._by_layers(xz, "")
        A = -torch.exp(at_least_float32(self.A_log))
        y, last = selective_scan_fn(x, delta, A, B, C, at_least_float32(self.D), z, bias, True, True)
        ssm_state.copy_(last)
        return self._project(y)

    def step(
        self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output for the next element, (b, 1, d_model), and the states, which are updated in place."""
        self._refuse_two_directions("call the block with the whole sequence")
        check_step("Mamba.step", hidden_states, self.in_proj)
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = convolution_step("Mamba", self.conv1d, x, conv_state, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        plain = is_plain(self.dt_proj)
        dt, bias = (F.linear(dt, self.dt_proj.weight), self.dt_proj.bias) if plain else (self.dt_proj(dt), None)
        A = -torch.exp(at_least_float32(self.A_log))
        y = selective_state_update(ssm_state, x, dt, A, B, C, self.D, z=z, dt_bias=bias, dt_softplus=True)
        return self._scaled(self.out_proj(y))[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(conv_state (b, d_inner, d_conv), ssm_state (b, d_inner, d_state)), zero."""
        check_cache("Mamba", batch_size, dtype)
        make = self.A_log.new_zeros
        conv_state = make(batch_size, self.d_inner, self.d_conv, dtype=dtype or dtype_of(self.conv1d))
        return conv_state, make(batch_size, self.d_inner, self.d_state, dtype=dtype or dtype_of(self.dt_proj))

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kept_states(self, inference_params, batch_size, initialize_states)
