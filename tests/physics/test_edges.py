"""The edge-aware zero-filling: what it keeps of plain zero-filling, and what it does at a cut edge."""

import pytest
import torch
from tolerances import assert_close

from deformmamba.models import Bicubic
from deformmamba.physics.consistency import corrected
from deformmamba.physics.edges import cubic, cut_edges, smooth_part, zero_fill_edges
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
    # the discrete Laplacian of the smooth part is the jump at the edges and zero inside (Moisan's equation)
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
