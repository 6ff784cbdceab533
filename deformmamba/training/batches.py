"""Assigns samples to training steps and processes, as a function of seed and step alone."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Piece(NamedTuple):
    """The samples that one process computes at once: their indices, and the factor of their mean loss.

    With these factors, the mean over processes of the sum over pieces equals the mean over the samples of the step. A
    process without a sample computes another process's sample with factor 0, because the others wait for it.
    """

    indices: list[int]
    weight: float


class Batches(Sampler[list[int]]):
    """One endless stream of shuffled passes over `n` samples, cut into steps of `batch`, from step `start` on.

    `batch` counts the samples of a step over all `processes` and all `accumulate` pieces of each, so that these two
    numbers change only rounding, and what a model draws at random in training (`drop_path`). The last step has the
    remaining ones of `samples`. Iterates over the indices of the pieces of process `rank`, `accumulate` pieces per
    step.
    """

    def __init__(
        self,
        n: int,
        *,
        samples: int,
        batch: int,
        seed: int = 0,
        accumulate: int = 1,
        processes: int = 1,
        rank: int = 0,
        start: int = 0,
    ) -> None:
        self.n, self.samples, self.batch, self.seed = n, samples, batch, seed
        self.accumulate, self.processes, self.rank, self.start = accumulate, processes, rank, start
        self.n_steps = math.ceil(samples / batch)

    def __len__(self) -> int:
        return (self.n_steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.n_steps):
            yield from (piece.indices for piece in self.pieces(step))

    def indices(self, step: int) -> list[int]:
        """The indices of step `step` (from 0), over all processes."""
        positions = range(step * self.batch, min((step + 1) * self.batch, self.samples))
        return [int(_order(self.n, self.seed, position // self.n)[position % self.n]) for position in positions]

    def pieces(self, step: int) -> list[Piece]:
        """The pieces of this process at step `step`."""
        everything = self.indices(step)
        parts = np.array_split(everything, self.processes * self.accumulate)
        mine = parts[self.rank :: self.processes]
        factor = self.processes / len(everything)
        return [Piece(part.tolist() or everything[:1], len(part) * factor) for part in mine]


@lru_cache(maxsize=4)  # the current pass, and the next one, which data loading reaches first
def _order(n: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(n)
