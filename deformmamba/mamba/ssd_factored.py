"""Mamba-2's scan where the decays fall into factors: the usual case, with the fewest operations.

With s, the sum of dt A since the start of a chunk, and m, the middle of its range,

    y = exp(s - m) ([tril(C B') | C] [u; g])        u = exp(m - s) dt x,   g = exp(m) h
    next h = exp(last - m) (g + B' u)

so that each pass over the data is one product of matrices or one multiplication by a factor. A span of a sequence is
one chunk. The range of s differs between heads: `head_sets` separates the heads for which it is too large.

For one sequence and r heads of a group: x, y (l, r, p), dt (l, r), A (r), B, C (l, n); a state h is (n, r p).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 120.0  # largest range of s in a chunk; products with exp(60) are far from the limits of float32
GRADIENT_RANGE = 80.0  # the same for gradients
# Largest loss of digits in the gradient of A, see `gradients_are_exact`: about 1e-4 of it in float32.
_LOSS = {torch.float32: 1e3, torch.float64: 1e5}


class Factors(NamedTuple):
    """The decays of all spans of a sequence; steps of size zero fill up the last one."""

    fits: list[bool]  # whether the range of a span allows factors, and all of it continues the sequence before it
    out: Tensor  # (spans, span, r): exp(s - m)
    into: Tensor  # (spans, span, r): exp(m - s)
    before: Tensor  # (spans, r, 1): exp(m)
    after: Tensor  # (spans, r, 1): exp(last - m)


class HeadSet(NamedTuple):
    heads: Tensor | None  # (r,) the places of the heads in their group; None: all
    fits: bool  # whether factors are within range in all spans
    factors: Factors

    def of(self, x: Tensor, dim: int = 1) -> Tensor:
        """The part of x for these heads, a view if they are all heads."""
        return x if self.heads is None else x.index_select(dim, self.heads)

    def empty(self, x: Tensor, dim: int = 1) -> Tensor:
        """Where to write the part of x for these heads, for `put`."""
        if self.heads is None:
            return x
        return x.new_empty(*x.shape[:dim], len(self.heads), *x.shape[dim + 1 :])

    def put(self, x: Tensor, part: Tensor, dim: int = 1) -> None:
        """Copies what was written into `empty` to its place in x."""
        if self.heads is not None:
            x.index_copy_(dim, self.heads, part)


class Workspace:
    """Memory that all chunks use one after the other, so that it stays in the cache."""

    def __init__(self, x: Tensor, chunk: int, n: int) -> None:
        size, width = min(chunk, len(x)), x[0].numel()
        self.values = x.new_empty(size + n, width)  # [u; g]
        self.weights = x.new_empty(size, size + n)  # [tril(C B') | C], in the backward pass [tril(C B')' | B]
        self.product = x.new_empty(size, width)
        self.state = x.new_empty(n, width)


class BackwardWorkspace(Workspace):
    def __init__(self, x: Tensor, chunk: int, n: int) -> None:
        super().__init__(x, chunk, n)
        self.gradients = torch.empty_like(self.values)  # [exp(s - m) dy; exp(last - m) dh]
        self.pairs = torch.empty_like(self.weights)


def head_sets(dt: Tensor, A: Tensor, run: Tensor | None, span: int, gradients: bool) -> list[HeadSet]:
    """The heads of dt (l, r) and A (r,) whose factors are within range, and the others; no heads without steps.

    `run` (l,) is as in `ssd_chunks`; `gradients`: the factors are for the backward pass."""
    if not dt.numel():
        return []
    missing = -len(dt) % span
    rates = F.pad(dt * A, (0, 0, 0, missing)).double().view(-1, span, len(A))
    s = rates.cumsum(1)
    continues = torch.ones(len(s), dtype=torch.bool, device=s.device)
    if run is not None:
        continues = ~F.pad(run[1:] != run[:-1], (1, missing)).view(-1, span).any(1)
    fits = _fits(s, GRADIENT_RANGE if gradients else RANGE)
    if gradients:
        fits &= gradients_are_exact(rates, dt.dtype)
    of_head = fits.all(0)
    sets = []
    for fit in (True, False):
        heads = (of_head == fit).nonzero()[:, 0]
        if len(heads) == len(A):
            return [HeadSet(None, fit, _factors(s, fits.all(1) & continues, dt.dtype))]
        if len(heads):
            sets.append(HeadSet(heads, fit, _factors(s[..., heads], fits[:, heads].all(1) & continues, dt.dtype)))
    return sets


def gradients_are_exact(rates: Tensor, dtype: torch.dtype) -> Tensor:
    """(chunks, r) of dt A (chunks, chunk, r): whether decays as factors give the gradient of A to enough digits.

    They give it as a difference of sums over steps, in which the influence of a step on itself cancels. What remains
    passed at least one decay; where all decays are fast, for example in a few steps of 15, it is smaller than the
    rounding of the sums."""
    size = rates.abs()
    remains = (size * torch.exp(rates.clamp(max=0))).sum(1)
    return (rates != 0).sum(1) * size.sum(1) <= _LOSS[dtype] * remains


def _fits(s: Tensor, limit: float) -> Tensor:
    """(chunks, r) of s (chunks, chunk, r): not if a value is NaN, and not if exp(m) is infinite."""
    low, high = s.amin(1), s.amax(1)
    return (high - low <= limit) & (high <= RANGE / 2)


def _factors(s: Tensor, fits: Tensor, dtype: torch.dtype) -> Factors:
    """`fits` (spans,): whether all heads allow factors."""
    m, last = (s.amin(1) + s.amax(1)) / 2, s[:, -1]
    between = s - m[:, None]
    out, into, before, after = (torch.exp(t).to(dtype) for t in (between, -between, m, last - m))
    return Factors(fits.tolist(), out, into, before[..., None], after[..., None])


def forward(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor, f: Factors, k: int, work: Workspace, y: Tensor
) -> None:
    """Span k: writes y, and the state after the span into h (n, r p)."""
    (q, r, p), n = x.shape, len(h)
    values, weights, product = work.values[: q + n], work.weights[:q, : q + n], work.product[:q]
    _values(x, dt, h, f, k, values)
    torch.mm(C, B.mT, out=weights[:, :q]).tril_()
    weights[:, q:] = C
    torch.mm(weights, values, out=product)
    torch.mul(product.view(q, r, p), f.out[k, :q, :, None], out=y)
    _next_state(B, values, f, k, work, h)


def backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, next_h: Tensor | None, f: Factors, k: int,
    work: BackwardWorkspace, y: Tensor, dy: Tensor, dh: Tensor, dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Span k: writes dx, replaces dh (n, r p) by the gradient of h; returns the gradients of dt, A, B and C.

    `next_h` is the state after the span, computed here if None."""
    (q, r, p), n = x.shape, len(h)
    values, gradients = work.values[: q + n], work.gradients[: q + n]
    weights, pairs, product = work.weights[:q, : q + n], work.pairs[:q, : q + n], work.product[:q]
    by_head, dh_by_head, state_by_head = product.view(q, r, p), dh.view(n, r, p), work.state.view(n, r, p)
    _values(x, dt, h, f, k, values)
    if next_h is None:
        next_h = _next_state(B, values, f, k, work, torch.empty_like(h))
    # y[i] grows with exp(s[i]), and what enters at j falls with it, up to the last state
    ds = torch.mul(dy, y, out=by_head).sum(-1).double()
    ds[-1] += torch.mul(dh_by_head, next_h.view(n, r, p), out=state_by_head).sum((0, 2)).double()

    torch.mul(dy, f.out[k, :q, :, None], out=gradients[:q].view(q, r, p))
    torch.mul(dh_by_head, f.after[k], out=gradients[q:].view(n, r, p))
    torch.mm(gradients[:q], values.mT, out=pairs)
    dscores = pairs[:, :q].tril_()
    dC = torch.addmm(pairs[:, q:], dscores, B)
    dB = torch.mm(values[:q], gradients[q:].mT).addmm_(dscores.mT, C)

    torch.mm(B, C.mT, out=weights[:, :q]).triu_()
    weights[:, q:] = B
    du = torch.mm(weights, gradients, out=product).view(q, r, p)
    torch.mul(du, (dt * f.into[k, :q])[..., None], out=dx)
    direct = du.mul_(x).sum(-1).mul_(f.into[k, :q])  # the gradient of dt through dt x
    ds -= dt * direct
    da = ds.flip(0).cumsum(0).flip(0)  # of dt A, which enters s from its step on

    torch.addmm(gradients[q:], C.mT, gradients[:q], out=work.state)
    torch.mul(state_by_head, f.before[k], out=dh_by_head)
    return (A * da).to(x.dtype) + direct, (dt * da).sum(0).to(x.dtype), dB, dC


def _values(x: Tensor, dt: Tensor, h: Tensor, f: Factors, k: int, values: Tensor) -> None:
    (q, r, p), n = x.shape, len(h)
    torch.mul(x, (dt * f.into[k, :q])[..., None], out=values[:q].view(q, r, p))
    torch.mul(h.view(n, r, p), f.before[k], out=values[q:].view(n, r, p))


def _next_state(B: Tensor, values: Tensor, f: Factors, k: int, work: Workspace, into: Tensor) -> Tensor:
    q, n = B.shape
    torch.addmm(values[q:], B.mT, values[:q], out=work.state)
    torch.mul(work.state.view(n, *f.after.shape[1:2], -1), f.after[k], out=into.view(n, *f.after.shape[1:2], -1))
    return into
