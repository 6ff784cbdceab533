"""What a CPU runs for `modulated_deform_conv2d`: sampling fused by numba, matrix products by BLAS, in bounded memory.

Importing this module imports numba, so `deformmamba.deform` imports it where it is used. Shapes are as there for its
channels-last part.

Output pixels are worked through in chunks. A kernel samples one chunk into `columns` (groups, pixels, K taps, c_in),
and a product with the weight follows. The backward pass keeps nothing from the forward pass: it puts the gradient of
the columns into that one buffer, scatters it to the gradients of x, offset and mask, and leaves the sampled columns in
its place, for the gradient of the weight.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit, uintp
from torch import Tensor

from deformmamba.deform import gather

_CHUNK_BYTES = 4 << 20  # of columns: they stay in the cache between the kernel and the product
_CHUNK_PIXELS = 512  # or at least this many, so that reading a large weight again pays
_TASK_ELEMENTS = 1 << 18  # column elements below which handing work to another thread costs more than it saves
_TASK_CHANNELS = 16  # channels below which locating a sample costs more than summing it


def _kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled when first called, without Python's lock, and kept on disk for the next process where that is possible.

    Plain threads run the kernels: numba's own parallel loops abort when two Python threads enter them (workqueue).
    Fast math without nnan and ninf: a NaN that goes in must come out.
    """
    options |= {"nogil": True, "error_model": "numpy", "fastmath": {"nsz", "arcp", "contract", "afn", "reassoc"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(**options)(function)


_inline = partial(_kernel, forceinline=True)


@_inline
def _locate(y, x, h, w):  # type: ignore[no-untyped-def]
    """Where to sample: (inside, (four pixels), (parts: top, bottom, left, right), (which of those four exist)).

    A pixel outside the image is replaced by its neighbour inside and has part 0. A sample outside [-1, h) x [-1, w) is
    not inside, and zero; a position that is NaN makes parts that are NaN. (At -1 the value is 0, but not the gradient.)
    """
    if not (y >= -1.0 and y < h and x >= -1.0 and x < w):
        part = 0.0 if y == y and x == x else np.nan
        return False, (0, 0, 0, 0), (part, part, part, part), (part, part, part, part)
    row, column = math.floor(y), math.floor(x)
    dy, dx = y - row, x - column
    top, bottom = 1.0 if row >= 0 else 0.0, 1.0 if row + 1 < h else 0.0
    left, right = 1.0 if column >= 0 else 0.0, 1.0 if column + 1 < w else 0.0
    upper, lower = max(row, 0) * w, min(row + 1, h - 1) * w
    before, after = max(column, 0), min(column + 1, w - 1)
    return (
        True,
        (upper + before, upper + after, lower + before, lower + after),
        (top * (1.0 - dy), bottom * dy, left * (1.0 - dx), right * dx),
        (top, bottom, left, right),
    )


# Loops over n channels, of flat arrays. The unsigned indices matter: a signed one may count from the end in Python, and
# numba then does not vectorise.


@_inline
def _fill(out, o, value, n):  # type: ignore[no-untyped-def]
    """out[o:] = value"""
    o = uintp(o)
    for i in range(uintp(n)):
        out[o + i] = value


@_inline
def _blend(out, o, x, a, part, n):  # type: ignore[no-untyped-def]
    """out[o:] = sum of part * x[a:] over the four pixels a"""
    a0, a1, a2, a3 = uintp(a[0]), uintp(a[1]), uintp(a[2]), uintp(a[3])
    w0, w1, w2, w3 = part
    o = uintp(o)
    for i in range(uintp(n)):
        out[o + i] = w0 * x[a0 + i] + w1 * x[a1 + i] + w2 * x[a2 + i] + w3 * x[a3 + i]


@_inline
def _add(out, o, x, a, part, n):  # type: ignore[no-untyped-def]
    """out[o:] += part * x[a:]"""
    o, a = uintp(o), uintp(a)
    for i in range(uintp(n)):
        out[o + i] += part * x[a + i]


@_inline
def _exchange(grad, o, x, a, part, n):  # type: ignore[no-untyped-def]
    """grad[o:] . x[a:] for each of the four pixels a; then `_blend`, in the place of the gradient."""
    a0, a1, a2, a3 = uintp(a[0]), uintp(a[1]), uintp(a[2]), uintp(a[3])
    w0, w1, w2, w3 = part
    s0 = s1 = s2 = s3 = x.dtype.type(0)
    o = uintp(o)
    for i in range(uintp(n)):
        s0 += grad[o + i] * x[a0 + i]
        s1 += grad[o + i] * x[a1 + i]
        s2 += grad[o + i] * x[a2 + i]
        s3 += grad[o + i] * x[a3 + i]
        grad[o + i] = w0 * x[a0 + i] + w1 * x[a1 + i] + w2 * x[a2 + i] + w3 * x[a3 + i]
    return s0, s1, s2, s3


@_kernel
def _sample(x, offset, mask, geometry, columns, first, start, stop):  # type: ignore[no-untyped-def]
    """Write rows [start, stop) of `columns` (groups, n, taps, c_in), whose row 0 is output pixel `first`."""
    h, w, h_out, w_out, kh, kw, stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    n_rows, n_taps, c_in = columns.shape[1:]
    c, n_deform = x.shape[1], offset.shape[1]
    share = c // n_deform
    pixels, out, real = x.reshape(-1), columns.reshape(-1), x.dtype.type
    for r in range(start, stop):
        p = first + r
        image = p // (h_out * w_out) * (h * w)
        y_out, x_out = p // w_out % h_out * stride_y - pad_y, p % w_out * stride_x - pad_x
        for d in range(n_deform):
            for ky in range(kh):
                for kx in range(kw):
                    k = ky * kw + kx
                    dy, dx, m = offset[p, d, k, 0], offset[p, d, k, 1], mask[p, d, k] if mask.size else 1.0
                    inside, at, (top, bottom, left, right), _ = _locate(
                        float(y_out + ky * step_y) + dy, float(x_out + kx * step_x) + dx, h, w
                    )
                    part = (
                        real(m * top * left),
                        real(m * top * right),
                        real(m * bottom * left),
                        real(m * bottom * right),
                    )
                    # one run of channels for each group of the convolution that this deformable group meets
                    low, g = d * share, 0
                    while low < (d + 1) * share:
                        while (g + 1) * c_in <= low:
                            g += 1
                        n = min((d + 1) * share, (g + 1) * c_in) - low
                        o = ((g * n_rows + r) * n_taps + k) * c_in + low - g * c_in
                        a = (
                            (image + at[0]) * c + low,
                            (image + at[1]) * c + low,
                            (image + at[2]) * c + low,
                            (image + at[3]) * c + low,
                        )
                        if inside:
                            _blend(out, o, pixels, a, part, n)
                        else:
                            _fill(out, o, part[0], n)
                        low += n


@_kernel
def _scatter(  # type: ignore[no-untyped-def]
    x, offset, mask, geometry, columns, first, grad_x, grad_offset, grad_mask, block, start, stop
):
    """Channels [start, stop) of a chunk whose `columns` hold their own gradient: put their values in its place.

    Adds to grad_x and writes entry start // block of grad_offset and grad_mask; leaves alone those that are empty.
    """
    h, w, h_out, w_out, kh, kw, stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    n_rows, n_taps, c_in = columns.shape[1:]
    c, n_deform = x.shape[1], offset.shape[1]
    share = c // n_deform
    pixels, out, into, real = x.reshape(-1), columns.reshape(-1), grad_x.reshape(-1), x.dtype.type
    for r in range(n_rows):
        p = first + r
        image = p // (h_out * w_out) * (h * w)
        y_out, x_out = p // w_out % h_out * stride_y - pad_y, p % w_out * stride_x - pad_x
        for d in range(start // share, (stop - 1) // share + 1):
            for ky in range(kh):
                for kx in range(kw):
                    k = ky * kw + kx
                    dy, dx, m = offset[p, d, k, 0], offset[p, d, k, 1], mask[p, d, k] if mask.size else 1.0
                    inside, at, (top, bottom, left, right), (has_top, has_bottom, has_left, has_right) = _locate(
                        float(y_out + ky * step_y) + dy, float(x_out + kx * step_x) + dx, h, w
                    )
                    part = (
                        real(m * top * left),
                        real(m * top * right),
                        real(m * bottom * left),
                        real(m * bottom * right),
                    )
                    s0 = s1 = s2 = s3 = real(0)
                    low, end, g = max(d * share, start), min((d + 1) * share, stop), 0
                    while low < end:
                        while (g + 1) * c_in <= low:
                            g += 1
                        n = min(end, (g + 1) * c_in) - low
                        o = ((g * n_rows + r) * n_taps + k) * c_in + low - g * c_in
                        a = (
                            (image + at[0]) * c + low,
                            (image + at[1]) * c + low,
                            (image + at[2]) * c + low,
                            (image + at[3]) * c + low,
                        )
                        if inside:
                            if grad_x.size:
                                for i in range(4):
                                    _add(into, a[i], out, o, part[i], n)
                            t0, t1, t2, t3 = _exchange(out, o, pixels, a, part, n)
                            s0, s1, s2, s3 = s0 + t0, s1 + t1, s2 + t2, s3 + t3
                        else:
                            _fill(out, o, part[0], n)
                        low += n
                    if grad_mask.size:
                        upper, lower = left * s0 + right * s1, left * s2 + right * s3
                        grad_mask[start // block, p, d, k] = top * upper + bottom * lower
                    if grad_offset.size:
                        upper, lower = left * s0 + right * s1, left * s2 + right * s3
                        before, after = top * s0 + bottom * s2, top * s1 + bottom * s3
                        grad_offset[start // block, p, d, k, 0] = m * (has_bottom * lower - has_top * upper)
                        grad_offset[start // block, p, d, k, 1] = m * (has_right * after - has_left * before)


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # a forked process has the object, but none of its threads
    os.register_at_fork(after_in_child=_forget_pool)


def _on_threads(work: Callable[[int, int], None], stops: Sequence[int]) -> None:
    """work(0, stops[0]), work(stops[0], stops[1]), ... at the same time, the first on the calling thread."""
    global _pool
    others = []
    if len(stops) > 1:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="deformmamba-deform")
        others = [_pool.submit(work, start, stop) for start, stop in pairwise(stops)]
    work(0, stops[0])
    for other in others:
        other.result()


def _stops(n: int, n_tasks: int, multiple: int = 1) -> list[int]:
    """Ends of `n_tasks` (at least one) nearly equal parts of range(n), all but the last at multiples of `multiple`."""
    size = -(-n // (max(n_tasks, 1) * multiple)) * multiple
    return [*range(size, n, size), n]


class _Call:
    """One call's tensors as kernels and products want them: contiguous, with pixels in one axis, in chunks."""

    def __init__(self, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, geometry: Sequence[int]) -> None:
        (b, h, w, c), (_, h_out, w_out, _), (c_out, kh, kw, c_in) = x.shape, offset.shape, weight.shape
        pixels, self.taps, self.groups = b * h_out * w_out, kh * kw, c // c_in
        n_deform = offset.shape[-1] // (2 * self.taps)
        self.x = x.contiguous().view(b * h * w, c)
        self.offset = offset.contiguous().view(pixels, n_deform, self.taps, 2)
        self.mask = x.new_empty(0, 0, 0) if mask is None else mask.contiguous().view(pixels, n_deform, self.taps)
        self.weight = weight.contiguous().view(self.groups, c_out // self.groups, self.taps * c_in)
        self.arrays = (self.x.numpy(), self.offset.numpy(), self.mask.numpy(), (h, w, h_out, w_out, kh, kw, *geometry))

        chunk = min(pixels, max(_CHUNK_PIXELS, _CHUNK_BYTES // (self.taps * c * x.element_size())))
        self.buffer = x.new_empty(chunk * self.taps * c)
        self.chunks = [(first, min(chunk, pixels - first)) for first in range(0, pixels, max(chunk, 1))]
        self.threads = min(torch.get_num_threads(), chunk * self.taps * c // _TASK_ELEMENTS)

    def columns(self, n: int) -> Tensor:
        """The buffer for a chunk of n pixels: (groups, n, taps * c_in)."""
        size = self.weight.shape[-1]
        return self.buffer[: self.groups * n * size].view(self.groups, n, size)

    def as_array(self, columns: Tensor) -> np.ndarray:
        return columns.view(*columns.shape[:2], self.taps, -1).numpy()

    def by_group(self, pixels: Tensor) -> Tensor:
        """(n, c_out) as (groups, n, c_out / groups), not copied."""
        return pixels.view(len(pixels), self.groups, -1).transpose(0, 1)


# Registered operators: a compiler sees one node each, and not the threads behind them. Results are contiguous.


@torch.library.custom_op("deformmamba::deform_conv2d", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def deform_conv2d(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """`gather`, fused: the same arguments and the same result."""
    call = _Call(x, offset, mask, weight, geometry)
    out = x.new_zeros(len(call.offset), len(weight))
    if bias is not None:
        out += bias
    for first, n in call.chunks:
        columns = call.columns(n)
        array = call.as_array(columns)
        _on_threads(partial(_sample, *call.arrays, array, first), _stops(n, call.threads))
        call.by_group(out[first : first + n]).baddbmm_(columns, call.weight.transpose(1, 2))
    return out.view(*offset.shape[:3], len(weight))


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    return x.new_empty(*offset.shape[:3], weight.shape[0])


@torch.library.custom_op("deformmamba::deform_conv2d_backward", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def deform_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, mask and weight in their shapes; empty where not wanted."""
    call = _Call(x, offset, mask, weight, geometry)
    grad = grad.contiguous().view(len(call.offset), len(weight))
    # Each thread owns a block of channels, so that no two add to one place. What the blocks give to an offset adds up.
    c = x.shape[-1]
    stops = _stops(c, min(call.threads, c // _TASK_CHANNELS), multiple=8)
    blocks = len(stops)
    grad_x = torch.zeros_like(call.x) if wanted[0] else x.new_empty(0, 0)
    grad_offset = x.new_zeros(blocks, *call.offset.shape) if wanted[1] else x.new_empty(blocks, 0, 0, 0, 0)
    grad_mask = x.new_zeros(blocks, *call.mask.shape) if wanted[2] else x.new_empty(blocks, 0, 0, 0)
    grad_weight = torch.zeros_like(call.weight) if wanted[3] else x.new_empty(0)
    into = grad_x.numpy(), grad_offset.numpy(), grad_mask.numpy()
    for first, n in call.chunks:
        columns, by_group = call.columns(n), call.by_group(grad[first : first + n])
        torch.bmm(by_group, call.weight, out=columns)
        array = call.as_array(columns)
        _on_threads(partial(_scatter, *call.arrays, array, first, *into, stops[0]), stops)
        if wanted[3]:
            grad_weight.baddbmm_(by_group.transpose(1, 2), columns)
    return (
        grad_x.view(x.shape if wanted[0] else 0),
        grad_offset.sum(0).view(offset.shape if wanted[1] else 0),
        grad_mask.sum(0).view(mask.shape if mask is not None and wanted[2] else 0),
        grad_weight.view(weight.shape if wanted[3] else 0),
    )


@deform_conv2d_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = zip((x, offset, mask, weight), wanted, strict=True)
    return tuple(x.new_empty(t.shape if want and t is not None else 0) for t, want in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.geometry = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, mask, weight, _ = ctx.saved_tensors
    *wanted, wants_bias, _ = ctx.needs_input_grad
    grads = deform_conv2d_backward(grad, x, offset, mask, weight, ctx.geometry, wanted)
    return (
        *(g if want else None for g, want in zip(grads, wanted, strict=True)),
        grad.sum((0, 1, 2)) if wants_bias else None,
        None,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.geometry, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """`gather` has the same gradient, and PyTorch can differentiate that one."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: `grad` may be a function of the others, and is an independent variable here
        variables: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        grad, *inputs = variables
        x, offset, mask, weight = inputs
        out = gather(x, offset, mask, weight, None, ctx.geometry)
        sources = [t for t, want in zip(inputs, ctx.wanted, strict=True) if want]
        first = torch.autograd.grad(out, sources, grad, create_graph=True)
        second = torch.autograd.grad(
            first,
            [t for t in variables if t is not None],
            [g for g, want in zip(grads, ctx.wanted, strict=True) if want],
            create_graph=again,
            allow_unused=True,
        )
    found = iter(second)
    return *(None if t is None else next(found) for t in variables), None, None


deform_conv2d.register_autograd(_differentiate, setup_context=_save)
deform_conv2d_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
