"""Modulated deformable convolution as one `grid_sample` for all taps: few operations, for exported programs.

Shapes are those of `gather.py`. Sampling positions are scaled to [-1, 1] and back in float32: at 1,000 pixels they are
exact to about 1e-4 pixels. NaN and infinite offsets are not supported. Samples of all taps are in memory at once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_sample(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]
) -> Tensor:
    """Equation 5 of the paper. Returns (b, h_out, w_out, c_out)."""
    b, h, w, c = x.shape
    c_out, kh, kw, c_in = weight.shape
    _, h_out, w_out, _ = offset.shape
    taps = kh * kw
    groups, n_deform = c // c_in, offset.shape[-1] // (2 * taps)
    stride_y, stride_x, pad_y, pad_x, step_y, step_x = geometry
    y_tap = (torch.arange(kh, device=x.device) * step_y - pad_y).repeat_interleave(kw)
    x_tap = (torch.arange(kw, device=x.device) * step_x - pad_x).repeat(kh)
    y_out = torch.arange(h_out, device=x.device)[:, None] * stride_y
    x_out = torch.arange(w_out, device=x.device)[:, None] * stride_x
    dy, dx = offset.unflatten(-1, (n_deform, taps, 2)).permute(5, 0, 3, 1, 2, 4)  # (b, G, h_out, w_out, taps)
    # pixel i of n is at (2 i + 1) / n - 1
    down = (2 * (dy + (y_out[:, None] + y_tap)) + 1) / h - 1
    right = (2 * (dx + (x_out + x_tap)) + 1) / w - 1
    grid = torch.stack([right, down], -1).flatten(0, 1).flatten(2, 3)  # (b * G, h_out, w_out * taps, 2)
    image = x.permute(0, 3, 1, 2).unflatten(1, (n_deform, c // n_deform)).flatten(0, 1)
    samples = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
    samples = samples.unflatten(0, (b, n_deform)).unflatten(-1, (w_out, taps))  # (b, G, c / G, h_out, w_out, taps)
    if mask is not None:
        samples = samples * mask.unflatten(-1, (n_deform, taps)).permute(0, 3, 1, 2, 4)[:, :, None]
    columns = samples.flatten(1, 2).unflatten(1, (groups, c_in)).permute(0, 3, 4, 1, 5, 2).flatten(-2)[..., None, :]
    matrix = weight.reshape(groups, c_out // groups, taps * c_in).mT  # (groups, taps * c_in, c_out / groups)
    out = (columns @ matrix).flatten(-3)
    return out if bias is None else out + bias
