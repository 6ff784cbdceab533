"""Modulated deformable convolution (DCNv2): a convolution with an offset and a factor for each tap and pixel.

    Y(p) = sum_k  w_k . X(p + p_k + dp_k) * dm_k        (equation 5 of the paper; Zhu et al. 2019)

in the conventions of `torchvision.ops.deform_conv2d`: positions are in pixels, each tap has an offset (dy, dx),
X between pixels is bilinear, and X outside the image is zero.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from deformmamba.deform.gather import gather
from deformmamba.deform.sampling import grid_sample
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.tensors import in_autocast, overridable, refuse_tracing, without_autocast
from deformmamba.torch_private import constant_when_compiled, differentiates_by_transform

IMPLEMENTATIONS = ("cpu", "torchvision", "gather")


@overridable
def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    implementation: str | None = None,
) -> Tensor:
    """Convolve x at positions moved by `offset`, with samples scaled by `mask`. Returns (b, c_out, h_out, w_out).

    Args:
        x: (b, c, h, w).
        offset: (b, 2 * G * kh * kw, h_out, w_out), in pixels of x, ordered (deformable group, tap, (dy, dx)), taps row
            by row. This shape defines G, which must divide c. Each of G equal blocks of channels has its own offsets
            and masks.
        mask: (b, G * kh * kw, h_out, w_out), any numbers (the paper's are in [0, 1]), or None for ones.
        weight: (c_out, c / groups, kh, kw); the number of groups follows from this shape, as in `conv2d`.
        bias: (c_out,), or None for zeros.
        stride, padding, dilation: as in `conv2d`, one integer, or one or two of them (y, x).
        implementation: one of IMPLEMENTATIONS, obeyed or refused with the reason; None chooses by the tensor:
            "cpu" for a CPU tensor (numba and BLAS; a few MiB for each of torch's threads, for any size), "torchvision"
            for a CUDA tensor where torchvision imports, else "gather" (plain PyTorch: any device, forward-mode and
            higher derivatives, torch.func). "gather" is also chosen under torch.func, in forward mode and in
            torch.export, so that an exported program runs without this package.

    Between pixels x is bilinear, and outside the image it is zero: a sample fades out over the first pixel beyond the
    border. At integer positions the bilinear surface has a corner; the gradient of `offset` is the one to the right and
    below, as in torchvision. An infinite offset points outside: the sample is zero, and so is its gradient. If dy or dx
    is NaN, then the sample and the gradients of both are NaN, and no pixel is read.

    Precision: float64 is computed in float64, all other types in float32, because a position in bfloat16 would be off
    by whole pixels. The result has the dtype of `conv2d`: that of x, or the autocast dtype if autocast is on. A
    channels-last x gives a channels-last result. If the weight is channels-last, "cpu" does not copy it.

    Second derivatives: "gather" supports them, "cpu" computes them with "gather", "torchvision" has none.

    Source: equation 5; bilinear sampling and borders as in Zhu et al. 2019 (Deformable ConvNets v2), because the paper
    does not specify them.

    Raises:
        ValueError: a shape does not fit, or `implementation` cannot be used.
        TypeError: a tensor is not floating point, or a number is not an integer.
        UnsupportedCall: under torch.jit.trace.
    """
    refuse_tracing("modulated_deform_conv2d")
    pairs = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    _check(x, offset, mask, weight, bias, *pairs)
    run = _RUN[_choose(implementation, x.device.type)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = (
        x.to(dtype).permute(0, 2, 3, 1),
        offset.to(dtype).permute(0, 2, 3, 1),
        None if mask is None else mask.to(dtype).permute(0, 2, 3, 1),
        weight.to(dtype).permute(0, 2, 3, 1),
        None if bias is None else bias.to(dtype),
        tuple(n for pair in pairs for n in pair),
    )
    if in_autocast(x.device.type):
        with without_autocast(x.device.type):
            out = run(*args)
        out = out if dtype == torch.float64 else out.to(torch.get_autocast_dtype(x.device.type))
    else:
        out = run(*args).to(x.dtype)
    out = out.permute(0, 3, 1, 2)
    return out.contiguous() if x.is_contiguous() or x.stride(1) != 1 else out


def _pair(name: str, value: Any) -> tuple[int, int]:
    """(y, x) from one integer, or from a sequence of one or two; numpy's integers and symbolic sizes are integers."""
    if type(value) is int:
        return value, value
    if hasattr(value, "tolist"):  # numpy arrays and tensors
        value = value.tolist()
    numbers = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(numbers) not in (1, 2):
        raise InvalidArgument(
            f"modulated_deform_conv2d: {name} has {len(numbers)} numbers; wanted one integer, or (y, x)"
        )
    for number in numbers:
        if isinstance(number, (bool, float, str)) or not hasattr(number, "__index__"):
            raise InvalidType(f"modulated_deform_conv2d: {name} is {shown(value)}; wanted one integer, or (y, x)")
    y, x = (n if isinstance(n, torch.SymInt) else operator.index(n) for n in (numbers * 2)[:2])
    return y, x  # type: ignore[return-value]


def _check(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    given = {"x": x, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
    for name, t in given.items():
        if t is None and name in ("mask", "bias"):
            continue
        if not isinstance(t, Tensor):
            raise InvalidType(f"modulated_deform_conv2d: {name} is a {type(t).__name__}; wanted a tensor")
        if not t.is_floating_point():
            raise InvalidType(f"modulated_deform_conv2d: {name} is {t.dtype}; wanted a floating point tensor")
        if t.device != x.device:
            raise InvalidArgument(
                f"modulated_deform_conv2d: {name} is on {t.device}, x on {x.device}; move one of them"
            )
        if t.dim() != (1 if name == "bias" else 4):
            raise _shape(name, t, "(c_out,)" if name == "bias" else "four dimensions, (b, c, h, w) for x")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise InvalidArgument(
            f"modulated_deform_conv2d: stride {stride}, padding {padding}, dilation {dilation}; "
            "wanted stride and dilation of at least 1 and padding of at least 0"
        )
    b, c, h, w = x.shape
    c_out, c_in, kh, kw = weight.shape
    if min(weight.shape) < 1 or c < c_in or c % c_in or c_out % (c // c_in):
        raise _shape(
            "weight", weight, f"(c_out, {c} / groups, kh, kw) with groups dividing c_out and the {c} channels of x"
        )
    h_out = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    w_out = (w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if c < 1 or h < 1 or w < 1:  # `min` of symbolic sizes would compare them with each other
        raise _shape("x", x, "at least 1x1 pixels and one channel")
    if h_out < 1 or w_out < 1:
        wanted = (dilation[0] * (kh - 1) + 1 - 2 * padding[0], dilation[1] * (kw - 1) + 1 - 2 * padding[1])
        raise _shape("x", x, f"at least {wanted[0]}x{wanted[1]} pixels for this kernel, padding and dilation")
    n_taps = kh * kw
    n_deform = offset.shape[1] // (2 * n_taps)
    if n_deform < 1 or c % n_deform or offset.shape != (b, 2 * n_deform * n_taps, h_out, w_out):
        raise _shape(
            "offset", offset, f"({b}, 2 * G * {n_taps}, {h_out}, {w_out}) with G dividing the {c} channels of x"
        )
    if mask is not None and mask.shape != (b, n_deform * n_taps, h_out, w_out):
        raise _shape("mask", mask, f"({b}, {n_deform * n_taps}, {h_out}, {w_out}), as offset has G = {n_deform}")
    if bias is not None and bias.shape != (c_out,):
        raise _shape("bias", bias, f"({c_out},)")


def _shape(name: str, given: Tensor, wanted: str) -> InvalidArgument:
    return InvalidArgument(f"modulated_deform_conv2d: {name} has shape {tuple(given.shape)}; wanted {wanted}")


@cache
def _missing(module: str) -> str | None:
    """Why `module` cannot be imported, or None."""
    try:
        import_module(module)
    # RuntimeError: torchvision was built for another torch; OSError: a missing shared library
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} does not import ({type(error).__name__}: {error})"
    return None


def _without_compiler() -> str | None:
    import numba

    settings: Any = numba.config
    return "numba compiles nothing because NUMBA_DISABLE_JIT is set" if settings.DISABLE_JIT else None


@constant_when_compiled  # torch.compile must not trace the imports
def _unusable(name: str, device: str) -> str | None:
    """Why implementation `name` cannot take a tensor on `device`, or None."""
    if name == "cpu":
        if device != "cpu":
            return f"it takes CPU tensors and x is on {device}"
        return _missing("deformmamba.deform.cpu") or _without_compiler()
    if name == "torchvision":
        if device not in ("cpu", "cuda"):
            return f"it takes CPU and CUDA tensors and x is on {device}"
        return _missing("torchvision.ops")
    return None


def _choose(name: str | None, device: str) -> str:
    without_kernels = not torch.compiler.is_compiling() and differentiates_by_transform()
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise InvalidArgument(
                f"modulated_deform_conv2d: unknown implementation {name!r}; available: {', '.join(IMPLEMENTATIONS)}"
            )
        reason = _unusable(name, device)
        if name != "gather" and without_kernels:
            reason = "it has no rule for torch.func's grad and jvp and for forward mode"
        if reason:
            raise InvalidArgument(
                f'modulated_deform_conv2d: implementation "{name}" cannot be used: {reason}; "gather" always works'
            )
        return name
    # torch 2.6 cannot tell an export from a compilation
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    if exporting():
        return _exported()
    if without_kernels:
        return "gather"
    preferred = "torchvision" if device == "cuda" else "cpu"
    return "gather" if _unusable(preferred, device) else preferred


# The functions below work channels last: see `gather.py`.


def _cpu(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    from deformmamba.deform.cpu import deform_conv2d

    return deform_conv2d(x, offset, mask, weight, bias, geometry)


def _torchvision(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    from torchvision.ops import deform_conv2d

    # Its kernels give NaN at infinite offsets, and the one for the CPU reads out of bounds at NaN. So both are moved
    # outside the image. Where a pair holds NaN, factors carry NaN to the sample and to all its gradients.
    pairs = offset.unflatten(-1, (-1, 2))
    lost = pairs.isnan().any(-1)
    some = torch.where(pairs.isinf() & ~lost[..., None], 0, pairs).sum(-1)
    mask = (x.new_ones(lost.shape) if mask is None else mask) * torch.where(lost, math.nan, 1.0).to(x.dtype)
    mask = mask + some * torch.where(lost, math.nan, 0.0).to(x.dtype)
    outside = -4.0 * (x.shape[1] + x.shape[2] + sum(geometry) * max(weight.shape[1:3]) + 1)
    offset = torch.where((pairs.isfinite() & ~lost[..., None]).flatten(-2), offset, outside)
    x, offset, mask, weight = (t.permute(0, 3, 1, 2) for t in (x, offset, mask, weight))
    stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:6]
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask).permute(0, 2, 3, 1).contiguous()


_RUN = {"cpu": _cpu, "torchvision": _torchvision, "gather": gather, "grid_sample": grid_sample}
_exported_form: ContextVar[str] = ContextVar("deformmamba_deform_exported_as", default="gather")


@constant_when_compiled  # torch.compile cannot read a context variable; a strict export calls this while it traces
def _exported() -> str:
    return _exported_form.get()


@contextmanager
def exported_as(name: str) -> Iterator[None]:
    """Programs that torch.export traces inside the block hold this function of `_RUN`: "gather" or "grid_sample".

    Applies to the current thread only.
    """
    token = _exported_form.set(name)
    try:
        yield
    finally:
        _exported_form.reset(token)
