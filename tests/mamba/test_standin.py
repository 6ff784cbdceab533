"""The stand-ins for mamba_ssm and causal_conv1d: what they replace, what they do not change, how they are removed."""

import importlib
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close

import deformmamba.mamba as ours
from deformmamba.mamba import extensions, standin
from deformmamba.mamba.__main__ import main
from deformmamba.scan import backend_report


@pytest.fixture(autouse=True)
def _taken_back() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    ours.uninstall()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in standin.NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return ours.install(quiet=True)


def test_every_name_can_be_imported_and_goes_again(installed: list[str]) -> None:
    if set(installed) != {name.split(".")[0] for name in standin.NAMES}:
        pytest.skip("a package that has a stand-in is installed here")
    for name, given in standin.NAMES.items():
        module = importlib.import_module(name)
        assert all(getattr(module, key) is value for key, value in given.items())
    from mamba_ssm import Mamba  # type: ignore[import-not-found]
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    assert Mamba is ours.Mamba
    assert mamba_chunk_scan_combined is ours.mamba_chunk_scan_combined
    assert importlib.util.find_spec("mamba_ssm") is not None
    with pytest.raises(ImportError):
        from mamba_ssm import Mamba3  # noqa: F401
    with pytest.raises(AttributeError, match="mamba_ssm is a stand-in by deformmamba and has no 'Mamba3'; available:"):
        getattr(importlib.import_module("mamba_ssm"), "Mamba3")  # noqa: B009
    ours.uninstall()
    assert not any(name in sys.modules for name in standin.NAMES)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_a_package_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in standin.NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "causal_conv1d.py").write_text("causal_conv1d_fn = 'the real one'\n")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import mamba_ssm.part\nraise OSError('no GPU')\n")
    (tmp_path / "mamba_ssm" / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    roots = ours.install()
    assert "mamba_ssm" in roots
    assert "causal_conv1d" not in roots
    import causal_conv1d  # type: ignore[import-not-found]

    assert causal_conv1d.causal_conv1d_fn == "the real one"
    assert sys.modules["mamba_ssm"].Mamba is ours.Mamba
    assert "mamba_ssm.part" not in sys.modules
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "replaces selective_scan_cuda, " in said
    assert "left alone, because they can be imported: causal_conv1d" in said
    assert ours.install() == roots
    assert capsys.readouterr().err == ""
    del sys.modules["causal_conv1d"]


@pytest.mark.slow
def test_a_program_and_its_processes_have_the_stand_ins(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 3\n")
    (tmp_path / "real").mkdir()
    program = tmp_path / "real" / "program.py"
    program.write_text(
        "import multiprocessing, pickle, sys, beside\nfrom mamba_ssm import Mamba\n"
        "class Here: pass\n"
        "def child(): print('child', Mamba.__module__, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    one = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    one.start(); one.join()\n"
        "    assert type(pickle.loads(pickle.dumps(Here()))) is Here\n"
        "    print(Mamba.__module__, beside.value, *sys.argv[1:], __name__)\n"
        "    sys.exit(one.exitcode + 7)\n"
    )
    (tmp_path / "real" / "beside.py").write_text("value = 5\n")
    (tmp_path / "link.py").symlink_to(program)  # Python looks for modules beside the file itself
    command = [sys.executable, "-m", "deformmamba.mamba", str(tmp_path / "link.py"), "--flag", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = "child deformmamba.mamba.mamba_simple\ndeformmamba.mamba.mamba_simple 5 --flag x __main__\n"
    assert (done.stdout, done.returncode) == (expected, 7), done.stderr
    assert done.stderr.count("replaces") == 1


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Any:
    """Calls `main` with arguments in a folder; returns the exit code, stdout and stderr."""
    (tmp_path / "module_here.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    (tmp_path / "script.py").write_text("from .sibling import nothing\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("import mamba_ssm, beside\nprint('folder', mamba_ssm.__name__)\n")
    (tmp_path / "folder" / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deformmamba.mamba", *arguments])
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main()
        return code, *capsys.readouterr()

    return call


def test_programs_in_every_form_that_python_runs(run: Any, installed: list[str]) -> None:
    program = "import sys, mamba_ssm; print(mamba_ssm.__name__, sys.argv, __name__)"
    assert run("-c", program, "a", "-b")[:2] == (0, "mamba_ssm ['-c', 'a', '-b'] __main__\n")
    assert run("-", "a", stdin=program)[:2] == (0, "mamba_ssm ['-', 'a'] __main__\n")
    assert run("-m", "module_here", "-x")[:2] == (0, "__main__ ['-x']\n")
    assert run("folder")[:2] == (0, "folder mamba_ssm\n")
    with pytest.raises(SystemExit) as caught:
        run("-c", "raise SystemExit(3)")
    assert caught.value.code == 3
    with pytest.raises((ImportError, ImportWarning)):  # as Python itself
        run("script.py")


def test_what_cannot_be_run_is_named_in_one_line(run: Any) -> None:
    for arguments, expected in (
        (("-m",), "-m needs a module after it"),
        (("-c",), "-c needs code after it"),
        (("-O", "script.py"), "unknown option '-O'; usage: python -m deformmamba.mamba"),
        (("missing.py",), "cannot open the script 'missing.py': No such file or directory"),
        (("-m", "missing_module"), "there is no module named 'missing_module'"),
        (("-m", "missing.module"), "there is no module named 'missing.module'"),
        ((), "usage: python -m deformmamba.mamba (script.py"),
    ):
        code, _, said = run(*arguments)
        assert (code, said.count("\n")) == (2, 1)
        assert expected in said
    assert run("--help")[0] == 0


def test_a_folder_of_the_same_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str]
) -> None:
    if "selective_scan" not in installed:
        pytest.skip("selective_scan is installed here")
    ours.uninstall()
    (tmp_path / "selective_scan").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("selective_scan").__file__ is None
    assert "selective_scan" in ours.install(quiet=True)
    assert importlib.import_module("selective_scan").selective_scan_fn is ours.selective_scan_fn
    ours.uninstall()
    assert importlib.import_module("selective_scan").__file__ is None
    del sys.modules["selective_scan"]


def test_it_can_be_installed_from_many_threads_and_again(installed: list[str]) -> None:
    ours.uninstall()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ours.install(quiet=True), range(8)))
    assert found == [installed] * 8
    for name in [name for name in sys.modules if name.split(".")[0] == installed[-1]]:
        del sys.modules[name]  # by the program
    assert ours.install(quiet=True) == installed
    pickle.loads(pickle.dumps(spawn.get_preparation_data("x")["deformmamba"]))  # as a new process does
    ours.uninstall()
    ours.uninstall()
    assert "deformmamba" not in spawn.get_preparation_data("x")


def test_modules_that_mamba_ssm_pickled_run(installed: list[str]) -> None:
    """They have the attributes that mamba-ssm sets, which are not all of ours."""
    x = torch.randn(2, 5, 8)
    for module, missing in (
        (ours.Mamba(8), ("bimamba_type", "nslices", "if_divide_out")),
        (ours.RMSNorm(8), ("dropout_p",)),
    ):
        expected = module(x)
        for name in missing:
            del module.__dict__[name]
        assert_close(pickle.loads(pickle.dumps(module))(x), expected)
    norm = ours.RMSNorm(8)
    norm.drop = torch.nn.Dropout(1.0)
    assert not norm(x).any()
    assert norm.eval()(x).any()


def test_the_scan_does_not_take_the_stand_in_for_a_kernel(installed: list[str]) -> None:
    if "selective_scan_cuda" not in installed:
        pytest.skip("mamba-ssm is installed here")
    (row,) = (row for row in backend_report() if row.name == "mamba_ssm")
    assert not row.usable
    assert "stand-in" in row.why


# ---------------------------------------------------------------------------------------------------------- extensions


def scan_arguments(**kind: Any) -> list[torch.Tensor]:
    u, delta, z = (torch.randn(2, 4, 6, **kind) for _ in range(3))
    B, C = (torch.randn(2, 2, 3, 6, **kind) for _ in range(2))
    return [u, delta, -torch.rand(4, 3, **kind), B, C, torch.randn(4, **kind), z, torch.randn(4, **kind)]


def test_the_scan_extension_gives_values_and_gradients() -> None:
    given = [t.requires_grad_() for t in scan_arguments(dtype=torch.float64)]
    y, last = ours.selective_scan_fn(*given, True, True)
    plain, x, gated = extensions.scan_fwd(*given, True)
    assert_close(gated, y)
    assert_close(x[:, :, -1, 1::2], last)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, given, dy)
    du, ddelta, dA, dB, dC, dD, dbias, dz, again = extensions.scan_bwd(*given, dy, x, plain, None, True, True)
    assert_close([du, ddelta, dA, dB, dC, dD, dz, dbias], list(expected))
    assert_close(again, y)
    without = [*given[:6], given[7]]
    y2, x2 = extensions.cross_scan_fwd(*without, True, 1, True)
    assert_close(y2, plain)
    assert len(extensions.cross_scan_bwd(*without, dy, x2, True, 1)) == 7


