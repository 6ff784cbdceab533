"""Exports programs to PyTorch's pt2 format: `torch.export.load(path).module()` runs them without this package.

The selective scan is a loop (`torch.ops.higher_order.scan`), so that one file serves every size. Each round of the loop
computes `STEPS` time steps, because most of the time goes into starting a round.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deformmamba.scan import scan_backend
from deformmamba.scan.reference import discretize, step_sizes
from deformmamba.torch_private import scan_operator

STEPS = 32  # time steps in one round of the loop
FACTS = "deformmamba.json"  # the name of the facts inside a pt2 file


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
    """
    with torch.no_grad(), scan_backend("cpu"), _ScansBySteps():  # one operator, for any length
        return torch.export.export(
            module, args, kwargs, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
        )


class _ScansBySteps(TorchFunctionMode):
    """Replaces `deformmamba::scan` while the model is traced; a decomposition afterwards would trace it twice."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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

    States are (k, b, g, n, r), because PyTorch's operations are several times faster along r than along the few n.
    """
    b, g, _, r = u.shape
    k, n = A.shape[0], A.shape[-1]
    if delta_weight is not None:
        delta = delta @ delta_weight.mT[:, None]

    def walked(xs: list[Tensor]) -> Tensor:
        """(l, k, b, g, ...): the values for each direction at each step."""
        if k == 4:
            xs[1], xs[3] = (_transposed(x, height, width) for x in (xs[1], xs[3]))
        return torch.stack([x.flip(2) if i >= (k + 1) // 2 and k > 1 else x for i, x in enumerate(xs)]).movedim(3, 0)

    length = height * width
    chunks = length // STEPS + 1  # at least one step of padding, so that no size can be 0

    def chunked(x: Tensor) -> Tensor:
        """(chunks, STEPS, ...) of (l, ...), with zeros at the end: these steps change nothing."""
        padded = torch.cat([x, x.new_zeros(chunks * STEPS - length, *x.shape[1:])])
        return padded.reshape(chunks, STEPS, *x.shape[1:])

    def chunk(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
        decay, phi = discretize(dt[..., None, :], A, zoh)
        entering = B[..., None] * (phi * u[..., None, :])
        states = []
        for factor, term in zip(decay.unbind(0), entering.unbind(0), strict=True):
            h = torch.addcmul(term, factor, h)
            states.append(h)
        return [h, (C[..., None, :] @ torch.stack(states))[..., 0, :]]

    dt = step_sizes(delta, delta_bias, delta_softplus)
    steps = [chunked(walked(list(x))) for x in ([u] * k, dt, B, C)]
    h = A.new_zeros(k, b, g, n, r) if initial_state is None else initial_state.mT.contiguous()
    last, ys = scan_operator()(chunk, (h,), tuple(steps), (A[:, None].mT.clone(memory_format=torch.contiguous_format),))
    y = list(ys.flatten(0, 1)[:length].movedim(0, 3))
    y = [x.flip(2) if i >= (k + 1) // 2 and k > 1 else x for i, x in enumerate(y)]
    if k == 4:
        y[1], y[3] = (_transposed(x, width, height) for x in (y[1], y[3]))
    total = torch.stack(y).sum(0)
    return total if D is None else total + D.sum(0)[:, None] * u, last.mT, A.new_empty(k, b, g, 0, n, r)


def _transposed(x: Tensor, height: int, width: int) -> Tensor:
    """Reorders (b, g, height * width, ...) from row-major to column-major."""
    return x.unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)


def write(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    """Writes a program of `portable_program`."""
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})


def runner(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """The file as a function of its inputs by name, without gradients."""
    program = torch.export.load(path).module()

    @torch.no_grad()
    def run(inputs: dict[str, Tensor]) -> Tensor:
        result: Tensor = program(**inputs)
        return result

    return run
