"""The Triton kernels of the scan: their results in Triton's interpreter, their compilation without a GPU, and on a GPU.

The interpreter must be selected before Triton is imported. So `test_in_the_interpreter` runs this file in a separate
process, in which the functions named `check_...` are the tests. If there is a GPU, `test_on_a_gpu` runs sizes that fill
it.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close

from deformmamba.scan import reference, selective_scan, selective_scan_2d, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed, a CUDA build of torch brings it")

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")


def arguments(
    k: int, b: int, g: int, size: tuple[int, int], r: int, n: int, *,
    sequence: bool = False, softplus: bool = True, bare: bool = False, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Random arguments of the operation in `operator`: maps with channels last, or sequences with steps last."""
    h, w = size
    make = torch.Generator().manual_seed(0)
    shapes = {"u": (b, g, r, h * w), "delta": (k, b, g, r, h * w), "A": (k, g, r, n), "B": (k, b, g, n, h * w),
              "C": (k, b, g, n, h * w), "D": (k, g, r), "delta_bias": (k, g, r),
              "initial_state": (k, b, g, r, n)}  # fmt: skip
    given: dict[str, Any] = {name: torch.randn(shape, generator=make).to(device) for name, shape in shapes.items()}
    given["A"] = -torch.exp(given["A"])
    if not softplus:
        given["delta"] = given["delta"].abs() / 4
    for name in ("u", "delta", "B", "C"):
        given[name] = given[name].to(dtype).transpose(-1, -2)
        if not sequence:
            given[name] = given[name].contiguous()
    if bare:
        given |= {"D": None, "delta_bias": None, "initial_state": None}
    return {**given, "height": h, "width": w, "delta_softplus": softplus, "zoh": False}


def differences(given: dict[str, Any], seed: int = 1) -> dict[str, float]:
    """Errors of values and gradients against the definition in float64, relative to the largest number of each."""
    y, last, kept = triton.forward(**given, keep=True)
    assert y.dtype == given["u"].dtype
    assert y.stride() == torch.empty_like(given["u"]).stride()
    exact: dict[str, Any] = {
        k: x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for k, x in given.items()
    }
    exact_y, exact_last = reference.scan(**exact)
    make = torch.Generator().manual_seed(seed)
    dy, dlast = (torch.randn(x.shape, generator=make).to(x) for x in (y, last))
    total = (exact_y * dy.double()).sum() + (exact_last * dlast.double()).sum()
    leaves = {k: exact[k] for k in NAMES if exact[k] is not None}
    wanted = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    inputs = {k: x for k, x in given.items() if k != "initial_state"}
    gradients = dict(zip(NAMES, triton.backward(**inputs, kept=kept, dy=dy, dlast=dlast), strict=True))
    for name in ("u", "delta", "A", "B", "C"):
        assert gradients[name].dtype == given[name].dtype
        assert gradients[name].stride() == torch.empty_like(given[name]).stride()
    pairs = {"y": (y, exact_y), "last": (last, exact_last), **{k: (gradients[k], x) for k, x in wanted.items()}}
    return {k: ((x.double() - e).abs().max() / e.abs().max()).item() for k, (x, e) in pairs.items()}


def close(given: dict[str, Any]) -> None:
    allowed = 2e-6 if given["u"].dtype == torch.float32 else 8e-3 if given["u"].dtype == torch.bfloat16 else 1e-3
    for name, error in differences(given).items():
        assert error < allowed, f"{name}: {error:.1e}"


# -------------------------------------------------------------------------------------------------- in the interpreter


@pytest.mark.long
@TRITON
def test_in_the_interpreter() -> None:
    options = ["-p", "no:cacheprovider", "-o", "python_functions=check_*", "-o", "addopts=", "-q", "-W", "error"]
    # numpy warns about divisions by zero and similar, even if a `where` does not select their results
    options += ["-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\d\d passed", child.stdout)
    assert "skipped" not in child.stdout


