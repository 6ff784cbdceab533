"""k-space physics: low-resolution acquisition by cropping k-space, and zero-filling.

Conventions. An image is (..., H, W), real or complex. Its spectrum is centred in FREQUENCY only: `fftshift` is applied
to the spectrum, never to the image, so image index 0 does not move and index n // 2 of the spectrum is frequency 0. The
forward transform divides by H * W ("forward" normalisation): a spectrum holds amplitudes in the image's own unit, and
cropping or zero-padding it keeps intensities without a factor.

Cropping k-space gives an ORIGIN-aligned image: LR[i] lies on HR[scale * i]. See `Grid`.
"""

import operator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from deformmamba.annotations import is_integer, is_one_of
from deformmamba.errors import InvalidArgument, InvalidType, shown

# "origin": LR[i] lies on HR[scale * i] (k-space crop, strided sampling).
# "half-pixel": pixel areas nest, LR[i] lies on HR[scale * i + (scale - 1) / 2] (averaging, F.interpolate's default).
Grid = Literal["origin", "half-pixel"]
GRIDS: tuple[str, ...] = get_args(Grid)


def check_image(name: str, image: Any, scale: Any = 1) -> None:
    """Checks the arguments of the function `name`.

    Raises:
        InvalidType: `image` is not a tensor, or `scale` not an integer.
        InvalidArgument: `image` has no pixels or fewer than two axes, or `scale` is below 1.
    """
    if torch.compiler.is_compiling() or isinstance(image, torch.fx.Proxy):
        return
    if not isinstance(image, torch.Tensor):
        raise InvalidType(f"{name}: the image must be a tensor (..., H, W), not {_kind(image)}")
    if image.ndim < 2 or not image.numel():
        raise InvalidArgument(
            f"{name}: the image must be (..., H, W) with at least one pixel, not {tuple(image.shape)}"
        )
    if image.layout != torch.strided or (image.is_floating_point() and image.element_size() < 2):
        raise InvalidType(f"{name}: the image is {image.layout}, {image.dtype}; give a dense one of ordinary numbers")
    if not is_integer(scale):
        raise InvalidType(f"{name}: scale must be an integer, not {shown(scale)}")
    if scale < 1:
        raise InvalidArgument(f"{name}: scale must be at least 1, not {scale}")


def plain_scale(scale: int) -> int:
    """`scale` as an int of Python: numpy's integers of a few bits would overflow."""
    return scale if isinstance(scale, int) else operator.index(scale)


