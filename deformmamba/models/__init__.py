"""The models, by name; a checkpoint's header names one of them."""

import os
from dataclasses import replace

import torch

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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> SRModel:
    """The model of a checkpoint, of the class that its header names, in eval mode.

    To load a custom class, register it with `deformmamba.MODELS["MyModel"] = MyModel`, or call
    `MyModel.from_pretrained`.

    Args:
        name: a manifest name, a path, or `org/repo[@commit]`.
        device: where to put it; the CPU if None.
        dtype: of its weights; float32 if None.
        revision, cache_dir, token, local_files_only, force_download: see `deformmamba.weights.load_checkpoint`.

    Raises:
        WeightsError: no such weights, or a checkpoint whose contents do not match its header.
        InvalidArgument: the device is not available, or the model does not support the dtype.
    """
    checkpoint = load_checkpoint(
        name,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    if (found := MODELS.get(checkpoint.class_name)) is None:
        made = checkpoint.class_name
        raise WeightsError(
            f"{checkpoint.source} holds a {made}, which is not a model of this version ({', '.join(MODELS)}); upgrade "
            f'deformmamba, or register your own class first: deformmamba.MODELS["{made}"] = {made}'
        )
    # a class that is registered under another name than its own loads the files of that name
    return found.from_checkpoint(replace(checkpoint, class_name=found.__name__)).placed(device, dtype)
