"""A model with the steps around it in `upscale`, for one whole slice: normalisation, global skip, data consistency.

Exported programs hold this module. All Fourier transforms are products with real matrices, because few runtimes
support complex numbers. A size n enters only through `torch.arange(n)`, so that one program works for every size.

Notation. t = j / s - i is the distance of HR sample j from LR sample i, for scale s and n LR samples along one axis.
The k-space crop of n frequencies interpolates by Z[j, i] = D(t) - i E(t), where

    D(t) = sin(pi t) / (n tan(pi t / n)) for even n, sin(pi t) / (n sin(pi t / n)) for odd n, D(0) = 1
    E(t) = sin(pi t) / n = (-1)^i sin(pi j / s) / n for even n, 0 for odd n

E belongs to the frequency -n/2, which an even n has without +n/2. The matrix of `kspace.lowpass` is Z^H / s.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deformmamba.inference.upscaling import ABOVE_P99
from deformmamba.models import SRModel, ZeroFill
from deformmamba.physics.consistency import ENOUGH_AIR, SIGNAL, Consistency
from deformmamba.physics.edges import (
    BEYOND,
    away_from_cut,
    cut_edges,
    cut_likelihood,
    edge_models,
    extended,
    lowest_without,
    outliers,
    prediction,
)

NO_FLOOR = -1e30  # the floor of data with a sign


@dataclass
class Axis:
    """The matrices of one axis, for n LR and s * n HR samples.

    Attributes:
        n, scale: the number of LR samples, and s.
        dirichlet: D, (s * n, n).
        alternating: (n,), (-1)^i / n for even n, zeros for odd n: the amplitude of frequency -n/2.
        sine, cosine: (s * n,), of pi j / s: frequency n/2 at the HR samples.
    """

    n: int
    scale: int
    dirichlet: Tensor
    alternating: Tensor
    sine: Tensor
    cosine: Tensor

    @cached_property
    def cubic(self) -> Tensor:
        """`cubic_matrix`."""
        return cubic_matrix(self.n, self.scale, self.dirichlet)

    @cached_property
    def longer(self) -> Tensor:
        """(s * n, n + 2 * BEYOND): the same HR samples from a line that has BEYOND more LR samples at both ends."""
        j = torch.arange(self.n * self.scale, device=self.dirichlet.device) + self.scale * BEYOND
        return _dirichlet(j, self.n + 2 * BEYOND, self.scale, self.dirichlet)


def axis(n: int, scale: int, like: Tensor) -> Axis:
    """The matrices for n LR samples, in the dtype and on the device of `like`."""
    i = torch.arange(n, device=like.device)
    j = torch.arange(n * scale, device=like.device)
    count = i[-1:] + 1
    even = (count % 2 == 0).to(like.dtype)
    phase = (j % (2 * scale)).to(like.dtype) * (math.pi / scale)
    alternating = even * (1 - 2 * (i % 2)).to(like.dtype) / count.to(like.dtype)
    return Axis(n, scale, _dirichlet(j, n, scale, like), alternating, phase.sin(), phase.cos())


def _dirichlet(j: Tensor, n: int, scale: int, like: Tensor) -> Tensor:
    """(m, n): D for the HR samples j (m,) of n LR samples."""
    i = torch.arange(n, device=like.device)
    count = i[-1:] + 1
    even = (count % 2 == 0).to(like.dtype)
    # t in units of 1 / scale, within half a period of 0, where the quotients below are precise
    half = count * scale // 2
    steps = (j[:, None] - scale * i + half) % (count * scale) - half
    length = count.to(like.dtype)
    angle = steps.to(like.dtype) * (math.pi / scale) / length
    sine, cosine = angle.sin(), angle.cos()
    numerator = ((steps % (2 * scale)).to(like.dtype) * (math.pi / scale)).sin()
    quotient = numerator * (even * cosine + (1 - even)) / torch.where(steps == 0, torch.ones_like(sine), sine)
    return torch.where(steps == 0, torch.ones_like(sine), quotient / length)


def zero_fill(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """`kspace.zero_fill` of (..., h, w): D x D^T - E x E^T."""
    corner = rows.alternating @ image @ columns.alternating
    return rows.dirichlet @ image @ columns.dirichlet.mT - corner[..., None, None] * _outer(rows.sine, columns.sine)


def lowpass(image: Tensor, rows: Axis, columns: Axis, scale: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `kspace.lowpass` of (..., scale * h, scale * w)."""
    half = rows.dirichlet.mT @ image  # (..., h, W)
    across, down = rows.sine @ image, half @ columns.sine  # (..., W), (..., h)
    corner = across @ columns.sine
    real = half @ columns.dirichlet - corner[..., None, None] * _outer(rows.alternating, columns.alternating)
    imaginary = _outer(rows.alternating, across @ columns.dirichlet) + _outer(down, columns.alternating)
    return real / scale**2, imaginary / scale**2


