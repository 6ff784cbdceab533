"""CELoss, its sum with L1, Charbonnier's loss, and L1 with SSIM: definition, invariances, gradients."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from tolerances import assert_close

from deformmamba.losses import EDGE_KERNELS, LOSSES, CharbonnierLoss, ContrastiveEdgeLoss, SRLoss, SSIMLoss
from deformmamba.metrics import pooled, pooled_by_matrices, ssim


def pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, dtype=dtype, generator=generator) for _ in range(2))


def test_equal_to_the_definition_with_an_independent_convolution():
    sr, hr = pair(2, 3, 9, 11)
    wanted = 0.0
    for kernel in EDGE_KERNELS:
        edges = [convolve((sr - hr)[i, c].numpy(), kernel, mode="nearest") for i in range(2) for c in range(3)]
        wanted += sum((e**2).mean() for e in edges) / len(edges)
    assert ContrastiveEdgeLoss()(sr, hr).item() == pytest.approx(wanted)
    assert SRLoss()(sr, hr).item() == pytest.approx((sr - hr).abs().mean().item() + 0.1 * wanted)


def test_the_kernels_see_no_constant_and_add_up_to_zero():
    kernels = torch.tensor(EDGE_KERNELS)
    assert kernels.sum((-2, -1)).eq(0).all()
    assert kernels.sum(0).eq(0).all()
    sr, _ = pair(1, 1, 8, 8)
    assert ContrastiveEdgeLoss()(sr + 3, sr).item() == pytest.approx(0, abs=1e-20)


def test_the_ssim_loss_is_l1_and_the_measured_ssim():
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(2, 1, 24, 20, generator=generator)
    hr[:, :, 0, 0] = 1  # the metric's data range is the maximum
    sr = hr + 0.1 * torch.randn(hr.shape, generator=generator)
    loss = SSIMLoss(0.4)
    wanted = float((sr - hr).abs().mean()) + 0.4 * (1 - ssim(sr[:, 0], hr[:, 0]))
    assert float(loss(sr, hr)) == pytest.approx(wanted, abs=1e-5)  # float32 against float64
    channels = torch.stack([sr[0], sr[1]], 1), torch.stack([hr[0], hr[1]], 1)
    assert float(loss(*channels)) == pytest.approx(wanted, abs=1e-5)
    assert float(loss(hr, hr)) == pytest.approx(0, abs=1e-6)
    assert_close(pooled_by_matrices(sr[:, 0]), pooled(sr[:, 0]))
    small = loss(sr[:, :, :6], hr[:, :, :6])
    assert float(small) == pytest.approx(float((sr - hr)[:, :, :6].abs().mean()))
    with pytest.raises(ValueError, match="weight must be a number of 0 or more, not -1"):
        SSIMLoss(-1)


def test_the_charbonnier_loss_is_square_below_eps_and_absolute_above():
    sr, hr = (image.double() for image in pair(1, 1, 8, 8))
    wanted = np.mean(np.hypot((sr - hr).numpy(), 0.2) - 0.2)
    assert CharbonnierLoss(0.2)(sr, hr).item() == pytest.approx(wanted)
    assert CharbonnierLoss(0.2)(hr + 1e-4, hr).item() == pytest.approx(1e-8 / 0.4, rel=1e-6)
    assert CharbonnierLoss(0.2)(hr + 1e4, hr).item() == pytest.approx(1e4 - 0.2)
    half = CharbonnierLoss()(sr.bfloat16(), hr.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="eps must be a number above 0, not 0"):
        CharbonnierLoss(0)


def test_the_ssim_loss_is_exact_in_half_precision():
    sr, hr = pair(1, 1, 16, 16)
    rounded = sr.bfloat16(), hr.bfloat16()
    wanted, exact = SSIMLoss()(*(image.double() for image in rounded)), SSIMLoss()(sr, hr)
    torch.testing.assert_close(SSIMLoss()(*rounded).double(), wanted, rtol=1e-2, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(SSIMLoss()(sr, hr), exact)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [(5, 6), (8, 9)])  # below and above the window of SSIM
def test_every_loss_is_zero_for_equal_images_and_differentiable(name, size):
    loss = LOSSES[name]()
    sr, hr = pair(1, 2, *size)
    assert loss(hr, hr).item() == 0
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), sr.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_loses_the_difference(dtype):
    sr, hr = pair(1, 1, 16, 16)
    wanted = ContrastiveEdgeLoss()(sr, hr)
    torch.testing.assert_close(ContrastiveEdgeLoss()(sr.to(dtype), hr.to(dtype)).double(), wanted, rtol=0.05, atol=0)
    assert torch.isfinite(ContrastiveEdgeLoss()((200 * sr).to(dtype), hr.to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ContrastiveEdgeLoss()(sr, hr), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_differ_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{LOSSES[name].__name__}: .*\(1, 1, 8, 8\).*\(1, 1, 8, 9\).*of one shape"):
        LOSSES[name]()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="floating point"):
        LOSSES[name]()(torch.zeros(1, 1, 8, 8).long(), torch.zeros(1, 1, 8, 8).long())
