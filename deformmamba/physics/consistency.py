"""Data consistency: corrects an output so that degrading it gives the input back.

Three names, the same in Python, on the command line and in checkpoints: "exact" (everywhere), "object" (inside the
anatomy, reduced by the estimated noise) and "off".
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.physics.edges import (
    away_from_cut,
    constant_neighbourhood,
    cubic,
    cut_edges,
    cut_likelihood,
    outliers,
    smooth_part,
)
from deformmamba.physics.kspace import check_image, fft2c, ifft2c, lowpass, pad_spectrum, plain_scale

Consistency = Literal["exact", "object", "off"]
CONSISTENCIES: tuple[Consistency, ...] = get_args(Consistency)

# Share of the intensity scale above which a pixel is signal, not air. Best of 0.02, 0.05 and 0.1 on validation data
# (ixi-4x).
SIGNAL = 0.1
# Share of a slice's pixels; with less air than this, the noise is not estimated.
ENOUGH_AIR = 0.02


def check_consistency(name: Any) -> Consistency:
    """`name`, if it is one of `CONSISTENCIES`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(name, str) or name not in CONSISTENCIES:
        raise InvalidArgument(f'consistency must be "exact", "object" or "off", not {shown(name)}')
    return name


def stored_consistency(value: Any) -> Consistency:
    """The name for a value in a checkpoint's provenance; older checkpoints hold False, True or "object"."""
    if isinstance(value, str) and value in CONSISTENCIES:
        return value
    return "exact" if value else "off"