def back_projected(real: Tensor, imaginary: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The correction of `consistency.data_consistency`: a real HR image whose `lowpass` is the given (..., h, w).

    The frequencies -n/2 get their conjugates at +n/2 at full amplitude; all others are interpolated by D.
    """
    inner = [a.dirichlet - _outer(a.cosine, a.alternating) for a in (rows, columns)]
    up, down = rows.alternating @ real, rows.alternating @ imaginary  # (..., w)
    left, right = real @ columns.alternating, imaginary @ columns.alternating  # (..., h)
    top = _outer(rows.cosine, up @ inner[1].mT) + _outer(rows.sine, down @ inner[1].mT)
    side = _outer(left @ inner[0].mT, columns.cosine) + _outer(right @ inner[0].mT, columns.sine)
    corner = (up @ columns.alternating)[..., None] * rows.cosine + (down @ columns.alternating)[..., None] * rows.sine
    return inner[0] @ real @ inner[1].mT + 2 * top + 2 * side + 4 * _outer(corner, columns.cosine)


def _outer(column: Tensor, row: Tensor) -> Tensor:
    return column[..., :, None] * row[..., None, :]


def smooth_part(image: Tensor, gate: Tensor) -> Tensor:
    """`edges.smooth_part` of (..., h, w) with the given gate (..., 2)."""
    (cos_r, sin_r, end_r, n_r), (cos_c, sin_c, end_c, n_c) = (_waves(n, image) for n in image.shape[-2:])
    across = gate[..., 0, None] * (image[..., -1, :] - image[..., 0, :])
    down = gate[..., 1, None] * (image[..., :, -1] - image[..., :, 0])
    jumps = _outer(end_r, across) + _outer(down, end_c)
    divisor = 2 * cos_r[1:2].mT + 2 * cos_c[1:2] - 4
    # frequency 0 alone has divisor 0 and is left out; the next one is far above rounding
    divided = torch.where(divisor < -1e-5, 1 / torch.where(divisor < -1e-5, divisor, torch.ones_like(divisor)), 0.0)
    c, s = cos_r @ jumps, sin_r @ jumps
    real, minus_imaginary = (c @ cos_c - s @ sin_c) * divided, (s @ cos_c + c @ sin_c) * divided
    a = cos_r @ real + sin_r @ minus_imaginary
    b = sin_r @ real - cos_r @ minus_imaginary
    return (a @ cos_c - b @ sin_c) / (n_r * n_c)


def _waves(n: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos and sin of 2 pi q i / n (n, n), 1 and -1 at both ends and zeros between (n,), and n (1,)."""
    i = torch.arange(n, device=like.device)
    count = i[-1:] + 1
    angle = ((i[:, None] * i) % count).to(like.dtype) * (2 * math.pi) / count.to(like.dtype)
    ends = (i == 0).to(like.dtype) - (i == count - 1).to(like.dtype)
    return angle.cos(), angle.sin(), ends, count.to(like.dtype)


def cubic_matrix(n: int, scale: int, like: Tensor) -> Tensor:
    """`edges.cubic_matrix`: (scale * n, n)."""
    i = torch.arange(n, device=like.device).to(like.dtype)
    x = (torch.arange(n * scale, device=like.device).to(like.dtype) / scale)[:, None]
    last = i[-1:]

    def weight(d: Tensor) -> Tensor:
        near, far = (1.5 * d - 2.5) * d**2 + 1, -0.5 * (((d - 5) * d + 8) * d - 4)
        return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))

    beyond = weight(last + 1 - x) + weight(last + 2 - x)
    return weight((x - i).abs()) + (i == 0) * weight(x + 1) + (i == last) * beyond


