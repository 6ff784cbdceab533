"""Checks values against the annotations of a function: plain ones, as in JSON and TOML, and arguments of a call."""

import functools
import inspect
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from deformmamba.errors import InvalidArgument, InvalidType, shown


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON or TOML value fits the annotated type. These formats have no tuples: a list fits a tuple type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(item, args[-1]) for item in value.values())
    if origin is tuple and Ellipsis not in args:
        return isinstance(value, list) and len(value) == len(args) and all(map(fits, value, args))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str):
        return type(value) is hint
    if hint is None:
        return value is None
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def described(hint: Any) -> str:
    """An annotation in words for a message, such as "a list of int"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(described(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if isinstance(origin, type):
        kind = "table" if issubclass(origin, Mapping) else "list"
        return f"a {kind} of {described(args[0 if origin is tuple else -1])}"
    return str(getattr(hint, "__name__", hint))


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether `value` is one integer, also of numpy or PyTorch; arrays with axes, True and False are not.

    PyTorch's symbolic integers count; they are not evaluated.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    return not hasattr(value, "dtype") or _converts(value, operator.index)


def check_seed(seed: Any, name: str = "seed") -> int:
    """`seed` as an int; numpy's integers become plain ones.

    Raises:
        InvalidArgument: it is not a whole number of 0 or more, which random generators require.
    """
    if not is_integer(seed) or seed < 0:
        raise InvalidArgument(f"{name} is {shown(seed)}; it must be a whole number, 0 or more")
    return operator.index(seed)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is one real number, also of numpy or PyTorch; texts, arrays with axes, True and False are not."""
    if isinstance(value, bool | str | bytes) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return False
    return not hasattr(value, "dtype") or ("complex" not in str(value.dtype) and _converts(value, float))


def is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """Whether `value` is one of these texts and integers, or None; an array, which Python cannot compare, is not, and
    neither is True, although it equals 1."""
    return isinstance(value, str | int | NoneType) and not isinstance(value, bool) and value in choices


def _converts(array: Any, kind: Callable[[Any], Any]) -> bool:
    """Whether `kind` converts an array or a tensor, which has no axes."""
    try:
        return array.ndim == 0 and "bool" not in str(array.dtype) and kind(array) is not None
    except Exception:  # no value of this kind, or none at all, as on the meta device
        return False


def check_types(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuses an argument of a wrong type in one sentence; `given` is `locals()` in the first line of `function`.

    Checked are numbers, texts, paths, functions, lists, dictionaries and instances of the annotated classes, but not
    the items of a list. numpy's numbers are numbers. An annotation in quotes (a class that only type checkers import)
    and a protocol are not checked. Ranges and choices are checked by the function itself.

    Raises:
        InvalidType: an argument of a wrong type.
    """
    for name, hint in _hints(function):
        value = given[name]
        if not _accepts(value, hint):
            is_plain = isinstance(value, str | numbers.Number | NoneType)
            shown_value = shown(value) if is_plain else f"a {type(value).__name__}"
            raise InvalidType(f"{_name(function)}: {name} must be {_in_words(hint)}, not {shown_value}")


def _name(function: Callable[..., Any]) -> str:
    """The name in a message; a constructor has that of its class."""
    return function.__qualname__.removesuffix(".__init__").rpartition(".")[2]


@functools.cache
def _hints(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """The annotated parameters of a function of this package; without *args and **kwargs."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        is_checked = parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str)
        if is_checked and parameter.kind in named:
            found.append((name, parameter.annotation))
    return tuple(found)


def _accepts(value: Any, hint: Any) -> bool:
    """Whether an argument of a call may have this annotation; True in doubt."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_accepts(value, arg) for arg in args)
    if origin is Literal:  # the function lists the choices
        return any(type(value) is type(arg) for arg in args) or isinstance(value, str)
    if hint in (None, NoneType):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if hint is int:
        return is_integer(value)
    if hint is float:
        return is_number(value)
    kind = origin or hint
    if kind is Callable:
        return callable(value)
    if kind is Sequence:  # also an array or a tensor, but not an iterator, which can be read only once, or a set
        has_items = hasattr(value, "__len__") and hasattr(value, "__getitem__")
        return has_items and not isinstance(value, str | bytes | Mapping)
    if kind is Iterable:
        return isinstance(value, Iterable) and not isinstance(value, str | bytes)
    if isinstance(kind, type) and not getattr(kind, "_is_protocol", False) and (origin is None or kind in _GENERIC):
        return isinstance(value, kind)
    return True


_GENERIC = (Mapping, os.PathLike, dict, list, type)


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, args)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    known = {int: "an integer", float: "a number", bool: "True or False", str: "a text", None: "None", NoneType: "None"}
    kind = origin or hint
    kinds = {
        Callable: "a function",
        Sequence: "a list",
        Iterable: "a list",
        Mapping: "a dictionary",
        os.PathLike: "a path",
    }
    if hint in known:
        return known[hint]
    return kinds.get(kind) or f"an instance of {getattr(kind, '__name__', kind)}"
