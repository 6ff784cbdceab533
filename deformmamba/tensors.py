"""Preparation of tensors, shared by every operator of this package."""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformmamba.errors import InvalidArgument, UnsupportedCall, did_you_mean, shown
from deformmamba.torch_private import transforms_are_active

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = (Tensor, torch.nn.Parameter)
_NO_SUBCLASS = frozenset((*PLAIN, type(None), bool, int, float, str, tuple))
_TYPES: dict[torch.dtype, str] = {torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str}


def plain(value: Any) -> Any:
    """A tensor of a subclass as a `torch.Tensor` with the same memory and the same gradient; other objects unchanged.

    A subclass that computes in `__torch_dispatch__` (DTensor, fake tensors) stays, because its memory is elsewhere.
    """
    if type(value) in PLAIN or not isinstance(value, Tensor) or _dispatches(value):
        return value
    return value.as_subclass(Tensor)


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public function treat tensor subclasses as PyTorch's own functions do.

    - A class with `__torch_function__` (MONAI's MetaTensor, torchvision's tv_tensors, torch.fx's Proxy) handles the
      call first. It decides the type of the result.
    - The function itself gets plain tensors.
    - DTensors are gathered, every rank computes the whole result, and the result is a replicated DTensor.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        if _NO_SUBCLASS.issuperset(map(type, given)):
            return function(*args, **kwargs)
        if all(type(x) in PLAIN or not isinstance(x, Tensor) for x in given):
            return function(*args, **kwargs)
        module = sys.modules.get("torch.distributed.tensor")
        if module is not None and any(isinstance(x, module.DTensor) for x in given):
            return _replicated(module, function, args, kwargs)
        return function(*map(plain, args), **{name: plain(x) for name, x in kwargs.items()})

    return call


def _replicated(module: Any, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    meshes = [x.device_mesh for x in (*args, *kwargs.values()) if isinstance(x, module.DTensor)]

    def local(x: Any) -> Any:
        return x.full_tensor() if isinstance(x, module.DTensor) else plain(x)

    def spread(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(spread, x))
        return module.DTensor.from_local(x, meshes[0], [module.Replicate()] * meshes[0].ndim, run_check=False)

    return spread(function(*map(local, args), **{name: local(x) for name, x in kwargs.items()}))


def _dispatches(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def has_values(tensor: Tensor) -> bool:
    """Whether Python can read the tensor's numbers: not meta, not fake, not in a transform of torch.func or a trace."""
    return not (
        tensor.is_meta
        or (type(tensor) not in PLAIN and _dispatches(tensor))
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or transforms_are_active()
    )


def check_device(device: Any, *, also: tuple[str, ...] = ()) -> None:
    """Checks that a tensor with values can be put on a device, given as for `torch.device`.

    Args:
        also: further names that the caller accepts, for the message.

    Raises:
        InvalidArgument: no such device on this machine, a name that PyTorch does not have, or "meta", which holds no
            values. The message lists the devices of this machine.
    """
    try:
        usable = not torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        there = [*also, "cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        there += [name for name, kind in (("mps", torch.backends.mps), ("xpu", torch.xpu)) if kind.is_available()]
        hint = _nearest_device(device, {*there, "cuda"}) if isinstance(device, str) else ""
        given = shown(str(device) if isinstance(device, torch.device) else device)
        raise InvalidArgument(f"device {given}: not available on this machine{hint}; available: {', '.join(there)}")


def _nearest_device(name: str, known: set[str]) -> str:
    """A suggestion for a name that is no device; empty for one that PyTorch has."""
    try:
        torch.device(name)
    except RuntimeError:
        return did_you_mean("cuda" + name[3:] if name.lower().startswith("gpu") else name, known) or (
            " (did you mean 'cuda'?)" if name.lower() == "gpu" else ""
        )
    return ""


def floating_weight(layer: Any) -> torch.Tensor | None:
    """The weight of a layer, or None where it has none of floating point: an adapter (LoRA), a quantised layer."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None


def in_autocast(device_type: str) -> bool:
    """Whether autocast is on; some devices, such as meta, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off in the block."""
    if in_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def keeps_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function whose first argument is a tensor run with autocast off on that tensor's device.

    For sums over many pixels of the image itself, where the rounding of half precision would be visible.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast(args[0].device.type):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return call


def on_cpu_by_default(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function create tensors on the CPU if it names no device, also under `torch.set_default_device`.

    For functions that go between numpy and PyTorch.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return call


def with_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function run with autocast off on the CPU and on a GPU."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast("cpu"), without_autocast("cuda"):
            return function(*args, **kwargs)

    return call


def constant(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function that computes tensors from numbers keep its last `maxsize` results.

    They are ordinary tensors on the CPU, also if the first call is in inference mode, or under another default device.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.lru_cache(maxsize)
        def computed(*args: Any, **kwargs: Any) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad(), without_autocast("cpu"), torch.device("cpu"):
                return function(*args, **kwargs)

        kept: Any = functools.wraps(function)(computed)
        return cast("Callable[P, R]", kept)

    return decorate


def refuse_tracing(name: str, size: str = "image size") -> None:
    """Raises under torch.jit.trace: a trace has constant height and width, so it would be wrong at other sizes.

    `size`: what a trace would keep, in the message.

    Raises:
        UnsupportedCall: always under torch.jit.trace, and under torch.onnx.export(dynamo=False), which uses it.
    """
    if torch.jit.is_tracing():
        raise UnsupportedCall(
            f"{name}: torch.jit.trace would record the {size} as a constant and be wrong at any other size; "
            "use torch.export.export, or torch.onnx.export(..., dynamo=True)"
        )


def check_given(operator: str, **tensors: Any) -> None:
    """Checks for missing tensors: PyTorch passes None for an undefined tensor even if the operator's schema needs one.

    Raises:
        InvalidArgument: one of these arguments is None.
    """
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing:
        raise InvalidArgument(f"deformmamba::{operator}: {', '.join(missing)} must be given and cannot be None")


def loop_over_batch(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for torch.vmap: the operator is called once for each entry of the batch, and the results are stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def entry(i: int) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return operator(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs))

        results = [entry(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        kind = type(results[0])  # a tuple or a list
        return kind(map(torch.stack, zip(*results, strict=True))), kind([0] * len(results[0]))

    return rule


class _Memory:
    """Holds numpy's array interface to the memory of a tensor, and the tensor itself so that it stays alive."""

    __slots__ = ("__array_interface__", "tensor")
    tensor: Tensor
    __array_interface__: dict[str, Any]


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a float32 or float64 CPU tensor as a numpy array.

    `tensor.numpy()` would make the storage permanently not resizable, and FSDP and `out=` would then fail.
    """
    size, pointer = tensor.element_size(), tensor.data_ptr()
    if not tensor.numel():
        return np.empty(tuple(tensor.shape), _TYPES[tensor.dtype])
    if pointer % size:  # a view of bytes; kernels load whole numbers
        return as_array(tensor.clone())
    memory = _Memory()
    memory.tensor = tensor
    memory.__array_interface__ = {
        "data": (pointer, False),
        "shape": tensor.shape,
        "strides": None if tensor.is_contiguous() else tuple([size * step for step in tensor.stride()]),
        "typestr": _TYPES[tensor.dtype],
        "version": 3,
    }
    return np.asarray(memory)
