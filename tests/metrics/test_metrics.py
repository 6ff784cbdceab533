"""PSNR, SSIM, NMSE, HFEN equal scikit-image, scipy and fastMRI's definition, for every protocol, size, range, dtype."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba import metrics
from deformmamba.extras import MissingExtra
from deformmamba.metrics import METRICS, ON_REQUEST, PROTOCOLS, by_slice, foreground, hfen, lpips, nmse, psnr, ssim

oracle = pytest.importorskip("skimage.metrics")
SHAPES = [(1, 7, 7), (3, 16, 23), (17, 32, 8)]
RANGES = [(1.0, np.float32), (255, np.uint8), (4000, np.int16), (1e-3, np.float64), (2.0, np.float16)]


def volumes(shape, peak, dtype, seed=0):
    rng = np.random.default_rng(seed)
    hr = rng.random(shape) * peak
    sr = np.clip(hr + rng.normal(scale=0.05 * peak, size=shape), 0, None)
    return sr.astype(dtype), hr.astype(dtype)


@pytest.mark.parametrize("protocol", ["volume", "slice"])
@pytest.mark.parametrize("metric", [psnr, ssim, nmse, hfen])
def test_a_pixel_that_is_nan_is_not_left_out_of_a_score(metric, protocol):
    sr, hr = volumes((3, 16, 16), 1.0, np.float64)
    hr[1, 2, 3] = np.nan
    assert math.isnan(metric(sr, hr, protocol=protocol))
    assert [math.isnan(value) for value in by_slice(sr, hr, protocol="slice")["nmse"]] == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", [psnr, ssim, nmse, hfen, by_slice])
def test_a_pixel_that_a_protocol_leaves_out_must_be_finite(metric, value):
    sr, hr = volumes((3, 16, 16), 1.0, np.float64)
    hr[0] = 0  # an empty slice, and air around the body
    hr[1:, :3] = sr[1:, :3] = 0
    sr[1, 0, 0] = value
    with pytest.raises(ValueError, match=r'^metrics: sr holds NaN or infinite values; protocol "foreground" would'):
        metric(sr, hr, protocol="foreground")
    sr[1, 0, 0], sr[0, 5, 5] = 0, value
    with pytest.raises(ValueError, match=r"^metrics: sr holds NaN or infinite values in a slice that is empty in hr; "):
        metric(sr, hr, protocol="slice")
    sr[0, 5, 5] = 0
    for protocol in ("foreground", "slice"):
        metric(sr, hr, protocol=protocol)


def test_the_scores_of_an_empty_slice_with_nan_are_nan():
    sr, hr = volumes((3, 16, 16), 1.0, np.float64)
    hr[0] = 0
    sr[0, 5, 5] = np.nan
    for values in by_slice(sr, hr).values():
        assert [math.isnan(value) for value in values] == [True, False, False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("peak", "dtype"), RANGES)
def test_equal_to_scikit_image(shape, peak, dtype):
    sr, hr = volumes(shape, peak, dtype)
    a, b = sr.astype(np.float64), hr.astype(np.float64)

    def mean(metric, data_range):
        return np.mean([metric(y, x, data_range=data_range(y)) for x, y in zip(a, b, strict=True)])

    assert psnr(sr, hr) == pytest.approx(oracle.peak_signal_noise_ratio(b, a, data_range=b.max()), rel=1e-9)
    assert ssim(sr, hr) == pytest.approx(mean(oracle.structural_similarity, lambda y: b.max()), rel=1e-9)
    assert psnr(sr, hr, protocol="slice") == pytest.approx(mean(oracle.peak_signal_noise_ratio, np.max), rel=1e-9)
    assert ssim(sr, hr, protocol="slice") == pytest.approx(mean(oracle.structural_similarity, np.max), rel=1e-9)
    wanted = oracle.normalized_root_mse(b, a, normalization="euclidean") ** 2
    assert nmse(sr, hr) == pytest.approx(wanted, rel=1e-9)
    assert nmse(sr, hr) == pytest.approx(np.linalg.norm(b - a) ** 2 / np.linalg.norm(b) ** 2, rel=1e-9)  # fastMRI's


def body(shape, peak, dtype):
    """A bright disc with a dark hole, in air that is almost 0, and an estimate of this image."""
    rng = np.random.default_rng(1)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[1:]), indexing="ij")
    radius = np.hypot(y, x)
    hr = np.where((radius < 0.7) & (radius > 0.3), 0.5 + 0.5 * rng.random(shape), 0.02 * rng.random(shape)) * peak
    sr = np.clip(hr + rng.normal(scale=0.05 * peak, size=shape), 0, peak)
    return sr.astype(dtype), hr.astype(dtype)


@pytest.mark.parametrize("shape", [(1, 17, 17), (3, 20, 33), (11, 40, 24)])
@pytest.mark.parametrize(("peak", "dtype"), RANGES)
def test_the_foreground_is_scored_as_scikit_image_scores_those_pixels(shape, peak, dtype):
    sr, hr = body(shape, peak, dtype)
    mask = foreground(hr).numpy()
    assert 0.1 < mask.mean() < 0.7
    a, b = sr.astype(np.float64), hr.astype(np.float64)
    mse = oracle.mean_squared_error(b[mask], a[mask])
    assert psnr(sr, hr, protocol="foreground") == pytest.approx(10 * np.log10(b.max() ** 2 / mse), rel=1e-9)
    maps = np.stack(
        [oracle.structural_similarity(y, x, data_range=b.max(), full=True)[1] for x, y in zip(a, b, strict=True)]
    )
    inside = (slice(None), slice(3, -3), slice(3, -3))
    assert ssim(sr, hr, protocol="foreground") == pytest.approx(maps[inside][mask[inside]].mean(), rel=1e-9)
    wanted = oracle.normalized_root_mse(b[mask], a[mask], normalization="euclidean") ** 2
    assert nmse(sr, hr, protocol="foreground") == pytest.approx(wanted, rel=1e-9)
    assert psnr(sr, hr, protocol="foreground") < psnr(sr, hr)


def test_the_foreground_is_the_body_with_its_dark_middle():
    _, hr = body((2, 41, 41), 300.0, np.float32)
    y, x = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41), indexing="ij")
    disc = np.hypot(y, x) < 0.7
    mask = foreground(hr).numpy()
    assert mask.shape == hr.shape
    assert (mask == disc).mean() > 0.99
    np.testing.assert_array_equal(foreground(hr[0]), mask[0])
    hr[1, 0, 0] = 300  # one bright corner pixel adds only itself to the foreground
    assert foreground(hr)[1].sum() <= mask[1].sum() + 1
    assert not foreground(np.zeros((4, 4))).any()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("shape", [(1, 17, 17), (3, 20, 33), (11, 40, 24)])
@pytest.mark.parametrize(("peak", "dtype"), RANGES)
def test_high_frequency_error_is_that_of_scipys_filter(shape, peak, dtype, protocol):
    ndimage = pytest.importorskip("scipy.ndimage")
    sr, hr = body(shape, peak, dtype)
    a, b = sr.astype(np.float64), hr.astype(np.float64)

    def log(volume):
        return np.stack([ndimage.gaussian_laplace(x, 1.5, mode="nearest", truncate=7 / 1.5) for x in volume])

    error, edges = log(a - b), log(b)
    if protocol == "slice":
        wanted = np.mean([np.linalg.norm(e) / np.linalg.norm(x) for e, x in zip(error, edges, strict=True)])
    else:
        mask = foreground(hr).numpy() if protocol == "foreground" else np.ones(shape, bool)
        wanted = np.linalg.norm(error[mask]) / np.linalg.norm(edges[mask])
    assert hfen(sr, hr, protocol=protocol) == pytest.approx(wanted, rel=1e-9)


def test_the_filter_is_the_rotationally_symmetric_one_of_its_paper():
    """Our filter equals MATLAB's fspecial("log", 15, 1.5), which the paper uses."""
    gaussian, second = metrics._laplacian_of_gaussian()
    ours = torch.outer(second, gaussian) + torch.outer(gaussian, second)
    y, x = np.meshgrid(np.arange(-7, 8), np.arange(-7, 8), indexing="ij")
    g = np.exp(-(y**2 + x**2) / 4.5)
    theirs = g * (y**2 + x**2 - 4.5) / (1.5**4 * g.sum())
    theirs -= theirs.mean()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_perceptual_distance_refuses_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics._lpips_network.cache_clear()
    _, hr = body((1, 40, 40), 1.0, np.float32)
    with pytest.raises(MissingExtra, match=r"deformmamba\[lpips\]|AlexNet's weights|torchvision that works"):
        lpips(hr, hr)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtra, match=r"pip install 'deformmamba\[lpips\]'"):
        lpips(hr, hr)
    with pytest.raises(ValueError, match="whole slices"):
        lpips(hr, hr, protocol="foreground")
    with pytest.raises(ValueError, match="32x32 or more"):
        lpips(hr[:, :20, :20], hr[:, :20, :20])


