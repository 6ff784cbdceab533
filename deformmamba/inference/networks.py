"""Finds the model that `upscale` runs: loads a name, unwraps PyTorch's wrappers, and rejects other objects."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deformmamba.data.thick_slices import trained_on
from deformmamba.errors import InvalidArgument, InvalidType
from deformmamba.models import from_pretrained
from deformmamba.models.base import SRModel
from deformmamba.torch_private import uncompiled
from deformmamba.volume import MGH_SUFFIXES, NIFTI_SUFFIXES


class _Wrapped:
    """A wrapper (DataParallel, a compiled or an averaged model) with the attributes of the SRModel inside."""

    def __init__(self, wrapper: nn.Module, inside: SRModel) -> None:
        self._wrapper, self._inside = wrapper, inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)


def network(model: Any) -> Any:
    """Takes an SRModel, a wrapper of one, or a name as in `from_pretrained`; returns an object that acts as an SRModel.

    Raises:
        InvalidType: no model, for example because the arguments are swapped.
    """
    if isinstance(model, _Wrapped):
        return model
    if isinstance(model, (str, os.PathLike)):
        if Path(model).name.lower().endswith((*NIFTI_SUFFIXES, *MGH_SUFFIXES, ".dcm")):
            raise InvalidType(f"{model}: a scan was given as the model; write upscale(model, scan)")
        return from_pretrained(model)
    inside = model
    while isinstance(inside, nn.Module) and not isinstance(inside, SRModel):
        inner = uncompiled(inside) or getattr(inside, "module", None)
        if inner is None:
            break
        inside = inner
    if not isinstance(inside, SRModel):
        raise InvalidType(
            f"the model is a {type(model).__name__}; give a model of deformmamba or the name of weights: "
            "upscale(model, scan)"
        )
    return model if inside is model else _Wrapped(model, inside)


def unwrapped(model: Any) -> Any:
    """The SRModel inside the result of `network`."""
    return model._inside if isinstance(model, _Wrapped) else model


def check_in_plane(model: Any) -> None:
    """Raises InvalidArgument for weights that were trained for the slice direction."""
    if trained_on(model.provenance) is not None:
        raise InvalidArgument(
            "these weights work along the slice direction and do not upscale slices; use deformmamba isotropic"
        )


def check_precision(model: Any) -> torch.dtype:
    """The dtype in which the model computes.

    Raises:
        InvalidType: half precision, or weights without values.
    """
    if any(p.is_meta for p in model.parameters()):
        raise InvalidType('on the device "meta" weights have no values; load the model with from_pretrained')
    dtype: torch.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise InvalidType(
            f"the model's weights are {str(dtype).removeprefix('torch.')}; this function takes float32 or float64 "
            "(model.float()); for half precision use torch.autocast around it"
        )
    return dtype


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode in the block; afterwards each module has its mode of before, also if these differ."""
    wrapper = model._wrapper if isinstance(model, _Wrapped) else model
    with modes_kept(wrapper):
        wrapper.eval()
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """After the block, every module inside `module` is in training or evaluation mode as it was before."""
    before = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def is_compiled(model: Any) -> bool:
    return isinstance(model, _Wrapped) and uncompiled(model._wrapper) is not None
