"""The CPU backend: numba kernels, jobs for several threads, compiled code on disk.

Lanes are channels (`cpu_kernels`), so that nothing is summed across lanes and a channels-last map is read as it lies in
memory, in all four directions, without a permuted copy. A job is one image, one group and a range of channels; it walks
the directions one after the other and alone adds to its channels of y. The backward pass starts every chunk from the
state that the forward pass kept, so it computes each state once more and never the whole history.

Numba's own thread layers are not used: one of them aborts the process when two Python threads call at once, and they do
not survive a fork. The kernels release the GIL instead, and jobs run on PyTorch's threads (`deformmamba.threads`).
"""

import itertools
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from deformmamba.compiled import compiled, why_numba_does_not_compile
from deformmamba.scan.backend import Abilities
from deformmamba.tensors import as_array
from deformmamba.threads import ForkLock, run_on_threads
from deformmamba.torch_private import with_huge_pages

# Steps between kept states. They take 1/8 of the memory of u at 16 states; a chunk's states (264 kB) fit an L2 cache.
CHUNK = 128

ABILITIES = Abilities(low_rank=True)

_DTYPES: dict[torch.dtype, Any] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def unusable(tensor: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot run on `tensor` (None: on anything here), and the cure, separated by a semicolon."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"it runs on CPU tensors only, the tensor is on {tensor.device}; move it to the CPU"
    return why_numba_does_not_compile()


def compiled_for() -> str:
    """The processor that numba compiles the kernels for, and which variant of 2^x they use on it."""
    from numba.core.registry import cpu_target

    from deformmamba.scan.cpu_kernels import LANES

    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    found = features.split(",")
    widths = (("+avx512dq", "AVX-512"), ("+avx2", "AVX2"))
    wide = next((word for flag, word in widths if flag in found), "instructions of 128 bits")
    exponential = "a table and a parabola" if wide == "AVX-512" else "a polynomial"
    return f"{name} ({wide}), vectors of {LANES} channels, 2^x by {exponential}"


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    keep: bool,
    delta_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, last state, kept states): see `backend`."""
    images, groups, length, channels = u.shape
    directions, n = A.shape[0], A.shape[-1]
    y = with_huge_pages(torch.empty_like(u))
    last = A.new_empty(directions, images, groups, channels, n)
    chunks = -(-length // CHUNK) if keep else 0
    kept = with_huge_pages(A.new_empty(directions, images, groups, chunks, n, channels))
    initial_state = torch.zeros_like(last) if initial_state is None else initial_state
    D, delta_bias, delta_weight = _four_axes(A, D, delta_bias, delta_weight)
    q = delta_weight.shape[-1]
    weights = A, B, C, D, delta_bias, delta_weight, initial_state
    given = (_readable(u, directions), _readable(delta, directions), *weights)
    jobs = _jobs(images, groups, channels, torch.get_num_threads())

    def scratch(tiles: int) -> tuple[Any, ...]:
        shapes = (3, CHUNK, 1), (3, tiles, n, 1), (3, tiles, 1, 1), (2, CHUNK, _vectors(n))
        return _scratch(u, *shapes, (1, tiles, q, 1), (1, CHUNK, _vectors(q)))

    _run_kernel("forward", zoh, given, (y, last, kept), scratch, jobs, (height, width), delta_softplus)
    return y, last, kept


def backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    kept: torch.Tensor,
    dy: torch.Tensor,
    dlast: torch.Tensor,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    delta_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, delta_bias (empty if not given), initial_state, and delta_weight if there
    is one."""
    images, groups, _, channels = u.shape
    directions, n = A.shape[0], A.shape[-1]
    jobs = _jobs(images, groups, channels, torch.get_num_threads())
    parts = jobs.parts
    low_rank = delta_weight is not None
    D, delta_bias, delta_weight = _four_axes(A, D, delta_bias, delta_weight)
    q = delta_weight.shape[-1]
    du, dstate = with_huge_pages(torch.empty_like(u)), torch.empty_like(dlast)
    # gradients summed over channels have one slot for each part of the channels, those summed over images one per image
    dB, dC = (B.new_empty(parts, *x.shape) for x in (B, C))
    ddelta = delta.new_empty(parts, *delta.shape) if low_rank else with_huge_pages(torch.empty_like(delta))[None]
    dA, dD, dbias, dweight = (x.new_empty(images, *x.shape) for x in (A, D, delta_bias, delta_weight))
    given = (_readable(u, directions), _readable(delta, directions), A, B, C, D, delta_bias, delta_weight)
    results = (du, ddelta, dA, dB, dC, dD, dbias, dweight, dstate)

    def scratch(tiles: int) -> tuple[Any, ...]:
        shapes = (6, CHUNK, 1), (4, tiles, n, 1), (5, tiles, 1, 1), (4, CHUNK, _vectors(n))
        return _scratch(u, *shapes, (2, tiles, q, 1), (2, CHUNK, _vectors(q)), (2, CHUNK + 1, n, 1))

    arrays = (*given, kept, _readable(dy, directions), dlast), results
    _run_kernel("backward", zoh, *arrays, scratch, jobs, (height, width), delta_softplus)

    def total(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.sum(parts[: len(parts) if len(jobs.rows) else 0], 0, out=torch.empty_like(like))

    ddelta = total(ddelta, delta) if low_rank else ddelta[0]
    dD, dbias = (x.sum(0).squeeze(-1) for x in (dD, dbias))
    rest = (dstate, total(dweight, delta_weight)) if low_rank else (dstate,)
    return du, ddelta, total(dA, A), total(dB, B), total(dC, C), dD, dbias, *rest


def _four_axes(A: torch.Tensor, *weights: torch.Tensor | None) -> list[torch.Tensor]:
    """D and delta_bias (k, g, r) and delta_weight (k, g, r, q) for kernels: four axes, one of them empty for None."""
    D, delta_bias, delta_weight = weights
    return [
        *(A.new_empty(*A.shape[:2], 0, 1) if x is None else x.unsqueeze(-1) for x in (D, delta_bias)),
        A.new_empty(*A.shape[:3], 0) if delta_weight is None else delta_weight,
    ]


def _readable(rows: torch.Tensor, directions: int) -> torch.Tensor:
    """(.., l, r) so that kernels read it quickly: consecutive channels, or steps where only one direction runs."""
    return rows if rows.stride(-1) == 1 or (directions == 1 and rows.stride(-2) == 1) else rows.contiguous()


def _vectors(lanes: int) -> int:
    """The number of vectors that hold `lanes` numbers."""
    return -(-lanes // _lanes())


@cache
def _lanes() -> int:
    from deformmamba.scan.cpu_kernels import LANES

    return LANES


def _scratch(like: torch.Tensor, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """Memory of each shape, whose last axis counts vectors, in one piece; each starts on a cache line."""
    pieces, total = _layout(shapes)
    memory = np.empty(total * like.element_size() + 64, np.uint8)
    numbers = memory[-memory.ctypes.data % 64 :][: total * like.element_size()].view(_DTYPES[like.dtype])
    return tuple([numbers[start:stop].reshape(shape) for start, stop, shape in pieces])


@lru_cache
def _layout(shapes: tuple[tuple[int, ...], ...]) -> tuple[list[tuple[int, int, tuple[int, ...]]], int]:
    """For each of `_scratch`'s shapes: first and last number in the memory, shape in numbers; and the total."""
    in_numbers = [(*shape[:-1], shape[-1] * _lanes()) for shape in shapes]
    ends = list(itertools.accumulate(map(math.prod, in_numbers)))
    return list(zip([0, *ends], ends, in_numbers, strict=False)), ends[-1]


# ------------------------------------------------------------------------------------------------------------- threads


class _Jobs(NamedTuple):
    """The work of one call.

    Attributes:
        rows: (part, image, group, first channel, end) of each job.
        parts: in how many parts the channels are divided.
        tiles: vectors of channels in the largest job.
    """

    rows: np.ndarray
    parts: int
    tiles: int


@lru_cache
def _jobs(images: int, groups: int, channels: int, threads: int) -> _Jobs:
    """A few jobs for each thread, so that one that starts late does less.

    Every part reads B and C and has its own gradients of them, which are summed later. So channels are split into even
    parts, which are smaller than about six vectors only if this is needed to occupy every thread."""
    lanes, vectors = _lanes(), _vectors(channels)
    total = images * groups * vectors
    if not total:
        return _Jobs(np.empty((0, 5), np.int64), 1, 0)
    per_part = min(max(-(-total // (4 * threads)), 6), -(-total // threads), vectors) if threads > 1 else vectors
    parts = -(-vectors // per_part)
    edges = np.minimum(np.arange(parts + 1) * vectors // parts * lanes, channels)
    image, group, part = (x.ravel() for x in np.indices((images, groups, parts)))
    rows = np.stack([part, image, group, edges[part], edges[part + 1]], 1).astype(np.int64, copy=False)
    return _Jobs(rows, parts, _vectors(int(np.diff(edges).max())))


def _run_kernel(
    name: str,
    zoh: bool,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    scratch: Callable[[int], tuple[Any, ...]],
    jobs: _Jobs,
    *rest: Any,
) -> None:
    """Run the kernel `name` over all jobs, on torch.get_num_threads() threads. Each takes jobs until none is left,
    inside compiled code, and has its own scratch memory."""
    rows, taken = jobs.rows, np.zeros(1, np.int64)
    if not len(rows):
        return
    kernel = _kernel(name, inputs[0].dtype, zoh)
    arrays = [tuple(map(as_array, tensors)) for tensors in (inputs, outputs)]

    def work() -> None:
        if taken[0] < len(rows):
            kernel(*arrays, scratch(jobs.tiles), rows, taken, *rest, zoh or None)

    run_on_threads(work, min(torch.get_num_threads(), len(rows)))


# ----------------------------------------------------------------------------------------------------------- compiling

_kernels: dict[tuple[str, torch.dtype, bool], Any] = {}
_compiling = ForkLock()

_DIMENSIONS = {  # of the arrays in `inputs`, `outputs` and `scratch`
    "forward": ((4, 5, 4, 5, 5, 4, 4, 4, 5), (4, 5, 6), (3, 4, 4, 3, 4, 3)),
    "backward": ((4, 5, 4, 5, 5, 4, 4, 4, 6, 4, 5), (4, 6, 5, 6, 6, 5, 5, 5, 5), (3, 4, 4, 3, 4, 3, 4)),
}


def _kernel(name: str, dtype: torch.dtype, zoh: bool) -> Any:
    """The compiled kernel: from this process, from disk, or compiled now."""
    key = (name, dtype, zoh)
    if key not in _kernels:
        with _compiling:
            if key not in _kernels:
                _kernels[key] = _compile(*key)
    return _kernels[key]


def _compile(name: str, dtype: torch.dtype, zoh: bool) -> Any:
    from numba import from_dtype, types

    from deformmamba.scan import cpu_kernels

    real = from_dtype(_DTYPES[dtype])
    array: Any = types.Array
    inputs, outputs, scratch = (
        types.Tuple([array(real, n, layout) for n in dimensions])
        for dimensions, layout in zip(_DIMENSIONS[name], ("A", "A", "C"), strict=True)  # scratch alone is contiguous
    )
    pair = types.UniTuple(types.int64, 2)
    has_zoh = types.boolean if zoh else types.none
    jobs, taken = array(types.int64, 2, "C"), array(types.int64, 1, "C")
    signature = types.void(inputs, outputs, scratch, jobs, taken, pair, types.boolean, has_zoh)

    what = f"CPU scan ({name} pass, {_DTYPES[dtype]}{', zoh' if zoh else ''})"
    return compiled(getattr(cpu_kernels, name), signature, what)
