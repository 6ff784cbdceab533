"""The selective scan of Mamba (S6): one operation, several backends, all with gradients.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]        y[t] = C[t] . h[t] + D u[t]        dt = softplus(delta + bias)

`selective_scan` runs along sequences. `selective_scan_2d` runs over feature maps in up to four directions without a
permuted copy. The device of the tensors selects the backend. `scan_backend` or the argument `backend` names another
one; the call runs on it or raises with the reason. `backend_report` lists which backends can run here.

The state is float32 (float64 for float64 inputs), so that half precision and autocast do not overflow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from deformmamba.errors import DeformMambaError, InvalidArgument, InvalidType, shown
from deformmamba.scan import operator
from deformmamba.tensors import overridable, refuse_tracing, without_autocast
from deformmamba.threads import ForkLock
from deformmamba.torch_private import constant_when_compiled, differentiates_by_transform

BACKENDS: tuple[str, ...] = tuple(operator.MODULES)  # in the order in which "auto" tries them

Discretization = Literal["euler", "zoh"]

_chosen: ContextVar[str] = ContextVar("deformmamba_scan_backend", default="auto")
_chosen_last = "auto"  # the same for torch.compile, which can watch a global but not a context variable
_open_blocks: dict[object, str] = {}  # the blocks of all threads that have not ended, the last entered at the end
_blocks_lock = ForkLock()


class ScanBackendError(DeformMambaError, RuntimeError):
    """The named scan backend does not exist or cannot run this call; the message gives the reason and the solution."""


class BackendStatus(NamedTuple):
    """One row of `backend_report`: `why` and `cure` are empty where the backend is usable."""

    name: str
    usable: bool
    why: str
    cure: str


@contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Every scan in the block runs on backend `name`, one of `BACKENDS`, or raises; "auto": the device selects.

    Applies to the current thread (or task) only. A function compiled by torch.compile uses the open block that was
    entered last, in any thread. The argument `backend` takes precedence. The backward pass runs on the backend of its
    forward pass. The block does not reach a forward pass that is repeated outside of it (torch.utils.checkpoint) or
    that runs in other threads (DataParallel); use `SS2D(backend=...)` there.

    Raises:
        ScanBackendError: no such backend.
    """
    global _chosen_last
    check_backend(name)
    block = object()
    with _blocks_lock:
        _open_blocks[block] = _chosen_last = name
    token = _chosen.set(name)
    try:
        yield
    finally:
        with _blocks_lock:  # blocks of several threads may end in any order
            del _open_blocks[block]
            _chosen_last = next(reversed(_open_blocks.values()), "auto")
        _chosen.reset(token)


def backend_report() -> list[BackendStatus]:
    """One row for each backend, in the order of "auto": whether it can run here, else the reason and the solution."""
    rows = []
    for name, module in operator.MODULES.items():
        why, _, cure = (module.unusable() or "").partition("; ")
        rows.append(BackendStatus(name, not why, why, cure))
    return rows


