"""Corrects an isotropic image so that the slice profile applied to it gives the slices of the scan."""

import torch
import torch.nn.functional as F

from deformmamba.physics.consistency import Consistency
from deformmamba.physics.slice_profile import ThickSlices, back_projected

CONSISTENCY_STEPS = 3  # of conjugate gradients; about a twentieth of the difference remains
TISSUE = 0.1  # as a share of the intensity range; brighter voxels are not air
NOISE_BLOCK = 8  # wavelet details, so 16 pixels


def consistent(image: torch.Tensor, slices: torch.Tensor, operator: ThickSlices, how: Consistency) -> torch.Tensor:
    """Corrects `image` (n_fine, h, w) so that `operator` maps it to `slices`.

    "exact": everywhere, by conjugate gradients. "object": inside the anatomy only, and only the share of the difference
    that noise does not explain (the gain of a Wiener filter). Otherwise the correction would restore the noise that the
    network removed, and spread it between the slices. On validation images degraded by a factor of 4, exact consistency
    gains +0.35 dB without noise and -0.13 dB if each slice has noise of 2 % of the range.
    """
    if how == "off":
        return image
    change = back_projected(image, slices, operator, axis=0, steps=CONSISTENCY_STEPS)[0] - image
    if how == "exact":
        return image + change
    anatomy = F.max_pool2d((slices > TISSUE).float()[:, None], 5, 1, 2)[:, 0]
    difference = (operator(image, 0) - slices)[anatomy > 0]
    power = float(difference.square().mean()) if difference.numel() else 0.0
    share = max(0.0, 1 - noise_level(slices) ** 2 / power) if power > 0 else 0.0
    # a voxel is in the anatomy if the slice with its largest weight is
    return image + share * anatomy[operator.matrix.argmax(0)] * change


def noise_level(slices: torch.Tensor) -> float:
    """The standard deviation of the noise inside the anatomy of (n, h, w), from the blocks with the least texture.

    It is computed from the power of the diagonal detail coefficients of the Haar wavelet, averaged over blocks of 16x16
    pixels. The 5th percentile over the blocks is used, because blocks with more power have texture.

    Source: the wavelet estimate of Donoho & Johnstone, Biometrika 81 (1994), in blocks.
    """
    h, w = (n - n % 2 for n in slices.shape[1:])
    a, b = slices[:, 0:h:2, 0:w:2], slices[:, 0:h:2, 1:w:2]
    c, d = slices[:, 1:h:2, 0:w:2], slices[:, 1:h:2, 1:w:2]
    if min(h, w) < 2 * NOISE_BLOCK:
        return 0.0
    power = F.avg_pool2d(((a - b - c + d) / 2).square()[:, None], NOISE_BLOCK)
    inside = F.avg_pool2d(((a + b + c + d) / 4 > TISSUE).float()[:, None], NOISE_BLOCK) > 0.95
    return float(power[inside].quantile(0.05).sqrt()) if bool(inside.any()) else 0.0
