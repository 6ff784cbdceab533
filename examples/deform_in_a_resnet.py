"""ModulatedDeformBlock instead of a 3x3 convolution in a ResNet: `python examples/deform_in_a_resnet.py`.

The block is the basic block of He et al. (torchvision's `BasicBlock`), with its second convolution replaced as in
DCNv2. The task: find the shift between a texture and its shifted copy, in pixels.
"""

import torch
from torch import nn

from deformmamba import ModulatedDeformBlock


class BasicBlock(nn.Module):
    """(b, channels, h, w) to (b, out_channels, h / stride, w / stride)."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = ModulatedDeformBlock(out_channels, bias=False)  # was: nn.Conv2d(..., 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """(b, 2, h, w) pairs of images to (b, 2) shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(BasicBlock(2, 16), BasicBlock(16, 32, stride=2))
        self.head = nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def pairs(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 2, size, size) textures beside their shifted copies, and the shifts (n, 2), from -1 to 1 pixel."""
    texture = nn.functional.avg_pool2d(torch.randn(n, 1, size + 4, size + 4), 3, stride=1, padding=1)
    shift = torch.randint(-1, 2, (n, 2))
    moved = torch.stack([torch.roll(t, tuple(s), (1, 2)) for t, s in zip(texture, shift.tolist(), strict=True)])
    return torch.cat([texture, moved], 1)[..., 2:-2, 2:-2] * 3, shift.float()


def main(steps: int = 40) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = ResNet()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        images, shift = pairs(32)
        loss = (model(images) - shift).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = main()
    print(f"mean squared error of the shift: {history[0]:.3f} at first, {history[-1]:.3f} after {len(history)} steps")