if INTERPRETED:
    import numpy as np
    import triton as compiler
    import triton.language as tl
    from triton.runtime import interpreter

    def _scan_by_steps(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        """An associative scan that combines all lanes at once; the interpreter's own combines one number at a time."""
        rows = zip(*(np.split(x.handle.data, x.handle.data.shape[self.axis], self.axis) for x in inputs), strict=True)
        done = [[self.to_tensor(row, x.dtype) for row, x in zip(step, inputs, strict=True)] for step in rows]
        for i in range(1, len(done)):
            done[i] = list(self.combine_fn.fn(*done[i - 1], *done[i]))
        columns = ([x.handle.data for x in column] for column in zip(*done, strict=True))
        return [
            self.to_tensor(np.concatenate(column, self.axis), x.dtype)
            for column, x in zip(columns, inputs, strict=True)
        ]

    interpreter.ScanOps.generic_scan = _scan_by_steps

    from deformmamba.scan import triton_kernels

    @compiler.jit
    def _both_ways(numbers, results, kind: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
        """f(f(x, y), z) and f(x, f(y, z)) for a combination f of the kernels."""
        i = tl.arange(0, 16)
        x1, x2, x3, y1, y2, y3, z1, z2, z3 = (
            tl.load(numbers + i), tl.load(numbers + 16 + i), tl.load(numbers + 32 + i),
            tl.load(numbers + 48 + i), tl.load(numbers + 64 + i), tl.load(numbers + 80 + i),
            tl.load(numbers + 96 + i), tl.load(numbers + 112 + i), tl.load(numbers + 128 + i),
        )  # fmt: skip
        if wide:
            a1, a2, a3 = kind(x1, x2, x3, y1, y2, y3)
            a1, a2, a3 = kind(a1, a2, a3, z1, z2, z3)
            b1, b2, b3 = kind(y1, y2, y3, z1, z2, z3)
            b1, b2, b3 = kind(x1, x2, x3, b1, b2, b3)
            tl.store(results + 64 + i, a3)
            tl.store(results + 80 + i, b3)
        else:
            a1, a2 = kind(x1, x2, y1, y2)
            a1, a2 = kind(a1, a2, z1, z2)
            b1, b2 = kind(y1, y2, z1, z2)
            b1, b2 = kind(x1, x2, b1, b2)
        tl.store(results + i, a1)
        tl.store(results + 16 + i, b1)
        tl.store(results + 32 + i, a2)
        tl.store(results + 48 + i, b2)


@pytest.mark.parametrize("name", ["after", "after_apart", "before"])
def check_combinations_are_associative(name: str) -> None:
    """The interpreter combines step by step; a GPU may combine neighbouring steps in any order."""
    numbers = torch.rand(9, 16) + 0.1
    results = torch.zeros(6, 16)
    _both_ways[(1,)](numbers, results, getattr(triton_kernels, name), name != "after")
    assert_close(results[0::2], results[1::2])
    assert (results[2:4] > 0).all()


SHAPES = {  # (k, b, g, (h, w), r, n), zoh; in the interpreter tiles have 8 steps and 16 channels, stretches 4 tiles
    "one step": ((1, 1, 1, (1, 1), 3, 2), False),
    "odd length, several groups": ((1, 2, 2, (1, 11), 3, 3), True),
    "several stretches and chunks": ((1, 1, 1, (1, 140), 2, 2), False),
    "one direction, several blocks": ((1, 1, 1, (3, 6), 18, 5), True),
    "two directions": ((2, 2, 1, (2, 3), 3, 3), False),
    "four directions": ((4, 1, 1, (3, 7), 6, 2), False),
    "two directions, groups, stretches": ((2, 1, 2, (6, 7), 2, 1), True),
}


@pytest.mark.parametrize("case", SHAPES)
def check_values_and_gradients(case: str) -> None:
    shape, zoh = SHAPES[case]
    close({**arguments(*shape), "zoh": zoh})


@pytest.mark.parametrize("case", ["odd length, several groups", "several stretches and chunks"])
def check_sequences_with_consecutive_steps(case: str) -> None:
    shape, zoh = SHAPES[case]
    given = {**arguments(*shape, sequence=True), "zoh": not zoh}
    assert given["u"].stride(2) == 1
    close(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("sequence", [False, True], ids=["map", "sequence"])
def check_half_precision(sequence: bool, dtype: torch.dtype) -> None:
    close(arguments(1 if sequence else 2, 1, 1, (1, 21) if sequence else (3, 5), 4, 2, sequence=sequence, dtype=dtype))


def check_nothing_optional() -> None:
    close(arguments(2, 1, 1, (3, 4), 3, 2, softplus=False, bare=True))


def check_small_rates_of_the_hold() -> None:
    """(exp(dt A) - 1) / A and its derivative near 0, on both sides of the limit below which a series replaces them."""
    given = arguments(1, 1, 1, (1, 4), 12, 1, softplus=False, bare=True)
    given["A"][0, 0, :, 0] = torch.tensor([0, 1e-30, -1e-6, 1e-3, -0.1, 0.3, -0.499, 0.499, -0.501, 0.501, -2, 3])
    given["delta"][:] = 1
    close({**given, "zoh": True})


def check_pieces_equal_the_whole() -> None:
    whole = arguments(1, 1, 1, (1, 30), 3, 2, sequence=True)
    y, last, _ = triton.forward(**whole, keep=False)
    ys, state = [], whole["initial_state"]
    for part in (slice(0, 1), slice(1, 20), slice(20, 30)):
        steps = {k: whole[k][..., part, :] for k in ("u", "delta", "B", "C")}
        piece = {**whole, **steps, "initial_state": state, "width": steps["u"].shape[2]}
        y_piece, state, kept = triton.forward(**piece, keep=False)
        assert kept.shape[3] == 0
        ys.append(y_piece)
    assert_close(torch.cat(ys, 2), y)
    assert_close(state, last)


def check_kept_states() -> None:
    """The kept states are those before every chunk of CHUNK steps in scan order, for any tiles and stretches."""
    given = arguments(2, 1, 1, (20, 15), 2, 1)
    _, last, kept = triton.forward(**given, keep=True)
    assert kept.shape == (2, 1, 1, 3, 1, 2)
    assert_close(kept[:, :, :, 0], given["initial_state"].transpose(-1, -2))
    forth = {k: x[:1] if k in NAMES[1:] else x for k, x in given.items()}
    flat = {**forth, "height": 1, "width": 2 * triton.CHUNK} | {
        k: forth[k][..., : 2 * triton.CHUNK, :] for k in ("u", "delta", "B", "C")
    }
    torch.testing.assert_close(kept[:1, :, :, 2], reference.scan(**flat)[1].transpose(-1, -2), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(last.transpose(-1, -2), kept[:, :, :, 2], rtol=1e-5)


def check_any_memory_layout() -> None:
    given = arguments(2, 1, 2, (2, 3), 3, 2)

    def scattered(x: torch.Tensor) -> torch.Tensor:
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))

    def sliced(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]

    for layout in (scattered, sliced):
        close({k: layout(x) if isinstance(x, torch.Tensor) else x for k, x in given.items()})
    close({**given, "C": scattered(given["C"])})


@pytest.mark.parametrize("name", NAMES)
def check_special_values_come_out_where_the_reference_lets_them(name: str) -> None:
    for value, zoh in itertools.product((math.nan, math.inf, -math.inf), {False, name in ("delta", "A", "delta_bias")}):
        if (name, value) == ("A", math.inf):
            continue  # a stretch starts from state 0, and its growth is infinite: 0 * inf
        given = {**arguments(1, 1, 1, (1, 40), 6, 2), "zoh": zoh}
        given[name].view(-1)[given[name].numel() // 2 + 1] = value
        for got, exact in zip(triton.forward(**given, keep=False), reference.scan(**given), strict=False):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert kind(got).equal(kind(exact)), (value, zoh, kind.__name__)


def check_not_a_number_in_gradients() -> None:
    """A NaN in dy gives NaN where the reference does: in the steps before it, and in its channel's parameters."""
    given = arguments(1, 1, 1, (1, 22), 6, 2, bare=True)
    y, last, kept = triton.forward(**given, keep=True)
    dy = torch.ones_like(y)
    dy[0, 0, 13, 4] = math.nan
    leaves = {k: given[k].requires_grad_() for k in ("u", "delta", "A", "B", "C")}
    exact = torch.autograd.grad((reference.scan(**given)[0] * dy).sum(), list(leaves.values()))
    given |= {k: x.detach() for k, x in leaves.items()}
    got = triton.backward(**{k: x for k, x in given.items() if k != "initial_state"}, kept=kept, dy=dy, dlast=0 * last)
    for name, x, e in zip(leaves, got, exact, strict=False):
        assert x.isnan().equal(e.isnan()), name
        assert x.isnan().any(), name
        assert not x.isnan().all(), name


def check_extremes_stay_finite() -> None:
    for zoh in (False, True):
        given = {**arguments(2, 1, 1, (4, 5), 4, 2, dtype=torch.bfloat16), "zoh": zoh}
        given["delta"].view(-1)[::3] = 3e4
        given["delta"].view(-1)[1::3] = -3e4
        given["A"].view(-1)[::2] = -1e6
        y, last, kept = triton.forward(**given, keep=True)
        inputs = {k: x for k, x in given.items() if k != "initial_state"}
        gradients = triton.backward(**inputs, kept=kept, dy=torch.ones_like(y), dlast=torch.ones_like(last))
        assert all(x.isfinite().all() for x in (y, last, kept, *gradients))


@pytest.mark.parametrize("sizes", [(0, 5, 6), (2, 0, 6), (2, 5, 0)], ids=["no image", "no steps", "no channels"])
def check_empty(sizes: tuple[int, int, int]) -> None:
    b, length, r = sizes
    given = arguments(1, b, 1, (1, length), r, 2)
    y, last, kept = triton.forward(**given, keep=True)
    assert y.shape == given["u"].shape
    assert last.equal(given["initial_state"])
    gradients = triton.backward(
        **{k: x for k, x in given.items() if k != "initial_state"}, kept=kept, dy=y, dlast=torch.ones_like(last)
    )
    assert [x.shape for x in gradients] == [given[k].shape for k in NAMES]
    assert not any(x.any() for x in gradients[:-1])
    assert (gradients[-1] == 1).all()


def check_the_operator_keeps_its_promises() -> None:
    """Schema, fake shapes and strides, and autograd: torch.compile and torch.export depend on them."""
    given = arguments(2, 1, 1, (2, 3), 3, 2)
    leaves = [given[k].requires_grad_() for k in NAMES]
    given_2d = ("triton", *leaves, 2, 3, True, False, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.deformmamba.scan, given_2d, test_utils=checks)


def check_both_public_functions() -> None:
    make = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 1, 6, 11, generator=make).unbind()
    A, B = -torch.rand(6, 2, generator=make), torch.randn(1, 2, 2, 11, generator=make)
    results = [selective_scan(u, delta, A, B, B, delta_softplus=True, backend=name) for name in ("triton", "reference")]
    assert_close(*results)
    u, delta = torch.randn(1, 3, 4, 6, generator=make), torch.randn(2, 1, 3, 4, 6, generator=make)
    A, B = -torch.rand(12, 2, generator=make), torch.randn(1, 3, 4, 2, 2, generator=make)
    maps = [selective_scan_2d(u, delta, A, B, B, backend=name) for name in ("triton", "reference")]
    assert_close(*maps)


# ------------------------------------------------------------------------------------------------------------ compiling


class _Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid: tuple[int]) -> Any:
        assert grid[0] > 0
        return lambda **values: self.launches.append((self.kernel, values))


def _launched(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Every kernel launch of a forward and a backward pass on a GPU."""
    from deformmamba.scan import triton_kernels

    launches: list[tuple[Any, dict[str, Any]]] = []
    for name in ("forward", "carry_on", "backward"):
        monkeypatch.setattr(triton_kernels, name, _Recorder(getattr(triton_kernels, name), launches))
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 132)
    y, last, kept = triton.forward(**given, keep=True)
    triton.backward(**{k: x for k, x in given.items() if k != "initial_state"}, kept=kept, dy=y, dlast=last)
    return launches


def _compiled(kernel: Any, values: dict[str, Any]) -> Any:
    """The kernel as compiled by `kernel[grid](**values)`, but always for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, special = values[parameter.name], not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = types[value.dtype], value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and special):
            signature[parameter.name], constants[(i,)], aligned = "constexpr", value, False
        else:
            signature[parameter.name], aligned = "i32", value % 16 == 0 and special
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: values[k] for k in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _resources(binary: bytes) -> dict[str, int]:
    """Registers and bytes of stack (spilled registers) of a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", listing)}


COMPILED = {
    "maps": arguments(2, 1, 1, (64, 64), 192, 16),
    "narrow maps in half precision": arguments(4, 1, 1, (30, 17), 32, 16, dtype=torch.bfloat16, bare=True),
    "sequences": arguments(1, 1, 1, (1, 4096), 128, 16, sequence=True),
    "odd sequences in half precision": arguments(1, 1, 2, (1, 999), 40, 5, sequence=True, dtype=torch.float16),
}


@TRITON
@pytest.mark.long
@pytest.mark.parametrize("zoh", [False, True], ids=["euler", "zoh"])
@pytest.mark.parametrize("kind", COMPILED)
def test_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str, zoh: bool) -> None:
    """They compile to machine code for an H100, without having one, and almost no register is spilled."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton was built without its NVIDIA compiler")
    kernels = {}
    for kernel, values in _launched(monkeypatch, {**COMPILED[kind], "zoh": zoh}):
        binary = _compiled(kernel, values).asm["cubin"]
        kernels[binary] = kernel.__name__, _resources(binary)
    assert {name for name, _ in kernels.values()} == {"forward", "carry_on", "backward"}
    for name, resources in kernels.values():
        print(f"{kind}, {name}: {resources['REG']} registers, {resources['STACK']} bytes of stack")
        assert resources["STACK"] <= 512


