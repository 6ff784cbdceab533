"""Modulated deformable convolution on the CPU: numba kernels sample, BLAS multiplies, in bounded memory.

Importing this module imports numba, so `deformmamba.deform` imports it where it is used. Shapes are as in `gather.py`.

Threads share the output pixels, and each works through its own in chunks: a kernel samples a chunk into `columns`
(groups, n, taps, c_in), and a product with the weight follows. In the backward pass they share the channels instead, so
that no two threads add to the same element of the gradient of x. The forward pass keeps nothing. The gradient of a
chunk's columns goes into one buffer and is scattered to the gradients of x, offset and mask. The sampled columns then
overwrite it, for the gradient of the weight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import float32, float64, int64, njit, types, uintp
from torch import Tensor

from deformmamba.compiled import compiled
from deformmamba.deform.gather import gather
from deformmamba.errors import InvalidArgument
from deformmamba.tensors import as_array, check_given, loop_over_batch, plain, without_autocast
from deformmamba.threads import ForkLock, run_each

_CHUNK_BYTES = 2 << 20  # size of the columns: they stay in a core's cache between the kernel and the product
_CHUNK_PIXELS = 512  # at least this many pixels, so that reading a large weight again is worth it
_TASK_ELEMENTS = 1 << 17  # column elements below which handing work to another thread costs more than it saves
_TASK_CHANNELS = 8  # channels below which locating a sample costs more than summing it


_FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}  # without nnan and ninf, because NaN must propagate

# Only the kernels call these functions, so they are compiled without the wrappers for calls from Python and C.
_INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_inline: Any = njit(forceinline=True, fastmath=_FASTMATH, **_INNER)


@_inline
def _locate(y, x, h, w):  # type: ignore[no-untyped-def]
    """The sampling position: (inside, (four pixels), (parts: top, bottom, left, right), (which of the four pixels
    exist)).

    A pixel outside the image is replaced by its neighbour inside and has part 0. A sample outside [-1, h) x [-1, w) is
    not inside, and zero; a NaN position gives NaN parts. (At -1 the value is 0, but not the gradient.)
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


# Plain threads run the kernels: numba's own parallel loops abort when two Python threads enter them (workqueue).


def _sample(x, offset, mask, geometry, columns, first):  # type: ignore[no-untyped-def]
    """Write `columns` (groups, n, taps, c_in) of n output pixels from `first` on."""
    h, w, h_out, w_out, kh, kw, stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    n, taps, c_in = columns.shape[1:]
    c, n_deform = x.shape[1], offset.shape[1]
    share = c // n_deform
    pixels, out, real = x.reshape(-1), columns.reshape(-1), x.dtype.type
    for r in range(n):
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
                    # one range of channels for each convolution group that overlaps this deformable group
                    low, end, g = d * share, (d + 1) * share, 0
                    while low < end:
                        while (g + 1) * c_in <= low:
                            g += 1
                        run = min(end, (g + 1) * c_in) - low
                        o = ((g * n + r) * taps + k) * c_in + low - g * c_in
                        a = (
                            (image + at[0]) * c + low,
                            (image + at[1]) * c + low,
                            (image + at[2]) * c + low,
                            (image + at[3]) * c + low,
                        )
                        if inside:
                            _blend(out, o, pixels, a, part, run)
                        else:
                            _fill(out, o, part[0], run)
                        low += run


