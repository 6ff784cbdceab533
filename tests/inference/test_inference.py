"""upscale(): equal numbers for every kind of input, in the input's units, at the same world coordinates."""

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba import __version__
from deformmamba.inference import (
    Settings,
    coarsen,
    derivation,
    to_effective,
    upscale,
    upscale_file,
    upscale_with_uncertainty,
    weights_hash,
)
from deformmamba.inference.adapters import UpscaleInferer, UpscaleTransform
from deformmamba.inference.cohort import upscale_cohort
from deformmamba.models import Bicubic, ZeroFill
from deformmamba.models.base import SRModel
from deformmamba.physics.degradations import parse
from deformmamba.physics.kspace import degrade, lowpass
from deformmamba.scan import _chosen, scan_backend
from deformmamba.volume import (
    Volume,
    VolumeError,
    from_nibabel,
    intensity_scale,
    read_volume,
    to_nibabel,
    upscaled_affine,
    write_volume,
)

# signed images on purpose; test_intensity.py tests the warning
pytestmark = pytest.mark.filterwarnings("ignore:the scan does not look like a magnitude image")


class Wobble(SRModel):
    """Zero-filling plus a synthetic pattern: an estimate that is wrong at every frequency, above and below zero."""

    minimum_size = 4

    def __init__(self, *, scale: int = 2, intensity: str = "p99.9", strength: float = 0.3) -> None:
        super().__init__(scale=scale, intensity=intensity, strength=strength)
        self.strength = torch.nn.Parameter(torch.tensor(strength))
        self.seen: list[tuple[tuple[int, ...], bool, float]] = []

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        self.check_lr(lr, base)
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
    assert_close(sharp.spacing, [s if a == axis else s / 2 for a, s in enumerate(volume.spacing)])


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
    with pytest.warns(UserWarning, match="% of its voxels are negative"):
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
    again = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, array, consistency="exact"), 2, 0)))
    np.testing.assert_allclose(degrade(again, 3).numpy(), np.moveaxis(array, 2, 0), atol=0.02)
    loose = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, array, consistency="off"), 2, 0)))
    assert (degrade(loose, 3).numpy() - np.moveaxis(array, 2, 0)).std() > 0.5
    signed = array - 750
    again = torch.from_numpy(np.ascontiguousarray(np.moveaxis(upscale(wobble, signed, consistency="exact"), 2, 0)))
    np.testing.assert_allclose(lowpass(again, 3).real.numpy(), np.moveaxis(signed, 2, 0), atol=0.02)


def test_consistency_is_as_the_model_recommends(wobble: Wobble) -> None:
    volume = scan()
    off, on = (upscale(wobble, volume, consistency=c).array for c in ("off", "exact"))
    assert np.abs(off - on).max() > 1
    np.testing.assert_array_equal(upscale(wobble, volume).array, off)
    inside = upscale(wobble, volume, consistency="object").array
    # older checkpoints hold True and False
    for kind, expected in (("exact", on), (True, on), ("object", inside), ("off", off), (False, off)):
        wobble.provenance = {"consistency": kind}
        np.testing.assert_array_equal(upscale(wobble, volume).array, expected)
    np.testing.assert_array_equal(upscale(wobble, volume, consistency="off").array, off)
    with pytest.raises(ValueError, match="origin"):
        upscale(Bicubic(scale=2, grid="half-pixel"), volume, consistency="exact")
    for wrong in ("objekt", True, False, 0):
        with pytest.raises(ValueError, match=f'must be "exact", "object" or "off", not {wrong!r}'):
            upscale(wobble, volume, consistency=wrong)  # type: ignore[arg-type]


