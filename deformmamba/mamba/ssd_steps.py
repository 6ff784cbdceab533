"""Mamba-2's scan step by step on a CPU, for heads whose decays are too fast for `ssd_factored`.

A state stays in the first-level cache, so that a step costs little more than its arithmetic, whatever its decay is.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deformmamba.compiled import compiled, numba_compiles
from deformmamba.tensors import as_array
from deformmamba.threads import run_each


def usable(x: Tensor) -> bool:
    """Whether the kernel runs on tensors like `x`: on the CPU, float32, where numba can be imported."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and numba_compiles()


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
    kernel = _kernel()
    run_each(lambda head: kernel(*arrays, span, head, head + 1), range(r), min(r, torch.get_num_threads()))
    y.copy_(result[:length])
    h.view(n, r, p).copy_(states.permute(1, 0, 2))
    if before is not kept:
        kept.copy_(before)


@functools.cache
def _kernel() -> Any:
    """The compiled kernel, loaded from disk or compiled now."""
    from numba import float32, int64, types

    from deformmamba.mamba import ssd_step_kernels

    cube, rows = float32[:, :, ::1], float32[:, ::1]
    signature = types.void(cube, rows, rows, rows, rows, cube, cube, float32[:, :, :, ::1], int64, int64, int64)
    fastmath = {"contract", "nsz"}  # NaN and infinity are data
    return compiled(ssd_step_kernels.scan, signature, "scan of Mamba-2 on the CPU", fastmath=fastmath)