def _scatter(  # type: ignore[no-untyped-def]
    x, offset, mask, geometry, columns, first, grad_x, grad_offset, grad_mask, start
):
    """For the channels in `columns`, from `start` on: replaces the gradient of the columns by their values.

    Adds to grad_x, and writes the contribution of these channels to grad_offset and grad_mask, unless they are empty.
    """
    h, w, h_out, w_out, kh, kw, stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    n, taps, c_in = columns.shape[1:]
    c, n_deform = x.shape[1], offset.shape[1]
    share, stop = c // n_deform, start + columns.shape[0] * c_in
    pixels, out, into, real = x.reshape(-1), columns.reshape(-1), grad_x.reshape(-1), x.dtype.type
    for r in range(n):
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
                        while start + (g + 1) * c_in <= low:
                            g += 1
                        run = min(end, start + (g + 1) * c_in) - low
                        o = ((g * n + r) * taps + k) * c_in + low - start - g * c_in
                        a = (
                            (image + at[0]) * c + low,
                            (image + at[1]) * c + low,
                            (image + at[2]) * c + low,
                            (image + at[3]) * c + low,
                        )
                        if inside:
                            if grad_x.size:
                                for i in range(4):
                                    _add(into, a[i], out, o, part[i], run)
                            t0, t1, t2, t3 = _exchange(out, o, pixels, a, part, run)
                            s0, s1, s2, s3 = s0 + t0, s1 + t1, s2 + t2, s3 + t3
                        else:
                            _fill(out, o, part[0], run)
                        low += run
                    upper, lower = left * s0 + right * s1, left * s2 + right * s3
                    if grad_mask.size:
                        grad_mask[p, d, k] = top * upper + bottom * lower
                    if grad_offset.size:
                        before, after = top * s0 + bottom * s2, top * s1 + bottom * s3
                        grad_offset[p, d, k, 0] = m * (has_bottom * lower - has_top * upper)
                        grad_offset[p, d, k, 1] = m * (has_right * after - has_left * before)


_compiling = ForkLock()


def _kernel(function: Callable[..., None], dtype: torch.dtype) -> Any:
    """`_sample` or `_scatter`, compiled for arrays of `dtype`: from this process, from disk, or compiled now."""
    with _compiling:
        return _compile(function, dtype)


@cache
def _compile(function: Callable[..., None], dtype: torch.dtype) -> Any:
    real = float32 if dtype == torch.float32 else float64
    two, three, four = real[:, ::1], real[:, :, ::1], real[:, :, :, ::1]
    arguments: tuple[Any, ...] = (two, four, three, types.UniTuple(int64, 12), four, int64)
    if function is _scatter:
        arguments += (two, four, three, int64)
    what = f"deformable convolution on the CPU ({'forward' if function is _sample else 'backward'} pass, {real})"
    return compiled(function, types.void(*arguments), what, fastmath=_FASTMATH)


