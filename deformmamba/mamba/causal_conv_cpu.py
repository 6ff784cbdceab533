"""The causal depthwise convolution on a CPU: an operator around the loops of `causal_conv_kernels`.

Memory traffic bounds this operation. PyTorch's depthwise convolution takes several times as long, forward and backward,
and needs padded input.
"""

import functools
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from deformmamba.compiled import compiled, numba_compiles
from deformmamba.errors import InvalidArgument
from deformmamba.tensors import as_array, check_given, loop_over_batch, plain
from deformmamba.threads import run_each

_BLOCK = 256  # channels per job, so that its rows of x and y fit into the first-level cache


def usable(x: Tensor) -> bool:
    """Whether the kernels run on tensors like `x`: on the CPU, float32 or float64, where numba can be imported."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and numba_compiles()


# `Optional`, because the schema is read from the annotations and older PyTorch does not support `Tensor | None`
@torch.library.custom_op("deformmamba::causal_conv", mutates_args=())
def causal_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """y[b, d, t] = bias[d] + sum over k of weight[d, k] x[b, d, t - (width - 1) + k], x before the start being 0.

    x (b, d, l), weight (d, width) and bias (d,) of one dtype; y has the memory format of x: time or channels last."""
    x, weight, bias = map(plain, (x, weight, bias))
    _check("causal_conv", x, weight, bias=bias)
    b, d, length = x.shape
    x, by_channel = _readable(x)
    y = _empty(b, d, length, by_channel, x)
    given = weight.t().contiguous() if by_channel else weight.contiguous()
    bias = x.new_zeros(d) if bias is None else bias.contiguous()
    arrays = (_flat(x), as_array(given), as_array(bias), _flat(y), length, _strides(x, by_channel))
    _run_kernel("forward", by_channel, x.dtype, arrays, b, d)
    return y


@causal_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    check_given("causal_conv", x=x, weight=weight)
    b, d, length = x.shape
    return _empty(b, d, length, _by_channel(x), x)


@torch.library.custom_op("deformmamba::causal_conv_backward", mutates_args=())
def causal_conv_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    x, weight, dy = map(plain, (x, weight, dy))
    _check("causal_conv_backward", x, weight, dy=dy)
    check_given("causal_conv_backward", dy=dy)
    b, d, length = x.shape
    x, by_channel = _readable(x)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2) if by_channel else dy.contiguous()
    dx = _empty(b, d, length, by_channel, x)
    given = weight.t().contiguous() if by_channel else weight.contiguous()
    dweight, dbias = x.new_empty(b, *given.shape), x.new_empty(b, d)
    arrays = (
        _flat(x), as_array(given), _flat(dy), _flat(dx), as_array(dweight), as_array(dbias), length,
        _strides(x, by_channel),
    )  # fmt: skip
    _run_kernel("backward", by_channel, x.dtype, arrays, b, d)
    dweight = dweight.sum(0)
    return dx, dweight.t().contiguous() if by_channel else dweight, dbias.sum(0)


@causal_conv_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_given("causal_conv_backward", x=x, weight=weight, dy=dy)
    b, d, length = x.shape
    return _empty(b, d, length, _by_channel(x), x), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = causal_conv_backward(*map(plain, ctx.saved_tensors), plain(dy))
    return dx, dweight, dbias if ctx.has_bias else None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_twice(ctx: Any, ddx: Tensor, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass is bilinear in (x, weight) and dy, so its derivatives are the two operators again."""
    x, weight, dy = map(plain, ctx.saved_tensors)
    ddx, ddweight, ddbias = map(plain, (ddx, ddweight, ddbias))
    dx = causal_conv_backward(x, ddweight, dy)[0]
    dweight = causal_conv_backward(ddx, weight, dy)[1]
    return dx, dweight, causal_conv(ddx, weight, ddbias) + causal_conv(x, ddweight, None)


torch.library.register_autograd("deformmamba::causal_conv", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "deformmamba::causal_conv_backward", _differentiate_twice, setup_context=_save_backward
)  # fmt: skip


