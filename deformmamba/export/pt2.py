"""Exports programs to PyTorch's pt2 format: `torch.export.load(path).module()` runs them without this package.

The selective scan is a loop (`torch.ops.higher_order.scan`), so that one file serves every size. Each round of the loop
computes `STEPS` time steps, because most of the time goes into starting a round. The deformable convolution is one
`grid_sample` for all taps, and a matrix product.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deformmamba.annotations import check_types
from deformmamba.deform import exported_as
from deformmamba.errors import InvalidType
from deformmamba.scan import scan_backend
from deformmamba.scan.reference import discretize, step_sizes
from deformmamba.tensors import on_cpu_by_default
from deformmamba.torch_private import expressions_parsed_once, scan_operator, without_fake_tensor_cache

STEPS = 16  # time steps in one round of the loop
FACTS = "deformmamba.json"  # the name of the facts inside a pt2 file


@on_cpu_by_default
def portable_program(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """`torch.export.export` of a module that holds any of our blocks, as a program that runs without this package.

    `torch.export.export` itself also works on the blocks and keeps `deformmamba::scan`. That is fast, but needs this
    package to run. Here each scan is a loop over steps, which `torch.onnx.export(program, dynamo=True)` converts to an
    ONNX Scan. Arguments as in `torch.export.export`; tensors on the CPU; gradients are not exported.
    A free size is a `torch.export.Dim` with min=2 (a model: `multiple + 1`): PyTorch treats size 1 as special.

    Raises:
        InvalidType: `module` is not a module, or `args` not a tuple.
    """
    check_types(portable_program, locals())
    if not isinstance(args, tuple):
        raise InvalidType(
            f"portable_program: args must be a tuple of the inputs, such as (x,), not a {type(args).__name__}"
        )
    # backend "cpu": one operator, for any length
    with torch.no_grad(), scan_backend("cpu"), exported_as("grid_sample"), _ShortProgram(), without_fake_tensor_cache():
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
        )


class _ShortProgram(TorchFunctionMode):
    """Replaces `deformmamba::scan` while the model is traced; a decomposition afterwards would trace it twice.

    It also leaves out conversions to the dtype that a tensor has already. PyTorch would write two operations for each.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and not kwargs and len(args) == 2 and args[1] is args[0].dtype:
            return args[0]
        run = _scan_by_steps if func is torch.ops.deformmamba.scan.default else func
        return run(*args, **(kwargs or {}))


def _scan_by_steps(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    height: int,
    width: int,
    delta_softplus: bool,
    zoh: bool,
    keep: bool,
    delta_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`deformmamba::scan` as a loop over chunks of steps for a graph, all directions at once; with the same shapes.

    The time of an export, and of loading its file, is proportional to the number of operations. So u, dt, B and C are
    put into the order of the steps together. States are (k, b, g, n, r), because PyTorch's operations are several times
    faster along r than along the few n.
    """
    b, g, length, r = u.shape
    k, n = A.shape[0], A.shape[-1]
    if delta_weight is not None:
        delta = delta @ delta_weight.mT[:, None]
    dt = step_sizes(delta, delta_bias, delta_softplus)
    x = torch.cat([u.expand(k, *u.shape), dt, B, C], -1)  # (k, b, g, l, 2 * (r + n)), pixels row by row
    if k == 4:  # rows, columns, rows from the end, columns from the end
        x = torch.stack([x[::2], _transposed(x[1::2], height, width)], 1).flatten(0, 1)
    if k > 1:
        x = torch.cat([x[: k // 2], x[k // 2 :].flip(3)])
    x = x.movedim(3, 0)
    # zeros at the end change nothing; at least one, so that no size can be 0
    chunks = length // STEPS + 1
    x = torch.cat([x, x.new_zeros(chunks * STEPS - length, *x.shape[1:])]).unflatten(0, (chunks, STEPS))

    def chunk(h: Tensor, x: Tensor, A: Tensor) -> list[Tensor]:
        u, dt, B, C = x.split([r, r, n, n], -1)
        decay, phi = discretize(dt[..., None, :], A, zoh)
        entering = B[..., None] * (phi * u[..., None, :])
        states = []
        for factor, term in zip(decay.unbind(0), entering.unbind(0), strict=True):
            h = torch.addcmul(term, factor, h)
            states.append(h)
        return [h, (C[..., None, :] @ torch.stack(states)).squeeze(-2)]

    h = A.new_zeros(k, b, g, n, r) if initial_state is None else initial_state.mT.contiguous()
    last, ys = scan_operator()(chunk, (h,), (x,), (A[:, None].mT.clone(memory_format=torch.contiguous_format),))
    y = ys.flatten(0, 1)[:length].movedim(0, 3)  # (k, b, g, l, r)
    if k > 1:
        y = y[: k // 2] + y[k // 2 :].flip(3)
    total = y[0] + _transposed(y[1:], width, height)[0] if k == 4 else y[0]
    return total if D is None else total + D.sum(0)[:, None] * u, last.mT, A.new_empty(k, b, g, 0, n, r)


def _transposed(x: Tensor, height: int, width: int) -> Tensor:
    """Reorders (k, b, g, height * width, ...) from row-major to column-major."""
    return x.unflatten(3, (height, width)).transpose(3, 4).flatten(3, 4)


def write(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    """Writes a program of `portable_program`."""
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})


def runner(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, without gradients."""
    with expressions_parsed_once():
        program = torch.export.load(path).module()

    @torch.no_grad()
    def run(inputs: dict[str, Tensor]) -> Tensor:
        result: Tensor = program(**inputs)
        return result

    return run
