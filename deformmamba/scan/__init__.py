"""The selective scan of Mamba (S6): one operation, several implementations, all with gradients.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]        y[t] = C[t] . h[t] + D u[t]        dt = softplus(delta + bias)

`selective_scan` runs it along sequences, `selective_scan_2d` over feature maps in up to four directions without a
permuted copy. The tensor's device chooses the implementation; `scan_backend` or an argument names another one, which is
obeyed or refused with the reason. `backend_report` says what can run here, and why the rest cannot.

The state is float32 whatever goes in (float64 for float64), so a half-precision network or autocast does not overflow.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from deformmamba.errors import DeformMambaError
from deformmamba.scan import operator

BACKENDS: tuple[str, ...] = tuple(operator.MODULES)  # in the order in which "auto" tries them

Discretization = Literal["euler", "zoh"]

_chosen: ContextVar[str] = ContextVar("deformmamba_scan_backend", default="auto")
_chosen_last = "auto"  # the same for torch.compile, which can watch a global but not a context variable


class ScanBackendError(DeformMambaError, RuntimeError):
    """A scan backend that was asked for by name does not exist or cannot run this call; says why, and the cure."""


class BackendStatus(NamedTuple):
    """One row of `backend_report`: `why` and `cure` are empty where the backend is usable."""

    name: str
    usable: bool
    why: str
    cure: str


@contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Every scan in the block runs on backend `name`, one of `BACKENDS`, or raises; "auto" lets the tensor choose.

    Holds for the current thread (or task) only; a function compiled by torch.compile follows the block that was entered
    last, in any thread. A `backend=` argument wins over it. The backward pass of a scan runs on the backend of its
    forward pass, wherever it is called. What runs the forward pass again outside of the block (torch.utils.checkpoint)
    or in threads of its own (DataParallel) does not see it: `SS2D(backend=...)` goes everywhere.

    Raises:
        ScanBackendError: no such backend.
    """
    global _chosen_last
    _known(name)
    token, before = _chosen.set(name), _chosen_last
    _chosen_last = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_last = before


def backend_report() -> list[BackendStatus]:
    """One row for every backend, in the order in which "auto" tries them: can it run here, if not why, and the cure."""
    rows = []
    for name, module in operator.MODULES.items():
        why, _, cure = (module.unusable() or "").partition("; ")
        rows.append(BackendStatus(name, not why, why, cure))
    return rows


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
        A: (d, n) rates; negative in a Mamba network, but any sign is computed.
        B, C: (b, g, n, l), or (b, n, l) for one group; channel i belongs to group i // (d / g).
        D: (d,) factor of the direct path u -> y.
        z: (b, d, l) gate: y is multiplied by silu(z).
        delta_bias: (d,) added to delta.
        delta_softplus: dt = softplus(delta + delta_bias), else without softplus.
        return_last_state: also return the state after the last step, to go on from.
        initial_state: (b, d, n) state before the first step, zero by default.
        discretization: "euler": dt B u enters the state, as in released Mamba kernels; "zoh": exact zero-order hold,
            (exp(dt A) - 1) / A B u, equation 2 of the paper.
        backend: one of `BACKENDS`; None follows `scan_backend`.

    Returns:
        y (b, d, l) in u's dtype, or (y, last state (b, d, n) in float32, float64 for float64).

    float16, bfloat16 and float32 may be mixed, as autocast does; float64 stands alone. NaN and infinity are data.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, naming the argument and the rule.
        ScanBackendError: the named backend cannot run this call.
    """
    grouped = ["b n l" if isinstance(x, torch.Tensor) and x.ndim == 3 else "b g n l" for x in (B, C)]
    _check_shapes(
        ("u", u, "b d l"), ("delta", delta, "b d l"), ("A", A, "d n"), ("B", B, grouped[0]), ("C", C, grouped[1]),
        ("D", D, "d"), ("z", z, "b d l"), ("delta_bias", delta_bias, "d"), ("initial_state", initial_state, "b d n"),
    )  # fmt: skip
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    b, d, length = u.shape
    g, n = B.shape[1:3]
    if g == 0 or d % g:
        raise ValueError(f"B has {g} groups (shape {tuple(B.shape)}), which must divide the {d} channels of u")
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
    the same backwards) for k = 4; rows and rows from the end for k = 2; rows for k = 1. The fused backends read the map
    along each walk and write no permuted copy.

    Args:
        u: (b, h, w, d) map. A (b, d, h, w) tensor in channels-last memory format permutes to this without a copy.
        delta: (k, b, h, w, d) step sizes of every direction, before bias and softplus, indexed by pixel.
        A: (k * d, n) rates. D, delta_bias: (k * d,) or None.
        B, C: (b, h, w, k, n), indexed by pixel.
        delta_weight: (k * d, r), Mamba's dt_proj. With it delta is (k, b, h, w, r), and what else were delta is
            delta_weight @ delta: the CPU mixes it in registers and saves two maps of k * d channels.
        delta_softplus, discretization, backend: as in `selective_scan`.

    Returns:
        y (b, h, w, d) in u's dtype.

    Raises:
        ValueError, TypeError, ScanBackendError: as in `selective_scan`.
    """
    _check_shapes(
        ("u", u, "b h w d"), ("delta", delta, "k b h w d" if delta_weight is None else "k b h w r"), ("A", A, "k*d n"),
        ("B", B, "b h w k n"), ("C", C, "b h w k n"), ("D", D, "k*d"), ("delta_bias", delta_bias, "k*d"),
        ("delta_weight", delta_weight, "k*d r"),
    )  # fmt: skip
    b, h, w, d = u.shape
    k, n = B.shape[3:]
    if k not in (1, 2, 4):
        raise ValueError(f"delta has {k} directions (shape {tuple(delta.shape)}); 1, 2 or 4 are defined")
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
    """Every given tensor has the named axes, equal where a name returns, and u's device and kind of dtype."""
    sizes: dict[str, int] = {}
    first = arguments[0][1]
    for name, tensor, pattern in arguments:
        if tensor is None and name not in ("u", "delta", "A", "B", "C"):
            continue
        if not isinstance(tensor, torch.Tensor) or not isinstance(first, torch.Tensor):
            raise TypeError(f"{name} must be a tensor ({pattern.replace(' ', ', ')}), got {type(tensor).__name__}")
        axes = pattern.split()
        shape = tuple(tensor.shape)
        rule = f"{name} must have shape ({', '.join(axes)}), got {shape}"
        if len(shape) != len(axes):
            raise ValueError(f"{rule}: {len(shape)} axes instead of {len(axes)}")
        for axis, size in zip(axes, shape, strict=True):
            expected = sizes["k"] * sizes["d"] if axis == "k*d" else sizes.setdefault(axis, size)
            if size != expected:
                raise ValueError(f"{rule}: {axis} is {expected} in the arguments before it")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert it, for example with .float()")
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name} is {tensor.dtype} but u is {first.dtype}; float64 mixes with nothing else")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but u is on {first.device}; move them to one device")


