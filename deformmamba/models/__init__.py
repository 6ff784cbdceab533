"""The models, by name; a checkpoint's header names one of them."""

import os

from deformmamba.models.base import SRModel
from deformmamba.models.deform_mamba import DeformMambaSR
from deformmamba.models.fmisr import FMISR
from deformmamba.models.interpolation import Bicubic, BSpline, ZeroFill
from deformmamba.models.srcnn import SRCNN
from deformmamba.models.t2net import T2Net
from deformmamba.models.transformers import HAT, SwinIR
from deformmamba.models.vdsr import VDSR
from deformmamba.weights import WeightsError, load_checkpoint

__all__ = [
    "FMISR",
    "HAT",
    "MODELS",
    "SRCNN",
    "VDSR",
    "BSpline",
    "Bicubic",
    "DeformMambaSR",
    "SRModel",
    "SwinIR",
    "T2Net",
    "ZeroFill",
    "from_pretrained",
]  # fmt: skip

MODELS: dict[str, type[SRModel]] = {
    "DeformMambaSR": DeformMambaSR,
    "Bicubic": Bicubic,
    "BSpline": BSpline,
    "ZeroFill": ZeroFill,
    "SRCNN": SRCNN,
    "VDSR": VDSR,
    "FMISR": FMISR,
    "T2Net": T2Net,
    "SwinIR": SwinIR,
    "HAT": HAT,
}


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> SRModel:
    """The model of a checkpoint, whichever class it is, in eval mode on the CPU.

    `name`: a manifest name, a path, or `org/repo[@commit]`, see `deformmamba.weights.load_checkpoint`.

    Raises:
        WeightsError: no such weights, or a checkpoint that is not exactly what it says.
    """
    checkpoint = load_checkpoint(name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if checkpoint.class_name not in MODELS:
        raise WeightsError(
            f"{checkpoint.source} holds a {checkpoint.class_name}, which this version does not know "
            f"({', '.join(MODELS)}); upgrade deformmamba"
        )
    return MODELS[checkpoint.class_name].from_checkpoint(checkpoint)