def undivided(name: str, scale: int, h: int, w: int) -> InvalidArgument:
    """The error of the function `name` for an image of h x w, which `scale` does not divide."""
    small = min(h, w) < scale
    cure = f"it needs {scale}x{scale} pixels or more" if small else f"crop it to {h - h % scale}x{w - w % scale} first"
    return InvalidArgument(f"{name}: scale {scale} does not divide the image size {h}x{w}; {cure}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + ("; torch.from_numpy converts it" if type(value).__name__ == "ndarray" else "")


def _check_size(name: str, size: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(is_integer(n) and n > 0 for n in size):
        raise InvalidArgument(f"{name}: size must be two positive integers (h, w), not {shown(size)}")


def _is_half(image: torch.Tensor) -> bool:
    """Whether an image is in a precision that PyTorch's Fourier transforms do not take on a CPU."""
    return not isinstance(image, torch.fx.Proxy) and image.dtype in (torch.float16, torch.bfloat16)


def _single(image: torch.Tensor) -> torch.Tensor:
    return image.float() if _is_half(image) else image


def fft2c(image: torch.Tensor) -> torch.Tensor:
    """Centred spectrum of `image` (..., H, W), in the image's unit; frequency 0 at index (H // 2, W // 2)."""
    check_image("fft2c", image)
    return torch.fft.fftshift(torch.fft.fft2(_single(image), norm="forward"), dim=(-2, -1))


def ifft2c(spectrum: torch.Tensor) -> torch.Tensor:
    """Complex image of a centred spectrum: the exact inverse of `fft2c`."""
    check_image("ifft2c", spectrum)
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="forward")


def _start(n: int, m: int) -> int:
    """The index of the first of the central m of n frequencies. (n - m) // 2 would lose frequency 0 for 252 -> 63."""
    return n // 2 - m // 2


def _check_spectrum(name: str, spectrum: Any, size: Any, *, grows: bool = False) -> None:
    check_image(name, spectrum)
    _check_size(name, size)
    if torch.compiler.is_compiling() or isinstance(spectrum, torch.fx.Proxy):
        return
    (h, w), (rows, columns) = size, spectrum.shape[-2:]
    if (h < rows or w < columns) if grows else (h > rows or w > columns):
        raise InvalidArgument(
            f"{name}: the spectrum is {rows}x{columns}; size must not be {'smaller' if grows else 'larger'} than that, "
            f"but is {h}x{w}"
        )


def crop_spectrum(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The central `size` = (h, w) frequencies of a centred spectrum (..., H, W)."""
    _check_spectrum("crop_spectrum", spectrum, size)
    top, left = (_start(n, m) for n, m in zip(spectrum.shape[-2:], size, strict=True))
    return spectrum[..., top : top + size[0], left : left + size[1]]


def pad_spectrum(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The adjoint of `crop_spectrum`: zeros around a centred spectrum until it is `size` = (H, W)."""
    _check_spectrum("pad_spectrum", spectrum, size, grows=True)
    (top, bottom), (left, right) = (
        (_start(n, m), n - m - _start(n, m)) for n, m in zip(size, spectrum.shape[-2:], strict=True)
    )
    return F.pad(spectrum, (left, right, top, bottom))


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Complex image (..., h, w) of the central `size` = (h, w) frequencies of `image` (..., H, W), not larger.

    ifft2c(crop_spectrum(fft2c(image), size)), without the shifts, which take longer than the transforms, and with half
    a spectrum of a real image: its other half is conj of the frequencies' negatives.
    """
    check_image("resize", image)
    _check_size("resize", size)
    image = _single(image)
    (n_rows, n_columns), (h, w) = image.shape[-2:], size
    if not (0 < h <= n_rows and 0 < w <= n_columns):
        raise InvalidArgument(f"resize: {h}x{w} frequencies wanted, but the image has only {n_rows}x{n_columns}")

    def central(n: int, m: int) -> torch.Tensor:
        """The indices of the central m of n frequencies in a spectrum that was not shifted: 0, 1, ... -2, -1."""
        k = torch.arange(m, device=image.device)
        return torch.where(k < m - m // 2, k, k + n - m)

    rows = central(n_rows, h)
    if image.is_complex():
        columns = central(n_columns, w)
        kept = torch.fft.fft2(image, norm="forward").index_select(-2, rows).index_select(-1, columns)
    else:
        half = torch.fft.rfft2(image, norm="forward")[..., : w // 2 + 1]
        mirrored = half[..., 1:].index_select(-2, -rows % n_rows).conj().flip(-1)
        kept = torch.cat([half[..., : w - w // 2].index_select(-2, rows), mirrored], dim=-1)
    return torch.fft.ifft2(kept, norm="forward")


def lowpass(hr: torch.Tensor, scale: int) -> torch.Tensor:
    """Complex LR image (..., H / scale, W / scale) of the central 1/scale x 1/scale of the k-space of `hr`.

    Intensity is preserved and nothing is clipped (Gibbs overshoot is real: a maximum of 1 can become 1.16).

    Raises:
        ValueError: `scale` is below 1, or does not divide H and W.
    """
    check_image("degrade", hr, scale)
    scale = plain_scale(scale)
    h, w = hr.shape[-2:]
    if h % scale or w % scale:
        raise undivided("degrade", scale, h, w)
    return resize(hr, (h // scale, w // scale))


def degrade(hr: torch.Tensor, scale: int, *, output: Literal["magnitude", "real"] = "magnitude") -> torch.Tensor:
    """The LR image that a scanner measuring 1/scale of the k-space per axis would give: (..., H / scale, W / scale).

    `output="magnitude"` is what scanners and the paper's sources give; it folds negative Gibbs lobes. "real" keeps
    them, and is linear. Origin-aligned grid, see `lowpass`.

    `hr`: (..., H, W), real or complex, in any units, which the result keeps.

    Raises:
        InvalidArgument: `scale` does not divide H and W, or is below 1; an unknown `output`.

    Source: section 3.1 ("implemented in the frequency domain", Lyu et al. 2020); the paper gives no formula.
    """
    if not is_one_of(output, ("magnitude", "real")):
        raise InvalidArgument(f'degrade: output must be "magnitude" or "real", not {shown(output)}')
    low = lowpass(hr, scale)
    made = low.abs() if output == "magnitude" else low.real
    return made.to(hr.dtype) if hr.is_floating_point() else made


def zero_fill(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """Zero-filled k-space interpolation: (..., h, w) to (..., scale * h, scale * w), origin-aligned, real part.

    Passes exactly through the LR samples: zero_fill(lr)[..., ::scale, ::scale] == lr. `lr`: real or
    complex, in any units, which the result keeps. Raises InvalidArgument for a scale below 1.

    ifft2c(pad_spectrum(fft2c(lr), size)).real; for a real image it is computed from half a spectrum, without shifts. An
    even size has the frequency -n/2 but not +n/2; taking the real part divides it equally between both.
    """
    check_image("zero_fill", lr, scale)
    scale = plain_scale(scale)
    if _is_half(lr):
        return zero_fill(lr.float(), scale).to(lr.dtype)
    if not (isinstance(lr, torch.fx.Proxy) or lr.is_floating_point() or lr.is_complex()):
        lr = lr.to(torch.get_default_dtype())
    h, w = lr.shape[-2:]
    size = (scale * h, scale * w)
    if lr.is_complex() or scale == 1:
        return ifft2c(pad_spectrum(fft2c(lr), size)).real
    half = torch.fft.rfft2(lr, norm="forward")  # columns 0 ... w // 2
    unpaired_row = (2 * torch.arange(h, device=lr.device) == h)[:, None]
    unpaired_column = 2 * torch.arange(w // 2 + 1, device=lr.device) == w
    shared = half * (1 - 0.5 * (unpaired_row | unpaired_column).to(lr.dtype))
    upper = shared[..., : h // 2 + 1, :]
    # (-h/2, -w/2) is one frequency, and (h/2, w/2) its negative: (-h/2, w/2) is another, which is empty
    lower = (shared * (~(unpaired_row & unpaired_column)).to(lr.dtype))[..., h - h // 2 :, :]
    gap = half.new_zeros(()).expand(*half.shape[:-2], size[0] - 2 * (h // 2) - 1, w // 2 + 1)
    return torch.fft.irfft2(torch.cat([upper, gap, lower], dim=-2), s=size, norm="forward")
