"""Converts an ONNX file to OpenVINO's format: an .xml file, with the weights in a .bin file beside it.

OpenVINO's reader of ONNX files has no rule for DeformConv (2026.4), so this module adds one.

A user has to compile the file with SETTINGS. Otherwise OpenVINO computes in bfloat16 on processors with bfloat16 units,
and the largest error is 1 % of the intensity scale (measured). The file itself cannot demand float32: OpenVINO has an
attribute of operations for that, DisablePrecisionConversion, but its optimizer drops it where it replaces operations,
such as matrix products (2026.4).
"""

from collections.abc import Callable
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


def runner(path: Path, threads: int | None = None) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, on the CPU."""
    import openvino

    settings = {**SETTINGS, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        results = compiled({name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(results[compiled.output(0)].copy())

    return run
