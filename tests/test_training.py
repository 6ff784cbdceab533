"""fit: it learns, stops, resumes to the same weights, refuses what is not its own; recipes; evaluation."""

import csv
import hashlib
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from deformmamba.evaluation import evaluate, mean_scores
from deformmamba.extras import MissingExtra
from deformmamba.kspace import degrade, zero_fill
from deformmamba.losses import LOSSES
from deformmamba.metrics import psnr
from deformmamba.models import MODELS, ZeroFill
from deformmamba.models.deform_mamba import DeformMambaSR
from deformmamba.training import fit, load_recipe, train_recipe

accelerate_state = pytest.importorskip("accelerate.state")


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps one mixed precision a process; a test is a process of its own."""
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


def network():
    torch.manual_seed(0)
    return DeformMambaSR(scale=2, dims=[8, 12], depths=[1, 1], patch=2, d_state=2, stem_channels=2, skip="zero-fill")


def samples(n=6):
    hr = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    lr = degrade(hr, 2)
    return TensorDataset(lr, hr, zero_fill(lr, 2))


def run(out, *, steps=6, **options):
    options = {"batch": 2, "every": 2, "warmup": 2, "progress": False, **options}
    return fit(network(), samples(), out=out, steps=steps, **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stop(Exception):
    pass


def test_it_learns_and_writes_what_it_says(tmp_path):
    best = run(
        tmp_path, steps=40, lr=1e-2, ema=0, every=20, validate=lambda model: {"psnr": -1.0}, provenance={"who": "us"}
    )
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [20, 40]
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[1]["psnr"]) == -1
    model = DeformMambaSR.from_pretrained(best)
    assert model.provenance["who"] == "us"
    assert model.provenance["steps"] == 40
    assert not list(tmp_path.glob("*.part"))


def test_the_best_checkpoint_is_the_one_that_validates_best(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    best = run(tmp_path, validate=lambda model: {"psnr": next(scores)})
    assert DeformMambaSR.from_pretrained(best).provenance["steps"] == 4
    assert DeformMambaSR.from_pretrained(tmp_path / "last.safetensors").provenance["steps"] == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, error):
    whole = digest(run(tmp_path / "whole"))
    seen = []

    def stop_once(model):
        seen.append(model)
        if len(seen) == 2:
            raise error
        return {}

    with pytest.raises(error):
        run(tmp_path / "stopped", validate=stop_once)
    assert torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == (4 if error is not Stop else 2)
    resumed = run(tmp_path / "stopped", validate=lambda model: {})
    assert digest(resumed) == whole


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds another run; choose another folder"):
        run(tmp_path, steps=8)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    data = samples()
    data.tensors[1][3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step [0-2]"):
        fit(network(), data, out=tmp_path, steps=6, batch=2, progress=False)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precisions(tmp_path, precision):
    model = DeformMambaSR.from_pretrained(run(tmp_path, steps=2, precision=precision))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_the_average_follows_the_weights(tmp_path):
    averaged = DeformMambaSR.from_pretrained(run(tmp_path / "a", steps=8, lr=1e-2, ema=0.9))
    plain = DeformMambaSR.from_pretrained(run(tmp_path / "b", steps=8, lr=1e-2, ema=0))
    start = network()

    def distance(a, b):
        return sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)).item()

    assert 0 < distance(averaged, start) < distance(plain, start)


@pytest.fixture
def folder(tmp_path, phantom):
    rows = ["participant_id\tfile\tsplit\tcontrast\tanatomy"]
    for i, split in enumerate(["train", "train", "val", "test"]):
        image = nibabel.Nifti1Image(np.roll(phantom, i, 0), np.diag([1, 1, 3, 1]))
        nibabel.save(image, tmp_path / f"{i}.nii.gz")
        rows.append(f"sub-{i}\t{i}.nii.gz\t{split}\tT2\tbrain")
    (tmp_path / "volumes.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_evaluate_scores_what_upscale_gives(folder, phantom):
    rows = evaluate(ZeroFill(scale=2), [folder / "0.nii.gz", folder / "2.nii.gz"])
    hr = torch.from_numpy(np.moveaxis(phantom, 2, 0).copy())
    wanted = psnr(zero_fill(degrade(hr, 2), 2).clamp(min=0), hr)
    assert rows[0]["psnr"] == pytest.approx(wanted, abs=1e-4)
    assert rows[0]["slices"] == 6
    assert mean_scores(rows)["psnr"] == pytest.approx((rows[0]["psnr"] + rows[1]["psnr"]) / 2)


def test_subjects_count_alike_however_many_volumes_they_have():
    rows = [{"subject": s, "psnr": v, "ssim": v, "nmse": v} for s, v in (("a", 1.0), ("a", 3.0), ("b", 8.0))]
    assert mean_scores(rows)["psnr"] == 5.0


RECIPE = """
[model]
dims = [8, 12]
depths = [1, 1]
patch = 2
scale = 2
skip = "zero-fill"
[data]
patch = 8
validation = ["T2 brain"]
[fit]
steps = 4
batch = 2
every = 2
"""


def test_a_recipe_trains_from_a_folder(folder, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    best = train_recipe(path, folder, tmp_path / "out", progress=False, steps=3, seed=None)
    facts = DeformMambaSR.from_pretrained(best).provenance
    assert facts["train"]["subjects"] == ["sub-0", "sub-1"]
    assert facts["val"]["subjects"] == ["sub-2"]
    assert facts["recipe"]["fit"]["steps"] == 3
    assert facts["spacings_mm"] == [2, 2]
    assert 0 < facts["validation"]["ssim"] < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("patch = 8", "patchsize = 8"), r"no key 'patchsize' in \[data\]; keys: .*patch"),
        (("steps = 4", 'steps = "4"'), r"steps in \[fit\] is '4'; wanted int"),
        (("batch = 2", "batch = true"), r"batch in \[fit\] is True; wanted int"),
        (("[model]", '[model]\nname = "Nothing"'), "no model 'Nothing'"),
        (("[data]", "[date]"), r"no section \[date\]"),
        (("[data]", "[data"), "not TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_read(tmp_path, change, message):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_an_unknown_recipe_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'ixi-3x'; recipes: .*ixi-4x"):
        load_recipe("ixi-3x")


def test_data_without_a_split_to_validate_on_is_refused(folder, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.replace('"T2 brain"', '"T1 brain"'))
    with pytest.raises(ValueError, match="2 volumes to train on and 0 to validate on"):
        train_recipe(path, folder, tmp_path / "out", progress=False)


def test_packaged_recipes_are_sound():
    from importlib.resources import files

    for path in files("deformmamba").joinpath("recipes").iterdir():
        plan = load_recipe(path.name.removesuffix(".toml"))
        assert plan["model"].get("name", "DeformMambaSR") in MODELS
        assert plan["fit"].get("loss", "sr") in LOSSES


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"fit needs accelerate .*pip install 'deformmamba\[train\]'"):
        run(tmp_path)
