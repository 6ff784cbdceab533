"""Every Python block and command in docs/ runs, and the pages list all public names."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import deformmamba
from deformmamba.cli import _parser, main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block in `language`."""
    return [
        (page.name, text)
        for page in PAGES
        for text in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phantom: np.ndarray) -> Path:
    """The working folder of the test: it contains scan.nii.gz and a folder of scans."""
    (tmp_path / "scans").mkdir()
    for path in (tmp_path / "scan.nii.gz", tmp_path / "scans" / "one.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(phantom[:24, :20, :2], np.diag([3.6, 3.6, 5, 1])), path)
    rows = np.linspace(-0.5, 3.5, 10)  # thick slices, all different
    thick = np.stack([phantom[:24, :20, 2] * (1 + 0.1 * np.sin(z)) for z in rows], axis=2)
    nibabel.save(nibabel.Nifti1Image(thick, np.diag([1, 1, 4, 1])), tmp_path / "thick.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PYTHON = [
    pytest.param(page, code, marks=[pytest.mark.slow] if "torch.export" in code else [])
    for page, code in blocks("python")
]


@pytest.mark.portable
@pytest.mark.parametrize(("page", "code"), PYTHON, ids=lambda text: text.split("\n")[0][:40])
def test_python_blocks_run(page: str, code: str, folder: Path) -> None:
    exec(compile(code, page, "exec"), {"__name__": "docs"})


COMMANDS = [
    (page, line) for page, text in blocks("sh") for line in text.splitlines() if line.startswith("deformmamba ")
]


@pytest.mark.portable
@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text)
def test_commands_run(page: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)[1:]
    # these commands take minutes or hours: only their arguments are parsed
    if words[0] in ("train", "demo", "benchmark", "bids") or "--adapt" in words:
        monkeypatch.setattr("sys.stderr", sys.stdout)
        assert _parser().parse_args(words)
        return
    assert main(words) == 0
    for word in words:
        if word in ("sharper.nii.gz", "look.html"):
            assert (folder / word).is_file()


def test_the_command_line_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("command_line", ROOT / "docs" / "command_line.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "run: python docs/command_line.py"


def test_every_page_stands_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    assert set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)) == {page.name for page in PAGES}


def test_the_reference_lists_what_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    listed = re.findall(r"^::: deformmamba\.([\w.]+)\.(\w+)$", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    for module, name in deformmamba._HOME.items():
        assert (name, module) in listed, f"docs/api.md lacks ::: deformmamba.{module}.{name}"


@pytest.mark.long
def test_the_worked_examples_pass_when_they_are_pasted(tmp_path: Path) -> None:
    """The loss and the baseline of contributing.md, in a copy of the package, pass the style and contract tests."""
    for name in ("deformmamba", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = {text.split("class ")[1].split("(")[0]: text for page, text in blocks("python") if "class " in text}
    package = tmp_path / "deformmamba"
    checks = re.compile(r"\n\n(?:assert|model = ).*", re.DOTALL)
    (package / "models" / "nearest.py").write_text('"""Nearest."""\n\n' + checks.sub("", code["Nearest"]) + "\n")
    losses = (package / "losses.py").read_text("utf-8").replace('"l1": L1Loss', '"l1": L1Loss, "new": HuberLoss')
    written = checks.sub("", code["HuberLoss"]).partition("class ")[2]
    table = losses.index("LOSSES:")
    (package / "losses.py").write_text(f"{losses[:table]}class {written}\n\n{losses[table:]}", "utf-8")
    models = (
        (package / "models" / "__init__.py")
        .read_text("utf-8")
        .replace(
            "from deformmamba.models.srcnn",
            "from deformmamba.models.nearest import Nearest\nfrom deformmamba.models.srcnn",
        )
    )
    models = models.replace('    "SRCNN": SRCNN,\n', '    "SRCNN": SRCNN,\n    "Nearest": Nearest,\n')
    (package / "models" / "__init__.py").write_text(models, "utf-8")
    if shutil.which("ruff"):
        ruff = ["ruff", "check", "--quiet", str(package / "models"), str(package / "losses.py")]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout
    tests = ["tests/models/test_models.py", "tests/test_losses.py", "-k", "Nearest or new"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
