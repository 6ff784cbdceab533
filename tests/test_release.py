"""The release scripts: addresses are those of the repository in which the release is built."""

import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import deformmamba

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / ".github"

pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="an installed package has no sources")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`prepare_release.py`, working on a copy of the files that it changes."""
    spec = importlib.util.spec_from_file_location("prepare_release", SCRIPTS / "prepare_release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("README.md", "setup.cfg", "deformmamba/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    version = tmp_path / "deformmamba" / "__init__.py"
    version.write_text(version.read_text("utf-8").replace(deformmamba.__version__, "0.1.0"), "utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_addresses_of_a_release(script: Any) -> None:
    script.main("someone/somewhere", "v0.1.0")
    text = (script.ROOT / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(re.match(r"https?://|#", target) for target in targets)
    assert "![" in text
    assert "https://github.com/someone/somewhere/raw/v0.1.0/docs/images/" in text
    read = configparser.ConfigParser()
    read.read(script.ROOT / "setup.cfg", "utf-8")
    urls = dict(line.split(" = ") for line in read["metadata"]["project_urls"].strip().splitlines())
    assert urls.keys() == {"Source", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/someone/somewhere") for url in urls.values())


@pytest.mark.parametrize("tag", ["v0.2.0", "0.1.0", "main"])
def test_a_tag_that_is_not_the_version_stops(tag: str, script: Any) -> None:
    before = (script.ROOT / "README.md").read_bytes()
    with pytest.raises(SystemExit, match="is not the version"):
        script.main("someone/somewhere", tag)
    assert (script.ROOT / "README.md").read_bytes() == before


def test_the_floors_are_those_of_the_settings() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "floors.py")], capture_output=True, text=True, timeout=60)
    floors = done.stdout.split()
    assert "numba==0.60" in floors
    assert "nibabel==5" in floors
    assert not any(floor.startswith("torch") for floor in floors)


def test_the_release_publishes_what_it_tested() -> None:
    jobs = yaml.safe_load((SCRIPTS / "workflows" / "release.yml").read_text("utf-8"))["jobs"]
    assert jobs["test"]["needs"] == "build"
    assert jobs["publish"]["needs"] == "test"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    builds = [step for job in jobs.values() for step in job["steps"] if "-m build" in step.get("run", "")]
    assert len(builds) == 1, "what is published is what was tested"
    assert "secrets." not in (SCRIPTS / "workflows" / "release.yml").read_text("utf-8")
