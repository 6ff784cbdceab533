"""The interface of a scan backend: the protocol and the declared abilities.

Every backend computes one operation. Both public functions are views of it. With k directions over images of
height x width = l pixels, b images, g groups of r channels and n states:

    u, y           (b, g, l, r)       pixels row by row; y sums over directions
    delta          (k, b, g, l, r)    step sizes before bias and softplus
    A              (k, g, r, n)
    B, C           (k, b, g, l, n)
    D, delta_bias  (k, g, r) or None  D u is added to y, delta_bias to delta before softplus
    initial_state  (k, b, g, r, n)    or None for zeros; the last state has the same shape
    delta_weight   (k, g, r, q)       or None; with it delta is (k, b, g, l, q), and delta_weight @ delta is used

Strides are arbitrary. Directions: 1 (rows), 2 (rows, rows from the end) or 4 (rows, columns, both from the end; see
`reference.orders`). A sequence is an image of one row. `delta_softplus`: softplus is applied to delta. `zoh`: exact
zero-order hold instead of the Euler step.

All tensors have one dtype, float32 or float64. A backend whose abilities name float16 or bfloat16 gets u, delta, B and
C in that dtype and the rest in float32; it returns y like u.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FULL = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Abilities:
    """The computations that a backend supports.

    Attributes:
        dtypes: of u, delta, B and C; other half precisions are converted to float32 first.
        low_rank: takes `delta_weight`; for the others the product is computed first.
        zoh: supports zero-order hold.
        initial_state: starts from a given state.
        max_states: largest n, or None.
        transforms: torch.func's grad and jvp, forward mode and higher derivatives work.
    """

    dtypes: tuple[torch.dtype, ...] = FULL
    low_rank: bool = False
    zoh: bool = True
    initial_state: bool = True
    max_states: int | None = None
    transforms: bool = False

    def missing(self, n: int, zoh: bool, initial_state: bool) -> str | None:
        """Why a call with n states and these options cannot run, and the cure, or None."""
        if self.max_states is not None and n > self.max_states:
            return f"it has at most {self.max_states} states, A has {n}; use another backend"
        if zoh and not self.zoh:
            return "it has the Euler step only; use discretization='euler' or another backend"
        if initial_state and not self.initial_state:
            return "it starts from a zero state; leave out initial_state or use another backend"
        return None


class Backend(Protocol):
    """A module that computes the scan."""

    @property
    def ABILITIES(self) -> Abilities: ...

    def unusable(self, tensor: Tensor | None = None) -> str | None:
        """Why it cannot run on tensors of this one's device and dtype (None: on any here), then "; " and the cure.

        None if it can run.
        """


class PlainBackend(Backend, Protocol):
    """A backend that autograd differentiates."""

    def scan(
        self,
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
    ) -> tuple[Tensor, Tensor]:
        """(y, last state)."""


class KernelBackend(Backend, Protocol):
    """A backend with kernels, which `operator` makes a PyTorch operator of. It may rely on checked shapes."""

    @property
    def CHUNK(self) -> int:
        """Steps between kept states."""

    def forward(
        self,
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
        """(y, last state, kept states).

        y is like `torch.empty_like(u)`. Kept is (k, b, g, ceil(l / CHUNK), n, r), the state before every chunk in
        walking order, or has no chunks if not `keep`.
        """

    def backward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        kept: Tensor,
        dy: Tensor,
        dlast: Tensor,
        height: int,
        width: int,
        delta_softplus: bool,
        zoh: bool,
        delta_weight: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The gradients of u, delta, A, B, C, D, delta_bias and the initial state, and of delta_weight if given.

        Each is like `torch.empty_like` of its tensor, and empty where there is no D or delta_bias.
        """
