"""The definition of the selective scan: a loop over steps in the input dtype, written for readability.

    h[t] = exp(dt[t] A) h[t-1] + phi[t] B[t] u[t]        y[t] = C[t] . h[t] + D u[t]

with dt = softplus(delta + delta_bias) and phi = dt (the Euler step of released Mamba kernels) or (exp(dt A) - 1) / A
(exact zero-order hold, equation 2 of the paper). Every other backend is tested against this one.
"""

import torch
import torch.nn.functional as F

from deformmamba.scan.backend import Abilities

ABILITIES = Abilities(transforms=True)


def unusable(tensor: torch.Tensor | None = None) -> str | None:
    """Always None: the definition runs wherever PyTorch runs."""
    return None


def orders(directions: int, height: int, width: int, device: torch.device | None = None) -> list[torch.Tensor]:
    """For each direction, the row-major pixel (0 to height * width - 1) that each step visits.

    One direction: rows. Two: rows, rows from the end. Four: rows, columns, rows from the end, columns from the end."""
    rows = torch.arange(height * width, device=device)
    columns = rows.reshape(height, width).t().reshape(-1)
    walks = [rows, columns, rows.flip(0), columns.flip(0)]
    return {1: walks[:1], 2: walks[::2], 4: walks}[directions]


def step_sizes(delta: torch.Tensor, delta_bias: torch.Tensor | None, delta_softplus: bool) -> torch.Tensor:
    """dt (k, b, g, l, r)."""
    dt = delta if delta_bias is None else delta + delta_bias[:, None, :, None]
    return F.softplus(dt) if delta_softplus else dt


def discretize(dt: torch.Tensor, A: torch.Tensor, zoh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(exp(dt A), phi), dt and A broadcast. Near dt A = 0 phi is a series: the quotient's slope would cancel."""
    x = dt * A
    if not zoh:
        return torch.exp(x), dt
    small = x.abs() < 0.2
    near = torch.where(small, x, 0)
    series = torch.ones_like(x)
    for k in range(13, 1, -1):
        series = 1 + series * near / k
    return torch.exp(x), torch.where(small, dt * series, torch.expm1(x) / torch.where(small, 1, A))


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state); shapes as in `backend`, differentiable by autograd."""
    dt = step_sizes(delta, delta_bias, delta_softplus)
    total = torch.zeros_like(u)
    lasts = []
    for k, order in enumerate(orders(len(delta), height, width, u.device)):
        h = u.new_zeros(*u.shape[:2], u.shape[3], A.shape[-1]) if initial_state is None else initial_state[k]
        steps = []
        walked = (x[:, :, order].unbind(2) for x in (u, dt[k], B[k], C[k]))
        for u_t, dt_t, B_t, C_t in zip(*walked, strict=True):
            a, phi = discretize(dt_t[..., None], A[k], zoh)
            h = a * h + phi * u_t[..., None] * B_t[:, :, None]
            steps.append((C_t[:, :, None] * h).sum(-1))
        y = torch.stack(steps, 2)[:, :, torch.argsort(order)] if steps else u
        total = total + (y if D is None else y + D[k][:, None] * u)
        lasts.append(h)
    return total, torch.stack(lasts)
