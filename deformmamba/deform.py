"""Modulated deformable convolution (DCNv2): a convolution whose taps move, and fade, by what the image holds.

    Y(p) = sum_k  w_k . X(p + p_k + dp_k) * dm_k        (equation 5 of the paper; Zhu et al. 2019)

in the conventions of `torchvision.ops.deform_conv2d`: positions count pixels, offsets come as (dy, dx) for each tap,
X between pixels is bilinear, and X outside the image is zero.
"""

import torch
import torch.nn.functional as F


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def modulated_deform_conv2d(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    implementation: str | None = None,
) -> torch.Tensor:
    """Deformable convolution of x (b, c_in, h, w) with weight (c_out, c_in / groups, kh, kw)."""
    if implementation not in (None, "gather"):
        raise ValueError(f'modulated_deform_conv2d: implementation {implementation!r} is not one of "gather"')
    out_dtype = x.dtype
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        out_dtype = torch.get_autocast_dtype(device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(device, enabled=False):
        out = _gather(
            x.to(dtype),
            offset.to(dtype),
            None if mask is None else mask.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            _pair(stride),
            _pair(padding),
            _pair(dilation),
        )
    out = out.to(out_dtype)
    return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()


def _gather(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Equation 5 tap by tap, in PyTorch's own differentiable operations: any device, any order of derivative."""
    b, c, h, w = x.shape
    c_out, c_in, kh, kw = weight.shape
    h_out, w_out = offset.shape[-2:]
    n_taps, groups = kh * kw, c // c_in
    n_deform = offset.shape[1] // (2 * n_taps)

    # A ring of two zeros stands for everything outside: positions are clamped to it, so no index needs a second look.
    # Rows of channels, one for each pixel and deformable group.
    ring = 2
    rows = F.pad(x, (ring, ring, ring, ring)).permute(0, 2, 3, 1).reshape(-1, c // n_deform)
    height, width = h + 2 * ring, w + 2 * ring

    offset = offset.permute(0, 2, 3, 1).reshape(b, h_out, w_out, n_deform, n_taps, 2)
    if mask is not None:
        mask = mask.permute(0, 2, 3, 1).reshape(b, h_out, w_out, n_deform, n_taps, 1)
    taps = weight.reshape(groups, c_out // groups, c_in, n_taps)
    y_out = torch.arange(h_out, device=x.device).view(1, -1, 1, 1) * stride[0] - padding[0]
    x_out = torch.arange(w_out, device=x.device).view(1, 1, -1, 1) * stride[1] - padding[1]
    image = torch.arange(b, device=x.device).view(-1, 1, 1, 1)
    group = torch.arange(n_deform, device=x.device)

    out = x.new_zeros(()) if bias is None else bias
    for k in range(n_taps):
        ky, kx = divmod(k, kw)
        y_at = (y_out + ky * dilation[0] + offset[..., k, 0]).clamp(-ring, h)
        x_at = (x_out + kx * dilation[1] + offset[..., k, 1]).clamp(-ring, w)
        y_low, x_low = y_at.detach().floor(), x_at.detach().floor()
        # NaN passes clamp and floor, makes the sample NaN through dy or dx, and reads the ring
        row = y_low.nan_to_num(-ring).long() + ring
        column = x_low.nan_to_num(-ring).long() + ring
        index = (((image * height + row) * width + column) * n_deform + group).flatten()
        dy, dx = (y_at - y_low)[..., None], (x_at - x_low)[..., None]

        def pixel(down: int, right: int, index: torch.Tensor = index, like: torch.Tensor = dy) -> torch.Tensor:
            at = index + (down * width + right) * n_deform
            return rows.index_select(0, at).view(*like.shape[:-1], c // n_deform)

        top = torch.lerp(pixel(0, 0), pixel(0, 1), dx)
        sample = torch.lerp(top, torch.lerp(pixel(1, 0), pixel(1, 1), dx), dy)
        if mask is not None:
            sample = sample * mask[..., k, :]
        sample = sample.reshape(b, h_out, w_out, groups, c_in)
        out = out + torch.einsum("bhwgi,goi->bhwgo", sample, taps[..., k]).flatten(-2)
    return out.permute(0, 3, 1, 2)
