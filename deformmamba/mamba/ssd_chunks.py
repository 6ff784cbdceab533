"""Mamba-2's scan as matrix products, chunk by chunk: an operator for one, and plain PyTorch for everything else.

With one rate per head, the decay from step j to step i of a chunk is exp(s[i] - s[j]), s being the sum of dt A from the
start of the chunk. It falls into a factor of i and a factor of j, so that all heads of a group share one product

    y = exp(s - m) (tril(C B') (exp(m - s) dt x)) + exp(s) (C h)        h' = exp(last) h + exp(last - m) B' (...)

where m, the middle of the range of s, keeps both factors within float32. A sequence is computed in spans of 128
steps. `ssd_factored` computes the spans and heads whose range of s allows factors. The other heads are computed step
by step (`ssd_steps`, in float32 on a CPU), or here, as their gradients are: in shorter chunks with factors, if the
range allows them, else with each decay of each head, in chunks of 64. (In float64: factors down to chunks of 16.)
`scan_eager` computes each decay separately too, in PyTorch that any of its transforms can differentiate. Sums of dt A
are float64, because their differences matter.

x (b, l, h, p), dt (b, l, h), A (h), B, C (b, l, g, n), state (b, h, p, n), run (b, l) integers that grow by one where a
new sequence starts in a pack (its first step does not see what came before), or None. All in float32 or float64.
"""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from deformmamba.errors import UnsupportedCall
from deformmamba.mamba import ssd_factored, ssd_steps
from deformmamba.tensors import without_autocast

SPAN = 128  # steps between kept states; a backward pass recomputes the states within a span
_CHUNKS = (128, 64, 32, 16)  # with decays as factors; shorter ones for short sequences
# the longest with each decay computed separately: differences of s lose digits, which float64 would show
_PAIRED_CHUNKS = {torch.float32: 64, torch.float64: 16}
_CHUNK_EAGER = 32


# `Optional`, because the schema is read from the annotations and older PyTorch does not support `Tensor | None`
@torch.library.custom_op("deformmamba::ssd", mutates_args=())
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Optional[Tensor],  # noqa: UP045
    run: Optional[Tensor],  # noqa: UP045
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, the states before every span (b, g, spans, n, h / g * p); no spans if not `keep`)."""
    (b, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    y, last = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(b, heads, p, n)
    spans = -(-length // SPAN)
    kept = x.new_empty(b, groups, spans if keep else 0, n, heads // groups * p)
    for image, group, part in _parts(b, heads, groups):
        x_, dt_, A_, y_ = x[image, :, part], dt[image, :, part], A[part], y[image, :, part]
        B_, C_, run_ = B[image, :, group], C[image, :, group], None if run is None else run[image]
        h = _flat_state(x, state, image, part, n)
        h_, kept_ = h.view(n, heads // groups, p), kept[image, group].view(kept.shape[2], n, heads // groups, p)
        for some in ssd_factored.head_sets(dt_, A_, run_, SPAN, gradients=False):
            y_some, kept_some, h_some = some.empty(y_), some.empty(kept_, 2), some.of(h_).reshape(n, -1)
            given = (some.of(x_), some.of(dt_), some.of(A_, 0), B_, C_, run_, h_some)
            if not some.fits and ssd_steps.usable(x):
                ssd_steps.forward(*given, y_some, kept_some.flatten(2), SPAN)
            else:
                _forward_spans(*given, some.factors, y_some, kept_some.flatten(2))
            some.put(y_, y_some)
            some.put(kept_, kept_some, 2)
            some.put(h_, h_some.view(n, -1, p))
        last[image, part] = h_.permute(1, 2, 0)
    return y, last, kept


@scan.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Any, run: Any, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (b, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    spans = (length + SPAN - 1) // SPAN if keep else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(b, heads, p, n), x.new_empty(b, groups, spans, n, heads // groups * p)


@torch.library.custom_op("deformmamba::ssd_backward", mutates_args=())
def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    run: Optional[Tensor],  # noqa: UP045
    y: Tensor,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C and state."""
    (b, _length, heads, p), (groups, n) = x.shape, B.shape[2:]
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dA, dstate = torch.zeros_like(A), torch.empty_like(dlast, memory_format=torch.contiguous_format)
    for image, group, part in _parts(b, heads, groups):
        x_, dt_, A_, y_, dy_ = x[image, :, part], dt[image, :, part], A[part], y[image, :, part], dy[image, :, part]
        B_, C_, run_ = B[image, :, group], C[image, :, group], None if run is None else run[image]
        dx_, ddt_, dA_ = dx[image, :, part], ddt[image, :, part], dA[part]
        dB_, dC_, dh = dB[image, :, group].zero_(), dC[image, :, group].zero_(), _flat_state(x, dlast, image, part, n)
        dh_, kept_ = dh.view(n, heads // groups, p), kept[image, group].view(kept.shape[2], n, heads // groups, p)
        for some in ssd_factored.head_sets(dt_, A_, run_, SPAN, gradients=True):
            dx_some, ddt_some, dA_some = some.empty(dx_), some.empty(ddt_), some.of(dA_, 0)
            dh_some = some.of(dh_).reshape(n, -1)
            _backward_spans(
                some.of(x_), some.of(dt_), some.of(A_, 0), B_, C_, run_, some.of(kept_, 2).flatten(2), some.factors,
                some.of(y_), some.of(dy_), dh_some, dx_some, ddt_some, dA_some, dB_, dC_,
            )  # fmt: skip
            some.put(dx_, dx_some)
            some.put(ddt_, ddt_some)
            some.put(dA_, dA_some, 0)
            some.put(dh_, dh_some.view(n, -1, p))
        dstate[image, part] = dh_.permute(1, 2, 0)
    return dx, ddt, dA, dB, dC, dstate


@scan_backward.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Any, y: Tensor, kept: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dstate = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C, dlast)
    )
    return dx, ddt, dA, dB, dC, dstate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, state, run, keep = inputs
    y, last, kept = output
    ctx.save_for_backward(x, dt, A, B, C, run, y, kept)
    ctx.keep, ctx.has_state, ctx.last_shape = keep, state is not None, last.shape
    ctx.set_materialize_grads(False)


