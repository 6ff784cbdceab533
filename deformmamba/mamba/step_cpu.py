"""One step of a scan and of the causal convolution on a CPU: when the C functions of `step_kernels` apply, and how.

Each function returns None where it does not apply; the caller then uses PyTorch, with the same result.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from deformmamba.compiled import kept_on_disk, numba_compiles
from deformmamba.tensors import PLAIN
from deformmamba.torch_private import differentiates_by_transform, transforms_are_active


def scan(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> torch.Tensor | None:
    """`selective_state_update`: y, with `state` updated."""
    if not _apply((state, x, dt, A, B, C), D, z, dt_bias) or state.ndim not in (3, 4) or not x.ndim or B.ndim < 2:
        return None
    one_head = state.ndim == 3
    sizes = state.shape[1:]
    heads, d, n = (1, *sizes) if one_head else sizes
    groups = 1 if B.ndim == 2 else B.shape[1]
    images = len(x)
    wanted = (images, n) if B.ndim == 2 else (images, groups, n)
    if not (
        x.shape == dt.shape == state.shape[:-1]
        and A.shape == sizes
        and B.shape == C.shape == wanted
        and (z is None or z.shape == x.shape)
        and all(t is None or t.shape == sizes[:-1] for t in (D, dt_bias))
        and groups
        and heads % groups == 0
        and state.is_contiguous()
        and not _share_memory(state, x, dt, B, C, *(t for t in (z, D) if t is not None))
        and 1 == (x.stride(-1) if d > 1 else 1) == (B.stride(-1) if n > 1 else 1) == (C.stride(-1) if n > 1 else 1)
    ):
        return None
    # Mamba-2 has one rate and one dt for each head, expanded
    narrow = not one_head and A.stride()[1:] == (0, 0) and dt.stride(2) == 0
    narrow = narrow and (dt_bias is None or dt_bias.stride(1) == 0)
    if narrow:
        A, dt = A[:, 0, 0], dt[..., 0]
        dt_bias = None if dt_bias is None else dt_bias[:, 0]
    step = dt if dt_bias is None else dt + dt_bias
    step = (F.softplus(step) if dt_softplus else step).contiguous()
    A, y = A.contiguous(), x.new_empty(x.shape)
    strides = [t.stride(0) if t.ndim == 2 else t.stride()[:2] for t in (x, B, C)]
    both = [s for stride in strides for s in ((stride, 0) if isinstance(stride, int) else stride)]
    addresses = [t.data_ptr() for t in (state, x, step, A, B, C, y)]
    _functions()["head_step" if narrow else "scan_step"](
        *addresses, images, heads, d, n, heads // groups, *both
    )  # fmt: skip
    _written(state)
    y = y if D is None else y.addcmul_(x, D)
    return y if z is None else y.mul_(F.silu(z))


def convolution(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor | None:
    """y of x (b, d) or (b, d, 1), with `state` (b, d, s) updated; weight (d, width)."""
    if not _apply((x, state, weight), bias):
        return None
    if state.ndim != 3 or weight.ndim != 2 or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 1)):
        return None
    shape = x.shape
    x = x.reshape(shape[:2])
    (images, d), size, width = x.shape, state.shape[2], weight.shape[1]
    if not (state.shape == (images, d, size) and weight.shape == (d, width) and 1 <= width <= size + 1 and size):
        return None
    if not state.is_contiguous() or (bias is not None and bias.shape != (d,)) or _share_memory(state, x):
        return None
    x, weight = x.contiguous(), weight.contiguous()
    bias = x.new_zeros(d) if bias is None else bias.contiguous()
    y = x.new_empty(images, d)
    _functions()["conv_step"](*(t.data_ptr() for t in (x, state, weight, bias, y)), images, d, size, width, silu)
    _written(state)
    return y.view(shape)


def _apply(needed: tuple[torch.Tensor, ...], *optional: torch.Tensor | None) -> bool:
    """Whether all are ordinary float32 tensors on the CPU, and nothing is differentiated, traced or transformed."""
    differentiable = torch.is_grad_enabled()
    for t in (*needed, *(t for t in optional if t is not None)):
        if (
            type(t) not in PLAIN
            or t.dtype != torch.float32
            or t.device.type != "cpu"
            or t.layout != torch.strided
            or (differentiable and t.requires_grad)
            or not t.numel()
        ):
            return False
    return (
        not (torch.compiler.is_compiling() or transforms_are_active() or differentiates_by_transform())
        and numba_compiles()
    )


def _share_memory(state: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether one of the others begins inside the contiguous `state`, so that a kernel overwrites its input."""
    start = state.data_ptr()
    end = start + state.numel() * state.element_size()
    return any(start <= t.data_ptr() < end for t in others)


def _written(state: torch.Tensor) -> None:
    """Tells autograd that `state` changed, as PyTorch's in-place operations do."""
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)


@functools.cache
def _functions() -> dict[str, Callable[..., None]]:
    """The C functions of `step_kernels`, from disk or compiled now."""
    sizes = (("scan_step", 7, 11), ("head_step", 7, 11), ("conv_step", 5, 5))
    return {name: _function(name, pointers, integers) for name, pointers, integers in sizes}


def _function(name: str, pointers: int, integers: int) -> Callable[..., None]:
    from numba import cfunc, types

    from deformmamba.mamba import step_kernels

    signature = types.void(*[types.CPointer(types.float32)] * pointers, *[types.int64] * integers)
    # sums may be reordered to use vectors; NaN and infinity are data
    options: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}

    def compiled(keep: bool) -> Any:
        return cfunc(signature, cache=keep, **options)(getattr(step_kernels, name))

    kernel = kept_on_disk(compiled, "steps of generation")
    _kept.append(kernel)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers)
    return prototype(kernel.address)


_kept: list[Any] = []  # the machine code behind the addresses
