"""Thick slices made isotropic: geometry, refused inputs, the choice between network and spline, data consistency."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from deformmamba.cli import main
from deformmamba.errors import DeformMambaError, InvalidArgument
from deformmamba.evaluation import evaluate
from deformmamba.inference import adaptation, upscale, upscale_file
from deformmamba.inference.adaptation import parse_adapt
from deformmamba.inference.isotropic import cubic_spline, derivation, isotropic
from deformmamba.inference.isotropic_files import in_plane_as, isotropic_cohort, isotropic_file
from deformmamba.inference.slice_consistency import noise_level
from deformmamba.inference.stack import Stack, resampled
from deformmamba.metrics import psnr
from deformmamba.models import MODELS, DeformMambaSR, ZeroFill
from deformmamba.models.base import SRModel
from deformmamba.physics.slice_profile import SliceProfile, SliceProfileError, ThickSlices, slice_positions
from deformmamba.volume import NothingToDo, Volume, VolumeError, read_volume, write_volume

SIZE = 48


class Sharpen(SRModel):
    """Replaces a trained network: it sharpens rows by `strength`."""

    def __init__(self, *, strength: float = 0.35, scale: int = 1) -> None:
        super().__init__(scale=scale)
        self.strength = torch.nn.Parameter(torch.tensor(float(strength)))

    def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
        padded = F.pad(lr, (0, 0, 2, 2), mode="replicate")
        kernel = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25]).reshape(1, 1, 5, 1)
        return lr + self.strength * (lr - F.conv2d(padded, kernel))


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Smooth random texture inside a ball, zero outside; SIZE voxels of 1 mm."""
    rng = np.random.default_rng(0)
    field = torch.from_numpy(rng.standard_normal((1, 1, SIZE, SIZE, SIZE), np.float32))
    for _ in range(2):
        field = F.avg_pool3d(F.pad(field, (1,) * 6, mode="replicate"), 3, 1)
    field = field[0, 0] / field.std()
    at = torch.linspace(-1, 1, SIZE)
    ball = (at[:, None, None] ** 2 + at[:, None] ** 2 + at**2) < 0.85
    return ((500 + 100 * field) * ball).clamp(min=0).numpy()


def thick_scan(truth: np.ndarray, *, axis: int = 2, spacing: float = 3.0, first: float = 1.0) -> Volume:
    n = int((SIZE - 1 - first) / spacing) + 1
    operator = ThickSlices(SIZE, 1.0, slice_positions(n, spacing, first), SliceProfile("gaussian", spacing))
    array = operator(torch.from_numpy(truth), axis).numpy()
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[axis, axis] = spacing
    affine[:3, 3] = (-20, 15, 7)
    affine[axis, 3] += first
    return Volume(array, affine)


@pytest.mark.parametrize(("axis", "spacing"), [(2, 3.0), (0, 3.3), (1, 4.0)])
def test_the_first_slice_stays_and_the_affine_follows(truth: np.ndarray, axis: int, spacing: float) -> None:
    scan = thick_scan(truth, axis=axis, spacing=spacing)
    out, report = isotropic(scan, model=Sharpen(), to=1.0)
    assert out.array.shape[axis] == round(scan.array.shape[axis] * spacing) == report.shape[axis]
    assert out.spacing == pytest.approx((1, 1, 1))
    # corner voxels of the first and the last slice keep their world coordinates
    corner = [0, 0, 0]
    np.testing.assert_allclose(out.affine @ [*corner, 1], scan.affine @ [*corner, 1], atol=1e-9)
    corner[axis] = scan.array.shape[axis] - 1
    fine = list(map(float, corner))
    fine[axis] *= spacing
    np.testing.assert_allclose(out.affine @ [*fine, 1], scan.affine @ [*corner, 1], atol=1e-9)
    assert report.axis == axis
    assert report.spacing == pytest.approx(spacing)
    assert report.ratio == pytest.approx(spacing)


