"""Exports models to files that run without this package: ONNX, OpenVINO, or PyTorch's pt2.

A file is kept only if it gives the same result as the model, on slices of a real scan. Its metadata are in
`Export.facts`.
"""

import copy
import json
import logging
import operator
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformmamba import __version__
from deformmamba.annotations import check_types
from deformmamba.atomic import renamed, renamed_pair, sweep
from deformmamba.data.thick_slices import HIGH, LOW, trained_on
from deformmamba.errors import DeformMambaError, InvalidType, innermost, one_line, shown
from deformmamba.export import onnx, openvino, pt2
from deformmamba.export.pt2 import FACTS, portable_program
from deformmamba.export.whole_slice import NO_FLOOR, WholeSlice, skip_of
from deformmamba.inference.networks import network, unwrapped
from deformmamba.inference.provenance import weights_name
from deformmamba.inference.settings import Settings
from deformmamba.inference.upscaling import Upscaling, scan_units
from deformmamba.models import SRModel
from deformmamba.models.skip import SKIPS
from deformmamba.physics.consistency import Consistency, check_consistency
from deformmamba.physics.edges import NEAR
from deformmamba.tensors import on_cpu_by_default
from deformmamba.volume import Volume, intensity_scale
from deformmamba.weights import license_of

__all__ = [
    "FACTS",
    "FORMATS",
    "INPUTS",
    "TOLERANCE",
    "VARIANTS",
    "Export",
    "ExportError",
    "export",
    "portable_program",
]

FORMATS = ("onnx", "openvino", "pt2")
INPUTS = ("lr", "lr,units", "lr,base")
VARIANTS = tuple(onnx.OPSETS)
TOLERANCE = 1e-4  # of an image of about [0, 1]
LARGEST = 16384  # largest h and w in pixels
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "pt2": ()}
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
NAMES = {"onnx": "ONNX", "openvino": "OpenVINO", "pt2": "pt2"}


class ExportError(DeformMambaError, ValueError):
    """The model cannot be exported, or the file gives another result; no file is left."""


@dataclass
class Export:
    """An exported file, compared with its model.

    Attributes:
        path: the file.
        difference: the largest absolute difference between file and model over all compared images, as a share of the
            intensity scale.
        sizes: the (h, w) of those images.
        facts: the file's metadata: name, class, config, scale, grid, inputs, sizes, normalisation, trained voxel sizes,
            slice direction, licence, sha256 of the weights, provenance.
    """

    path: Path
    difference: float
    sizes: list[tuple[int, int]]
    facts: dict[str, str]


