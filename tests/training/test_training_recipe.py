"""Recipes: those in the package are valid, a user's recipe trains from a folder, mistakes are found before training."""

import csv
import dataclasses
import hashlib
import json
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from deformmamba.data.patches import Scan, find_scans
from deformmamba.evaluation.compare import evaluate, mean_scores
from deformmamba.losses import LOSSES
from deformmamba.metrics import psnr
from deformmamba.models import MODELS, ZeroFill
from deformmamba.models.deform_mamba import PRESETS, DeformMambaSR
from deformmamba.physics.kspace import degrade, zero_fill
from deformmamba.training import from_recipe, load_recipe, train_recipe
from deformmamba.training.folder import RunFolder
from deformmamba.weights import Checkpoint, WeightsError, card, load_checkpoint, weights_entry

accelerate_state = pytest.importorskip("accelerate.state")

PACKAGED = [path.name.removesuffix(".toml") for path in files("deformmamba").joinpath("recipes").iterdir()]

RECIPE = """
[model]
dims = [8, 12]
depths = [1, 1]
patch = 2
scale = 2
d_state = 2
skip = "zero-fill"
[data]
patch = 8
validation = ["T2 brain"]
[data.weights]
"T2 brain" = 1.0
[fit]
steps = 2
batch = 2
every = 2
"""


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch):
    monkeypatch.setattr("deformmamba.training.folder.training_curve", lambda rows, path: None)
    yield
    accelerate_state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path, phantom):
    root = tmp_path / "data"
    root.mkdir()
    rows = ["participant_id\tfile\tsplit\tcontrast\tanatomy"]
    for i, split in enumerate(["train", "train", "val", "test"]):
        image = nibabel.Nifti1Image(np.roll(phantom, i, 0), np.diag([1, 1, 3, 1]))
        nibabel.save(image, root / f"{i}.nii.gz")
        rows.append(f"sub-{i}\t{i}.nii.gz\t{split}\tT2\tbrain")
    (root / "volumes.tsv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


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


@pytest.mark.slow
def test_a_recipe_trains_from_a_folder(folder, tmp_path, recipe):
    best = train_recipe(recipe, folder, tmp_path / "out", progress=False, steps=3, seed=None)
    facts = DeformMambaSR.from_pretrained(best).provenance
    digest = hashlib.sha256(b"sub-0\nsub-1").hexdigest()
    assert facts["train"] == {"subjects": 2, "volumes": 2, "subjects_sha256": digest}
    assert facts["val"]["subjects"] == 1
    for file in (best, tmp_path / "out" / "run.json"):  # it may be a person's name
        assert b"sub-" not in Path(file).read_bytes()
    assert facts["recipe"]["fit"]["steps"] == 3
    assert facts["spacings_mm"] == [2, 2]
    assert 0 < facts["validation"]["ssim"] < 1
    assert (tmp_path / "out" / "sample.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_epochs_are_passes_over_the_training_slices(folder, tmp_path, recipe):
    recipe.write_text(RECIPE.replace("steps = 2", "epochs = 0.5").replace("batch = 2", "batch = 5"))
    best = train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert DeformMambaSR.from_pretrained(best).provenance["steps"] == 2  # half of 12 slices, in batches of 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fit. no validation was better")  # at this rate the scores are equal
def test_it_starts_from_other_weights(folder, tmp_path, recipe):
    start = DeformMambaSR(scale=2, dims=[8, 12], depths=[1, 1], patch=2, d_state=2, skip="zero-fill")
    torch.nn.init.constant_(start.project.bias, 0.125)
    sha256 = start.save_pretrained(
        tmp_path / "start.safetensors", provenance={"steps": 7, "else": 1, "init": [{"steps": 3}]}
    )
    recipe.write_text(RECIPE.replace("every = 2", "every = 2\nlr = 1e-9"))
    best = train_recipe(recipe, folder, tmp_path / "out", init=str(tmp_path / "start.safetensors"), progress=False)
    trained = DeformMambaSR.from_pretrained(best)
    assert trained.project.bias.item() == pytest.approx(0.125, abs=1e-6)
    assert trained.provenance["recipe"]["model"]["init"] == "start.safetensors"  # no path: it may name a person
    assert trained.provenance["init"] == [{"steps": 3}, {"sha256": sha256, "steps": 7}]

    torch.nn.init.constant_(start.project.bias, 0.25)
    start.save_pretrained(tmp_path / "start.safetensors", provenance={"steps": 7})
    with pytest.raises(ValueError, match=r"holds another run: provenance\.init was \[.*, now it is"):
        train_recipe(recipe, folder, tmp_path / "out", init=str(tmp_path / "start.safetensors"), progress=False)


@pytest.mark.slow
def test_finetuning_takes_the_network_of_its_start_and_never_returns_worse(folder, tmp_path):
    start = DeformMambaSR(scale=2, dims=[8, 16], depths=[1, 1], patch=2, d_state=2, skip="zero-fill")
    start.save_pretrained(tmp_path / "start.safetensors", provenance={"consistency": "object", "license": "CC0-1.0"})
    plan = load_recipe("finetune")
    assert plan["model"] == {}
    quick = {"steps": 2, "batch": 1, "every": 1, "lr": 10.0, "init": str(tmp_path / "start.safetensors")}
    mine = tmp_path / "finetune.toml"
    text = files("deformmamba").joinpath("recipes", "finetune.toml").read_text("utf-8")
    mine.write_text(text.replace("patch = 32", "patch = 8").replace("warmup = 50", "warmup = 0\nema = 0.0"))
    with pytest.warns(UserWarning, match="no validation was better than the start's"):  # the rate is far too high
        best = train_recipe(mine, folder, tmp_path / "out", progress=False, **quick)
    kept = DeformMambaSR.from_pretrained(best)
    assert kept.config == start.config
    assert kept.provenance["steps"] == 0
    assert kept.consistency == "object"
    assert kept.provenance["license"] == "CC0-1.0"
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in start.state_dict().items())
    wanted = mean_scores(evaluate(kept, [folder / "2.nii.gz"]))["psnr"]
    assert kept.provenance["validation"]["psnr"] == pytest.approx(wanted, abs=1e-6)


def test_a_start_whose_network_computes_something_else_is_announced(folder, tmp_path, recipe):
    network = {"scale": 2, "dims": [8, 12], "depths": [1, 1], "patch": 2, "d_state": 2, "skip": "zero-fill"}
    DeformMambaSR(**network, normalise="slice").save_pretrained(tmp_path / "start.safetensors")
    wanted = r"has .*normalise = None.* init .*start.safetensors has .*normalise = 'slice'.*make \[model\] equal"
    with pytest.warns(UserWarning, match=wanted):
        train_recipe(recipe, folder, tmp_path / "out", init=str(tmp_path / "start.safetensors"), progress=False)


def test_licence_and_acknowledgements_of_published_weights_are_inherited_from_the_manifest(tmp_path):
    start = load_checkpoint("ixi-4x")
    stated = ("license", "acknowledgements")
    start = dataclasses.replace(start, provenance={k: v for k, v in start.provenance.items() if k not in stated})
    entry = weights_entry("ixi-4x")
    out = RunFolder(tmp_path)
    inherited = from_recipe._inherited(start, out)
    assert inherited["license"] == entry["license"] == "cc-by-sa-4.0"
    line = next(line for line in card(entry).splitlines() if line.startswith("Acknowledgements: "))
    assert "brain-development.org" in line
    assert "TCGA Research Network" in line
    # the card of trained weights states them too, and so does the card of weights trained from these
    for facts in (
        inherited,
        from_recipe._inherited(dataclasses.replace(start, sha256="0" * 64, provenance=inherited), out),
    ):
        assert line in card({"name": "mine", **facts}).splitlines()
    own = card({"name": "mine", **inherited, "trained_on": [{"source": "IXI"}, {"source": "ours"}]})
    assert line in own.splitlines(), "each is written once"
    other = dataclasses.replace(start, sha256="0" * 64, provenance={"license": "CC0-1.0"})
    assert from_recipe._inherited(other, out) == {"license": "CC0-1.0"}
    # a run that an earlier version started without the licence resumes with the settings that it began with
    (tmp_path / "run.json").write_text(json.dumps({"fit": {"samples": 2}, "provenance": {"recipe": {}}}))
    (tmp_path / "state.pt").write_bytes(b"")
    assert from_recipe._inherited(start, out).keys().isdisjoint({"license", "acknowledgements"})


def test_groups_of_a_recipe_do_not_count_where_the_scans_have_none():
    settings = {"weights": {"T2 brain": 1.0}, "validation": ["T2 brain"], "patch": 8}
    with pytest.warns(UserWarning, match="scans: contrast and anatomy of the volumes are unknown"):
        from_recipe.forget_groups([Scan(Path("a.nii"), "a", "train", "")], settings, "scans")
    assert settings == {"patch": 8}


def test_a_start_of_an_unknown_class_is_compared_by_what_its_file_says():
    model = DeformMambaSR(scale=2, dims=[8], depths=[1], patch=2, d_state=2)
    same = Checkpoint("Mine", {"scale": 2, "d_state": 2}, {}, {}, "", "mine.safetensors")
    from_recipe._warn_if_unlike(model, same)
    with pytest.warns(UserWarning, match=r"has d_state = 2, and the network of init mine.safetensors has d_state = 4"):
        from_recipe._warn_if_unlike(model, dataclasses.replace(same, config={"d_state": 4}))


@pytest.mark.slow
def test_a_network_with_more_blocks_starts_from_the_results_of_one_with_fewer(folder, tmp_path, recipe, recwarn):
    small = tmp_path / "out" / train_recipe(recipe, folder, tmp_path / "out", progress=False)
    deeper = tmp_path / "deeper.toml"
    assert "depths = [1, 1]" in RECIPE
    deeper.write_text(RECIPE.replace("depths = [1, 1]", "depths = [3, 2]"))
    train_recipe(deeper, folder, tmp_path / "more", init=small, progress=False)
    rows = {name: list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("out", "more")}
    before, start = rows["out"][-1], rows["more"][0]
    assert float(start["psnr"]) == pytest.approx(float(before["psnr"]), abs=1e-6)
    assert not [w for w in recwarn if "does not start from" in str(w.message)]


@pytest.mark.parametrize("name", ["finetune", *(name for name in PACKAGED if "-stage" in name)])
def test_a_recipe_that_continues_asks_for_weights(folder, tmp_path, name):
    with pytest.raises(ValueError, match="no weights to start from; give them: --init"):
        train_recipe(name, folder, tmp_path / "out")


def test_settings_that_compute_the_same_need_no_warning(recwarn):
    given = DeformMambaSR(scale=2, dims=[8], depths=[1], patch=2, d_state=2)
    model = DeformMambaSR(scale=2, dims=[8], depths=[2], patch=2, d_state=2, checkpointing=True, drop_path=0.1)
    from_recipe._warn_if_unlike(model, Checkpoint("DeformMambaSR", given.config, given.state_dict(), {}, "", "a"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: 0 * image, "no voxel above 0"),
        (lambda image: image - image.mean(), "negative.*this training is on magnitudes"),
        (lambda image: image[:5, :5], "slices of 5x5 pixels"),
    ],
)
def test_a_scan_that_cannot_validate_is_found_at_once(tmp_path, change, words):
    image = change(np.random.default_rng(0).random((32, 32, 3)).astype("f4"))
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=rf"a\.nii: .*{words}"):
        from_recipe.check_validation(Scan(tmp_path / "a.nii", "a", "val", ""), 1)


