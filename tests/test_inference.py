"""upscale(): the same numbers whatever the kind of scan, in the same units, at the same place in the world."""

import numpy as np
import pytest
import torch

from deformmamba.inference import coarsen, upscale
from deformmamba.kspace import degrade, lowpass
from deformmamba.models import Bicubic, ZeroFill
from deformmamba.models.base import SRModel
from deformmamba.volume import Volume, VolumeError, intensity_scale


class Wobble(SRModel):
    """Zero-fill plus an invented pattern: an estimate that is wrong in every frequency, above and below zero."""

    minimum_size = 4

    def __init__(self, *, scale: int = 2, intensity: str = "p99.9", strength: float = 0.3) -> None:
        super().__init__(scale=scale, intensity=intensity, strength=strength)
        self.strength = torch.nn.Parameter(torch.tensor(strength))
        self.seen: list[tuple[tuple[int, ...], bool, float]] = []

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        self.check_lr(lr)
        self.seen.append((tuple(lr.shape), self.training, float(lr.max())))
        sr = ZeroFill(scale=self.scale)(lr)
        y, x = torch.meshgrid(torch.arange(sr.shape[-2]), torch.arange(sr.shape[-1]), indexing="ij")
        return sr + self.strength * torch.sin(1.7 * x + 0.9 * y)


@pytest.fixture
def wobble() -> Wobble:
    return Wobble().eval()


def oblique(*spacing: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0] @ np.diag(spacing)
    affine[:3, 3] = (12.0, -7.0, 3.0)
    return affine


def scan(shape: tuple[int, int, int] = (12, 10, 7)) -> Volume:
    return Volume(np.random.default_rng(0).gamma(2.0, 200.0, shape).astype(np.float32), oblique(0.9, 0.8, 5.0))


def test_every_kind_of_scan_gives_the_same_numbers(wobble: Wobble) -> None:
    volume = scan()
    sharp = upscale(wobble, volume)
    assert sharp.array.shape == (24, 20, 7)
    assert sharp.array.dtype == np.float32
    array = upscale(wobble, volume.array, axis=2)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, sharp.array)
    tensor = upscale(wobble, torch.from_numpy(volume.array), axis=2)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), sharp.array)
    slices_first = upscale(wobble, np.moveaxis(volume.array, 2, 0), axis=0)
    np.testing.assert_array_equal(slices_first, np.moveaxis(sharp.array, 2, 0))
    one = upscale(wobble, volume.array[:, :, 3])
    assert one.shape == (24, 20)
    np.testing.assert_array_equal(one, upscale(wobble, volume.array[:, :, 3:4])[:, :, 0])
    assert upscale(wobble, torch.from_numpy(volume.array[:, :, 3])).shape == (24, 20)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64])
