"""`upscale` with a model for any intensity: the same image in other units gives the same result in those units."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deformmamba import read_volume, upscale, write_volume
from deformmamba.cli import main
from deformmamba.models import DeformMambaSR
from deformmamba.volume import Volume

SHIFTS = [(0.03, 0.0), (50.0, 0.0), (1.0, 2000.0), (1.0, -0.3)]
# of a result of about [0, 1]: float32 holds an offset of 2000 to 1e-4, and rounding is amplified by a few layers
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
