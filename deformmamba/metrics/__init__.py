"""PSNR, SSIM, NMSE, HFEN and LPIPS with a named protocol; the choice of protocol alone changes results by 5 dB.

A volume is (slices, H, W), or (H, W) for one slice, a numpy array or a tensor; results are Python floats, computed in
float64 (LPIPS in float32). In every protocol SSIM is Wang et al. 2004 as fastMRI and scikit-image compute it: a uniform
7x7 window, sample covariance, K1 = 0.01, K2 = 0.03, averaged over the pixels whose window lies inside the image.

Protocols:
    volume: one PSNR over the whole volume, data range = its HR maximum; SSIM of each slice with that same range,
        averaged over slices (as fastMRI, T2Net and SANet; assumed for the paper, which does not state it).
    slice: PSNR and SSIM of each slice with the slice's own HR maximum as data range, averaged over slices. Slices
        without signal (HR maximum 0) are left out.
    foreground: as volume, but over the pixels of `foreground(hr)` only, all slices pooled (SSIM: the windows centred on
        them). Air has small errors: in an image that is two thirds empty, `volume` gives about 4 dB more.

A pixel that is NaN makes a score NaN, or is refused.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.annotations import is_one_of
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.extras import MissingExtra, require
from deformmamba.tensors import constant, on_cpu_by_default

Protocol = Literal["volume", "slice", "foreground"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
Array = np.ndarray | torch.Tensor
WINDOW = 7
# of the 99.9th percentile of the HR volume: above the noise of air, below every tissue but cortical bone
FOREGROUND_LEVEL = 0.1
# slices per step: 1,000 slices in float64 with their moments would need gigabytes
_AT_ONCE = 8


class _Pair(NamedTuple):
    """Both volumes as (slices, H, W) in float64, the data range of each slice (slices,), and the mask of the pixels
    that count."""

    sr: torch.Tensor
    hr: torch.Tensor
    peak: torch.Tensor
    mask: torch.Tensor | None


def _tensor(x: Array, name: str) -> torch.Tensor:
    """`x` as a tensor of real numbers; arrays of any byte order and width become float64."""
    if not isinstance(x, np.ndarray | torch.Tensor) and hasattr(x, "__array__"):
        x = np.asarray(x)
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise InvalidType(f"metrics: {name} is a {type(x).__name__}; wanted a numpy array or a tensor")
    if np.ma.is_masked(x):
        raise InvalidArgument(f"metrics: {name} has masked pixels, which would count; fill them in both volumes first")
    if isinstance(x, torch.Tensor) and x.layout != torch.strided:
        raise InvalidType(f"metrics: {name} is a sparse tensor; give a dense one, as from to_dense()")
    kind = x.dtype.kind if isinstance(x, np.ndarray) else ""
    if kind == "c" or (isinstance(x, torch.Tensor) and x.is_complex()):
        raise InvalidType(f"metrics: {name} is complex ({x.dtype}); take the magnitude first, such as abs({name})")
    if kind not in "biuf":
        raise InvalidType(f"metrics: {name} holds {x.dtype}; wanted real numbers")
    return torch.as_tensor(np.ascontiguousarray(x, np.float64) if isinstance(x, np.ndarray) else x).detach()


def _pair(sr: Array, hr: Array, protocol: str) -> _Pair:
    a, b = _tensor(sr, "sr"), _tensor(hr, "hr")
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise InvalidArgument(
            f"metrics: sr is {tuple(a.shape)} and hr {tuple(b.shape)}; wanted the same shape, (slices, H, W) or (H, W)"
        )
    if not b.numel():
        raise InvalidArgument(f"metrics: sr and hr have no pixels, {tuple(b.shape)}")
    if not is_one_of(protocol, PROTOCOLS):
        raise InvalidArgument(f"metrics: unknown protocol {shown(protocol)}; protocols: {', '.join(PROTOCOLS)}")
    a, b = (x.double().reshape(-1, *x.shape[-2:]) for x in (a, b))
    peak = b.amax((-2, -1))
    if protocol == "foreground" and not a.isfinite().all():
        raise InvalidArgument(
            'metrics: sr holds NaN or infinite values; protocol "foreground" would leave out those in air; replace them'
        )
    if protocol == "slice":
        signal = ~(peak <= 0)  # also a slice with NaN, whose peak is NaN
        if not a[~signal].isfinite().all():
            raise InvalidArgument(
                "metrics: sr holds NaN or infinite values in a slice that is empty in hr; "
                'protocol "slice" would leave it out; replace them'
            )
        a, b, peak = a[signal], b[signal], peak[signal]
    else:
        peak = peak.max().expand(len(b))
    if not len(b) or (peak <= 0).any():
        raise InvalidArgument("metrics: hr has no positive value, so it has no data range")
    return _Pair(a, b, peak, foreground(b) if protocol == "foreground" else None)


@on_cpu_by_default
def foreground(hr: Array) -> torch.Tensor:
    """The pixels inside the body, bool, of the shape of `hr`: (slices, H, W) or (H, W).

    The rule: a pixel is bright if it exceeds `FOREGROUND_LEVEL` times the 99.9th percentile of the non-zero values of
    the volume; a pixel belongs to the foreground if bright pixels lie at or beyond it in all four directions of its
    slice: left and right in its row, above and below in its column. So dark tissue inside the body counts, and air
    around it does not. It depends on HR alone. It is made for heads: if a surface coil leaves half of the image at
    noise level, the edge of the mask is ragged.
    """
    b = _tensor(hr, "hr").double()
    if b.ndim not in (2, 3):
        raise InvalidArgument(f"metrics: hr is {tuple(b.shape)}; wanted (slices, H, W) or (H, W)")
    if not b.isfinite().all():
        raise InvalidArgument("metrics: hr holds NaN or infinite values, so its foreground is unknown; replace them")
    values = b[b != 0].flatten()
    if not values.numel():
        return torch.zeros_like(b, dtype=torch.bool)
    level = np.percentile(values.cpu().numpy(), 99.9) * FOREGROUND_LEVEL
    bright = (b > level).to(torch.uint8)
    inside = torch.ones_like(b, dtype=torch.bool)
    for dim in (-2, -1):
        inside &= bright.cummax(dim).values.bool() & bright.flip(dim).cummax(dim).values.flip(dim).bool()
    return inside


def _sums(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """For each slice: the sum of x (slices, H, W) over the mask, and the number of pixels in the mask."""
    if mask is None:
        return x.sum((-2, -1)), torch.full((len(x),), float(x[0].numel()), dtype=x.dtype, device=x.device)
    return torch.where(mask, x, 0).sum((-2, -1)), mask.sum((-2, -1)).to(x.dtype)


@on_cpu_by_default
def psnr(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal volumes.

    Args:
        sr, hr: result and truth, (slices, H, W) or (H, W), real, in the same units; arrays or tensors.
        protocol: "volume": one value for the volume, data range = maximum of `hr`; "slice": the mean over slices, each
            with its own maximum; "foreground": as "volume", without the pixels in air. See docs/metrics.md.

    Raises:
        InvalidArgument: shapes that differ or are not 2-D or 3-D, an unknown protocol, no positive value in `hr`, or
            values that are not finite in pixels that the protocol leaves out.
        InvalidType: complex or sparse input, or no arrays.
    """
    a, b, peak, mask = _pair(sr, hr, protocol)
    error, n = _sums((a - b).square(), mask)
    if protocol == "slice":
        return float((10 * (peak.square() * n / error).log10()).mean())
    return float(10 * (peak[0].square() * n.sum() / error.sum()).log10())