@pytest.mark.slow
def test_perceptual_distance_is_that_of_its_package(tmp_path, monkeypatch):
    try:
        package = pytest.importorskip("lpips")
        models = pytest.importorskip("torchvision.models")
    except RuntimeError as error:  # torchvision built for another torch
        pytest.skip(str(error))
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / metrics.ALEXNET)
    metrics._lpips_network.cache_clear()
    try:
        sr, hr = body((10, 40, 40), 500.0, np.float32)
        with pytest.warns(UserWarning, match=r"pretrained|weight enum"):
            network = package.LPIPS(net="alex", verbose=False)
        x, y = (torch.from_numpy(v / hr.max())[:, None].expand(-1, 3, -1, -1) * 2 - 1 for v in (sr, hr))
        with torch.no_grad():
            wanted = network(x, y).mean().item()
        assert wanted > 0
        assert lpips(sr, hr) == pytest.approx(wanted, rel=1e-4)
        assert lpips(hr, hr) == 0
    finally:
        metrics._lpips_network.cache_clear()


@pytest.mark.parametrize("metric", [*METRICS.values(), hfen])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_arrays_and_single_slices_agree(metric, protocol):
    sr, hr = volumes((1, 9, 12), 1.0, np.float32)
    value = metric(sr, hr, protocol=protocol)
    assert metric(torch.from_numpy(sr), torch.from_numpy(hr), protocol=protocol) == value
    assert metric(sr[0], hr[0], protocol=protocol) == value