def _first_state(kept: Tensor, x: Tensor) -> Tensor:
    """The state before the first step, (b, h, p, n), from the kept ones."""
    b, _, spans, n = kept.shape[:4]
    if not spans:
        return x.new_zeros(b, x.shape[2], x.shape[3], n)
    return kept[:, :, 0].unflatten(-1, (-1, x.shape[3])).permute(0, 1, 3, 4, 2).flatten(1, 2)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    x, dt, A, B, C, run, y, kept = ctx.saved_tensors
    if not ctx.keep:
        raise UnsupportedCall("deformmamba::ssd with keep=False cannot be differentiated; pass keep=True")
    dy = torch.zeros_like(y) if dy is None else dy
    dlast = x.new_zeros(ctx.last_shape) if dlast is None else dlast
    with without_autocast(x.device.type):  # the backward pass may run inside it
        dx, ddt, dA, dB, dC, dstate = scan_backward(x, dt, A, B, C, run, y, kept, dy, dlast)
    if dkept is not None:  # from a second derivative
        dstate = dstate + _first_state(dkept, x)
    return dx, ddt, dA, dB, dC, dstate if ctx.has_state else None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, run, _, kept, dy, dlast = inputs
    ctx.save_for_backward(x, dt, A, B, C, run, kept, dy, dlast)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """The gradients of the backward pass, as those of `scan_eager`: y and the kept states follow from the inputs."""
    x, dt, A, B, C, run, kept, dy, dlast = ctx.saved_tensors
    again = torch.is_grad_enabled()  # for a third derivative
    with torch.enable_grad(), without_autocast(x.device.type):
        inputs = (x, dt, A, B, C, _first_state(kept, x), dy, dlast)
        # views, because dy may itself be a function of x
        given = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        x_, dt_, A_, B_, C_, state, *_ = given
        outputs = scan_eager(x_, dt_, A_, B_, C_, state, run)
        once = torch.autograd.grad(outputs, given[:6], given[6:], create_graph=True, materialize_grads=True)
        twice = torch.autograd.grad(once, given, grads, create_graph=again, materialize_grads=True)
    dx, ddt, dA, dB, dC, dstate, ddy, ddlast = twice
    b, groups, spans, n = kept.shape[:4]
    first = dstate.reshape(b, groups, -1, x.shape[3], n).permute(0, 1, 4, 2, 3).flatten(3)[:, :, None]
    dkept = F.pad(first, (0, 0, 0, 0, 0, spans - 1)) if spans else kept
    return dx, ddt, dA, dB, dC, None, None, dkept, ddy, ddlast


torch.library.register_autograd("deformmamba::ssd", _differentiate, setup_context=_save)
torch.library.register_autograd("deformmamba::ssd_backward", _differentiate_twice, setup_context=_save_backward)


