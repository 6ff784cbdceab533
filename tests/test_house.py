"""The rules of the house that a reader relies on: who imports whom, what loads when, which names are public."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import deformmamba

PACKAGE = Path(deformmamba.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# Whom each module may import, inside functions too. A folder counts as one module; what a module imports of itself is
# free. The command line and the public names may import all.
DIRECTIONS: dict[str, set[str]] = {
    "threads": set(),
    "scan": {"threads"},
    "extras": set(),
    "kspace": set(),
    "losses": set(),
    "metrics": {"extras"},
    "statistics": set(),
    "tiling": set(),
    "volume": set(),
    "checkpoint": set(),
    "cards": set(),
    "hub": {"checkpoint"},
    "weights": {"cards", "checkpoint", "hub"},
    "deform": {"scan", "deform_cpu"},
    "deform_cpu": {"deform", "threads"},
    "flops": {"scan", "deform_cpu"},
    "layers": {"scan", "deform"},
    "models": {"layers", "checkpoint", "weights", "kspace", "extras"},
    "degradations": {"kspace"},
    "prepared": {"volume"},
    "data": {"kspace", "volume", "degradations", "prepared"},
    "datasets": {"data", "prepared", "volume", "extras"},
    "inspection": {"kspace", "volume", "models"},
    "report": {"volume", "figures", "inspection", "kspace"},
    "inference": {"degradations", "models", "tiling", "volume", "kspace", "inspection", "report", "weights"},
    "cohort": {"models", "inference", "volume"},
    "adapters": {"models", "inference", "volume"},
    "export": {"models", "kspace", "scan", "extras"},
    "figures": {"metrics", "volume"},
    "evaluation": {
        *("metrics", "statistics", "degradations", "models", "data", "inference", "kspace", "figures", "volume"),
    },
    "assessment": {
        *("data", "degradations", "inference", "inspection", "kspace", "metrics", "models", "statistics", "volume"),
    },
    "curves": {"data", "degradations", "figures", "inference", "models", "volume"},
    "training": {"losses", "models", "data", "evaluation", "extras", "checkpoint", "weights", "volume", "curves"},
    "tables": {
        *("training", "evaluation", "data", "degradations", "models", "losses", "metrics", "statistics", "extras"),
        *("figures", "volume"),
    },
}
FREE = {"__init__", "__main__", "cli"}

# imported where they are used, so that neither a missing nor a slow one is in the way of those who do not use it
LAZY = (
    "accelerate",
    "h5py",
    "huggingface_hub",
    "mamba_ssm",
    "matplotlib",
    "nibabel",
    "numba",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pydicom",
    "scipy",
    "skimage",
    "spandrel",
    "torch._dynamo",  # torch's compiler: a second of imports, and Triton where there is one
    "torchvision",
    "tqdm",
    "triton",
)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute name that a file imports, wherever in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_in_the_directions_of_the_table(path: Path) -> None:
    module = module_of(path)
    if module in FREE:
        return
    assert module in DIRECTIONS, f"{module} is new: say in the table whom it may import"
    for name, line in imports(path):
        root, *rest = name.split(".")
        if root == "deformmamba":
            assert rest[0] in DIRECTIONS[module] | {module, "__version__"}, (
                f"{path}:{line}: {module} may not import {rest[0]}"
            )


def test_the_table_has_no_circle() -> None:
    order: list[str] = []
    waiting = dict(DIRECTIONS) | {"deform": DIRECTIONS["deform"] - {"deform_cpu"}}  # deform and its kernels are one
    while waiting:
        ready = [name for name, others in waiting.items() if others <= set(order)]
        assert ready, f"a circle among {sorted(waiting)}"
        order += ready
        waiting = {name: others for name, others in waiting.items() if name not in ready}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_here_unpickles_or_evaluates(path: Path) -> None:
    assert not {name.split(".")[0] for name, _ in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "np.load", "numpy.load"), f"{path}:{node.lineno}: {called}"
            if called == "torch.load":
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("weights_only") == "True", f"{path}:{node.lineno}: torch.load without weights_only"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import deformmamba", ("torch", "numpy", "safetensors", "einops", *LAZY)),
        ("import deformmamba; dir(deformmamba); deformmamba.__version__", ("torch", "numpy", *LAZY)),
        ("from deformmamba.cli import main; assert main(['--help']) == 0", ("torch", "numpy", *LAZY)),
        ("from deformmamba.cli import main; assert main(['upscale', '--help']) == 0", ("torch", *LAZY)),
        ("from deformmamba import SS2D; SS2D(8)", LAZY),
        ("import deformmamba; deformmamba.MODELS['DeformMambaSR'].from_preset('tiny')", LAZY),
        ("import deformmamba as d, torch; d.MODELS['Bicubic'](scale=2)(torch.rand(1, 1, 8, 8))", LAZY),
        ("from deformmamba import degrade, psnr, ContrastiveEdgeLoss", LAZY),
    ],
)
def test_what_is_not_used_is_not_loaded(code: str, absent: tuple[str, ...]) -> None:
    # what torch itself loads is torch's affair
    torch = "" if "torch" in absent else "import torch, torch.utils.checkpoint\n"
    script = f"import sys\n{torch}before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "deformmamba" in loaded
    assert loaded & set(absent) == set()


@pytest.mark.parametrize("name", deformmamba.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(deformmamba, name)
    assert name in dir(deformmamba)
    if name in deformmamba._HOME:
        assert value is getattr(import_module(f"deformmamba.{deformmamba._HOME[name]}"), name)
        assert getattr(value, "__doc__", None), f"{name} has no docstring"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        alias.name: str(node.module).removeprefix("deformmamba.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == deformmamba._HOME
    assert len(deformmamba.__all__) == len(set(deformmamba.__all__))


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'SS3D'; public names: __version__, .*SS2D"):
        deformmamba.SS3D  # noqa: B018
