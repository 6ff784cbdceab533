"""SRCNN (Dong et al. 2016), row 1 of table 2: three convolutions on the interpolated image."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from deformmamba.errors import InvalidArgument
from deformmamba.models.base import SRModel
from deformmamba.models.interpolation import Bicubic
from deformmamba.physics.kspace import Grid


class SRCNN(SRModel):
    """Patch extraction, non-linear mapping, reconstruction: (b, 1, h, w) to (b, 1, scale * h, scale * w).

    Args:
        scale: upsampling factor.
        kernels: sizes of the three kernels, all odd. The journal version compares 9-1-5 (8,032 weights), 9-3-5 (24,416)
            and 9-5-5 (57,184, the default), its best and the one it compares with others. Table 2 does not state which
            one it uses.
        widths: channels after the first and the second convolution.
        grid: that of the pairs it is trained on; the bicubic interpolation before the network lies on it.
        intensity: see `SRModel`.

    Source: Dong, Loy, He & Tang, IEEE TPAMI 38(2) (2016), sections 3 and 4. Departures: borders are replicated, where
    the paper lets the image shrink in training; weights start as He et al. (2015) have it, not at a deviation of 0.001,
    from which the paper's SGD took 8e8 back-propagations; and the last layer has the rate of the others.
    """

    channels = 1

    def __init__(
        self,
        *,
        scale: int = 4,
        kernels: Sequence[int] = (9, 5, 5),
        widths: Sequence[int] = (64, 32),
        grid: Grid = "origin",
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        if len(kernels) != 3 or len(widths) != 2 or min(*kernels, *widths) < 1 or not all(k % 2 for k in kernels):
            raise InvalidArgument(
                f"SRCNN: kernels={list(kernels)}, widths={list(widths)}; three odd kernels such as 9, 5, 5 and two "
                "widths such as 64, 32 are needed"
            )
        self.grid = grid
        self.interpolate = Bicubic(scale=scale, grid=grid)
        first, middle, last = kernels
        self.extract = convolution(1, widths[0], first)
        self.map = convolution(widths[0], widths[1], middle)
        self.reconstruct = convolution(widths[1], 1, last)

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """The SR image of `lr` (b, 1, h, w), values about [0, 1]; `base` is checked and not used."""
        self.check_lr(lr, base)
        interpolated = self.interpolate.enlarge(lr)
        x = torch.relu(self.extract(interpolated))
        return self.reconstruct(torch.relu(self.map(x)))


def convolution(c_in: int, c_out: int, kernel: int, edges: Literal["replicate", "zeros"] = "replicate") -> nn.Conv2d:
    """A convolution that keeps the size, with the initialisation of He et al. (2015) and biases of zero."""
    made = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, padding_mode=edges)
    nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
    nn.init.zeros_(made.bias)  # type: ignore[arg-type]
    return made
