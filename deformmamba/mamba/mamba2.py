"""The block `Mamba2`, with the arguments and the state_dict of that of mamba-ssm.

It maps (b, l, d_model) to the same shape, a whole sequence at once or, with states, element by element (`step`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.errors import InvalidArgument, UnsupportedCall, shown
from deformmamba.mamba.arguments import (
    check_boundaries,
    check_input,
    check_not_negative,
    check_parameters,
    check_range,
    check_sizes,
    check_tensors,
)
from deformmamba.mamba.causal_conv import causal_conv1d_varlen_states
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
    kept_states,
)
from deformmamba.mamba.norm import RMSNormGated
from deformmamba.mamba.ssd import mamba_chunk_scan_combined
from deformmamba.mamba.state_update import selective_state_update
from deformmamba.tensors import refuse_tracing


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


class Mamba2(Mixer):
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
        self.d_inner = inner_channels("Mamba2", d_model, expand, dt_min, dt_max, d_conv=d_conv, **sizes)
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
        self.dt_bias = nn.Parameter(initial_dt(self.nheads, dt_min, dt_max, dt_init_floor, device, dtype))
        A = torch.empty(self.nheads, device=device, dtype=torch.float32).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, eps=1e-5, norm_before_gate=norm_before_gate, group_size=self.d_ssm // ngroups, **where
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        self.exempt()

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
            out = self._mixed(self.in_proj(rows), seq_idx)[0]
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
        check_inference("Mamba2", inference_params)
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
        by_channel = self._parts(zxbcdt)[3].transpose(1, 2)
        sizes = {"channels": by_channel.shape[1], "d_conv": self.d_conv}
        sizes |= {"heads": self.nheads, "headdim": self.headdim, "d_state": self.d_state}
        check_tensors(
            sizes, zxbcdt=(zxbcdt, "rows l projected"), conv_state=(conv_state, "b channels d_conv"),
            ssm_state=(ssm_state, "b heads headdim d_state"),
        )  # fmt: skip
        if cu_seqlens is None:
            conv_state.copy_(F.pad(by_channel, (self.d_conv - by_channel.shape[-1], 0)))
        else:
            steps = by_channel.transpose(1, 2)[0]
            conv_state.copy_(causal_conv1d_varlen_states(steps, cu_seqlens, conv_state.shape[-1]))
        varlen = cu_seqlens is not None
        out, *states = self._mixed(
            zxbcdt, seq_idx, cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=varlen
        )
        ssm_state.copy_(states[-1])
        return out

    def _mixed(self, zxbcdt: torch.Tensor, seq_idx: torch.Tensor | None, **states: Any) -> tuple[torch.Tensor, ...]:
        """The output for the projected input (b, l, ..), and the states that `states` asks the scan for."""
        refuse_tracing("Mamba2", "length")
        z0, x0, z, xBC, dt = self._parts(zxbcdt)
        convolved = causal_convolution(self.conv1d, xBC.transpose(1, 2), self.activation, seq_idx)
        x, B, C = self._split_conv(convolved.transpose(1, 2))
        y = mamba_chunk_scan_combined(
            x,
            dt,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.chunk_size,
            D=self._D(),
            z=None if self.rmsnorm else self._by_head(z),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            **states,
        )
        y, *rest = y if isinstance(y, tuple) else (y,)
        return self._finish(y.flatten(-2), z, z0, x0), *rest

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
        check_step("Mamba2.step", hidden_states, self.in_proj)
        z0, x0, z, xBC, dt = self._parts(self.in_proj(hidden_states[:, 0]))
        xBC = convolution_step("Mamba2", self.conv1d, xBC, conv_state, self.activation)
        x, B, C = self._split_conv(xBC)
        A = -torch.exp(at_least_float32(self.A_log))[:, None, None].expand(-1, self.headdim, self.d_state)
        dt = dt[..., None].expand(-1, -1, self.headdim)
        bias: torch.Tensor | None = self.dt_bias[:, None].expand(-1, self.headdim)
        if tuple(self.dt_limit) != (0.0, math.inf):
            dt, bias = (
                F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias)[:, None]).clamp(*self.dt_limit),
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
        check_cache("Mamba2", batch_size, dtype)
        make = self.A_log.new_zeros
        size = (batch_size, self.d_conv, self.d_ssm + 2 * self.ngroups * self.d_state)
        conv_state = make(size, dtype=dtype or dtype_of(self.conv1d)).transpose(1, 2)
        state = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state, make(state, dtype=dtype or dtype_of(self.in_proj))

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kept_states(self, inference_params, batch_size, initialize_states)
