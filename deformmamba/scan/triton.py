"""The GPU backend: Triton kernels (`triton_kernels`), forward and backward, without a manual build.

Channels-last maps are read in every direction without a copy. Sequences with consecutive steps are transposed tile by
tile on the chip. Any other layout is copied once. Inputs and outputs are float32, float16 or bfloat16; the state is
float32. A program walks 64 (or 32) channels. Where images and channels do not fill the GPU, long walks are cut into
stretches that run in parallel, at the cost of computing the exponentials twice.
"""

import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deformmamba.errors import InvalidArgument
from deformmamba.scan.backend import Abilities

ABILITIES = Abilities(dtypes=(torch.float32, torch.float16, torch.bfloat16))
CHUNK = 128  # steps between kept states: these take 1/8 of the memory of u at 16 states


def unusable(tensor: Tensor | None = None) -> str | None:
    """Why the kernels cannot run on `tensor` (None: on anything here), and the cure, separated by a semicolon."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # not installed, or broken
        cure = "pip install triton on Linux, where PyTorch's CUDA builds include it"
        return f"Triton cannot be imported ({' '.join(str(error).split())}); {cure}"
    if tensor is not None and tensor.dtype == torch.float64:
        return "its state is float32, the tensor is float64; use float32, or backend 'eager'"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; use backend 'cpu'"
    if tensor is not None and tensor.device.type != "cuda":
        return f"it runs on CUDA tensors only, the tensor is on {tensor.device}; move it to the GPU"
    device = None if tensor is None else tensor.device
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs an NVIDIA GPU of compute capability 8.0 or more, and this is an older one; use 'eager'"
    return None


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors: for tests, very slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    keep: bool,
    delta_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, kept states): see `backend`. `delta_weight` is None, since the abilities do not name it."""
    directions, images, groups, length, channels = delta.shape
    n = A.shape[-1]
    chunks = -(-length // CHUNK) if keep else 0
    y = torch.empty_like(u)
    kept = A.new_empty(directions, images, groups, chunks, n, channels)
    edge = A.new_zeros(directions, images, groups, n, channels) if initial_state is None else _swapped(initial_state)
    if not delta.numel():
        return y, _swapped(edge).clone(), kept
    walk = _Launches(u, delta, A, B, C, D, delta_bias, height, width, delta_softplus, zoh)
    cut = walk.cut(back=False)
    room = walk.room(y)
    carry = walk.carries(cut, edge, BACK=False)
    every = CHUNK // cut.steps if keep else 0
    for k in range(directions):
        walk.run(
            "forward", cut, k, y=room, carry=carry[k], kept=kept[k], chunks=chunks, OUTPUT=True, ADD=k > 0, EVERY=every
        )
    return walk.fill(y, room), _swapped(carry[:, :, :, -1, cut.tiles % 2]), kept


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    delta_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, delta_bias (empty if not given) and the initial state."""
    directions, images, groups, _, channels = delta.shape
    n = A.shape[-1]
    du, ddelta, dA, dB, dC, dstate = (torch.empty_like(x) for x in (u, delta, A, B, C, dlast))
    dD, dbias = (A.new_zeros(*A.shape[:2], 0 if x is None else channels) for x in (D, delta_bias))
    if not delta.numel():
        return du, ddelta, dA.zero_(), dB.zero_(), dC.zero_(), dD, dbias, dstate.copy_(dlast)
    walk = _Launches(u, delta, A, B, C, D, delta_bias, height, width, delta_softplus, zoh)
    cut = walk.cut(back=True)
    chunks = _Cut(cut.steps, cut.lanes, CHUNK // cut.steps, kept.shape[3])
    du_room, ddelta_room, dy = walk.room(du), walk.room(ddelta), walk.ordered(dy)
    dB_parts, dC_parts = (A.new_empty(-(-channels // cut.lanes), *B.shape) for _ in range(2))
    stretches = (directions, images, groups, cut.splits)
    dA_parts = A.new_zeros(*stretches, n, channels)
    dD_parts, dbias_parts = (A.new_empty(*stretches, channels) for _ in range(2))
    gaps = _strides("g", dB_parts)
    # the states before every tile: of one direction at a time, as they take twice the memory of u at 16 states
    begun = A.new_empty(images, groups, kept.shape[3], 2, n, channels)
    states = A.new_empty(images, groups, cut.splits * cut.tiles, n, channels)
    carry = walk.carries(cut, _swapped(dlast), BACK=True, dy=dy)
    for k in range(directions):
        begun[:, :, :, 0] = kept[k]
        walk.run("forward", chunks, k, carry=begun, kept=states, chunks=states.shape[2], EVERY=1)
        walk.run(
            "backward", cut, k, carry=carry[k], states=states, dy=dy, du=du_room, ddelta=ddelta_room[k], dA=dA_parts[k],
            dB=dB_parts[:, k], dC=dC_parts[:, k], dD=dD_parts[k], dbias=dbias_parts[k], ADD=k > 0, **gaps,
        )  # fmt: skip
    dA.copy_(dA_parts.sum((1, 3)).transpose(-1, -2))
    for total, parts in ((dD, dD_parts), (dbias, dbias_parts)):
        if total.numel():
            total.copy_(parts.sum((1, 3)))
    for total, parts in ((dB, dB_parts), (dC, dC_parts)):
        total.copy_(parts.sum(0))
    dstate.copy_(_swapped(carry[:, :, :, 0, cut.tiles % 2]))
    return walk.fill(du, du_room), walk.fill(ddelta, ddelta_room), dA, dB, dC, dD, dbias, dstate


def _swapped(x: Tensor) -> Tensor:
    """States (.., r, n) as (.., n, r), or back."""
    return x.transpose(-1, -2).contiguous()


def _strides(prefix: str, x: Tensor) -> dict[str, int]:
    """The kernels' stride arguments for (.., k, b, g, l, n)."""
    axes = ("part", "direction", "image", "group", "step", "state")[-x.ndim :]
    sized = zip(axes, x.shape, x.stride(), strict=True)
    return {f"{prefix}_{axis}": stride if size > 1 else 0 for axis, size, stride in sized}


class _Cut(NamedTuple):
    """How the walks are divided: tiles of steps x lanes (channels), and parallel stretches of several tiles."""

    steps: int
    lanes: int
    tiles: int
    splits: int


class _Launches:
    """The inputs in a memory order that the kernels read, and launches over them."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
        height: int, width: int, delta_softplus: bool, zoh: bool,
    ) -> None:  # fmt: skip
        self.directions, self.images, self.groups, self.length, self.channels = delta.shape
        n = A.shape[-1]
        # kernels count within an image in 32 bits; masked elements may be as far behind its end as the image is long
        if (values := self.length * max(self.groups * self.channels, n, 2)) >= 2**31:
            raise InvalidArgument(
                f"an image has {values} values but the Triton scan counts below 2^31; use backend 'eager'"
            )
        self.sequence = self.directions == height == 1 and u.stride(2) == 1
        self.u, self.delta = self.ordered(u), self.ordered(delta)
        near = (self.length - 1) * B.stride(3) + (n - 1) * B.stride(4) < 2**31
        self.B, self.C = (B, C) if near and B.stride() == C.stride() else (B.contiguous(), C.contiguous())
        self.A = _swapped(A)
        self.D, self.bias = (None if x is None else x.contiguous() for x in (D, delta_bias))
        self.constants: dict[str, Any] = {
            "images": self.images, "groups": self.groups, "channels": self.channels, "length": self.length,
            "height": height, "width": width, "turn": 2 if self.directions == 2 else 1, "unit": 1,
            "N": n, "SEQUENCE": self.sequence, "SOFTPLUS": delta_softplus, "ZOH": zoh, **_strides("b", self.B),
        }  # fmt: skip

    def turned(self, x: Tensor) -> Tensor:
        """(.., g, l, r) with its axes in memory order: (.., g, r, l) for sequences, (.., l, g, r) for maps. Or back."""
        return x.transpose(-1, -2) if self.sequence else x.transpose(-3, -2)

    def ordered(self, x: Tensor) -> Tensor:
        return self.turned(x).contiguous()

    def room(self, out: Tensor) -> Tensor:
        """Memory for the result `out`: its own where order and dtype allow, float32 where directions add up in it."""
        own = self.turned(out)
        exact = out.dtype == torch.float32 or self.directions == 1 or out.ndim == 5
        return own if own.is_contiguous() and exact else torch.empty(own.shape, device=out.device, dtype=torch.float32)

    def fill(self, out: Tensor, room: Tensor) -> Tensor:
        return out if room.data_ptr() == out.data_ptr() else out.copy_(self.turned(room))

    def cut(self, *, back: bool) -> _Cut:
        """Tiles that fit into registers, and enough stretches to give every multiprocessor several programs."""
        narrow = self.channels % 64 in range(1, 33) or (back and self.constants["ZOH"])
        lanes, steps = (32, 8 if back else 16) if narrow else (64, 8)
        if _interpreted():
            lanes, steps = 16, 8
        tiles = -(-self.length // steps)
        programs = self.images * self.groups * -(-self.channels // lanes)
        wanted = (8 if back else 12) * _multiprocessors(self.u.device)
        if 2 * programs > wanted:
            return _Cut(steps, lanes, tiles, 1)
        # a power of two, so that stretches of the usual maps are all full
        in_one = min(tiles, max(4, 1 << (tiles * programs // wanted).bit_length()))
        return _Cut(steps, lanes, in_one, -(-tiles // in_one))

    def carries(self, cut: _Cut, edge: Tensor, *, BACK: bool, dy: Tensor | None = None) -> Tensor:
        """(k, b, g, stretch, 2, n, r): slot 0 has the first state of each stretch; the outermost begins with `edge`."""
        shape = (*edge.shape[:3], cut.splits, 2, *edge.shape[3:])
        if cut.splits == 1:
            carry = edge.new_empty(shape)
            carry[:, :, :, 0, 0] = edge
            return carry
        carry, sums = edge.new_zeros(shape), edge.new_empty(*shape[:4], self.channels)
        if BACK:
            self.run("backward", cut, carry=carry, sums=sums, dy=dy, LOCAL=True)
        else:
            self.run("forward", cut, carry=carry, sums=sums)
        self.run("carry_on", cut, carry=carry, sums=sums, edge=edge, final=cut.tiles % 2, BACK=BACK)
        return carry

    def run(self, kernel: str, cut: _Cut, only: int | None = None, **arguments: Any) -> None:
        """Launch a kernel of `triton_kernels` over all directions or one; arguments left out are None or 0."""
        from deformmamba.scan import triton_kernels

        launched = getattr(triton_kernels, kernel)
        some = slice(None) if only is None else slice(only, only + 1)
        values: dict[str, Any] = {
            **dict.fromkeys(launched.arg_names), "chunks": 0, "EVERY": 0, **self.constants,
            "u": self.u, "delta": self.delta[some], "A": self.A[some], "B": self.B[some], "C": self.C[some],
            "D": None if self.D is None else self.D[some], "bias": None if self.bias is None else self.bias[some],
            "first": only or 0, "splits": cut.splits, "tiles": cut.tiles, "STEPS": cut.steps, "LANES": cut.lanes,
            "EVEN": self.length == cut.splits * cut.tiles * cut.steps, **arguments,
        }  # fmt: skip
        rows = len(self.A[some]) * self.images * self.groups * -(-self.channels // cut.lanes)
        grid = (rows * (values["N"] if kernel == "carry_on" else cut.splits),)
        with torch.cuda.device(self.u.device) if self.u.is_cuda else nullcontext():
            launched[grid](
                **{name: values[name] for name in launched.arg_names}, num_warps=1, num_stages=1, enable_fp_fusion=True
            )


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
