"""Checks of what a user gives to the functions of this folder, so that a wrong argument raises one clear sentence."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from deformmamba.annotations import is_integer, is_number
from deformmamba.errors import InvalidArgument, InvalidType, one_line, shown
from deformmamba.tensors import has_values, in_autocast


def check_tensors(sizes: dict[str, int] | None = None, /, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Checks the tensors of a call: type, axes, kind of numbers and device, in the given order.

    Args:
        sizes: sizes of axes that are known before; not changed.
        arguments: for each name the value and its pattern. A pattern lists the axes, for example "b d l". An axis has
            the same size in all patterns; a number is a fixed size. "..." stands for any axes before the others.
            "b d | b d l" allows both. A pattern that starts with "?" allows None. Numbers must be real; with "int:"
            before the axes they must be whole, with "any:" they may be complex.

    Returns:
        The size of every axis, by name.

    Raises:
        InvalidType: not a tensor, or the wrong kind of numbers.
        InvalidArgument: an axis too many or too few, a size that contradicts another argument, another device.
    """
    found = dict(sizes or {})
    first: tuple[str, Tensor] | None = None
    for name, (value, pattern) in arguments.items():
        optional, pattern = pattern.startswith("?"), pattern.removeprefix("?")
        if value is None and optional:
            continue
        kind, _, axes = pattern.rpartition(":")
        if not isinstance(value, Tensor):
            none = " or None" if optional else ""
            raise InvalidType(f"{name} must be a tensor{none}, {_shape(axes, {})}, got {shown(value)}")
        if not any(_fits(value, alternative.split(), found) for alternative in axes.split("|")):
            raise InvalidArgument(f"{name} must have shape {_shape(axes, found)}, got {tuple(value.shape)}")
        _check_kind(name, value, kind)
        first = first or (name, value)
        if value.device != first[1].device:
            raise InvalidArgument(
                f"{name} is on {value.device}, but {first[0]} is on {first[1].device}; move them to one device"
            )
    return found


def _fits(value: Tensor, axes: list[str], found: dict[str, int]) -> bool:
    """Whether the shape fits the axes; then adds the sizes of new axes to `found`."""
    shape = tuple(value.shape)
    if axes[:1] == ["..."]:
        axes = axes[1:]
        shape = shape[max(len(shape) - len(axes), 0) :]
    if len(shape) != len(axes):
        return False
    new: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True):
        known = int(axis) if axis.isdigit() else found.get(axis, new.get(axis))
        if known is None:
            new[axis] = size
        elif size != known:
            return False
    found.update(new)
    return True


def _shape(axes: str, found: dict[str, int]) -> str:
    """The pattern for a message, with the sizes that are known."""
    forms = [f"({', '.join(form.split())}{',' if len(form.split()) == 1 else ''})" for form in axes.split("|")]
    names = [axis for axis in dict.fromkeys(axes.replace("|", " ").split()) if axis in found]
    with_sizes = f" with {', '.join(f'{name} = {found[name]}' for name in names)}" if names else ""
    return " or ".join(forms) + with_sizes


def _check_kind(name: str, value: Tensor, kind: str) -> None:
    if value.layout is not torch.strided:
        raise InvalidType(f"{name} must be a dense tensor, got {value.layout}; convert it with .to_dense()")
    if kind == "int":
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InvalidType(f"{name} must have whole numbers, got {value.dtype}; convert it, for example with .int()")
    elif not value.is_floating_point() and not (kind == "any" and value.is_complex()):
        allowed = "floating point or complex" if kind == "any" else "floating point"
        hint = "; complex numbers are not supported here" if value.is_complex() else "; convert it with .float()"
        raise InvalidType(f"{name} must be {allowed}, got {value.dtype}{hint}")