torch.library.register_vmap("deformmamba::causal_conv", loop_over_batch(causal_conv))
torch.library.register_vmap("deformmamba::causal_conv_backward", loop_over_batch(causal_conv_backward))


def _check(operator: str, x: Tensor, weight: Tensor, **others: Tensor | None) -> None:
    """Checks that all shapes, dtypes, devices and layouts agree, because kernels get raw pointers.

    Raises:
        InvalidArgument: an argument does not fit the others.
    """
    name = f"deformmamba::{operator}"
    if x is None or weight is None or x.ndim != 3 or weight.ndim != 2 or weight.shape[1] < 1:
        raise InvalidArgument(f"{name}: x must be (b, d, l) and weight (d, width) with a width of at least 1")
    if x.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(f"{name}: x is {x.dtype}; wanted torch.float32 or torch.float64")
    d = x.shape[1]
    shapes = {"bias": (d,), "dy": tuple(x.shape)}
    wanted = [("x", x, tuple(x.shape)), ("weight", weight, (d, weight.shape[1]))]
    for what, tensor, shape in (*wanted, *((key, value, shapes[key]) for key, value in others.items())):
        if tensor is not None and not (
            tuple(tensor.shape) == shape
            and tensor.dtype == x.dtype
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
        ):
            raise InvalidArgument(
                f"{name}: {what} is {tensor.dtype} {tuple(tensor.shape)} ({tensor.layout}) on {tensor.device}; wanted "
                f"{x.dtype} {shape} (torch.strided) on the CPU"
            )


def _by_channel(x: Tensor) -> bool:
    """Whether channels, not time steps, are adjacent in memory."""
    return x.stride(1) == 1 and x.stride(2) != 1


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    x = x.detach()
    if 1 not in x.stride()[1:] or min(x.stride(), default=1) < 0:
        x = x.contiguous()
    return x, _by_channel(x)


def _empty(b: int, d: int, length: int, by_channel: bool, like: Tensor) -> Tensor:
    # not a transposed view: autograd forbids changing views that an operator returns
    return like.new_empty_strided((b, d, length), (length * d, 1, d) if by_channel else (d * length, length, 1))


def _flat(x: Tensor) -> np.ndarray:
    """All elements of x as a flat view, in memory order."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return as_array(x.as_strided((extent,), (1,)))


def _strides(x: Tensor, by_channel: bool) -> tuple[int, int]:
    return x.stride(0), x.stride(2 if by_channel else 1)


def _run_kernel(
    name: str, by_channel: bool, dtype: torch.dtype, arrays: tuple[Any, ...], images: int, channels: int
) -> None:
    """Runs the kernel on torch.get_num_threads() threads that share the jobs."""
    starts = range(0, channels, _BLOCK)
    jobs = np.array([(b, d, min(d + _BLOCK, channels)) for b in range(images) for d in starts], np.int64)
    if not len(jobs) or not arrays[-2]:
        for array in arrays[4:6] if name == "backward" else ():
            array[...] = 0
        return
    kernel = _kernel(f"{name}_{'channels' if by_channel else 'time'}", dtype)
    parts = [part for part in np.array_split(jobs, min(len(jobs), torch.get_num_threads())) if len(part)]
    run_each(lambda part: kernel(*arrays, part), parts, len(parts))


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    """The compiled kernel, loaded from disk or compiled now."""
    from numba import float32, float64, int64, types

    from deformmamba.mamba import causal_conv_kernels

    real = float32 if dtype == torch.float32 else float64
    flat, rows, pair = real[::1], real[:, ::1], types.UniTuple(int64, 2)
    arguments: tuple[Any, ...] = (flat, rows, flat, flat)
    if name.startswith("backward"):
        arguments = (flat, rows, flat, flat, real[:, :, ::1], rows)
    signature = types.void(*arguments, int64, pair, int64[:, ::1])
    # sums may be reordered for vector instructions; NaN and infinity stay valid
    return compiled(
        getattr(causal_conv_kernels, name),
        signature,
        f"causal convolution on the CPU ({name.partition('_')[0]} pass, {real})",
        fastmath={"reassoc", "contract", "nsz"},
    )
