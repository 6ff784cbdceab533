"""Every Python block of the README runs in a folder that contains a scan."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    text = README.read_text("utf-8") if README.is_file() else ""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def scan(tmp_path, monkeypatch, phantom):
    image = nibabel.Nifti1Image(phantom[:24, :20, :2], np.diag([3.6, 3.6, 3, 1]))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_blocks_run(code, scan):
    exec(compile(code, "README.md", "exec"), {})


def test_commands_are_those_of_the_command_line():
    from deformmamba.cli import _parser

    used = set(re.findall(r"^(?:.*&& )?deformmamba ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert used
    known = next(action for action in _parser()._actions if action.choices).choices
    assert used <= set(known)


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README.read_text("utf-8"))
    assert pictures
    assert all((README.parent / path).is_file() for path in pictures)


def test_pixel_sizes_are_those_of_the_training_data():
    from deformmamba.weights import card, list_weights
    from deformmamba.weights.cards import pixel_range

    stated = re.findall(
        r"pixels of ([\d.]+ to [\d.]+ mm) \| `deformmamba upscale --model ([\w-]+)`", README.read_text("utf-8")
    )
    upscaling = [entry for entry in list_weights() if entry["scale"] > 1]
    assert {(pixel_range(*entry["spacings_mm"]), entry["name"]) for entry in upscaling} == set(stated)
    for entry in upscaling:
        assert f"pixels of {pixel_range(*entry['spacings_mm'])} (" in card(entry).split("```")[0]
        assert " mm" not in entry["meant_for"], "the sizes have one source"
