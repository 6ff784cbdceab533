"""The choice of a backend, the list of backends, and refused arguments."""

import sys
import threading
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from tolerances import assert_close

from deformmamba import scan
from deformmamba.scan import (
    BACKENDS,
    ScanBackendError,
    backend_report,
    cpu,
    eager,
    mamba_ssm,
    operator,
    scan_backend,
    selective_scan,
    selective_scan_2d,
)


def arguments(**changes: Any) -> dict[str, Any]:
    """Small arguments of `selective_scan`."""
    make = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 6, 5), "delta": (2, 6, 5), "A": (6, 3), "B": (2, 2, 3, 5), "C": (2, 2, 3, 5)}
    return {name: torch.randn(shape, generator=make) for name, shape in shapes.items()} | changes


def arguments_2d(**changes: Any) -> dict[str, Any]:
    """Small arguments of `selective_scan_2d`."""
    make = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 3, 4, 6), "delta": (4, 2, 3, 4, 6), "A": (24, 2), "B": (2, 3, 4, 4, 2), "C": (2, 3, 4, 4, 2)}
    return {name: torch.randn(shape, generator=make) for name, shape in shapes.items()} | changes


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_no_steps_give_no_gradient_but_the_states(backend: str) -> None:
    make = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 6, 0), "delta": (2, 6, 0), "A": (6, 3), "B": (2, 3, 0), "C": (2, 3, 0), "D": (6,)}
    shapes |= {"delta_bias": (6,), "initial_state": (2, 6, 3)}
    given = {name: torch.randn(shape, generator=make).requires_grad_() for name, shape in shapes.items()}
    y, last = selective_scan(**given, return_last_state=True, backend=backend)
    assert y.shape == (2, 6, 0)
    assert last.equal(given["initial_state"])
    *others, state = torch.autograd.grad(y.sum() + 2 * last.sum(), list(given.values()))
    assert all(x.eq(0).all() for x in others)
    assert state.eq(2).all()


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize(("constant_B", "constant_C"), [(True, True), (True, False), (False, True)])
def test_constant_matrices_are_those_of_every_step(backend: str, constant_B: bool, constant_C: bool) -> None:
    """Mamba also accepts B and C of shape (d, n): constant over the steps, different for each channel."""
    make = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 6, 5), "delta": (2, 6, 5), "A": (6, 3), "B": (2, 2, 3, 5), "C": (2, 2, 3, 5)}
    given = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    wide = {name: given[name].repeat_interleave(3, 1) for name in "BC"}
    for name, constant in (("B", constant_B), ("C", constant_C)):
        if constant:
            given[name] = torch.randn(6, 3, generator=make)
            wide[name] = given[name][None, :, :, None].expand(2, 6, 3, 5)
    expected = selective_scan(**{**given, **wide}, backend="reference")
    assert_close(selective_scan(**given, backend=backend), expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that run, in order."""
    ran: list[str] = []
    for name, module in operator.MODULES.items():
        for function in ("scan", "forward"):
            if hasattr(module, function):
                original = getattr(module, function)
                monkeypatch.setattr(
                    module,
                    function,
                    lambda *args, name=name, original=original, **more: ran.append(name) or original(*args, **more),
                )
    return ran


# ------------------------------------------------------------------------------------------------------------ choosing


def test_the_device_chooses(calls: list[str]) -> None:
    selective_scan(**arguments())
    selective_scan_2d(**arguments_2d())
    assert calls == ["cpu", "cpu"]


def test_a_name_is_obeyed(calls: list[str]) -> None:
    with scan_backend("reference"):
        selective_scan(**arguments())
        with scan_backend("eager"):
            selective_scan(**arguments())
            selective_scan(**arguments(), backend="cpu")
            with scan_backend("auto"):
                selective_scan(**arguments())
        selective_scan_2d(**arguments_2d())
    selective_scan(**arguments())
    assert calls == ["reference", "eager", "cpu", "cpu", "reference", "cpu"]


def test_a_choice_ends_with_its_block(calls: list[str]) -> None:
    with pytest.raises(KeyError), scan_backend("eager"):
        raise KeyError
    selective_scan(**arguments())
    assert calls == ["cpu"]


def test_blocks_of_threads_may_end_in_any_order(calls: list[str]) -> None:
    """Thread A enters, B enters, A leaves, B leaves: torch.compile follows the last open block, then none."""
    entered, left, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with scan_backend("eager"):
            entered.set()
            assert left.wait(30)
            seen.append(scan._chosen_last)

    thread = threading.Thread(target=other)
    with scan_backend("cpu"):
        thread.start()
        assert entered.wait(30)
        assert scan._chosen_last == "eager"
    left.set()
    thread.join()
    assert [*seen, scan._chosen_last] == ["eager", "auto"]
    selective_scan(**arguments())
    assert calls == ["cpu"]


def test_threads_choose_for_themselves(calls: list[str]) -> None:
    with scan_backend("eager"):
        other = threading.Thread(target=lambda: selective_scan(**arguments()))
        other.start()
        other.join()
    assert calls == ["cpu"]


def test_backward_stays_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    u = given.pop("u").requires_grad_()
    backward, ran = cpu.backward, []
    monkeypatch.setattr(cpu, "backward", lambda *args, **more: ran.append("cpu") or backward(*args, **more))
    y = selective_scan(u, **given)
    with scan_backend("reference"):
        y.sum().backward()
    assert ran == ["cpu"]


def test_an_unknown_name_is_refused() -> None:
    message = f"unknown scan backend 'cuda'; backends: {', '.join(BACKENDS)}, auto"
    with pytest.raises(ScanBackendError, match=message), scan_backend("cuda"):
        pass
    with pytest.raises(ScanBackendError, match=message):
        selective_scan(**arguments(), backend="cuda")


def test_a_backend_that_cannot_says_why() -> None:
    given = {name: x.to("meta") for name, x in arguments().items()}
    assert "it runs on CPU tensors only, the tensor is on meta; move it" in str(cpu.unusable(given["u"]))
    with pytest.raises(ScanBackendError, match=r"'mamba_ssm' cannot run this: it runs on CUDA only, .* meta; move it"):
        selective_scan(**given, backend="mamba_ssm")
    with pytest.raises(ScanBackendError, match=r"'mamba_ssm' cannot run this: it runs on CUDA only, .* cpu; move it"):
        selective_scan(**arguments(), backend="mamba_ssm")


def test_auto_passes_over_what_cannot(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(cpu, "unusable", lambda tensor=None: "numba is broken; mend it")
    selective_scan(**arguments())
    assert calls == ["eager"]


def test_a_failing_kernel_is_not_retried_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cpu, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        selective_scan(**arguments())


def test_the_report_has_a_row_for_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "unusable", lambda tensor=None: "something is missing; get it; or do not")
    rows = {row.name: row for row in backend_report()}
    assert tuple(rows) == BACKENDS
    assert rows["reference"] == ("reference", True, "", "")
    assert rows["eager"] == ("eager", False, "something is missing", "get it; or do not")
    assert all(row.usable or (row.why and row.cure) for row in rows.values())


def test_numba_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba cannot be imported" in str(cpu.unusable())
    y = selective_scan(**arguments())
    assert isinstance(y, torch.Tensor)


def test_numba_without_its_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert "NUMBA_DISABLE_JIT is set" in str(cpu.unusable())
    selective_scan(**arguments())
    assert calls == ["eager"]


def test_every_backend_declares_what_it_can() -> None:
    for name, module in operator.MODULES.items():
        assert module.ABILITIES.dtypes[0] == torch.float32, name
        assert callable(module.unusable), name
        assert (name in operator.KERNELS) != (name in operator.PLAIN), name
    assert [name for name, module in operator.MODULES.items() if module.ABILITIES.transforms] == ["eager", "reference"]


# ----------------------------------------------------------------------------------------------------------- mamba-ssm


@pytest.mark.parametrize("kind", [OSError, RuntimeError, AttributeError, TypeError])
def test_mamba_ssm_is_probed_at_its_extension(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    """`import mamba_ssm` can succeed although the kernel does not work, and can fail in many ways."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert "extension cannot be imported" in str(mamba_ssm.unusable())

    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "selective_scan_cuda":
                raise kind("undefined symbol:\n _ZN3c10")

    monkeypatch.delitem(sys.modules, "selective_scan_cuda")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "(undefined symbol: _ZN3c10); pip install" in str(mamba_ssm.unusable())
    assert "undefined symbol" in next(row.why for row in backend_report() if row.name == "mamba_ssm")


def test_a_broken_triton_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *rest: Any) -> None:
            if name == "triton":
                raise RuntimeError("two versions")

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    row = next(row for row in backend_report() if row.name == "triton")
    assert not row.usable
    assert "Triton cannot be imported (two versions)" in row.why
    assert "pip install triton" in row.cure


