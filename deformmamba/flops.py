"""Operation counts with torch's own counter, which needs a formula for each operator of this package.

The formulas are registered when this module is imported, and not before: the counter loads more than networks need.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import deformmamba.deform.cpu
import deformmamba.scan  # noqa: F401  the operators must exist before they get a formula


def _of_scan(u: Any, A: Any, delta_weight: Any) -> int:
    """9 for each image, direction, pixel, channel and state, as in VMamba's count; arguments are shapes.

    Step sizes of low rank add the operations of their product."""
    return math.prod(u) * int(A[0]) * (9 * int(A[-1]) + (2 * int(delta_weight[-1]) if delta_weight else 0))


@register_flop_formula(torch.ops.deformmamba.scan)
def _scan(
    backend: str, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, initial_state: Any,
    height: int, width: int, delta_softplus: bool, zoh: bool, keep: bool, delta_weight: Any = None, **_: Any,
) -> int:  # fmt: skip
    return _of_scan(u, A, delta_weight)


@register_flop_formula(torch.ops.deformmamba.scan_backward)
def _scan_backward(
    backend: str, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, kept: Any, dy: Any, dlast: Any,
    height: int, width: int, delta_softplus: bool, zoh: bool, delta_weight: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Twice the forward pass, as for a product."""
    return 2 * _of_scan(u, A, delta_weight)


@register_flop_formula(torch.ops.deformmamba.deform_conv2d)
def _deform(x: Any, offset: Any, mask: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The count of a plain convolution of the same size; arguments are shapes, offset (b, h, w, 2K)."""
    return 2 * math.prod(offset[:3]) * math.prod(weight)


@register_flop_formula(torch.ops.deformmamba.deform_conv2d_backward)
def _deform_backward(grad: Any, x: Any, offset: Any, mask: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Twice the forward pass."""
    return 2 * _deform(x, offset, mask, weight)


def count_flops(module: nn.Module, *inputs: torch.Tensor) -> dict[str, int]:
    """Floating point operations of `module(*inputs)` by operator name; their sum is the total.

    A multiply-add counts as two. Norms, activations and FFTs are not counted, as is usual.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
