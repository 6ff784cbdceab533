"""ContrastiveEdgeLoss in a plain training loop: `python examples/edge_loss_in_a_loop.py`.

It compares only edges, so combine it with a loss that compares values: the paper uses L1 + 0.1 * edges (`SRLoss`). The
task: sharpen blurred images of rectangles with three convolutions.
"""

import torch
from torch import nn

from deformmamba import ContrastiveEdgeLoss


def rectangles(n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, size, size) blurred and sharp images in 0 to 1."""
    axis = torch.arange(size)
    start, extent = torch.randint(2, size // 2, (n, 2, 1)), torch.randint(4, size // 2, (n, 2, 1))
    inside = (axis >= start) & (axis < start + extent)
    sharp = (inside[:, 0, :, None] & inside[:, 1, None, :]).float()[:, None]
    return nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2), sharp


def main(steps: int = 40) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    edges = ContrastiveEdgeLoss()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        blurred, sharp = rectangles(8)
        restored = blurred + model(blurred)
        loss = (restored - sharp).abs().mean() + 0.1 * edges(restored, sharp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = main()
    print(f"L1 + 0.1 edges: {history[0]:.4f} at first, {history[-1]:.4f} after {len(history)} steps")
