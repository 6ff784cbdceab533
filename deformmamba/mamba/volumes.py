"""`SS3D`: the idea of `SS2D` for volumes."""

from typing import Any

import torch

from deformmamba.errors import InvalidArgument
from deformmamba.layers import SS2D
from deformmamba.mamba.arguments import check_parameters
from deformmamba.scan import Discretization, selective_scan
from deformmamba.tensors import without_autocast

# the order in which a direction walks: the last axis is the fastest
WALKS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))


class SS3D(SS2D):
    """A selective scan of volumes along several directions, summed. (b, channels, d, h, w) to the same shape.

    With 6 directions every output voxel depends on every input voxel. The cost is linear in the number of voxels.

    Args:
        channels: channels in and out.
        d_state, dt_rank, dt_min, dt_max, discretization, backend, device, dtype: as in `SS2D`.
        directions: 3 (w, then d, then h as the fastest axis) or 6 (the same from the last voxel backwards too).

    Parameters have the shapes of `SS2D`, K being the number of directions. Computed in float32 (float64 for a float64
    input) with autocast off. Returns the input's dtype. Each direction takes a permuted copy of the volume.
    """

    allowed_directions = (3, 6)

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 16,
        dt_rank: int | None = None,
        directions: int = 6,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        discretization: Discretization = "euler",
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_parameters("SS3D", device, dtype)
        super().__init__(
            channels,
            d_state=d_state,
            dt_rank=dt_rank,
            directions=directions,
            dt_min=dt_min,
            dt_max=dt_max,
            discretization=discretization,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) or x.ndim != 5 or x.shape[1] != self.channels or not x.is_floating_point():
            given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InvalidArgument(f"SS3D: given {given}; wanted floating point (b, {self.channels}, d, h, w)")
        if x.device != self.x_proj.device and not self.x_proj.is_meta:
            raise InvalidArgument(
                f"SS3D: given a volume on {x.device}, and its weights are on {self.x_proj.device}; move one of the two"
            )
        k, r, n = self.directions, self.dt_rank, self.d_state
        with without_autocast(x.device.type):
            u = x.to(torch.promote_types(x.dtype, torch.float32))
            x_proj, dt_proj, bias, A_log, D = (
                p.to(u.dtype) for p in (self.x_proj, self.dt_proj, self.dt_bias, self.A_log, self.D)
            )
            orders = [tuple(2 + axis for axis in walk) for walk in WALKS]
            walked = [u.permute(0, 1, *order).flatten(2) for order in orders]
            walked += [sequence.flip(-1) for sequence in walked] if k == 6 else []
            sequences = torch.stack(walked, 1)  # (b, k, c, l)
            projected = torch.matmul(x_proj, sequences)
            dt, B, C = projected.split([r, n, n], 2)
            y = selective_scan(
                sequences.flatten(1, 2),
                torch.matmul(dt_proj, dt).flatten(1, 2),
                -A_log.exp(),
                B,
                C,
                D,
                delta_bias=bias.flatten(),
                delta_softplus=True,
                discretization=self.discretization,
                backend=self.backend,
            )
            assert isinstance(y, torch.Tensor)
            by_direction = y.unflatten(1, (k, -1))
            total = torch.zeros_like(u)
            for i, order in enumerate(orders):
                back = tuple(order.index(axis) + 2 for axis in (2, 3, 4))
                sequence = by_direction[:, i] if k == 3 else by_direction[:, i] + by_direction[:, 3 + i].flip(-1)
                shape = tuple(u.shape[axis] for axis in order)
                total = total + sequence.unflatten(-1, shape).permute(0, 1, *back)
        return total.to(x.dtype)
