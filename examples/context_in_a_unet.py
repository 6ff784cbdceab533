"""MultiViewContext in the bottleneck of a U-Net: `python examples/context_in_a_unet.py`.

It keeps size and channels, so it can be placed anywhere in a network. Choose rates that fit the map: here it is 8x8.
The task: fill the outline of a disk, which needs more context than a few 3x3 convolutions have.
"""

import torch
from torch import nn

from deformmamba import MultiViewContext


def convolutions(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1), nn.GroupNorm(4, out_channels), nn.SiLU())


class UNet(nn.Module):
    """(b, 1, h, w) to (b, 1, h, w), h and w multiples of 4."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.encode1, self.encode2 = convolutions(1, channels), convolutions(channels, 2 * channels)
        self.bottleneck = nn.Sequential(
            convolutions(2 * channels, 4 * channels),
            MultiViewContext(4 * channels, rates=(1, 2, 3, 4)),  # was: convolutions(4 * channels, 4 * channels)
        )
        self.decode2, self.decode1 = convolutions(6 * channels, 2 * channels), convolutions(3 * channels, channels)
        self.out = nn.Conv2d(channels, 1, 1)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = self.encode1(x)
        x2 = self.encode2(self.down(x1))
        x3 = self.bottleneck(self.down(x2))
        y = self.decode2(torch.cat([self.up(x3), x2], 1))
        return self.out(self.decode1(torch.cat([self.up(y), x1], 1)))


def disks(n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, size, size) outlines and the filled disks, 0 or 1."""
    axis = torch.linspace(-1, 1, size)
    centre, radius = torch.rand(n, 2, 1, 1) - 0.5, 0.2 + 0.3 * torch.rand(n, 1, 1)
    distance = torch.hypot(axis[:, None] - centre[:, 0], axis - centre[:, 1]) - radius
    return (distance.abs() < 0.05).float()[:, None], (distance < 0).float()[:, None]


def main(steps: int = 40) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        outlines, filled = disks(8)
        loss = nn.functional.binary_cross_entropy_with_logits(model(outlines), filled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = main()
    print(f"cross-entropy: {history[0]:.3f} at first, {history[-1]:.3f} after {len(history)} steps")