@on_cpu_by_default
def export(
    model: SRModel | nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str,
    size: tuple[int, int] | None = None,
    inputs: str = "lr",
    consistency: Consistency | None = None,
    variant: str = "scan",
    tolerance: float = TOLERANCE,
) -> Export:
    """Writes the model to a file, runs the file on a real image, compares with the model, and keeps it if they agree.

    With inputs "lr" the file takes `lr`, whole slices (b, c, h, w) in the scanner's units, and gives `sr`
    (b, c, scale * h, scale * w) in the same units, as `upscale` for each slice. The file includes normalisation,
    zero-filling and data consistency. A second input `units` (3,) holds the intensities of the whole scan (see
    `WholeSlice.forward`); zeros: each slice separately. In an ONNX file `units` is optional, unless inputs is
    "lr,units": some runtimes, such as ONNX Runtime for the browser, cannot set an input that has a default.

    Args:
        model: any SRModel, also inside `DataParallel`, `torch.compile` or an averaged model; or a name of weights as in
            `from_pretrained`. Exported in eval mode, float32, for the CPU. The model itself is unchanged.
        path: replaced if it exists, only after the comparison. OpenVINO: ends in .xml; the weights go into a .bin file
            beside it.
        format: "onnx" (ONNX Runtime) and "openvino" need the extra `export`; "pt2"
            (`torch.export.load(path).module()`) needs only torch, and its scan is a slow loop in Python.
        size: (h, w) of `lr`, fixed, with b = 1. None: any b, and any h and w from `minimum_size` in the facts to
            LARGEST; two sizes are compared.
        inputs: "lr", "lr,units", or "lr,base": the network alone, for a caller who cuts tiles. Then `lr` is about
            [0, 1], and a model with a global skip also takes `base` (b, c, scale * h, scale * w), the matching part of
            the WHOLE slice's base image (`SRModel.whole_slice`). A model for any intensity takes `norm` (b, c, 2) too,
            the range of the WHOLE slice.
        consistency: inside the file, as in `upscale`; None: the best mode for the weights. Not for inputs "lr,base".
        variant: how an ONNX file computes the selective scan. "scan": loops of opset 20, fast on a CPU.
            "linear-attention": the operator LinearAttention of opset 27, for runtimes with a fast one on a GPU; on the
            CPU it is slower. Needs onnx and ONNX Runtime with this operator.
        tolerance: the largest accepted difference between file and model.

    Raises:
        ExportError: an unknown format or setting, a size the model does not take, a missing package, an unsupported
            operation, a folder or a disk that cannot be written, or a file that differs by more than `tolerance`.
        InvalidType: an argument of a wrong type.
    """
    model = _model(model)
    check_types(export, locals())
    path = Path(path)
    if not 0 < tolerance < 1:
        raise ExportError(f"tolerance is {tolerance:g}; it must be a share of the intensity scale, between 0 and 1")
    size = None if size is None else _checked_size(size, _least(model, inputs))
    how = _checked(model, path, format, inputs, consistency, variant)
    model = copy.deepcopy(model).cpu().float().eval()
    smallest = smallest_side(model, inputs)
    sizes = [size] if size else [(max(33, smallest), max(22, smallest)), (smallest + 7, 48)]
    facts = _facts(model, size, smallest, inputs, how)
    if format == "openvino":
        facts["compile_with"] = json.dumps(openvino.SETTINGS)
    if format == "onnx":
        facts["variant"] = variant
    with _quiet(), torch.no_grad():
        images = [_images(model, h, w, 1 if size else 2, inputs, how, own=bool(k)) for k, (h, w) in enumerate(sizes)]
        if not all(image.wanted.isfinite().all() for image in images):
            raise ExportError(
                f"{type(model).__name__} gives NaN or infinite values on slices of a real scan, so a file could not be "
                "compared with it; check its weights"
            )
        exported: nn.Module = model if inputs == "lr,base" else WholeSlice(model, how).eval()
        with _written(path, format) as temporary:
            optional = format == "onnx" and inputs == "lr"
            free = None if size else smallest
            _write(exported, model, format, temporary, images[0].inputs, free, facts, optional, variant)
            difference = _difference(format, temporary, images)
            if not difference <= tolerance:
                raise ExportError(
                    f"{path}: the exported {type(model).__name__} differs from the model by {difference:.3g}, more "
                    f"than {tolerance:g}, so the file was removed; please report it with the versions of torch and "
                    f"{NAMES[format]}"
                )
    return Export(path, difference, sizes, facts)


def _model(given: Any) -> SRModel:
    """The model to export, loaded if `given` is a name, and without a wrapper."""
    try:
        model: SRModel = unwrapped(network(given))
    except InvalidType:
        raise InvalidType(
            f"export: the model is a {type(given).__name__}; give a model of deformmamba or the name of weights: "
            'export(model, path, format="onnx")'
        ) from None
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise InvalidType('export: on the device "meta" weights have no values; load the model with from_pretrained')
    return model


def _least(model: SRModel, inputs: str) -> int:
    """The smallest h and w in pixels of a file for one size."""
    return max(model.minimum_size, 1 if inputs == "lr,base" else NEAR if model.robust_edges else 4)


def _checked_size(size: Any, least: int) -> tuple[int, int]:
    """`size` as two integers."""
    try:
        h, w = (operator.index(n) for n in size)
        allowed = least <= min(h, w) <= max(h, w) <= LARGEST
    except (TypeError, ValueError):
        allowed = False
    if not allowed:
        raise ExportError(f"size is {shown(size)}; it must be (h, w) of {least} to {LARGEST} each")
    return h, w