def test_the_extension_for_one_state_leaves_its_axis_out() -> None:
    u, delta, A, B, C, D, _, bias = scan_arguments(dtype=torch.float64)
    short = [u, delta, A[:, 0], B[:, :, 0], C[:, :, 0], D, bias]
    y, x = extensions.one_state_fwd(*short, True, 1)
    full = [t.clone().requires_grad_() for t in (u, delta, A[:, :1], B[:, :, :1], C[:, :, :1], D, bias)]
    expected, last = ours.selective_scan_fn(*full[:6], None, full[6], True, True)
    assert_close(y, expected)
    assert_close(x[:, :, -1, 1::2], last)
    dy = torch.randn_like(y)
    found = extensions.one_state_bwd(*short, dy, x, True, 1)
    grads = torch.autograd.grad(expected, full, dy)
    assert [t.shape for t in found if t is not None] == [t.shape for t in short]
    assert_close(found, [t.reshape(like.shape) for t, like in zip(grads, short, strict=True)])


def test_the_convolution_extension_knows_every_version() -> None:
    x, weight, bias = torch.randn(2, 3, 7).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    y = ours.causal_conv1d_fn(x, weight, bias, activation="silu")
    out = torch.empty_like(x)
    for rest in ((True,), (None, True), (None, None, None, True), (None, None, out, None, True)):
        assert_close(extensions.conv_fwd(x, weight, bias, *rest), y)
    assert_close(out, y)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn_like(y)
    expected = list(torch.autograd.grad(ours.causal_conv1d_ref(*leaves, activation="silu"), leaves, dy))
    room = torch.empty_like(x)
    for rest in ((room, True), (None, room, True), (None, None, None, room, False, True)):
        assert_close(extensions.conv_bwd(x, weight, bias, dy, *rest)[:3], expected)
    assert_close(room, expected[0])
    with pytest.raises(TypeError, match="takes 4, 5, 7 or 8 arguments, got 6"):
        extensions.conv_fwd(x, weight, bias, None, None, True)


# -------------------------------------------------------------------------------------------------------- transformers


def test_functions_that_transformers_has_already_bound_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions are built as in transformers 5.16 and later; benchmarks/mamba.py runs the library itself."""
    module = type(sys)("transformers.models.made_up")

    def decorate(func_name: str, package: str) -> Any:
        def decorator(torch_function: Any) -> Any:
            implementation: Any = torch_function
            applicable_params: tuple[str, ...] = ("x",)
            is_new_implementation = False

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                torch_function, func_name, package, is_new_implementation  # noqa: B018
                return implementation(*args, **{k: v for k, v in kwargs.items() if k in applicable_params})

            return wrapped

        return decorator

    module.convolve = decorate("causal_conv1d_fn", "causal_conv1d")(lambda x, **_: "plain")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.models.made_up", module)
    assert module.convolve(1) == "plain"
    if "causal_conv1d" not in ours.install(quiet=True):
        pytest.skip("causal_conv1d is installed here")
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    assert torch.equal(
        module.convolve(x, weight, activation="silu", other=1), ours.causal_conv1d_fn(x, weight, None, "silu")
    )
    ours.uninstall()
    assert module.convolve(1) == "plain"
