"""PSNR, SSIM and NMSE against scikit-image, by protocol, over sizes, ranges and dtypes."""

import math

import numpy as np
import pytest
import torch

from deformmamba.metrics import METRICS, PROTOCOLS, by_slice, nmse, psnr, ssim

oracle = pytest.importorskip("skimage.metrics")


def volumes(shape, peak, dtype, seed=0):
    rng = np.random.default_rng(seed)
    hr = rng.random(shape) * peak
    sr = np.clip(hr + rng.normal(scale=0.05 * peak, size=shape), 0, None)
    return sr.astype(dtype), hr.astype(dtype)


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 16, 23), (17, 32, 8)])
@pytest.mark.parametrize(("peak", "dtype"), [(1.0, np.float32), (255, np.uint8), (4000, np.int16), (1e-3, np.float64)])
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


@pytest.mark.parametrize("metric", METRICS.values())
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_arrays_and_single_slices_agree(metric, protocol):
    sr, hr = volumes((1, 9, 12), 1.0, np.float32)
    value = metric(sr, hr, protocol=protocol)
    assert metric(torch.from_numpy(sr), torch.from_numpy(hr), protocol=protocol) == value
    assert metric(sr[0], hr[0], protocol=protocol) == value


def test_scores_by_slice_are_those_of_each_slice():
    sr, hr = volumes((11, 9, 12), 1.0, np.float32)
    alone = [(psnr(a, b), ssim(a, b)) for a, b in zip(sr, hr, strict=True)]
    scores = by_slice(sr, hr, protocol="slice")
    np.testing.assert_allclose(list(zip(scores["psnr"], scores["ssim"], strict=True)), alone)
    assert np.mean(by_slice(sr, hr)["ssim"]) == pytest.approx(ssim(sr, hr))


def test_equal_volumes_are_perfect():
    _, hr = volumes((2, 8, 8), 1.0, np.float64)
    assert psnr(hr, hr) == math.inf
    assert ssim(hr, hr) == pytest.approx(1)
    assert nmse(hr, hr) == 0


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
        (np.ones((8, 8)), np.ones((8, 8)), {"protocol": "best"}, "known: volume, slice"),
        (np.ones((6, 8)), np.ones((6, 8)), {}, "smaller than the 7x7 window"),
    ],
)
def test_bad_input_is_refused(sr, hr, options, message):
    with pytest.raises(ValueError, match=message):
        ssim(sr, hr, **options)
