"""T2Net (Feng et al. 2021), row 4 of table 2: a super-resolution branch attends to a reconstruction branch."""

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.errors import InvalidArgument
from deformmamba.models.base import SRModel, check_scale_of_shuffles
from deformmamba.models.skip import add_base, checked_skip, start_at_zero
from deformmamba.physics.kspace import Grid
from deformmamba.tensors import without_autocast

# entries of a relevance map held at once: slices of any size in 64 MB of it
RELEVANCE_ENTRIES = 1 << 24


class T2Net(SRModel):
    """Super-resolution helped by the features of a reconstruction branch: (b, c, h, w) to (b, c, scale * h, scale * w).

    Both branches are residual blocks on the LR grid. After each block a task transformer takes, for every pixel of the
    super-resolution branch, the most similar 3x3 patch of the reconstruction branch (hard attention), fuses it by a 1x1
    convolution and adds it, weighted by that similarity. Pixel shuffle at the end.

    Args:
        scale: upsampling factor: a power of two, or 3.
        in_channels: image channels.
        width: channels of both branches.
        blocks: residual blocks of each branch.
        residual: factor of each block's residual.
        grid: that of the pairs it is trained on; the convolutions before the pixel shuffle learn it.
        skip: None, as published; "zero-fill" adds the zero-filled input, see `deformmamba.models.skip`.
        intensity: see `SRModel`.

    1.55 million parameters at 4x; no count of the authors is known to us.

    Source: Feng, Yan, Fu, Chen & Xu, MICCAI 2021, in its details (5x5 heads, residuals scaled by 0.1, 8 blocks,
    overlapping patches divided by 9) the authors' released code, chunmeifeng/T2Net. Left out: the reconstruction
    branch's own 1x1 output and its loss (0.2 of the total). T2Net's input is undersampled as well as coarse, and that
    output removes the aliasing; the experiments of table 2 degrade by cropping k-space alone, so its target would be
    its input. The branch itself learns from the super-resolution loss, through the transformers. Left out too: a last
    convolution of each branch that the released code creates and never uses.
    """

    tiles = "patches of the size trained on: every pixel searches the whole image, in time that grows as its square"

    def __init__(
        self,
        *,
        scale: int = 4,
        in_channels: int = 1,
        width: int = 64,
        blocks: int = 8,
        residual: float = 0.1,
        grid: Grid = "origin",
        skip: str | None = None,
        intensity: str = "p99.9",
    ) -> None:
        super().__init__(scale=scale, intensity=intensity)
        check_scale_of_shuffles(self)
        if not 1 <= blocks <= 128:
            raise InvalidArgument(f"T2Net: blocks={blocks}; 1 to 128 blocks are needed")
        self.grid = grid
        self.skip = checked_skip("T2Net", skip, grid)
        self.channels = in_channels
        self.sharp_head, self.clean_head = (nn.Conv2d(in_channels, width, 5, padding=2) for _ in range(2))
        self.sharp, self.clean = (nn.ModuleList(_Residual(width, residual) for _ in range(blocks)) for _ in range(2))
        self.fuse = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for _ in range(blocks))
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        self.upsample = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, n * n * width, 3, padding=1), nn.PixelShuffle(n)) for n in steps),
            nn.Conv2d(width, in_channels, 3, padding=1),
        )
        if skip:
            start_at_zero(self.upsample[-1])

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        """The SR image of `lr` (b, in_channels, h, w), values about [0, 1]; `base`: see `DeformMambaSR`."""
        self.check_lr(lr, base)
        sharp = first = self.sharp_head(lr)
        clean = self.clean_head(lr)
        for sharpen, denoise, fuse in zip(self.sharp, self.clean, self.fuse, strict=True):
            sharp, clean = sharpen(sharp), denoise(clean)
            relevance, found = task_attention(sharp, clean)
            sharp = sharp + relevance * fuse(torch.cat([sharp, found], dim=1))
        sr = self.upsample(sharp + first)
        return add_base(sr, lr, base, self.scale, self.skip)


def task_attention(query: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every 3x3 patch of `query` (b, c, h, w) the most similar one of `source` (b, c, h', w').

    Returns the cosine similarity of the best patch (b, 1, h, w), and the image that the best patches make where they
    overlap, their sum divided by 9 (b, c, h, w). Borders are zeros.

    Source: T2Net, section 2.3, the transformer of texture transfer (Yang et al., CVPR 2020).
    """
    b, _, h, w = query.shape
    with without_autocast(query.device.type):  # half precision chooses among similar patches by chance
        asked, offered = (
            F.unfold(x.to(torch.promote_types(x.dtype, torch.float32)), 3, padding=1) for x in (query, source)
        )
        keys = F.normalize(offered, dim=1).mT
        parts = F.normalize(asked, dim=1).split(max(1, RELEVANCE_ENTRIES // (b * offered.shape[2])), dim=2)
        best = [(keys @ part).max(dim=1) for part in parts]
        relevance = torch.cat([values for values, _ in best], dim=1)
        index = torch.cat([indices for _, indices in best], dim=1)
        patches = offered.gather(2, index[:, None].expand(-1, offered.shape[1], -1))
        found = F.fold(patches, (h, w), 3, padding=1) / 9
    return relevance.view(b, 1, h, w).to(query.dtype), found.to(query.dtype)


class _Residual(nn.Module):
    """x + factor * conv(ReLU(conv(x)))."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * self.second(torch.relu(self.first(x)))
