"""The selective scan in plain PyTorch operations, chunk by chunk: any device, and any exporter.

Within a chunk the recurrence is solved by doubling: after round i every step includes the contribution of the 2^i steps
before it. Seven rounds of large operations replace CHUNK small steps, which keeps a graph small and a GPU busy.
Products of decays, which the definition never forms, can underflow; they stop at the smallest normal number, so that an
infinity passes them as it passes the definition. They can overflow only where dt A is positive.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from deformmamba.scan.backend import Abilities
from deformmamba.scan.reference import discretize, orders, step_sizes
from deformmamba.torch_private import transforms_are_active

ABILITIES = Abilities(transforms=True)

CHUNK = 128


def unusable(tensor: torch.Tensor | None = None) -> str | None:
    """Always None: these are PyTorch's own operations."""
    return None


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
    walks = orders(len(delta), height, width, u.device)
    dt = step_sizes(delta, delta_bias, delta_softplus)
    us = torch.stack([u[:, :, walk] for walk in walks])
    dt, B, C = (torch.stack([x[k][:, :, walk] for k, walk in enumerate(walks)]) for x in (dt, B, C))
    h = u.new_zeros(*us.shape[:3], u.shape[3], A.shape[-1]) if initial_state is None else initial_state
    # the backward pass needs a chunk's states again, and recomputing them is cheaper than keeping them (torch.func does
    # not support checkpoints)
    plain = torch.compiler.is_compiling() or transforms_are_active()
    remember = torch.is_grad_enabled() and not plain
    ys = []
    for pieces in zip(*(x.split(CHUNK, 3) for x in (us, dt, B, C)), strict=True):
        given: Any = (*pieces, A, h, zoh)
        y, h = checkpoint(_chunk, *given, use_reentrant=False) if remember else _chunk(*given)
        ys.append(y)
    scanned = torch.cat(ys, 3)
    total = torch.stack([scanned[k][:, :, torch.argsort(walk)] for k, walk in enumerate(walks)]).sum(0)
    return (total if D is None else total + D.sum(0)[:, None] * u), h


def _chunk(
    u: torch.Tensor,
    dt: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    A: torch.Tensor,
    h: torch.Tensor,
    zoh: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (k, b, g, t, r), last state) of t steps after state h."""
    a, phi = discretize(dt[..., None], A[:, None, :, None], zoh)
    x = phi * u[..., None] * B[:, :, :, :, None]
    x = torch.cat([x[:, :, :, :1] + a[:, :, :, :1] * h[:, :, :, None], x[:, :, :, 1:]], 3)
    reach = 1
    while reach < u.shape[3]:
        early, late = slice(None, -reach), slice(reach, None)
        x_new = x[:, :, :, late] + a[:, :, :, late] * x[:, :, :, early]
        a_new = _product(a[:, :, :, late], a[:, :, :, early])
        x = torch.cat([x[:, :, :, :reach], x_new], 3)
        a = torch.cat([a[:, :, :, :reach], a_new], 3)
        reach *= 2
    return (x * C[:, :, :, :, None]).sum(-1), x[:, :, :, -1]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * b >= 0 that is 0 only where a factor is."""
    product = (a * b).clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where((a == 0) | (b == 0), a * b, product)
