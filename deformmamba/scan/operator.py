"""The table of backends, and the PyTorch operators `deformmamba::scan` and `scan_backward` around those with kernels.

A kernel gets pointers. So the operators check that all shapes, dtypes, devices, layouts and lengths agree before they
call a backend, also if a user calls `torch.ops.deformmamba` directly or loads an exported program. A mismatch raises
`InvalidArgument`. Names and shapes: see `backend`.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from deformmamba.errors import InvalidArgument, UnsupportedCall
from deformmamba.scan import cpu, eager, mamba_ssm, reference, triton
from deformmamba.scan.backend import Backend, KernelBackend, PlainBackend
from deformmamba.tensors import check_given, loop_over_batch, plain

# numba and other optional packages are imported when a backend runs
KERNELS: dict[str, KernelBackend] = {"cpu": cpu, "triton": triton}
PLAIN: dict[str, PlainBackend] = {"mamba_ssm": mamba_ssm, "eager": eager, "reference": reference}
MODULES: dict[str, Backend] = {**KERNELS, **PLAIN}  # in the order in which "auto" tries them
DIRECTIONS = (1, 2, 4)


# `Optional`, because the schema is read from the annotations and older PyTorch does not support `Tensor | None`
@torch.library.custom_op("deformmamba::scan", mutates_args=())
def scan(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    initial_state: Optional[Tensor],  # noqa: UP045
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    keep: bool,
    delta_weight: Optional[Tensor] = None,  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last, kept) by the kernels of `backend`."""
    tensors = [plain(x) for x in (u, delta, A, B, C, D, delta_bias, delta_weight)]
    initial_state = plain(initial_state)
    module: Any = _checked("scan", backend, tensors, height, width, {"initial_state": initial_state}, zoh)
    *given, weight = tensors
    return module.forward(*given, initial_state, height, width, delta_softplus, zoh, keep, delta_weight=weight)


