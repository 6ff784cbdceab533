"""Padding of images to the sizes that a network takes, and cropping of its result."""

import torch
import torch.nn.functional as F


def pad_to_multiple(lr: torch.Tensor, multiple: int, minimum: int = 1) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pads (b, c, h, w) at the bottom and right until h and w are multiples of `multiple`, and at least `minimum`.

    The edge is replicated, so index 0 does not move and any amount of padding works. Returns the padded image and (h,
    w), from which the caller crops: `crop(sr, scale * h, scale * w)`.
    """
    h, w = lr.shape[-2:]
    bottom, right = ((max(n, minimum) + multiple - 1) // multiple * multiple - n for n in (h, w))
    # a compiled or exported program includes the padding, which may be zero, so that it works for every size
    if torch.compiler.is_compiling() or bottom or right:
        lr = F.pad(lr, (0, right, 0, bottom), mode="replicate")
    return lr, (h, w)


def crop(image: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """The first h rows and w columns of (b, c, h' >= h, w' >= w)."""
    if torch.compiler.is_compiling():  # a slice would make an exported program depend on whether it cuts anything off
        rows, columns = (torch.arange(n, device=image.device) for n in (h, w))
        return image.index_select(-2, rows).index_select(-1, columns)
    return image[..., :h, :w]
