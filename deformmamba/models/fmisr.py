"""FMISR (Zhang et al. 2019), row 3 of table 2: a few convolutions on the LR grid, then one pixel shuffle."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.errors import InvalidArgument
from deformmamba.models.base import SRModel
from deformmamba.models.skip import add_base, checked_skip, start_at_zero
from deformmamba.physics.kspace import Grid


class FMISR(SRModel):
    """Fast medical image super-resolution: (b, 1, h, w) to (b, 1, scale * h, scale * w).

    Hidden layers on the LR grid, each a mini-network of two 3x3 convolutions in place of a 5x5 one, then a sub-pixel
    convolution: scale^2 channels, shuffled into one.

    Args:
        scale: upsampling factor.
        widths: output channels of each hidden layer.
        grid: the grid of the training pairs; the convolutions before the pixel shuffle learn it.
        skip: None, as published; "zero-fill" adds the zero-filled input, see `deformmamba.models.skip`.
        intensity: see `SRModel`.

    Source: Zhang, Liang, Pan & Zheng, IEEE Access 7 (2019). We had neither the paper's text nor its code, only
    its abstract, at second hand: three hidden layers, with mini-networks substituted in them, and a sub-pixel
    convolution at the end. ASSUMED by us: a mini-network is the one of Szegedy et al. (CVPR 2016, figure 1), two 3x3
    convolutions in place of a 5x5 one; widths 64, 64, 32, ReLU after every convolution and a last kernel of 3x3, after
    the sub-pixel network of Shi et al. (CVPR 2016: 5x5 to 64, 3x3 to 32, 3x3 to scale^2, tanh), which it must resemble.
    Check these assumptions against the paper first. Scores of this class hold for this interpretation only.
    """

    channels = 1

    def __init__(
        self,
        *,
        scale: int = 4,
        widths: Sequence[int] = (64, 64, 32),
        grid: Grid = "origin",
        skip: str | None = None,
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        if not 1 <= len(widths) <= 64 or min(widths) < 1:
            raise InvalidArgument(
                f"FMISR: widths={list(widths)}; wanted one positive number of channels per hidden layer"
            )
        self.grid = grid
        self.skip = checked_skip("FMISR", skip, grid)
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU())
            for a, b in zip([1, *widths], widths, strict=False)
        )
        self.subpixel = nn.Conv2d(widths[-1], scale**2, 3, padding=1)
        if skip:
            start_at_zero(self.subpixel)

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """The SR image of `lr` (b, 1, h, w), values about [0, 1]; `base`: see `DeformMambaSR`."""
        self.check_lr(lr, base)
        x = lr
        for layer in self.hidden:
            x = layer(x)
        sr = F.pixel_shuffle(self.subpixel(x), self.scale)
        return add_base(sr, lr, base, self.scale, self.skip)