def pooled(x: torch.Tensor) -> torch.Tensor:
    """The mean of each 7x7 window inside the images (n, h, w)."""
    return F.avg_pool2d(x[:, None], WINDOW, stride=1)[:, 0]


def pooled_by_matrices(x: torch.Tensor) -> torch.Tensor:
    """As `pooled`, by two products with banded matrices: ten times as fast for training patches on a CPU."""

    def band(n: int) -> torch.Tensor:
        return torch.ones(n - WINDOW + 1, n, dtype=x.dtype, device=x.device).triu().tril(WINDOW - 1) / WINDOW

    return band(x.shape[-2]) @ x @ band(x.shape[-1]).T


def similarity_map(
    a: torch.Tensor,
    b: torch.Tensor,
    peak: torch.Tensor | float,
    window_mean: Callable[[torch.Tensor], torch.Tensor] = pooled,
) -> torch.Tensor:
    """SSIM of each 7x7 window inside the images (n, h, w); (n, h - 6, w - 6), differentiable.

    `peak`: the data range, a number or (n, 1, 1).
    """
    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean_a, mean_b = window_mean(a), window_mean(b)
    var_a = sample * (window_mean(a * a) - mean_a**2)
    var_b = sample * (window_mean(b * b) - mean_b**2)
    cov = sample * (window_mean(a * b) - mean_a * mean_b)
    c1, c2 = ((k * peak) ** 2 for k in (0.01, 0.03))
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _similarity(pair: _Pair) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`_sums` of the SSIM map, for a few slices at a time."""
    if min(pair.hr.shape[-2:]) < WINDOW:
        raise InvalidArgument(
            f"ssim: slices are {tuple(pair.hr.shape[-2:])}, smaller than the {WINDOW}x{WINDOW} window"
        )

    edge = WINDOW // 2
    for start in range(0, len(pair.hr), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        a, b, peak = pair.sr[some], pair.hr[some], pair.peak[some]
        similarity = similarity_map(a, b, peak[:, None, None])
        yield _sums(similarity, None if pair.mask is None else pair.mask[some, edge:-edge, edge:-edge])


@on_cpu_by_default
def ssim(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Structural similarity with a uniform 7x7 window, 1 for equal volumes: the mean over windows and slices.

    Arguments and errors as in `psnr`; also raises InvalidArgument for slices smaller than 7x7. The data range follows
    from the protocol.

    Source: Wang et al. 2004, with the window of fastMRI and scikit-image.
    """
    total, n = map(torch.cat, zip(*_similarity(_pair(sr, hr, protocol)), strict=True))
    if not n.any():
        raise InvalidArgument("ssim: no foreground pixel whose 7x7 window lies inside the image")
    return float(total.sum() / n.sum())  # without a mask this is the mean over slices


