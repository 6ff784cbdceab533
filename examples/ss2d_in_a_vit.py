"""SS2D instead of attention in a vision transformer: `python examples/ss2d_in_a_vit.py`.

The block is timm's, LayerNorm, token mixer, LayerNorm, MLP, each with a residual; only the mixer changes. Its cost is
linear in the number of pixels, and it needs no position embedding. The task: find the row and column of a bright spot.
"""

import torch
from torch import nn

from deformmamba import SS2D


class Block(nn.Module):
    """(b, h, w, channels) tokens to the same, as in Swin; SS2D itself takes (b, channels, h, w)."""

    def __init__(self, channels: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = SS2D(channels, d_state=4)  # was: Attention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels), nn.GELU(), nn.Linear(mlp_ratio * channels, channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(b, 1, h, w) images to (b, 2) numbers."""

    def __init__(self, channels: int = 16, depth: int = 2, patch: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, channels, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(depth)))
        self.head = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


def spots(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, size, size) noise with one bright spot each, and its position (n, 2) in 0 to 1."""
    at = torch.rand(n, 2)
    axis = torch.linspace(0, 1, size)
    rows, columns = (torch.exp(-100 * (axis - at[:, i, None]) ** 2) for i in (0, 1))
    return (rows[:, :, None] * columns[:, None] + 0.05 * torch.randn(n, size, size))[:, None], at


def main(steps: int = 40) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        images, at = spots(16)
        loss = (model(images) - at).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = main()
    print(f"mean squared distance: {history[0]:.4f} at first, {history[-1]:.4f} after {len(history)} steps")
