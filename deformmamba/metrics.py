"""PSNR, SSIM and NMSE by named protocol: the choice of protocol alone moves results by 5 dB, so it is never implied.

A volume is (slices, H, W), or (H, W) for one slice, a numpy array or a tensor; results are Python floats, computed in
float64. In every protocol SSIM is Wang et al. 2004 as fastMRI and scikit-image compute it: a uniform 7x7 window, sample
covariance, K1 = 0.01, K2 = 0.03, averaged over the pixels whose window lies inside the image.

Protocols:
    volume: one PSNR over the whole volume, data range = its HR maximum; SSIM of each slice with that same range,
        averaged over slices (fastMRI, T2Net, SANet; inferred for the paper, which does not say).
    slice: PSNR and SSIM of each slice with the slice's own HR maximum as data range, averaged over slices. Slices with
        no signal (HR maximum 0) have no such range and are left out.
"""

from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

Protocol = Literal["volume", "slice"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
Array = np.ndarray | torch.Tensor
WINDOW = 7


def _pair(sr: Array, hr: Array, protocol: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both volumes as (slices, H, W) in float64, and the data range of each slice (slices,)."""
    a, b = (torch.as_tensor(np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x) for x in (sr, hr))
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(
            f"metrics: sr is {tuple(a.shape)} and hr {tuple(b.shape)}; both must be (slices, H, W) or (H, W), the same"
        )
    if protocol not in PROTOCOLS:
        raise ValueError(f"metrics: no protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    a, b = (x.detach().double().reshape(-1, *x.shape[-2:]) for x in (a, b))
    peak = b.amax((-2, -1))
    if protocol == "volume":
        peak = peak.max().expand(len(b))
    else:
        a, b, peak = a[peak > 0], b[peak > 0], peak[peak > 0]
    if not len(b) or (peak <= 0).any():
        raise ValueError("metrics: hr has no positive value, so it has no data range")
    return a, b, peak


def psnr(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Peak signal to noise ratio in dB; infinite for equal volumes."""
    a, b, peak = _pair(sr, hr, protocol)
    error = (a - b).square()
    mse = error.mean() if protocol == "volume" else error.mean((-2, -1))
    ratio = (peak[0] if protocol == "volume" else peak).square() / mse
    return float(10 * ratio.log10().mean())


def _ssim(a: torch.Tensor, b: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    """SSIM of each slice, (slices,)."""
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim: slices are {tuple(a.shape[-2:])}, smaller than the {WINDOW}x{WINDOW} window")
    if len(a) > 8:  # a few slices at a time: a volume of 1,000 in float64 with its moments would take gigabytes
        return torch.cat([_ssim(*part) for part in zip(a.split(8), b.split(8), peak.split(8), strict=True)])

    def window_mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x[:, None], WINDOW, stride=1)[:, 0]

    sample = WINDOW**2 / (WINDOW**2 - 1)
    mean_a, mean_b = window_mean(a), window_mean(b)
    var_a = sample * (window_mean(a * a) - mean_a**2)
    var_b = sample * (window_mean(b * b) - mean_b**2)
    cov = sample * (window_mean(a * b) - mean_a * mean_b)
    c1, c2 = ((k * peak[:, None, None]) ** 2 for k in (0.01, 0.03))
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((-2, -1))


def ssim(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Structural similarity, 1 for equal volumes. Slices must be at least 7x7."""
    return float(_ssim(*_pair(sr, hr, protocol)).mean())


def nmse(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> float:
    """Normalised mean squared error |sr - hr|^2 / |hr|^2, of the volume or averaged over slices."""
    a, b, _ = _pair(sr, hr, protocol)
    dims = (-3, -2, -1) if protocol == "volume" else (-2, -1)
    return float(((a - b).square().sum(dims) / b.square().sum(dims)).mean())


def by_slice(sr: Array, hr: Array, *, protocol: Protocol = "volume") -> dict[str, list[float]]:
    """PSNR and SSIM of every slice with the data range of the protocol: what a spread over slices is the spread of.

    Under "volume" the PSNR of the volume is not the mean of these: it pools the squared errors.
    """
    a, b, peak = _pair(sr, hr, protocol)
    mse = (a - b).square().mean((-2, -1))
    return {"psnr": (10 * (peak.square() / mse).log10()).tolist(), "ssim": _ssim(a, b, peak).tolist()}


METRICS = {"psnr": psnr, "ssim": ssim, "nmse": nmse}