def scan_eager(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, run: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, last state) in plain differentiable PyTorch, each decay exponentiated for itself."""
    (b, length, heads, p), (groups, n) = x.shape, B.shape[2:]
    h = x.new_zeros(b, heads, p, n) if state is None else state
    outputs, before = [], None if run is None else run[:, :1]
    for start in range(0, length, _CHUNK_EAGER):
        at = slice(start, min(start + _CHUNK_EAGER, length))
        s = (dt[:, at] * A).double().cumsum(1)  # (b, q, h)
        # (b, i, j, h) and so on: the decays from j to i, from the state to i, from j to the next state, of the state
        between, out, into, carry = s[:, :, None] - s[:, None], s, s[:, -1:] - s, s[:, -1]
        causal = torch.ones(s.shape[1], s.shape[1], dtype=torch.bool, device=x.device).tril()[None]
        if run is not None:
            assert before is not None
            now = run[:, at]
            causal = causal & (now[:, :, None] == now[:, None])
            out = out.masked_fill((now != before)[..., None], -torch.inf)
            into = into.masked_fill((now != now[:, -1:])[..., None], -torch.inf)
            carry = carry.masked_fill(now[:, -1:] != before, -torch.inf)
            before = now[:, -1:]
        between = between.masked_fill(~causal[..., None], -torch.inf)
        decay, out, into, carry = (torch.exp(t).to(x.dtype) for t in (between, out, into, carry))
        B_, C_ = (t[:, at].repeat_interleave(heads // groups, 2) for t in (B, C))
        u = x[:, at] * dt[:, at, :, None]
        scores = torch.einsum("bihn,bjhn->bijh", C_, B_) * decay
        y = torch.einsum("bijh,bjhp->bihp", scores, u)
        outputs.append(y + out[..., None] * torch.einsum("bihn,bhpn->bihp", C_, h))
        h = carry[..., None, None] * h + torch.einsum("bjhn,bjhp->bhpn", B_ * into[..., None], u)
    return torch.cat(outputs, 1) if outputs else x, h


# ------------------------------------------------------------------------- one span of one sequence and group of heads
#
# x (s, r, p), dt (s, r), A (r), B, C (s, n), run (1 + s) or None, from the step before the span on; the state h is a
# matrix (n, r p).


def _parts(b: int, heads: int, groups: int) -> list[tuple[int, int, slice]]:
    size = heads // groups
    return [(i, g, slice(g * size, (g + 1) * size)) for i in range(b) for g in range(groups)]


def _flat_state(x: Tensor, state: Tensor | None, image: int, part: slice, n: int) -> Tensor:
    heads = x[image, :0, part].shape[1:]
    return (
        x.new_zeros(n, heads.numel()) if state is None else state[image, part].permute(2, 0, 1).reshape(n, -1).clone()
    )


def _forward_spans(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, h: Tensor, f: ssd_factored.Factors,
    y: Tensor, kept: Tensor,
) -> None:  # fmt: skip
    """Writes y, the states before the spans into `kept` if there are any, and the last state into h."""
    work = ssd_factored.Workspace(x, SPAN, len(h))
    for i, at in enumerate(_spans(x)):
        if len(kept):
            kept[i] = h
        if f.fits[i]:
            ssd_factored.forward(x[at], dt[at], B[at], C[at], h, f, i, work, y[at])
        else:
            y[at], h[:] = _forward(x[at], dt[at], A, B[at], C[at], _with_step_before(run, at), h)


def _backward_spans(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, kept: Tensor, f: ssd_factored.Factors,
    y: Tensor, dy: Tensor, dh: Tensor, dx: Tensor, ddt: Tensor, dA: Tensor, dB: Tensor, dC: Tensor,
) -> None:  # fmt: skip
    """Writes dx and ddt, adds to dA, dB and dC, and replaces dh by the gradient of the first state."""
    work, next_h = ssd_factored.BackwardWorkspace(x, SPAN, len(dh)), None
    for i, at in reversed(list(enumerate(_spans(x)))):
        given, h = (x[at], dt[at], A, B[at], C[at]), kept[i]
        if f.fits[i]:
            ddt[at], dA_, dB_, dC_ = ssd_factored.backward(*given, h, next_h, f, i, work, y[at], dy[at], dh, dx[at])
        else:
            before = _with_step_before(run, at)
            dx[at], ddt[at], dA_, dB_, dC_, dh[:] = _backward(*given, before, h, y[at], dy[at], dh)
        dA += dA_
        dB[at] += dB_
        dC[at] += dC_
        next_h = h


def _spans(x: Tensor) -> list[slice]:
    return [slice(start, start + SPAN) for start in range(0, len(x), SPAN)]


def _with_step_before(run: Tensor | None, at: slice) -> Tensor | None:
    """The numbers of a span's sequences, after that of the step before it, whose state the span gets."""
    return None if run is None else torch.cat([run[max(at.start - 1, 0) :][:1], run[at]])


