"""The stand-ins for mamba_ssm and causal_conv1d: what they replace, what they do not change, how they are removed."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
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
def test_a_program_runs_with_the_stand_ins(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 3\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, beside\nfrom mamba_ssm import Mamba\n"
        "print(Mamba.__module__, beside.value, *sys.argv[1:], __name__)\n"
    )
    command = [sys.executable, "-m", "deformmamba.mamba", str(program), "--flag", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "deformmamba.mamba.modules 3 --flag x __main__\n", done.stderr
    assert "replaces" in done.stderr


def test_without_a_program_it_says_how(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["deformmamba.mamba"])
    assert main() == 2
    assert "usage: python -m deformmamba.mamba [-m] program" in capsys.readouterr().err


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