def corrected(
    sr: torch.Tensor,
    lr: torch.Tensor,
    scale: int,
    how: Consistency,
    *,
    magnitude: bool,
    edges: bool = False,
    robust: bool = False,
    air: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """`sr` after the data consistency named `how`; arguments as `data_consistency`, values about [0, 1].

    `air`: the value of air, which "object" leaves alone. (For a magnitude image 0 is the lowest value of the slice. One
    dark pixel must not turn all air into signal.)

    `edges`: with "object", opposite edges of `lr` that differ are treated as in `physics.edges`, and pixels do not
    change where the 5x5 neighbourhood in `lr` is constant, as in a masked background.

    `robust`: for the skip "zero-fill-robust". Outliers are left out of the correction, because they would ring. With
    "object", edges are judged by `cut_likelihood`, and the pixels near a cut edge, where the residual of a window is
    not that of the object, are left out too. On validation (ixi-4x, windows of 20x20 LR pixels) "object" is then 0.06
    to 0.27 dB better, whole slices stay the same.
    """
    if how == "off":
        return sr
    if robust:
        spots = outliers(lr)
        sharp = cubic(spots, scale)
        lr, sr = lr - spots, sr - sharp
    if how == "exact":
        sr = data_consistency(sr, lr, scale, magnitude=magnitude)
        return sr + sharp if robust else sr
    cut = (cut_likelihood(lr, scale) if robust else cut_edges(lr)) if edges else None
    within = object_share(sr, lr, scale, magnitude=magnitude, cut=cut, air=air)
    if edges:
        varying = (~constant_neighbourhood(lr)).to(lr.dtype)
        within = within * F.interpolate(varying, scale_factor=float(scale), mode="nearest")
    if robust and cut is not None:
        within = within * away_from_cut(cut, lr.shape[-2], lr.shape[-1], scale)
    sr = data_consistency(sr, lr, scale, magnitude=magnitude, within=within, cut=cut)
    return sr + sharp if robust else sr


def object_share(
    sr: torch.Tensor,
    lr: torch.Tensor,
    scale: int,
    *,
    magnitude: bool,
    cut: torch.Tensor | None = None,
    air: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """The share, 0 to 1 for each pixel of `sr`, of the correction that consistency "object" applies.

    In air it is 0. Air is every pixel more than two pixels away from signal, which is a tenth of the intensity scale
    away from the value `air`; the border is soft. The difference between the estimate and `lr` in air is taken as
    noise: normal, or Rayleigh for a magnitude image, with twice the power of one component. In the anatomy, the share
    is the gain of a Wiener filter, one number per slice: 1 - noise power / power of the difference. It is 0 if noise
    explains the whole difference.

    Source: ours, not in the paper.
    """
    near = F.max_pool2d(((sr - air).abs() > SIGNAL).to(sr.dtype), 5, 1, 2)
    within = F.avg_pool2d(near, 5, 1, 2, count_include_pad=False)
    low = _lowpass(sr, scale, cut)
    difference = (lr - (low.abs() if magnitude else low.real)) ** 2
    at_samples = within[..., ::scale, ::scale]

    def mean(where: torch.Tensor) -> torch.Tensor:
        return (difference * where).sum((-2, -1), keepdim=True) / where.sum((-2, -1), keepdim=True).clamp(min=1)

    air = at_samples == 0
    enough = air.to(sr.dtype).mean((-2, -1), keepdim=True) > ENOUGH_AIR
    noise = mean(air) / (2 if magnitude else 1) * enough
    found = mean(at_samples == 1).clamp(min=torch.finfo(sr.dtype).tiny)
    return within * (1 - noise / found).clamp(min=0)


def data_consistency(
    sr: torch.Tensor,
    lr: torch.Tensor,
    scale: int,
    *,
    magnitude: bool = True,
    within: torch.Tensor | None = None,
    cut: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sr` (..., H, W) corrected so that degrading it gives `lr` (..., H / scale, W / scale) back.

    The measured frequencies of `lr` replace those of `sr`, to rounding; the unmeasured frequencies of `sr` stay.

    `magnitude=False` (signed LR, `degrade(..., output="real")`): an orthogonal projection onto the images that explain
    `lr`; the truth is one of them, so the error never grows. `magnitude=True`: the LR has lost its sign where the
    low-passed image rings below zero, so it takes the sign of the estimate's own low-passed image first. Replacing
    without that sign hurts good estimates.

    For an even size the low-passed image has a small imaginary part b, all of it at the unpaired frequency -n/2, which
    belongs to the magnitude: the real part then becomes sign * sqrt(lr^2 - b^2). An estimate whose b exceeds the
    measured magnitude somewhere cannot be right there: its b is dropped.

    `within` (broadcastable to `sr`) is the share of the correction applied to each pixel, in [0, 1]; unless it is 1
    everywhere, degrading the result gives `lr` only approximately.

    `cut` (..., 2): how far the edges of `lr` are cut (`physics.edges.cut_edges`). At cut edges, the jump across them is
    removed before each Fourier transform, as a smooth part that is sampled or interpolated directly.

    Source: ours, not in the paper.

    Raises:
        ValueError: `lr` does not have the size of `sr` divided by `scale`.
    """
    for image in (sr, lr):
        check_image("data_consistency", image, scale)
    _check_real(sr, lr)
    scale = plain_scale(scale)
    if within is not None and not _broadcasts(within, sr):
        given = tuple(within.shape) if isinstance(within, torch.Tensor) else f"a {type(within).__name__}"
        raise InvalidArgument(
            f"data_consistency: within must be a tensor that broadcasts to sr {tuple(sr.shape)}, not {given}"
        )
    if tuple(lr.shape[-2:]) != tuple(n // scale for n in sr.shape[-2:]) or any(n % scale for n in sr.shape[-2:]):
        raise InvalidArgument(
            f"data_consistency: at scale {scale} an sr of {tuple(sr.shape[-2:])} needs an lr {scale} times smaller, "
            f"not {tuple(lr.shape[-2:])}"
        )
    low = _lowpass(sr, scale, cut)
    if magnitude:
        real, imag = low.real, low.imag
        rounding = 8 * torch.finfo(lr.dtype).eps * lr.abs().amax((-2, -1), keepdim=True)
        explained = (imag.abs() <= lr.abs() + rounding).all(-1, keepdim=True).all(-2, keepdim=True)
        imag = torch.where(explained, imag, torch.zeros_like(imag))
        sign = torch.where(real < 0, -torch.ones_like(real), torch.ones_like(real))
        residual = torch.complex(sign * (lr**2 - imag**2).clamp(min=0).sqrt(), imag) - low
    else:
        residual = lr - low.real
    if cut is None:
        correction = _backproject(residual, scale)
    else:
        smooth = smooth_part(residual.real if residual.is_complex() else residual, gate=cut)
        correction = _backproject(residual - smooth, scale) + cubic(smooth, scale)
    return sr + (correction if within is None else within * correction)


def _check_real(sr: torch.Tensor, lr: torch.Tensor) -> None:
    if torch.compiler.is_compiling() or isinstance(sr, torch.fx.Proxy):
        return
    if not (sr.is_floating_point() and lr.is_floating_point() and sr.dtype == lr.dtype and sr.device == lr.device):
        raise InvalidType(
            f"data_consistency: sr is {sr.dtype} on {sr.device} and lr {lr.dtype} on {lr.device}; both must be "
            "floating point of one dtype, on one device"
        )


def _broadcasts(within: Any, sr: torch.Tensor) -> bool:
    """Whether `within` is a tensor that multiplies one of the shape of `sr`; True where shapes are not yet known."""
    if torch.compiler.is_compiling() or isinstance(sr, torch.fx.Proxy):
        return True
    pairs = zip(reversed(within.shape), reversed(sr.shape), strict=False) if isinstance(within, torch.Tensor) else ()
    return isinstance(within, torch.Tensor) and within.ndim <= sr.ndim and all(a in (1, b) for a, b in pairs)


def _lowpass(sr: torch.Tensor, scale: int, cut: torch.Tensor | None) -> torch.Tensor:
    """`lowpass`, without the jump across cut edges; see `data_consistency`."""
    if cut is None:
        return lowpass(sr, scale)
    smooth = smooth_part(sr, gate=cut)
    return lowpass(sr - smooth, scale) + smooth[..., ::scale, ::scale]


def _backproject(residual: torch.Tensor, scale: int) -> torch.Tensor:
    """A real HR image whose `lowpass` is `residual` (..., h, w), for every residual that some real HR image explains.

    A real image has conjugate frequencies k and -k. For an even size the crop keeps -n/2 without +n/2, so the conjugate
    is written there, at full amplitude; `zero_fill` halves it instead, which interpolates well but comes back at half
    after `degrade`. The residual may be complex, but only at those unpaired frequencies: see `data_consistency`.
    """
    h, w = residual.shape[-2:]
    spectrum = fft2c(residual)
    if h % 2 == 0:  # row -h/2 mirrored to row +h/2: conj(row), columns reversed about frequency 0
        spectrum = torch.cat([spectrum, _reversed_conjugate(spectrum[..., :1, :])], dim=-2)
    if w % 2 == 0:
        spectrum = torch.cat([spectrum, _reversed_conjugate(spectrum[..., :1].mT).mT], dim=-1)
    return ifft2c(pad_spectrum(spectrum, (scale * h, scale * w))).real


def _reversed_conjugate(row: torch.Tensor) -> torch.Tensor:
    """conj(row) at the negative of each frequency along the last, centred axis: the value of a real image's spectrum at
    -k."""
    flipped = row.flip(-1).conj()
    return flipped.roll(1, -1) if row.shape[-1] % 2 == 0 else flipped
