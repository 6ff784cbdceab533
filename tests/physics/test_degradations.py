"""Each degradation: adjoint, or the reason why it has none; seed, grid, size; comparison with independent libraries."""

import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from deformmamba.errors import InvalidArgument
from deformmamba.physics.degradations import (
    DEGRADATIONS,
    AreaAverage,
    Bicubic,
    Compose,
    GaussianBlur,
    GaussianNoise,
    KSpaceCrop,
    PartialFourier,
    RicianNoise,
    Subsample,
    Truncation,
    parse,
)
from deformmamba.physics.kspace import degrade, zero_fill

# one example per entry of the table, with both outputs if there are two, and compositions
EXAMPLES = [
    "k-space:scale=2",
    "k-space:scale=4,output=real",
    "truncation:factor=2",
    "truncation:factor=4,output=real",
    "partial-fourier",
    "partial-fourier:axis=-1,output=real,fraction=0.625",
    "area:scale=2",
    "area:scale=4",
    "bicubic:scale=2",
    "bicubic:scale=4",
    "subsample:scale=2",
    "blur:sigma=1.5",
    "noise:snr=20",
    "rician:snr=20",
    "blur:sigma=1.2 >> subsample:scale=2 >> rician:snr=30",
    "blur:sigma=1.2 >> subsample:scale=4",
    "area:scale=2 >> bicubic:scale=2",
    "partial-fourier:output=real >> k-space:scale=2,output=real",
]
SIZES = [(16, 24), (20, 12), (36, 28)]  # at 2x and 4x these give odd and even sizes


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_every_entry_of_the_table_is_tried():
    assert {text.split(":")[0] for text in EXAMPLES} >= set(DEGRADATIONS)
    assert all(name == made.kind for name, made in DEGRADATIONS.items())


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("text", EXAMPLES)
def test_the_adjoint_is_one_or_there_is_a_reason(text, h, w):
    degradation = parse(text)
    x = image(2, h, w) - 0.5
    y = image(2, h // degradation.scale, w // degradation.scale, seed=1) - 0.5
    linear = torch.allclose(degradation(x) + degradation(x.flip(-1)), degradation(x + x.flip(-1)), rtol=0, atol=1e-9)
    assert linear == (degradation.no_adjoint is None)
    if degradation.no_adjoint:
        with pytest.raises(ValueError, match=r"has no adjoint: .*not linear"):
            degradation.adjoint(y)
        return
    back = degradation.adjoint(y)
    assert back.shape == x.shape
    torch.testing.assert_close((degradation(x) * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", EXAMPLES)
def test_same_seed_same_result_and_a_stack_is_its_slices(text):
    degradation = parse(text)
    stack = image(3, 2, 16, 24)
    whole = degradation(stack, seed=5)
    assert torch.equal(degradation(stack, seed=5), whole)
    assert whole.dtype == stack.dtype
    flat = stack.flatten(0, 1)
    for k in range(6):
        alone = degradation(flat[k], seed=5, first=k)
        torch.testing.assert_close(alone, whole.flatten(0, 1)[k], rtol=0, atol=1e-12)
    torch.testing.assert_close(degradation(flat[2:5], seed=5, first=2), whole.flatten(0, 1)[2:5], rtol=0, atol=1e-12)
    is_random = "snr" in text
    assert torch.equal(degradation(stack, seed=6), whole) != is_random
    equal_slices = stack[:1, :1].expand(1, 2, -1, -1)
    first, second = degradation(equal_slices)[0]
    assert torch.equal(first, second) != is_random
    single = degradation(stack.float(), seed=5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", EXAMPLES)
def test_it_shrinks_by_its_scale_and_refuses_what_that_does_not_divide(text):
    degradation = parse(text)
    assert degradation.size(16, 24) == tuple(degradation(image(16, 24)).shape)
    if degradation.scale > 1:
        with pytest.raises(ValueError, match=r"does not divide the image size 17x24; crop it to 16x24 first"):
            degradation(image(17, 24))
    else:
        assert degradation(image(17, 23)).shape == (17, 23)
    for wrong in (image(8), image(16, 16).half(), torch.ones(16, 16, dtype=torch.int64)):
        with pytest.raises(ValueError, match="wanted a tensor of float32 or float64"):
            degradation(wrong)
    if "output=real" in text or text.split(":")[0] not in ("k-space", "truncation", "partial-fourier"):
        with pytest.raises(ValueError, match=r"float32 or float64 .*not torch.complex128"):
            degradation(image(16, 16) + 0j)
    else:  # a global phase does not change magnitudes
        assert_close(degradation(image(16, 16) * 1j), degradation(image(16, 16)))


@pytest.mark.parametrize("text", [text for text in EXAMPLES if "snr" not in text])
def test_samples_lie_on_the_declared_grid(text):
    """The phase of a slow wave in the samples gives their position."""
    degradation = parse(text)
    n, s = 96, degradation.scale
    position = torch.arange(n, dtype=torch.float64)
    wave = 2 + torch.cos(2 * math.pi * 2 * (position - 11.3) / n)
    lr = degradation(wave.expand(n, n).contiguous())[n // s // 2]
    found = torch.fft.rfft(lr)[2].angle().item()
    for grid in ("origin", "half-pixel"):
        first = 0.0 if grid == "origin" else (s - 1) / 2
        expected = 2 * math.pi * 2 * (first - 11.3) / n
        shift = math.remainder(found - expected, 2 * math.pi) * n / (2 * math.pi * 2)
        if s > 1:
            assert (abs(shift) < 0.2) == (grid == degradation.grid), f"{shift} pixels off the {grid} grid"
        else:
            assert abs(shift) < 0.2
    assert lr.mean().item() == pytest.approx(2, abs=0.05)  # the mean intensity does not change


@pytest.mark.parametrize("text", EXAMPLES)
def test_text_and_object_are_one_another(text):
    degradation = parse(text)
    assert parse(str(degradation)) == degradation
    assert hash(parse(str(degradation))) == hash(degradation)


def test_crop_is_the_one_of_kspace_and_truncation_its_zero_filling():
    x = image(2, 20, 28)
    assert torch.equal(KSpaceCrop(scale=4)(x), degrade(x, 4))
    assert torch.equal(KSpaceCrop(scale=2, output="real")(x), degrade(x, 2, output="real"))
    odd = image(2, 18, 30)  # 9 and 15 lines remain: no unpaired frequency
    truncated = Truncation(factor=2, output="real")(odd)
    assert_close(truncated, zero_fill(degrade(odd, 2, output="real"), 2))
    assert_close(Truncation(factor=2, output="real")(truncated), truncated)


@pytest.mark.parametrize("fraction", [0.5625, 0.75, 1.0])
@pytest.mark.parametrize("n", [16, 17])
def test_partial_fourier_measures_that_share_of_the_lines_and_the_centre(n, fraction):
    x = image(n, n)
    kept = np.fft.fftshift(np.fft.fft2(x.numpy()))
    kept[round(fraction * n) :] = 0
    assert np.abs(kept[n // 2, n // 2]) > 0
    wanted = np.abs(np.fft.ifft2(np.fft.ifftshift(kept)))
    np.testing.assert_allclose(PartialFourier(fraction=fraction)(x), wanted, atol=1e-12)
    np.testing.assert_allclose(PartialFourier(fraction=fraction, axis=-1)(x.T), wanted.T, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("scale", [2, 4])
def test_resampling_against_pillow_and_torch(h, w, scale):
    x = image(h, w)
    assert_close(AreaAverage(scale=scale)(x), F.avg_pool2d(x[None], scale)[0])
    pillow = pytest.importorskip("PIL.Image")
    small = pillow.fromarray(x.float().numpy()).resize((w // scale, h // scale), pillow.Resampling.BICUBIC)
    np.testing.assert_allclose(Bicubic(scale=scale)(x), np.asarray(small), atol=1e-5)
    assert torch.equal(Subsample(scale=scale)(x), x[::scale, ::scale])


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4])
def test_blur_against_scipy(sigma):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = image(20, 13)
    np.testing.assert_allclose(
        GaussianBlur(sigma=sigma)(x), ndimage.gaussian_filter(x, sigma, mode="nearest"), atol=1e-12
    )


@pytest.mark.portable
def test_noise_has_the_distribution_it_is_named_after():
    stats = pytest.importorskip("scipy.stats")
    flat = torch.full((1, 128, 128), 0.1, dtype=torch.float64)
    for degradation, wanted in (
        (RicianNoise(snr=20), stats.rice(0.1 * 20, scale=1 / 20)),
        (RicianNoise(snr=20, reference=0.5), stats.rice(0.1 * 40, scale=1 / 40)),
        (GaussianNoise(snr=10), stats.norm(0.1, 0.1)),
    ):
        values = degradation(flat, seed=3).flatten().numpy()
        assert stats.kstest(values, wanted.cdf).pvalue > 0.01
    assert RicianNoise(snr=20)(torch.zeros(64, 64)).mean() == pytest.approx(math.sqrt(math.pi / 2) / 20, rel=0.05)


def test_each_part_draws_noise_of_its_own():
    zero = torch.zeros(32, 32, dtype=torch.float64)
    noise = GaussianNoise(snr=1)
    assert (noise >> noise)(zero).std() == pytest.approx(math.sqrt(2), rel=0.1)


def test_compositions_are_flat_and_know_their_scale_and_grid():
    a, b, c = GaussianBlur(sigma=1), Subsample(scale=2), RicianNoise(snr=9)
    assert a >> b >> c == a >> (b >> c) == Compose((a, b, c)) == Compose([a, b, c])
    assert ((a >> b >> c).scale, (a >> b >> c).grid) == (2, "origin")
    assert ((a >> AreaAverage(scale=2)).grid, (a >> c).grid) == ("half-pixel", "origin")
    x = image(16, 16)
    assert_close((a >> b)(x), b(a(x)))
    with pytest.raises(ValueError, match="wanted one grid"):
        Subsample(scale=2) >> AreaAverage(scale=2)
    with pytest.raises(ValueError, match="no degradation given"):
        Compose(())


def test_the_scale_of_a_data_set_goes_where_none_was_given():
    assert parse("k-space", scale=4) == KSpaceCrop(scale=4)
    assert parse("k-space:scale=2", scale=4) == KSpaceCrop(scale=2)
    assert parse("blur:sigma=2>>truncation", scale=4) == GaussianBlur(sigma=2) >> Truncation(factor=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"unknown name ''; degradations: k-space, truncation"),
        ("kspace", "unknown name 'kspace' (did you mean 'k-space'?); degradations: k-space, truncation"),
        ("k-space", "give scale, as in k-space:scale=..."),
        ("k-space:scale", "unknown argument 'scale'; k-space takes scale, output"),
        ("k-space:factor=2", "unknown argument 'factor=2'; k-space takes scale, output"),
        ("k-space:scale=two", "scale must be an integer, not 'two'"),
        ("k-space:scale=0", "scale must be an integer from 1 to 64, not 0"),
        ("k-space:scale=2,output=phase", 'output must be "magnitude" or "real", not \'phase\''),
        ("blur:sigma=wide", "sigma must be a number, not 'wide'"),
        ("blur:sigma=-1", "sigma must be above 0"),
        ("rician:snr=0", "snr must be a positive number, not 0"),
        ("rician:snr=nan", "snr must be a positive number, not nan"),
        ("partial-fourier:fraction=0.5", "fraction must be above 0.5"),
        ("partial-fourier:axis=0", "axis must be -2"),
        ("area:scale=2 >> subsample:scale=2", "wanted one grid"),
        ("area:scale=2 >>", "unknown name ''; degradations"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", EXAMPLES)
def test_nothing_is_computed_on_another_device_than_the_image(text):
    degradation = parse(text)
    lr = degradation(torch.empty(2, 16, 24, device="meta"))
    assert (lr.device.type, lr.dtype, tuple(lr.shape[1:])) == ("meta", torch.float32, degradation.size(16, 24))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("DEFORMMAMBA_GPU") != "1", reason="no CUDA device here"
)
@pytest.mark.parametrize("text", EXAMPLES)
def test_a_gpu_gives_what_the_cpu_gives(text):
    degradation, x = parse(text), image(3, 16, 24)
    assert_close(degradation(x.cuda(), seed=3).cpu(), degradation(x, seed=3))
    if degradation.no_adjoint is None:
        y = degradation(x)
        assert_close(degradation.adjoint(y.cuda()).cpu(), degradation.adjoint(y))


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None, (), (1, -1), (0, 0.5), np.arange(2)])
def test_a_seed_that_generators_do_not_take_is_refused_in_one_line(seed):
    for degradation in (RicianNoise(snr=9), KSpaceCrop(2), GaussianBlur(1) >> Subsample(2)):
        with pytest.raises(InvalidArgument, match=r"^seed is .*; it must be a whole number, 0 or more$"):
            degradation(torch.rand(4, 4), seed=seed)
    with pytest.raises(InvalidArgument, match=r"^first is -1; it must be a whole number"):
        RicianNoise(snr=9)(torch.rand(4, 4), first=-1)


def test_numbers_of_numpy_are_plain_numbers():
    image = torch.rand(8, 8)
    noise = RicianNoise(snr=np.float32(20))
    assert (noise, str(noise)) == (RicianNoise(snr=20), "rician:snr=20.0,reference=1.0")
    for seed in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(noise(image, seed=seed), noise(image, seed=3))
        assert torch.equal(noise(image, seed=(1, seed)), noise(image, seed=(1, 3)))
    for made in (KSpaceCrop, Truncation, AreaAverage, Subsample):
        for scale in (np.int64(2), np.uint8(2), torch.tensor(2)):
            assert made(scale) == made(2)
            assert str(made(scale)) == str(made(2))
            assert torch.equal(made(scale)(image), made(2)(image))
        for wrong in (True, 2.0, np.bool_(True), 0, 65, "2", None):
            with pytest.raises(InvalidArgument, match="must be an integer from 1 to 64"):
                made(wrong)
    assert parse("subsample", scale=np.int64(2)) == Subsample(2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GaussianBlur("wide"),
        lambda: GaussianBlur(None),
        lambda: RicianNoise(snr="20"),
        lambda: GaussianNoise(snr=True),
        lambda: PartialFourier(fraction=[0.75]),
        lambda: PartialFourier(axis=-2.0),
        lambda: KSpaceCrop(2, output=np.arange(2)),
    ],
)
def test_values_of_a_wrong_type_are_refused_in_one_line(build):
    with pytest.raises(InvalidArgument, match=" must be "):
        build()
