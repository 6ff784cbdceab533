"""Converts an ONNX file to OpenVINO's format: an .xml file, with the weights in a .bin file beside it.

OpenVINO's reader of ONNX files has no rule for DeformConv (2026.4), so this module adds one.

A user has to compile the file with SETTINGS. Otherwise OpenVINO computes in bfloat16 on processors with bfloat16 units,
and the largest error is 1 % of the intensity scale (measured). The file itself cannot demand float32: OpenVINO has an
attribute of operations for that, DisablePrecisionConversion, but its optimizer drops it where it replaces operations,
such as matrix products (2026.4).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

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


@cache
def _thread() -> ThreadPoolExecutor:
    """The only thread in which OpenVINO compiles and deletes models.

    On CPUs with AMX, both replace the alternate signal stack of the thread that they run in, and leave a freed one
    behind (2026.4). In Python's main thread, the next signal, such as ctrl-C, would then end the process with a
    segmentation fault.
    """
    return ThreadPoolExecutor(1, "deformmamba-openvino")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_thread.cache_clear)  # a forked child has no threads


class Compiled:
    """A file compiled for the CPU, as a function of its inputs by name; `settings` as in `openvino.compile_model`."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._model = _thread().submit(_compiled, path, settings).result()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        results = self._model({name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(results[self._model.output(0)].copy())

    def __del__(self) -> None:
        with suppress(RuntimeError):  # at the end of Python there is no such thread any more
            _thread().submit(self.__dict__.clear)


def _compiled(path: Path, settings: dict[str, Any]) -> Any:
    import openvino

    return openvino.Core().compile_model(path, "CPU", settings)


def runner(path: Path, threads: int | None = None) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, on the CPU."""
    return Compiled(path, {**SETTINGS, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()})