def _checked(
    model: SRModel, path: Path, format: str, inputs: str, consistency: Consistency | None, variant: str
) -> Consistency:
    """Checks all other arguments and returns the consistency to export."""
    if format not in FORMATS:
        raise ExportError(f"unknown export format {format!r}; formats: {', '.join(FORMATS)}")
    if inputs not in INPUTS:
        raise ExportError(f'inputs is {inputs!r}; it must be "lr", "lr,units" or "lr,base"')
    if variant not in VARIANTS or (variant != "scan" and format != "onnx"):
        raise ExportError(
            f'variant is {variant!r}; it must be "scan", or with format "onnx" one of {", ".join(VARIANTS)}'
        )
    if inputs == "lr,base" and consistency not in (None, "off"):
        raise ExportError(
            f'consistency is {consistency!r}; a file with inputs "lr,base" contains the network alone; use inputs "lr"'
        )
    _check_path(path, format)
    if inputs != "lr,base" and model.channels not in (None, 1):
        raise ExportError(
            f"{type(model).__name__} takes {model.channels} channels; a file for whole slices takes one, use inputs "
            '"lr,base"'
        )
    if inputs != "lr,base" and model.scale > 1 and skip_of(model) not in SKIPS:
        raise ExportError(
            f"{type(model).__name__} has the skip {skip_of(model)!r}; a file for whole slices computes "
            f'{", ".join(map(repr, SKIPS[1:]))} only, use inputs "lr,base"'
        )
    missing = [name for name in NEEDS[format] if not _imports(name)]
    if missing:
        raise ExportError(
            f"{NAMES[format]} needs {', '.join(missing)}; install it with: pip install 'deformmamba[export]'"
        )
    if format == "onnx" and (known := onnx.newest_opset()) < onnx.OPSETS[variant]:
        raise ExportError(
            f"variant {variant!r} needs opset {onnx.OPSETS[variant]}, and the installed onnx has {known}; install a "
            "newer one with: pip install --upgrade onnx onnxruntime"
        )
    try:
        how = model.consistency if consistency is None else check_consistency(consistency)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if how != "off" and (model.grid != "origin" or model.scale == 1):
        raise ExportError(
            f"consistency {how!r} needs a model on the origin grid with a scale of at least 2; "
            f'{type(model).__name__} has grid {model.grid!r} and scale {model.scale}; use "off"'
        )
    return how


