"""Training losses: the paper's contrastive edge loss, its sum with L1, Charbonnier's loss, and L1 with SSIM."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from deformmamba.annotations import is_number
from deformmamba.errors import InvalidArgument, InvalidType, shown
from deformmamba.metrics import WINDOW, pooled_by_matrices, similarity_map
from deformmamba.tensors import overridable, without_autocast

EDGE_KERNELS = (
    ((0.0, -1.0, 0.0), (-1.0, 4.0, -1.0), (0.0, -1.0, 0.0)),  # E1: 4-neighbour Laplacian
    ((-1.0, 0.0, -1.0), (0.0, 4.0, 0.0), (-1.0, 0.0, -1.0)),  # E2: diagonal Laplacian
    ((1.0, 1.0, 1.0), (1.0, -8.0, 1.0), (1.0, 1.0, 1.0)),  # E3: 8-neighbour Laplacian, E1 + E2 + E3 = 0
)


def check_pair(name: str, sr: torch.Tensor, hr: torch.Tensor) -> None:
    """Refuses tensors that are not two floating-point images of the same shape; `name` is the name of the loss."""
    if isinstance(sr, torch.fx.Proxy):  # a symbolic trace has no shapes
        return
    for what, image in (("sr", sr), ("hr", hr)):
        if not isinstance(image, torch.Tensor):
            raise InvalidType(
                f"{name}: {what} must be a tensor (batch, channel, height, width), not a {type(image).__name__}"
            )
    if sr.shape != hr.shape or sr.ndim != 4 or not (sr.is_floating_point() and hr.is_floating_point()):
        raise InvalidArgument(
            f"{name}: sr is {sr.dtype} {tuple(sr.shape)} and hr {hr.dtype} {tuple(hr.shape)}; "
            "both must be floating point (batch, channel, height, width) of one shape"
        )
    if not sr.numel():
        raise InvalidArgument(f"{name}: the images have no pixels, {tuple(sr.shape)}")


@overridable
def edge_energy(difference: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """The sum over kernels (n, 1, 3, 3) of the mean square of `difference` (b, c, h, w) filtered with each."""
    padded = F.pad(difference.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    with without_autocast(padded.device.type):  # a bf16 Laplacian of a small difference is noise
        edges = F.conv2d(padded, kernels.to(padded))
    return edges.to(torch.promote_types(edges.dtype, torch.float32)).square().mean() * len(kernels)


class ContrastiveEdgeLoss(nn.Module):
    """CELoss: the difference between the edges of two images, under three Laplacian kernels.

    The sum over i of mean((E_i * (sr - hr))^2). Each kernel is applied to every channel separately. Borders are
    replicated, so a constant difference costs nothing.

    `sr`, `hr`: (b, c, h, w), any channel count. Returns a scalar.

    Source: equation 6. The kernels are not printed; these are from the authors' follow-up (arXiv 2504.10105, equation
    14). Departure: the mean square instead of the printed sum, which grows with the image and would dominate L1. The
    three kernels add up to zero, so the third one only changes the weights of the first two.
    """

    kernels: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernels", torch.tensor(EDGE_KERNELS)[:, None], persistent=False)

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        check_pair("ContrastiveEdgeLoss", sr, hr)
        return edge_energy(sr - hr, self.kernels)


class SRLoss(nn.Module):
    """The paper's training loss: mean |sr - hr| + beta * CELoss(sr, hr), beta = 0.1 (equation 7).

    sr, hr: (b, c, h, w) with values of about 0 to 1. Returns a scalar. `beta=0` is the paper's ablation without CELoss.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        if not is_number(beta) or not 0 <= beta < math.inf:
            raise InvalidArgument(f"{type(self).__name__}: beta must be a number of 0 or more, not {shown(beta)}")
        self.beta = beta
        self.edges = ContrastiveEdgeLoss()

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        check_pair(type(self).__name__, sr, hr)
        loss = (sr - hr).abs().mean()
        return loss + self.beta * self.edges(sr, hr) if self.beta else loss

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class L1Loss(SRLoss):
    """Mean |sr - hr| alone."""

    def __init__(self) -> None:
        super().__init__(beta=0.0)


class CharbonnierLoss(nn.Module):
    """Mean of sqrt((sr - hr)^2 + eps^2) - eps for images of about [0, 1]: square below eps, absolute above.

    PSNR measures square errors, which L1 does not minimise, and bright outliers would dominate a square loss.
    Returns a scalar.

    Source: Charbonnier et al. 1994. For photographs, super-resolution uses an eps of 0.001, which is almost L1; the
    default was chosen on a validation scan, where 0.05 gained 0.01 dB over the paper's loss in 500 steps.
    """

    def __init__(self, eps: float = 0.05) -> None:
        super().__init__()
        if not is_number(eps) or not 0 < eps < math.inf:
            raise InvalidArgument(f"CharbonnierLoss: eps must be a number above 0, not {shown(eps)}")
        self.eps = eps

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        check_pair("CharbonnierLoss", sr, hr)
        square = (sr - hr).to(torch.promote_types(sr.dtype, torch.float32)).square()
        return (square / ((square + self.eps**2).sqrt() + self.eps)).mean()  # no difference of large numbers

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class SSIMLoss(nn.Module):
    """Mean |sr - hr| + weight * (1 - SSIM) of images (b, c, h, w) with a data range of 1; SSIM as in `metrics`.

    Images smaller than the window of SSIM (7x7) count with L1 alone. Returns a scalar.

    The weight was chosen for adaptation to a scan, on a validation scan (T2 brain), by its held-out slices. After 150
    steps, 0.1 gives +0.02 dB and +0.0015 SSIM over L1 alone. After 400 steps, 0.3 gives -0.01 dB and +0.001 SSIM over
    0.1; 1.0 gives -0.13 dB and -0.0004 SSIM over 0.3.
    """

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise InvalidArgument(f"SSIMLoss: weight must be a number of 0 or more, not {shown(weight)}")
        self.weight = weight

    def forward(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        check_pair("SSIMLoss", sr, hr)
        loss = (sr - hr).abs().mean()
        if min(sr.shape[-2:]) < WINDOW:
            return loss
        with without_autocast(sr.device.type):  # variances are small differences of large sums
            exact = torch.promote_types(torch.promote_types(sr.dtype, hr.dtype), torch.float32)
            a, b = (image.flatten(0, 1).to(exact) for image in (sr, hr))
            similarity = similarity_map(a, b, 1.0, pooled_by_matrices)
        return loss + self.weight * (1 - similarity.mean())

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


LOSSES: dict[str, type[nn.Module]] = {
    "sr": SRLoss,
    "l1": L1Loss,
    "edges": ContrastiveEdgeLoss,
    "charbonnier": CharbonnierLoss,
    "l1+ssim": SSIMLoss,
}
