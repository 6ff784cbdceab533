"""Recipes of the kind "thick": a run from data to checkpoint, and recipes that are refused before the run starts."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deformmamba.data.scans import find_scans
from deformmamba.models import from_pretrained
from deformmamba.training import from_recipe, train_recipe
from deformmamba.training.recipe import load_recipe
from deformmamba.volume import Volume, write_volume

RECIPE = """
[model]
dims = [16]
depths = [1]
d_state = 4
stem_channels = 4
skip = "zero-fill"
scale = 1

[data]
kind = "thick"
patch = 16
ratio = [2.0, 4.0]

[fit]
steps = 2
batch = 2
loss = "l1"
every = 2
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One training and one validation subject of 24 x 24 x 6 voxels."""
    rows = ["participant_id\tfile\tsplit"]
    for number, split in enumerate(("train", "val")):
        array = 100 + 50 * np.random.default_rng(number).random((24, 24, 6), np.float32)
        write_volume(tmp_path / f"sub-{number}.nii.gz", Volume(array, np.diag([0.8, 0.8, 4, 1])))
        rows.append(f"sub-{number}\tsub-{number}.nii.gz\t{split}")
    (tmp_path / "volumes.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.slow
def test_a_run(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE)
    best = train_recipe(recipe, data, tmp_path / "run", progress=False)
    model = from_pretrained(best)
    assert model.scale == 1
    assert model.provenance["degradation"] == "slice profiles, ratio 2-4"
    assert model.provenance["spacings_mm"] == [0.8, 0.8]
    # the last convolution is initialised with 0, so after two steps the network is still close to the spline
    scores = model.provenance["validation"]
    assert scores["psnr"] == pytest.approx(scores["psnr_spline"], abs=2.0)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('kind = "thick"', 'kind = "thin"', "'thin'.*'in-plane' or 'thick'"),
        ("scale = 1", "scale = 2", "scale = 1"),
        ("steps = 2", "epochs = 2", "steps"),
        ("patch = 16", "patch = 16\nlesions = 0.5", "lesions"),
    ],
)
def test_what_is_refused(data: Path, tmp_path: Path, before: str, after: str, words: str) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE.replace(before, after))
    with pytest.raises(ValueError, match=words):
        train_recipe(recipe, data, tmp_path / "run", progress=False)


def test_validation_images_move_to_the_device_of_the_model_and_results_back(data: Path) -> None:
    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, lr: torch.Tensor) -> SimpleNamespace:
            assert lr.device == self.device
            return SimpleNamespace(cpu=lambda: torch.zeros(lr.shape))

    scores = from_recipe._thick_scores([scan for scan in find_scans(data) if scan.split == "val"])
    found = scores(Elsewhere())  # type: ignore[arg-type]
    assert found["psnr"] < found["psnr_spline"]


@pytest.mark.parametrize("name", ["thick", "thick-stage2"])
def test_the_recipes_are_of_this_kind(name: str) -> None:
    assert load_recipe(name)["data"]["kind"] == "thick"