def _check_path(path: Path, format: str) -> None:
    """Checks that `path` can be written, before a minute of computation, and removes what killed exports left there."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long; ValueError: a NUL in it
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ExportError(f"{shown(str(path))}: a file cannot have this name: {reason}; choose another one") from error
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        example = path / f"model{ENDINGS[format]}"
        raise ExportError(f"{path} is a folder; give the name of a file in it, such as {example}")
    if format == "openvino" and path.suffix != ".xml":
        raise ExportError(f"{path}: an OpenVINO file must end in .xml; its weights go into a .bin file beside it")
    if path.suffix.lower() in ENDINGS.values() and path.suffix.lower() != ENDINGS[format]:
        raise ExportError(f"{path}: format is {format!r}, whose files end in {ENDINGS[format]}; change one of them")
    for file in (path, path.with_suffix(".bin")) if format == "openvino" else (path,):
        if file.exists() and not file.is_file():
            raise ExportError(f"{file} is not a regular file; choose another name")
    sweep(path.parent)
    try:
        with tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent):
            pass
    except OSError as error:
        raise ExportError(f"{path}: cannot write to its folder: {error.strerror}; choose another folder") from error


def _facts(
    model: SRModel, size: tuple[int, int] | None, smallest: int, inputs: str, consistency: Consistency
) -> dict[str, str]:
    """The metadata as strings, which ONNX requires; other types are encoded as JSON."""
    scaled = f"(b, c, {model.scale} * h, {model.scale} * w)"
    whole = inputs != "lr,base"
    rule = "1st to 99th percentile of each slice" if model.any_intensity else model.intensity
    if whole:
        described = {
            "lr": "float32 (b, c, h, w), whole slices in the scanner's units",
            "units": "float32 (3,): intensity that counts as 0, intensity that counts as 1 less the former, lowest "
            f"value of the result in these units ({NO_FLOOR:g}: any); zeros: each slice by itself, as `upscale` does "
            "for models of any intensity",
        }
    else:
        about = f"of about [0, 1]: divide by the intensity {rule} of the LR volume"
        described = {"lr": f"float32 (b, c, h, w) {'of any intensity' if model.any_intensity else about}"}
        if _takes_base(model):
            described["base"] = f"float32 {scaled}: the cut of SRModel.whole_slice(whole slice) at the place of lr"
        if model.any_intensity:
            described["norm"] = (
                "float32 (b, c, 2): of the sorted n pixels of the whole slice, the one at index n // 100, and the one "
                "at n - 1 - n // 100 minus the first; SRModel.whole_slice gives it too"
            )

    return {
        "producer": f"deformmamba {__version__}, torch {torch.__version__}",
        "name": weights_name(model) or "",
        "sha256": model.sha256 or "",
        "licence": license_of(model.sha256, model.provenance) or "",
        "class": type(model).__name__,
        "config": json.dumps(model.config),
        "scale": str(model.scale),
        "grid": model.grid,
        "normalisation": rule,
        "spacings_mm": json.dumps(model.provenance.get("spacings_mm")),
        "slice_direction": json.dumps(_slice_direction(model)),
        "consistency": consistency if whole else "off",
        "inputs": json.dumps(described),
        "output": f"sr, float32 {scaled}" + (", in the scanner's units" if whole else ""),
        "size": f"{size[0]}x{size[1]}, batch 1" if size else "free",
        "minimum_size": str(min(size) if size else smallest),
        "provenance": json.dumps(model.provenance),
    }


def _slice_direction(model: SRModel) -> dict[str, Any] | None:
    """Use and training data of weights for the slice direction, which `isotropic` uses; None for other weights."""
    data = trained_on(model.provenance)
    if data is None:
        return None
    ratios, boxcar = data["ratio"], data["boxcar"]
    pixels = model.provenance.get("spacings_mm")
    distances = [round(pixels[k] * ratios[k], 4) for k in (0, 1)] if pixels else None
    return {
        "axis": "h",
        "lr": "sections across the slices; slices first interpolated along h to the pixel size by a cubic spline",
        "units": f"of the whole scan: low, high - low, and -low / (high - low) or {NO_FLOOR:g} for data with a sign; "
        f"low is percentile {LOW:g} of the scan, and high percentile {HIGH:g} of the voxels above low",
        "ratios": list(ratios),
        "thickness": list(data["thickness"]),
        "profiles": {"gaussian": round(1 - boxcar, 4), "boxcar": boxcar},
        "slice_distances_mm": distances,
    }


def _takes_base(model: SRModel) -> bool:
    return getattr(model, "skip", None) is not None


@dataclass
class _TestImages:
    """The inputs for a file, and the expected result.

    Attributes:
        inputs: by name.
        wanted: the model's result.
        unit: the intensity that counts as 1.
    """

    inputs: dict[str, Tensor]
    wanted: Tensor
    unit: float

    def difference(self, got: Tensor) -> float:
        """The largest difference, as a share of the unit; infinite if the file gives NaN or another shape."""
        if got.shape != self.wanted.shape or not got.isfinite().all():
            return float("inf")
        return float((got - self.wanted).abs().max()) / self.unit


def smallest_side(model: SRModel, inputs: str = "lr") -> int:
    """The smallest h and w in pixels of a file with free sizes."""
    if inputs == "lr,base":
        return max(model.minimum_size, model.multiple + 1, 2)
    return max(model.minimum_size, model.multiple + 1, NEAR if model.robust_edges else 5)


def _images(
    model: SRModel, h: int, w: int, batch: int, inputs: str, consistency: Consistency, *, own: bool
) -> _TestImages:
    """Slices of a brain (real, from nibabel's test data), and the model's result.

    `own`: normalise each slice by its own intensities, not by those of the stack.
    """
    import nibabel

    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise ExportError(
            "nibabel's example scan, on which the file is checked, is missing; reinstall nibabel with pip"
        )
    volume = np.asarray(nibabel.load(path).dataobj[..., 0], np.float32)  # type: ignore[attr-defined]
    middle = volume.shape[2] // 2
    slices = np.moveaxis(volume, 2, 0)[middle : middle + batch]
    top, left = (max(0, (have - want) // 2) for have, want in zip(slices.shape[1:], (h, w), strict=True))
    cut = slices[:, top : top + h, left : left + w]
    raw = np.pad(cut, [(0, 0), (0, h - cut.shape[1]), (0, w - cut.shape[2])], mode="symmetric").astype(np.float32)
    channels = model.channels or 1
    lr = torch.from_numpy(raw)[:, None].repeat(1, channels, 1, 1)
    if inputs == "lr,base":
        lr = lr / float(np.percentile(volume, 99.9))
        further = model.whole_slice(lr)
        if not _takes_base(model):
            further.pop("base", None)
        return _TestImages({"lr": lr, **further}, model(lr, **further), 1.0)
    units = scan_units(model, raw)
    floor = NO_FLOOR if units.floor is None else units.floor
    given = {"lr": lr, "units": torch.zeros(3) if own else torch.tensor([units.zero, units.scale, floor])}
    stacks = [raw[k : k + 1] for k in range(batch)] if own else [raw]
    settings = Settings(axis=0, consistency=consistency)
    jobs = [Upscaling(model, Volume(stack, np.eye(4), codes=(0, 0)), settings) for stack in stacks]
    sharp = np.concatenate([job.result() for job in jobs])
    unit = units.scale or intensity_scale(raw)
    return _TestImages(given, torch.from_numpy(sharp)[:, None].repeat(1, channels, 1, 1), float(unit))


def _write(
    module: nn.Module,
    model: SRModel,
    format: str,
    path: Path,
    inputs: dict[str, Tensor],
    smallest: int | None,
    facts: dict[str, str],
    optional: bool,
    variant: str,
) -> None:
    """Traces and writes. Sizes are free from `smallest` up, or fixed if None; `optional`: `units` has a default."""
    dims: dict[str, Any] | None = None
    if smallest is not None:
        b, h, w = (torch.export.Dim(n, min=m, max=LARGEST) for n, m in (("b", 1), ("h", smallest), ("w", smallest)))
        scaled = {0: b, 2: model.scale * h, 3: model.scale * w}
        dims = {name: {"lr": {0: b, 2: h, 3: w}, "base": scaled, "norm": {0: b}, "units": {}}[name] for name in inputs}
    try:
        hidden = [] if format == "pt2" else onnx.hide_blocks(module)
        program = portable_program(module, kwargs=inputs, dynamic_shapes=dims)
        if format == "pt2":
            pt2.write(program, path, facts)
            return
        # in OpenVINO a default value would become a constant
        defaults = {"units": np.zeros(3, np.float32)} if optional else {}
        if format == "onnx":
            onnx.write(program, hidden, path, list(inputs), facts, defaults, variant)
            return
        between = path.with_suffix(".onnx")
        try:
            onnx.write(program, hidden, between, list(inputs), facts, defaults)
            openvino.write(between, path, facts)
        finally:
            between.unlink(missing_ok=True)
    except OSError:  # a full disk
        raise
    except Exception as error:  # a tracer may raise anything on unsupported operations
        reason = innermost(error)  # it names the operation
        hint = "; a file for one size may work: give size=(h, w)" if "Constraints violated" in str(reason) else ""
        raise ExportError(
            f"torch {torch.__version__} cannot export {type(model).__name__} to {NAMES[format]}: "
            f"{type(reason).__name__}: {one_line(reason)}{hint}"
        ) from error


def _difference(format: str, path: Path, images: list[_TestImages]) -> float:
    """Runs the file on all images and returns the largest difference."""
    run: Callable[[dict[str, Tensor]], Tensor]
    try:
        run = {"onnx": onnx.runner, "openvino": openvino.runner, "pt2": pt2.runner}[format](path)
        return max(image.difference(run(image.inputs)) for image in images)
    except Exception as error:  # a runtime that is too old for the file's operators
        reason = innermost(error)
        raise ExportError(
            f"the installed {NAMES[format]} cannot run the exported file: {type(reason).__name__}: {one_line(reason)}; "
            "upgrade it with: pip install --upgrade 'deformmamba[export]'"
        ) from error


@contextmanager
def _written(path: Path, format: str) -> Iterator[Path]:
    """A temporary name that becomes `path` after the block, with the .bin file beside it for OpenVINO."""
    try:
        if format == "openvino":
            with renamed_pair(path, path.with_suffix(".bin")) as (temporary, _):
                yield temporary
        else:
            with renamed(path) as temporary:
                yield temporary
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporters' messages, which concern their internals only."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