@scan.register_fake
def _(
    backend: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, delta_bias: Any,
    initial_state: Any, height: int, width: int, delta_softplus: bool, zoh: bool, keep: bool, delta_weight: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = [u, delta, A, B, C, D, delta_bias, delta_weight]
    _checked_fake("scan", backend, tensors, height, width, {"initial_state": initial_state}, zoh)
    b, g, length, r = u.shape
    k, n = A.shape[0], A.shape[-1]
    chunk = KERNELS[backend].CHUNK
    chunks = (length + chunk - 1) // chunk if keep else 0
    return torch.empty_like(u), A.new_empty((k, b, g, r, n)), A.new_empty((k, b, g, chunks, n, r))


@torch.library.custom_op("deformmamba::scan_backward", mutates_args=())
def scan_backward(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    delta_weight: Optional[Tensor] = None,  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C, D, delta_bias, the initial state and delta_weight; empty for None."""
    tensors = [plain(x) for x in (u, delta, A, B, C, D, delta_bias, delta_weight)]
    more = {"kept": plain(kept), "dy": plain(dy), "dlast": plain(dlast)}
    module: Any = _checked("scan_backward", backend, tensors, height, width, more, zoh)
    *given, weight = tensors
    grads = module.backward(*given, *more.values(), height, width, delta_softplus, zoh, delta_weight=weight)
    du, ddelta, dA, dB, dC, dD, dbias, dstate, *rest = grads
    return du, ddelta, dA, dB, dC, dD, dbias, dstate, rest[0] if rest else _no_weight(tensors[2])


@scan_backward.register_fake
def _(
    backend: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, delta_bias: Any, kept: Tensor,
    dy: Tensor, dlast: Tensor, height: int, width: int, delta_softplus: bool, zoh: bool, delta_weight: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = [u, delta, A, B, C, D, delta_bias, delta_weight]
    _checked_fake("scan_backward", backend, tensors, height, width, {"kept": kept, "dy": dy, "dlast": dlast}, zoh)
    D, delta_bias = (A.new_empty((*A.shape[:2], 0)) if x is None else x for x in (D, delta_bias))
    delta_weight = _no_weight(A) if delta_weight is None else delta_weight
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, D, delta_bias, dlast, delta_weight))


def _no_weight(A: Any) -> Tensor:
    """The placeholder for the gradient of a delta_weight that is None."""
    empty: Tensor = A.new_empty((*A.shape[:3], 0))
    return empty


# ------------------------------------------------------------------------------------------------------------ checking


def _checked(
    operator: str,
    backend: str,
    tensors: list[Tensor | None],
    height: int,
    width: int,
    more: dict[str, Tensor | None],
    zoh: bool,
) -> KernelBackend:
    """The backend's module, if it can run on these tensors and all of them fit together.

    Raises:
        InvalidArgument: they do not; names the first tensor that does not fit.
        UnsupportedCall: the backend cannot run here.
    """
    _check(operator, backend, tensors, height, width, more)
    module = KERNELS[backend]
    u, A = tensors[0], tensors[2]
    assert u is not None
    assert A is not None
    reason = module.unusable(u)
    if reason is None:
        reason = module.ABILITIES.missing(A.shape[-1], zoh, more.get("initial_state") is not None)
    if reason is not None:
        raise UnsupportedCall(f"deformmamba::{operator}: backend {backend!r} cannot run this: {reason}")
    return module


def _check_given(operator: str, tensors: list[Any], more: dict[str, Any]) -> None:
    """Checks the arguments that every call needs."""
    u, delta, A, B, C, *_ = tensors
    needed = {name: tensor for name, tensor in more.items() if name != "initial_state"}
    check_given(operator, u=u, delta=delta, A=A, B=B, C=C, **needed)


def _checked_fake(
    operator: str,
    backend: str,
    tensors: list[Tensor | None],
    height: int,
    width: int,
    more: dict[str, Tensor | None],
    zoh: bool,
) -> None:
    """The same for tensors without memory. Symbolic sizes are not compared: that would fix them in a program."""
    _check_given(operator, tensors, more)
    sizes = (height, width, *(n for x in (*tensors, *more.values()) if x is not None for n in x.shape))
    if all(type(n) is int for n in sizes):
        _check(operator, backend, tensors, height, width, more)


def _check(
    operator: str, backend: str, tensors: list[Any], height: int, width: int, more: dict[str, Any]
) -> None:  # fmt: skip
    if backend not in KERNELS:
        raise InvalidArgument(
            f"deformmamba::{operator}: backend {backend!r} has no kernels; there are {', '.join(KERNELS)}"
        )
    u, delta, A, B, C, D, delta_bias, delta_weight = tensors
    _check_given(operator, tensors, more)
    abilities = KERNELS[backend].ABILITIES
    if u.ndim != 4 or u.dtype not in abilities.dtypes:
        raise InvalidArgument(
            f"deformmamba::{operator}: u is {u.dtype} {tuple(u.shape)}; wanted (b, g, l, r) in one of "
            f"{', '.join(map(str, abilities.dtypes))}"
        )
    b, g, length, r = u.shape
    if A.ndim != 4 or tuple(A.shape[1:3]) != (g, r) or A.shape[0] not in DIRECTIONS:
        raise InvalidArgument(
            f"deformmamba::{operator}: A has shape {tuple(A.shape)}; wanted (k, {g}, {r}, n) with k in {DIRECTIONS}"
        )
    if height < 0 or width < 0 or height * width != length:
        raise InvalidArgument(
            f"deformmamba::{operator}: height {height} and width {width} are {height * width} pixels; u has {length}"
        )
    k, n = A.shape[0], A.shape[3]
    half, full = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    q = r
    if delta_weight is not None:
        if not abilities.low_rank or delta_weight.ndim != 4 or delta_weight.shape[3] < 1:
            raise InvalidArgument(
                f"deformmamba::{operator}: delta_weight has shape {tuple(delta_weight.shape)}; wanted "
                f"{f'({k}, {g}, {r}, q) with q > 0' if abilities.low_rank else f'None for backend {backend!r}'}"
            )
        q = delta_weight.shape[3]
    chunks = -(-length // KERNELS[backend].CHUNK)
    last, device = (k, b, g, r, n), u.device
    for name, tensor, shape, dtype in (
        ("u", u, (b, g, length, r), half),
        ("delta", delta, (k, b, g, length, q), half),
        ("A", A, (k, g, r, n), full),
        ("B", B, (k, b, g, length, n), half),
        ("C", C, (k, b, g, length, n), half),
        ("D", D, (k, g, r), full),
        ("delta_bias", delta_bias, (k, g, r), full),
        ("delta_weight", delta_weight, (k, g, r, q), full),
        ("initial_state", more.get("initial_state"), last, full),
        ("kept", more.get("kept"), (k, b, g, chunks, n, r), full),
        ("dy", more.get("dy"), (b, g, length, r), half),
        ("dlast", more.get("dlast"), last, full),
    ):
        if tensor is not None and not (
            tensor.shape == shape
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.layout == torch.strided
        ):
            raise InvalidArgument(
                f"deformmamba::{operator}: {name} is {tensor.dtype} {tuple(tensor.shape)} ({tensor.layout}) on "
                f"{tensor.device}; wanted {dtype} {shape} (torch.strided) on {u.device}"
            )


# ----------------------------------------------------------------------------------------------------------- gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    backend, u, delta, A, B, C, D, delta_bias, initial_state, *ctx.rest, keep, delta_weight = inputs
    _, last, kept = output
    ctx.backend, ctx.keep, ctx.has_state = backend, keep, initial_state is not None
    ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, delta_weight, kept)
    ctx.last_shape = tuple(last.shape)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None) -> tuple[Any, ...]:
    u, delta, A, B, C, D, delta_bias, delta_weight, kept = map(plain, ctx.saved_tensors)
    if not ctx.keep:
        raise UnsupportedCall(
            "deformmamba::scan was called with keep=False and cannot be differentiated; pass keep=True"
        )
    dy = torch.zeros_like(u) if dy is None else plain(dy)
    dlast = A.new_zeros(ctx.last_shape) if dlast is None else plain(dlast)
    grads = scan_backward(
        ctx.backend, u, delta, A, B, C, D, delta_bias, kept, dy, dlast, *ctx.rest, delta_weight
    )  # fmt: skip
    du, ddelta, dA, dB, dC, dD, dbias, dstate, dweight = grads
    given = (None if D is None else dD, None if delta_bias is None else dbias, dstate if ctx.has_state else None)
    return (
        None,
        du,
        ddelta,
        dA,
        dB,
        dC,
        *given,
        None,
        None,
        None,
        None,
        None,
        None if delta_weight is None else dweight,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[0]


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedCall(
        f"the scan's backend {ctx.backend!r} has no second derivative; run the forward pass under "
        "`with scan_backend('eager'):`, or give backend='eager'"
    )


torch.library.register_autograd("deformmamba::scan", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "deformmamba::scan_backward", _refuse_second_derivative, setup_context=_save_backward
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- vmap


torch.library.register_vmap("deformmamba::scan", loop_over_batch(scan))
torch.library.register_vmap("deformmamba::scan_backward", loop_over_batch(scan_backward))
