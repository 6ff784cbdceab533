"""`upscale` with a model for any intensity: the same image in other units gives the same result in those units."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deformmamba import read_volume, upscale, upscale_with_uncertainty, write_volume
from deformmamba.cli import main
from deformmamba.export.whole_slice import WholeSlice
from deformmamba.models import DeformMambaSR, ZeroFill, from_pretrained
from deformmamba.physics.kspace import degrade
from deformmamba.physics.phantom import head
from deformmamba.volume import Volume

SHIFTS = [(0.03, 0.0), (50.0, 0.0), (1.0, 2000.0), (1.0, -0.3)]
# by offset, for results of about [0, 1]: float32 stores an offset of 2000 to 1e-4, and a few layers amplify this error
ROUNDING = {0.0: 2e-5, 2000.0: 2e-3, -0.3: 2e-5}


@pytest.fixture(scope="module")
def model() -> DeformMambaSR:
    torch.manual_seed(0)
    made = DeformMambaSR(scale=2, dims=[8], depths=[1], stem_channels=4, d_state=4, skip="zero-fill-edges",
                         normalise="slice")  # fmt: skip
    torch.nn.init.normal_(made.project.weight, std=0.3)
    made.provenance = {"consistency": "object"}
    return made.eval()


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:26, :24]
    head = np.hypot(y - 13, x - 12) < 9
    image = np.abs(0.01 * rng.standard_normal((26, 24, 3))) + head[..., None] * rng.uniform(0.3, 1, (26, 24, 3))
    return image.astype(np.float32)


@pytest.mark.parametrize(("gain", "offset"), SHIFTS)
@pytest.mark.parametrize("settings", [{}, {"tile": 16}, {"ensemble": True}, {"consistency": "exact"}], ids=str)
@pytest.mark.filterwarnings("ignore:the scan does not look like a magnitude image")
def test_units_pass_through(
    model: DeformMambaSR, array: np.ndarray, gain: float, offset: float, settings: dict[str, object]
) -> None:
    wanted = upscale(model, array, **settings)
    got = (upscale(model, array * np.float32(gain) + np.float32(offset), **settings) - offset) / gain
    np.testing.assert_allclose(got, wanted, rtol=0, atol=ROUNDING[offset])


def test_units_pass_through_the_command_line(model: DeformMambaSR, array: np.ndarray, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m.safetensors")
    results = []
    for name, gain, offset in (("a", 1.0, 0.0), ("b", 40.0, 500.0)):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(gain * array + offset, np.eye(4)))
        out = str(tmp_path / f"{name}-sr.nii.gz")
        assert (
            main(["upscale", str(tmp_path / f"{name}.nii.gz"), "-o", out, "--model", str(tmp_path / "m.safetensors")])
            == 0
        )
        results.append((read_volume(out).array - offset) / gain)
    np.testing.assert_allclose(
        results[1], results[0], rtol=0, atol=1e-4
    )  # float32 with an offset of 12 times the range


@pytest.mark.parametrize("settings", [{}, {"tile": 16}, {"ensemble": True}], ids=str)
def test_a_masked_background_stays_zero(model: DeformMambaSR, array: np.ndarray, settings: dict[str, object]) -> None:
    masked = array.copy()
    masked[:8] = masked[:, 17:] = 0
    sharp = upscale(model, masked, **settings)
    assert not sharp[: 2 * 6].any(), "at least two LR pixels from the nearest value"
    assert not sharp[:, 2 * 19 :].any()
    assert sharp[2 * 8 : 2 * 14, 2 * 8 : 2 * 14].any()
    if "ensemble" in settings:
        assert not upscale_with_uncertainty(model, masked)[1][: 2 * 6].any()


def test_nothing_comes_out_below_the_lowest_value(model: DeformMambaSR, array: np.ndarray) -> None:
    assert upscale(model, array).min() >= array.min() - 1e-6


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda a: -a, "negative"),
        (lambda a: np.where(a > 0.2, a - 0.6, 0).astype(np.float32), "negative"),
        (lambda a: np.random.default_rng(0).uniform(-np.pi, np.pi, a.shape).astype(np.float32), "phase"),
        (lambda a: np.random.default_rng(0).integers(0, 4096, a.shape).astype(np.int16), "phase"),
    ],
    ids=["negated", "t-map", "phase in radians", "phase in 12 bits"],
)
def test_images_without_magnitudes_are_named(model: DeformMambaSR, array: np.ndarray, made: object, match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        upscale(model, made(array))  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ixi-4x", "spine-4x"])
@pytest.mark.filterwarnings("ignore:the scan does not look like a magnitude image")
def test_published_weights_take_each_slice_in_any_units(name: str, tmp_path: Path) -> None:
    """Python, tiles, self-ensemble, command line and exported module differ by at most 1 % of the network's gain."""
    model = from_pretrained(name)
    lr = degrade(torch.from_numpy(np.stack([900 * head(128, seed) for seed in range(2)])).float(), 4)
    window = lr[:, 4:28, 6:30].contiguous()  # tissue at its edges
    gains, offsets = torch.tensor([0.03, 20.0])[:, None, None], torch.tensor([-1500.0, 2000.0])[:, None, None]

    def by_command(scan: torch.Tensor) -> torch.Tensor:
        write_volume(tmp_path / "lr.nii.gz", Volume(np.moveaxis(scan.numpy(), 0, 2), np.diag([4, 4, 4, 1])))
        out = str(tmp_path / "sr.nii.gz")
        assert main(["upscale", str(tmp_path / "lr.nii.gz"), "-o", out, "--model", name, "--axis", "2"]) == 0
        return torch.from_numpy(np.moveaxis(read_volume(out).array, 2, 0).copy())

    def exported(scan: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return WholeSlice(model, model.consistency).eval()(scan[:, None], torch.zeros(3))[:, 0]

    ways = {
        "Python": lambda scan: upscale(model, scan, axis=0),
        "tiles": lambda scan: upscale(model, scan, axis=0, tile=24),
        "self-ensemble": lambda scan: upscale(model, scan, axis=0, ensemble=True),
        "command": by_command,
        "export": exported,
    }
    for scan in (lr, window):
        base = upscale(ZeroFill(scale=4), scan, axis=0)
        for way, run in ways.items():
            wanted = run(scan)
            got = (run(gains * scan + offsets) - offsets) / gains
            assert (got - wanted).square().mean() < (0.01**2) * (wanted - base).square().mean(), way


@pytest.mark.parametrize("settings", [{}, {"tile": 16}, {"ensemble": True}, {"export": True}], ids=str)
def test_an_outlier_below_the_slice_changes_only_its_surroundings(array: np.ndarray, settings: dict[str, bool]) -> None:
    """Neither the floor of the other pixels nor data consistency follows it, and nothing is below its value."""
    torch.manual_seed(0)
    model = DeformMambaSR(scale=2, dims=[8], depths=[1], d_state=4, skip="zero-fill-robust", normalise="slice").eval()
    marked = array[..., :1].copy()
    marked[4, 5] = -9
    whole = WholeSlice(model, "object")

    def run(scan: np.ndarray) -> np.ndarray:
        if "export" in settings:
            with torch.no_grad():
                return whole(torch.from_numpy(scan.copy())[None, None, ..., 0], torch.zeros(3))[0, 0].numpy()
        return upscale(model, scan, axis=2, consistency="object", **settings)[..., 0]

    clean, out = run(array[..., :1]), run(marked)
    elsewhere = np.ones(out.shape, bool)
    elsewhere[:20, :22] = False
    assert out.min() >= -9
    assert out[elsewhere].min() >= array[..., 0].min()
    # the interpolated pixel differs from the one that it hides, and zero-filling spreads the difference
    np.testing.assert_allclose(out[elsewhere], clean[elsewhere], rtol=0, atol=0.01)


@pytest.mark.parametrize("settings", [{}, {"tile": 16}, {"export": True}], ids=str)
@pytest.mark.parametrize("depth", [0.2, 0.5, 0.9])
def test_one_dark_pixel_does_not_turn_air_into_signal(
    array: np.ndarray, depth: float, settings: dict[str, bool]
) -> None:
    """It is no outlier yet, but the lowest value of the slice."""
    torch.manual_seed(0)
    model = DeformMambaSR(scale=2, dims=[8], depths=[1], d_state=4, skip="zero-fill-robust", normalise="slice").eval()
    torch.nn.init.normal_(model.project.weight, std=0.01)
    marked = array[..., :1].copy()
    marked[13, 12] -= marked[13, 12] + depth
    results = []
    for scan in (array[..., :1], marked):
        for consistency in ("object", "off"):
            if "export" in settings:
                with torch.no_grad():
                    given = torch.from_numpy(scan.copy())[None, None, ..., 0]
                    made = WholeSlice(model, consistency)(given, torch.zeros(3))[0, 0].numpy()
            else:
                made = upscale(model, scan, axis=2, consistency=consistency, **settings)[..., 0]
            results.append(made)
    corner = np.s_[:6, :6]  # air, far from tissue
    np.testing.assert_array_less(0, np.abs(results[0] - results[1]).max())
    np.testing.assert_allclose(results[0][corner], results[1][corner], rtol=0, atol=1e-6)
    np.testing.assert_allclose(results[2][corner], results[3][corner], rtol=0, atol=1e-6)


def marked_slice() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slice, the same with a bright marker on a diagonal, and the HR pixels at a distance from it (scale 2)."""
    clean = np.asarray(degrade(torch.from_numpy(head(128, 3)).float()[None], 2)[0])
    marked, far = clean.copy(), np.ones((128, 128), bool)
    for k in range(20, 36):
        marked[k, k] = 20
        far[2 * k - 12 : 2 * k + 13, 2 * k - 12 : 2 * k + 13] = False
    return clean, marked, far


@pytest.mark.parametrize("consistency", ["object", "exact"])
@pytest.mark.parametrize("exported", [False, True])
def test_a_marker_does_not_ring_in_data_consistency(consistency: str, exported: bool) -> None:
    model = DeformMambaSR(scale=2, dims=[8], depths=[1], d_state=4, skip="zero-fill-robust", normalise="slice").eval()
    clean, marked, far = marked_slice()

    def run(scan: np.ndarray) -> np.ndarray:
        if exported:
            with torch.no_grad():
                return WholeSlice(model, consistency)(torch.from_numpy(scan)[None, None], torch.zeros(3))[0, 0].numpy()
        return upscale(model, scan[..., None], axis=2, consistency=consistency)[..., 0]

    assert far.sum() > 500
    assert np.abs(run(marked) - run(clean))[far].max() < 0.05


def test_a_range_that_float32_hardly_resolves_gives_a_warning(model: DeformMambaSR, array: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"float32 has steps of 0\.062: subtract an offset first"):
        upscale(model, array.astype(np.float64) + 1e6, axis=2)


def test_a_few_voxels_of_padding_hide_neither_phase_nor_coarse_steps(model: DeformMambaSR) -> None:
    rng = np.random.default_rng(0)
    phase = rng.uniform(0, 4095, (26, 24, 3)).astype(np.float32)
    phase[0, 0, 0] = -8192
    with pytest.warns(UserWarning, match="those of a phase image"):
        upscale(model, phase)
    coarse = rng.uniform(1e8, 1e8 + 100, (26, 24, 3)).astype(np.float32)
    coarse[0, 0, 0] = 0
    with pytest.warns(UserWarning, match="where float32 has steps of 8"):
        upscale(model, coarse)
