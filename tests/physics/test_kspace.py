"""Properties of the Fourier transforms, the degradation and data consistency, at odd and even sizes, in float64."""

import itertools

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.physics import kspace
from deformmamba.physics.consistency import data_consistency
from deformmamba.physics.kspace import degrade, fft2c, ifft2c, lowpass, zero_fill

SIZES = list(itertools.product((16, 20, 24, 36), (16, 20, 28)))  # at 2x and 4x these give odd and even LR sizes


def image(h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (9, 5), (1, 6)])
def test_fft_is_invertible_and_keeps_energy(h, w):
    x = image(h, w)
    assert_close(ifft2c(fft2c(x)).real, x)
    assert_close(fft2c(x).abs().square().sum((-2, -1)), x.square().mean((-2, -1)))


def test_the_centre_of_the_spectrum_is_the_mean():
    x = image(9, 12)
    assert_close(fft2c(x)[..., 4, 6].real, x.mean((-2, -1)))


@pytest.mark.parametrize(("n", "m"), [(252, 63), (256, 64), (10, 5), (12, 3), (9, 3), (9, 4)])
def test_crop_keeps_frequency_zero_at_the_centre_and_pad_is_its_adjoint(n, m):
    spectrum = torch.zeros(n, n)
    spectrum[n // 2, n // 2] = 1
    assert kspace.crop_spectrum(spectrum, (m, m))[m // 2, m // 2] == 1
    x, y = torch.randn(n, n), torch.randn(m, m)
    torch.testing.assert_close(
        (kspace.crop_spectrum(x, (m, m)) * y).sum(), (x * kspace.pad_spectrum(y, (n, n))).sum(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_degrade_keeps_intensity_and_lies_on_the_origin_grid(h, w, scale):
    assert_close(degrade(torch.full((h, w), 3.0), scale), torch.full((h // scale, w // scale), 3.0))
    # a band-limited image: its samples at scale * i are the LR image, exactly
    y, x = torch.meshgrid(
        torch.arange(h, dtype=torch.float64) / h, torch.arange(w, dtype=torch.float64) / w, indexing="ij"
    )
    wave = 2 + torch.cos(2 * torch.pi * (x + 0.1)) + 0.5 * torch.sin(2 * torch.pi * (y - x))
    assert_close(degrade(wave, scale), wave[::scale, ::scale])
    assert_close(zero_fill(wave[::scale, ::scale], scale), wave)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_zero_fill_passes_through_the_samples(h, w, scale):
    lr = image(h // scale, w // scale)
    assert_close(zero_fill(lr, scale)[..., ::scale, ::scale], lr)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("magnitude", [True, False])
def test_data_consistency_gives_the_measured_image_back(h, w, scale, magnitude):
    hr, estimate = image(h, w), image(h, w, seed=1)
    output = "magnitude" if magnitude else "real"
    lr = degrade(hr, scale, output=output)
    corrected = data_consistency(estimate, lr, scale, magnitude=magnitude)
    torch.testing.assert_close(degrade(corrected, scale, output=output), lr, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_a_signed_projection_never_increases_the_error_and_is_done_once(h, w, scale):
    hr = image(h, w) - 0.5
    lr = degrade(hr, scale, output="real")
    for seed in range(5):
        estimate = image(h, w, seed=seed + 1) - 0.5
        corrected = data_consistency(estimate, lr, scale, magnitude=False)
        assert (corrected - hr).norm() <= (estimate - hr).norm() + 1e-12
        assert_close(data_consistency(corrected, lr, scale, magnitude=False), corrected)


@pytest.mark.parametrize(("h", "w"), [(16, 16), (20, 28)])
def test_the_truth_is_left_alone_though_its_magnitude_was_folded(h, w):
    hr = image(h, w) - 0.5
    assert (lowpass(hr, 4).real < 0).any()
    assert_close(data_consistency(hr, degrade(hr, 4), 4), hr)


def test_an_impossible_imaginary_part_is_dropped():
    estimate = image(16, 16) * 50
    lr = torch.zeros(2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(degrade(data_consistency(estimate, lr, 4), 4), lr, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (9, 5), (1, 6), (6, 1), (2, 2)])
def test_fast_transforms_equal_their_definition(h, w, dtype):
    x = torch.randn(3, h, w, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for size in itertools.product({1, h // 2, h - 1, h} - {0}, {1, w // 2, w - 1, w} - {0}):
        assert_close(kspace.resize(x, size), ifft2c(kspace.crop_spectrum(fft2c(x), size)))
    for scale in (1, 2, 3, 4):
        wanted = ifft2c(kspace.pad_spectrum(fft2c(x), (scale * h, scale * w))).real
        assert_close(zero_fill(x, scale), wanted)
    single = x.to(torch.float32 if dtype == torch.float64 else torch.complex64)
    torch.testing.assert_close(zero_fill(single, 2).double(), zero_fill(x, 2), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="but the image has only"):
        kspace.resize(x, (h + 1, w))


def test_gradients_pass_through_the_fast_transforms():
    x = image(6, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: kspace.resize(y, (4, 3)), x)
    assert torch.autograd.gradcheck(lambda y: zero_fill(y, 2), x)


def test_wrong_sizes_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"scale 4 does not divide the image size 10x16; crop it to 8x16"):
        degrade(torch.zeros(10, 16), 4)
    with pytest.raises(ValueError, match=r"scale 2 does not divide the image size 8x1; it needs 2x2 pixels or more"):
        degrade(torch.zeros(8, 1), 2)
    with pytest.raises(ValueError, match="needs an lr 4 times smaller"):
        data_consistency(torch.zeros(16, 16), torch.zeros(8, 8), 4)
    with pytest.raises(ValueError, match='"magnitude" or "real"'):
        degrade(torch.zeros(8, 8), 2, output="phase")


def test_a_scale_of_a_few_bits_does_not_overflow() -> None:
    lr = torch.rand(1, 1, 80, 80)
    for scale in (np.uint8(4), np.int8(4), torch.tensor(4, dtype=torch.uint8)):
        sr = zero_fill(lr, scale)
        assert torch.equal(sr, zero_fill(lr, 4))
        assert torch.equal(degrade(sr, scale), degrade(sr, 4))
        assert torch.equal(data_consistency(sr, lr, scale), data_consistency(sr, lr, 4))
