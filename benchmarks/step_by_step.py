"""The selective scan as a Python loop over steps, which is what released Mamba code runs on a CPU. Do not improve it.

The ratios of the benchmarks refer to this function, so it must not change. It is the loop of mamba-ssm's
`selective_scan_ref`, which VMamba copies, in float32.
"""

import torch
import torch.nn.functional as F


def step_by_step(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """u, dt (b, d, l); A (d, n); B, C (b, g, n, l); D, bias (d,); y (b, d, l)."""
    b, d, l = u.shape  # noqa: E741
    n = A.shape[1]
    g = B.shape[1]
    dt = F.softplus(dt + bias[:, None])
    dA = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    Bx = B.repeat_interleave(d // g, 1)
    Cx = C.repeat_interleave(d // g, 1)
    dBu = torch.einsum("bdl,bdnl,bdl->bdln", dt, Bx, u)
    x = torch.zeros(b, d, n)
    ys = []
    for i in range(l):
        x = dA[:, :, i] * x + dBu[:, :, i]
        ys.append(torch.einsum("bdn,bdn->bd", x, Cx[:, :, :, i]))
    y = torch.stack(ys, 2)
    return y + u * D[:, None]