# ------------------------------------------------------------------------------------------------------------- refusing


@TRITON
def test_unusable_says_why_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.empty(0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device; use backend 'cpu'" in str(triton.unusable())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert triton.unusable() is None
    assert triton.unusable(cpu) == "it runs on CUDA tensors only, the tensor is on cpu; move it to the GPU"
    assert "float64; use float32" in str(triton.unusable(cpu.double()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0 or more" in str(triton.unusable())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.unusable(cpu) is None
    assert "float64" in str(triton.unusable(cpu.double()))


def test_unusable_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert re.fullmatch(r"Triton cannot be imported \(.*\); pip install triton .*", str(triton.unusable()))


@pytest.mark.parametrize("length", [1, 7, 100, 999, 4096, 65536])
@pytest.mark.parametrize("images", [1, 8, 3000])
def test_a_gpu_is_filled_and_nothing_left_out(monkeypatch: pytest.MonkeyPatch, images: int, length: int) -> None:
    monkeypatch.setattr(triton, "_multiprocessors", lambda device: 132)
    for channels, back in itertools.product((5, 32, 192), (False, True)):
        u = torch.empty(images, 1, length, channels, device="meta")
        A, B = torch.empty(1, 1, channels, 2, device="meta"), torch.empty(1, images, 1, length, 2, device="meta")
        cut = triton._Launches(u, u[None], A, B, B, None, None, 1, length, True, False).cut(back=back)
        assert cut.steps * cut.tiles * cut.splits >= length
        assert cut.steps * cut.tiles * (cut.splits - 1) < length
        programs = images * -(-channels // cut.lanes)
        assert (cut.splits == 1) == (programs > 600 or length <= 4 * cut.steps)
        if programs * length > 2**20:
            assert programs * cut.splits > 500
        assert triton.CHUNK % cut.steps == 0


def test_too_large_an_image_is_refused() -> None:
    u = torch.empty(1, 1, 2**20, 2**11, device="meta")
    A, B = torch.empty(1, 1, 2**11, 1, device="meta"), torch.empty(1, 1, 1, 2**20, 1, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 values .* below 2\^31; use backend 'eager'"):
        triton.forward(u, u[None], A, B, B, None, None, None, 2**10, 2**10, True, False, False)
    u, A, B = u[..., :7], A[:, :, :7].expand(1, 1, 7, 2**11), B.expand(1, 1, 1, 2**20, 2**11)
    with pytest.raises(ValueError, match="2147483648 values"):  # in B and C
        triton.forward(u, u[None], A, B, B, None, None, None, 2**10, 2**10, True, False, False)


def test_rows_of_b_and_c_that_lie_too_far_apart_are_copied() -> None:
    """B may be a few channels of a wide projection: then one image of B can span more than 2^31 numbers in memory."""
    length, n = 2**22, 4
    u, A = torch.empty(1, 1, length, 8, device="meta"), torch.empty(1, 1, 8, n, device="meta")
    for apart, copied in ((512, False), (513, True)):
        B, C = torch.empty(1, 1, 1, length, apart, device="meta")[..., -2 * n :].split(n, -1)
        walk = triton._Launches(u, u[None], A, B, C, None, None, 2**11, 2**11, True, False)
        assert walk.B.is_contiguous() == walk.C.is_contiguous() == copied


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("zoh", [False, True], ids=["euler", "zoh"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, (1, 2048), 96, 16),
        (1, 1, 4, (1, 999), 200, 16),
        (4, 1, 1, (40, 56), 192, 16),
        (4, 70, 1, (9, 7), 33, 5),
    ],
    ids=str,
)
def test_on_a_gpu(shape: Any, zoh: bool, dtype: torch.dtype) -> None:
    """Sizes that fill a GPU, with one stretch and with many, in both memory orders; every run gives the same bits."""
    if not torch.cuda.is_available():
        assert os.environ.get("DEFORMMAMBA_GPU") != "1", "DEFORMMAMBA_GPU=1, but PyTorch finds no GPU"
        pytest.skip("no GPU: the kernels ran in the interpreter and were compiled for one")
    for sequence in (False, True) if shape[0] == 1 else (False,):
        given = {**arguments(*shape, sequence=sequence, dtype=dtype, device="cuda"), "zoh": zoh}
        for name, error in differences(given).items():
            assert error < (2e-5 if dtype == torch.float32 else 8e-3), f"{name}: {error:.1e}"
        first, second = (triton.forward(**given, keep=True) for _ in range(2))
        assert all(x.equal(y) for x, y in zip(first, second, strict=True))
        dy, dlast = torch.randn_like(first[0]), torch.randn_like(first[1])
        inputs = {k: x for k, x in given.items() if k != "initial_state"}
        once, twice = (triton.backward(**inputs, kept=first[2], dy=dy, dlast=dlast) for _ in range(2))
        assert all(x.equal(y) for x, y in zip(once, twice, strict=True))
