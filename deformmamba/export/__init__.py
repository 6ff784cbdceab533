"""Models as files that run without this package, ONNX or PyTorch's own pt2: each proves itself before it is kept.

The selective scan becomes a loop over steps (an ONNX Scan; `torch.ops.higher_order.scan` in pt2), so that one file
serves every height and width. What a file needs to be used right stands in it: see `Export.facts`.
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformmamba import __version__
from deformmamba.atomic import renamed
from deformmamba.errors import DeformMambaError
from deformmamba.models import SRModel
from deformmamba.scan import scan_backend
from deformmamba.scan.reference import discretize, step_sizes

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # of an image of about [0, 1]
LARGEST = 16384  # pixels of h and w that a file with free sizes takes
FACTS = "deformmamba.json"  # the name of the facts inside a pt2 file


class ExportError(DeformMambaError, ValueError):
    """A model that cannot be exported, or a file that computes something else; says which, and no file is left."""


@dataclass
class Export:
    """A file that was written and compared with its model.

    Attributes:
        path: the file.
        difference: the largest absolute difference between file and model over all images that were compared.
        sizes: the (h, w) of those images.
        facts: what the file says of itself: class, config, scale, grid, inputs, sizes, intensity, provenance.
    """

    path: Path
    difference: float
    sizes: list[tuple[int, int]]
    facts: dict[str, str]


def export(
    model: SRModel,
    path: str | os.PathLike[str],
    *,
    format: str,
    size: tuple[int, int] | None = None,
    tolerance: float = TOLERANCE,
) -> Export:
    """Writes the model to a file, runs the file on a real image, compares with the model, and keeps it if they agree.

    The file takes `lr` (b, c, h, w) and gives `sr` (b, c, scale * h, scale * w), float32. A model with a global skip
    takes `base` (b, c, scale * h, scale * w) too, the zero-filled WHOLE slice (`model.whole_slice(lr)["base"]`, a
    Fourier transform, which stays outside the file; see `DeformMambaSR.forward`).

    Args:
        model: any of `MODELS`; exported in eval mode, float32, for the CPU. Left as it is.
        path: replaced if it exists, only once the new file has proved itself.
        format: "onnx" (runs in ONNX Runtime; needs the extra `export`) or "pt2" (`torch.export.load(path).module()`,
            which needs torch alone; its scan is a loop in Python, tens of times slower than this package's).
        size: (h, w) of `lr`, fixed, with b = 1. None: any b, and any h and w from `minimum_size` in the facts to
            LARGEST, and two sizes are compared.
        tolerance: the largest difference between file and model that is accepted.

    Raises:
        ExportError: an unknown format, a size the model does not take, a missing package, an operation that has no
            counterpart, or a file that differs by more than `tolerance`.
    """
    if format not in FORMATS:
        raise ExportError(f"export format {format!r} is not known; there are {' and '.join(FORMATS)}")
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; make it first")
    model = copy.deepcopy(model).cpu().float().eval()
    smallest = max(model.minimum_size, model.multiple + 1)
    if size is not None and (len(size) != 2 or min(size) < model.minimum_size):
        raise ExportError(f"size is {tuple(size)}; it must be (h, w) of at least {model.minimum_size} each")
    sizes = [(int(size[0]), int(size[1]))] if size else [(max(33, smallest), max(22, smallest)), (smallest + 7, 48)]
    facts = _facts(model, size, smallest)
    images = [_inputs(model, h, w, 1 if size else 2) for h, w in sizes]

    with renamed(path) as temporary:
        with _quiet(), torch.no_grad():
            program = _program(model, images[0], None if size else smallest)
            (_write_onnx if format == "onnx" else _write_pt2)(program, temporary, list(images[0]), facts)
            difference = max(_differences(model, temporary, format, images))
        if not difference <= tolerance:
            raise ExportError(
                f"{path}: the exported {type(model).__name__} differs from the model by {difference:.3g}, more than "
                f"{tolerance:g}; not kept; please report it with the versions of torch and onnxruntime"
            )
    return Export(path, difference, sizes, facts)


def _facts(model: SRModel, size: tuple[int, int] | None, smallest: int) -> dict[str, str]:
    """Strings, as ONNX metadata wants; what is no string is JSON."""
    scaled = f"(b, c, {model.scale} * h, {model.scale} * w)"
    units = f"of about [0, 1]: divide by the intensity {model.intensity} of the LR volume"
    inputs = {"lr": f"float32 (b, c, h, w) {'of any intensity' if model.any_intensity else units}"}
    if _takes_base(model):
        inputs["base"] = (
            f"float32 {scaled}: lr of the whole slice, zero-filled in k-space to {model.scale} times its size"
            + (
                " after its edges, see deformmamba.physics.edges"
                if getattr(model, "skip", "") == "zero-fill-edges"
                else ""
            )
        )
    return {
        "producer": f"deformmamba {__version__}, torch {torch.__version__}",
        "class": type(model).__name__,
        "config": json.dumps(model.config),
        "scale": str(model.scale),
        "grid": model.grid,
        "inputs": json.dumps(inputs),
        "output": f"sr, float32 {scaled}",
        "size": f"{size[0]}x{size[1]}, batch 1" if size else "free",
        "minimum_size": str(min(size) if size else smallest),
        "provenance": json.dumps(model.provenance),
    }


def _takes_base(model: SRModel) -> bool:
    return getattr(model, "skip", None) is not None


def _inputs(model: SRModel, h: int, w: int, batch: int) -> dict[str, Tensor]:
    """A brain (real, from nibabel's test data) as the network gets it: (batch, c, h, w) slices and their base."""
    import nibabel

    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise ExportError(
            "the scan that nibabel brings along, to compare on, is not installed; reinstall nibabel with pip"
        )
    volume = np.asarray(nibabel.load(path).dataobj[..., 0], np.float32)  # type: ignore[attr-defined]
    middle = volume.shape[2] // 2
    channels = model.channels or 1
    slices = np.moveaxis(volume, 2, 0)[middle : middle + batch, None] / np.percentile(volume, 99.9)
    top, left = (max(0, (have - want) // 2) for have, want in zip(slices.shape[2:], (h, w), strict=True))
    cut = slices[:, :, top : top + h, left : left + w]
    missing = [(0, 0), (0, 0), (0, h - cut.shape[2]), (0, w - cut.shape[3])]
    lr = torch.from_numpy(np.pad(cut, missing, mode="symmetric").astype(np.float32)).repeat(1, channels, 1, 1)
    return {"lr": lr, "base": model.whole_slice(lr)["base"]} if _takes_base(model) else {"lr": lr}


def _program(model: SRModel, inputs: dict[str, Tensor], smallest: int | None) -> torch.export.ExportedProgram:
    """The model as a graph of PyTorch's own operations; sizes are free from `smallest` on, or fixed if it is None."""
    dims: dict[str, Any] | None = None
    if smallest is not None:
        b, h, w = (torch.export.Dim(n, min=m, max=LARGEST) for n, m in (("b", 1), ("h", smallest), ("w", smallest)))
        dims = {"lr": {0: b, 2: h, 3: w}, "base": {0: b, 2: model.scale * h, 3: model.scale * w}}
        dims = {name: dims.get(name) for name in inputs} | ({} if "base" in inputs else {"base": None})
    arguments = {"lr": inputs["lr"], "base": inputs.get("base")}
    try:
        return portable_program(model, kwargs=arguments, dynamic_shapes=dims)
    except Exception as error:  # whatever a tracer raises on operations that it cannot hold
        raise ExportError(_failed(model, error)) from error


def portable_program(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """`torch.export.export` of a module that holds any of our blocks, as a program that runs without this package.

    `torch.export.export` itself works on the blocks too, and keeps `deformmamba::scan` as it is: fast, but it runs
    only where this package is. Here each scan is a loop over steps, which `torch.onnx.export(program, dynamo=True)`
    turns into an ONNX Scan. Arguments as in `torch.export.export`; tensors on the CPU; gradients are not exported.
    A free size is a `torch.export.Dim` with min=2 (a model: `multiple + 1`): PyTorch treats size 1 as special.
    """
    with torch.no_grad(), scan_backend("cpu"):  # one operator, whatever the length
        program = torch.export.export(
            module, args, kwargs, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        return program.run_decompositions({torch.ops.deformmamba.scan.default: _scan_by_steps})


def _scan_by_steps(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    height: int,
    width: int,
    softplus: bool,
    zoh: bool,
    keep: bool,
    mix: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`deformmamba::scan` as a loop over steps that a graph can hold, all directions at once; shapes as there."""
    from torch._higher_order_ops.scan import scan_op

    b, g, _, r = u.shape
    k, n = A.shape[0], A.shape[-1]
    if mix is not None:
        delta = torch.einsum("kbglq,kgrq->kbglr", delta, mix)

    def walked(xs: list[Tensor]) -> Tensor:
        """(l, k, b, g, ...): what each direction meets at each step."""
        if k == 4:
            xs[1], xs[3] = (_transposed(x, height, width) for x in (xs[1], xs[3]))
        return torch.stack([x.flip(2) if i >= (k + 1) // 2 and k > 1 else x for i, x in enumerate(xs)]).movedim(3, 0)

    def step(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
        a, phi = discretize(dt[..., None], A, zoh)
        h = a * h + phi * u[..., None] * B[..., None, :]
        return [h, (h * C[..., None, :]).sum(-1)]

    dt = step_sizes(delta, bias, softplus)
    steps = [walked(list(x)).contiguous() for x in ([u] * k, dt, B, C)]
    h = A.new_zeros(k, b, g, r, n) if state is None else state.clone()
    last, ys = scan_op(step, (h,), tuple(steps), (A[:, None].clone(),))
    y = list(ys.movedim(0, 3))
    y = [x.flip(2) if i >= (k + 1) // 2 and k > 1 else x for i, x in enumerate(y)]
    if k == 4:
        y[1], y[3] = (_transposed(x, width, height) for x in (y[1], y[3]))
    total = torch.stack(y).sum(0)
    return total if D is None else total + D.sum(0)[:, None] * u, last, A.new_empty(k, b, g, 0, n, r)


def _transposed(x: Tensor, height: int, width: int) -> Tensor:
    """(b, g, height * width, ...), row by row, as column by column."""
    return x.unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)


def _write_pt2(program: torch.export.ExportedProgram, path: Path, names: list[str], facts: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})


def _write_onnx(program: torch.export.ExportedProgram, path: Path, names: list[str], facts: dict[str, str]) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _imports(name)]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}; install it with: pip install 'deformmamba[export]'")
    try:
        # ONNX Runtime optimizes when it loads; onnxscript's optimizer takes minutes and gains nothing on top
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=False, input_names=names, output_names=["sr"]
        )
        assert exported is not None
        exported.model.metadata_props.update(facts)
        exported.save(path, external_data=False)
    except Exception as error:  # as above
        raise ExportError(_failed(None, error)) from error


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _failed(model: SRModel | None, error: Exception) -> str:
    what = type(model).__name__ if model else "the program"
    reason = " ".join(str(error).split())[:300]
    return f"torch {torch.__version__} cannot export {what}: {type(error).__name__}: {reason}"


def _differences(model: SRModel, path: Path, format: str, images: list[dict[str, Tensor]]) -> Iterator[float]:
    """The largest difference between file and model for each of the images; infinite where the file gives NaN."""
    run = _onnx_runner(path) if format == "onnx" else _pt2_runner(path)
    for inputs in images:
        wanted = model(**inputs)
        got = run(inputs)
        if got.shape != wanted.shape or not got.isfinite().all():
            yield float("inf")
        else:
            yield float((got - wanted).abs().max())


def _onnx_runner(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(["sr"], {k: v.numpy() for k, v in inputs.items()})[0])


def _pt2_runner(path: Path) -> Any:
    program = torch.export.load(path).module()
    return lambda inputs: program(lr=inputs["lr"], base=inputs.get("base"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own remarks, which are about their insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
