"""Interpolation methods as models: the baselines for every network, on the same grid.

They have no parameters. Their interface is that of a network, so evaluation, tiling and the command line treat them
alike.
All are linear and, on the origin-aligned grid, pass exactly through the LR samples: sr[..., ::scale, ::scale] == lr.
"""

import torch

from deformmamba.errors import InvalidArgument, shown
from deformmamba.models.base import SRModel
from deformmamba.physics.edges import cubic_matrix
from deformmamba.physics.kspace import Grid, zero_fill
from deformmamba.physics.slice_profile import spline_matrix
from deformmamba.tensors import without_autocast


class ZeroFill(SRModel):
    """Zero-filled k-space (sinc) interpolation of the whole slice, see `deformmamba.physics.kspace.zero_fill`."""

    def __init__(self, *, scale: int, intensity: str = "p99.9") -> None:
        super().__init__(scale=scale, intensity=intensity)

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """(b, c, h, w) to (b, c, scale * h, scale * w). `base` is the tile's cut of the zero-filled whole slice. If it
        is given, it is returned: k-space is global, and zero-filling a tile would wrap around at its edges."""
        self.check_lr(lr, base)
        return zero_fill(lr, self.scale) if base is None else base


class _Separable(SRModel):
    """Interpolation by one matrix a side: sr = rows @ lr @ columns^T."""

    def __init__(self, *, scale: int, grid: Grid, intensity: str) -> None:
        super().__init__(scale=scale, intensity=intensity)
        self.grid = grid

    def matrix(self, n: int) -> torch.Tensor:
        """(scale * n, n), float64: the weight of each of n input samples in each output sample."""
        raise NotImplementedError

    def positions(self, n: int) -> torch.Tensor:
        """The positions of the scale * n output samples, in units of the input's samples, float64."""
        i = torch.arange(self.scale * n, dtype=torch.float64)
        return i / self.scale if self.grid == "origin" else (i + 0.5) / self.scale - 0.5

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """(b, c, h, w) to (b, c, scale * h, scale * w); `base` is checked and not used."""
        self.check_lr(lr, base)
        return self.enlarge(lr)

    def enlarge(self, lr: torch.Tensor) -> torch.Tensor:
        """`forward` without its checks, for a network that starts from the interpolated image."""
        rows, columns = (self.matrix(n).to(lr) for n in lr.shape[-2:])
        with without_autocast(
            lr.device.type
        ):  # the error of half precision would be visible, because the image is only resampled
            return rows @ lr @ columns.T


class Bicubic(_Separable):
    """Cubic convolution; edges replicate.

    Args:
        a: slope of the kernel at 1. Keys' -0.5 alone reproduces quadratics and converges with the third order; -0.75 is
            what F.interpolate and OpenCV use, and is a little sharper.
        grid: "origin" fits images whose k-space was cropped; "half-pixel" is the only one F.interpolate offers.

    Measured on the six real IXI T2 slices, 4x, PSNR over the volume / SSIM: a = -0.5 gives 27.02 / 0.802, a = -0.75
    gives 27.17 / 0.805, `BSpline` 27.34 / 0.808, `ZeroFill` 27.66 / 0.800; on the half-pixel grid 24.5 / 0.750.

    Source: Keys, IEEE TASSP 29 (1981), with a free a as in its equation 8.
    """

    def __init__(self, *, scale: int, a: float = -0.5, grid: Grid = "origin", intensity: str = "p99.9") -> None:
        super().__init__(scale=scale, grid=grid, intensity=intensity)
        if not -3 <= a <= 0:
            raise InvalidArgument(f"Bicubic: a must lie in [-3, 0], usually -0.5 or -0.75, not {shown(a)}")
        self.a = float(a)

    def matrix(self, n: int) -> torch.Tensor:
        return cubic_matrix(n, self.positions(n), self.a)


class BSpline(_Separable):
    """Cubic b-spline interpolation: the spline through the samples, twice continuously differentiable; edges mirror
    about the outermost samples.

    The coefficients come from an exact solve, not a recursive filter: the same numbers without a boundary series.

    Source: Unser, IEEE Signal Processing Magazine 16(6) (1999); equals `scipy.ndimage` of order 3 with mode="mirror".
    """

    def __init__(self, *, scale: int, grid: Grid = "origin", intensity: str = "p99.9") -> None:
        super().__init__(scale=scale, grid=grid, intensity=intensity)

    def matrix(self, n: int) -> torch.Tensor:
        return spline_matrix(n, self.positions(n))