def _energies(x: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None, protocol: str) -> torch.Tensor:
    """|x|^2 / |reference|^2 of the whole volume, (1,), or of each slice with signal, (slices,)."""
    error, energy = (_sums(image.square(), mask)[0] for image in (x, reference))
    if protocol != "slice":
        error, energy = error.sum(0, keepdim=True), energy.sum(0, keepdim=True)
    return error / energy


@on_cpu_by_default
def nmse(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Normalised mean squared error |sr - hr|^2 / |hr|^2, of the volume (fastMRI) or averaged over slices.

    Arguments and errors as in `psnr`.
    """
    a, b, _, mask = _pair(sr, hr, protocol)
    return float(_energies(a - b, b, mask, protocol).mean())


@on_cpu_by_default
def by_slice(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> dict[str, list[float]]:
    """PSNR, SSIM and NMSE of each slice with the data range of the protocol.

    In the protocols "volume" and "foreground", the PSNR of the volume pools the squared errors, so it is not the mean
    of these values. Slices without a foreground pixel, or with zeros only (NMSE), are left out of the list; a slice of
    `sr` with NaN is not.
    """
    pair = _pair(sr, hr, protocol)
    a, b, peak, mask = pair
    (error, n), (energy, _) = _sums((a - b).square(), mask), _sums(b.square(), mask)
    total, windows = map(torch.cat, zip(*_similarity(pair), strict=True))
    return {
        "psnr": (10 * (peak.square() * n / error).log10())[n > 0].tolist(),
        "ssim": (total / windows)[windows > 0].tolist(),
        "nmse": (error / energy)[(energy != 0) | error.isnan()].tolist(),
    }


METRICS = {"psnr": psnr, "ssim": ssim, "nmse": nmse}


# ------------------------------------------------------------------------------------------------------ when asked for


@constant(maxsize=1)
def _laplacian_of_gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian of standard deviation 1.5 pixels, 15 taps, sum 1; and its second derivative."""
    x = torch.arange(-7, 8, dtype=torch.float64)
    gaussian = torch.exp(-(x**2) / (2 * 1.5**2))
    gaussian /= gaussian.sum()
    return gaussian, (x**2 / 1.5**4 - 1 / 1.5**2) * gaussian


def _edges(x: torch.Tensor) -> torch.Tensor:
    """The Laplacian of Gaussian of each slice (slices, H, W), edges replicated."""
    gaussian, second = (kernel.to(x.device) for kernel in _laplacian_of_gaussian())
    padded = F.pad(x[:, None], (7, 7, 7, 7), mode="replicate")

    def separable(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(padded, rows[None, None, :, None]), columns[None, None, None, :])[:, 0]

    return separable(second, gaussian) + separable(gaussian, second)


@on_cpu_by_default
def hfen(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """High-frequency error norm |LoG(sr - hr)| / |LoG(hr)|: 0 for equal volumes, about 1 if all edges are missing.

    LoG is a Laplacian of Gaussian of 15x15 pixels and standard deviation 1.5, edges replicated.

    Source: Ravishankar and Bresler, IEEE TMI 30 (2011), section IV, divided by the norm of the reference.
    """
    a, b, _, mask = _pair(sr, hr, protocol)
    return float(_energies(_edges(a - b), _edges(b), mask, protocol).sqrt().mean())


@on_cpu_by_default
def lpips(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Learned perceptual distance (AlexNet, version 0.1) of each slice, averaged over slices; 0 for equal volumes.

    A slice is divided by the data range of the protocol, clipped to [0, 1], and passed to the network as a grey image.
    The network was trained on photographs, so LPIPS is a second opinion and not a measure of anatomy. It needs whole
    slices, so the protocol "foreground" is refused.

    The extra `lpips` installs the package with its linear layers. AlexNet's weights come from torchvision and must
    already be in torch's model cache, because this function downloads nothing.

    Source: Zhang et al., CVPR 2018.

    Raises:
        MissingExtra: the package, torchvision or AlexNet's weights are missing; the message states how to get them.
        ValueError: slices smaller than 32x32, or the protocol "foreground".
    """
    if protocol == "foreground":
        raise InvalidArgument(
            'lpips: protocol is "foreground", but its network needs whole slices; use "volume" or "slice"'
        )
    a, b, peak, _ = _pair(sr, hr, protocol)
    if min(b.shape[-2:]) < 32:
        raise InvalidArgument(f"lpips: slices are {tuple(b.shape[-2:])}; AlexNet needs 32x32 or more")
    network = _lpips_network()
    images = [(x / peak[:, None, None]).clamp(0, 1).float().cpu()[:, None].expand(-1, 3, -1, -1) for x in (a, b)]
    with torch.inference_mode():
        distances = [network(x, y, normalize=True) for x, y in zip(*(i.split(_AT_ONCE) for i in images), strict=True)]
    return float(torch.cat(distances).double().mean())


# AlexNet's file in torch's cache; torchvision.models.AlexNet_Weights.IMAGENET1K_V1 names it
ALEXNET = "alexnet-owt-7be5be79.pth"


@cache
def _lpips_network() -> Callable[..., torch.Tensor]:
    import os
    import warnings

    try:
        package: Any = require("lpips", extra="lpips", what="LPIPS")
    except RuntimeError as error:  # a torchvision that does not fit the installed torch
        raise MissingExtra(f"LPIPS needs a torchvision that works with this torch ({error})") from None
    path = os.path.join(torch.hub.get_dir(), "checkpoints", ALEXNET)
    if not os.path.isfile(path):
        raise MissingExtra(
            f"LPIPS needs AlexNet's weights at {path}, and nothing is downloaded here; get them once with: "
            "python -c 'import torchvision; torchvision.models.alexnet(weights=\"IMAGENET1K_V1\")'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision with a deprecated argument
        return package.LPIPS(net="alex", verbose=False).eval()


ON_REQUEST = {"hfen": hfen, "lpips": lpips}