def _run_parts(work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """work(start, stop) for each of the parts, at the same time."""

    @torch.inference_mode()  # permits the same operations as the caller's modes
    def one(part: tuple[int, int]) -> None:
        work(*part)

    run_each(one, parts, len(parts))


def _parts(n: int, n_parts: int, multiple: int = 1) -> list[tuple[int, int]]:
    """range(n) in at most `n_parts` (and at least one) nearly equal parts that begin at multiples of `multiple`."""
    size = max(-(-n // (max(n_parts, 1) * multiple)) * multiple, 1)
    return [(start, min(start + size, n)) for start in range(0, n, size)] or [(0, 0)]


class _Call:
    """One call's tensors in the layout for kernels and products: contiguous, with all pixels in one axis."""

    def __init__(self, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, geometry: Sequence[int]) -> None:
        (b, h, w, c), (_, h_out, w_out, _), (c_out, kh, kw, c_in) = x.shape, offset.shape, weight.shape
        self.pixels, self.taps, self.groups = b * h_out * w_out, kh * kw, c // c_in
        n_deform = offset.shape[-1] // (2 * self.taps)
        self.x = x.contiguous().view(b * h * w, c)
        self.offset = offset.contiguous().view(self.pixels, n_deform, self.taps, 2)
        self.mask = x.new_empty(0, 0, 0) if mask is None else mask.contiguous().view(self.pixels, n_deform, self.taps)
        self.weight = weight.contiguous().view(self.groups, c_out // self.groups, self.taps, c_in)
        arrays = map(as_array, (self.x, self.offset, self.mask))
        self.arrays = (*arrays, (h, w, h_out, w_out, kh, kw, *geometry))
        self.threads = min(torch.get_num_threads(), self.pixels * self.taps * c // _TASK_ELEMENTS)

    def chunks(self, start: int, stop: int, groups: int, c_in: int) -> Iterator[tuple[int, int, Tensor]]:
        """Pixels [start, stop) in pieces: the first of each, the one after its last, its columns, in one buffer."""
        width = groups * self.taps * c_in
        step = min(max(_CHUNK_PIXELS, _CHUNK_BYTES // (width * self.x.element_size())), stop - start)
        buffer = self.x.new_empty(step * width)
        for first in range(start, stop, max(step, 1)):
            n = min(step, stop - first)
            yield first, first + n, buffer[: n * width].view(groups, n, self.taps, c_in)

    def by_group(self, pixels: Tensor) -> Tensor:
        """(n, c_out) as (groups, n, c_out / groups), not copied."""
        return pixels.view(pixels.shape[0], self.groups, -1).transpose(0, 1)


def _check(
    operator: str,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    grad: Tensor | None = None,
) -> None:
    """Checks that all shapes, dtypes, devices and layouts agree, because kernels get raw pointers.

    Raises:
        InvalidArgument: an argument does not fit the others.
    """
    name = f"deformmamba::{operator}"
    check_given(operator, x=x, offset=offset, weight=weight)
    if x.ndim != 4 or weight.ndim != 4 or offset.ndim != 4 or min(x.shape[1:]) < 1 or min(weight.shape) < 1:
        raise InvalidArgument(
            f"{name}: x is {tuple(x.shape)}, offset {tuple(offset.shape)}, weight {tuple(weight.shape)}; wanted "
            "(b, h, w, c), (b, h_out, w_out, 2 * G * K) and (c_out, kh, kw, c_in) without empty axes but b"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(f"{name}: x is {x.dtype}; wanted torch.float32 or torch.float64")
    if len(geometry) != 6 or min(geometry[0:2]) < 1 or min(geometry[2:4]) < 0 or min(geometry[4:6]) < 1:
        raise InvalidArgument(f"{name}: geometry is {list(geometry)}; wanted stride, padding and dilation, two each")
    if max(geometry) >= 1 << 31:
        raise InvalidArgument(f"{name}: geometry is {list(geometry)}; numbers must be below 2^31")
    (b, h, w, c), (c_out, kh, kw, c_in) = x.shape, weight.shape
    if c % c_in or c_out % (c // c_in):
        raise InvalidArgument(
            f"{name}: weight is {tuple(weight.shape)} and x has {c} channels; c_in must divide them, and the number of "
            "groups must divide c_out"
        )
    stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:6]
    h_out, w_out = (
        (size + 2 * pad - step * (taps - 1) - 1) // by + 1
        for size, taps, by, pad, step in zip((h, w), (kh, kw), stride, padding, dilation, strict=True)
    )
    n_taps = kh * kw
    n_deform = offset.shape[3] // (2 * n_taps)
    if h_out < 1 or w_out < 1 or n_deform < 1 or c % n_deform:
        raise InvalidArgument(
            f"{name}: offset has {offset.shape[3]} channels and the output {h_out}x{w_out} pixels; wanted 2 * G * "
            f"{n_taps} with G dividing the {c} channels of x, and at least one pixel"
        )
    for what, tensor, shape in (
        ("x", x, (b, h, w, c)),
        ("offset", offset, (b, h_out, w_out, 2 * n_deform * n_taps)),
        ("mask", mask, (b, h_out, w_out, n_deform * n_taps)),
        ("weight", weight, (c_out, kh, kw, c_in)),
        ("bias", bias, (c_out,)),
        ("grad", grad, (b, h_out, w_out, c_out)),
    ):
        if tensor is not None and not (
            tensor.shape == shape
            and tensor.dtype == x.dtype
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
        ):
            raise InvalidArgument(
                f"{name}: {what} is {tensor.dtype} {tuple(tensor.shape)} ({tensor.layout}) on {tensor.device}; wanted "
                f"{x.dtype} {shape} (torch.strided) on the CPU"
            )


# Registered operators: a compiler sees one node each, and not the threads behind them. Results are contiguous.


@torch.library.custom_op("deformmamba::deform_conv2d", mutates_args=(), device_types="cpu")
def deform_conv2d(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """`gather`, fused: the same arguments and the same result."""
    x, offset, mask, weight, bias = map(plain, (x, offset, mask, weight, bias))
    _check("deform_conv2d", x, offset, mask, weight, bias, geometry)
    call = _Call(x, offset, mask, weight, geometry)
    c_out, _, _, c_in = weight.shape
    out = x.new_zeros(call.pixels, c_out)
    if bias is not None:
        out += bias
    matrix, sample = call.weight.flatten(2).transpose(1, 2), _kernel(_sample, x.dtype)

    def work(start: int, stop: int) -> None:
        for first, last, columns in call.chunks(start, stop, call.groups, c_in):
            sample(*call.arrays, columns.numpy(), first)
            call.by_group(out[first:last]).baddbmm_(columns.flatten(2), matrix)

    with without_autocast("cpu"):
        _run_parts(work, _parts(call.pixels, call.threads))
    return out.view(*offset.shape[:3], c_out)


@deform_conv2d.register_fake
def _(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    check_given("deform_conv2d", x=x, offset=offset, weight=weight)
    return x.new_empty(*offset.shape[:3], weight.shape[0])


@torch.library.custom_op("deformmamba::deform_conv2d_backward", mutates_args=(), device_types="cpu")
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
    x, offset, mask, weight, grad = map(plain, (x, offset, mask, weight, grad))
    check_given("deform_conv2d_backward", grad=grad)
    _check("deform_conv2d_backward", x, offset, mask, weight, None, geometry, grad)
    if len(wanted) != 4:
        raise InvalidArgument(f"deformmamba::deform_conv2d_backward: wanted has {len(wanted)} entries; it must have 4")
    call = _Call(x, offset, mask, weight, geometry)
    grad = grad.contiguous().view(call.pixels, len(weight))
    c, c_in = x.shape[-1], weight.shape[-1]
    parts = _parts(c, min(call.threads, c // _TASK_CHANNELS), multiple=4 if call.groups == 1 else c_in)
    # the contribution of each part to the offsets' gradient; summed afterwards
    grad_offset = x.new_zeros(len(parts), *call.offset.shape) if wanted[1] else x.new_empty(len(parts), 0, 0, 0, 0)
    grad_mask = x.new_zeros(len(parts), *call.mask.shape) if wanted[2] else x.new_empty(len(parts), 0, 0, 0)
    grad_x = torch.zeros_like(call.x) if wanted[0] else x.new_empty(0, 0)
    grad_weight = torch.empty_like(call.weight) if wanted[3] else x.new_empty(0)
    scatter = _kernel(_scatter, x.dtype)

    def work(start: int, stop: int) -> None:
        """Channels [start, stop): a part of one group of the convolution, or some whole groups."""
        groups, low = slice(start // c_in, -(-stop // c_in)), start % c_in
        here = groups, slice(None), slice(None), slice(low, low + min(stop - start, c_in))
        part = parts.index((start, stop))
        into = as_array(grad_x), grad_offset[part].numpy(), grad_mask[part].numpy()  # the caller gets grad_x only
        matrix = call.weight[here].flatten(2)
        grad_matrix = torch.zeros_like(matrix) if wanted[3] else None
        for first, last, columns in call.chunks(0, call.pixels, len(matrix), here[-1].stop - low):
            rows = call.by_group(grad[first:last])[groups]
            torch.bmm(rows, matrix, out=columns.flatten(2))
            scatter(*call.arrays, columns.numpy(), first, *into, start)
            if grad_matrix is not None:
                grad_matrix.baddbmm_(rows.transpose(1, 2), columns.flatten(2))
        if grad_matrix is not None:
            grad_weight[here] = grad_matrix.unflatten(2, (call.taps, -1))

    with without_autocast("cpu"):
        _run_parts(work, parts)
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
    check_given("deform_conv2d_backward", grad=grad, x=x, offset=offset, weight=weight)
    inputs = zip((x, offset, mask, weight), wanted, strict=True)
    return tuple(x.new_empty(t.shape if want and t is not None else 0) for t, want in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.geometry = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, mask, weight, _ = map(plain, ctx.saved_tensors)
    grad = plain(grad)
    *wanted, wants_bias, _ = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 4
    if any(wanted):
        found = deform_conv2d_backward(grad, x, offset, mask, weight, ctx.geometry, wanted)
        grads = [g if want else None for g, want in zip(found, wanted, strict=True)]
    return *grads, grad.sum((0, 1, 2)) if wants_bias else None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.geometry, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Uses `gather`, which has the same gradient and which PyTorch can differentiate."""
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
torch.library.register_vmap("deformmamba::deform_conv2d", loop_over_batch(deform_conv2d))
torch.library.register_vmap("deformmamba::deform_conv2d_backward", loop_over_batch(deform_conv2d_backward))
