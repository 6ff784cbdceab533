"""Modulated deformable convolution (DCNv2): a convolution whose taps move, and fade, by what the image holds.

    Y(p) = sum_k  w_k . X(p + p_k + dp_k) * dm_k        (equation 5 of the paper; Zhu et al. 2019)

in the conventions of `torchvision.ops.deform_conv2d`: positions count pixels, offsets come as (dy, dx) for each tap,
X between pixels is bilinear, and X outside the image is zero.
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from deformmamba.scan import transformed

IMPLEMENTATIONS = ("cpu", "torchvision", "gather")


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    implementation: str | None = None,
) -> Tensor:
    """Convolve x at positions moved by `offset`, with samples scaled by `mask`. Returns (b, c_out, h_out, w_out).

    Args:
        x: (b, c, h, w).
        offset: (b, 2 * G * kh * kw, h_out, w_out), in pixels of x, ordered (deformable group, tap, (dy, dx)), taps row
            by row. G, read off this shape, divides c: channels in G equal blocks have offsets and masks of their own.
        mask: (b, G * kh * kw, h_out, w_out), any numbers (the paper's are in [0, 1]), or None for ones.
        weight: (c_out, c / groups, kh, kw); the number of groups is read off this shape, as in `conv2d`.
        bias: (c_out,), or None for zeros.
        stride, padding, dilation: as in `conv2d`, one number or (y, x).
        implementation: one of IMPLEMENTATIONS, obeyed or refused with the reason; None chooses by the tensor:
            "cpu" for a CPU tensor (numba and BLAS; a few MiB for each of torch's threads, whatever the size),
            "torchvision" for a CUDA tensor where torchvision imports, else
            "gather" (plain PyTorch: any device, forward-mode and higher derivatives, torch.func, which take it by
            themselves). Exported programs hold this one, whatever the device, so that they run without this package.

    Between pixels x is bilinear, outside it is zero: a sample fades out over the one pixel beyond the border. Where a
    position is an integer the bilinear surface has an edge, and the gradient of `offset` is the one to the right and
    below, as torchvision's. An infinite offset points outside (zero, and gradient zero); one that is NaN makes the
    output NaN, and reads nothing.

    Precision: float64 is computed in float64, all else in float32: a position in bfloat16 would be off by whole pixels.
    The result has the dtype that `conv2d` would give: that of x, or the autocast dtype where autocast is on.
    A channels-last x gives a channels-last result. A channels-last weight saves "cpu" a copy of it.

    Second derivatives: "gather" has its own, "cpu" takes them from it, "torchvision" has none.

    Source: equation 5; Zhu et al. 2019 (Deformable ConvNets v2), whose bilinear sampling and border these are: the
    paper leaves both open.

    Raises:
        ValueError: a shape does not fit, or `implementation` cannot be used; TypeError: a tensor is not floating point.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check(x, offset, mask, weight, bias, stride, padding, dilation)
    run = _RUN[_choose(implementation, x.device.type)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    args = (
        x.to(dtype).permute(0, 2, 3, 1),
        offset.to(dtype).permute(0, 2, 3, 1),
        None if mask is None else mask.to(dtype).permute(0, 2, 3, 1),
        weight.to(dtype).permute(0, 2, 3, 1),
        None if bias is None else bias.to(dtype),
        (*stride, *padding, *dilation),
    )
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            out = run(*args)
        out = out if dtype == torch.float64 else out.to(torch.get_autocast_dtype(x.device.type))
    else:
        out = run(*args).to(x.dtype)
    out = out.permute(0, 3, 1, 2)
    return out.contiguous() if x.is_contiguous() or x.stride(1) != 1 else out


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


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
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"modulated_deform_conv2d: {name} is {t.dtype}; wanted a floating point tensor")
        if t.device != x.device:
            raise ValueError(f"modulated_deform_conv2d: {name} is on {t.device} and x on {x.device}; move one of them")
        if t.dim() != (1 if name == "bias" else 4):
            raise _shape(name, t, "(c_out,)" if name == "bias" else "four dimensions, (b, c, h, w) for x")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
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


def _shape(name: str, given: Tensor, wanted: str) -> ValueError:
    return ValueError(f"modulated_deform_conv2d: {name} has shape {tuple(given.shape)}; wanted {wanted}")


@cache
def _missing(module: str) -> str | None:
    """Why `module` cannot be imported, or None."""
    try:
        import_module(module)
    # RuntimeError: torchvision's, beside a torch that it was not built for; OSError: a shared library
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} does not import ({type(error).__name__}: {error})"
    return None


def _unusable(name: str, device: str) -> str | None:
    """Why implementation `name` cannot take a tensor on `device`, or None."""
    if name == "cpu":
        return f"it takes CPU tensors and x is on {device}" if device != "cpu" else _missing("deformmamba.deform.cpu")
    if name == "torchvision":
        if device not in ("cpu", "cuda"):
            return f"it takes CPU and CUDA tensors and x is on {device}"
        return _missing("torchvision.ops")
    return None


# torch.compiler.assume_constant_result, which would import torch._dynamo here: a compiler shall not trace the imports
_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(name: str | None, device: str) -> str:
    without_kernels = not torch.compiler.is_compiling() and transformed()
    if name is not None:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"modulated_deform_conv2d: implementation {name!r} is not known; there are {', '.join(IMPLEMENTATIONS)}"
            )
        reason = _unusable(name, device)
        if name != "gather" and without_kernels:
            reason = "it has no rule for torch.func's grad and jvp and for forward mode"
        if reason:
            raise ValueError(
                f'modulated_deform_conv2d: implementation "{name}" cannot be used: {reason}; "gather" always can'
            )
        return name
    # torch 2.6 cannot tell an export from a compilation
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    if exporting() or torch.jit.is_tracing() or without_kernels:
        return "gather"
    preferred = "torchvision" if device == "cuda" else "cpu"
    return "gather" if _unusable(preferred, device) else preferred


