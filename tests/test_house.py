"""The structure of the package: import levels, lazy imports, length of functions, public names."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import deformmamba

PACKAGE = Path(deformmamba.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# From bottom to top. A module imports modules of lower levels only; this includes imports inside functions. A folder
# counts as one module; its files may import each other. The public names (`__init__`) and `__main__` may import all.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("atomic", "errors"),
    ("annotations",),
    ("torch_private",),
    ("tensors",),
    ("compiled", "extras", "threads"),
    ("scan", "metrics", "physics", "weights"),
    ("deform", "losses"),
    ("layers", "flops"),
    ("models", "mamba"),
    ("volume",),
    ("data", "pictures"),
    ("inference",),
    ("evaluation",),
    ("training", "export"),
    ("cli",),
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
FREE = {"__init__", "__main__"}

# imported inside the functions that use them: users of other functions neither need these packages nor wait for them
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
    "torch._dynamo",  # torch's compiler: its import takes a second and imports Triton if installed
    "torchvision",
    "tqdm",
    "triton",
)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute name that a file imports, at any depth, with the line number."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_a_module_imports_lower_levels_only() -> None:
    found = []
    for path in FILES:
        module = module_of(path)
        if module in FREE:
            continue
        assert module in LEVEL, f"{module} is new: add it to LEVELS"
        for name, line in imports(path):
            root, *rest = name.split(".")
            ours = root == "deformmamba" and rest[0] not in (module, "__version__")
            if ours and LEVEL.get(rest[0], len(LEVELS)) >= LEVEL[module]:
                found.append(f"{path}:{line}: {module} may not import {rest[0]}, which is not on a lower level")
    assert not found, "\n".join(found)


def test_every_module_of_the_table_exists_or_is_planned() -> None:
    found = {module_of(path) for path in FILES} - FREE
    assert found <= set(LEVEL)
    assert len(LEVEL) == sum(map(len, LEVELS)), "a module stands on two levels"


# Lines of code that are still easy to read in one function; the docstring, comments and blank lines do not count.
LONGEST_FUNCTION = 60
# Exceptions: a kernel is one function, because it keeps its state in registers. The options of a command
# (`cli/*.py:add`) are a list, not a program, and may be longer too.
LONG_FUNCTIONS = {
    "scan/cpu_kernels.py:backward_job",
    "scan/triton_kernels.py:backward",
}


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    docstring = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
    texts = [
        source[n - 1].strip() for n in range(function.lineno, (function.end_lineno or 0) + 1) if n not in docstring
    ]
    return sum(bool(text) and not text.startswith("#") for text in texts)


def test_functions_are_short_enough_to_read() -> None:
    found = []
    for path in FILES:
        source = path.read_text("utf-8").splitlines()
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(PACKAGE).as_posix()}:{node.name}"
                n = lines_of_code(node, source)
                allowed = name in LONG_FUNCTIONS or (name.startswith("cli/") and node.name == "add")
                if n > LONGEST_FUNCTION and not allowed:
                    found.append(f"{name} has {n} lines of code")
    assert not found, "\n".join(found)


def test_what_the_command_parses_stays_in_the_command() -> None:
    """Functions below `cli` take explicit arguments, not a parsed command line, so that Python users can call them."""
    found = {module_of(path) for path in FILES for name, _ in imports(path) if name.split(".")[0] == "argparse"}
    assert found == {"cli"}


def test_modules_of_the_tests_are_found_by_one_name() -> None:
    """Folders of tests are no packages, so two files of one name are one module: the one that was imported first."""
    files = [path for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    names = [path.stem for path in files]
    assert sorted(names) == sorted(set(names))
    for path in files:
        used = {name.split(".")[0] for name, _ in imports(path)}
        assert "conftest" not in used, f"{path} imports from a conftest.py, and there are several"


def test_private_parts_of_pytorch_stand_in_one_file() -> None:
    """`torch_private` documents why each is needed, and a test fails when a release of PyTorch breaks it."""
    for path in FILES:
        used = [(name, line) for name, line in imports(path) if name.split(".")[0] == "torch"]
        attributes = [node for node in nodes(path) if isinstance(node, ast.Attribute)]  # of a.b.c also a.b
        attributes = [node for node in attributes if node.attr.startswith("_") or node.attr == "CDLL"]
        used += [(ast.unparse(node), node.lineno) for node in attributes]
        for name, line in used:
            parts = name.split(".")
            private = parts[0] == "torch" and any(part.startswith("_") and part[1:2] != "_" for part in parts)
            # cli/cores.py may open a library: it calls Linux's scheduler. ctypes.CFUNCTYPE alone opens none.
            library = name == "ctypes.CDLL" and module_of(path) != "cli"
            hook = library or parts[-1] in ("_orig_mod", "_dynamo_marked_constant")
            assert module_of(path) == "torch_private" or not (private or hook), f"{path}:{line}: {name}"


def test_nothing_here_unpickles_or_evaluates() -> None:
    found = []
    for path in FILES:
        for name, line in imports(path):
            if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve"):
                found.append(f"{path}:{line}: {name}")
        for node in nodes(path):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "exec" and path.parts[-2:] == ("mamba", "__main__.py"):
                    continue  # it runs the user's own program, as Python does
                if called in ("eval", "exec", "np.load", "numpy.load"):
                    found.append(f"{path}:{node.lineno}: {called}")
                if called == "torch.load":
                    safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    if safe.get("weights_only") != "True":
                        found.append(f"{path}:{node.lineno}: torch.load without weights_only")
    assert not found, "\n".join(found)


def test_what_is_raised_is_our_own() -> None:
    """The command line prints a `DeformMambaError` as one line, and any other exception as a bug report."""
    bare = {
        "Exception",
        "ValueError",
        "TypeError",
        "RuntimeError",
        "ArithmeticError",
        "FloatingPointError",
        "ImportError",
    }
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node.exc.func)}, see errors.py"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) in bare
    ]
    assert not found, "\n".join(found)


IMPORTED = [  # (code, modules that it must not load)
    ("import deformmamba", ("torch", "numpy", "safetensors", "einops", *LAZY)),
    ("import deformmamba; dir(deformmamba); deformmamba.__version__", ("torch", "numpy", *LAZY)),
    ("from deformmamba.cli import main; assert main(['--help']) == 0", ("torch", "numpy", *LAZY)),
    ("from deformmamba.cli import main; assert main(['upscale', '--help']) == 0", ("torch", *LAZY)),
    ("from deformmamba import SS2D; SS2D(8)", LAZY),
    ("import deformmamba.mamba as m; m.Mamba(8); m.Mamba2(8, headdim=4)", (*LAZY, "mamba_ssm", "causal_conv1d")),
    ("import deformmamba; deformmamba.MODELS['DeformMambaSR'].from_preset('tiny')", LAZY),
    ("import deformmamba as d, torch; d.MODELS['Bicubic'](scale=2)(torch.rand(1, 1, 8, 8))", LAZY),
    ("from deformmamba import degrade, psnr, ContrastiveEdgeLoss", LAZY),
    # and modules are attributes that need no second import
    ("import deformmamba; deformmamba.models.SRCNN; deformmamba.physics.kspace.degrade", LAZY),
]
LOADS = """
import os, sys, traceback
exec(sys.argv[1])
before = set(sys.modules)
for code in sys.argv[2:]:
    sys.stdout.flush()
    child = os.fork() if len(sys.argv) > 3 else 0
    if child:
        os.waitpid(child, 0)
        continue
    try:
        with open(os.devnull, "w") as sys.stdout:
            exec(code)
        sys.stdout = sys.__stdout__
        print(code, *sorted(set(sys.modules) - before), sep="\\t", flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The modules that each code of IMPORTED loads in a separate process, without those that torch itself imports."""
    found = {}
    without = [code for code, absent in IMPORTED if "torch" in absent]
    runs = [("", without), ("import torch, torch.utils.checkpoint", [c for c, _ in IMPORTED if c not in without])]
    if not hasattr(os, "fork"):
        runs = [(first, [code]) for first, codes in runs for code in codes]
    for first, codes in runs:
        command = [sys.executable, "-c", LOADS, first, *codes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found |= {code: set(names) for code, *names in (line.split("\t") for line in done.stdout.splitlines())}
    return found


@pytest.mark.portable
@pytest.mark.parametrize(("code", "absent"), IMPORTED)
def test_what_is_not_used_is_not_loaded(code: str, absent: tuple[str, ...], loaded: dict[str, set[str]]) -> None:
    assert "deformmamba" in loaded[code]
    assert loaded[code] & set(absent) == set()


@pytest.mark.parametrize("name", deformmamba.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(deformmamba, name)
    assert name in dir(deformmamba)
    if name in deformmamba._HOME:
        assert value is getattr(import_module(f"deformmamba.{deformmamba._HOME[name]}"), name)
        assert getattr(value, "__doc__", None), f"{name} has no docstring"


def test_dir_shows_the_public_names() -> None:
    assert dir(deformmamba) == sorted(deformmamba.__all__)


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
