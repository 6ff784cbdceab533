"""The settings of one upscaling, checked on creation: an unknown name is a TypeError, other errors name the value."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from deformmamba.annotations import is_integer
from deformmamba.errors import InvalidArgument, InvalidType, did_you_mean, shown
from deformmamba.physics.consistency import Consistency, check_consistency
from deformmamba.tensors import check_device
from deformmamba.volume.image import check_axis


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Raises InvalidType for a name of a setting that is not known."""
    for name in given:
        if name not in known:
            raise InvalidType(
                f"there is no setting {name!r}{did_you_mean(name, known)}; settings are {', '.join(known)}"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `upscale` and of all functions that build on it; `upscale` documents each setting.

    Raises:
        TypeError: an unknown name.
        ValueError: a value that is not allowed.
        VolumeError: an axis that is not 0, 1 or 2.
    """

    axis: int | None = None
    batch_size: int | None = None
    consistency: Consistency | None = None
    ensemble: bool = False
    tile: int | None = None
    overlap: int | None = None
    device: str | torch.device | None = None
    progress: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings of these names and values. Raises InvalidType for an unknown name."""
        check_names(given, [field.name for field in fields(cls)])
        return cls(**given)

    def __post_init__(self) -> None:
        if self.axis is not None:
            check_axis(self.axis)
        for name in ("axis", "batch_size", "tile", "overlap"):
            if is_integer(getattr(self, name)):  # numpy's integers of a few bits would overflow
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.consistency is not None:
            check_consistency(self.consistency)
        for name, least in (("batch_size", 1), ("tile", 1), ("overlap", 0)):
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < least):
                raise InvalidArgument(f"{name} must be an integer of {least} or more, or None, not {shown(value)}")
        if isinstance(self.device, str):
            try:
                torch.device(self.device)  # only the name: a process that forks later must not initialise a GPU
            except RuntimeError:
                check_device(self.device)
        for name in ("ensemble", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidType(f"{name} must be True or False, not {shown(getattr(self, name))}")
        if self.tile is None and self.overlap is not None:
            raise InvalidArgument(f"an overlap of {self.overlap} needs tiles: give tile=N (--tile N) as well")
