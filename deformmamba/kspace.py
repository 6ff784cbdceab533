"""k-space physics: what a coarser scan would have measured, and what of it an upscaled image must still hold.

Conventions. An image is (..., H, W), real or complex. Its spectrum is centred in FREQUENCY only: `fftshift` is applied
to the spectrum, never to the image, so image index 0 stays where it is and index n // 2 of the spectrum is frequency 0.
The forward transform divides by H * W ("forward" normalisation): a spectrum holds amplitudes in the image's own unit,
and cropping or zero-padding it keeps intensities without a factor.

Cropping k-space gives an ORIGIN-aligned image: LR[i] lies on HR[scale * i]. See `Grid`.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

# "origin": LR[i] lies on HR[scale * i] (k-space crop, strided sampling).
# "half-pixel": pixel areas nest, LR[i] lies on HR[scale * i + (scale - 1) / 2] (averaging, F.interpolate's default).
Grid = Literal["origin", "half-pixel"]
GRIDS: tuple[str, ...] = get_args(Grid)


def fft2c(image: torch.Tensor) -> torch.Tensor:
    """Centred spectrum of `image` (..., H, W), in the image's unit; frequency 0 at index (H // 2, W // 2)."""
    return torch.fft.fftshift(torch.fft.fft2(image, norm="forward"), dim=(-2, -1))


def ifft2c(spectrum: torch.Tensor) -> torch.Tensor:
    """Complex image of a centred spectrum: the exact inverse of `fft2c`."""
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward")


def _start(n: int, m: int) -> int:
    """Where the central m of n frequencies begin. Not (n - m) // 2: that one loses frequency 0 for 252 -> 63."""
    return n // 2 - m // 2


def crop_spectrum(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The central `size` = (h, w) frequencies of a centred spectrum (..., H, W)."""
    top, left = (_start(n, m) for n, m in zip(spectrum.shape[-2:], size, strict=True))
    return spectrum[..., top : top + size[0], left : left + size[1]]


def pad_spectrum(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The adjoint of `crop_spectrum`: zeros around a centred spectrum until it is `size` = (H, W)."""
    (top, bottom), (left, right) = (
        (_start(n, m), n - m - _start(n, m)) for n, m in zip(size, spectrum.shape[-2:], strict=True)
    )
    return F.pad(spectrum, (left, right, top, bottom))


def lowpass(hr: torch.Tensor, scale: int) -> torch.Tensor:
    """Complex LR image (..., H / scale, W / scale) of the central 1/scale x 1/scale of the k-space of `hr`.

    Intensity is kept and nothing is clipped (Gibbs overshoot is real: a maximum of 1 can come out as 1.16).

    Raises:
        ValueError: `scale` does not divide H and W.
    """
    h, w = hr.shape[-2:]
    if scale < 1 or h % scale or w % scale:
        raise ValueError(
            f"degrade: scale {scale} does not divide the image size {h}x{w}; "
            f"crop the image to {h - h % max(scale, 1)}x{w - w % max(scale, 1)} first"
        )
    return ifft2c(crop_spectrum(fft2c(hr), (h // scale, w // scale)))


def degrade(hr: torch.Tensor, scale: int, *, output: Literal["magnitude", "real"] = "magnitude") -> torch.Tensor:
    """The LR image that a scanner measuring 1/scale of the k-space per axis would give: (..., H / scale, W / scale).

    `output="magnitude"` is what scanners and the paper's sources give; it folds negative Gibbs lobes. "real" keeps
    them, and is linear. Origin-aligned grid, see `lowpass`.

    Source: section 3.1 ("implemented in the frequency domain", Lyu et al. 2020); the paper gives no formula.
    """
    if output not in ("magnitude", "real"):
        raise ValueError(f'degrade: output must be "magnitude" or "real", not {output!r}')
    low = lowpass(hr, scale)
    return low.abs() if output == "magnitude" else low.real


def zero_fill(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """Zero-filled k-space interpolation: (..., h, w) to (..., scale * h, scale * w), origin-aligned, real part.

    Passes exactly through the LR samples: zero_fill(lr)[..., ::scale, ::scale] == lr.
    """
    h, w = lr.shape[-2:]
    return ifft2c(pad_spectrum(fft2c(lr), (scale * h, scale * w))).real


def _backproject(residual: torch.Tensor, scale: int) -> torch.Tensor:
    """The smallest real HR image whose `lowpass` is the real `residual` (..., h, w).

    For an even size the lowest frequency -n/2 stands for +n/2 as well, so it is written at both, at full amplitude;
    `zero_fill` halves it, which interpolates well but comes back at half after `degrade`.
    """
    h, w = residual.shape[-2:]
    spectrum = fft2c(residual)
    full = pad_spectrum(spectrum, (scale * h, scale * w))
    top, left = _start(scale * h, h), _start(scale * w, w)
    if h % 2 == 0:
        full[..., top + h, :] = full[..., top, :]
    if w % 2 == 0:
        full[..., left + w] = full[..., left]
    return ifft2c(full).real


def data_consistency(sr: torch.Tensor, lr: torch.Tensor, scale: int, *, magnitude: bool = True) -> torch.Tensor:
    """`sr` (..., H, W) corrected so that degrading it gives `lr` (..., H / scale, W / scale) back.

    What the scanner measured is reproduced and only what it did not measure is left to the estimate.

    `magnitude=False` (signed LR, `degrade(..., output="real")`): an orthogonal projection onto the images that explain
    `lr`; the truth is one of them, so the error never grows. `magnitude=True`: the LR has lost its sign where the
    low-passed image rings below zero, so the measured magnitude takes the phase of the estimate's own low-passed image,
    LR * exp(i * angle(lowpass(sr))), before the projection. For a real image that phase is a sign, but for the
    unpaired frequency -n/2 of an even size, which `lowpass` keeps as a small imaginary part.

    Source: ours (not in the paper); naive replacement of the magnitude hurts good estimates.

    Raises:
        ValueError: `lr` does not have the size of `sr` divided by `scale`.
    """
    wanted = tuple(n // scale for n in sr.shape[-2:])
    if tuple(lr.shape[-2:]) != wanted or any(n % scale for n in sr.shape[-2:]):
        raise ValueError(
            f"data_consistency: lr is {tuple(lr.shape[-2:])} and sr {tuple(sr.shape[-2:])}, but sr / {scale} is {wanted}"
        )
    if scale == 1:
        return lr.expand_as(sr).clone()
    low = lowpass(sr, scale)
    if magnitude:
        # torch.sgn is z / |z|, and 0 at 0, where any phase would do
        measured = lr * torch.where(low.abs() == 0, torch.ones_like(low), torch.sgn(low))
    else:
        measured = torch.complex(lr, torch.zeros_like(lr))
    return sr + _complex_backproject(measured - low, scale)
