"""The edge-aware zero-filling methods: properties shared with plain zero-filling, and behaviour at cut edges."""

import pytest
import torch
from tolerances import assert_close

from deformmamba.models import Bicubic
from deformmamba.physics.consistency import corrected
from deformmamba.physics.edges import (
    BEYOND,
    OUTLIER,
    SIDE,
    _likely_cut,
    cubic,
    cut_edges,
    cut_likelihood,
    edge_models,
    extended,
    outliers,
    percentile_range,
    prediction,
    smooth_part,
    zero_fill_edges,
    zero_fill_robust,
)
from deformmamba.physics.kspace import degrade, zero_fill

CUT = torch.ones(2, dtype=torch.float64)


def smooth_scene(h: int, w: int) -> torch.Tensor:
    """(h, w), float64: smooth, and different at opposite edges."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h).double(), torch.linspace(0, 1, w).double(), indexing="ij")
    return 1 + y + 2 * x + 0.3 * torch.sin(7 * x * y)


@pytest.mark.parametrize("size", [(20, 20), (21, 16), (15, 33)])
def test_the_parts_add_up_and_the_smooth_part_takes_the_jump(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, dtype=torch.float64)
    smooth = smooth_part(image, gate=CUT)
    # the discrete Laplacian of the smooth part is the jump at the edges, and zero elsewhere (Moisan's equation)
    laplacian = sum(smooth.roll(k, d) for k in (1, -1) for d in (-2, -1)) - 4 * smooth
    assert laplacian[:, 1:-1, 1:-1].abs().max() < 1e-12
    assert_close(laplacian[:, 0, 1:-1], (image[:, -1] - image[:, 0])[:, 1:-1])
    assert_close(smooth.mean((-2, -1)), torch.zeros(3, dtype=torch.float64))
    assert smooth_part(image, gate=0 * CUT).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_it_passes_through_the_samples_and_commutes_with_gain_and_offset(scale: int) -> None:
    image = smooth_scene(18, 25)
    filled = zero_fill_edges(image, scale)
    assert_close(filled[::scale, ::scale], image)
    assert_close(zero_fill_edges(0.03 * image - 7, scale), 0.03 * filled - 7)
    assert_close(cubic(image, scale), Bicubic(scale=scale).enlarge(image))


def test_the_crop_of_a_whole_slice_counts_as_periodic_and_a_window_as_cut() -> None:
    whole = smooth_scene(96, 80)
    whole[30:60, 20:70] += 1
    lr = degrade(whole, 4)
    assert cut_edges(lr).max() < 0.5
    torch.testing.assert_close(zero_fill_edges(lr, 4), zero_fill(lr, 4), rtol=0, atol=0.05)
    assert cut_edges(smooth_scene(24, 20)).min() == 1


def test_a_cut_edge_does_not_ring_at_the_opposite_one() -> None:
    fine = smooth_scene(4 * 19 + 1, 4 * 19 + 1)
    lr = fine[::4, ::4]
    inside = (slice(0, 77), slice(0, 77))  # the last three HR pixels lie beyond the last sample
    error = (zero_fill_edges(lr, 4)[inside] - fine).abs().amax()
    assert error < 0.2 * (zero_fill(lr, 4)[inside] - fine).abs().amax()


def test_consistency_at_cut_edges_changes_little_where_the_estimate_is_right() -> None:
    fine = smooth_scene(80, 80).float()[None, None]
    lr = fine[..., ::4, ::4].contiguous()
    right = corrected(fine, lr, 4, "object", magnitude=True, edges=True)
    wrapped = corrected(fine, lr, 4, "object", magnitude=True)
    assert (right - fine).abs().max() < 0.2 * (wrapped - fine).abs().max()


def test_consistency_leaves_a_masked_background_alone() -> None:
    lr = torch.zeros(1, 1, 30, 30)
    lr[..., 10:20, 10:20] = torch.rand(10, 10) + 0.5
    sr = zero_fill_edges(lr, 2)
    sr[..., :12, :] = 0
    assert corrected(sr, lr, 2, "object", magnitude=True, edges=True)[..., :12, :].abs().max() == 0


def test_the_robust_zero_filling_of_a_whole_slice_loses_nothing() -> None:
    whole = torch.zeros(96, 80, dtype=torch.float64)
    whole[8:90, 6:76] = smooth_scene(82, 70)
    whole[30:60, 20:70] += 1
    lr = degrade(whole, 4)
    plain, robust = ((fill(lr, 4) - whole).square().mean() for fill in (zero_fill, zero_fill_robust))
    assert 10 * torch.log10(robust / plain) < 0.02  # dB


@pytest.mark.parametrize("scale", [2, 4])
def test_edges_drawn_from_each_model_are_told_apart(scale: int) -> None:
    inverse, determinant = edge_models(scale)
    random = torch.Generator().manual_seed(0)
    found = []
    for covariance in torch.linalg.inv(inverse):
        noise = torch.randn(400, 2 * SIDE, generator=random, dtype=torch.float64)
        sides = noise @ torch.linalg.cholesky(covariance).mT
        lines = torch.cat([sides[:, SIDE:], sides[:, :SIDE]], dim=1)
        found.append(float(_likely_cut(lines, inverse, determinant)))
    assert found[0] == 1  # index 0 is a cut edge
    assert max(found[1:]) < (0.9 if scale == 2 else 0.6)  # the models are more alike at 2x


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_robust_zero_filling_passes_through_the_samples_and_commutes_with_gain_and_offset(scale: int) -> None:
    image = smooth_scene(18, 25)
    image[4:6, 7:9] += 90
    filled = zero_fill_robust(image, scale)
    assert_close(filled[::scale, ::scale], image)
    assert_close(zero_fill_robust(0.03 * image - 7, scale), 0.03 * filled - 7)


@pytest.mark.parametrize("value", [100.0, 12.0, -60.0])
@pytest.mark.parametrize("shape", ["square", "large square", "row", "diagonal", "single"])
def test_an_outlier_does_not_ring(shape: str, value: float) -> None:
    image = smooth_scene(40, 36)
    line = torch.arange(10, 20)
    places = {
        "square": (slice(20, 22), slice(10, 12)),
        "large square": (slice(18, 22), slice(8, 11)),
        "row": (20, line),
        "diagonal": (line, line),
        "single": (20, 12),
    }
    marker = torch.zeros(40, 36, dtype=torch.bool)
    marker[places[shape]] = True
    marked = image.masked_fill(marker, value)
    near = torch.nn.functional.max_pool2d(marker[None, None].double(), 7, 1, 3)
    far = torch.nn.functional.interpolate(near, scale_factor=4.0)[0, 0] == 0
    plain, robust = ((fill(marked, 4) - fill(image, 4))[far].abs().max() for fill in (zero_fill, zero_fill_robust))
    assert robust < 0.05 * plain
    assert torch.equal(outliers(marked) != 0, marker)


def test_outliers_are_replaced_by_the_level_around_them() -> None:
    image = smooth_scene(40, 36)
    marked = image.clone()
    marked[20:22, 10:12] = 100
    assert ((marked - outliers(marked)) - image).abs().max() < 0.5 * (image.max() - image.min())
    assert outliers(image).eq(0).all()
    assert outliers(torch.zeros(12, 12)).eq(0).all()
    assert_close(outliers(0.03 * marked - 7), 0.03 * outliers(marked))
    low, spread = percentile_range(marked)
    assert_close(outliers(marked[12:, 3:30], low, spread)[3:, 3:], outliers(marked)[15:, 6:30])
    # a block that is wider than the largest square keeps the limit inside
    wide = smooth_scene(500, 480)
    wide[30:78, 400:448] = 1e4
    low, spread = percentile_range(wide)
    assert_close((wide - outliers(wide))[54, 424], low[0, 0] + (1 + OUTLIER) * spread[0, 0])


def test_the_robust_zero_filling_of_a_window_is_closer_to_that_of_the_whole_slice() -> None:
    y, x = torch.meshgrid(torch.arange(256).double(), torch.arange(256).double(), indexing="ij")
    whole = degrade(2 + torch.sin(x / 9 + y / 23) + torch.cos(y / 13 - x / 31) + torch.sin(x * y / 2000), 4)
    window = whole[21:41, 17:37]
    wanted = zero_fill(whole, 4)[84:164, 68:148]
    errors = [(fill(window, 4) - wanted).square().mean().sqrt() for fill in (zero_fill, zero_fill_robust)]
    assert errors[1] < 0.7 * errors[0]


def test_predictions_keep_a_constant_and_lines_too_short_to_tell_stay_as_they_are() -> None:
    assert_close(prediction().sum(1), torch.ones(BEYOND, dtype=torch.float64))
    assert_close(extended(torch.full((2, 9), 3.0)), torch.full((2, 9 + 2 * BEYOND), 3.0))
    small = torch.rand(5, 6, dtype=torch.float64)
    assert_close(zero_fill_robust(small, 2), zero_fill(small, 2))


@pytest.mark.parametrize("gain", [1e25, 1e-25])
def test_edges_are_judged_in_any_unit(gain: float) -> None:
    image = smooth_scene(24, 20).float()
    assert_close(cut_likelihood(gain * image, 2), cut_likelihood(image, 2))
    assert_close(zero_fill_robust(gain * image, 2) / gain, zero_fill_robust(image, 2))


def test_air_at_both_edges_is_no_cut() -> None:
    masked = torch.zeros(32, 28)
    masked[6:-6] = smooth_scene(20, 28).float()
    assert cut_likelihood(masked, 4)[0] == 0
    assert cut_likelihood(torch.zeros(32, 28), 4).eq(0).all()


def test_autocast_changes_nothing() -> None:
    image = smooth_scene(24, 20).float()[None, None]
    with torch.autocast("cpu", torch.bfloat16):
        made = zero_fill_robust(image, 2), zero_fill_edges(image, 2)
    assert torch.equal(made[0], zero_fill_robust(image, 2))
    assert torch.equal(made[1], zero_fill_edges(image, 2))


def test_robust_consistency_leaves_cut_edges_alone_and_outliers_out() -> None:
    image = smooth_scene(24, 20).float()[None, None]
    sr = zero_fill_robust(image, 2) + 0.1 * torch.rand(1, 1, 48, 40)
    changed = corrected(sr, image, 2, "object", magnitude=False, edges=True, robust=True) != sr
    assert not changed[..., :4, :].any()  # within two LR pixels of a cut edge
    assert not changed[..., -4:].any()
    assert changed[..., 12:-12, 12:-12].all()
    whole = torch.zeros(64, 64)
    whole[8:56, 8:56] = smooth_scene(48, 48).float()
    lr = degrade(whole, 2)[None, None]
    estimate = 0.9 * whole[None, None]
    marked = lr.clone()
    marked[..., 15:17, 15:17] = 200
    with_marker = corrected(estimate + (zero_fill_robust(marked, 2) - zero_fill_robust(lr, 2)), marked, 2, "object",
                            magnitude=False, edges=True, robust=True)  # fmt: skip
    without = corrected(estimate, lr, 2, "object", magnitude=False, edges=True, robust=True)
    far = torch.ones(64, 64, dtype=torch.bool)
    far[24:40, 24:40] = False
    assert (without - estimate).abs().max() > 0.05
    naive = corrected(estimate + (zero_fill_robust(marked, 2) - zero_fill_robust(lr, 2)), marked, 2, "object",
                      magnitude=False, edges=True)  # fmt: skip
    changes = [(made - without)[..., far].abs().max() for made in (naive, with_marker)]
    assert changes[1] < 0.1 * changes[0]
