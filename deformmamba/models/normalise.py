"""Normalisation inside a network by the percentiles of each slice, robust to intensity units and outliers.

The network's input is clamp((x - centre) / spread, -0.25, 2), where `centre` is the 1st percentile of the slice and
`spread` its distance to the 99th percentile. The network's residual is multiplied by `spread`. So the output for
a * x + b (a > 0) is a * output(x) + b, and up to half a percent of outlying pixels hardly change it.
"""

import torch
import torch.nn.functional as F

from deformmamba.physics.edges import constant_neighbourhood, percentile_range

NORMALISATIONS = (None, "slice")
LOWEST, HIGHEST = -0.25, 2.0  # range of the network's input; air is about 0 and bright tissue about 1


def slice_range(lr: torch.Tensor) -> torch.Tensor:
    """(..., 2): the `percentile_range` of each slice of `lr` (..., h, w)."""
    low, spread = percentile_range(lr)
    return torch.stack([low[..., 0, 0], spread[..., 0, 0]], dim=-1)


def normalised(lr: torch.Tensor, centre: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The network's input for `lr`; zeros if `spread` is 0, as for a constant slice."""
    known = spread > 0
    image = (lr - centre) / torch.where(known, spread, torch.ones_like(spread))
    return torch.where(known, image, torch.zeros_like(image)).clamp(LOWEST, HIGHEST)


def keep_constant(sr: torch.Tensor, lr: torch.Tensor, scale: int) -> torch.Tensor:
    """`sr`, but the value of `lr` where its 5x5 neighbourhood is constant, so that a masked background does not
    change."""
    kept = torch.where(constant_neighbourhood(lr), lr, torch.full_like(lr, torch.nan))
    kept = F.interpolate(kept, scale_factor=float(scale), mode="nearest").to(sr.dtype)
    return torch.where(kept.isnan(), sr, kept)


def in_constant(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """(b, c, scale * h, scale * w), bool: the HR pixels that `keep_constant` sets."""
    inside = constant_neighbourhood(lr)
    return inside.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