def test_any_real_numbers_will_do(wobble: Wobble, dtype: type) -> None:
    array = (scan().array / 16).astype(dtype)
    np.testing.assert_allclose(upscale(wobble, array), upscale(wobble, array.astype(np.float32)), rtol=1e-6)
    tensor = torch.from_numpy(array)
    np.testing.assert_allclose(upscale(wobble, tensor).numpy(), upscale(wobble, array), rtol=1e-6)
    assert upscale(wobble, tensor.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_whole_and_of_any_axis(wobble: Wobble, axis: int) -> None:
    volume = scan((12, 10, 8))
    sharp = upscale(wobble, volume, axis=axis, batch_size=6)
    in_plane = [n for a, n in enumerate(volume.array.shape) if a != axis]
    n = volume.array.shape[axis]
    assert [seen[0] for seen in wobble.seen] == [(6, 1, *in_plane), (n - 6, 1, *in_plane)]
    assert sharp.array.shape == tuple(n if a == axis else 2 * n for a, n in enumerate(volume.array.shape))
    np.testing.assert_allclose(sharp.spacing, [s if a == axis else s / 2 for a, s in enumerate(volume.spacing)])


def test_batches_do_not_show(wobble: Wobble) -> None:
    volume = scan()
    whole = upscale(wobble, volume, batch_size=7).array
    for batch_size in (1, 2, 3, 100, None):
        np.testing.assert_allclose(upscale(wobble, volume, batch_size=batch_size).array, whole, atol=1e-3)


def test_units_and_the_model_scale(wobble: Wobble) -> None:
    volume = scan()
    sharp = upscale(wobble, volume).array
    doubled = upscale(wobble, volume.array * 2, axis=2)
    np.testing.assert_allclose(doubled, 2 * sharp, rtol=1e-4, atol=1e-2)
    expected = float(volume.array.max()) / intensity_scale(volume.array)
    assert max(seen[2] for seen in wobble.seen) == pytest.approx(expected)
    by_maximum = Wobble(intensity="max").eval()
    upscale(by_maximum, volume)
    assert max(seen[2] for seen in by_maximum.seen) == pytest.approx(1)


def test_one_scale_for_all_slices(wobble: Wobble) -> None:
    array = scan().array
    array[:, :, 0] *= 1e-3
    sharp = upscale(ZeroFill(scale=2), array)
    np.testing.assert_allclose(sharp[::2, ::2, 0], array[:, :, 0], atol=1e-3)


def test_magnitude_stays_magnitude_and_signed_stays_signed() -> None:
    wobble = Wobble(strength=2.0).eval()
    volume = scan()
    assert upscale(wobble, volume).array.min() == 0
    signed = upscale(wobble, volume.array - 100)
    assert signed.min() < -100


def test_empty_slices_and_constant_scans() -> None:
    array = scan().array
    array[:, :, :3] = 0
    assert not upscale(ZeroFill(scale=2), array)[:, :, :3].any()
    np.testing.assert_allclose(upscale(ZeroFill(scale=2), np.full((8, 8, 3), 5.0)), 5, rtol=1e-5)
    assert not upscale(ZeroFill(scale=2), np.zeros((8, 8, 3))).any()


@pytest.mark.parametrize("size", [(12, 10), (11, 10), (9, 13)])
def test_consistency_reproduces_what_was_measured(size: tuple[int, int]) -> None:
    wobble = Wobble(scale=3, strength=0.05).eval()
    array = np.random.default_rng(0).uniform(500, 1000, (*size, 3)).astype(np.float32)  # no output below zero
    again = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, array, consistency=True), 2, 0)))
    np.testing.assert_allclose(degrade(again, 3).numpy(), np.moveaxis(array, 2, 0), atol=0.02)
    loose = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, array, consistency=False), 2, 0)))
    assert (degrade(loose, 3).numpy() - np.moveaxis(array, 2, 0)).std() > 0.5
    signed = array - 750
    again = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, signed, consistency=True), 2, 0)))
    np.testing.assert_allclose(lowpass(again, 3).real.numpy(), np.moveaxis(signed, 2, 0), atol=0.02)


def test_consistency_is_as_the_model_recommends(wobble: Wobble) -> None:
    volume = scan()
    off, on = (upscale(wobble, volume, consistency=c).array for c in (False, True))
    assert np.abs(off - on).max() > 1
    np.testing.assert_array_equal(upscale(wobble, volume).array, off)
    wobble.provenance = {"consistency": True}
    np.testing.assert_array_equal(upscale(wobble, volume).array, on)
    np.testing.assert_array_equal(upscale(wobble, volume, consistency=False).array, off)
    with pytest.raises(ValueError, match="origin"):
        upscale(Bicubic(scale=2, grid="half-pixel"), volume, consistency=True)


def test_the_model_runs_in_eval_mode_and_comes_back_as_it_was(wobble: Wobble) -> None:
    wobble.train()
    upscale(wobble, scan())
    assert not any(training for _, training, _ in wobble.seen)
    assert wobble.training
    wobble.forward = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        upscale(wobble, scan())
    assert wobble.training


def test_nothing_needs_gradients_or_changes_the_input(wobble: Wobble) -> None:
    volume = scan()
    before = volume.array.copy()
    upscale(wobble, volume)
    np.testing.assert_array_equal(volume.array, before)
    tensor = torch.from_numpy(before).requires_grad_()
    sharp = upscale(wobble, tensor)
    assert not sharp.requires_grad
    sharp.add_(1)  # an ordinary tensor, not one of inference mode


