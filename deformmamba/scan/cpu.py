"""numba kernels: what a CPU runs."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch


@lru_cache(None)
def _kernels(n: int) -> tuple[Any, Any]:
    from numba import njit, prange

    flags = {"reassoc", "contract", "nsz", "arcp", "afn"}

    @njit(parallel=True, fastmath=flags, error_model="numpy")
    def forward(u, dt, A, B, C, y):  # type: ignore[no-untyped-def]
        b, d, l = u.shape
        r = d // B.shape[1]
        for bd in prange(b * d):
            i = bd // d
            j = bd % d
            k = j // r
            x = np.zeros(n, np.float32)
            for t in range(l):
                dtt = dt[i, j, t]
                dut = dtt * u[i, j, t]
                s = np.float32(0)
                for m in range(n):
                    xm = np.exp(dtt * A[j, m]) * x[m] + dut * B[i, k, t, m]
                    x[m] = xm
                    s += xm * C[i, k, t, m]
                y[i, j, t] = s

    @njit(parallel=True, fastmath=flags, error_model="numpy")
    def backward(u, dt, A, B, C, dy, du, ddt, dA, dB, dC):  # type: ignore[no-untyped-def]
        b, d, l = u.shape
        g = B.shape[1]
        r = d // g
        for bg in prange(b * g):
            i = bg // g
            k = bg % g
            xs = np.zeros((l + 1, n), np.float32)
            decay = np.empty((l, n), np.float32)
            for j in range(k * r, (k + 1) * r):
                for t in range(l):
                    dux = dt[i, j, t] * u[i, j, t]
                    for m in range(n):
                        a = np.exp(dt[i, j, t] * A[j, m])
                        decay[t, m] = a
                        xs[t + 1, m] = a * xs[t, m] + dux * B[i, k, t, m]
                gr = np.zeros(n, np.float32)
                dAj = np.zeros(n, np.float32)
                for t in range(l - 1, -1, -1):
                    dyt = dy[i, j, t]
                    dtt = dt[i, j, t]
                    ut = u[i, j, t]
                    s1 = np.float32(0)
                    s2 = np.float32(0)
                    for m in range(n):
                        gm = gr[m] + C[i, k, t, m] * dyt
                        dC[i, k, t, m] += dyt * xs[t + 1, m]
                        dB[i, k, t, m] += gm * dtt * ut
                        s1 += gm * B[i, k, t, m]
                        ga = gm * decay[t, m]
                        s2 += ga * xs[t, m] * A[j, m]
                        dAj[m] += ga * xs[t, m] * dtt
                        gr[m] = ga
                    du[i, j, t] = s1 * dtt
                    ddt[i, j, t] = s1 * ut + s2
                for m in range(n):
                    dA[i, j, m] = dAj[m]

    return forward, backward


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> Any:
        u, dt, A = (t.contiguous() for t in (u, dt, A))
        B, C = (t.transpose(-1, -2).contiguous() for t in (B, C))
        ctx.save_for_backward(u, dt, A, B, C)
        y = torch.empty_like(u)
        _kernels(A.shape[1])[0](*(t.detach().numpy() for t in (u, dt, A, B, C, y)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        u, dt, A, B, C = ctx.saved_tensors
        du, ddt, dB, dC = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(B), torch.zeros_like(C)
        dA = A.new_empty(u.shape[0], *A.shape)
        tensors = (u, dt, A, B, C, grads[0].contiguous(), du, ddt, dA, dB, dC)
        _kernels(A.shape[1])[1](*(t.detach().numpy() for t in tensors))
        return du, ddt, dA.sum(0), dB.transpose(-1, -2), dC.transpose(-1, -2)


def scan(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """u, dt (b, d, l); A (d, n); B, C (b, g, n, l), float32 -> y (b, d, l)."""
    y: torch.Tensor = _Scan.apply(u, dt, A, B, C)
    return y