def test_mamba_ssm_refuses_what_it_does_not_know() -> None:
    missing = mamba_ssm.ABILITIES.missing
    assert missing(16, False, False) is None
    assert "Euler step only" in str(missing(16, True, False))
    assert "initial_state" in str(missing(16, False, True))
    assert "256" in str(missing(257, False, False))


def test_mamba_ssm_refuses_zero_order_hold_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_ssm, "unusable", lambda tensor=None: None)
    with pytest.raises(ScanBackendError, match=r"'mamba_ssm' cannot run this.*Euler step only.*another backend"):
        selective_scan(**arguments(), discretization="zoh", backend="mamba_ssm")


def stand_in(selective_scan_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes mamba-ssm appear usable, with `selective_scan_fn` instead of its own function."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    monkeypatch.setattr(mamba_ssm, "unusable", lambda tensor=None: None)


@pytest.mark.parametrize("kind", ["sequence", "map"])
def test_mamba_ssm_gets_and_gives_the_right_layout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is tested with a function that has mamba-ssm's signature."""

    def selective_scan_fn(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *rest: Any) -> Any:
        assert all(x.is_contiguous() for x in (u, delta, B, C))
        return selective_scan(u, delta, A, B, C, D, z, *rest, backend="reference")

    stand_in(selective_scan_fn, monkeypatch)
    if kind == "sequence":
        options = {"D": torch.rand(6), "delta_bias": torch.rand(6), "delta_softplus": True, "return_last_state": True}
        results = [selective_scan(**arguments(**options), backend=name) for name in ("mamba_ssm", "reference")]
    else:
        given = arguments_2d(D=torch.rand(24), delta_bias=torch.rand(24))
        results = [selective_scan_2d(**given, backend=name) for name in ("mamba_ssm", "reference")]
    assert_close(*results)


# ------------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"u": torch.zeros(2, 6)}, ValueError, r"u must have shape \(b, d, l\), got \(2, 6\): 2 axes instead of 3"),
        ({"delta": torch.zeros(2, 6, 4)}, ValueError, r"delta must have shape \(b, d, l\), got \(2, 6, 4\): l is 5"),
        ({"A": torch.zeros(5, 3)}, ValueError, r"A must have shape \(d, n\), got \(5, 3\): d is 6"),
        ({"B": torch.zeros(2, 2, 4, 5)}, ValueError, r"B must have shape \(b, g, n, l\), got \(2, 2, 4, 5\): n is 3"),
        ({"C": torch.zeros(2, 1, 3, 5)}, ValueError, r"C must have shape .* g is 2"),
        ({"B": torch.zeros(2, 4, 3, 5), "C": torch.zeros(2, 4, 3, 5)}, ValueError, "B has 4 groups .* divide the 6"),
        ({"D": torch.zeros(3)}, ValueError, r"D must have shape \(d\), got \(3,\)"),
        ({"z": torch.zeros(2, 6, 1)}, ValueError, "z must have shape"),
        ({"delta_bias": torch.zeros(6, 1)}, ValueError, "delta_bias must have shape"),
        ({"initial_state": torch.zeros(2, 6, 2)}, ValueError, "initial_state must have shape .* n is 3"),
        ({"C": None}, TypeError, r"C must be a tensor \(b, g, n, l\), got NoneType"),
        ({"u": [1.0]}, TypeError, "u must be a tensor .* got list"),
        ({"A": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, "A must be floating point, got torch.int64"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, TypeError, "A is torch.complex64; complex numbers"),
        ({"D": torch.zeros(6, dtype=torch.float64)}, TypeError, "D is torch.float64 but u is torch.float32"),
        ({"D": torch.zeros(6, device="meta")}, ValueError, "D is on meta but u is on cpu"),
        ({"discretization": "bilinear"}, ValueError, "discretization must be 'euler' or 'zoh', got 'bilinear'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(2, 6, 4, 3)}, r"delta must have shape \(k, b, h, w, d\), got \(4, 2, 3, 4, 6\): h is 6"),
        ({"A": torch.zeros(6, 2)}, r"A must have shape \(k\*d, n\), got \(6, 2\): k\*d is 24"),
        ({"B": torch.zeros(2, 4, 3, 4, 2)}, r"B must have shape .* h is 3"),
        ({"C": torch.zeros(2, 3, 4, 1, 2)}, r"C must have shape .* k is 4"),
        ({"D": torch.zeros(6)}, r"D must have shape \(k\*d\), got \(6,\)"),
        ({"delta_weight": torch.zeros(24, 5)}, r"delta_weight must have shape \(k\*d, r\), got \(24, 5\): r is 6"),
    ],
)
def test_errors_name_the_argument_of_a_map(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**arguments_2d(**changes))


def test_other_numbers_of_directions_are_refused() -> None:
    given = {"delta": torch.zeros(3, 2, 3, 4, 6), "A": torch.zeros(18, 2)}
    three = torch.zeros(2, 3, 4, 3, 2)
    with pytest.raises(ValueError, match=r"delta has 3 directions .* 1, 2 or 4"):
        selective_scan_2d(**arguments_2d(**given, B=three, C=three))


def test_half_precision_and_float32_mix() -> None:
    given = arguments()
    y = selective_scan(**{**given, "u": given["u"].half(), "B": given["B"].bfloat16()})
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.float16


def test_mamba_ssm_has_no_gradient_of_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's backward pass ignores this gradient: without the error, the result would be wrong."""
    stand_in(partial(selective_scan, backend="reference"), monkeypatch)
    given = arguments() | {"u": arguments()["u"].clone().requires_grad_()}
    y, last = selective_scan(**given, return_last_state=True, backend="mamba_ssm")
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of the last state"):
        last.sum().backward()
