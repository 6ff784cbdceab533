"""All private functions of PyTorch, and of the libraries that it uses, on which this package relies.

Each docstring explains why a public function is not enough. A test in `tests/test_torch_private.py` fails if a release
of PyTorch breaks one of them.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, local
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from deformmamba.errors import InvalidArgument, UnsupportedCall

Function = TypeVar("Function", bound=Callable[..., Any])

PARALLEL_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def constant_when_compiled(function: Function) -> Function:
    """Marks a function as one that torch.compile calls once and does not trace; arguments and result are constants.

    Why: `torch.compiler.assume_constant_result` does the same, but imports the whole compiler (about a second) even if
    nothing is compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def differentiates_by_transform() -> bool:
    """Whether torch.func.grad, vjp, jvp or forward-mode differentiation is active.

    Why: kernels have no rule for these, and PyTorch has no public function for this. Without the check their
    derivatives would be zeros.
    """
    levels = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or any(key in (TransformType.Grad, TransformType.Jvp) for key in levels)


def transforms_are_active() -> bool:
    """Whether any transform of torch.func is active, vmap included.

    Why: torch.utils.checkpoint does not work inside these transforms, `.item()` does not work inside vmap, and PyTorch
    has no public function for this.
    """
    return bool(torch._C._are_functorch_transforms_active())


def uncompiled(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped in `module`; None if `module` is no such wrapper.

    Why: an image goes through the wrapper, the model's facts are read from the module inside, and the wrapper has no
    public way to it.
    """
    inside: nn.Module | None = getattr(module, "_orig_mod", None)
    return inside


def scan_operator() -> Callable[..., Any]:
    """PyTorch's operator for a loop over steps with a state, which exported programs can hold.

    Why: it has no public name yet, and a program must not contain an operator of this package to run without it.
    """
    from torch._higher_order_ops.scan import scan_op

    operator: Callable[..., Any] = scan_op
    return operator


@contextmanager
def without_fake_tensor_cache() -> Iterator[None]:
    """Traces inside the block compute each shape instead of looking it up in PyTorch's cache of shapes.

    Why: with symbolic sizes nearly every look-up fails, and each failure computes the entry twice: a third of the time
    of a trace (torch 2.13). There is no public switch.
    """
    from torch._dynamo import config

    with config.patch(fake_tensor_cache_enabled=False):
        yield


_parse_functions: list[Any] = []  # PyTorch's own function, once for each open block of `expressions_parsed_once`
_parse_lock = Lock()


@contextmanager
def expressions_parsed_once() -> Iterator[None]:
    """`torch.export.load` inside the block parses each expression of a free size once.

    Why: it parses the sizes and strides of every tensor, thousands of equal expressions (torch 2.13), and that takes
    most of its time. There is no public switch. The change holds for the process, so the first of several overlapping
    blocks makes it, and the last one that ends takes it back.
    """
    from torch._export.serde import serialize

    deserializer: Any = serialize.GraphModuleDeserializer
    if not hasattr(deserializer, "_parse_sym_expr"):  # another release of PyTorch: only slower
        yield
        return
    with _parse_lock:
        parse = _parse_functions[0] if _parse_functions else deserializer._parse_sym_expr
        if not _parse_functions:
            deserializer._parse_sym_expr = _once(parse)
        _parse_functions.append(parse)
    try:
        yield
    finally:
        with _parse_lock:
            _parse_functions.pop()
            if not _parse_functions:
                deserializer._parse_sym_expr = parse


def _once(parse: Callable[..., Any]) -> Callable[..., Any]:
    """`parse`, a method of PyTorch's deserializer, called once for each of its arguments."""
    parsed: dict[Any, Any] = {}

    def parse_once(self: Any, expression: Any, hint: Any = None) -> Any:
        key = self, expression, hint
        if key not in parsed:
            parsed[key] = parse(self, expression, hint)
        return parsed[key]

    return parse_once


def gomp_parallel() -> Callable[..., None] | None:
    """GOMP_parallel(function, its argument, threads, flags) of the OpenMP library that PyTorch has loaded, or None.

    Why: PyTorch's OpenMP threads spin for milliseconds after each operation, and other threads would compete with them
    for the cores. PyTorch has no public way to run Python code on its own threads.
    """
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    try:  # only if PyTorch has loaded it
        region: Any = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_NOLOAD).GOMP_parallel
    except (OSError, AttributeError):  # not loaded, or a system without GNU OpenMP
        return None
    region.argtypes, region.restype = (PARALLEL_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return region


def with_huge_pages(tensor: torch.Tensor, smallest: int = 4 << 20) -> torch.Tensor:
    """Asks Linux for huge pages behind a new, empty tensor of at least `smallest` bytes; returns the tensor.

    Why: the C library gives the memory of large tensors back to the system: above 32 MB each time, below that whenever
    enough of it is free at the end of the heap. The first access to new memory in pages of 4 KB takes up to as long as
    the scan. PyTorch and Python have no function for this.
    """
    if tensor.nbytes >= smallest and sys.platform == "linux":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


class _Limits(local):
    """The limits of this thread: for each open block of `limited_registration`, the names of its counters, with the
    number that is left and the limit."""

    blocks: tuple[dict[str, list[int]], ...] = ()


_limits = _Limits()
_hooks: list[RemovableHandle] = []
_hooks_lock = Lock()


def _count(what: str) -> None:
    for block in _limits.blocks:
        if what in block:
            block[what][0] -= 1
            if block[what][0] < 0:
                raise InvalidArgument(f"it needs more than {block[what][1]} {what}, far more than the file contains")


def _add_hooks() -> None:
    hooks = nn.modules.module
    with _hooks_lock:
        if not _hooks:
            _hooks.append(hooks.register_module_parameter_registration_hook(lambda *_: _count("parameters")))
            _hooks.append(hooks.register_module_buffer_registration_hook(lambda *_: _count("buffers")))
            _hooks.append(hooks.register_module_module_registration_hook(lambda *_: _count("modules")))


@contextmanager
def limited_registration(**limits: int) -> Iterator[None]:
    """Raises InvalidArgument once this thread registers more `parameters`, `buffers` or `modules` than the limits.

    Why: a checkpoint's config may describe a network of any size. Counting during construction stops it before memory
    is exhausted. The hooks are called for every module of the process. They are never removed, because a change of
    PyTorch's table of hooks fails in another thread that builds a module at that moment. Outside a block they do
    nothing.
    """
    _add_hooks()
    before = _limits.blocks
    _limits.blocks = (*before, {what: [limit, limit] for what, limit in limits.items()})
    try:
        yield
    finally:
        _limits.blocks = before


class NotScriptable:
    """A base class for modules that torch.jit.script refuses in one line.

    Why: TorchScript cannot compile these modules. It calls the method below first, so the user gets advice instead of
    an error from inside the compiler.
    """

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedCall(
            f"{type(self).__name__}: torch.jit.script does not support it; use torch.export.export instead"
        )
