"""Modulated deformable convolution in PyTorch's own operations: any device, any derivative, any exporter.

It works channels last: x (b, h, w, c), offset (b, h_out, w_out, 2 * G * K), mask (b, h_out, w_out, G * K) or None,
weight (c_out, kh, kw, c_in), bias (c_out,) or None, K = kh * kw. Geometry is stride, padding and dilation, each (y, x).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gather(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """Equation 5 of the paper, one tap after the other. Returns (b, h_out, w_out, c_out).

    Only the offset is rounded down, not the position: offset + position in float32 would lose the fraction in large
    images.
    """
    b, h, w, c = x.shape
    c_out, kh, kw, c_in = weight.shape
    _, h_out, w_out, _ = offset.shape
    groups, n_deform = c // c_in, offset.shape[-1] // (2 * kh * kw)
    stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry

    # Two zeros around the image represent everything outside it: pixels are clamped to them. A row for each pixel and
    # deformable group, holding its channels.
    ring = 2
    height, width = h + 2 * ring, w + 2 * ring
    rows = F.pad(x, (0, 0, ring, ring, ring, ring)).reshape(-1, c // n_deform)

    # Offsets and indices (b, h_out, w_out, G, K)
    offset = offset.reshape(b, h_out, w_out, n_deform, kh * kw, 2)
    whole = offset.detach().floor()
    # an infinite offset points outside; NaN in one of the pair makes the sample NaN, and both gradients
    lost = offset.isnan().any(-1, keepdim=True)
    fraction = torch.where(offset.isinf() & ~lost, 0, offset - whole) + torch.where(lost, math.nan, 0.0).to(x.dtype)
    far = 2.0**30  # outside every image; NaN goes there too, so that it reads zeros
    dy_whole, dx_whole = whole.nan_to_num(-far, far, -far).clamp(-far, far).long().unbind(-1)
    y_tap = (torch.arange(kh, device=x.device) * step_y).repeat_interleave(kw)
    x_tap = (torch.arange(kw, device=x.device) * step_x).repeat(kh)
    y_out = torch.arange(h_out, device=x.device).view(-1, 1, 1, 1) * stride_y - pad_y
    x_out = torch.arange(w_out, device=x.device).view(-1, 1, 1) * stride_x - pad_x
    row = (y_out + y_tap + dy_whole).clamp(-ring, h) + ring
    column = (x_out + x_tap + dx_whole).clamp(-ring, w) + ring
    dy, dx = fraction[..., 0, None], fraction[..., 1, None]
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
