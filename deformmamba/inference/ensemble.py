"""Runs one model on one batch of slices: whole or in tiles, once or as the mean of a self-ensemble."""

from typing import TYPE_CHECKING

import torch

from deformmamba.inference.tiling import tiled
from deformmamba.models.normalise import in_constant, keep_constant
from deformmamba.physics.kspace import Grid

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel

N_MEMBERS = 8


def predict(
    model: "SRModel",
    lr: torch.Tensor,
    *,
    ensemble: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (b, c, scale * h, scale * w) of `model` for whole slices (b, c, h, w), about [0, 1]; float32 at least.

    With `ensemble`: the mean over the eight flips and rotations of the slice, each undone afterwards, and their
    standard deviation (otherwise None). On the origin-aligned grid an image is reflected about index 0, i to -i mod n:
    plain reversal would move LR and HR apart by scale - 1 HR pixels.

    A model for any intensity leaves constant areas unchanged (`models.normalise`); so does its ensemble.

    With `tile`: each slice is computed tile by tile. Every tile gets its part of the base image of the whole slice,
    and the intensity range of the whole slice (`SRModel.whole_slice`).
    """
    # computed before any reflection, which moves one row of a cut field of view to the opposite edge
    whole = model.whole_slice(lr) if model.any_intensity else {}
    if not ensemble:
        return _once(model, lr, whole, tile, overlap), None
    mean = squares = None
    for k in range(N_MEMBERS):
        of_member = {**whole, "base": _transformed(whole["base"], k, model.grid)} if whole else {}
        sr = _once(model, _transformed(lr, k, model.grid), of_member, tile, overlap)
        sr = _transformed(sr, k, model.grid, back=True)
        if mean is None or squares is None:
            mean, squares = sr.clone(), torch.zeros_like(sr)
        else:  # Welford's update: no difference of large squares
            before = sr - mean
            mean += before / (k + 1)
            squares += before * (sr - mean)
    assert mean is not None
    assert squares is not None
    spread = (squares / N_MEMBERS).sqrt()
    if model.any_intensity:  # a reflection moves the border of a constant area by scale - 1 HR pixels
        spread = torch.where(in_constant(lr, model.scale), 0, spread)
        mean = keep_constant(mean, lr, model.scale)
    return mean, spread


def _once(
    model: "SRModel", image: torch.Tensor, whole: dict[str, torch.Tensor], tile: int | None, overlap: int | None
) -> torch.Tensor:
    """`whole`: the result of `model.whole_slice`, if already computed."""
    precise = torch.promote_types(image.dtype, torch.float32)
    if tile is None:
        return model(image, **whole).to(precise)
    further = dict(whole or model.whole_slice(image))
    base = further.pop("base", None)
    return tiled(
        lambda cut, base_cut: model(cut, base=base_cut, **further).to(precise),
        image,
        model.scale,
        tile=tile,
        overlap=overlap,
        multiple=model.multiple,
        base=base,
    )


def _transformed(image: torch.Tensor, k: int, grid: Grid, *, back: bool = False) -> torch.Tensor:
    """Member k of the ensemble: rows reflected (bit 0), columns reflected (bit 1), then transposed (bit 2)."""
    if k & 4 and back:
        image = image.mT
    for bit, dim in ((1, -2), (2, -1)):
        if k & bit:
            image = image.flip(dim)
            if grid == "origin":
                image = image.roll(1, dim)
    if k & 4 and not back:
        image = image.mT
    return image
