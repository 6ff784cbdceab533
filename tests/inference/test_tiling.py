"""Tiles cover the slice, their windows sum to 1, and operators of limited reach give the same result without tiles."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deformmamba.inference.tiling import default_overlap, spans, tiled, windows
from deformmamba.models import DeformMambaSR
from deformmamba.physics.kspace import zero_fill


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    multiple = draw(st.integers(1, 5))
    tile = draw(st.integers(multiple, 40))
    return draw(st.integers(1, 150)), tile, draw(st.integers(0, tile - multiple)), multiple


@given(cuts())
@settings(max_examples=300, deadline=None)
def test_tiles_cover_and_overlap_as_asked(cut: tuple[int, int, int, int]) -> None:
    n, tile, overlap, multiple = cut
    placed = spans(n, tile, overlap, multiple)
    assert placed[0][0] == 0
    assert placed[-1][1] == n
    for start, stop in placed:
        assert start % multiple == 0
        assert tile - multiple < stop - start <= tile or n <= tile
    for (start, stop), (following, _) in itertools.pairwise(placed):
        assert start < following <= stop - overlap
    stride = (tile - overlap) // multiple * multiple
    assert len(placed) <= 1 + max(0, -(-(n - tile) // stride)) + 1  # the minimum, plus one because of the multiple


@pytest.mark.slow
@given(cuts(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_windows_sum_to_one(cut: tuple[int, int, int, int], scale: int) -> None:
    n, _, overlap, _ = cut
    total = torch.zeros(scale * n, dtype=torch.float64)
    for (start, stop), weight in zip(spans(*cut), windows(*cut, scale), strict=True):
        assert (weight >= 0).all()
        total[scale * start : scale * stop] += weight
        # the outer quarter of an overlap has weight 0, except at the ends of the slice
        margin = scale * overlap // 4
        assert start == 0 or not weight[:margin].any()
        assert stop == n or not weight[len(weight) - margin :].any()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(40, 53), (16, 70), (9, 11), (64, 64)])
@pytest.mark.parametrize(
    ("tile", "overlap", "multiple"), [(16, 8, 1), (17, 5, 4), (32, 0, 8), (13, 12, 1), (16, None, 3)]
)
def test_the_tiled_identity_is_the_identity(
    size: tuple[int, int], tile: int, overlap: int | None, multiple: int
) -> None:
    lr = image(2, 3, *size)
    same = tiled(lambda cut, _: cut, lr, 1, tile=tile, overlap=overlap, multiple=multiple)
    torch.testing.assert_close(same, lr, rtol=0, atol=1e-6)
    base = image(2, 3, *(3 * n for n in size))
    given = tiled(lambda _, there: there, lr, 3, tile=tile, overlap=overlap, multiple=multiple, base=base)
    torch.testing.assert_close(given, base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [8, 12, 16])
def test_local_operators_do_not_see_the_tiles(overlap: int) -> None:
    """Convolution, tanh and pixel shuffle with a reach of a quarter of the overlap give the same with tiles."""
    lr = image(1, 1, 61, 45).double()
    side = 2 * (overlap // 4) + 1
    kernel = torch.randn(4, 1, side, side, generator=torch.Generator().manual_seed(1)).double()

    def local(cut: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return F.pixel_shuffle(F.conv2d(cut, kernel, padding="same").tanh(), 2)

    whole = local(lr, None)
    assert (tiled(local, lr, 2, tile=24, overlap=overlap) - whole).abs().max() < 1e-12
    assert (tiled(local, lr, 2, tile=24, overlap=0) - whole).abs().max() > 1e-3  # it reaches into the next tile


def test_a_network_gets_its_place_of_the_whole_slice() -> None:
    """An untrained network with a zero-filled skip adds nothing, so its tiles join to the zero-filled slice."""
    model = DeformMambaSR(scale=2, dims=(8, 12), depths=(1, 1), patch=2, d_state=4, skip="zero-fill").eval()
    lr = image(1, 1, 40, 36)
    base = zero_fill(lr, 2)
    with torch.inference_mode():
        sr = tiled(model, lr, 2, tile=16, overlap=4, multiple=model.multiple, base=base)
        torch.testing.assert_close(sr, base, rtol=0, atol=1e-6)
        without = tiled(model, lr, 2, tile=16, overlap=4, multiple=model.multiple)
    assert (without - base).abs().max() > 1e-2  # zero-filling of a single tile wraps around at its edges


def test_a_slice_that_fits_is_one_tile() -> None:
    lr, seen = image(1, 1, 12, 16), []

    def model(cut: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        seen.append(cut.shape)
        return cut

    assert torch.equal(tiled(model, lr, 1, tile=16, overlap=4), lr)
    assert seen == [lr.shape]


@pytest.mark.parametrize(("tile", "overlap", "multiple"), [(8, 8, 1), (8, 9, 1), (8, -1, 1), (8, 6, 4), (2, 0, 4)])
def test_an_overlap_that_leaves_nothing_new_is_refused(tile: int, overlap: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=r"must lie between 0 and|too small for this model"):
        spans(30, tile, overlap, multiple)


def test_a_model_of_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="returned a tile of"):
        tiled(lambda cut, _: cut, image(1, 1, 30, 30), 2, tile=16)


def test_the_default_overlap_always_goes_with_its_tile() -> None:
    assert [default_overlap(tile) for tile in (1, 8, 32, 512)] == [0, 4, 16, 16]
    assert [default_overlap(tile, multiple=4) for tile in (4, 6, 8, 32)] == [0, 2, 4, 16]
