"""The settings of a training, checked once, and the learning rate schedule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from deformmamba.annotations import is_integer, is_number
from deformmamba.errors import InvalidArgument, InvalidType, shown

SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("no", "bf16", "fp16")
_LOWEST = {"batch": 1, "accumulate": 1, "every": 1}
_NUMBERS = ("batch", "accumulate", "lr", "weight_decay", "warmup", "gamma", "clip", "ema", "every", "workers", "seed")


@dataclass(frozen=True)
class FitSettings:
    """The settings of a call of `fit`, which documents each field.

    `samples` is the number of samples of the whole run: steps times batch, or epochs times the length of the data set.
    Numbers of numpy become Python's, so that a run with the same numbers has the same settings.

    Raises:
        InvalidArgument: an unknown schedule, or a number out of range.
        InvalidType: a milestone that is not a number.
    """

    samples: int
    batch: int
    accumulate: int
    lr: float
    weight_decay: float
    warmup: int
    schedule: str
    milestones: Sequence[float]
    gamma: float
    clip: float
    ema: float
    precision: str
    every: int
    workers: int
    seed: int

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InvalidArgument(f"fit: schedule is {shown(self.schedule)}; it must be one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise InvalidArgument(
                f"fit: precision is {shown(self.precision)}; it must be one of {', '.join(PRECISIONS)}"
            )
        for field in fields(self):
            if field.type in (int, float):
                object.__setattr__(self, field.name, plain_number(getattr(self, field.name)))
        if wrong := [milestone for milestone in self.milestones if not is_number(milestone)]:
            raise InvalidType(f"fit: a milestone is {shown(wrong[0])}; milestones are numbers, fractions of the run")
        object.__setattr__(self, "milestones", tuple(plain_number(milestone) for milestone in self.milestones))
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise InvalidArgument(
                f"fit: milestones are {list(self.milestones)}; they are fractions of the run, between 0 and 1"
            )
        for name in _NUMBERS:
            value, lowest = getattr(self, name), _LOWEST.get(name, 0)
            if not lowest <= value < (1 if name == "ema" else math.inf):
                raise InvalidArgument(
                    f"fit: {name} is {value}; it must be {lowest} or more{', and below 1' * (name == 'ema')}"
                )

    @property
    def n_steps(self) -> int:
        return math.ceil(self.samples / self.batch)

    def rate(self, step: int) -> float:
        """The learning rate at `step` as a share of the largest one."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "step":
            return float(self.gamma ** sum(step >= milestone * self.n_steps for milestone in self.milestones))
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(self.n_steps - self.warmup, 1)))

    def facts(self) -> dict[str, Any]:
        """The settings that must be equal for two runs to be the same. `workers` does not change the result."""
        plain = ("samples", "batch", "accumulate", "lr", "weight_decay", "warmup", "clip", "ema", "precision", "every")
        schedule = [self.schedule, *([list(self.milestones), self.gamma] if self.schedule == "step" else [])]
        return {**{name: getattr(self, name) for name in plain}, "schedule": schedule, "seed": self.seed}


def check_settings(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks the settings `given` for a run of unknown length; others have the values of `defaults`.

    Raises:
        InvalidArgument, InvalidType: as `FitSettings`.
    """
    values = {**defaults, **given, "samples": 1}
    FitSettings(**{field.name: values[field.name] for field in fields(FitSettings)})


def n_samples(n: int, steps: int | None, epochs: float | None, batch: int) -> int:
    """The number of samples of a run over a data set of `n`, from the number of steps or of epochs.

    Raises:
        InvalidArgument: an empty data set, both numbers or neither, zero samples, or a number that is not finite.
    """
    if not n:
        raise InvalidArgument("fit: the data set is empty")
    if (steps is None) == (epochs is None):
        raise InvalidArgument(f"fit: steps is {steps} and epochs is {epochs}; give exactly one")
    length = plain_number(epochs if steps is None else steps)
    if not -math.inf < length < math.inf:
        raise InvalidArgument(f"fit: epochs is {length}; it must be a finite number")
    samples = round(length * n) if steps is None else length * plain_number(batch)
    if samples < 1:
        raise InvalidArgument(f"fit: steps is {steps} and epochs is {epochs}; there is nothing to train")
    return samples


def plain_number(number: Any) -> Any:
    """A number of numpy or PyTorch as one of Python; its integers become int, others float."""
    if type(number) in (int, float):
        return number
    return number.__index__() if is_integer(number) else float(number)
