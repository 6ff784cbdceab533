"""The one operation that backends implement, and the PyTorch operator around those that have kernels.

Both public functions are views of it. With k directions over images of height x width = l pixels, b images, g groups
of r channels and n states:

    u, y     (b, g, l, r)       pixels row by row; y sums over directions
    delta    (k, b, g, l, r)
    A        (k, g, r, n)
    B, C     (k, b, g, l, n)
    D, bias  (k, g, r) or None  added: D u to y, bias to delta, before softplus
    state    (k, b, g, r, n)    initial state, or None for zeros; the last state has the same shape
    mix      (k, g, r, q)       or None; with it delta is (k, b, g, l, q), and mix @ delta is what else were delta

Strides are arbitrary. Directions: 1 (rows), 2 (rows, rows from the end) or 4 (rows, columns, both from the end; see
`reference.orders`). A sequence is an image of one row. All tensors have one dtype, float32 or float64; a backend with
`HALF = True` also gets u, delta, B and C in float16 or bfloat16 with the rest in float32, and returns y like u. Only a
backend with `LOW_RANK = True` gets mix, as a keyword; for the others mix @ delta is computed first.

A backend is a module with

    unusable(tensor=None) -> str | None     why it cannot run on tensors of this one's device and dtype (None: on any
                                            here), then a semicolon and the cure; None if it can
    refuses(n, zoh, state) -> str | None    optional: the same about the number of states, the discretization, and
                                            whether there is an initial state

and either `scan(u, delta, A, B, C, D, bias, state, height, width, softplus, zoh) -> (y, last)`, which autograd can
differentiate, or kernels, which this module makes an operator of:

    CHUNK                                   steps between kept states
    forward(u, ..., zoh, keep) -> (y, last, kept)
                                            y like `torch.empty_like(u)`; kept (k, b, g, ceil(l / CHUNK), n, r): the
                                            state before every chunk in walking order, no chunks if not `keep`
    backward(u, delta, A, B, C, D, bias, kept, dy, dlast, height, width, softplus, zoh)
                                            the gradients of u, delta, A, B, C, D, bias, state, and mix if given, each
                                            like `torch.empty_like` of its tensor; empty where there is no D or bias
"""

from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

from deformmamba.scan import cpu, eager, mamba_ssm, reference, triton

# in the order in which `auto` tries them; what a module stands for (numba, ...) is imported when it is called
MODULES: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "mamba_ssm": mamba_ssm,
    "eager": eager,
    "reference": reference,
}


# `Optional`, because the schema is read from the annotations and older PyTorch does not know `Tensor | None`
@torch.library.custom_op("deformmamba::scan", mutates_args=())
def scan(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    state: Optional[Tensor],  # noqa: UP045
    height: int,
    width: int,
    softplus: bool,
    zoh: bool,
    keep: bool,
    mix: Optional[Tensor] = None,  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last, kept) by the kernels of `backend`."""
    given = {} if mix is None else {"mix": mix}
    run = MODULES[backend].forward
    y, last, kept = run(u, delta, A, B, C, D, bias, state, height, width, softplus, zoh, keep, **given)
    return y, last, kept


@scan.register_fake
def _(
    backend: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, bias: Any, state: Any,
    height: int, width: int, softplus: bool, zoh: bool, keep: bool, mix: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, g, length, r = u.shape
    k, n = A.shape[0], A.shape[-1]
    chunk = MODULES[backend].CHUNK
    chunks = (length + chunk - 1) // chunk if keep else 0
    return torch.empty_like(u), A.new_empty(k, b, g, r, n), A.new_empty(k, b, g, chunks, n, r)


@torch.library.custom_op("deformmamba::scan_backward", mutates_args=())
def scan_backward(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor,
    height: int,
    width: int,
    softplus: bool,
    zoh: bool,
    mix: Optional[Tensor] = None,  # noqa: UP045
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, D, bias, state, and of mix where there is one."""
    given = {} if mix is None else {"mix": mix}
    run = MODULES[backend].backward
    return list(run(u, delta, A, B, C, D, bias, kept, dy, dlast, height, width, softplus, zoh, **given))


@scan_backward.register_fake
def _(
    backend: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, bias: Any, kept: Tensor,
    dy: Tensor, dlast: Tensor, height: int, width: int, softplus: bool, zoh: bool, mix: Any = None,
) -> list[Tensor]:  # fmt: skip
    D, bias = (A.new_empty(*A.shape[:2], 0) if x is None else x for x in (D, bias))
    return [torch.empty_like(x) for x in (u, delta, A, B, C, D, bias, dlast, mix) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    backend, u, delta, A, B, C, D, bias, state, *ctx.rest, keep, mix = inputs
    _, last, kept = output
    ctx.backend, ctx.keep, ctx.has_state = backend, keep, state is not None
    ctx.save_for_backward(u, delta, A, B, C, D, bias, mix, kept)
    ctx.last_shape = last.shape
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    u, delta, A, B, C, D, bias, mix, kept = ctx.saved_tensors
    if not ctx.keep:
        raise RuntimeError("deformmamba::scan was called with keep=False and cannot be differentiated; pass keep=True")
    dy = torch.zeros_like(u) if dy is None else dy
    dlast = A.new_zeros(ctx.last_shape) if dlast is None else dlast
    grads = scan_backward(ctx.backend, u, delta, A, B, C, D, bias, kept, dy, dlast, *ctx.rest, mix)
    du, ddelta, dA, dB, dC, dD, dbias, dstate, *dmix = grads
    given = (None if D is None else dD, None if bias is None else dbias, dstate if ctx.has_state else None)
    return (None, du, ddelta, dA, dB, dC, *given, None, None, None, None, None, dmix[0] if dmix else None)


torch.library.register_autograd("deformmamba::scan", _differentiate, setup_context=_save)