def transformed() -> bool:
    """Whether torch.func differentiates what runs now, or forward-mode differentiation does: kernels have no rule for
    them, and give wrong derivatives (zeros) or none."""
    from torch._C._functorch import TransformType, get_interpreter_stack

    levels = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or any(key in (TransformType.Grad, TransformType.Jvp) for key in levels)


def _known(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ScanBackendError(f"there is no scan backend {name!r}; there are {', '.join(BACKENDS)}, and auto")


def _choose(name: str, device: str, dtype: torch.dtype, n: int, zoh: bool, state: bool) -> str:
    """The backend to run on: `name` itself, or for "auto" the first that can."""
    _known(name)
    probe = torch.empty(0, device=device, dtype=dtype)
    without_kernels = transformed()
    for candidate in BACKENDS if name == "auto" else (name,):
        module = operator.MODULES[candidate]
        reason = module.unusable(probe)
        if reason is None and hasattr(module, "refuses"):
            reason = module.refuses(n, zoh, state)
        if reason is None and without_kernels and candidate not in ("eager", "reference"):
            reason = "kernels have no rule for torch.func's grad and jvp and for forward mode; use backend 'eager'"
        if reason is None:
            return candidate
        if name != "auto":
            raise ScanBackendError(f"scan backend {name!r} cannot run this: {reason}")
    raise AssertionError("the reference runs everything")


# It asks machine and installation, which torch.compile cannot follow. What torch.compiler.assume_constant_result sets,
# set here, because that function imports the whole compiler: seconds, for those who never compile.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    size: tuple[int, int],
    softplus: bool,
    discretization: str,
    backend: str | None,
    mix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, last state) of the operation described in `operator`, in its dtype, on the chosen backend."""
    if discretization not in ("euler", "zoh"):
        raise ValueError(f"discretization must be 'euler' or 'zoh', got {discretization!r}")
    zoh = discretization == "zoh"
    if backend is None:
        backend = _chosen_last if torch.compiler.is_dynamo_compiling() else _chosen.get()
    name = _choose(backend, str(u.device), u.dtype, A.shape[-1], zoh, state is not None)
    module = operator.MODULES[name]
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    half = u.dtype if getattr(module, "HALF", False) else full
    u, delta, B, C = (x.to(half) for x in (u, delta, B, C))
    A = A.to(full).contiguous()
    D, bias, state, mix = (None if x is None else x.to(full).contiguous() for x in (D, bias, state, mix))
    kind = u.device.type
    # operations inside a backend keep the dtype they were given
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if mix is not None and not getattr(module, "LOW_RANK", False):
            delta, mix = torch.einsum("kbglq,kgrq->kbglr", delta, mix.to(half)), None
        if hasattr(module, "scan"):
            y, last = module.scan(u, delta, A, B, C, D, bias, state, *size, softplus, zoh)
        else:
            given = [x for x in (u, delta, A, B, C, D, bias, state, mix) if x is not None]
            keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
            low = {} if mix is None else {"mix": mix}
            y, last, _ = operator.scan(name, u, delta, A, B, C, D, bias, state, *size, softplus, zoh, keep, **low)
    return y, last