class _Chunks(NamedTuple):
    """The data of both passes: c chunks of q steps, their decays and the states between them.

    Either the decays are products of factors (`decay` is None), and m is the middle of the range of s; or `decay` has
    each decay, and m is s of the last step."""

    dt: Tensor  # (c, q, r)
    x: Tensor  # (c, q, r, p)
    B: Tensor  # (c, q, n)
    C: Tensor  # (c, q, n)
    reaches: Tensor | None  # (c, q, 1): 1 where a step belongs to the sequence at the end of the chunk
    same: Tensor | None  # (c, q, q): 1 where two steps belong to one sequence
    scores: Tensor  # (c, q, q): tril(C B')
    decay: Tensor | None  # (c, r, q, q): exp(s[i] - s[j]), or 0
    near_out: Tensor  # (c, q, r): exp(s - m)
    near_in: Tensor  # (c, q, r): exp(m - s)
    far_out: Tensor  # (c, q, r): exp(s), from the state before the chunk to a step
    far_in: Tensor  # (c, 1, r, 1): exp(last - m)
    carry: Tensor  # (c, 1, r, 1): exp(last)
    u: Tensor  # (c, q, r p): exp(m - s) dt x
    states: Tensor  # (c + 1, n, r p): before each chunk, and after the last


def _chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, h: Tensor, gradients: bool
) -> _Chunks:
    """The chunks of a span, of the largest size for which the factors of the decays are within range, if there is
    one (`gradients`: and give exact gradients)."""
    (r, p), n = x.shape[1:], B.shape[1]
    sizes = [q for q in _CHUNKS if q < 2 * len(x)] or [_CHUNKS[-1]]
    limit = ssd_factored.GRADIENT_RANGE if gradients else ssd_factored.RANGE
    for q in sizes:
        rates = F.pad(dt * A, (0, 0, 0, -len(dt) % q)).double().view(-1, q, r)
        s = rates.cumsum(1)  # from the start of each chunk
        low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
        factors = bool((high - low <= limit).all())  # not if a value is NaN
        if gradients:
            factors = factors and bool(ssd_factored.gradients_are_exact(rates, x.dtype).all())
        if factors:
            break
        if q <= _PAIRED_CHUNKS[x.dtype]:
            break
    missing, last = -len(x) % q, s[:, -1:]
    c, m = len(s), (low + high) / 2 if factors else last
    dt, x, B, C = (F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)) for t in (dt, x, B, C))
    dt, x, B, C = dt.view(c, q, r), x.view(c, q, r, p), B.view(c, q, n), C.view(c, q, n)
    near_out, near_in, far_out, far_in, carry = (torch.exp(t).to(x.dtype) for t in (s - m, m - s, s, last - m, last))
    scores = torch.bmm(C, B.mT).tril_()
    reaches = same = decay = None
    if run is not None:
        now = torch.cat([run[1:], run[-1:].expand(missing)]).view(c, q)
        before = torch.cat([run[:1], now[:-1, -1]])[:, None]
        reaches = (now == now[:, -1:])[..., None].to(x.dtype)
        same = (now[:, :, None] == now[:, None]).to(x.dtype)
        scores.mul_(same)
        far_out = far_out.masked_fill((now != before)[..., None], 0)
        carry = carry.masked_fill((now[:, -1:] != before)[..., None], 0)
    if not factors:
        by_head = s.transpose(1, 2)
        later = torch.ones(q, q, dtype=torch.bool).triu(1)
        decay = x.new_empty(c, r, q, q)
        # the difference in float64, the exponential in the dtype of x
        torch.sub(by_head[..., None], by_head[:, :, None], out=decay).masked_fill_(later, -torch.inf).exp_()
    far_in, carry = far_in[..., None], carry[..., None]
    u = (x * (dt * near_in)[..., None]).reshape(c, q, r * p)
    states = x.new_empty(c + 1, n, r * p)
    states[0] = h
    torch.bmm((B if reaches is None else B * reaches).mT, u, out=states[1:])
    by_head = states.view(c + 1, n, r, p)
    by_head[1:].mul_(far_in)
    for i in range(c):
        by_head[i + 1].addcmul_(by_head[i], carry[i])
    return _Chunks(dt, x, B, C, reaches, same, scores, decay, near_out, near_in, far_out, far_in, carry, u, states)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """(y, next state)."""
    k = _chunks(x, dt, A, B, C, run, h, gradients=False)
    if k.decay is None:
        y = torch.bmm(k.scores, k.u).view(k.x.shape).mul_(k.near_out[..., None])
    else:
        y = torch.einsum("cij,crij,cjrp->cirp", k.scores, k.decay, k.x * k.dt[..., None])
    y.addcmul_(torch.bmm(k.C, k.states[:-1]).view(k.x.shape), k.far_out[..., None])
    return y.flatten(0, 1)[: len(x)], k.states[-1]


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, run: Tensor | None, h: Tensor, y: Tensor, dy: Tensor,
    dh: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, dt, A, B, C and h."""
    k = _chunks(x, dt, A, B, C, run, h, gradients=True)
    c, q, r, p = k.x.shape
    missing = c * q - len(x)
    dy_y = F.pad((dy * y).sum(-1), (0, 0, 0, missing)).view(c, q, r)
    dy = F.pad(dy, (0, 0, 0, 0, 0, missing)).view(c, q, r, p)
    far = (dy * k.far_out[..., None]).reshape(c, q, r * p)
    dstates = x.new_empty(k.states.shape)
    dstates[-1] = dh
    torch.bmm(k.C.mT, far, out=dstates[:-1])
    by_head = dstates.view(c + 1, -1, r, p)
    for i in reversed(range(c)):
        by_head[i].addcmul_(by_head[i + 1], k.carry[i])
    into = (by_head[1:] * k.far_in).reshape(c, -1, r * p)
    B_into = k.B if k.reaches is None else k.B * k.reaches
    dB_into = torch.bmm(k.u, into.mT)
    if k.decay is None:
        near = (dy * k.near_out[..., None]).reshape(c, q, r * p)
        dscores = torch.bmm(near, k.u.mT).tril_()
        du = torch.bmm(k.scores.mT, near).baddbmm_(B_into, into).view(c, q, r, p)
        direct = (du * k.x).sum(-1) * k.near_in  # the gradient of dt through dt x
        dx = du.mul_((k.dt * k.near_in)[..., None])
        # y[i] grows with exp(s[i]), and what enters at j falls with it, up to the last state
        ds = (dy_y - k.dt * direct).double()
        ds[:, -1] += (by_head[1:] * k.states[1:].view(by_head[1:].shape)).sum((1, 3)).double()
    else:
        # the same pair by pair: here the sums above would cancel to less than their rounding
        u = k.x * k.dt[..., None]
        pairs = torch.einsum("cirp,cjrp->crij", dy, u)
        dscores = (pairs * k.decay).sum(1)
        through = torch.bmm(B_into, into).view(c, q, r, p) * k.near_in[..., None]
        du = torch.einsum("cij,crij,cirp->cjrp", k.scores, k.decay, dy) + through
        direct = (du * k.x).sum(-1)
        dx = du * k.dt[..., None]
        pairs = pairs.mul_(k.decay).mul_(k.scores[:, None]).tril_(-1).double()
        ds = (pairs.sum(3) - pairs.sum(2)).transpose(1, 2)
        ds += (far * torch.bmm(k.C, k.states[:-1])).view(c, q, r, p).sum(-1).double()
        reaching = (through * u).sum(-1).double()[:, :-1]
        ds[:, :-1] -= reaching
        kept = (by_head[1:] * k.states[:-1].view(by_head[1:].shape)).sum((1, 3)) * k.carry[:, 0, :, 0]
        ds[:, -1] += reaching.sum(1) + kept.double()
    dscores = dscores if k.same is None else dscores.mul_(k.same)
    dC = torch.bmm(dscores, k.B).baddbmm_(far, k.states[:-1].mT)
    dB = torch.bmm(dscores.mT, k.C).add_(dB_into if k.reaches is None else dB_into * k.reaches)
    da = ds.flip(1).cumsum(1).flip(1).to(x.dtype)  # of dt A, which enters s from its step on
    ddt = A * da + direct
    dA = (k.dt * da).sum((0, 1))
    dx, ddt, dB, dC = (t.flatten(0, 1)[: len(x)] for t in (dx, ddt, dB, dC))
    return dx, ddt, dA, dB, dC, dstates[0]
