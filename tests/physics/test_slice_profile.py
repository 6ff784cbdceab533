"""The slice profile as a linear operator, its adjoint, and the cubic spline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.models import MODELS
from deformmamba.physics.slice_profile import (
    SliceProfile,
    SliceProfileError,
    ThickSlices,
    back_projected,
    slice_positions,
    slice_profile,
    spline_matrix,
)

GEOMETRIES = [
    # (voxels, voxel mm, spacing mm, thickness mm, first centre mm)
    (40, 1.0, 4.0, 4.0, 0.0),
    (41, 0.9, 3.3, 3.0, 0.4),  # spacing / voxel is not whole, slices have gaps, a sub-slice phase
    (33, 0.7, 5.0, 6.0, -0.2),  # slices overlap
    (64, 1.0, 2.0, 1.2, 0.5),
]


@pytest.mark.parametrize("kind", ["gaussian", "boxcar"])
@pytest.mark.parametrize(("n", "voxel", "spacing", "thickness", "first"), GEOMETRIES)
def test_adjoint_and_mean(kind: str, n: int, voxel: float, spacing: float, thickness: float, first: float) -> None:
    at = slice_positions(int((n - 1) * voxel / spacing) + 1, spacing, first)
    operator = ThickSlices(n, voxel, at, SliceProfile(kind, thickness))
    torch.manual_seed(0)
    x = torch.randn(2, n, 3, dtype=torch.float64)
    y = torch.randn(2, len(at), 3, dtype=torch.float64)
    left, right = (operator(x, 1) * y).sum(), (x * operator.adjoint(y, 1)).sum()
    assert torch.allclose(left, right, rtol=1e-12, atol=0)
    # a constant does not change; away from the ends, a straight line gives its value at the slice centre
    assert_close(operator(torch.ones(n, dtype=torch.float64)), torch.ones(len(at), dtype=torch.float64))
    line = operator(voxel * torch.arange(n, dtype=torch.float64))
    inside = (at > 2 * thickness) & (at < (n - 1) * voxel - 2 * thickness)
    # a Gaussian of this width has 1e-6 of its area beyond two thicknesses; a box ends inside voxels, in which the image
    # is constant
    assert torch.allclose(line[inside], at[inside], atol=1e-4 if kind == "gaussian" else voxel**2 / (8 * thickness))


@pytest.mark.parametrize("kind", ["gaussian", "boxcar"])
def test_rows_are_the_integral_of_the_profile(kind: str) -> None:
    profile, voxel, at = SliceProfile(kind, 3.5), 0.8, 12.3
    row = ThickSlices(40, voxel, [at], profile).matrix[0]
    z = np.linspace(-0.4, 39.4 * voxel + 0.4, 400_001)
    d = z - at
    p = np.exp(-4 * np.log(2) * (d / 3.5) ** 2) if kind == "gaussian" else (np.abs(d) <= 1.75).astype(float)
    p /= np.trapezoid(p, z)
    voxels = np.clip(np.floor(z / voxel + 0.5).astype(int), 0, 39)
    wanted = np.bincount(voxels, p, minlength=40) * (z[1] - z[0])
    np.testing.assert_allclose(row.numpy(), wanted, atol=2e-4)  # error of the sampled integral
    assert profile.width() == 3.5


def test_whole_boxcar_is_the_block_mean() -> None:
    x = torch.arange(24, dtype=torch.float64).reshape(2, 12)
    operator = ThickSlices(12, 1.0, slice_positions(3, 4.0, 1.5), SliceProfile("boxcar", 4.0))
    assert_close(operator(x), x.reshape(2, 3, 4).mean(2))


def test_profile_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.txt"
    path.write_text("# mm weight\n-2, 0\n-1, 2\n1, 2\n2, 0\n")
    profile = slice_profile(str(path), 1.0)
    assert profile.width() == pytest.approx(3.0, abs=2e-3)
    cumulative = profile.cumulative(torch.tensor([-5.0, -2.0, 0.0, 2.0, 5.0]))
    assert_close(cumulative, torch.tensor([0, 0, 0.5, 1, 1], dtype=torch.float64))
    # up to -1, the area of the trapezoid is that of its flank: one sixth
    assert profile.cumulative(torch.tensor([-1.0])).item() == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3\n", "two numbers"),
        ("0 1\n-1 1\n", "increasing"),
        ("0 0\n1 0\n", "area"),
        ("-2 0\n-1 1.7e308\n1 1.7e308\n2 0\n", "area"),
        ("", "rows"),
        ("0 0\n1 1\n2 0\n", "centre of mass is at 1 mm"),
        ("100 0\n101 1\n102 0\n", "centre of mass is at 101 mm"),
    ],
)
def test_a_file_that_is_no_profile(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "profile.txt"
    path.write_text(text)
    with pytest.raises(SliceProfileError, match=words) as caught:
        slice_profile(path, 1.0)
    assert "\n" not in str(caught.value)


def test_a_wrong_profile_is_named() -> None:
    with pytest.raises(SliceProfileError, match=r"'triangle'.*gaussian or boxcar"):
        slice_profile("triangle", 3.0)
    with pytest.raises(SliceProfileError, match="positive"):
        slice_profile("gaussian", 0.0)


@pytest.mark.parametrize("n", [2, 3, 7, 36])
def test_spline_equals_scipy(n: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    samples = np.random.default_rng(n).standard_normal(n)
    at = np.linspace(-0.7, n - 0.3, 57)
    wanted = ndimage.map_coordinates(samples, [at], order=3, mode="mirror")
    got = spline_matrix(n, torch.from_numpy(at)) @ torch.from_numpy(samples)
    # scipy truncates its recursive filter at about 1e-7
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)


def test_spline_of_the_baseline_is_the_same() -> None:
    model = MODELS["BSpline"](scale=3)
    torch.testing.assert_close(
        model.matrix(9), spline_matrix(9, torch.arange(27, dtype=torch.float64) / 3), rtol=0, atol=0
    )


def test_back_projection_gives_the_slices_back() -> None:
    torch.manual_seed(1)
    truth = torch.rand(5, 48, dtype=torch.float64)
    operator = ThickSlices(48, 1.0, slice_positions(12, 4.0, 1.0), SliceProfile("gaussian", 4.0))
    slices = operator(truth)
    start = torch.rand(5, 48, dtype=torch.float64)
    corrected, errors = back_projected(start, slices, operator, steps=12)
    assert torch.allclose(operator(corrected), slices, atol=1e-6)
    assert errors[-1] < 1e-3 * errors[0]
    # a projection onto a convex set that contains the truth never increases the distance to the truth
    assert (corrected - truth).norm() < (start - truth).norm()
    # the result is the nearest image of that set: the change is in the range of the adjoint
    change = corrected - start
    basis = operator.matrix.T
    inside = basis @ torch.linalg.lstsq(basis, change.T).solution
    torch.testing.assert_close(inside.T, change, atol=1e-6, rtol=0)


@pytest.mark.parametrize("image", [torch.ones(12, dtype=torch.int16), np.ones(12, np.float32)])
def test_thick_slices_of_whole_numbers_are_refused(image: Any) -> None:
    operator = ThickSlices(12, 1.0, slice_positions(4, 3.0), SliceProfile("gaussian", 3.0))
    with pytest.raises(TypeError, match=r"wanted a floating-point tensor, such as torch.as_tensor\(image\).float"):
        operator(image)


def test_a_geometry_without_millimetres_is_refused() -> None:
    for voxel, first in ((0.0, 0.0), (-1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="wanted a positive number of mm, and finite numbers"):
            ThickSlices(12, voxel, slice_positions(4, 3.0, first), SliceProfile())


def test_a_table_is_pairs_of_numbers() -> None:
    with pytest.raises(SliceProfileError, match="rows of two numbers, mm from the centre and weight"):
        SliceProfile("m", 1.0, ((-2, 0), (0, 1), (2,)))  # type: ignore[arg-type]
    given = SliceProfile("m", 1.0, [[-2, 0], [0, 1], [2, 0]])  # type: ignore[arg-type]
    assert hash(given) == hash(SliceProfile("m", 1.0, ((-2, 0), (0, 1), (2, 0))))