def test_scores_by_slice_are_those_of_each_slice():
    sr, hr = volumes((11, 9, 12), 1.0, np.float32)
    for name, values in by_slice(sr, hr, protocol="slice").items():
        assert_close(values, [METRICS[name](a, b) for a, b in zip(sr, hr, strict=True)])
        assert np.mean(values) == pytest.approx(METRICS[name](sr, hr, protocol="slice"))
    assert np.mean(by_slice(sr, hr)["ssim"]) == pytest.approx(ssim(sr, hr))
    hr[3] = 0  # an empty slice has no NMSE, and no foreground
    assert [len(v) for v in by_slice(sr, hr).values()] == [11, 11, 10]
    assert [len(v) for v in by_slice(sr, hr, protocol="foreground").values()] == [10, 10, 10]


def test_equal_volumes_are_perfect():
    _, hr = volumes((2, 8, 8), 1.0, np.float64)
    assert psnr(hr, hr) == math.inf
    assert ssim(hr, hr) == pytest.approx(1)
    assert nmse(hr, hr) == 0
    assert hfen(hr, hr) == 0


def test_the_slice_protocol_leaves_out_slices_without_signal():
    sr, hr = volumes((3, 8, 8), 1.0, np.float64)
    hr[1] = 0
    assert psnr(sr, hr, protocol="slice") == pytest.approx(psnr(sr[[0, 2]], hr[[0, 2]], protocol="slice"))


@pytest.mark.parametrize(
    ("sr", "hr", "options", "message"),
    [
        (np.ones((2, 8, 8)), np.ones((2, 8, 9)), {}, "the same"),
        (np.ones((1, 2, 8, 8)), np.ones((1, 2, 8, 8)), {}, r"\(slices, H, W\)"),
        (np.ones((8, 8)), np.zeros((8, 8)), {}, "no positive value"),
        (np.ones((8, 8)), np.ones((8, 8)), {"protocol": "best"}, "protocols: volume, slice, foreground"),
        (np.ones((6, 8)), np.ones((6, 8)), {}, "smaller than the 7x7 window"),
    ],
)
def test_bad_input_is_refused(sr, hr, options, message):
    with pytest.raises(ValueError, match=message):
        ssim(sr, hr, **options)


def test_metrics_on_request_are_no_part_of_the_default_table():
    assert set(METRICS) == {"psnr", "ssim", "nmse"}
    assert set(ON_REQUEST) == {"hfen", "lpips"}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("DEFORMMAMBA_GPU") != "1", reason="no CUDA device here"
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("metric", [*METRICS.values(), hfen])
def test_a_gpu_gives_what_the_cpu_gives(metric, protocol):
    sr, hr = (torch.from_numpy(volume) for volume in body((11, 40, 24), 300.0, np.float32))
    assert metric(sr.cuda(), hr.cuda(), protocol=protocol) == pytest.approx(metric(sr, hr, protocol=protocol), rel=1e-9)


@pytest.mark.parametrize("metric", [psnr, ssim, nmse, by_slice, hfen, lambda sr, hr: foreground(hr)])
def test_complex_images_are_refused_and_say_the_cure(metric):
    image = np.random.default_rng(0).random((2, 16, 16))
    for made in (lambda x: x.astype(np.complex64), lambda x: torch.from_numpy(x).to(torch.complex128)):
        with pytest.raises(TypeError, match=r"hr is complex \(.*\); take the magnitude first, such as abs\(hr\)"):
            metric(image, made(image))


def test_byte_order_and_width_do_not_matter():
    rng = np.random.default_rng(0)
    sr, hr = (rng.random((2, 16, 16)).astype(np.float32) for _ in range(2))
    wanted = [metric(sr, hr) for metric in (psnr, ssim, nmse)]
    for dtype in (">f4", ">f8", "<f8", np.longdouble):
        assert [metric(sr.astype(dtype), hr.astype(dtype)) for metric in (psnr, ssim, nmse)] == wanted
    integers = [(100 * x).astype(np.int16) for x in (sr, hr)]
    assert psnr(*(x.astype(">i2") for x in integers)) == psnr(*integers)
    assert torch.equal(foreground(hr.astype(">f4")), foreground(hr))
    with pytest.raises(TypeError, match="sr holds <U1; wanted real numbers"):
        psnr(np.full((8, 8), "a"), np.ones((8, 8)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_foreground_needs_finite_values(value):
    hr = np.random.default_rng(0).random((2, 12, 12))
    sr = hr.copy()
    hr[0, 0, 0] = value
    with pytest.raises(ValueError, match="hr holds NaN or infinite values, so its foreground is unknown"):
        ssim(sr, hr, protocol="foreground")
