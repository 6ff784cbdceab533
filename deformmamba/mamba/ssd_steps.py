"""Mamba-2's scan step by step on a CPU, for heads whose decays are too fast for `ssd_factored`.

A state stays in the first-level cache, so that a step costs little more than its arithmetic, whatever its decay is.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deformmamba.mamba import causal_conv_cpu
from deformmamba.tensors import as_array
from deformmamba.threads import run_on_threads


def usable(x: Tensor) -> bool:
    """Whether the kernel runs on tensors like `x`: on the CPU, float32, where numba can be imported."""
    return x.dtype == torch.float32 and causal_conv_cpu.usable(x)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, h: Tensor, y: Tensor, kept: Tensor,
    span: int,
) -> None:  # fmt: skip
    """Writes y (l, r, p), the last state into h (n, r p), and the states before the spans into kept (spans, n, r p)."""
    (length, r, p), n = x.shape, len(h)
    decay = torch.exp(dt * A)
    if run is not None:
        decay = decay.masked_fill(F.pad(run[1:] != run[:-1], (1, 0))[:, None], 0)
    missing = -length % 4  # steps of size zero, which change nothing
    x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)).contiguous() for t in (x, dt, B, C))
    decay = F.pad(decay, (0, 0, 0, missing), value=1.0).contiguous()
    states, result = h.view(n, r, p).permute(1, 0, 2).contiguous(), x.new_empty(x.shape)
    before = kept if kept.is_contiguous() else kept.contiguous()
    arrays = [as_array(t) for t in (x, dt, decay, B, C, states, result, before.view(-1, n, r, p))]
    left = list(range(r))

    def work() -> None:
        while True:
            try:
                head = left.pop()
            except IndexError:
                return
            _kernel()(*arrays, span, head, head + 1)

    _kernel()  # compiled once, before the threads start
    run_on_threads(work, min(r, torch.get_num_threads()))
    y.copy_(result[:length])
    h.view(n, r, p).copy_(states.permute(1, 0, 2))
    if before is not kept:
        kept.copy_(before)


@functools.cache
def _kernel() -> Any:
    """The compiled kernel, loaded from disk or compiled now."""
    from numba import float32, int64, njit, types

    from deformmamba.mamba import ssd_step_kernels

    cube, rows = float32[:, :, ::1], float32[:, ::1]
    signature = types.void(cube, rows, rows, rows, rows, cube, cube, float32[:, :, :, ::1], int64, int64, int64)

    def compiled(cache: bool) -> Any:
        # NaN and infinity are data
        flags = {"contract", "nsz"}
        kernel = njit(nogil=True, error_model="numpy", fastmath=flags, cache=cache)(ssd_step_kernels.scan)
        kernel.compile(signature)
        kernel.disable_compile()
        return kernel

    try:
        return compiled(cache=True)
    except Exception:  # of the cache: no writable folder, a full disk, a damaged file; other errors occur again below
        return compiled(cache=False)