def test_the_bar_stays_away_from_files(wobble: Wobble, capfd: pytest.CaptureFixture[str]) -> None:
    upscale(wobble, scan(), progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "axis", "said"),
    [
        (np.ones((3, 12, 7)), None, "smallest that Wobble takes is 4x4"),
        (np.ones((1, 1)), None, "smallest"),
        (np.ones((12, 12, 7), complex), None, "magnitude"),
        (np.full((12, 12, 7), np.nan), None, "NaN"),
        (np.full((12, 12), np.inf), None, "infinite"),
        (np.array([["a"] * 9] * 9), None, "not real numbers"),
        (np.ones((12, 12), bool), None, "not real numbers"),
        (np.ones(9), None, "3-D"),
        (np.ones((1, 1, 12, 12)), None, "goes to the model itself"),
        (np.ones((12, 12, 7)), 3, "0, 1 or 2, not 3"),
        (np.ones((12, 12, 7)), -1, "0, 1 or 2, not -1"),
        (np.ones((12, 12)), 0, "2-D"),
    ],
)
def test_scans_that_cannot_be_upscaled(wobble: Wobble, given: np.ndarray, axis: int | None, said: str) -> None:
    with pytest.raises(VolumeError, match=said):
        upscale(wobble, given, axis=axis)
    assert not wobble.seen


def test_pixels_far_from_the_training_are_warned_about(wobble: Wobble) -> None:
    volume = scan()
    wobble.provenance = {"spacings_mm": [0.7, 1.1]}
    upscale(wobble, volume)
    wobble.provenance = {"spacings_mm": [[3.0, 3.0], [4.0, 4.0]]}
    with pytest.warns(UserWarning, match=r"0\.9 x 0\.8 mm.*trained on 3 to 4 mm") as caught:
        upscale(wobble, volume)
    assert caught[0].filename == __file__
    upscale(wobble, volume.array)  # nobody knows its spacing


# ------------------------------------------------------------------------------------------- place in the world


def blob(shape: tuple[int, int, int], affine: np.ndarray, centre: np.ndarray, width: float) -> np.ndarray:
    """A Gaussian at `centre` mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = index @ affine[:3, :3].T + affine[:3, 3]
    return np.exp(-((mm - centre) ** 2).sum(-1) / (2 * width**2))


def centroid(volume: Volume) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, volume.array.shape), indexing="ij"), -1).reshape(-1, 3)
    weights = volume.array.reshape(-1).astype(float)
    return (volume.affine[:3, :3] @ (weights @ index / weights.sum())) + volume.affine[:3, 3]


@pytest.mark.parametrize("model", [ZeroFill(scale=4), Bicubic(scale=4), Bicubic(scale=3, grid="half-pixel")])
@pytest.mark.parametrize("axis", [0, 2])
def test_a_lesion_stays_where_it_was(model: SRModel, axis: int) -> None:
    shape = [24, 26, 20]
    shape[axis] = 9
    affine = oblique(0.9, 0.8, 1.0)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2 + 0.3) + affine[:3, 3]
    lr = Volume(blob((shape[0], shape[1], shape[2]), affine, centre, 2.0), affine)
    sharp = upscale(model, lr, axis=axis)
    assert np.abs(centroid(sharp) - centroid(lr)).max() < 0.01  # mm; the wrong grid is 0.3 mm off


@pytest.mark.parametrize("axis", [0, 2])
def test_a_coarser_scan_and_back(axis: int) -> None:
    shape = [34, 33, 35]
    shape[axis] = 9
    affine = oblique(0.9, 0.8, 1.0)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    hr = Volume(blob((shape[0], shape[1], shape[2]), affine, centre, 3.0), affine)
    lr = coarsen(hr, 4, axis=axis)
    assert lr.array.shape == tuple(n if a == axis else n // 4 for a, n in enumerate(shape))
    np.testing.assert_allclose(lr.spacing, [s if a == axis else 4 * s for a, s in enumerate(hr.spacing)])
    again = upscale(ZeroFill(scale=4), lr, axis=axis)
    np.testing.assert_allclose(again.affine, hr.affine)
    assert np.abs(centroid(again) - centroid(hr)).max() < 0.15  # the ends that were cut off take weight with them
    view = hr.array[tuple(slice(n) for n in again.array.shape)]
    assert np.abs(again.array - view).max() < 0.05 * view.max()


def test_coarsening_equals_degrading_each_slice() -> None:
    volume = scan((12, 8, 3))
    lr = coarsen(volume, 2)
    for k in range(3):
        expected = degrade(torch.from_numpy(np.ascontiguousarray(volume.array[:, :, k])), 2)
        np.testing.assert_array_equal(lr.array[:, :, k], expected.numpy())
    with pytest.raises(VolumeError, match="too small for 1/9"):
        coarsen(volume, 9)
    with pytest.raises(VolumeError, match="NaN"):
        coarsen(Volume(volume.array * np.nan, volume.affine), 2)