def test_a_better_network_is_used_and_beats_the_spline(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    out, report = isotropic(scan, model=Sharpen())
    plain, other = isotropic(scan, model=Sharpen(strength=-0.35))
    assert report.method == "network"
    assert other.method == "spline"
    assert report.expected is not None
    assert report.expected.db > 0.2
    n = out.array.shape[2]
    reference = truth[:, :, 1 : 1 + n]
    gain = psnr(out.array[:, :, : reference.shape[2]], reference) - psnr(
        plain.array[:, :, : reference.shape[2]], reference
    )
    assert gain > 0.2
    assert "expected gain over cubic interpolation +" in str(report)
    assert "the cubic spline was written" in str(other)
    assert report.uncertainty is not None
    assert report.uncertainty.shape == out.array.shape
    assert other.uncertainty is None


def test_the_spline_passes_through_the_slices(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    out, _ = isotropic(scan, model=Sharpen(strength=-0.35))
    # float32 of about 800
    np.testing.assert_allclose(out.array[:, :, ::3], scan.array, atol=2e-3)


@pytest.mark.parametrize(("how", "share"), [("exact", 0.1), ("object", 1.0), ("off", 1.0)])
def test_consistency(truth: np.ndarray, how: str, share: float) -> None:
    """With "exact", the slice profile applied to the output gives the input slices."""
    truth = truth + 300
    truth[:2] = 0  # air, so that nothing else is as low as the lowest voxel, below which the result has no value
    scan = thick_scan(truth)
    out, report = isotropic(scan, model=Sharpen(strength=0.6), consistency=how)
    job = Stack.of(scan)
    back = job.operator()(torch.from_numpy(out.array.copy()), 2).numpy()
    error = np.sqrt(np.mean((back - scan.array) ** 2)) / np.ptp(scan.array)
    assert report.inconsistency[1] <= share * report.inconsistency[0] + 1e-6
    assert error < (0.002 if how == "exact" else 0.03)
    if how == "object":
        assert report.inconsistency[1] < report.inconsistency[0]
    if how == "off":
        assert report.inconsistency[1] == report.inconsistency[0]


@pytest.mark.parametrize(("gain", "offset"), [(0.001, 0.0), (50.0, 0.0), (1.0, -1000.0)])
def test_intensity_changes_nothing_but_the_units(truth: np.ndarray, gain: float, offset: float) -> None:
    scan = thick_scan(truth)
    plain, _ = isotropic(scan, model=Sharpen(), consistency="off")
    moved, _ = isotropic(
        Volume(scan.array * np.float32(gain) + np.float32(offset), scan.affine), model=Sharpen(), consistency="off"
    )
    wanted = plain.array * gain + offset
    np.testing.assert_allclose(moved.array, wanted, atol=2e-4 * gain * 800 + 1e-6 * abs(offset))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 100.0, -7.0])
