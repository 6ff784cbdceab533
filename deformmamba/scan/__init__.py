"""The selective scan: h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t], y[t] = C[t] . h[t]."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

from deformmamba.scan import cpu, reference

BACKENDS: tuple[str, ...] = ("cpu", "reference")
_MODULES = {"cpu": cpu, "reference": reference}
_chosen: ContextVar[str | None] = ContextVar("scan_backend", default=None)


class ScanBackendError(RuntimeError):
    """A backend asked for by name cannot run this call."""


@contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Every scan inside the block uses the backend `name`, or raises ScanBackendError."""
    if name not in BACKENDS:
        raise ScanBackendError(f"unknown scan backend {name!r}; known: {', '.join(BACKENDS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    discretization: str = "euler",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan along the last axis: u, delta, z (b, d, l); A (d, n); B, C (b, g, n, l) or (b, n, l); D (d,)."""
    dtype = u.dtype
    if dtype != torch.float64:
        u, delta, A, B, C = (t.float() for t in (u, delta, A, B, C))
    if B.ndim == 3:
        B = B[:, None]
    if C.ndim == 3:
        C = C[:, None]
    dt = delta if delta_bias is None else delta + delta_bias[:, None].to(delta.dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    name = backend or _chosen.get()
    plain = return_last_state or initial_state is not None or discretization != "euler" or u.dtype != torch.float32
    if name == "reference" or (name is None and plain):
        y, last = reference.scan(u, dt, A, B, C, initial_state, discretization)
    else:
        y, last = cpu.scan(u, dt, A, B, C), None
    if D is not None:
        y = y + u * D[:, None].to(u.dtype)
    y = y.to(dtype)
    if z is not None:
        y = y * F.silu(z)
    return (y, last) if return_last_state and last is not None else y


def selective_scan_2d(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    *,
    delta_softplus: bool = True,
    discretization: str = "euler",
    backend: str | None = None,
) -> torch.Tensor:
    """SS2D: u (b, h, w, d); delta (k, b, h, w, d); A (k*d, n); B, C (b, h, w, k, n); D, delta_bias (k*d,); y like u."""
    b, h, w, d = u.shape
    k, n = delta.shape[0], A.shape[1]

    def walk(x: torch.Tensor, direction: int) -> torch.Tensor:  # (b, h, w, c) -> (b, c, l)
        x = x.transpose(1, 2) if direction % 2 else x
        x = x.reshape(b, h * w, -1)
        return (x.flip(1) if direction > 1 else x).transpose(1, 2)

    total = torch.zeros_like(u)
    for i, direction in enumerate({1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}[k]):
        part = slice(i * d, (i + 1) * d)
        y = selective_scan(
            walk(u, direction),
            walk(delta[i], direction),
            A[part],
            walk(B[:, :, :, i], direction).reshape(b, 1, n, h * w),
            walk(C[:, :, :, i], direction).reshape(b, 1, n, h * w),
            None if D is None else D[part],
            None,
            None if delta_bias is None else delta_bias[part],
            delta_softplus,
            discretization=discretization,
            backend=backend,
        )
        assert isinstance(y, torch.Tensor)
        y = y.transpose(1, 2)
        y = y.flip(1) if direction > 1 else y
        total = total + (y.reshape(b, w, h, d).transpose(1, 2) if direction % 2 else y.reshape(b, h, w, d))
    return total


def backend_report() -> list[tuple[str, bool, str, str]]:
    """One row for every backend: (name, usable, why, cure)."""
    return [(name, True, "runs here", "") for name in BACKENDS]
