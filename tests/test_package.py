"""The shipped package: contents of wheel and sdist, an installation outside the checkout, names, types, versions."""

import ast
import configparser
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from skipping import skipped_without_extra

import deformmamba
from deformmamba.extras import MissingExtra, require
from deformmamba.weights import list_weights

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deformmamba"
MAX_WHEEL, MAX_CHECKPOINTS = 40_000_000, 36_000_000
PYTHONS = ("3.11", "3.12", "3.13")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="an installed package has no sources")


def settings() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg", "utf-8")
    return read


def lines(text: str) -> list[str]:
    return [line.split("#")[0].strip() for line in text.strip().splitlines() if line.split("#")[0].strip()]


# --------------------------------------------------------------------------------------------------- wheel and sdist


class Built(NamedTuple):
    sources: Path  # a copy of the checkout
    sdist: Path
    from_sdist: Path  # the wheel that `python -m build` builds from the sdist
    wheel: Path  # built from the sources


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build", reason="`build` is in the extra dist")
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "checkout"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "demo-output", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    for arguments, out in (((), "sdist"), (("--wheel",), "wheel")):
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            *arguments,
            "--outdir",
            str(folder / out),
            str(copy),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Deprecat" not in done.stdout + done.stderr
        shutil.rmtree(copy / "build", ignore_errors=True)
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    (from_sdist,) = (folder / "sdist").glob("*.whl")
    (wheel,) = (folder / "wheel").glob("*.whl")
    return Built(copy, sdist, from_sdist, wheel)


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    inside = contents(built.wheel)
    info = f"deformmamba-{deformmamba.__version__}.dist-info/"
    wanted = {
        path.relative_to(built.sources).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (built.sources / "deformmamba").rglob("*")
        if path.is_file()
    }
    assert {name: digest for name, digest in inside.items() if not name.startswith(info)} == wanted
    assert {"deformmamba/py.typed", "deformmamba/weights_manifest.json", "deformmamba/recipes/ixi-4x.toml"} <= set(
        inside
    )
    for name in ("LICENSE", "NOTICE", "LICENSES/CC-BY-4.0.txt", "LICENSES/CC-BY-SA-4.0.txt"):
        assert inside[f"{info}licenses/{name}"] == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
    for entry in list_weights():
        if not entry["repo"]:
            assert inside[f"deformmamba/checkpoints/{entry['file']}"] == entry["sha256"]
    assert built.wheel.stat().st_size < MAX_WHEEL
    assert built.wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.from_sdist) == contents(built.wheel)
    with tarfile.open(built.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.cfg"} <= set(members)
    assert members["deformmamba/weights_manifest.json"].isfile(), "no link, which Windows would not unpack"
    assert not any(member.issym() or member.islnk() for member in members.values())
    assert {"tests/test_package.py", "tests/scan/test_scan.py", "docs/index.md", "Makefile", "NOTICE"} <= set(members)
    assert not any("__pycache__" in name or name.startswith(".git/") for name in members)


@pytest.mark.slow
def test_a_package_index_takes_both(built: Built) -> None:
    pytest.importorskip("twine", reason="twine is in the extra dist")
    files = [str(built.sdist), str(built.wheel)]
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        name = f"deformmamba-{deformmamba.__version__}.dist-info/METADATA"
        metadata = message_from_bytes(archive.read(name))
        commands = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "deformmamba"
    assert metadata["Version"] == deformmamba.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0 AND CC-BY-SA-4.0"
    urls = metadata.get_all("Project-URL") or []
    assert urls == [], "no address is known before the release, which adds those of its own repository"
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    assert "deformmamba = deformmamba.__main__:main" in commands
    versions = re.findall(r"Python :: (3\.\d+)", str(metadata.get_all("Classifier")))
    assert versions == list(PYTHONS)
    assert "![" in str(metadata.get_payload()), "the README is the description"


@pytest.mark.long
def test_the_wheel_works_where_there_is_no_checkout(built: Built, tmp_path: Path) -> None:
    """A new environment can import this environment's packages, but not an editable installation of this package."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(venv),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    done = subprocess.run([*pip, str(built.wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    away = tmp_path / "away"
    away.mkdir()
    shared = [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
    for path in (*shared, ROOT / "tests" / "physics" / "test_kspace.py", ROOT / "tests" / "test_losses.py"):
        shutil.copy(path, away)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DEFORMMAMBA"))}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            cwd=away, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert run("deformmamba", "--version").strip() == f"deformmamba {deformmamba.__version__}"
    script = (
        "import deformmamba, torch\n"
        "from deformmamba.cli import main\n"
        "assert main(['weights', 'verify']) == 0\n"
        "from deformmamba.training import load_recipe\n"
        "model = deformmamba.from_pretrained('ixi-4x')\n"
        "print(deformmamba.__file__, model.scale)\n"
        "with deformmamba.scan_backend('eager'): y = deformmamba.SS2D(8)(torch.rand(1, 8, 4, 4))\n"
        "assert y.shape == (1, 8, 4, 4) and load_recipe('ixi-4x')\n"
    )
    *verified, last = run("python", "-c", script).splitlines()
    assert verified == [f"{e['name']}: ok, sha256 {e['sha256']}" for e in list_weights() if not e["repo"]]
    file, scale = last.split()
    assert Path(file).is_relative_to(venv)
    assert scale == "4"
    assert " passed" in run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(away), str(away))


def test_the_checkpoints_fit_into_the_wheel() -> None:
    packaged = list((PACKAGE / "checkpoints").iterdir())
    assert sum(path.stat().st_size for path in packaged) < MAX_CHECKPOINTS
    assert all(path.stat().st_size <= 16 << 20 for path in packaged)
    assert {path.name for path in packaged} == {entry["file"] for entry in list_weights() if not entry["repo"]}


def test_the_manifest_is_a_file_of_the_package() -> None:
    """On Windows a checkout may have no symbolic links: then only the link at the top is broken, not the package."""
    assert not (PACKAGE / "weights_manifest.json").is_symlink()
    assert json.loads((ROOT / "weights_manifest.json").read_text("utf-8")) == json.loads(
        (PACKAGE / "weights_manifest.json").read_text("utf-8")
    )


# -------------------------------------------------------------------------------------------------- versions and names


def test_the_version_stands_in_one_place() -> None:
    assert settings()["metadata"]["version"] == "attr: deformmamba.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|(a|b|rc)\d+)?", deformmamba.__version__)
    assert f"\nversion: {deformmamba.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {deformmamba.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_every_python_that_is_declared_compiles_the_sources(version: str) -> None:
    assert f"Programming Language :: Python :: {version}" in settings()["metadata"]["classifiers"]
    minor = int(version.split(".")[1])
    for path in PACKAGE.rglob("*.py"):
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, minor))
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True, timeout=60).returncode:  # a stub fails
        pytest.skip(f"there is no python{version} here; its grammar was checked all the same")
    script = (
        "import pathlib, sys, warnings; warnings.simplefilter('error')\n"
        "for p in pathlib.Path(sys.argv[1]).rglob('*.py'): compile(p.read_text('utf-8'), str(p), 'exec')"
    )
    done = subprocess.run([python, "-c", script, str(PACKAGE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_everything_that_is_imported_is_declared() -> None:
    """Every imported package is a dependency, is in an extra, or is required by one of those packages."""
    brought_by = {
        "skimage": "scikit-image",
        "PIL": "pillow",
        "llvmlite": "numba",
        "onnx_ir": "onnxscript",
        "selective_scan_cuda": "mamba-ssm",
        "triton": "torch",
    }
    read = settings()
    declared = lines(read["options"]["install_requires"])
    declared += [line for extra in read["options.extras_require"].values() for line in lines(extra)]
    names = {re.split(r"[ <>=\[;]", line)[0].lower().replace("_", "-") for line in declared}
    ours = {"deformmamba", *sys.stdlib_module_names}
    missing = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for root in {module.split(".")[0] for module in modules} - ours:
                if brought_by.get(root, root).lower().replace("_", "-") not in names:
                    missing[root] = str(path.relative_to(ROOT))
    assert missing == {}


def test_the_licences_of_the_weights_are_declared() -> None:
    expression = settings()["metadata"]["license_expression"].lower()
    notice = (ROOT / "NOTICE").read_text("utf-8")
    for entry in list_weights():
        assert entry["license"] in expression.split(" and ")
        for source in entry["trained_on"]:
            assert source["source"] in notice, f"NOTICE does not name {source['source']} of {entry['name']}"
    for licence in expression.split(" and ")[1:]:
        assert (ROOT / "LICENSES" / f"{licence.upper()}.txt").is_file()


def test_dev_names_the_other_extras_and_tools_are_pinned() -> None:
    extras = {name: lines(text) for name, text in settings()["options.extras_require"].items()}
    (dev,) = extras.pop("dev")
    named = re.fullmatch(r"deformmamba\[([\w,]+)\]", dev)
    assert named
    assert set(named[1].split(",")) == set(extras) - {"cuda"}, "all but what needs a CUDA compiler"
    seen = [re.split(r"[ <>=\[;]", line)[0].lower() for lines_ in extras.values() for line in lines_]
    assert len(seen) == len(set(seen)), "a package stands in one extra only"
    for extra in ("lint", "docs"):
        assert all("==" in line or line == "deformmamba[lint]" for line in extras[extra])


def test_a_test_skips_without_its_extra_and_fails_with_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"deformmamba\[train\]"), skipped_without_extra():
        require("not_installed_here.part", extra="train", what="fit")
    (tmp_path / "installed_but_broken.py").write_text("from json import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match="no_such_name"), skipped_without_extra():
        require("installed_but_broken", extra="train", what="fit")


def test_extras_that_messages_name_exist() -> None:
    extras = set(settings()["options.extras_require"])
    named = set()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        named |= set(re.findall(r'\bextra="(\w+)"', text)) | set(re.findall(r"deformmamba\[(\w+)\]", text))
    assert named
    assert named <= extras


def test_type_checkers_take_the_public_names_as_exports() -> None:
    """Strict type checkers accept `import x as x` as an export. They cannot read `__all__`, which is computed."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = [alias for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert {alias.name for alias in seen} == set(deformmamba._HOME)
    assert all(alias.asname == alias.name for alias in seen)


@pytest.mark.parametrize("name", sorted(deformmamba._HOME))
def test_public_names_have_types(name: str) -> None:
    value = getattr(deformmamba, name)
    methods = vars(value).items() if inspect.isclass(value) else ()
    members = [value] if inspect.isfunction(value) else []
    members += [m for key, m in methods if inspect.isfunction(m) and (key == "__init__" or key[0] != "_")]
    for function in members:
        signature = inspect.signature(function)
        arguments = list(signature.parameters.values())[function is not value :]
        untyped = [argument.name for argument in arguments if argument.annotation is argument.empty]
        assert not untyped, f"{function.__qualname__}: {untyped} without a type"
        assert signature.return_annotation is not signature.empty, f"{function.__qualname__} says not what it returns"


def test_public_names_are_documented_and_nothing_else_is() -> None:
    """The API reference of the documentation and `__all__` list the same names."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.stem in ("api", "reference")]
    if not pages:
        pytest.skip("the documentation has no API reference yet")
    text = "\n".join(page.read_text("utf-8") for page in pages)
    assert {name for name in deformmamba._HOME if not re.search(rf"\b{name}\b", text)} == set()
    listed = re.findall(r"^::: deformmamba\.([\w.]+)", text, re.MULTILINE)
    assert {name for name in listed if "." not in name and name[0].isupper()} <= set(deformmamba._HOME)


# --------------------------------------------------------------------------------------------------------------- habits


def test_tests_are_selected_by_marks_that_exist(pytestconfig: pytest.Config) -> None:
    declared = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    for file in ("Makefile", ".ci/run"):
        if not (ROOT / file).exists():  # not in the source distribution
            continue
        for selection in re.findall(r"pytest.* -m \"(.+?)\"|PYTEST\) -m \"(.+?)\"", (ROOT / file).read_text("utf-8")):
            marks = set("".join(selection).split()) - {"not", "or", "and"}
            assert marks <= declared, f"{file}: {selection}"


def test_workflows_and_hooks_call_what_make_check_calls() -> None:
    make = (ROOT / "Makefile").read_text("utf-8")
    recipe = make.split("\nlint:")[1].split("\n\n")[0]
    assert "\ncheck: lint test" in make
    check = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text("utf-8"))["jobs"]["check"]
    assert any(step.get("run", "").startswith("make check") for step in check["steps"])
    matrix = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text("utf-8"))["jobs"]["check"]["strategy"]
    assert matrix["matrix"]["python"] == list(PYTHONS)
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]:
        assert repository["repo"] == "local", "nothing is fetched"
        for hook in repository["hooks"]:
            command = hook["entry"].replace(" --force-exclude", "")
            assert f"$(BIN)/{command}" in recipe, f"{command} is not what `make check` runs"


def test_issue_forms_are_whole() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text("utf-8"))
        assert form.keys() >= {"name", "description", "body"}
        assert all(field["attributes"]["label"] and field["type"] == "textarea" for field in form["body"])


def test_a_shell_that_asks_gets_completions(tmp_path: Path) -> None:
    """The test sets the environment variables of argcomplete's shell function and reads the answer from a file."""
    pytest.importorskip("argcomplete", reason="argcomplete is in the extra completion")

    def complete(line: str) -> set[str]:
        answer = tmp_path / "answer"
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
        command = [sys.executable, "-c", "from deformmamba.cli import main; main()"]
        subprocess.run(command, env={**os.environ, **asked}, timeout=60, check=True, capture_output=True)
        return {word.strip() for word in answer.read_text().split("\n")}

    assert complete("deformmamba we") == {"weights"}
    assert complete("deformmamba weights ") >= {"list", "show", "verify", "fetch", "publish"}
    assert complete("deformmamba weights publish --d") == {"--dry-run"}