@overridable
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
    discretization: Discretization = "euler",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan along the last axis; arguments in the order of mamba-ssm's `selective_scan_fn`.

    Args:
        u: (b, d, l) input.
        delta: (b, d, l) step sizes, before bias and softplus.
        A: (d, n) rates; negative in a Mamba network, but any sign works. Real numbers only.
        B, C: (b, g, n, l), or (b, n, l) for one group, which all groups of the other share; channel i belongs to group
            i // (d / g). Or (d, n), constant over the sequence, as in S4.
        D: (d,) factor of the direct path u -> y.
        z: (b, d, l) gate: y is multiplied by silu(z).
        delta_bias: (d,) added to delta.
        delta_softplus: dt = softplus(delta + delta_bias), else without softplus.
        return_last_state: also return the state after the last step, with which a later call can continue.
        initial_state: (b, d, n) state before the first step, zero by default.
        discretization: "euler": dt B u enters the state, as in released Mamba kernels; "zoh": exact zero-order hold,
            (exp(dt A) - 1) / A B u, equation 2 of the paper.
        backend: one of `BACKENDS`; None follows `scan_backend`.

    Returns:
        y (b, d, l) in u's dtype, or (y, last state (b, d, n) in float32, float64 for float64).

    float16, bfloat16 and float32 may be mixed, as autocast does; float64 may not. NaN and infinity propagate.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, naming the argument and the rule.
        ScanBackendError: the named backend cannot run this call.
        UnsupportedCall: under torch.jit.trace.
    """
    refuse_tracing("selective_scan", "length")
    patterns = {2: "d n", 3: "b n l"}
    grouped = [patterns.get(x.ndim, "b g n l") if isinstance(x, torch.Tensor) else "b g n l" for x in (B, C)]
    _check_shapes(
        ("u", u, "b d l"), ("delta", delta, "b d l"), ("A", A, "d n"), ("B", B, grouped[0]), ("C", C, grouped[1]),
        ("D", D, "d"), ("z", z, "b d l"), ("delta_bias", delta_bias, "d"), ("initial_state", initial_state, "b d n"),
    )  # fmt: skip
    b, d, length = u.shape
    shared = B.shape[1] if B.ndim == 4 else C.shape[1] if C.ndim == 4 else 1
    B, C = (x[:, None].expand(-1, shared, -1, -1) if x.ndim == 3 else x for x in (B, C))
    if B.ndim == 2 or C.ndim == 2:  # constant matrices differ from channel to channel: each channel is a group
        B, C = (_group_for_each_channel(x, b, d, length) for x in (B, C))
    g, n = B.shape[1:3]
    if g == 0 or d % g:
        raise InvalidArgument(f"B has {g} groups (shape {tuple(B.shape)}), which must divide the {d} channels of u")
    r = d // g
    y, last = _run(
        u.reshape(b, g, r, length).transpose(2, 3),
        delta.reshape(1, b, g, r, length).transpose(3, 4),
        A.reshape(1, g, r, n),
        B[None].transpose(3, 4),
        C[None].transpose(3, 4),
        None if D is None else D.reshape(1, g, r),
        None if delta_bias is None else delta_bias.reshape(1, g, r),
        None if initial_state is None else initial_state.reshape(1, b, g, r, n),
        (1, length),
        delta_softplus,
        discretization,
        backend,
    )
    y = y.transpose(2, 3).reshape(b, d, length)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last.reshape(b, d, n)) if return_last_state else y


def _group_for_each_channel(x: torch.Tensor, b: int, d: int, length: int) -> torch.Tensor:
    """B or C, (d, n) or (b, g, n, l), as (b, d, n, l)."""
    if x.ndim == 2:
        return x[None, :, :, None].expand(b, d, x.shape[1], length)
    if not x.shape[1] or d % x.shape[1]:
        raise InvalidArgument(f"B or C has {x.shape[1]} groups, which must divide the {d} channels of u")
    return x.repeat_interleave(d // x.shape[1], 1)


@overridable
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
    delta_weight: torch.Tensor | None = None,
    discretization: Discretization = "euler",
    backend: str | None = None,
) -> torch.Tensor:
    """The core of SS2D: scan a map in k directions and sum the results, channels last, each direction with its weights.

    The direction order is rows, columns, rows from the end, columns from the end (row-major and column-major walks, and
    the same backwards) for k = 4; rows and rows from the end for k = 2; rows for k = 1. The backends with kernels read
    the map along each walk and write no permuted copy.

    Args:
        u: (b, h, w, d) map. A (b, d, h, w) tensor in channels-last memory format permutes to this without a copy.
        delta: (k, b, h, w, d) step sizes of every direction, before bias and softplus, indexed by pixel.
        A: (k * d, n) rates. D, delta_bias: (k * d,) or None.
        B, C: (b, h, w, k, n), indexed by pixel.
        delta_weight: (k * d, r), Mamba's dt_proj. With it delta is (k, b, h, w, r), and the scan uses
            delta_weight @ delta. The CPU backend computes this product in registers and saves two maps of k * d
            channels.
        delta_softplus, discretization, backend: as in `selective_scan`.

    Returns:
        y (b, h, w, d) in u's dtype.

    Raises:
        ValueError, TypeError, ScanBackendError, UnsupportedCall: as in `selective_scan`.
    """
    refuse_tracing("selective_scan_2d")
    _check_shapes(
        ("u", u, "b h w d"), ("delta", delta, "k b h w d" if delta_weight is None else "k b h w r"), ("A", A, "k*d n"),
        ("B", B, "b h w k n"), ("C", C, "b h w k n"), ("D", D, "k*d"), ("delta_bias", delta_bias, "k*d"),
        ("delta_weight", delta_weight, "k*d r"),
    )  # fmt: skip
    k = B.shape[3]
    if k not in (1, 2, 4):
        raise InvalidArgument(f"delta has {k} directions (shape {tuple(delta.shape)}); 1, 2 or 4 are defined")
    return scan_checked_map(
        u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, delta_weight=delta_weight,
        discretization=discretization, backend=backend,
    )  # fmt: skip


def scan_checked_map(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    *,
    delta_softplus: bool,
    delta_weight: torch.Tensor | None,
    discretization: Discretization,
    backend: str | None,
) -> torch.Tensor:
    """`selective_scan_2d` for a module that made the arguments itself, so that their shapes and dtypes fit.

    The operators with kernels compare all of them once more.
    """
    b, h, w, d = u.shape
    k, n = B.shape[3:]
    y, _ = _run(
        u.reshape(b, 1, h * w, d),
        delta.reshape(k, b, 1, h * w, delta.shape[-1]),
        A.reshape(k, 1, d, n),
        B.permute(3, 0, 1, 2, 4).reshape(k, b, 1, h * w, n),
        C.permute(3, 0, 1, 2, 4).reshape(k, b, 1, h * w, n),
        None if D is None else D.reshape(k, 1, d),
        None if delta_bias is None else delta_bias.reshape(k, 1, d),
        None,
        (h, w),
        delta_softplus,
        discretization,
        backend,
        None if delta_weight is None else delta_weight.reshape(k, 1, d, delta.shape[-1]),
    )
    return y.reshape(b, h, w, d).to(u.dtype)


def _check_shapes(*arguments: tuple[str, torch.Tensor | None, str]) -> None:
    """Checks that each tensor has the named axes, with one size per name, and u's device and kind of dtype."""
    sizes: dict[str, int] = {}
    first = arguments[0][1]

    def wanted(name: str, axes: list[str], tensor: torch.Tensor) -> str:
        return f"{name} must have shape ({', '.join(axes)}), got {tuple(tensor.shape)}"

    for name, tensor, pattern in arguments:
        if tensor is None and name not in ("u", "delta", "A", "B", "C"):
            continue
        if not isinstance(tensor, torch.Tensor) or not isinstance(first, torch.Tensor):
            raise InvalidType(f"{name} must be a tensor ({pattern.replace(' ', ', ')}), got {type(tensor).__name__}")
        axes = pattern.split()
        if tensor.ndim != len(axes):
            raise InvalidArgument(f"{wanted(name, axes, tensor)}: {tensor.ndim} axes instead of {len(axes)}")
        if "k*d" in axes:
            sizes["k*d"] = sizes["k"] * sizes["d"]
        for axis, size in zip(axes, tensor.shape, strict=True):
            if size != sizes.setdefault(axis, size):
                raise InvalidArgument(
                    f"{wanted(name, axes, tensor)}: {axis} is {sizes[axis]} in the arguments before it"
                )
        if not tensor.is_floating_point():
            _refuse_numbers(name, tensor.dtype)
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise InvalidType(f"{name} is {tensor.dtype} but u is {first.dtype}; float64 needs all tensors in float64")
        if tensor.device != first.device:
            raise InvalidArgument(f"{name} is on {tensor.device} but u is on {first.device}; move them to one device")