def test_a_masked_background_and_the_lowest_value_stay(truth: np.ndarray, offset: float) -> None:
    scan = thick_scan(truth)
    array = scan.array + np.float32(offset)
    array[: SIZE // 3] = offset
    out, report = isotropic(replace(scan, array=array))
    assert report.method == "network"
    assert np.all(out.array[: SIZE // 3 - 2] == offset)
    assert out.array.min() >= array.min()


def test_beyond_the_centre_of_the_last_slice_the_spline_is_constant(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    fine = cubic_spline(scan)
    last = 3 * (scan.array.shape[2] - 1)
    assert fine.shape[2] > last + 1
    for k in range(last + 1, fine.shape[2]):
        assert_close(fine[..., k], fine[..., last])


def test_a_spacing_rounded_by_the_affine_is_that_of_the_training() -> None:
    rng = np.random.default_rng(0)
    array = rng.random((24, 24, 1)) * 50 + np.arange(10) + rng.random((24, 24, 10))
    for angle in np.linspace(0.01, 0.6, 12):
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        for affine in (turn @ np.diag([1, 1, 8, 1.0]), turn[[2, 0, 1, 3]] @ np.diag([0.9375, 0.9375, 7.5, 1])):
            assert Stack.of(Volume(array.astype("f4"), affine)).notes == ()


def test_an_uncertainty_map_of_the_spline_is_not_written(truth: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.nii", thick_scan(truth))
    done = isotropic_file(
        tmp_path / "scan.nii", tmp_path / "out.nii", model=Sharpen(strength=-5), uncertainty=tmp_path / "spread.nii"
    )
    assert done.report.method == "spline"
    assert not (tmp_path / "spread.nii").exists()
    isotropic_file(tmp_path / "scan.nii", tmp_path / "out.nii", model=Sharpen(), uncertainty=tmp_path / "spread.nii")
    assert nibabel.load(tmp_path / "spread.nii").shape == nibabel.load(tmp_path / "out.nii").shape


@pytest.mark.parametrize("isotropically", [False, True])
def test_few_whole_numbers_are_a_caution(truth: np.ndarray, tmp_path: Path, isotropically: bool) -> None:
    scan = thick_scan(truth)
    write_volume(tmp_path / "scan.nii", replace(scan, array=scan.array / scan.array.max()))
    made, model = (isotropic_file, Sharpen()) if isotropically else (partial(upscale_file, ZeroFill(scale=2)), None)
    settings = {"dtype": "int16", **({"model": model} if model else {})}
    with pytest.warns(UserWarning, match="int16 rounds the result to whole numbers: it is coarse"):
        made(tmp_path / "scan.nii", tmp_path / "out.nii", **settings)
    assert "int16 rounds" in (tmp_path / "out.json").read_text()
    assert "WITH WARNINGS" in str(nibabel.load(tmp_path / "out.nii").header["descrip"])


def test_the_order_of_the_voxels_in_memory_changes_nothing(truth: np.ndarray) -> None:
    """Flipped and permuted views of an array, with the affine of the view, are the same scan."""
    scan = thick_scan(truth)
    plain, _ = isotropic(scan, model=Sharpen())
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = SIZE - 1
    flipped, _ = isotropic(Volume(scan.array[::-1, ::-1], scan.affine @ flip), model=Sharpen())
    assert_close(flipped.array[::-1, ::-1], plain.array)
    np.testing.assert_allclose(flipped.affine, plain.affine @ flip, atol=1e-9)
    for order in ((2, 0, 1), (0, 2, 1)):
        axes = np.eye(4)[[*order, 3]].T
        moved, report = isotropic(Volume(scan.array.transpose(order), scan.affine @ axes), model=Sharpen())
        assert report.axis == order.index(2)
        assert_close(moved.array, plain.array.transpose(order))
        np.testing.assert_allclose(moved.affine, plain.affine @ axes, atol=1e-9)
    # from the last slice to the first: the planes between the two have the same positions, in reverse order
    reverse = np.diag([1.0, 1.0, -1.0, 1.0])
    reverse[2, 3] = scan.array.shape[2] - 1
    last_first, _ = isotropic(Volume(scan.array[:, :, ::-1], scan.affine @ reverse), model=Sharpen(), consistency="off")
    plain, _ = isotropic(scan, model=Sharpen(), consistency="off")
    inside = 3 * (scan.array.shape[2] - 1) + 1
    assert_close(last_first.array[:, :, inside - 1 :: -1][:, :, 6:-6], plain.array[:, :, :inside][:, :, 6:-6])


def test_a_voxel_below_zero_leaves_the_rest_above_it(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    marked = replace(scan, array=scan.array.copy())
    marked.array[5, 6, 4] = -20 * scan.array.max()
    plain, out = (isotropic(one, model=Sharpen())[0].array for one in (scan, marked))
    assert plain.min() >= 0
    away = np.ones(out.shape, bool)
    away[1:10, 2:11, 8:17] = False
    assert out[away].min() >= 0
    assert out.min() >= marked.array.min()


def test_the_state_of_the_caller_changes_nothing(truth: np.ndarray, tmp_path: Path) -> None:
    """Another default device or dtype, autocast and inference mode."""
    scan, network = thick_scan(truth), Sharpen()
    write_volume(tmp_path / "scan.nii.gz", scan)

    def results() -> list[Any]:
        sharp, zero = isotropic(scan, model=network)[0].array, ZeroFill(scale=2)
        row = evaluate(zero, [tmp_path / "scan.nii.gz"], most=1)[0]
        return [sharp, upscale(zero, scan).array, np.array([row["psnr"], psnr(sharp, 1.1 * sharp)])]

    plain = results()
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        in_another_state = results()
    with pytest.raises(TypeError, match="weights have no values"):
        isotropic(scan, model=Sharpen().to("meta"))
    for got, wanted in zip(in_another_state, plain, strict=True):
        assert_close(got, wanted)


def test_adaptation_learns_and_repeats(truth: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "RATE", 0.2)
    scan, weak = thick_scan(truth), Sharpen(strength=0.0)
    first, a = isotropic(scan, model=weak, adapt="8 steps", seed=4)
    second, b = isotropic(scan, model=weak, adapt="8 steps", seed=4)
    assert a.adapted == 8
    assert a.expected is not None
    assert a.expected.db > 0.2
    assert weak.strength.item() == 0  # adaptation leaves the given network unchanged
    assert a.expected == b.expected
    np.testing.assert_array_equal(first.array, second.array)
    timed, c = isotropic(scan, model=weak, adapt=0.0005)
    assert c.adapted >= 1 or c.method == "spline"
    assert timed.array.shape == first.array.shape


def test_a_network_that_adaptation_spoils_is_left_out(truth: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "RATE", 3e4)
    _, report = isotropic(thick_scan(truth), model=Sharpen(), adapt="2 steps")
    assert report.method == "network"
    assert report.adapted == 0


def test_nibabel_and_path(truth: np.ndarray, tmp_path: Path) -> None:
    scan = thick_scan(truth)
    path = tmp_path / "scan.nii.gz"
    write_volume(path, scan)
    image = nibabel.load(path)
    out, _ = isotropic(image, model=Sharpen())
    assert isinstance(out, type(image))
    read, _ = isotropic(path, model=Sharpen())
    np.testing.assert_allclose(np.asarray(out.dataobj), read.array, atol=1e-3)


def test_to_another_voxel_size(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    out, report = isotropic(scan, model=Sharpen(), to=1.5)
    assert out.array.shape == (32, 32, 32)
    assert out.spacing == pytest.approx((1.5, 1.5, 1.5))
    assert_close(out.affine[:3, 3], scan.affine[:3, 3])
    assert report.to == 1.5
    finer, _ = isotropic(scan, model=Sharpen(), to=0.75)
    assert finer.spacing == pytest.approx((0.75, 0.75, 0.75))


def test_resampling_through_k_space_keeps_a_wave() -> None:
    x = np.repeat(np.sin(2 * np.pi * 3 * np.arange(24) / 24)[None, None].astype(np.float32) - 2, 6, 1)
    finer = resampled(x, (6, 36))
    np.testing.assert_allclose(finer[0, 0], np.sin(2 * np.pi * 3 * np.arange(36) / 36) - 2, atol=1e-5)
    np.testing.assert_allclose(resampled(finer, (6, 24)), x, atol=1e-5)


@pytest.mark.parametrize("m", [20, 48])
def test_resampling_continues_a_cut_field_of_view(m: int) -> None:
    """A window of a large image: an image that is bright at one edge stays dark at the opposite one."""
    wave = 1 + np.cos(2 * np.pi * np.arange(32) / 77)
    x = np.outer(wave, wave).astype(np.float32)[None]
    at = np.arange(m) * 32 / m
    wanted = np.outer(1 + np.cos(2 * np.pi * at / 77), 1 + np.cos(2 * np.pi * at / 77))
    inside = at <= 31
    np.testing.assert_allclose(resampled(x, (m, m))[0][inside][:, inside], wanted[inside][:, inside], atol=0.04)


def test_interpolated_slices_are_taken_at_what_they_resolve(truth: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    grain = truth + 40 * rng.standard_normal(truth.shape).astype(np.float32)  # white noise fills k-space to its border
    scan = thick_scan(grain, spacing=4.0)
    array = np.moveaxis(resampled(np.moveaxis(scan.array, 2, 0), (96, 96)), 0, 2)
    fine = Volume(array, scan.affine @ np.diag([0.5, 0.5, 1, 1]))
    with pytest.warns(UserWarning, match="interpolated by the scanner"):
        result, report = isotropic(fine, model=Sharpen())
    assert report.to == pytest.approx(1.0, rel=0.06)
    assert "interpolated by the scanner" in report.notes[0]
    assert report.notes == report.warned == result.notes
    assert "WITH WARNINGS" in derivation(report)
    _, asked = isotropic(fine, model=Sharpen(), to=0.5)
    assert asked.to == 0.5
    coarse = replace(fine, affine=fine.affine @ np.diag([1, 1, 0.3, 1]))
    with pytest.raises(
        VolumeError, match=r"1.2 mm apart, and a slice resolves no more than that: .*\(--to MM\) asks for smaller"
    ) as no:
        isotropic(coarse, model=Sharpen())
    assert not isinstance(no.value, NothingToDo)  # a folder run lists it as failed
    _, asked = isotropic(coarse, model=Sharpen(), to=0.5)
    assert asked.to == 0.5


def test_thickness_profile_and_gap(truth: np.ndarray, tmp_path: Path) -> None:
    scan = thick_scan(truth)
    assert Stack.of(scan).thickness_from.startswith("the spacing")
    assert Stack.of(scan, thickness=2.4).profile.width() == 2.4
    assert Stack.of(scan, thickness=2.4, profile="boxcar").in_rows == SliceProfile("boxcar", 2.4)
    path = tmp_path / "profile.txt"
    path.write_text("-2 0\n0 1\n2 0\n")
    assert Stack.of(scan, profile=path).profile.width() == pytest.approx(2.0, abs=0.01)
    made = Stack.of(scan, profile=SliceProfile("boxcar", 2.5))
    assert made.profile.width() == 2.5
    assert made.thickness_from == Stack.of(scan, profile=path).thickness_from == "the width of the profile"
    for own in (path, made.profile):
        with pytest.raises(InvalidArgument, match="give one of the two"):
            Stack.of(scan, profile=own, thickness=3.0)
    with pytest.raises(SliceProfileError, match="gaussian or boxcar"):
        Stack.of(scan, profile="sinc")
    with pytest.raises(InvalidArgument, match="do not fit"):
        Stack.of(scan, thickness=40)


def sheared(scan: Volume) -> Volume:
    affine = scan.affine.copy()
    affine[1, 2] = 0.8
    return Volume(scan.array, affine)


def doubled(scan: Volume) -> Volume:
    array = scan.array.copy()
    array[:, :, 7] = array[:, :, 6]
    return Volume(array, scan.affine)


def missing(scan: Volume) -> Volume:
    array = scan.array.copy()
    array[:, :, 7] = 0
    return Volume(array, scan.affine)


def noise(scan: Volume, first: int = 7, last: int = 7) -> Volume:
    """Slices of Rayleigh noise, as a scanner stores for a slice without signal."""
    array = scan.array.copy()
    rng = np.random.default_rng(1)
    array[:, :, first : last + 1] = rng.rayleigh(20, (*array.shape[:2], last + 1 - first))
    return Volume(array, scan.affine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sheared, "sheared"),
        (doubled, "slices 6 and 7"),
        (missing, "slice 7 .* missing"),
        (noise, "slice 7 .* missing"),
        (lambda scan: noise(scan, 5, 7), "slice 5 .* missing"),
        (lambda scan: Volume(scan.array[:, :, :7], scan.affine), "7 slices"),
        (lambda scan: Volume(scan.array, np.diag([1, 1, 1.2, 1])), "isotropic already"),
        (lambda scan: Volume(np.where(scan.array > 0, scan.array, np.nan), scan.affine), "NaN"),
        (lambda scan: nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), "3-D"),
        (lambda scan: scan.array, "no voxel spacing|have no"),
    ],
)
def test_what_is_refused(truth: np.ndarray, change: object, words: str) -> None:
    with pytest.raises(VolumeError, match=words) as caught:
        isotropic(change(thick_scan(truth)), model=Sharpen())  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_noise_outside_the_anatomy_is_no_missing_slice(truth: np.ndarray) -> None:
    """At an end of the stack nothing is missing: two slices of noise in front of the head."""
    scan = thick_scan(truth)
    assert len(Stack.of(noise(scan, 0, 1)).slices) == scan.array.shape[2]


def test_arguments_out_of_range(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    with pytest.raises(InvalidArgument, match="scale 1"):
        isotropic(scan, model=MODELS["BSpline"](scale=2))
    with pytest.raises(InvalidArgument, match="mm"):
        isotropic(scan, model=Sharpen(), to=-1)
    with pytest.raises(ValueError, match="consistency"):
        isotropic(scan, model=Sharpen(), consistency="always")
    with pytest.raises(InvalidArgument, match="seed is -1"):
        isotropic(scan, model=Sharpen(), seed=-1)
    with pytest.raises(InvalidArgument, match=r"0\.25 mm or more"):  # smaller voxels could fill the memory
        isotropic(scan, model=Sharpen(), to=0.01)
    for name, value in (("to", "1"), ("profile", 3), ("device", "nope"), ("thickness", "4")):
        with pytest.raises(DeformMambaError, match=name) as caught:
            isotropic(scan, **{"model": Sharpen(), name: value})
        assert "\n" not in str(caught.value)
    _, report = isotropic(scan, model=Sharpen(), to=np.float32(1.0), seed=np.int64(3))  # numbers of numpy are numbers
    json.dumps(report.facts())
    for wrong in ("three", -1, "2.5 steps", "5 hours", float("nan")):
        with pytest.raises(InvalidArgument, match="minutes"):
            parse_adapt(wrong)
    assert parse_adapt("2.5") == (2.5, None)
    assert parse_adapt("40 steps") == (0.0, 40)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adapt", "five"),
        ("seed", -1),
        ("consistency", "always"),
        ("profile", "sinc"),
        ("thickness", -2.0),
        ("thickness", 0),
        ("to", 0),
    ],
)
def test_a_folder_is_not_begun_with_wrong_settings(tmp_path: Path, setting: str, value: object) -> None:
    with pytest.raises(DeformMambaError, match=setting):
        isotropic_cohort(tmp_path, tmp_path / "out", model=Sharpen(), **{setting: value})
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_begun_with_two_thicknesses(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="give one of the two"):
        isotropic_cohort(tmp_path, tmp_path / "out", model=Sharpen(), profile=SliceProfile("boxcar", 2.5), thickness=3)


def test_a_folder_is_read_as_requested_and_gets_no_empty_folders(truth: np.ndarray, tmp_path: Path) -> None:
    scan = thick_scan(truth)
    for name, volume in (
        ("sub-01/anat/sub-01_T2w", Volume(np.where(truth > 0, truth, np.nan)[:, :, ::3], scan.affine)),
        ("sub-02/anat/sub-02_T2w", Volume(truth, np.eye(4))),
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), tmp_path / "in" / f"{name}.nii")
    made = isotropic_cohort(tmp_path / "in", tmp_path / "out", model=Sharpen())
    assert [outcome.status for outcome in made] == ["failed", "ignored"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["desc-iso_summary.csv"]
    with pytest.warns(UserWarning, match="NaN"):
        made = isotropic_cohort(tmp_path / "in", tmp_path / "out", model=Sharpen(), nan="zero")
    assert [outcome.status for outcome in made] == ["made", "ignored"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["desc-iso_summary.csv", "sub-01"]


def test_no_voxel_size_makes_thin_slices_thick(truth: np.ndarray) -> None:
    with pytest.raises(VolumeError, match="isotropic already"):
        isotropic(Volume(truth, np.eye(4)), model=Sharpen(), to=0.5)


def test_ratios_beyond_the_training_are_named(truth: np.ndarray) -> None:
    assert not Stack.of(thick_scan(truth, spacing=3.0)).notes
    assert "trained for 2 to 8" in Stack.of(thick_scan(truth, spacing=3.0), to=0.3).notes[0]
    assert "trained for 2 to 8" in Stack.of(thick_scan(truth, spacing=3.0), to=2.0).notes[0]


def test_upscale_refuses_weights_for_the_slice_direction(truth: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    write_volume(path, thick_scan(truth))
    with pytest.raises(InvalidArgument, match="deformmamba isotropic"):
        upscale_file("thick", path, tmp_path / "out.nii.gz")
    with pytest.raises(InvalidArgument, match="deformmamba isotropic"):
        upscale("thick", read_volume(path))


def test_slices_too_small_to_compare_on(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    _, report = isotropic(Volume(scan.array[18:26, 18:26], scan.affine), model=Sharpen())
    assert report.expected is None
    assert "not measured" in str(report)


def test_noise_is_that_of_flat_tissue() -> None:
    generator = torch.Generator().manual_seed(0)
    slices = 0.5 + 0.02 * torch.randn(8, 128, 128, generator=generator)
    slices[:, 64:] += 0.3 * torch.sign(torch.randn(8, 64, 128, generator=generator))  # texture
    # the 5th percentile over blocks of 64 detail coefficients is two standard errors, i.e. a fifth, below the mean
    assert noise_level(slices) == pytest.approx(0.02, rel=0.25)


def test_scale_one_is_one_of_the_zoo() -> None:
    """The skip of a network at scale 1 is the input itself, so an untrained network changes nothing."""
    network = DeformMambaSR.from_preset("tiny", scale=1, dims=[16, 24], depths=[1, 1]).eval()
    image = torch.rand(1, 1, 21, 30)
    with torch.inference_mode():
        assert torch.equal(network(image), image)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small network with random last weights, saved."""
    torch.manual_seed(0)
    network = DeformMambaSR.from_preset("tiny", scale=1, dims=[16, 24], depths=[1, 1])
    torch.nn.init.normal_(network.project.weight, std=1e-3)
    path = tmp_path / "small.safetensors"
    network.save_pretrained(path)
    return path


@pytest.mark.slow
def test_files_command_and_folder(
    truth: np.ndarray, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scans" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    source = folder / "sub-01_T2w.nii.gz"
    write_volume(source, thick_scan(truth))
    out, figure, page = (tmp_path / name for name in ("iso.nii.gz", "look.png", "page.html"))
    spread = tmp_path / "spread.nii.gz"
    given = ["isotropic", str(source), "-o", str(out), "--model", str(weights), "--adapt", "3 steps"]
    assert main([*given, "--figure", str(figure), "--report", str(page), "--uncertainty", str(spread)]) == 0
    said = capsys.readouterr().out
    assert "over cubic interpolation" in said
    assert "48 x 48 x 48 voxels of 1 x 1 x 1 mm" in said
    image = nibabel.load(out)
    assert image.shape == (48, 48, 48)
    assert f"{spread}: not written, because the spline is the result" in said
    assert not spread.exists()
    np.testing.assert_allclose(image.affine[:3, 3], thick_scan(truth).affine[:3, 3], atol=1e-5)
    assert figure.stat().st_size > 10_000
    assert "over cubic interpolation" in page.read_text("utf-8")

    made = isotropic_cohort(tmp_path / "scans", tmp_path / "out", model=weights)
    assert [outcome.status for outcome in made] == ["made"]
    assert made[0].output == "sub-01/anat/sub-01_desc-iso_T2w.nii.gz"
    sidecar = json.loads((tmp_path / "out/sub-01/anat/sub-01_desc-iso_T2w.json").read_text("utf-8"))
    assert sidecar["Isotropic"]["ratio"] == pytest.approx(3)
    write_volume(folder / "sub-01_T1w.nii.gz", Volume(truth, np.eye(4)))
    again = isotropic_cohort(tmp_path / "scans", tmp_path / "out", model=weights)
    assert {o.source[-11:-7]: o.status for o in again} == {"_T2w": "skipped", "_T1w": "ignored"}
    assert "isotropic already" in next(o.reason for o in again if o.status == "ignored")


def test_a_mask_is_no_scan(
    truth: np.ndarray, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "sub-01_desc-brain_mask.nii.gz", tmp_path / "iso.nii.gz"
    nibabel.save(nibabel.Nifti1Image((thick_scan(truth).array > 400).astype(np.uint8), np.diag([1, 1, 3, 1])), source)
    given = ["isotropic", str(source), "-o", str(out), "--model", str(weights)]
    assert main(given) == 2
    assert "mask" in (told := capsys.readouterr().err)
    assert "--as-image" in told
    assert not out.exists()
    assert main([*given, "--as-image"]) == 0


def test_a_wrong_input_is_one_line_and_leaves_nothing(
    truth: np.ndarray, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "thin.nii.gz", tmp_path / "iso.nii.gz"
    write_volume(source, Volume(truth, np.eye(4)))
    assert main(["isotropic", str(source), "-o", str(out), "--model", str(weights)]) == 2
    assert "isotropic already" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(VolumeError, match="input file"):
        isotropic_file(source, source, model=weights)
    assert read_volume(source).array.shape == truth.shape


@pytest.mark.parametrize(("times", "to"), [(5, 1.0), (20, 1.0), (20, 1.5)])
def test_a_marker_changes_only_what_is_near_it(truth: np.ndarray, times: int, to: float) -> None:
    scan = thick_scan(truth)
    marked = scan.array.copy()
    place = (slice(10, 30), 24, 7)
    marked[place] = times * scan.array.max()
    (clean, said), (with_marker, report) = (
        isotropic(Volume(array, scan.affine), model=Sharpen(), to=to) for array in (scan.array, marked)
    )
    near = np.zeros(clean.array.shape, bool)
    near[int(8 / to) : int(32 / to), int(22 / to) : int(27 / to), int(15 / to) : int(28 / to)] = True
    change = np.abs(with_marker.array - clean.array)[~near]
    assert change.max() < 0.02 * scan.array.max()
    share = 1 if to == 1 else 0.6  # of a line of one pixel in the average over a coarser one
    assert with_marker.array[round(20 / to), round(24 / to), round(21 / to)] == pytest.approx(
        share * times * scan.array.max(), rel=0.05
    )
    assert report.expected is not None
    assert said.expected is not None
    assert report.expected.db == pytest.approx(said.expected.db, abs=0.05)
    assert not any("outliers" in remark for remark in said.remarks)
    assert "outliers, such as a marker, that were interpolated linearly: 20 voxels" in report.remarks


def test_distrust_is_stated_wherever_the_result_is_seen(truth: np.ndarray, tmp_path: Path) -> None:
    model = Sharpen()
    model.provenance = {"spacings_mm": [0.67, 1.25], "recipe": {"data": {"kind": "thick", "ratio": [5.0, 8.0]}}}
    fine = thick_scan(truth)
    far = replace(fine, affine=np.diag([0.25, 0.25, 0.75, 1.0]))
    write_volume(tmp_path / "far.nii.gz", far)
    with pytest.warns(UserWarning, match="may be worse than reported") as warned:
        done = isotropic_file(
            tmp_path / "far.nii.gz", tmp_path / "iso.nii.gz", model=model, report=tmp_path / "report.html"
        )
    worse = ": the result may be worse than reported"
    said = (
        f"the voxels of the result are 0.25 mm, the weights were trained on 0.67 to 1.25 mm{worse}",
        f"the slices are 3 voxels of the result apart, the weights were trained on 5 to 8{worse}",
    )
    assert done.report.cautions == said
    assert tuple(str(one.message) for one in warned) == said
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(text in page for text in said)
    beside = json.loads((tmp_path / "iso.json").read_text("utf-8"))
    assert tuple(beside["Warnings"]) == said
    assert beside["GeneratedBy"][0]["Name"] == "deformmamba"
    assert beside["Sources"] == ["far.nii.gz"]
    assert beside["Isotropic"]["method"] == "network"
    header = nibabel.load(tmp_path / "iso.nii.gz").header
    assert b"UNLIKE TRAINING DATA" in header["descrip"].item()
    # a scan like the training data: no warning (warnings are errors), and no such statement
    model.provenance = {"spacings_mm": [0.67, 1.25], "recipe": {"data": {"kind": "thick", "ratio": [2.0, 8.0]}}}
    write_volume(tmp_path / "near.nii.gz", fine)
    isotropic_file(tmp_path / "near.nii.gz", tmp_path / "other.nii.gz", model=model)
    assert "Warnings" not in json.loads((tmp_path / "other.json").read_text("utf-8"))
    # a file of another origin beside the output stays
    (tmp_path / "other.json").write_text('{"EchoTime": 0.1}')
    with pytest.warns(UserWarning, match="is of another origin and stays"):
        isotropic_file(tmp_path / "near.nii.gz", tmp_path / "other.nii.gz", model=model)
    assert (tmp_path / "other.json").read_text() == '{"EchoTime": 0.1}'


def test_a_large_marker_in_one_slice_is_no_missing_slice(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    marked = scan.array.copy()
    marked[20:24, 20:24, 7] = 32767
    out, report = isotropic(Volume(marked, scan.affine), model=Sharpen(), to=1.0)
    assert out.array.max() > 30000
    assert any("outliers" in remark for remark in report.remarks)


def test_a_magnitude_stays_one(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    noise = np.random.default_rng(0).rayleigh(9, scan.array.shape).astype(np.float32)
    for gain in np.linspace(0.1, 3, 12, dtype=np.float32):
        out, _ = isotropic(Volume(gain * (scan.array + noise), scan.affine), model=Sharpen(strength=3), to=1.0)
        assert out.array.min() >= 0


def test_a_magnitude_stays_one_beside_a_huge_marker(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    noise = np.random.default_rng(0).rayleigh(9, scan.array.shape).astype(np.float32)
    for value in np.linspace(1e5, 1e7, 12, dtype=np.float32):
        marked = scan.array + noise
        marked[4:6, 4:7] = value
        out, _ = isotropic(Volume(marked, scan.affine), model=Sharpen(strength=3), to=1.0)
        assert out.array.min() >= 0


def test_phase_is_announced_and_a_skipped_adaptation_too(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    phase = np.random.default_rng(0).uniform(-np.pi, np.pi, scan.array.shape).astype(np.float32)
    phase += np.linspace(0, 0.01, phase.shape[2], dtype=np.float32)
    smooth = scan.array[20:29, 20:29]
    with pytest.warns(UserWarning, match="those of a phase image"):
        _, report = isotropic(Volume(phase, scan.affine), model=Sharpen(), to=1.0)
    assert "phase image" in report.cautions[0]
    with pytest.warns(UserWarning, match="there was no adaptation"):
        _, report = isotropic(Volume(smooth, scan.affine), model=Sharpen(), to=1.0, adapt="5 steps")
    assert report.adapted == 0
    assert any(note.startswith("there was no adaptation") for note in report.notes)


def test_a_folder_refuses_settings_that_do_not_exist(tmp_path: Path) -> None:
    for name, meant in (("thicknes", "did you mean 'thickness'"), ("report", "there is no setting 'report'")):
        with pytest.raises(TypeError, match=meant):
            isotropic_cohort(tmp_path, tmp_path / "out", model=Sharpen(), **{name: "x"})
    assert not (tmp_path / "out").exists()


def test_the_input_of_the_report_has_its_marker(truth: np.ndarray) -> None:
    scan = thick_scan(truth)
    scan.array[20, 24, 7] = 30 * scan.array.max()
    out, _ = isotropic(scan, model=Sharpen(), to=1.0)
    assert in_plane_as(out, scan, {"to": 1.0}).array[20, 24, 7] == pytest.approx(scan.array[20, 24, 7], rel=1e-5)