def test_a_network_for_several_channels_does_not_train_on_slices(folder, tmp_path, recipe):
    recipe.write_text(RECIPE.replace("[model]", "[model]\nin_channels = 2"))
    with pytest.raises(ValueError, match="takes 2 channels, and slices have one; set in_channels = 1"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_longer_recipe_goes_on_from_a_finished_one(folder, tmp_path, recipe):
    train_recipe(recipe, folder, tmp_path / "out", progress=False)
    best = train_recipe(recipe, folder, tmp_path / "out", progress=False, steps=4)
    assert DeformMambaSR.from_pretrained(tmp_path / "out" / "last.safetensors").provenance["steps"] == 4
    assert best.is_file()
    with pytest.raises(ValueError, match=r"provenance\.recipe\.fit\.steps was 4, now it is 2"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_training_leaves_the_global_random_state_and_names_the_subjects(folder, tmp_path, recipe):
    said = []
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train_recipe(recipe, folder, tmp_path / "out", progress=False, say=said.append)
    assert torch.equal(torch.rand(3), wanted)
    assert said == [
        "train: 2 volumes of 2 subjects: sub-0, sub-1",
        "val: 1 volume of 1 subject: sub-2",
        "test: 1 volume of 1 subject: sub-3",
    ]


def test_weights_for_the_slice_direction_do_not_train_on_in_plane_data(folder, tmp_path):
    with pytest.raises(ValueError, match=r"scale 1, as networks for the slice direction.*kind = 'thick'"):
        train_recipe("finetune", folder, tmp_path / "out", init="thick", progress=False)


def test_weights_to_start_from_must_fit(folder, tmp_path, recipe):
    DeformMambaSR(scale=2, dims=[8, 16], depths=[1, 1], patch=2, d_state=2).save_pretrained(tmp_path / "a.safetensors")
    recipe.write_text(RECIPE.replace("[model]", f'[model]\ninit = "{tmp_path / "a.safetensors"}"'))
    with pytest.raises(
        ValueError, match=r"init = .* does not fit the recipe's DeformMambaSR: .*dims = \[8, 12\].*for dims = \[8, 16\]"
    ) as error:
        train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_architecture_in_the_same_folder_is_refused_before_data_are_read(folder, tmp_path, recipe, monkeypatch):
    train_recipe(recipe, folder, tmp_path / "out", progress=False)
    monkeypatch.setattr("deformmamba.data.patches.load_slices", None)
    recipe.write_text(RECIPE.replace("dims = [8, 12]", "dims = [8, 16]"))
    with pytest.raises(ValueError, match=r"provenance\.recipe\.model\.dims was \[8, 12\], now it is \[8, 16\]"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_other_workers_do_not_make_another_run(folder, tmp_path, recipe):
    first = train_recipe(recipe, folder, tmp_path / "out", progress=False).read_bytes()
    assert train_recipe(recipe, folder, tmp_path / "out", progress=False, workers=1).read_bytes() == first


@pytest.mark.slow
def test_a_folder_without_groups_is_taken_whole_and_says_so(folder, tmp_path, recipe, monkeypatch):
    plain = [dataclasses.replace(scan, group="") for scan in find_scans(folder)]
    monkeypatch.setattr("deformmamba.training.from_recipe.find_scans", lambda root, subject: plain)
    with pytest.warns(UserWarning, match="contrast and anatomy of the volumes are unknown"):
        best = train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert "weights" not in DeformMambaSR.from_pretrained(best).provenance["recipe"]["data"]


@pytest.mark.slow
def test_a_group_that_is_not_there_is_said(folder, tmp_path, recipe):
    recipe.write_text(RECIPE.replace('"T2 brain" = 1.0', '"T2 brain" = 0.5\n"T1 brain" = 0.5'))
    with pytest.warns(UserWarning, match="has no training volumes of T1 brain; the other groups"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("patch = 8", "patchsize = 8"), r"unknown key 'patchsize' in \[data\] \(did you mean 'patch'\?\); keys: "),
        (("steps = 2", 'steps = "4"'), r"steps in \[fit\] is '4'; wanted int"),
        (("batch = 2", "batch = true"), r"batch in \[fit\] is True; wanted int"),
        (("dims = [8, 12]", 'dims = [8, "12"]'), r"dims in \[model\] is \[8, '12'\]; wanted a list of int"),
        (('"T2 brain" = 1.0', '"T2 brain" = "all"'), r"weights in \[data\] .*; wanted a table of float"),
        (("[fit]", "[fit]\nloss = 'l2'"), "unknown loss 'l2'; losses: sr, l1"),
        (("[model]", '[model]\nname = "Nothing"'), "unknown model 'Nothing'"),
        (("[data]", "[date]"), r"unknown section \[date\]"),
        (("[data]", "[data"), "not valid TOML"),
        (("[model]", "[model]\nname = ['x']"), r"unknown model \['x'\]; models: "),
        (("[data]", "[data]\nkind = ['thick']"), r"kind in \[data\] is \['thick'\]; wanted 'in-plane' or"),
        (("[fit]", "[fit]\nloss = ['l1']"), r"loss in \[fit\] is \['l1'\]; wanted str"),
        (("[model]", "model = 3\n[data2]"), r"'model' is 3, outside of a section.*\[model\], \[data\], \[fit\]"),
        (("[model]", "steps = 3\n[model]"), r"'steps' is 3, outside of a section"),
        (("batch = 2", "batch = 0"), "batch is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_read(recipe, change, message):
    recipe.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe)


def test_a_recipe_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "latin.toml").write_bytes("[model]\n# für\n".encode("latin-1"))
    for name in (tmp_path / "latin.toml", "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match=r"^recipe '.* cannot be read \(|^no recipe '(x{9}|a)") as error:
            load_recipe(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepz": 5}, r"unknown key 'stepz' in \[fit\] \(did you mean 'steps'\?\); keys: "),
        ({"loss": "bad"}, "unknown loss 'bad'; losses: "),
        ({"beta": -1.0}, "beta must be a number of 0 or more"),
        ({"batch": 0}, "batch is 0; it must be 1 or more"),
        ({"steps": "5"}, r"steps in \[fit\] is '5'; wanted int"),
        ({"epochs": np.nan}, r"epochs in \[fit\] is nan; wanted a number above 0"),
        ({"lr": -1.0}, "lr is -1.0; it must be 0 or more"),
        ({"milestones": (0.5, 2)}, "milestones are .0.5, 2.; they are fractions"),
    ],
)
def test_wrong_replacements_are_refused_before_anything_is_read(tmp_path, recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        train_recipe(recipe, tmp_path / "there is no such folder", tmp_path / "out", **overrides)


def test_replacements_are_those_of_toml(recipe):
    given = {"steps": np.int64(3), "lr": np.float32(0.5), "milestones": (0.25, np.float64(0.5)), "seed": None}
    fit = from_recipe._plan(recipe, None, given)["fit"]
    assert (fit["steps"], fit["lr"], fit["milestones"]) == (3, 0.5, [0.25, 0.5])
    assert [type(fit[key]) for key in ("steps", "lr")] == [int, float]
    assert "seed" not in fit


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match=r"no recipe 'ixi-3x' \(did you mean 'ixi-[24]x'\?\); recipes: .*ixi-4x"):
        load_recipe("ixi-3x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('validation = ["T2 brain"]', 'validation = ["T1 brain"]'), "2 volumes to train on and 0 to validate on"),
        (('"T2 brain" = 1.0', '"T1 brain" = 1.0'), "0 volumes to train on and 1 to validate on.*available: T2 brain"),
        (("steps = 2", ""), "must contain either steps or epochs"),
        (("[model]", '[model]\npreset = "huge"'), "unknown preset 'huge'"),
        (("[model]", '[model]\nname = "SRCNN"\npreset = "tiny"'), r"unknown key|no presets"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_it_starts(folder, tmp_path, recipe, change, message):
    recipe.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_are_sound(name):
    plan = load_recipe(name)
    assert plan["model"].get("name", "DeformMambaSR") in MODELS
    assert plan["fit"].get("loss", "sr") in LOSSES
    assert plan["model"].get("preset", "paper") in PRESETS
    if "validation" in plan["data"] and "weights" in plan["data"]:
        assert set(plan["data"]["validation"]) <= set(plan["data"]["weights"])
    if "init" in plan["model"]:
        start = load_checkpoint(plan["model"]["init"])
        assert not from_recipe._differences(from_recipe._model(name, plan["model"], start), start)


def test_the_paper_recipe_is_the_paper():
    plan = load_recipe("paper-ixi-4x")
    assert plan["model"] == {"preset": "paper", "scale": 4}
    assert PRESETS["paper"] == {}
    assert DeformMambaSR.__init__.__kwdefaults__["depths"] == (4, 4, 4, 4)
    said = {"lr": 1e-4, "epochs": 50, "batch": 2, "loss": "sr", "beta": 0.1, "weight_decay": 0.0}
    assert plan["fit"].items() >= said.items()


@pytest.mark.slow
def test_the_run_is_described_for_people(folder, tmp_path, recipe):
    train_recipe(recipe, folder, tmp_path / "out", progress=False)
    facts = json.loads(Path(tmp_path / "out" / "run.json").read_text())
    assert facts["provenance"]["train"]["subjects"] == 2
    assert facts["fit"]["lr"] == 1e-3


NONSENSE = [
    ("steps = 2", "steps = 0", "steps in .fit. is 0; wanted a number above 0"),
    ("steps = 2", "epochs = inf", "epochs in .fit. is inf"),
    ("steps = 2", 'steps = 2\nloss = "l1"\nbeta = 0.1', "beta in .fit. needs loss = 'sr'"),
    ("steps = 2", 'steps = 2\nschedule = "step"\nmilestones = [2.0]', "milestones are .2.0.; they are fractions"),
    ("[data]", '[data]\nintensity = "p99"', "unknown key 'intensity' in .data."),
    ("[data]", "[data]\ncoarsest = 0.5", "coarsest is 0.5; wanted a number of 1 or more"),
    ("[data]", "[data]\ninvert = 3.0", "invert is 3.0; wanted a number from 0 to 1"),
    ("[data]", '[data]\ndegradation = "area"', "gives the half-pixel grid, and DeformMambaSR works on the origin"),
]


def test_nonsense_is_refused_before_anything_is_computed(folder, tmp_path, recipe):
    for before, after, message in NONSENSE:
        assert before in RECIPE
        recipe.write_text(RECIPE.replace(before, after, 1))
        with pytest.raises(ValueError, match=message):
            train_recipe(recipe, folder, tmp_path / "out", progress=False)
    recipe.write_text(RECIPE)
    train_recipe(recipe, folder, tmp_path / "out", progress=False)  # the folder is still unused


def test_a_damaged_validation_volume_is_found_at_once(folder, tmp_path, recipe):
    damaged = folder / "2.nii.gz"
    image = nibabel.load(damaged)
    array = image.get_fdata()
    array[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, image.affine), damaged)
    with pytest.raises(ValueError, match="NaN"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "state.pt").exists()


@pytest.mark.slow
def test_a_run_is_no_model_but_says_where_one_is(folder, tmp_path, recipe):
    train_recipe(recipe, folder, tmp_path / "out", progress=False)
    with pytest.raises(WeightsError, match=r"is the folder of a training run; give .*best\.safetensors"):
        DeformMambaSR.from_pretrained(tmp_path / "out")


def test_processes_that_accelerate_does_not_join_are_refused(folder, tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one of 2 processes, but accelerate trains in one.*ACCELERATE_USE_CPU"):
        train_recipe(recipe, folder, tmp_path / "out", progress=False)