# What follows works channels last: x (b, h, w, c), offset (b, h_out, w_out, 2 * G * K), mask (b, h_out, w_out, G * K),
# weight (c_out, kh, kw, c_in), K = kh * kw. Geometry is stride, padding and dilation, each as (y, x).


def gather(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """Equation 5 tap by tap in PyTorch's own operations, which it can differentiate as often as it likes."""
    b, h, w, c = x.shape
    c_out, kh, kw, c_in = weight.shape
    _, h_out, w_out, _ = offset.shape
    groups, n_deform = c // c_in, offset.shape[-1] // (2 * kh * kw)
    stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry

    # Two zeros around the image stand for all that is outside it: positions are clamped to them.
    # A row for each pixel and deformable group, holding its channels.
    ring = 2
    height, width = h + 2 * ring, w + 2 * ring
    rows = F.pad(x, (0, 0, ring, ring, ring, ring)).reshape(-1, c // n_deform)

    # Positions and indices (b, h_out, w_out, G, K)
    offset = offset.reshape(b, h_out, w_out, n_deform, kh * kw, 2)
    y_tap = (torch.arange(kh, device=x.device) * step_y).repeat_interleave(kw)
    x_tap = (torch.arange(kw, device=x.device) * step_x).repeat(kh)
    y_out = torch.arange(h_out, device=x.device).view(-1, 1, 1, 1) * stride_y - pad_y
    x_out = torch.arange(w_out, device=x.device).view(-1, 1, 1) * stride_x - pad_x
    y_at = (y_out + y_tap + offset[..., 0]).clamp(-ring, h)
    x_at = (x_out + x_tap + offset[..., 1]).clamp(-ring, w)
    top, left = y_at.detach().floor(), x_at.detach().floor()
    dy, dx = (y_at - top)[..., None], (x_at - left)[..., None]
    # NaN has come this far, and makes the sample NaN through dy or dx; as an index it is an outer zero
    row, column = top.nan_to_num(-ring).long() + ring, left.nan_to_num(-ring).long() + ring
    image = torch.arange(b, device=x.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(n_deform, device=x.device).view(-1, 1)
    index = ((image * height + row) * width + column) * n_deform + group

    weight = weight.reshape(groups, c_out // groups, kh * kw, c_in)
    if mask is not None:
        mask = mask.reshape(b, h_out, w_out, n_deform, kh * kw, 1)
    out = x.new_zeros(b, h_out, w_out, c_out) if bias is None else bias
    for k in range(kh * kw):
        at = index[..., k].flatten()
        p00, p01, p10, p11 = (
            rows.index_select(0, at + step * n_deform).view(b, h_out, w_out, n_deform, c // n_deform)
            for step in (0, 1, width, width + 1)
        )
        upper, lower = torch.lerp(p00, p01, dx[..., k, :]), torch.lerp(p10, p11, dx[..., k, :])
        sample = torch.lerp(upper, lower, dy[..., k, :])
        if mask is not None:
            sample = sample * mask[..., k, :]
        sample = sample.reshape(b, h_out, w_out, groups, c_in)
        out = out + torch.einsum("bhwgi,goi->bhwgo", sample, weight[:, :, k]).flatten(-2)
    return out


def _cpu(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    from deformmamba.deform.cpu import deform_conv2d

    return deform_conv2d(x, offset, mask, weight, bias, geometry)


def _torchvision(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    from torchvision.ops import deform_conv2d

    if x.device.type == "cpu":
        # its CPU kernel reads out of bounds at NaN
        lost = offset.isnan().unflatten(-1, (-1, 2)).any(-1)
        offset = offset.nan_to_num(math.inf, math.inf, -math.inf)
        mask = (x.new_ones(()) if mask is None else mask).where(~lost, math.nan)
    x, offset, weight = (t.permute(0, 3, 1, 2) for t in (x, offset, weight))
    mask = None if mask is None else mask.permute(0, 3, 1, 2)
    stride, padding, dilation = geometry[0:2], geometry[2:4], geometry[4:6]
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask).permute(0, 2, 3, 1).contiguous()


_RUN = {"cpu": _cpu, "torchvision": _torchvision, "gather": gather}
