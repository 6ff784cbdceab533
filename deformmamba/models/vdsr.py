"""VDSR (Kim et al. 2016), row 2 of table 2: twenty convolutions that learn the residual of bicubic interpolation."""

import itertools

import torch
from torch import nn

from deformmamba.errors import InvalidArgument
from deformmamba.models.base import SRModel
from deformmamba.models.interpolation import Bicubic
from deformmamba.models.srcnn import convolution
from deformmamba.physics.kspace import Grid


class VDSR(SRModel):
    """Bicubic interpolation plus a residual from a plain deep network: (b, 1, h, w) to (b, 1, scale * h, scale * w).

    Args:
        scale: upsampling factor.
        layers: 3x3 convolutions, the first and the last included.
        width: channels between them.
        grid: that of the pairs it is trained on; the bicubic interpolation lies on it.
        intensity: see `SRModel`.

    20 layers of 64 channels have 664,704 weights (usually quoted as 665 K) and 1,217 biases.

    Source: Kim, Lee & Lee, CVPR 2016, section 3, zero padding and He initialisation included. Departure: one network a
    scale, as table 2 needs, where the paper trains one for 2x, 3x and 4x together. Its clipping of the gradient to
    theta / rate, its L2 loss and its SGD at a rate of 0.1 belong to training, not to the network.
    """

    channels = 1

    def __init__(
        self,
        *,
        scale: int = 4,
        layers: int = 20,
        width: int = 64,
        grid: Grid = "origin",
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        if not 2 <= layers <= 256:
            raise InvalidArgument(f"VDSR: layers={layers}; 2 to 256 layers are needed")
        self.grid = grid
        self.interpolate = Bicubic(scale=scale, grid=grid)
        widths = [1, *[width] * (layers - 1), 1]
        self.convolutions = nn.ModuleList(convolution(a, b, 3, edges="zeros") for a, b in itertools.pairwise(widths))

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """The SR image of `lr` (b, 1, h, w), values about [0, 1]; `base` is checked and not used."""
        self.check_lr(lr, base)
        interpolated = self.interpolate.enlarge(lr)
        x = interpolated
        for layer in self.convolutions[:-1]:
            x = torch.relu(layer(x))
        return interpolated + self.convolutions[-1](x)
