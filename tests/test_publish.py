"""Publishing a training run: the entry describes the packaged file, test scans are scored once, and all is logged."""

import argparse
import csv
import importlib.util
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from deformmamba.models import DeformMambaSR, from_pretrained
from deformmamba.weights import card

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    y, x, z = np.meshgrid(np.linspace(-1, 1, 72), np.linspace(-1, 1, 64), np.arange(3), indexing="ij")
    rows = ["participant_id\tfile\tsplit\tcontrast\tanatomy\tsource\tlicence"]
    for i, (split, contrast) in enumerate([("train", "T2"), ("val", "T2"), ("test", "T2"), ("external", "T1")]):
        image = 500.0 * (np.hypot(y, x) < 0.9) + 100 * np.cos(9 * x + z) * np.cos(7 * y + i) * (np.hypot(y, x) < 0.9)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), np.diag([1, 1, 3, 1])), root / f"{i}.nii")
        rows.append(f"sub-{i}\t{i}.nii\t{split}\t{contrast}\tbrain\tmade up\tCC0")
    (root / "volumes.tsv").write_text("\n".join(rows) + "\n")
    return root


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def publish(tmp_path, monkeypatch):
    module = example("publish_checkpoint")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOG", tmp_path / "docs" / "evaluations.csv")
    (tmp_path / "deformmamba" / "checkpoints").mkdir(parents=True)
    (tmp_path / "weights_manifest.json").write_text(json.dumps({"format": 1, "weights": {}, "planned": {"t2-2x": {}}}))
    return module


@pytest.mark.slow
def test_a_run_becomes_an_entry(tmp_path, folder, publish, monkeypatch, capsys):
    model = DeformMambaSR(scale=2, dims=[8, 12], depths=[1, 1], patch=2, d_state=2, skip="zero-fill")
    facts = {
        "recipe": {"model": {}, "data": {"validation": ["T2 brain"], "weights": {"T2 brain": 1.0}}, "fit": {}},
        "degradation": "k-space crop, magnitude",
        "spacings_mm": [2.0, 3.0],
        "seed": 0,
        "steps": 1,
        "batch": 2,
    }
    model.save_pretrained(tmp_path / "best.safetensors", provenance=facts)
    arguments = [
        str(tmp_path / "best.safetensors"),
        "t2-2x",
        "--data",
        str(folder),
        "--machine",
        "none",
        "--hours",
        "0",
        "--limits",
        "made up",
    ]
    monkeypatch.setattr(sys, "argv", ["publish_checkpoint.py", *arguments])
    publish.main()

    manifest = json.loads((tmp_path / "weights_manifest.json").read_text())
    entry = manifest["weights"]["t2-2x"]
    assert manifest["planned"] == {}
    packaged = tmp_path / "deformmamba" / "checkpoints" / "t2-2x.safetensors"
    assert packaged.stat().st_size == entry["size"]
    assert from_pretrained(packaged).consistency == entry["consistency"]
    assert entry["trained_on"] == [{"source": "made up", "licence": "CC0", "group": "T2 brain", "subjects": 1}]
    assert {row["truth_mm"]: row["trained"] for row in entry["by_spacing"]} == {1.2: True, 1.5: True, 2.0: False}
    assert {row["group"] for row in entry["out_of_domain"]} == {"T1 brain", "T2 brain"}
    assert all(row["kind"] in ("bright", "dark") for row in entry["lesions"])
    assert entry["limits"] == "made up"
    assert entry["config"]["dims"] == [8, 12]
    assert [path.name for path in packaged.parent.iterdir()] == [packaged.name]
    assert card({"name": "t2-2x", **entry})

    with open(tmp_path / "docs" / "evaluations.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    assert {row["sha256"] for row in logged} == {entry["sha256"]}
    wanted = ("scores", "by_subject", "by_spacing", "out_of_domain", "lesions")
    assert len(logged) == sum(len(entry[name]) for name in wanted)
    assert "## Synthetic lesions" in capsys.readouterr().out


def test_weights_for_the_slice_direction_are_described_by_the_same_function(tmp_path, folder, publish, monkeypatch):
    monkeypatch.setitem(sys.modules, "publish_checkpoint", publish)
    thick = example("publish_thick")
    monkeypatch.setattr(thick, "FINAL", tmp_path / "deformmamba" / "checkpoints" / "thick.safetensors")
    model = DeformMambaSR(scale=1, dims=[8, 12], depths=[1, 1], patch=2, d_state=2)
    facts = {"degradation": "slice profile", "seed": 0, "steps": 1, "batch": 2, "validation": {"psnr_spline": 30.12345}}
    facts["recipe"] = {"model": {"preset": "tiny"}, "data": {}}
    model.save_pretrained(tmp_path / "best.safetensors", provenance=facts)
    given = {"checkpoint": tmp_path / "best.safetensors", "data": folder, "machine": "none", "hours": 0.0}
    entry = thick.publish(argparse.Namespace(**given, license="CC0", limits="made up"))
    packaged = from_pretrained(thick.FINAL)
    assert entry.items() >= publish.description(packaged, packaged.provenance, thick.FINAL, packaged.sha256).items()
    assert entry["scores"][0]["spline_psnr"] == 30.1234
    assert (entry["preset"], entry["consistency"]) == ("tiny", "off")
