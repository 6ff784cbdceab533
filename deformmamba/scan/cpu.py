"""What a CPU runs: numba kernels, a thread pool of ours, compiled code on disk.

Lanes are channels (`cpu_kernels`), so that nothing is summed across lanes and a channels-last map is read as it lies in
memory, in all four directions, without a permuted copy. A job is one image, one group and a range of channels; it walks
the directions one after the other and alone adds to its channels of y. The backward pass starts every chunk from the
state that the forward pass kept, so it computes each state once more and never the whole history.

Numba's own thread layers are not used: one of them aborts the process when two Python threads call at once, and they do
not survive a fork. The kernels release the GIL instead, and jobs run on a pool that each process makes for itself.
"""

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

# Steps between kept states. They take 1/4 of the memory of u at 16 states; a chunk's states fit the L2 cache.
CHUNK = 64

_DTYPES: dict[torch.dtype, Any] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def unusable(tensor: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot run on `tensor` (None: on anything here), and the cure, separated by a semicolon."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"it runs on CPU tensors only, the tensor is on {tensor.device}; move it to the CPU"
    try:
        import numba  # noqa: F401
    except Exception as error:  # a numpy that numba does not know yet raises ImportError, a broken llvmlite OSError
        return f"numba cannot be imported ({error}); pip install --upgrade numba"
    return None


def forward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    height: int,
    width: int,
    softplus: bool,
    zoh: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, last state, kept states): see `operator`."""
    images, groups, length, channels = u.shape
    directions, n = A.shape[0], A.shape[-1]
    y = torch.empty_like(u)
    last = A.new_empty(directions, images, groups, channels, n)
    chunks = -(-length // CHUNK) if keep else 0
    kept = A.new_empty(directions, images, groups, chunks, n, channels)
    state = torch.zeros_like(last) if state is None else state
    kernel = _kernel("forward", u.dtype, zoh)
    us, deltas, As, Bs, Cs, Ds, biases, states, ys, lasts, kepts = _arrays(
        _readable(u, directions), _readable(delta, directions), A, B, C, *_sides(A, D, bias), state, y, last, kept
    )

    def job(image: int, group: int, first: int, end: int) -> None:
        here = (slice(None), image, group)
        weights = (slice(None), group)
        inputs = us[image, group], deltas[here], As[weights], Bs[here], Cs[here], Ds[weights], biases[weights]
        tiles = -(-(end - first) // _lanes())
        scratch = (
            _scratch(u, 3, CHUNK),
            _scratch(u, 3, tiles, n),
            _scratch(u, 2, tiles, 1),
            _scratch(u, 2, CHUNK, last=-(-n // _lanes()) * _lanes()),
        )
        outputs = ys[image, group], lasts[here], kepts[here]
        kernel((*inputs, states[here]), outputs, scratch, (height, width), softplus, (first, end), zoh or None)

    _share([partial(job, *where) for _, *where in _jobs(images, groups, channels)])
    return y, last, kept


def backward(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    dy: torch.Tensor,
    dlast: torch.Tensor,
    height: int,
    width: int,
    softplus: bool,
    zoh: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, bias (empty where there is none) and the initial state."""
    images, groups, _, channels = u.shape
    directions, n = A.shape[0], A.shape[-1]
    jobs = _jobs(images, groups, channels)
    parts = 1 + max((part for part, *_ in jobs), default=0)
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(dlast)
    dB, dC = (torch.empty_like(x) if parts == 1 else x.new_empty(parts, *x.shape) for x in (B, C))
    dA = A.new_empty(images, *A.shape)
    sides = _sides(A, D, bias)
    dsides = tuple(x.new_empty(images, *x.shape) for x in sides)
    kernel = _kernel("backward", u.dtype, zoh)
    us, deltas, As, Bs, Cs, Ds, biases = _arrays(
        _readable(u, directions), _readable(delta, directions), A, B, C, *sides
    )
    kepts, dys, dlasts = _arrays(kept, _readable(dy, directions), dlast)
    dus, ddeltas, dAs, dBs, dCs, dDs, dbiases, dstates = _arrays(du, ddelta, dA, dB, dC, *dsides, dstate)

    def job(part: int, image: int, group: int, first: int, end: int) -> None:
        here = (slice(None), image, group)
        mine = here if parts == 1 else (part, *here)
        weights = (slice(None), group)
        dweights = (image, *weights)
        inputs = us[image, group], deltas[here], As[weights], Bs[here], Cs[here], Ds[weights], biases[weights]
        given = kepts[here], dys[image, group], dlasts[here]
        outputs = dus[image, group], ddeltas[here], dAs[dweights], dBs[mine], dCs[mine]
        doutputs = dDs[dweights], dbiases[dweights], dstates[here]
        tiles = -(-(end - first) // _lanes())
        scratch = (
            _scratch(u, 6, CHUNK),
            _scratch(u, 4, tiles, n),
            _scratch(u, 4, tiles, 1),
            _scratch(u, 4, CHUNK, last=-(-n // _lanes()) * _lanes()),
        )
        trace = _scratch(u, 2, CHUNK + 1, n)
        kernel(
            (*inputs, *given), (*outputs, *doutputs), (*scratch, trace),
            (height, width), softplus, (first, end), zoh or None,
        )  # fmt: skip

    _share([partial(job, *where) for where in jobs])
    if parts > 1:
        dB, dC = (torch.sum(x, 0, out=torch.empty_like(like)) for x, like in ((dB, B), (dC, C)))
    dD, dbias = (x.sum(0).squeeze(-1) for x in dsides)
    return du, ddelta, dA.sum(0), dB, dC, dD, dbias, dstate


def _sides(A: torch.Tensor, *vectors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """D and bias (k, g, r) as the kernels take them: (k, g, r, 1), and (k, g, 0, 1) for None."""
    return tuple(A.new_empty(*A.shape[:2], 0, 1) if x is None else x[..., None] for x in vectors)


def _readable(rows: torch.Tensor, directions: int) -> torch.Tensor:
    """(.., l, r) so that kernels read it quickly: consecutive channels, or steps where only one direction runs."""
    return rows if rows.stride(-1) == 1 or (directions == 1 and rows.stride(-2) == 1) else rows.contiguous()


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [t.detach().numpy() for t in tensors]


def _lanes() -> int:
    from deformmamba.scan.cpu_kernels import LANES

    return LANES


def _scratch(like: torch.Tensor, *shape: int, last: int | None = None) -> Any:
    """Zeros (*shape, last or one vector) that start on a cache line."""
    shape = (*shape, last or _lanes())
    size = math.prod(shape) * like.element_size()
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(_DTYPES[like.dtype]).reshape(shape)


# ------------------------------------------------------------------------------------------------------------- threads


def _jobs(images: int, groups: int, channels: int) -> list[tuple[int, int, int, int, int]]:
    """(part, image, group, first channel, end): channels are split where there are fewer images than threads."""
    lanes = _lanes()
    tiles = -(-channels // lanes)
    units = images * groups
    if not units * tiles:
        return []
    per_part = -(-tiles // min(tiles, -(-torch.get_num_threads() // units)))
    return [
        (part, image, group, start * lanes, min(channels, (start + per_part) * lanes))
        for image in range(images)
        for group in range(groups)
        for part, start in enumerate(range(0, tiles, per_part))
    ]


def _share(jobs: list[Callable[[], None]]) -> None:
    """Run all jobs, on torch.get_num_threads() threads: the caller's and helpers, who come when they are free.

    The caller never waits for a helper that has not begun, so any number of callers can share one pool."""
    waiting = deque(jobs)

    def work() -> None:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            job()

    helpers = [_helpers().submit(work) for _ in range(min(torch.get_num_threads(), len(jobs)) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _helpers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), "deformmamba-scan")
        return _pool


def _forget_threads() -> None:
    """In a forked child: the pool's threads stayed with the parent, and so may have whoever held a lock."""
    global _pool, _lock, _compiling
    _pool, _lock, _compiling = None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


# ----------------------------------------------------------------------------------------------------------- compiling

_kernels: dict[tuple[str, torch.dtype, bool], Any] = {}
_compiling = threading.Lock()

_DIMENSIONS = {  # of the arrays in `inputs`, `outputs` and `scratch`
    "forward": ((2, 3, 3, 3, 3, 3, 3, 3), (2, 3, 4), (3, 4, 4, 3)),
    "backward": ((2, 3, 3, 3, 3, 3, 3, 4, 2, 3), (2, 3, 3, 3, 3, 3, 3, 3), (3, 4, 4, 3, 4)),
}


def _kernel(name: str, dtype: torch.dtype, zoh: bool) -> Any:
    """The compiled kernel, from this process, from disk, or made now."""
    key = (name, dtype, zoh)
    if key not in _kernels:
        with _compiling:
            if key not in _kernels:
                _kernels[key] = _compile(*key)
    return _kernels[key]


def _compile(name: str, dtype: torch.dtype, zoh: bool) -> Any:
    from numba import from_dtype, njit, types
    from numba.core import event

    from deformmamba.scan import cpu_kernels

    real = from_dtype(_DTYPES[dtype])
    array: Any = types.Array
    inputs, outputs, scratch = (
        types.Tuple([array(real, n, layout) for n in dimensions])
        for dimensions, layout in zip(_DIMENSIONS[name], ("A", "A", "C"), strict=True)  # scratch alone is contiguous
    )
    pair = types.UniTuple(types.int64, 2)
    exact = types.boolean if zoh else types.none
    signature = types.void(inputs, outputs, scratch, pair, types.boolean, pair, exact)

    def compiled(cache: bool) -> Any:
        kernel = njit(nogil=True, error_model="numpy", cache=cache)(getattr(cpu_kernels, name))
        kernel.compile(signature)
        kernel.disable_compile()
        return kernel

    what = f"{name} pass, {_DTYPES[dtype]}{', zoh' if zoh else ''}"
    notice = threading.Timer(1, lambda: print(f"deformmamba: compiling the CPU scan ({what}), once", file=sys.stderr))
    notice.daemon = True

    class Announce(event.Listener):
        """Hears when numba compiles; it does not when the code comes from disk."""

        def on_start(self, _: Any) -> None:
            if notice.ident is None:
                notice.start()

        def on_end(self, _: Any) -> None:
            pass

    try:
        with event.install_listener("numba:compile", Announce()):
            try:
                return compiled(cache=True)
            except Exception:  # of the cache: nowhere to write, a full disk, a damaged file; any other comes again here
                return compiled(cache=False)
    finally:
        notice.cancel()