def cubic(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """`edges.cubic`."""
    return rows.cubic @ image @ columns.cubic.mT


def extension_filled(lines: Tensor, gate: Tensor, along: Axis) -> Tensor:
    """(..., n) to (..., scale * n): the part of `edges.zero_fill_robust` of one axis."""
    plain = lines @ along.dirichlet.mT
    return plain + gate * (extended(lines) @ along.longer.mT - plain)


def _outliers_and_cuts(x: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """`edges.outliers` of whole slices (..., h, w), and `edges.cut_likelihood` (..., 2) of the rest.

    Both are the same for x + constant, so the base image and data consistency share them.
    """
    spots = outliers(x)
    return spots, cut_likelihood(x - spots, scale)


def _base(x: Tensor, rows: Axis, columns: Axis, scale: int, skip: str, found: tuple[Tensor, Tensor] | None) -> Tensor:
    """`models.skip.base_image` of whole slices (..., h, w); `found`: their `_outliers_and_cuts`."""
    if skip == "zero-fill":
        return zero_fill(x, rows, columns)
    if skip == "zero-fill-edges":
        smooth = smooth_part(x, cut_edges(x))
        return zero_fill(x - smooth, rows, columns) + cubic(smooth, rows, columns)
    assert found is not None
    spots, gate = found[0], found[1][..., None, None]
    rest = x - spots
    down, across = gate[..., 0, :, :], gate[..., 1, :, :]
    filled = extension_filled(extension_filled(rest.mT, down, rows).mT, across, columns)
    corner = (rows.alternating @ rest @ columns.alternating)[..., None, None] * _outer(rows.sine, columns.sine)
    return filled - (1 - down) * (1 - across) * corner + cubic(spots, rows, columns)


def percentile(values: Tensor, share: float, used: Tensor) -> Tensor:
    """(b, 1): the percentile 100 * share of the `used` elements of each row of (b, n), interpolated as numpy does."""
    ordered = torch.where(used, values, torch.full_like(values, math.inf)).sort(dim=1).values
    at = (used.sum(1, keepdim=True) - 1).clamp(min=0).to(values.dtype) * share
    below = at.floor()
    low, high = ordered.gather(1, below.long()), ordered.gather(1, at.ceil().long())
    return low + torch.where(at > below, high - low, torch.zeros_like(low)) * (at - below)


def skip_of(model: SRModel) -> str | None:
    """The name of the base image of whole slices that `forward` needs (see `models.skip`); None if it needs none.

    `ZeroFill` returns its base image, because few runtimes have the complex numbers that it computes it with.
    """
    skip: str | None = "zero-fill" if type(model) is ZeroFill else getattr(model, "skip", None)
    return skip


class WholeSlice(nn.Module):
    """`upscale` for one separate slice: normalise, run the network, apply data consistency, restore units.

    Args:
        model: in eval mode.
        consistency: as in `upscale`.
    """

    def __init__(self, model: SRModel, consistency: Consistency) -> None:
        super().__init__()
        self.model, self.consistency = model, consistency
        if model.robust_edges:  # a tracer must find these constants computed
            edge_models(model.scale)
            prediction()
        self.share = 1.0 if model.intensity == "max" else float(model.intensity.removeprefix("p")) / 100

    def forward(self, lr: Tensor, units: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, scale * h, scale * w), both in the scanner's units.

        `units` (3,) belongs to the whole scan, as in `inference.upscaling`: the intensity that counts as 0; the
        intensity that counts as 1 minus the first; and the lowest allowed value of the result, in these units
        (NO_FLOOR: any, for data with a sign). If the second is 0, each slice determines its own three values.
        """
        model, scale = self.model, self.model.scale
        zero, span, floor = (
            torch.where(units[1] > 0, given, own)[..., None, None]
            for given, own in zip(units, self._own_units(lr), strict=True)
        )
        signed = floor <= NO_FLOOR
        floor = torch.where(signed, torch.zeros_like(floor), floor)
        x = (lr - zero) / span
        lowest = floor
        skip = skip_of(model)
        found = _outliers_and_cuts(x, scale) if model.robust_edges or skip == "zero-fill-robust" else None
        if model.robust_edges:  # as in `inference.upscaling`: outliers below the slice do not lower its floor
            assert found is not None
            spots = found[0]
            deep = spots.clamp(max=0)
            lower = ~signed & (deep.amin((-2, -1), keepdim=True) < 0)
            floor = torch.where(lower, lowest_without(spots, x), floor)
        rows, columns = (axis(n, scale, x) for n in x.shape[-2:])
        sr = model(x) if skip is None else model(x, _base(x, rows, columns, scale, skip, found))
        sr, x = sr - floor, x - floor
        if self.consistency != "off":
            sr = self._corrected(sr, x, signed, -floor, rows, columns, found)
        if model.robust_edges:
            below = cubic(deep, rows, columns)
            sr = torch.where(signed, sr, torch.maximum((sr - below).clamp(min=0) + below + floor, lowest))
        else:
            sr = torch.where(signed, sr, sr.clamp(min=0)) + floor
        return sr * span + zero

    def _own_units(self, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`inference.upscaling` applied to each slice alone: zero, span and floor (b, 1)."""
        values = lr.flatten(1)
        lowest, highest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        one = torch.ones_like(lowest)
        if self.model.any_intensity:
            every = torch.ones_like(values, dtype=torch.bool)
            low, high = percentile(values, 0.01, every), percentile(values, 0.99, every)
            span = ABOVE_P99 * (high - low)
            span = torch.where(span > 0, span, highest - lowest)
            span = torch.where(span > 0, span, one)
            return low, span, (lowest - low) / span
        used = values != 0
        found = torch.where(used.any(1, keepdim=True), percentile(values, self.share, used), 0 * one)
        largest = values.abs().amax(1, keepdim=True)
        span = torch.where(found > 0, found, torch.where(largest > 0, largest, one))
        return 0 * one, span, torch.where(lowest >= 0, 0 * one, NO_FLOOR * one)

    def _corrected(
        self,
        sr: Tensor,
        x: Tensor,
        signed: Tensor,
        air: Tensor,
        rows: Axis,
        columns: Axis,
        found: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """`consistency.corrected` in real arithmetic; `found`: `_outliers_and_cuts` of x, for robust edges."""
        scale = self.model.scale
        edges = self.model.any_intensity and self.consistency == "object"
        robust = self.model.robust_edges
        cut = cut_edges(x) if edges and not robust else None
        if robust:
            assert found is not None
            spots, likely = found
            cut = likely if edges else None
            sharp = cubic(spots, rows, columns)
            x, sr = x - spots, sr - sharp
        if cut is None:
            real, imaginary = lowpass(sr, rows, columns, scale)
        else:
            smooth = smooth_part(sr, cut)
            real, imaginary = lowpass(sr - smooth, rows, columns, scale)
            real = real + smooth[..., ::scale, ::scale]
        rounding = 8 * torch.finfo(x.dtype).eps * x.abs().amax((-2, -1), keepdim=True)
        beyond = (imaginary.abs() > x.abs() + rounding).flatten(-2).any(-1)[..., None, None]
        kept = torch.where(beyond, torch.zeros_like(imaginary), imaginary)
        magnitude = (x**2 - kept**2).clamp(min=0).sqrt()
        residual = torch.where(signed, x, torch.where(real < 0, -magnitude, magnitude)) - real
        unpaired = torch.where(signed, torch.zeros_like(kept), kept - imaginary)
        if cut is None:
            correction = back_projected(residual, unpaired, rows, columns)
        else:
            smooth = smooth_part(residual, cut)
            correction = back_projected(residual - smooth, unpaired, rows, columns) + cubic(smooth, rows, columns)
        if self.consistency == "exact":
            return sr + correction + sharp if robust else sr + correction
        low = torch.where(signed, real, (real**2 + imaginary**2).sqrt())
        share = self._object_share(sr - air, (x - low) ** 2, signed)
        if edges:
            varying = (F.max_pool2d(x, 5, 1, 2) != -F.max_pool2d(-x, 5, 1, 2)).to(x.dtype)
            share = share * F.interpolate(varying, scale_factor=float(scale), mode="nearest")
        if robust:
            assert cut is not None
            share = share * away_from_cut(cut, x.shape[-2], x.shape[-1], scale)
            sr = sr + sharp
        return sr + share * correction

    def _object_share(self, sr: Tensor, difference: Tensor, signed: Tensor) -> Tensor:
        """`consistency.object_share`; `sr` less the value of air."""
        near = F.max_pool2d((sr.abs() > SIGNAL).to(sr.dtype), 5, 1, 2)
        within = F.avg_pool2d(near, 5, 1, 2, count_include_pad=False)
        at_samples = within[..., :: self.model.scale, :: self.model.scale]

        def mean(where: Tensor) -> Tensor:
            return (difference * where).sum((-2, -1), keepdim=True) / where.sum((-2, -1), keepdim=True).clamp(min=1)

        air, inside = (at_samples == 0).to(sr.dtype), (at_samples == 1).to(sr.dtype)
        enough = (air.mean((-2, -1), keepdim=True) > ENOUGH_AIR).to(sr.dtype)
        noise = mean(air) / torch.where(signed, 1.0, 2.0) * enough
        found = mean(inside).clamp(min=torch.finfo(sr.dtype).tiny)
        return within * (1 - noise / found).clamp(min=0)
