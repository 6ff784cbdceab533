"""Random changes to a slice before degradation: flips, contrast curves, negatives, lesions, brightness, markers.

They act on the HR slice. On the origin-aligned grid, reversing the indices of both LR and HR images would misalign them
by scale - 1 HR pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument

TISSUE = 0.15  # of the intensity scale: brighter pixels are tissue, darker ones air


def check_range(name: str, value: float, lowest: float, highest: float = math.inf, *, of: str = "PatchDataset") -> None:
    """Refuses a number outside [lowest, highest], infinity and NaN.

    Raises:
        ValueError: names the data set `of`, its argument, the value and the range.
    """
    if not lowest <= value <= highest or value == math.inf:
        between = f"from {lowest} to {highest}" if highest < math.inf else f"of {lowest} or more"
        raise InvalidArgument(f"{of}: {name} is {value}; wanted a number {between}")


@dataclass(frozen=True)
class Augmentation:
    """Random changes to one HR slice with values of about [0, 1]; `PatchDataset` documents each argument.

    Raises:
        ValueError: a number out of range.
    """

    flips: bool = True
    contrast: float = 1.0
    invert: float = 0.0
    lesions: float = 0.0
    gain: float = 1.0
    markers: float = 0.0

    def __post_init__(self) -> None:
        check_range("contrast", self.contrast, 1)
        check_range("gain", self.gain, 1)
        check_range("invert", self.invert, 0, 1)
        check_range("lesions", self.lesions, 0, 1)
        check_range("markers", self.markers, 0, 1)

    def __call__(self, hr: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """A changed copy of `hr` (H, W), real or complex. The changes are applied in the order of the fields.

        A disabled change draws no random number.
        """
        if self.flips:
            hr = hr.flip([axis for axis in (-2, -1) if rng.random() < 0.5])
            if rng.random() < 0.5:
                hr = hr.mT
        if self.contrast > 1:
            exponent = float(self.contrast ** rng.uniform(-1, 1))
            hr = map_magnitude(hr, lambda magnitude: magnitude**exponent)
        if self.invert and rng.random() < self.invert:
            hr = map_magnitude(hr, lambda magnitude: (1 - magnitude).clamp(min=0))
        if self.lesions and rng.random() < self.lesions:
            spots = soft_ellipses(hr.abs() > TISSUE, rng)
            hr = map_magnitude(hr, lambda magnitude: (magnitude + spots).clamp(min=0))
        if self.gain > 1:
            hr = hr * float(self.gain ** rng.uniform(-1, 1))
        if self.markers and rng.random() < self.markers:
            spots = bright_markers((hr.shape[-2], hr.shape[-1]), rng)
            hr = map_magnitude(hr, lambda magnitude: magnitude + spots)
        return hr


def map_magnitude(image: torch.Tensor, curve: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Applies `curve` to the magnitudes of an image; a complex image keeps its phase."""
    if image.is_complex():
        return torch.polar(curve(image.abs()), image.angle())
    return curve(image.clamp(min=0))


def closed(mask: torch.Tensor) -> torch.Tensor:
    """A mask (n, 1, h, w) of 0 and 1 after a morphological closing with 7x7 pixels: small holes are filled."""
    return -F.max_pool2d(-F.max_pool2d(mask, 7, 1, 3), 7, 1, 3)


def bright_markers(size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """(H, W): Gaussian spots, 2 to 20 times as bright as bright tissue, on 0.05 to 0.5 % of the pixels, else zero.

    There is at least one spot. Its standard deviation is 1 to 5 pixels, so on a small image it may cover more. Spots
    with a deviation below 2.5 pixels are at most 5 times as bright: brighter ones would mostly be ringing in the LR
    image.
    """
    h, w = size
    image = torch.zeros(size)
    left = h * w * float(np.exp(rng.uniform(np.log(0.0005), np.log(0.005))))
    while left > 0:
        deviation = float(np.exp(rng.uniform(np.log(1.0), np.log(5.0))))
        height = float(np.exp(rng.uniform(np.log(2.0), np.log(20.0 if deviation >= 2.5 else 5.0))))
        y, x = rng.uniform(0, h), rng.uniform(0, w)
        rows, columns = (
            torch.from_numpy(np.exp(-((np.arange(n) - at) ** 2) / (2 * deviation**2))).to(image.dtype)
            for n, at in ((h, y), (w, x))
        )
        image += height * rows[:, None] * columns
        left -= 2 * np.pi * deviation**2
    return image


def soft_ellipses(tissue: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(H, W): soft ellipses of positive and negative contrast at random places of `tissue` (H, W), zero elsewhere."""
    image = torch.zeros(tissue.shape)
    places = tissue.nonzero()
    for y, x in places[rng.integers(len(places), size=len(places) // 500)].tolist() if len(places) else ():
        long, short = sorted(np.exp(rng.uniform(np.log(1.0), np.log(5.0), size=2)), reverse=True)  # half axes
        angle, contrast = rng.uniform(0, np.pi), rng.choice((-1, 1)) * rng.uniform(0.1, 0.5)
        top, left, reach = max(y - 8, 0), max(x - 8, 0), 9
        rows, columns = np.mgrid[top : y + reach, left : x + reach]
        along = (rows - y) * np.sin(angle) + (columns - x) * np.cos(angle)
        across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
        # half of the contrast at the edge, which is about a pixel wide
        spot = torch.from_numpy(contrast / (1 + np.exp(4 * short * (np.hypot(along / long, across / short) - 1))))
        place = image[top : y + reach, left : x + reach]
        place += spot[: place.shape[0], : place.shape[1]]
    return image
