"""Optional global skip: the network adds its output to the zero-filled image and learns the difference only.

None of the papers uses such a skip. To compare networks after a short training, use it for all of them or for none.
"""

import torch
from torch import nn

from deformmamba.errors import InvalidArgument, shown
from deformmamba.physics.edges import zero_fill_edges, zero_fill_robust
from deformmamba.physics.kspace import Grid, zero_fill

# name: computes the image to which a network adds its output from the WHOLE slice; see `physics.edges`
BASES = {"zero-fill": zero_fill, "zero-fill-edges": zero_fill_edges, "zero-fill-robust": zero_fill_robust}
SKIPS = (None, *BASES)


def checked_skip(name: str, skip: str | None, grid: Grid) -> str | None:
    """Checks and returns `skip`; a ValueError names the model `name`. Zero-filling exists on the origin grid only."""
    if skip not in SKIPS or (skip and grid != "origin"):
        raise InvalidArgument(
            f'{name}: skip must be one of {SKIPS}, and None unless grid="origin", not {shown(skip)} on {grid}'
        )
    return skip


def start_at_zero(last: nn.Module) -> None:
    """Sets the last convolution of a network with a skip to zero, so that training starts from zero-filling."""
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def base_image(lr: torch.Tensor, scale: int, skip: str) -> torch.Tensor:
    """The image to which a network with this `skip` adds its output, for whole slices `lr` (..., h, w); >= float32.

    At scale 1 that is `lr` itself.
    """
    lr = lr.to(torch.promote_types(lr.dtype, torch.float32))
    return BASES[skip](lr, scale) if scale > 1 else lr


def add_base(
    sr: torch.Tensor, lr: torch.Tensor, base: torch.Tensor | None, scale: int, skip: str | None
) -> torch.Tensor:
    """`sr` plus `base`, the part of the whole slice's `base_image` at the position of `lr`; with no skip, `sr`.

    `base` None: `lr` is the whole slice.
    """
    if skip is None:
        return sr
    if base is None:
        base = base_image(lr, scale, skip)
    return (base + sr).to(lr.dtype).contiguous()