def test_settings_are_checked_before_anything_is_read(wobble: Wobble, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.nii"
    for call in (
        lambda **wrong: upscale_file(wobble, nothing, tmp_path / "out.nii", **wrong),
        lambda **wrong: upscale_with_uncertainty(wobble, scan(), **wrong),
        lambda **wrong: upscale_cohort(wobble, nothing, tmp_path, **wrong),
        lambda **wrong: UpscaleInferer(**wrong),
        lambda **wrong: UpscaleTransform(wobble, **wrong),
    ):
        with pytest.raises(TypeError, match="ensembel"):
            call(ensembel=True)
        for name, value in (("batch_size", -1), ("batch_size", 0), ("batch_size", 1.5), ("tile", 0), ("overlap", -1)):
            with pytest.raises(ValueError, match=f"{name} must be an integer of . or more, or None, not {value}"):
                call(**{name: value})
    with pytest.raises(ValueError, match="batch_size"):
        upscale(wobble, scan(), batch_size=-1)
    assert upscale(wobble, scan(), batch_size=np.int64(2)).array.any()


class Known(SRModel):
    """A model that returns `answer` / `unit` for every input."""

    minimum_size = 4

    def __init__(self, answer: torch.Tensor, unit: float) -> None:
        super().__init__(scale=2)
        self.answer = answer / unit

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        return self.answer.expand(len(lr), 1, -1, -1).to(lr)


def disc() -> torch.Tensor:
    """(96, 96): a textured disc in air, up to about 1,000."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    edge = torch.sigmoid(30 * (0.6 - torch.hypot(y, x)))
    return edge * (800 + 150 * torch.sin(9 * x + 4 * y) * torch.cos(13 * y))


def with_consistency(answer: torch.Tensor, lr: torch.Tensor) -> list[torch.Tensor]:
    """`answer` after data consistency with `lr`, for "off", "exact" and "object"."""
    model = Known(answer, intensity_scale(lr.numpy())).eval()
    return [upscale(model, lr, consistency=kind) for kind in ("off", "exact", "object")]


def test_consistency_of_the_object_leaves_the_air_alone() -> None:
    truth = disc()
    wrong = truth + 40 * (truth > 500) * torch.sin(torch.arange(96) * 0.4)
    off, exact, inside = with_consistency(wrong, degrade(truth, 2))
    air = torch.hypot(*torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")) > 40
    assert (exact - off)[air].abs().max() > 1  # ringing
    assert inside[air].equal(off[air])
    tissue = truth > 500
    taken = ((inside - off) * (exact - off))[tissue].sum() / (exact - off)[tissue].square().sum()
    assert 0.95 < taken <= 1
    assert (inside - truth).square().mean() < 0.3 * (off - truth).square().mean()


@pytest.mark.parametrize("signed", [False, True])
def test_consistency_of_the_object_does_not_bring_noise_back(signed: bool) -> None:
    truth = disc()
    if signed:
        lr = parse("k-space:output=real >> noise:snr=20, reference=900", scale=2)(truth)
        assert lr.min() < 0
    else:
        lr = parse("k-space >> rician:snr=20, reference=900", scale=2)(truth)
    _, exact, inside = (torch.sqrt((sr - truth).square().mean()) for sr in with_consistency(truth, lr))
    assert exact > 40
    assert inside < 0.3 * exact


def test_without_air_nothing_is_said_of_noise() -> None:
    everywhere = 1000 + 100 * torch.sin(torch.arange(96) * 0.3) * torch.ones(96, 1)
    lr = parse("k-space >> rician:snr=20, reference=900", scale=2)(everywhere)
    off, exact, inside = with_consistency(everywhere, lr)
    assert_close(inside, exact)
    assert not inside.equal(off)


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
    sharp.add_(1)  # allowed: it is not an inference-mode tensor


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # restored, also after an error


@pytest.mark.usefixtures("two_threads")
def test_slices_run_side_by_side_and_come_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, model = scan((12, 10, 9)), Wobble().eval()
    seen: set[tuple[str, int, str]] = set()
    forward = Wobble.forward

    def watched(self: Wobble, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        seen.add((threading.current_thread().name[:18], torch.get_num_threads(), _chosen.get()))
        return forward(self, lr, base)

    monkeypatch.setattr(Wobble, "forward", watched)
    with scan_backend("reference"):
        both = upscale(model, volume, batch_size=2).array
    assert seen == {("deformmamba-slices", 1, "reference")}
    seen.clear()
    upscale(model, volume, batch_size=9)  # one batch keeps all threads
    with torch.autocast("cpu", torch.bfloat16):
        upscale(model, volume, batch_size=3)
    assert {(who, n) for who, n, _ in seen} == {(threading.current_thread().name, 2)}
    torch.set_num_threads(1)
    np.testing.assert_array_equal(upscale(model, volume, batch_size=2).array, both)
    torch.set_num_threads(2)


@pytest.mark.usefixtures("two_threads")
def test_a_failure_side_by_side_comes_out_and_ends_all(wobble: Wobble, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(self: Wobble, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(Wobble, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        upscale(wobble, scan((12, 10, 40)), batch_size=1)
    assert len(calls) < 10


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
        (np.ones((1, 1, 12, 12)), None, "call the model itself"),
        (np.ones((12, 12, 7)), 3, "axis is 3; it must be 0, 1 or 2"),
        (np.ones((12, 12, 7)), -1, "axis is -1; it must be 0, 1 or 2"),
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
    upscale(wobble, volume.array)  # an array has no spacing


# ------------------------------------------------------------------------------------------- place in the world


def blob(shape: tuple[int, int, int], affine: np.ndarray, centre: np.ndarray, width: float) -> np.ndarray:
    """A Gaussian centred at `centre` [mm]."""
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
    lr = coarsen(hr, 4, axis=axis, crop=True)
    assert lr.array.shape == tuple(n if a == axis else n // 4 for a, n in enumerate(shape))
    assert_close(lr.spacing, [s if a == axis else 4 * s for a, s in enumerate(hr.spacing)])
    again = upscale(ZeroFill(scale=4), lr, axis=axis)
    assert_close(again.affine, hr.affine)
    assert np.abs(centroid(again) - centroid(hr)).max() < 0.15  # the cropped ends contain some of the weight
    view = hr.array[tuple(slice(n) for n in again.array.shape)]
    assert np.abs(again.array - view).max() < 0.05 * view.max()


def test_coarsening_equals_degrading_each_slice() -> None:
    volume = scan((12, 8, 3))
    slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(volume.array, 2, 0)))
    for name in ("k-space:scale=2", "area:scale=2 >> rician:snr=20", "blur:sigma=1"):
        made = parse(name)
        lr = coarsen(volume, made, seed=5)
        unit = intensity_scale(volume.array)
        expected = np.moveaxis((made(slices / unit, seed=5) * unit).numpy(), 0, 2)
        np.testing.assert_allclose(lr.array, expected, rtol=1e-5, atol=1e-4)
        assert_close(lr.affine, upscaled_affine(volume.affine, 1 / made.scale, (0, 1), made.grid))
    expected = np.moveaxis(degrade(slices, 2).numpy(), 0, 2)
    np.testing.assert_allclose(coarsen(volume, 2).array, expected, rtol=1e-5, atol=1e-4)
    noisy = [coarsen(volume, parse("rician:snr=20"), seed=seed).array for seed in (5, 5, 6)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])


def test_coarsening_refuses() -> None:
    volume = scan((12, 8, 3))
    with pytest.raises(VolumeError, match="too small to reduce by 9"):
        coarsen(volume, 9)
    with pytest.raises(VolumeError, match="NaN"):
        coarsen(Volume(volume.array * np.nan, volume.affine), 2)
    with pytest.raises(ValueError, match=r"12x8, not a multiple of 5; give crop=True \(--crop\) .* to 10x5"):
        coarsen(volume, 5)
    assert coarsen(volume, 5, crop=True).array.shape == (2, 1, 3)


# ------------------------------------------------------------------------------------------------- the guarantee


@pytest.mark.parametrize(("size", "scale"), [((8, 10), 2), ((7, 9), 3), ((9, 6), 2), ((5, 8), 4), ((6, 6), 4)])
def test_consistency_never_takes_a_signed_scan_further_from_the_truth(size: tuple[int, int], scale: int) -> None:
    rng = np.random.default_rng(1)
    hr = torch.from_numpy(rng.normal(0, 100, (3, size[0] * scale, size[1] * scale)))
    lr = degrade(hr, scale, output="real").numpy().astype(np.float32)
    for strength in (0.0, 0.1, 3.0):
        wobble = Wobble(scale=scale, strength=strength).eval()
        loose, tight = (upscale(wobble, lr, axis=0, consistency=c) - hr.numpy() for c in ("off", "exact"))
        assert np.linalg.norm(tight) <= np.linalg.norm(loose) * (1 + 1e-5)
    again = lowpass(torch.from_numpy(tight + hr.numpy()), scale).real
    np.testing.assert_allclose(again, lr, atol=1e-3)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("tile", [None, 8])
def test_consistency_holds_whatever_ran_before_it(ensemble: bool, tile: int | None) -> None:
    wobble = Wobble(strength=0.05).eval()
    lr = np.random.default_rng(0).uniform(500, 1000, (3, 13, 12)).astype(np.float32)
    sharp = upscale(wobble, lr, axis=0, consistency="exact", ensemble=ensemble, tile=tile)
    assert sharp.min() > 0  # nothing was clipped
    np.testing.assert_allclose(degrade(torch.from_numpy(sharp), 2), lr, atol=0.02)


# ------------------------------------------------------------------------------------------------- tiles and ensembles


def test_tiles_of_a_local_model_do_not_show() -> None:
    volume = scan((70, 45, 3))
    for model in (Bicubic(scale=2), Bicubic(scale=3, grid="half-pixel"), ZeroFill(scale=2)):
        whole, cut = (upscale(model, volume, tile=tile).array for tile in (None, 24))
        np.testing.assert_allclose(cut, whole, atol=1e-6 * whole.max())


def test_tiles_are_what_the_model_sees(wobble: Wobble) -> None:
    upscale(wobble, scan((20, 12, 2)), tile=8, overlap=4, batch_size=2)
    assert {seen[0] for seen in wobble.seen} == {(2, 1, 8, 8)}
    assert len(wobble.seen) == 4 * 2
    for settings, said in (
        ({"tile": 3}, "tiles of 3 are too small"),
        ({"tile": 8, "overlap": 8}, "overlap of 8 does not go with tiles of 8"),
        ({"overlap": 4}, "needs tiles"),
    ):
        with pytest.raises(ValueError, match=said):
            upscale(wobble, scan(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(12, 9), (11, 8), (9, 9)])
def test_reflections_are_about_the_origin(size: tuple[int, int]) -> None:
    """If a model commutes with these reflections, its ensemble has no spread. With plain reversals it would blur."""
    volume = Volume(np.random.default_rng(0).gamma(2.0, 200.0, (*size, 3)), oblique(1, 1, 4))
    for model in (ZeroFill(scale=3), Bicubic(scale=3, grid="half-pixel"), Bicubic(scale=2, grid="half-pixel")):
        sharp, spread = upscale_with_uncertainty(model, volume)
        np.testing.assert_allclose(sharp.array, upscale(model, volume).array, atol=1e-3)
        assert spread.array.max() < 1e-3
        np.testing.assert_array_equal(spread.affine, sharp.affine)


def test_an_ensemble_is_the_mean_of_its_members_and_their_spread(wobble: Wobble) -> None:
    array = scan((12, 10, 2)).array + 2000  # nothing is clipped
    members = []
    for transpose in (False, True):
        for flips in ((), (0,), (1,), (0, 1)):
            turned = np.roll(np.flip(array, flips), 1, flips)
            turned = turned.swapaxes(0, 1) if transpose else turned
            sr = upscale(wobble, np.ascontiguousarray(turned), axis=2)
            sr = sr.swapaxes(0, 1) if transpose else sr
            members.append(np.roll(np.flip(sr, flips), 1, flips))
    sharp, spread = upscale_with_uncertainty(wobble, array, axis=2)
    np.testing.assert_allclose(sharp, np.mean(members, 0), rtol=1e-5)
    np.testing.assert_allclose(spread, np.std(members, 0), rtol=1e-3, atol=1e-2)
    assert spread.mean() > 10
    np.testing.assert_array_equal(upscale(wobble, array, axis=2, ensemble=True), sharp)
    np.testing.assert_allclose(upscale_with_uncertainty(wobble, array * 3, axis=2)[1], 3 * spread, rtol=1e-3, atol=0.1)


# ------------------------------------------------------------------------------------------------- nibabel, files


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image", "MGHImage"])
def test_nibabel_images_come_back_as_what_they_were(wobble: Wobble, kind: str) -> None:
    image = getattr(nibabel, kind)((scan().array * 3).astype(np.int16), oblique(0.9, 0.8, 5.0))
    sharp = upscale(wobble, image)
    assert type(sharp) is type(image)
    assert sharp.get_data_dtype().newbyteorder("=") == np.float32
    expected = upscale(wobble, Volume(np.asarray(image.dataobj, np.float32), image.affine))
    np.testing.assert_array_equal(sharp.get_fdata(dtype=np.float32), expected.array)
    np.testing.assert_allclose(sharp.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(sharp.header.get_zooms()[:3], (0.45, 0.4, 5.0), rtol=1e-5)
    assert image.get_data_dtype().newbyteorder("=") == np.int16  # the given header is unchanged


def test_nibabel_images_keep_units_codes_and_slope(wobble: Wobble) -> None:
    image = nibabel.Nifti1Image(scan().array, None)
    image.header.set_xyzt_units("meter")
    image.set_qform(oblique(0.0009, 0.0008, 0.005), 1)
    image.set_sform(np.diag([0.0009, 0.0008, 0.005, 1]), 4)
    image.header["descrip"] = b"kept"
    sharp = upscale(wobble, image)
    assert sharp.header.get_xyzt_units()[0] == "meter"
    assert (int(sharp.header["qform_code"]), int(sharp.header["sform_code"])) == (1, 4)
    np.testing.assert_allclose(sharp.get_sform(), np.diag([0.00045, 0.0004, 0.005, 1]), rtol=1e-5)
    np.testing.assert_allclose(sharp.get_qform()[:3, 3], image.get_qform()[:3, 3], rtol=1e-5)
    assert bytes(sharp.header["descrip"]).startswith(b"kept")
    as_mgh = to_nibabel(from_nibabel(image), nibabel.MGHImage)
    np.testing.assert_allclose(as_mgh.header.get_zooms(), (0.9, 0.8, 5.0), rtol=1e-5)
    back = to_nibabel(from_nibabel(as_mgh), nibabel.Nifti1Image)
    assert back.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(back.affine, as_mgh.affine, atol=1e-5)
    image.header.set_dim_info(slice=0)
    image.header.set_slice_duration(0.1)
    assert upscale(wobble, image, axis=0).header["slice_duration"] == np.float32(0.1)
    assert upscale(wobble, image, axis=2).header["slice_duration"] == 0  # the acquired slices no longer exist
    with pytest.raises(VolumeError, match="give one 3-D volume"):
        upscale(wobble, nibabel.Nifti1Image(np.ones((8, 8, 2, 2), np.float32), np.eye(4)))
    with pytest.raises(VolumeError, match="magnitude"):
        upscale(wobble, nibabel.Nifti1Image(np.ones((8, 8, 2), np.complex64), np.eye(4)))


@pytest.mark.parametrize("axis", [0, 2])
def test_from_file_to_file_without_the_volume_in_memory(
    wobble: Wobble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int
) -> None:
    source, target, spread = tmp_path / "in.nii.gz", tmp_path / "out.nii.gz", tmp_path / "spread.nii"
    volume = scan((8, 10, 7))
    write_volume(source, volume)
    expected, deviation = upscale_with_uncertainty(wobble, volume, axis=axis)
    monkeypatch.setattr("deformmamba.inference.Upscaling.empty", None)
    done = upscale_file(wobble, source, target, uncertainty=spread, keep=lambda n: {0, n // 2}, axis=axis, batch_size=3)
    assert set(done.kept) == {0, volume.array.shape[axis] // 2}
    for k, (image, disagreement) in done.kept.items():
        np.testing.assert_allclose(image, expected.array.take(k, axis), rtol=1e-5)
        np.testing.assert_allclose(disagreement, deviation.array.take(k, axis), rtol=1e-3, atol=1e-2)
    assert done.shape == expected.array.shape
    assert done.axis == axis
    assert done.settings == Settings(axis=axis, consistency="off", ensemble=True, batch_size=3)
    for path, wanted in ((target, expected), (spread, deviation)):
        written = read_volume(path)
        np.testing.assert_allclose(written.array, wanted.array, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(written.affine, wanted.affine, atol=1e-5)


def test_the_hash_is_that_of_these_weights_or_none(tmp_path: Path) -> None:
    path = tmp_path / "wobble é.safetensors"
    digest = Wobble().save_pretrained(path)
    model = Wobble.from_pretrained(path)
    assert weights_hash(model) == model.sha256 == digest
    assert derivation(model) == f"deformmamba {__version__}, Wobble 2x, wobble ?.safetensors, sha256 {digest}"
    with torch.no_grad():
        model.strength += 1  # changed in memory, not in the file
    assert weights_hash(model) is None
    model = Wobble.from_pretrained(path)
    Wobble(strength=0.4).save_pretrained(path)
    assert weights_hash(model) is None
    Wobble().save_pretrained(path, {"note": "the same weights in another file"})
    assert weights_hash(model) is None
    path.unlink()
    assert weights_hash(model) is None
    assert model.sha256 == digest
    assert weights_hash(Wobble()) is None
    assert "weights without a file" in derivation(model)


def test_a_report_says_what_ran(wobble: Wobble, tmp_path: Path) -> None:
    write_volume(tmp_path / "in.nii", scan((16, 20, 5)))
    for axis, spread in ((2, tmp_path / "u.nii"), (1, None)):
        page = tmp_path / f"{axis}.html"
        upscale_file(wobble, tmp_path / "in.nii", tmp_path / "out.nii", report=page, uncertainty=spread, axis=axis)
        text = page.read_text("utf-8")
        assert all(word in text for word in ("Wobble, 2x", "weights without a file", "whole slices"))
        assert ("spread of the estimates" in text) == (spread is not None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.html", "2.html", "in.nii", "out.json", "out.nii", "u.nii"]
    with pytest.raises(VolumeError, match=r"\.html"):
        upscale_file(wobble, tmp_path / "in.nii", tmp_path / "out.nii", report=tmp_path / "a.pdf")
    with pytest.raises(VolumeError, match="two outputs have the same name"):
        upscale_file(wobble, tmp_path / "in.nii", tmp_path / "out.nii", uncertainty=tmp_path / "out.nii")


def test_a_failure_halfway_leaves_no_file(wobble: Wobble, tmp_path: Path) -> None:
    write_volume(tmp_path / "in.nii", scan())
    (tmp_path / "out.nii").write_bytes(b"kept")

    class Stop:
        def __contains__(self, k: object) -> bool:
            if k == 2:
                raise KeyboardInterrupt
            return False

    with pytest.raises(KeyboardInterrupt):
        upscale_file(
            wobble, tmp_path / "in.nii", tmp_path / "out.nii", keep=lambda _: Stop(), uncertainty=tmp_path / "u.nii"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nii", "out.nii"]
    assert (tmp_path / "out.nii").read_bytes() == b"kept"


@pytest.mark.long
def test_memory_does_not_grow_with_the_output(tmp_path: Path) -> None:
    """The output has 256 MB, and only a few of its slices are in memory at any time."""
    write_volume(tmp_path / "in.nii", Volume(np.random.default_rng(0).random((256, 256, 64), np.float32), np.eye(4)))
    code = (
        "import resource, sys, nibabel, tqdm; from deformmamba.inference import upscale, upscale_file\n"
        "from deformmamba.models import ZeroFill; import numpy as np\n"
        "upscale(ZeroFill(scale=4), np.ones((256, 256, 2))); folder = sys.argv[1]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "upscale_file(ZeroFill(scale=4), folder + '/in.nii', folder + '/out.nii')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (tmp_path / "out.nii").stat().st_size > 256 << 20
    assert float(done.stdout) < 160  # MB: the input, copies of it for its percentile, and a batch


# ------------------------------------------------------------------------------------------------- what was measured


@pytest.mark.parametrize("axis", [0, 2])
def test_the_effective_matrix_is_what_was_measured(axis: int) -> None:
    rng = np.random.default_rng(0)
    coarse = np.moveaxis(rng.gamma(2.0, 200.0, (3, 19, 17)).astype(np.float32) + 2000, 0, axis)
    measured = Volume(coarse, oblique(1.8, 1.6, 5.0))
    filled = upscale(ZeroFill(scale=2), measured, axis=axis)
    back = to_effective(filled, axis=axis, matrix=(19, 17))
    np.testing.assert_allclose(back.array, measured.array, rtol=1e-4)
    assert_close(back.affine, measured.affine)
    assert to_effective(filled, axis=axis, matrix=(38, 34)) is filled
    with pytest.raises(VolumeError, match="a matrix of 41x34 is larger than the slices, 38x34"):
        to_effective(filled, axis=axis, matrix=(41, 34))
    signed = replace(filled, array=filled.array - 2500)
    np.testing.assert_allclose(to_effective(signed, axis=axis, matrix=(19, 17)).array, back.array - 2500, atol=0.1)


def test_the_effective_matrix_is_found(tmp_path: Path) -> None:
    y, x = np.meshgrid(*[np.linspace(-1, 1, 96)] * 2, indexing="ij")
    head = np.stack([(y**2 + x**2 * (1.1 + k / 9) < 0.7) * 500 + (abs(y + x / 2) < 0.2) * 200 for k in range(4)], 2)
    noisy = (head + np.random.default_rng(0).normal(0, 4, head.shape)).astype(np.float32)
    filled = upscale(ZeroFill(scale=2), Volume(np.abs(noisy), np.diag([1.0, 1.0, 4.0, 1.0])))
    assert filled.array.shape == (192, 192, 4)
    write_volume(tmp_path / "in.nii", filled)
    with pytest.warns(
        UserWarning, match=r"192x192 pixels, but their k-space is filled to about .*\(--effective\)"
    ) as caught:
        upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii")
    assert caught[0].filename == __file__
    found = to_effective(filled)
    done = upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii", effective=True)  # no warning
    assert done.shape == (2 * found.array.shape[0], 2 * found.array.shape[1], 4)
    np.testing.assert_allclose(read_volume(tmp_path / "out.nii").affine, done.place.affine, atol=1e-5)
    assert all(abs(n - 96) <= 4 for n in found.array.shape[:2])
    assert_close(found.spacing, [192 / n / 2 if n != 4 else 4 for n in found.array.shape])


@pytest.mark.parametrize("value", [32767, -32768])
def test_a_marker_does_not_ring_when_the_interpolation_is_undone(phantom: np.ndarray, value: int) -> None:
    plain = Volume(phantom, np.eye(4))
    marked = phantom.copy()
    marked[20:22, 30, 2] = value
    clean, with_marker = (
        to_effective(replace(plain, array=array), matrix=(24, 20)).array[..., 2] for array in (phantom, marked)
    )
    near = np.zeros(clean.shape, bool)
    near[8:13, 13:18] = True
    assert np.abs(with_marker - clean)[~near].max() < 0.02 * phantom.max()
    assert abs(with_marker[10:12, 15].sum()) > 0.2 * abs(value)  # it is still there


def test_all_volumes_of_a_file_get_the_matrix_of_the_first(tmp_path: Path) -> None:
    y, x = np.meshgrid(*[np.linspace(-1, 1, 96)] * 2, indexing="ij")
    head = np.stack([(y**2 + x**2 * (1.1 + k / 9) < 0.7) * 500 + (abs(y + x / 2) < 0.2) * 200 for k in range(4)], 2)
    noisy = np.abs(head + np.random.default_rng(0).normal(0, 4, head.shape)).astype(np.float32)
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    filled = upscale(ZeroFill(scale=2), noisy)
    full = np.abs(np.random.default_rng(1).normal(300, 90, filled.shape)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(np.stack([filled, full], 3), affine), tmp_path / "in.nii")
    done = upscale_file(ZeroFill(scale=2), tmp_path / "in.nii", tmp_path / "out.nii", effective=True)
    first = to_effective(Volume(filled, affine)).array.shape
    assert nibabel.load(tmp_path / "out.nii").shape == (2 * first[0], 2 * first[1], 4, 2)
    assert done.n_volumes == 2


def test_the_gradients_of_a_diffusion_scan_stay_beside_it(tmp_path: Path, phantom: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(np.stack([phantom, phantom / 2], 3), np.eye(4)), tmp_path / "dwi.nii.gz")
    for name, text in (("dwi.bval", "0 1000"), ("dwi.bvec", "0 1\n0 0\n0 0"), ("out.bval", "of a former output")):
        (tmp_path / name).write_text(text)
    upscale_file(ZeroFill(scale=2), tmp_path / "dwi.nii.gz", tmp_path / "out.nii")
    upscale_file(ZeroFill(scale=2), tmp_path / "dwi.nii.gz", tmp_path / "one.nii", volume=1)
    upscale_file(ZeroFill(scale=2), tmp_path / "dwi.nii.gz", tmp_path / "dwi.nii")
    for ending in (".bval", ".bvec"):
        assert (tmp_path / f"out{ending}").read_text() == (tmp_path / f"dwi{ending}").read_text()
        assert not (tmp_path / f"one{ending}").exists()


def test_what_is_odd_in_a_later_volume_is_said_everywhere(tmp_path: Path, wobble: Wobble, phantom: np.ndarray) -> None:
    phase = np.random.default_rng(0).uniform(0, 4095, phantom.shape).astype(np.float32)
    broken = phantom.copy()
    broken[0, 0, 0] = np.nan
    image = nibabel.Nifti1Image(np.stack([phantom, broken, phase], 3), np.eye(4))
    nibabel.save(image, tmp_path / "in.nii")
    with pytest.raises(VolumeError, match="1 of 11520 voxels are NaN"):
        upscale_file(wobble, tmp_path / "in.nii", tmp_path / "out.nii")
    assert not (tmp_path / "out.nii").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = upscale_file(wobble, tmp_path / "in.nii", tmp_path / "out.nii", nan="zero", report=tmp_path / "r.html")
    said = [str(warning.message) for warning in caught]
    assert sum("1 of 11520 voxels were NaN or infinite and are 0 now" in text for text in said) == 1
    (odd,) = (text for text in said if text.startswith("volume 2: the scan does not look like a magnitude image"))
    replaced = "volume 1: 1 of 11520 voxels were NaN or infinite and are 0 now"
    assert done.cautions == (replaced, odd)
    assert {warning.filename for warning in caught if str(warning.message) == odd} == {__file__}
    facts = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert facts["Warnings"] == [replaced, odd]
    assert facts["GeneratedBy"][0]["nan"] == "zero"
    assert "volume 2" in (tmp_path / "r.html").read_text("utf-8")
    assert "UNLIKE TRAINING DATA" in str(nibabel.load(tmp_path / "out.nii").header["descrip"])


def test_signs_survive_coarsening(phantom: np.ndarray) -> None:
    negated = Volume(-phantom, np.eye(4))
    wanted = coarsen(Volume(phantom, np.eye(4)), parse("k-space:scale=2,output=real")).array
    np.testing.assert_allclose(coarsen(negated, 2).array, -wanted, atol=0.01)
    assert coarsen(negated, np.int64(2)).array.shape == (24, 20, 6)
    for text in ("k-space:scale=2", "area:scale=2 >> rician:snr=30"):
        with pytest.warns(UserWarning, match="signs are lost; output=real and noise"):
            coarsen(negated, parse(text))
    with pytest.raises(TypeError, match="degradation is 'k-space'; give an integer scale or a Degradation"):
        coarsen(negated, "k-space")  # type: ignore[arg-type]


def test_any_view_of_an_array_is_a_scan() -> None:
    """Batches of one slice, with negative strides or without permission to write."""
    scan = np.random.default_rng(0).random((3, 12, 10), np.float32)
    model = ZeroFill(scale=2)
    wanted = upscale(model, scan, axis=0)
    assert_close(upscale(model, scan[::-1], axis=0, batch_size=1)[::-1], wanted)
    scan.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(upscale(model, scan, axis=0, batch_size=1), wanted)
