"""A slice cut into overlapping tiles and blended back into one, for slices that do not fit into memory whole.

Neighbouring tiles are cross-faded by windows that sum to 1 in every pixel, whatever the sizes. The fade takes the
middle half of the overlap: the outer quarter of it, where a tile has seen too little of its surroundings, has weight 0.
So whatever looks no further than a quarter of the overlap (in LR pixels) comes out as if the slice were whole.
"""

import itertools
from collections.abc import Callable

import torch

from deformmamba.errors import InvalidArgument

# LR pixels, see `default_overlap`
OVERLAP = 16


def default_overlap(tile: int) -> int:
    """LR pixels that neighbouring tiles of side `tile` share unless told otherwise: 16, at most half a tile.

    Chosen on validation, ixi-4x, T2 brain and spine, PSNR (dB) of tiled less whole slices, which lie at 29.56 and 25.75
    (volume protocol; slices of 58x64 and 80x64 LR pixels):

    | tile, overlap | 0 | 4 | 8 | 16 | 24 |
    |---|---|---|---|---|---|
    | 32, brain | -0.03 | +0.03 | +0.02 | +0.03 | +0.03 |
    | 32, spine | -0.01 | +0.02 | +0.02 | +0.02 | +0.02 |
    | 48, brain | +0.01 | +0.01 | +0.01 | +0.01 | +0.01 |
    | 48, spine | +0.01 | +0.01 | +0.01 | +0.01 | +0.01 |

    Without overlap the mean step between neighbouring pixels is a third larger at the seam of two tiles of 32 than in
    the whole slice; from an overlap of 4 on it is the same within 1 %. The rest of the 16 is for what looks further:
    local operators are exact up to a reach of 4.
    """
    return min(OVERLAP, tile // 2)


def spans(n: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of the tiles that cover n samples: as few as can be, evenly spread, neighbours sharing `overlap` or
    more.

    Starts are multiples of `multiple`, so that a network which pads to it sees its patches where they lie in the whole
    slice; the last tile may be shorter by less than that.

    Raises:
        ValueError: `overlap` is negative, or leaves no new sample to the next tile.
    """
    stride = (tile - overlap) // multiple * multiple
    if overlap < 0 or stride < 1:
        raise InvalidArgument(
            f"an overlap of {overlap} does not go with tiles of {tile}: it must lie between 0 and {tile - multiple}"
        )
    if n <= tile:
        return [(0, n)]
    last = -(-(n - tile) // multiple) * multiple
    gaps = -(-last // stride)
    starts = [i * last // (gaps * multiple) * multiple for i in range(gaps + 1)]
    return [(start, min(start + tile, n)) for start in starts]


def windows(n: int, tile: int, overlap: int, multiple: int = 1, scale: int = 1) -> list[torch.Tensor]:
    """The weight of each tile of `spans(n, tile, overlap, multiple)`, one number a sample of its output (float64).

    Output sample x belongs to input sample x // scale. Over all tiles the weights of a sample sum to 1.
    """
    placed = spans(n, tile, overlap, multiple)
    x = torch.arange(scale * n, dtype=torch.float64) + 0.5
    # how far the hand-over from tile i - 1 to tile i has come: a smooth step in the middle of what they share
    width = max(scale * overlap / 2, 1e-9)
    taken = [torch.ones_like(x)]
    for (_, stop), (start, _) in itertools.pairwise(placed):
        progress = ((x - scale * (start + stop) / 2) / width + 0.5).clamp(0, 1)
        taken.append(progress**2 * (3 - 2 * progress))
    taken.append(torch.zeros_like(x))
    # a telescoping sum, so that it is 1 whatever the overlaps
    return [(taken[i] - taken[i + 1])[scale * start : scale * stop] for i, (start, stop) in enumerate(placed)]


def tiled(
    model: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    lr: torch.Tensor,
    scale: int,
    *,
    tile: int,
    overlap: int | None = None,
    multiple: int = 1,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """`model(lr, base)` computed tile by tile: (b, c, h, w) to (b, c, scale * h, scale * w).

    Args:
        model: takes a tile (b, c, t, t) and the same place of `base`, and gives `scale` times its height and width.
        lr: the whole slices.
        scale: what `model` multiplies height and width by.
        tile: side of a tile in LR pixels; sides not longer than that are not cut.
        overlap: LR pixels that neighbours share at least; None: `default_overlap`.
        multiple: tiles start at multiples of this.
        base: (b, c, scale * h, scale * w), cut for each tile; what a network needs of the whole slice.

    Raises:
        ValueError: as `spans`; or `model` gave another size.
    """
    overlap = default_overlap(tile) if overlap is None else overlap
    h, w = lr.shape[-2:]
    rows = list(zip(spans(h, tile, overlap, multiple), windows(h, tile, overlap, multiple, scale), strict=True))
    columns = list(zip(spans(w, tile, overlap, multiple), windows(w, tile, overlap, multiple, scale), strict=True))
    if len(rows) == len(columns) == 1:
        return model(lr, base)
    out = lr.new_zeros(*lr.shape[:-2], scale * h, scale * w)
    for (top, bottom), vertical in rows:
        for (left, right), horizontal in columns:
            here = (..., slice(scale * top, scale * bottom), slice(scale * left, scale * right))
            sr = model(lr[..., top:bottom, left:right], None if base is None else base[here])
            weight = (vertical[:, None] * horizontal).to(sr)
            if sr.shape != out[here].shape:
                raise InvalidArgument(f"a tile came out as {tuple(sr.shape)}; wanted {tuple(out[here].shape)}")
            out[here] += weight * sr
    return out