def check_choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raises InvalidArgument unless `value` is one of `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        given = ", ".join(map(repr, allowed))
        raise InvalidArgument(f"{name} must be one of {given}, got {shown(value)}")


def check_sizes(where: str, least: int = 1, **sizes: Any) -> None:
    """Raises InvalidArgument unless each size is a whole number of `least` or more."""
    for name, value in sizes.items():
        if not is_integer(value) or value < least:
            raise InvalidArgument(f"{where}: {name} must be a whole number of {least} or more, got {shown(value)}")


def check_positive(where: str, **numbers: Any) -> None:
    """Raises InvalidArgument unless each number is above 0 and finite."""
    for name, value in numbers.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise InvalidArgument(f"{where}: {name} must be a finite number above 0, got {shown(value)}")


def check_not_negative(where: str, **numbers: Any) -> None:
    """Raises InvalidArgument unless each number is 0 or more and finite."""
    for name, value in numbers.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise InvalidArgument(f"{where}: {name} must be a finite number of 0 or more, got {shown(value)}")


def check_functions(where: str, **functions: Any) -> None:
    """Raises InvalidType unless each can be called."""
    for name, value in functions.items():
        if not callable(value):
            raise InvalidType(f"{where}: {name} must be a class or a function, got {shown(value)}")


def check_parameters(where: str, device: Any, dtype: Any) -> None:
    """Checks the device and the dtype of a block's parameters; None: PyTorch's defaults. "meta" is allowed."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidType(f"{where}: dtype must be a floating point torch.dtype or None, got {shown(dtype)}")
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(
            f"{where}: device {shown(device)} is not available here ({one_line(error)}); give another, such as 'cpu'"
        ) from None


def check_input(where: str, name: str, x: Any, axes: str, first: nn.Module) -> None:
    """Checks the input of a block, with shapes and dtypes only, because it runs in each step of a generation.

    Args:
        axes: the axes before the channels, such as "b l"; "..." allows any.
        first: the layer that meets the input. If it is a plain `nn.Linear`, the input must have its channels, its
            device and, outside autocast, its dtype. (A wrapped or quantised layer has its own rules.)

    Raises:
        InvalidType: not a tensor, or not floating point.
        InvalidArgument: another shape, device or dtype than the block's.
    """
    if is_symbol(x):
        return
    weight = getattr(first, "weight", None) if type(first) is nn.Linear else None
    weight = weight if isinstance(weight, Tensor) and weight.ndim == 2 else None
    channels = "channels" if weight is None else weight.shape[1]
    if not isinstance(x, Tensor):
        raise InvalidType(f"{where}: {name} must be a tensor, {_before(axes, channels)}, got {shown(x)}")
    if not x.is_floating_point() or x.layout is not torch.strided:
        _check_kind(f"{where}: {name}", x, "")
    n_axes = x.ndim if axes == "..." else axes.count(" ") + 2
    if not x.ndim or x.ndim != n_axes or _differs(x, weight):
        hint = f"; give one sequence as {name}[None]" if axes == "b l" and x.ndim == 2 else ""
        raise InvalidArgument(f"{where}: {name} must have shape {_before(axes, channels)}, got {tuple(x.shape)}{hint}")
    if weight is None:
        return
    if x.dtype != weight.dtype and weight.is_floating_point() and not in_autocast(x.device.type):
        raise InvalidArgument(
            f"{where}: {name} is {x.dtype}, and its weights are {weight.dtype}; convert one of the two ({name}.to(...) "
            "or block.to(...)), or use torch.autocast"
        )
    if x.device != weight.device and not weight.is_meta:  # offloaded weights arrive when their layer is called
        raise InvalidArgument(
            f"{where}: {name} is on {x.device}, and its weights are on {weight.device}; move one of the two"
        )


def is_symbol(x: Any) -> bool:
    """Whether x stands for a tensor in a trace, such as torch.fx's, and so has no shape."""
    # not has_torch_function, which is true of anything while a default device is set
    return not isinstance(x, Tensor) and hasattr(type(x), "__torch_function__")


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Raises InvalidArgument unless the residual has the shape of x, because a sum would repeat a shorter one."""
    if residual is not None and residual.shape != x.shape:
        raise InvalidArgument(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def _before(axes: str, channels: int | str) -> str:
    return f"({', '.join([*axes.split(), str(channels)])})"


def _differs(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the channels of x are not those of the weight; False in a trace, which would record the comparison."""
    return weight is not None and not torch.jit.is_tracing() and bool(x.shape[-1] != weight.shape[1])


def check_range(name: str, value: Any) -> tuple[float, float]:
    """A pair (lowest, highest) of numbers; either end may be infinite."""
    try:
        low, high = (float(x) for x in (() if isinstance(value, str | bytes) else value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidArgument(f"{name} must be two numbers, (lowest, highest), got {shown(value)}") from None
    if math.isnan(low) or math.isnan(high) or low > high:
        raise InvalidArgument(f"{name} must be (lowest, highest) with lowest <= highest, got {shown(value)}")
    return low, high


def check_rows(name: str, rows: Tensor, n: int) -> None:
    """Checks the indices (b,) of rows of a state that has `n` of them; negative ones stand for no row."""
    if has_values(rows) and rows.numel() and int(rows.max()) >= n:
        raise InvalidArgument(f"{name} has the index {int(rows.max())}; the state has {n} rows, 0 to {n - 1}")


def check_written(name: str, state: Tensor) -> None:
    """Checks that a tensor that is written to has a place in memory for each of its numbers."""
    if any(step == 0 and size > 1 for step, size in zip(state.stride(), state.shape, strict=True)):
        raise InvalidArgument(
            f"{name} is written to, but several of its numbers share their memory; give {name}.clone()"
        )


def check_boundaries(name: str, boundaries: Any, length: int) -> None:
    """Checks (sequences + 1,) whole numbers: 0, then the end of each sequence in a pack of `length` steps.

    The pack may be longer than its sequences. (The values are not checked inside torch.func and torch.compile.)"""
    check_tensors(**{name: (boundaries, "int:sequences+1")})
    if not len(boundaries):
        raise InvalidArgument(f"{name} must have at least one number, the 0 at the start of the pack, got none")
    if has_values(boundaries):
        ends = boundaries.tolist()
        if ends[0] != 0 or ends[-1] > length or any(a > b for a, b in itertools.pairwise(ends)):
            raise InvalidArgument(
                f"{name} must start at 0, never decrease and end at the number of steps, {length}, or before; "
                f"got {shown(ends)}"
            )
