"""Time and validation of the trainings of a table: steps in a number of minutes, and scores during a training."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from deformmamba.data.patches import PatchDataset
from deformmamba.data.scans import Scan
from deformmamba.evaluation.compare import evaluate, mean_scores
from deformmamba.losses import SRLoss
from deformmamba.metrics import Protocol
from deformmamba.models import SRModel
from deformmamba.physics.degradations import Degradation

VALIDATION_SLICES = 6  # of each volume, for learning rates and curves


def clock(device: str | torch.device) -> Callable[[], float]:
    """A clock in seconds: CPU time on one CPU thread, so that other programs do not count; elsewhere wall-clock time.

    The CPU time of several threads would grow with their number.
    """
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread else time.perf_counter


def seconds_a_step(
    model: SRModel,
    dataset: PatchDataset,
    loss: SRLoss,
    *,
    batch: int = 8,
    device: str | torch.device = "cpu",
    at_least: float = 3.0,
) -> float:
    """Time of a training step with its data by `clock`, averaged over at least `at_least` seconds, after two steps."""
    now = clock(device)
    model.to(device).train()
    loss.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    dataset.length = max(dataset.length, batch)
    n, start = -2, now()
    while n < 2 or now() - start < at_least:
        if n == 0:
            start = now()
        lr, hr, base, _ = (
            torch.stack(images).to(device) for images in zip(*(dataset[k] for k in range(batch)), strict=True)
        )
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(lr, base), hr)
        value.backward()
        optimizer.step()
        value.item()  # synchronises with the device
        n += 1
    return (now() - start) / n


class StepTimer:
    """Times the steps of a training, from the first call of its loss to the last, without validations.

    The time of the first step, which loads and compiles, does not count.

    Attributes:
        steps, seconds: number of timed steps, and their time by `clock`.
    """

    def __init__(self, loss: torch.nn.Module, validation: "Validation | None", device: str | torch.device) -> None:
        self.steps, self.seconds = 0, 0.0
        self._now, self._validation = clock(device), validation
        self._last: float | None = None
        loss.register_forward_pre_hook(self._begin)

    def _begin(self, *_: object) -> None:
        at = self._now() - (self._validation.seconds if self._validation else 0.0)
        if self._last is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + at - self._last
        self._last = at


class Validation:
    """Scores a model on a few slices of validation volumes; `seconds` is the time that this has taken so far."""

    def __init__(
        self, scans: Sequence[Scan], degradation: Degradation, protocol: Protocol, device: str | torch.device
    ) -> None:
        self.scans, self.degradation, self.protocol = scans, degradation, protocol
        self._now, self.seconds = clock(device), 0.0

    def __call__(self, model: SRModel) -> Mapping[str, float]:
        start = self._now()
        rows = evaluate(
            model,
            self.scans,
            protocol=self.protocol,
            degradation=self.degradation,
            consistency="off",
            most=VALIDATION_SLICES,
        )
        self.seconds += self._now() - start
        return mean_scores(rows)
