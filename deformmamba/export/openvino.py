"""Converts an ONNX file to OpenVINO's format: an .xml file, with the weights in a .bin file beside it.

OpenVINO's reader of ONNX files has no rule for DeformConv (2026.4), so this module adds one.

A user has to compile the file with SETTINGS. Otherwise OpenVINO computes in bfloat16 on processors with bfloat16 units,
and the largest error is 1 % of the intensity scale (measured). The file itself cannot demand float32: OpenVINO has an
attribute of operations for that, DisablePrecisionConversion, but its optimizer drops it where it replaces operations,
such as matrix products (2026.4).
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def write(onnx: Path, path: Path, facts: dict[str, str]) -> None:
    """Converts an ONNX file that `export.onnx` wrote; `path` ends in .xml."""
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    core = openvino.Core()
    core.add_extension(ConversionExtension("DeformConv", _deformable_convolution))
    model = core.read_model(onnx)
    for name, fact in facts.items():
        model.set_rt_info(fact, ["deformmamba", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def _deformable_convolution(node: Any) -> Any:
    from openvino import opset13

    x, weight, offset, bias, mask = (node.get_input(k) for k in range(5))
    strides, pads, dilations = (list(node.get_attribute(name)) for name in ("strides", "pads", "dilations"))
    group, offset_group = int(node.get_attribute("group")), int(node.get_attribute("offset_group"))
    y = opset13.deformable_convolution(
        x, offset, weight, strides, pads[:2], pads[2:], dilations, mask, "EXPLICIT", group, offset_group, True
    )
    channels = opset13.constant(np.array([1, -1, 1, 1]))
    return opset13.add(y, opset13.reshape(bias, channels, False)).outputs()


class _SignalStack(ctypes.Structure):
    _fields_: ClassVar = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restores this thread's alternate signal stack after the block.

    On CPUs with AMX, OpenVINO replaces this stack when it compiles a model, and frees its own stack when it deletes the
    model (2026.4). With two models the freed one stays in use, and the next signal, such as ctrl-C, ends the process
    with a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class _Compiled:
    """A file compiled for the CPU, as a function of its inputs by name."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        import openvino

        with signal_stack_kept():
            self._model = openvino.Core().compile_model(path, "CPU", settings)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        results = self._model({name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(results[self._model.output(0)].copy())

    def __del__(self) -> None:
        with signal_stack_kept():
            self.__dict__.clear()


def runner(path: Path, threads: int | None = None) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, on the CPU."""
    return _Compiled(path, {**SETTINGS, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()})