def _refuse_numbers(name: str, dtype: torch.dtype) -> None:
    """Raises for an argument whose dtype is not floating point."""
    if dtype.is_complex:
        raise InvalidType(
            f"{name} is {dtype}; complex numbers are not supported, because the state is real in every backend; give "
            "real tensors"
        )
    raise InvalidType(f"{name} must be floating point, got {dtype}; convert it, for example with .float()")


def check_backend(name: str) -> None:
    """Raises ScanBackendError for a name that is neither one of `BACKENDS` nor "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise ScanBackendError(f"unknown scan backend {name!r}; backends: {', '.join(BACKENDS)}, auto")


@constant_when_compiled  # it looks at the machine and the installed packages, which torch.compile cannot trace
def _choose(name: str, device: str, dtype: torch.dtype, n: int, zoh: bool, initial_state: bool) -> str:
    """The backend to run on: `name` itself, or for "auto" the first that can.

    Meta tensors have no memory, so that no kernel runs: any backend with kernels gives their shapes.
    """
    check_backend(name)
    probe = torch.empty(0, device=device, dtype=dtype)
    needs_transforms = differentiates_by_transform()
    if device == "meta" and not needs_transforms and (name == "auto" or name in operator.KERNELS):
        return "cpu" if name == "auto" else name
    for candidate in BACKENDS if name == "auto" else (name,):
        module = operator.MODULES[candidate]
        reason = module.unusable(probe) or module.ABILITIES.missing(n, zoh, initial_state)
        if reason is None and needs_transforms and not module.ABILITIES.transforms:
            reason = "kernels have no rule for torch.func's grad and jvp and for forward mode; use backend 'eager'"
        if reason is None:
            return candidate
        if name != "auto":
            raise ScanBackendError(f"scan backend {name!r} cannot run this: {reason}")
    raise AssertionError("the reference runs everything")


def _run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    size: tuple[int, int],
    delta_softplus: bool,
    discretization: str,
    backend: str | None,
    delta_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state) of the operation described in `backend.py`, in its dtype, on the chosen backend."""
    if discretization not in ("euler", "zoh"):
        raise InvalidArgument(f"discretization must be 'euler' or 'zoh', got {discretization!r}")
    if not isinstance(delta_softplus, bool):
        raise InvalidType(f"delta_softplus must be True or False, not {shown(delta_softplus)}")
    zoh = discretization == "zoh"
    if backend is None:
        backend = _chosen_last if torch.compiler.is_dynamo_compiling() else _chosen.get()
    name = _choose(backend, str(u.device), u.dtype, A.shape[-1], zoh, initial_state is not None)
    abilities = operator.MODULES[name].ABILITIES
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    half = u.dtype if u.dtype in abilities.dtypes else full
    u, delta, B, C = [x.to(half) for x in (u, delta, B, C)]
    A = A.to(full).contiguous()
    D, delta_bias, initial_state, delta_weight = [
        None if x is None else x.to(full).contiguous() for x in (D, delta_bias, initial_state, delta_weight)
    ]
    with without_autocast(u.device.type):  # operations inside a backend keep the dtype they were given
        if delta_weight is not None and not abilities.low_rank:
            delta, delta_weight = torch.einsum("kbglq,kgrq->kbglr", delta, delta_weight.to(half)), None
        given = (u, delta, A, B, C, D, delta_bias, initial_state)
        if name in operator.PLAIN:
            if not u.shape[2]:
                return _no_steps(*given)
            return operator.PLAIN[name].scan(*given, *size, delta_softplus, zoh)
        wanted = any(x is not None and x.requires_grad for x in (*given, delta_weight))
        keep = torch.is_grad_enabled() and wanted
        more = {} if delta_weight is None else {"delta_weight": delta_weight}
        y, last, _ = operator.scan(name, *given, *size, delta_softplus, zoh, keep, **more)
    return y, last


def _no_steps(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of length 0: an empty y, the initial state, and a gradient of zero for everything else."""
    given = [x for x in (u, delta, A, *others) if x is not None]
    zero = torch.stack([x[..., :0].sum().to(A.dtype) for x in given]).sum()
    initial_state = others[-1]
    shape = (*delta.shape[:3], *A.shape[2:])
    last = zero.expand(shape) if initial_state is None else initial_state + zero
    return u + zero.to(u.dtype), last.clone()
