"""The definition, as a loop over time."""

import torch


def scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None,
    discretization: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u, dt (b, d, l); A (d, n); B, C (b, g, n, l); state (b, d, n) -> y (b, d, l), last state."""
    repeat = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
    h = u.new_zeros(*u.shape[:2], A.shape[1]) if state is None else state.to(u.dtype)
    ys = []
    for t in range(u.shape[2]):
        x = dt[:, :, t, None] * A
        if discretization == "euler":
            step = dt[:, :, t, None].expand_as(x)
        else:
            safe = torch.where(x == 0, 1, x)
            step = dt[:, :, t, None] * torch.where(x == 0, 1 + x / 2, torch.expm1(safe) / safe)
        h = torch.exp(x) * h + step * B[..., t] * u[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1))
    return torch.stack(ys, -1), h
