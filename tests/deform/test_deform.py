"""Modulated deformable convolution: each implementation against a loop, torchvision, `conv2d`, finite differences."""

import itertools
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from deformmamba import deform
from deformmamba.deform import IMPLEMENTATIONS, modulated_deform_conv2d
from deformmamba.deform import cpu as deform_cpu
from deformmamba.deform.gather import gather
from deformmamba.deform.sampling import grid_sample

WHY_NO_TORCHVISION = deform._missing("torchvision.ops")
needs_torchvision = pytest.mark.skipif(WHY_NO_TORCHVISION is not None, reason=str(WHY_NO_TORCHVISION))
USABLE = [pytest.param(name, marks=needs_torchvision if name == "torchvision" else ()) for name in IMPLEMENTATIONS]


class Case(NamedTuple):
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    n_deform: int = 1
    size: tuple[int, int] = (5, 6)
    channels: int = 4
    c_out: int = 6
    batch: int = 2
    mask: bool = True
    bias: bool = True

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def tensors(self, dtype: torch.dtype = torch.float64, spread: float = 2.0) -> list[torch.Tensor | None]:
        """x, offset, mask, weight, bias; offsets keep away from integers, where the gradient jumps."""
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        x = normal(self.batch, self.channels, *self.size)
        weight = normal(self.c_out, self.channels // self.groups, *self.kernel)
        h, w = F.conv2d(x, weight, None, **self.geometry, groups=self.groups).shape[2:]
        taps = self.n_deform * math.prod(self.kernel)
        offset = normal(self.batch, 2 * taps, h, w) * spread
        offset = offset.floor() + 0.05 + 0.9 * (offset - offset.floor())
        mask = torch.rand(self.batch, taps, h, w, generator=g, dtype=torch.float64) if self.mask else None
        bias = normal(self.c_out) if self.bias else None
        return [t if t is None else t.to(dtype) for t in (x, offset, mask, weight, bias)]


CASES = [
    Case(),
    Case(mask=False, bias=False),
    Case(kernel=(1, 1), padding=(0, 0)),
    Case(kernel=(3, 1), padding=(0, 2), size=(7, 3)),
    Case(kernel=(2, 4), stride=(2, 1), padding=(1, 3), dilation=(2, 1), size=(8, 5)),
    Case(kernel=(5, 5), stride=(3, 2), padding=(0, 4), size=(9, 4)),
    Case(groups=2, channels=6),
    Case(groups=4, n_deform=2, c_out=4),
    Case(groups=2, n_deform=4, channels=8, stride=(2, 2)),
    Case(groups=2, n_deform=3, channels=6, c_out=2),
    Case(groups=3, n_deform=2, channels=6, c_out=3),
    Case(n_deform=4, size=(1, 9), batch=1),
    Case(channels=19, c_out=1, size=(6, 1), batch=3),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: str(c.index(c[0])) if not isinstance(c, Case) else None)


def by_the_loop(x, offset, mask, weight, bias, *, stride, padding, dilation) -> torch.Tensor:
    """Equation 5, one sample at a time, in Python's float64."""
    x, offset, weight = (t.detach().double().numpy() for t in (x, offset, weight))
    b, c, h, w = x.shape
    c_out, c_in, kh, kw = weight.shape
    n_deform, taps = offset.shape[1] // (2 * kh * kw), kh * kw
    share, groups = c // n_deform, c // c_in
    y = np.zeros((b, c_out, *offset.shape[2:])) if bias is None else np.tile(bias.double().view(-1, 1, 1), (b, 1, 1, 1))
    y = np.broadcast_to(y, (b, c_out, *offset.shape[2:])).copy()

    def at(n: int, i: int, row: int, column: int) -> float:
        return x[n, i, row, column] if 0 <= row < h and 0 <= column < w else 0.0

    def sample(n: int, i: int, row: float, column: float) -> float:
        if math.isnan(row) or math.isnan(column):
            return math.nan
        if not (-1 < row < h and -1 < column < w):
            return 0.0
        r, s = math.floor(row), math.floor(column)
        dr, ds = row - r, column - s
        return (1 - dr) * ((1 - ds) * at(n, i, r, s) + ds * at(n, i, r, s + 1)) + dr * (
            (1 - ds) * at(n, i, r + 1, s) + ds * at(n, i, r + 1, s + 1)
        )

    for n, row, column, k, i in itertools.product(range(b), *map(range, y.shape[2:]), range(taps), range(c)):
        d, g = i // share, i // c_in
        dy, dx = offset[n, 2 * (d * taps + k) : 2 * (d * taps + k) + 2, row, column]
        value = sample(
            n,
            i,
            row * stride[0] - padding[0] + k // kw * dilation[0] + dy,
            column * stride[1] - padding[1] + k % kw * dilation[1] + dx,
        )
        value *= 1.0 if mask is None else float(mask[n, d * taps + k, row, column])
        out = slice(g * c_out // groups, (g + 1) * c_out // groups)
        y[n, out, row, column] += weight[out, i - g * c_in, k // kw, k % kw] * value
    return torch.from_numpy(y)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Very small chunks and tasks on three threads, so that small tensors cross the limits of both."""
    monkeypatch.setattr(deform_cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(deform_cpu, "_CHUNK_PIXELS", 7)
    monkeypatch.setattr(deform_cpu, "_TASK_ELEMENTS", 1)
    monkeypatch.setattr(deform_cpu, "_TASK_CHANNELS", 1)
    torch.set_num_threads(3)


def wanting(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(function: Callable, tensors: list[torch.Tensor | None], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = wanting(tensors)
    y = function(*leaves)
    return list(torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y)))


# values


@pytest.mark.parametrize("implementation", USABLE)
@cases
def test_equals_a_loop_over_samples(case: Case, implementation: str) -> None:
    expected = by_the_loop(*case.tensors(), **case.geometry)
    y = modulated_deform_conv2d(*case.tensors(), **case.geometry, implementation=implementation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y = modulated_deform_conv2d(*case.tensors(torch.float32), **case.geometry, implementation=implementation)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@cases
def test_the_form_for_exported_programs_is_the_same(case: Case) -> None:
    x, offset, mask, weight, bias = case.tensors()
    last = [t if t is None else t.permute(0, 2, 3, 1) for t in (x, offset, mask, weight)]
    geometry = (*case.stride, *case.padding, *case.dilation)
    # positions are scaled to [-1, 1] and back: a few roundings more than in `gather`
    torch.testing.assert_close(grid_sample(*last, bias, geometry), gather(*last, bias, geometry), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@cases
def test_chunks_and_threads_change_nothing(case: Case, dtype: torch.dtype, small_pieces: None) -> None:
    tensors = case.tensors(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]

    def run(implementation: str) -> Callable:
        return lambda *t: modulated_deform_conv2d(*t, **case.geometry, implementation=implementation)

    y, expected = run("cpu")(*tensors), run("gather")(*tensors)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(
        gradients(run("cpu"), tensors, grad), gradients(run("gather"), tensors, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("implementation", USABLE)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[11]])
def test_zero_offsets_and_unit_masks_make_it_a_convolution(case: Case, implementation: str) -> None:
    x, offset, mask, weight, bias = case.tensors()
    expected = F.conv2d(x, weight, bias, **case.geometry, groups=case.groups)
    for m in (torch.ones_like(mask), None):
        y = modulated_deform_conv2d(
            x, torch.zeros_like(offset), m, weight, bias, **case.geometry, implementation=implementation
        )
        assert_close(y, expected)


@pytest.mark.parametrize("implementation", USABLE)
def test_whole_offsets_shift_the_image(implementation: str) -> None:
    x, weight = torch.randn(1, 3, 6, 7), torch.eye(3).view(3, 3, 1, 1)
    offset = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 7)  # (dy, dx)
    y = modulated_deform_conv2d(x, offset, None, weight, implementation=implementation)
    assert_close(y, F.pad(x, (1, -1, -2, 2)))


@needs_torchvision
@pytest.mark.parametrize("implementation", ["cpu", "gather"])
@cases
def test_equals_torchvision_in_value_and_gradient(case: Case, implementation: str) -> None:
    from torchvision.ops import deform_conv2d

    def theirs(x, offset, mask, weight, bias):
        return deform_conv2d(x, offset, weight, bias, case.stride, case.padding, case.dilation, mask)

    def ours(*tensors):
        return modulated_deform_conv2d(*tensors, **case.geometry, implementation=implementation)

    tensors = case.tensors()
    whole = [tensors[0], tensors[1].round(), *tensors[2:]]  # the gradients agree at integer offsets as well
    for given in (tensors, whole):
        expected = theirs(*given)
        torch.testing.assert_close(ours(*given), expected, rtol=1e-10, atol=1e-10)
        grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for found, wanted in zip(gradients(ours, given, grad), gradients(theirs, given, grad), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", USABLE)
def test_an_empty_batch_gives_an_empty_result(implementation: str) -> None:
    x, offset, mask, weight, bias = Case().tensors()
    leaves = wanting([x[:0], offset[:0], mask[:0], weight, bias])
    y = modulated_deform_conv2d(*leaves, padding=1, implementation=implementation)
    assert y.shape == (0, 6, 5, 6)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), leaves))


# derivatives


@pytest.mark.parametrize("implementation", ["cpu", pytest.param("gather", marks=pytest.mark.portable)])
@pytest.mark.parametrize(
    "case", [CASES[1]._replace(batch=1, size=(3, 2)), CASES[7]._replace(size=(3, 3), stride=(2, 2))]
)
def test_gradients_are_those_of_differences(case: Case, implementation: str) -> None:
    leaves = wanting(case.tensors())
    assert torch.autograd.gradcheck(
        lambda *t: modulated_deform_conv2d(*t, **case.geometry, implementation=implementation), leaves
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cpu", "gather"])
@pytest.mark.parametrize("mask", [True, False])
def test_second_derivatives_are_those_of_differences(mask: bool, implementation: str) -> None:
    case = Case((2, 2), padding=(0, 1), size=(3, 2), channels=2, c_out=1, n_deform=2, batch=1, mask=mask)
    leaves = wanting(case.tensors(spread=0.7))
    assert torch.autograd.gradgradcheck(
        lambda *t: modulated_deform_conv2d(*t, **case.geometry, implementation=implementation), leaves
    )


def test_third_derivatives_of_the_cpu_path_are_those_of_gather() -> None:
    thirds = []
    for implementation in ("cpu", "gather"):
        leaves = wanting(Case(size=(3, 3)).tensors())
        y = modulated_deform_conv2d(*leaves, padding=1, implementation=implementation)
        for _ in range(2):
            y = sum(g.pow(2).sum() for g in torch.autograd.grad(y.pow(2).sum(), leaves[:3], create_graph=True))
        thirds.append(torch.autograd.grad(y, leaves[:4]))
    for found, wanted in zip(*thirds, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("implementation", ["cpu", "gather"])
def test_at_an_integer_the_offset_gradient_is_the_one_to_the_right_and_below(implementation: str) -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    weight = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    offset = torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(o: torch.Tensor) -> torch.Tensor:
        return modulated_deform_conv2d(x, o, None, weight, implementation=implementation)

    (found,) = torch.autograd.grad(run(offset).sum(), offset)
    for axis in range(2):
        step = torch.zeros_like(offset)
        step[:, axis] = 0.25
        assert_close(found[:, axis : axis + 1], (run(offset + step) - run(offset)) / 0.25)


@pytest.mark.parametrize("implementation", ["cpu", "gather"])
@pytest.mark.parametrize("mask", [True, False])
def test_any_subset_of_the_tensors_can_want_gradients(mask: bool, implementation: str) -> None:
    case = Case(size=(3, 3), batch=1, mask=mask)
    tensors = case.tensors()
    present = [i for i, t in enumerate(tensors) if t is not None]
    grad = torch.randn(1, case.c_out, 3, 3, dtype=torch.float64)
    everything = dict(
        zip(present, gradients(lambda *t: modulated_deform_conv2d(*t, padding=1), tensors, grad), strict=True)
    )
    for size in range(1, len(present) + 1):
        for subset in itertools.combinations(present, size):
            given = [t if t is None else t.detach().clone().requires_grad_(i in subset) for i, t in enumerate(tensors)]
            modulated_deform_conv2d(*given, padding=1, implementation=implementation).backward(grad)
            for i in present:
                if i in subset:
                    assert_close(given[i].grad, everything[i])
                else:
                    assert given[i].grad is None


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from torch's own checker
def test_operators_keep_torchs_contract() -> None:
    """Schema, fake tensors, autograd registration, and equal results when compiled with static and dynamic shapes."""
    for case in (CASES[1], CASES[8]):
        x, offset, mask, weight, bias = (
            t if t is None or t.dim() == 1 else t.permute(0, 2, 3, 1).contiguous().requires_grad_()
            for t in case.tensors(torch.float32)
        )
        geometry = [*case.stride, *case.padding, *case.dilation]
        torch.library.opcheck(deform_cpu.deform_conv2d, (x, offset, mask, weight, bias, geometry))
        grad = torch.randn(*offset.shape[:3], case.c_out)
        for wanted in ([True] * 2 + [case.mask, True], [True, False, False, False]):
            torch.library.opcheck(
                deform_cpu.deform_conv2d_backward,
                (grad, x, offset, mask, weight, geometry, wanted),
                test_utils=("test_schema", "test_faketensor"),
            )


# layout, precision


@pytest.mark.parametrize("implementation", USABLE)
def test_layout_follows_x_and_values_ignore_it(implementation: str) -> None:
    tensors = Case(size=(5, 7)).tensors(torch.float32)
    expected = modulated_deform_conv2d(*tensors, padding=1, implementation=implementation)
    assert expected.is_contiguous()
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    y = modulated_deform_conv2d(*last, padding=1, implementation=implementation)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected)
    # every second element of a larger tensor, and a transposed copy
    strided = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in tensors]
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    for given in (strided, turned):
        assert not given[0].is_contiguous()
        assert_close(modulated_deform_conv2d(*given, padding=1, implementation=implementation), expected)
        grad = torch.randn_like(expected)
        for found, wanted in zip(
            gradients(lambda *t: modulated_deform_conv2d(*t, padding=1, implementation=implementation), given, grad),
            gradients(lambda *t: modulated_deform_conv2d(*t, padding=1, implementation=implementation), tensors, grad),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", USABLE)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32_and_returns_the_autocast_dtype(low: torch.dtype, implementation: str) -> None:
    def run(*t: torch.Tensor | None) -> torch.Tensor:
        return modulated_deform_conv2d(*t, padding=1, implementation=implementation)

    tensors = Case(size=(4, 40), channels=8).tensors(torch.float32)
    rounded = [t.to(low) for t in tensors[:3]] + tensors[3:]  # dtypes after a convolution under autocast
    expected = run(*(t.float() for t in rounded)).to(low)
    leaves = wanting(rounded)
    with torch.autocast("cpu", low):
        assert F.conv2d(leaves[0], leaves[3], padding=1).dtype == low
        y = run(*leaves)
        assert y.dtype == low
        assert_close(y, expected)
        y.float().square().sum().backward()
        assert run(*(t.double() for t in tensors)).dtype == torch.float64
    assert all(t.grad.dtype == t.dtype and t.grad.isfinite().all() for t in leaves)
    exact = gradients(run, [t.float() for t in rounded], 2 * y.detach().float())
    for leaf, wanted in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.float(), wanted, rtol=0.01, atol=0.01 * float(wanted.abs().max()))
    assert run(*(t.to(low) for t in tensors)).dtype == low


def test_a_position_far_from_the_origin_keeps_its_fraction_in_bfloat16() -> None:
    x = torch.arange(600.0).view(1, 1, 1, -1).expand(1, 1, 2, -1)
    offset = torch.tensor([0.0, 0.25]).view(1, 2, 1, 1).expand(1, 2, 2, 600)
    with torch.autocast("cpu", torch.float16):
        y = modulated_deform_conv2d(x, offset.bfloat16(), None, torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(y[0, 0, 0, :-1].float(), x[0, 0, 0, :-1] + 0.25, rtol=0, atol=0.26)
    assert (y[0, 0, 0, 200:250].float() % 1 == 0.25).all()


# infinite, NaN and far positions


@pytest.mark.parametrize("implementation", USABLE)
@pytest.mark.parametrize("mask", [True, False])
def test_wild_offsets_are_zero_outside_and_nan_where_nan(mask: bool, implementation: str) -> None:
    x, offset, m, weight, bias = Case(size=(6, 6), n_deform=2, mask=mask).tensors(torch.float32)
    wild = [math.inf, -math.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**63, 1e6, -1.0, 6.0, math.nan, -math.nan]
    for i, value in enumerate(wild):
        offset[i % 2, 3 * i % offset.shape[1], i % 6, (i + 2) % 6] = value
    offset[0, :2, 5, 5] = math.nan
    expected = by_the_loop(x, offset, m, weight, bias, **Case().geometry)
    leaves = wanting([x, offset, m, weight, bias])
    y = modulated_deform_conv2d(*leaves, padding=1, implementation=implementation)
    assert 0 < expected.isnan().sum() < expected.numel() / 4
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    y.nan_to_num().sum().backward()
    infinite = offset.isinf()
    assert (leaves[1].grad[infinite] == 0).all()
    assert leaves[0].grad.isfinite().all()


@pytest.mark.parametrize("implementation", ["cpu", "gather"])
def test_what_is_outside_is_zero_even_beside_an_infinite_pixel(implementation: str) -> None:
    x = torch.ones(1, 1, 4, 4)
    x[0, 0, 0, 0] = math.inf
    offset = torch.full((1, 2, 4, 4), -9.0)
    y = modulated_deform_conv2d(x, offset, None, torch.ones(1, 1, 1, 1), implementation=implementation)
    assert (y == 0).all()


@pytest.mark.long
def test_the_kernels_stay_inside_their_arrays(tmp_path: Path) -> None:
    """The tests of values, chunks and extreme offsets again, while numba checks every index (separate cache)."""
    program = """
        import sys, pytest, torch
        from deformmamba.deform import cpu as deform_cpu

        x, offset, mask = (torch.zeros(1, 4, 4, c) for c in (3, 18, 9))
        call = deform_cpu._Call(x, offset, mask, torch.zeros(2, 3, 3, 3), (1, 1, 1, 1, 1, 1))
        with pytest.raises(IndexError):  # the checks are on
            sample = deform_cpu._kernel(deform_cpu._sample, torch.float32)
            sample(*call.arrays, torch.zeros(1, 17, 9, 3).numpy(), 0)
        sys.exit(pytest.main(["-p", "no:cacheprovider", sys.argv[1], "-k", "(loop or wild or change) and not gather"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), __file__],
        env={**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[100%]" in done.stdout


# compiled code on disk


KERNELS = """
import errno, sys, torch
from numba.core.caching import IndexDataCacheFile
from deformmamba.deform import modulated_deform_conv2d

def full(self, key, data):
    raise OSError(errno.ENOSPC, "No space left on device")

if "full" in sys.argv:
    IndexDataCacheFile.save = full
given = torch.ones(1, 2, 4, 4), torch.full((1, 18, 4, 4), 0.3), torch.ones(1, 9, 4, 4), torch.ones(2, 2, 3, 3)
for _ in range(2):
    y, z = (modulated_deform_conv2d(*given, padding=1, implementation=name) for name in ("cpu", "gather"))
    torch.testing.assert_close(y, z)
"""


def kernels_in_a_process(folder: Path, *arguments: str) -> str:
    """The stderr of a new process with its compiled code in `folder`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", KERNELS, *arguments],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(deform.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.long
def test_a_damaged_or_full_cache_costs_a_compilation_only(tmp_path: Path) -> None:
    announced = "deformmamba: compiling the deformable convolution on the CPU (forward pass, float32), once\n"
    assert kernels_in_a_process(tmp_path) in ("", announced)  # "" if fast
    (index,) = tmp_path.rglob("*.nbi")  # of the kernel, none of the functions inside it
    index.write_bytes(index.read_bytes()[:40])
    said = kernels_in_a_process(tmp_path)
    assert said.count("cannot be kept on disk (UnpicklingError)") == said.count("delete damaged files (*.nbi)") == 1
    assert kernels_in_a_process(tmp_path / "other", "full").count("cannot be kept on disk (OSError)") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_takes_one_signature_and_compiles_nothing_later(dtype: torch.dtype) -> None:
    tensors = Case().tensors(dtype)

    def run(*t: torch.Tensor) -> torch.Tensor:
        return modulated_deform_conv2d(*t, padding=1, implementation="cpu")

    gradients(run, tensors, torch.ones(2, 6, 5, 6))
    for function in (deform_cpu._sample, deform_cpu._scatter):
        assert len(deform_cpu._kernel(function, dtype).signatures) == 1
        assert not deform_cpu._kernel(function, dtype)._can_compile


# threads, processes, memory


def test_many_python_threads_at_once(small_pieces: None) -> None:
    case = Case(size=(8, 8), channels=32, c_out=8)
    tensors = case.tensors()
    grad = torch.randn(2, 8, 8, 8, dtype=torch.float64)

    def run(*t: torch.Tensor) -> torch.Tensor:
        return modulated_deform_conv2d(*t, padding=1, implementation="cpu")

    expected, wrong = [run(*tensors), *gradients(run, tensors, grad)], []

    def work() -> None:
        for _ in range(5):
            for found, wanted in zip([run(*tensors), *gradients(run, tensors, grad)], expected, strict=True):
                if not torch.allclose(found, wanted, rtol=1e-12, atol=1e-12):
                    wrong.append((found - wanted).abs().max())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def channels_last(case: Case, dtype: torch.dtype = torch.float32) -> deform_cpu._Call:
    x, offset, mask, weight, _ = (t if t.dim() == 1 else t.permute(0, 2, 3, 1) for t in case.tensors(dtype))
    return deform_cpu._Call(x, offset, mask, weight, (1, 1, 1, 1, 1, 1))


def test_as_many_threads_as_torch_is_allowed() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert channels_last(Case(size=(64, 64), channels=64)).threads == threads
        assert channels_last(Case()).threads <= 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_work_in_every_mode_of_torch(mode: Callable, small_pieces: None) -> None:
    tensors = Case().tensors()
    expected = modulated_deform_conv2d(*tensors, padding=1, implementation="gather")
    with mode():
        inside = [t.clone() for t in tensors]
        assert_close(modulated_deform_conv2d(*inside, padding=1, implementation="cpu"), expected)
        assert_close(modulated_deform_conv2d(*tensors, padding=1, implementation="cpu"), expected)


def test_every_part_is_done_once() -> None:
    seen: list[tuple[int, int]] = []
    parts = [(0, 1), (1, 2), (2, 3)]
    deform_cpu._run_parts(lambda start, stop: seen.append((start, stop)), parts)
    assert sorted(seen) == parts


@pytest.mark.parametrize("n", [0, 1, 7, 40, 96])
@pytest.mark.parametrize("multiple", [1, 4, 20])
def test_parts_cover_a_range_once(n: int, multiple: int) -> None:
    for n_parts in (0, 1, 2, 3, 100):
        parts = deform_cpu._parts(n, n_parts, multiple)
        assert 1 <= len(parts) <= max(n_parts, 1)
        assert [i for start, stop in parts for i in range(start, stop)] == list(range(n))
        assert all(start % multiple == 0 for start, _ in parts)


@pytest.mark.parametrize("channels", [8, 96, 768])
def test_the_column_buffer_is_bounded(channels: int) -> None:
    call = channels_last(Case(size=(48, 48), channels=channels, batch=1))
    chunks = list(call.chunks(0, call.pixels, 1, channels))
    assert [i for first, last, _ in chunks for i in range(first, last)] == list(range(48 * 48))
    assert len({columns.untyped_storage().data_ptr() for _, _, columns in chunks}) == 1
    limit = max(deform_cpu._CHUNK_BYTES, deform_cpu._CHUNK_PIXELS * 9 * channels * 4)
    assert chunks[0][2].untyped_storage().nbytes() <= limit


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of resident memory")
def test_forward_and_backward_hold_less_than_the_nine_tap_buffer() -> None:
    program = """
        import pathlib, re, torch
        from deformmamba import modulated_deform_conv2d

        def resident(key):
            return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 2**10

        def run(n):
            tensors = [torch.randn(1, c, n, n, requires_grad=True) for c in (96, 18, 9)]
            weight = torch.randn(96, 96, 3, 3, requires_grad=True)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            modulated_deform_conv2d(*tensors, weight, padding=1).sum().backward()
            return resident("VmHWM") - before

        run(16)
        print(run(256))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = 96 * 256 * 256 * 4 / 2**20
    # the result, its gradient and the gradient of x, each in one or both layouts: 2 to 8 tensors, and no columns
    assert 2 * one < float(done.stdout) < 9 * one


# compilers


class Block(torch.nn.Module):
    def __init__(self, implementation: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.offset_mask = torch.nn.Conv2d(6, 27, 3, padding=1)
        self.weight = torch.nn.Parameter(torch.randn(4, 6, 3, 3))
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.implementation = implementation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset, mask = self.offset_mask(x).split([18, 9], dim=1)
        return modulated_deform_conv2d(
            x, offset, mask.sigmoid(), self.weight, self.bias, padding=1, implementation=self.implementation
        )


@pytest.mark.parametrize(
    "backend",
    [pytest.param("aot_eager", marks=pytest.mark.portable), pytest.param("inductor", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own warning, on importing inductor
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for shape, layout in (((2, 6, 7, 9), torch.contiguous_format), ((1, 6, 8, 12), torch.channels_last)):
        x = torch.randn(shape).contiguous(memory_format=layout)
        y, expected = compiled(x), block(x)
        assert y.is_contiguous(memory_format=layout)
        assert expected.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        for found, wanted in zip(
            torch.autograd.grad(y.square().sum(), list(block.parameters())),
            torch.autograd.grad(expected.square().sum(), list(block.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.long), False])
def test_an_export_has_free_sizes_and_needs_nothing_of_ours(strict: bool) -> None:
    free = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    block = Block()
    program = torch.export.export(block, (torch.randn(2, 6, 7, 9),), dynamic_shapes={"x": free}, strict=strict)
    assert not [node for node in program.graph.nodes if "deformmamba" in str(node.target)]
    for shape in ((2, 6, 7, 9), (1, 6, 13, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-4)


def test_an_export_of_a_named_implementation_obeys_the_name() -> None:
    block = Block("cpu")
    program = torch.export.export(block, (torch.randn(2, 6, 7, 9),))
    assert [node for node in program.graph.nodes if "deformmamba" in str(node.target)]
    x = torch.randn(2, 6, 7, 9)
    assert_close(program.module()(x), block(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own warning, on importing forward mode
def test_gather_serves_vmap_and_forward_mode() -> None:
    x, offset, mask, weight, bias = Case().tensors()

    def run(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return modulated_deform_conv2d(x, offset, mask, weight, bias, padding=1, implementation="gather")

    direction = torch.randn_like(offset)
    value, slope = torch.func.jvp(lambda o: run(x, o), (offset,), (direction,))
    step = 1e-6
    torch.testing.assert_close(slope, (run(x, offset + step * direction) - value) / step, rtol=1e-4, atol=1e-4)
    several = torch.randn(3, *x.shape, dtype=x.dtype)
    assert_close(
        torch.func.vmap(run, in_dims=(0, None))(several, offset), torch.stack([run(s, offset) for s in several])
    )


# choice of the implementation, refused arguments


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, in forward mode
def test_torch_func_takes_gather_by_itself() -> None:
    """The kernels have no rule for torch.func and once gave a derivative of zero, so `auto` takes gather."""
    torch.manual_seed(0)
    x, offset, mask = torch.randn(1, 4, 6, 7), torch.randn(1, 18, 6, 7), torch.rand(1, 9, 6, 7)
    weight = torch.randn(3, 4, 3, 3)

    def run(offset: torch.Tensor, implementation: str | None = None) -> torch.Tensor:
        return modulated_deform_conv2d(x, offset, mask, weight, padding=1, implementation=implementation)

    tangent = torch.randn_like(offset)
    found = torch.func.jvp(run, (offset,), (tangent,))
    assert_close(found, torch.func.jvp(lambda at: run(at, "gather"), (offset,), (tangent,)))
    assert found[1].abs().max() > 0.1
    gradient = torch.func.grad(lambda at: run(at).square().sum())(offset)
    leaf = offset.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(run(leaf).square().sum(), leaf)[0], rtol=1e-5, atol=1e-4)
    with pytest.raises(
        ValueError, match=r'"cpu" cannot be used: it has no rule for torch\.func.*"gather" always works'
    ):
        torch.func.grad(lambda at: run(at, "cpu").sum())(offset)


def test_the_tensors_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform, "_missing", lambda module: None)
    assert [deform._choose(None, device) for device in ("cpu", "cuda", "mps", "meta")] == [
        "cpu",
        "torchvision",
        "gather",
        "gather",
    ]
    monkeypatch.setattr(deform, "_missing", lambda module: f"{module} does not import")
    assert {deform._choose(None, device) for device in ("cpu", "cuda", "mps")} == {"gather"}
    for name, device, reason in (
        ("cpu", "cpu", "deformmamba.deform.cpu does not import"),
        ("torchvision", "cuda", "torchvision.ops does not import"),
        ("cpu", "cuda", "takes CPU tensors and x is on cuda"),
        ("torchvision", "mps", "takes CPU and CUDA tensors and x is on mps"),
    ):
        with pytest.raises(
            ValueError, match=f'implementation "{name}" cannot be used: .*{reason}; "gather" always works'
        ):
            deform._choose(name, device)


def test_an_export_holds_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deform._choose(None, "cpu") == "cpu"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert {deform._choose(None, device) for device in ("cpu", "cuda")} == {"gather"}
    assert deform._choose("cpu", "cpu") == "cpu"


def test_the_form_of_exports_ends_with_its_block_and_is_that_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread A enters, B enters, A leaves, B leaves."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    entered, left, inside = threading.Event(), threading.Event(), []

    def other() -> None:
        inside.append(deform._choose(None, "cpu"))
        with deform.exported_as("grid_sample"):
            entered.set()
            assert left.wait(30)
            inside.append(deform._choose(None, "cpu"))
        inside.append(deform._choose(None, "cpu"))

    thread = threading.Thread(target=other)
    with deform.exported_as("grid_sample"):
        thread.start()
        assert entered.wait(30)
        assert deform._choose(None, "cpu") == "grid_sample"
    left.set()
    thread.join()
    assert inside == ["gather", "grid_sample", "gather"]
    assert deform._choose(None, "cpu") == "gather"


@pytest.mark.slow
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.long), False])
def test_an_export_holds_the_form_that_was_asked_for(strict: bool) -> None:
    block, x = Block(), torch.randn(2, 6, 7, 9)
    with deform.exported_as("grid_sample"):
        program = torch.export.export(block, (x,), strict=strict)
    assert any("grid_sample" in str(node.target) for node in program.graph.nodes)
    plain = torch.export.export(block, (x,), strict=strict)
    assert not any("grid_sample" in str(node.target) for node in plain.graph.nodes)


def test_without_numbas_compiler_gather_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert deform._choose(None, "cpu") == "gather"
    with pytest.raises(ValueError, match="NUMBA_DISABLE_JIT is set"):
        deform._choose("cpu", "cpu")


def test_implementations_agree_on_infinite_and_nan_offsets_in_value_and_gradient() -> None:
    x, offset, mask, weight, bias = Case(n_deform=2).tensors()
    pairs = [(math.inf, 0.3), (0.3, -math.inf), (math.nan, 0.3), (0.3, math.nan), (math.nan, math.inf), (1e30, 0.3)]
    for i, pair in enumerate(pairs):
        offset[i % 2, 2 * i : 2 * i + 2, i % 5, i] = torch.tensor(pair, dtype=torch.float64)
    results = []
    for implementation in ("cpu", "gather"):
        leaves = wanting([x, offset, mask, weight, bias])
        y = modulated_deform_conv2d(*leaves, padding=1, implementation=implementation)
        factor = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * factor).sum(), leaves)])
    assert_close(*results, equal_nan=True)
    assert results[0][2].isnan().sum() == 6, "both of each pair that holds NaN"


def test_gather_keeps_the_fraction_of_a_position_far_from_the_origin() -> None:
    """An absolute position in float32 is wrong by up to 5e-4 pixels at 8192; the error is this times the gradient."""
    x = torch.arange(8192.0)[None, None, None] % 2 * 10
    offset = torch.full((1, 2, 1, 8192), 0.3)
    offset[:, 0] = 0
    results = [
        modulated_deform_conv2d(x, offset, None, torch.ones(1, 1, 1, 1), implementation=name)
        for name in ("cpu", "gather")
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "form", [2, (2,), [2], (2, 2), np.int64(2), np.array(2), np.array([2, 2]), (np.int32(2), 2), torch.tensor([2, 2])]
)
def test_integers_in_any_form_are_taken(form: object) -> None:
    x, offset, mask, weight, bias = Case(stride=(2, 2)).tensors()
    y = modulated_deform_conv2d(x, offset, mask, weight, bias, stride=form, padding=1)
    assert y.equal(modulated_deform_conv2d(x, offset, mask, weight, bias, stride=2, padding=1))


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ((1, 1, 1), ValueError),
        ((), ValueError),
        (1.0, TypeError),
        ((1, 2.5), TypeError),
        ("1", TypeError),
        ("same", TypeError),
        (True, TypeError),
        (None, TypeError),
        (np.array([1.0, 1.0]), TypeError),
    ],
)
def test_anything_else_is_refused_in_a_sentence(form: object, error: type[Exception]) -> None:
    x, offset, mask, weight, bias = Case().tensors()
    with pytest.raises(error, match=r"^modulated_deform_conv2d: padding .*wanted one integer, or \(y, x\)$"):
        modulated_deform_conv2d(x, offset, mask, weight, bias, padding=form)


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_module_that_fails_to_import_costs_only_speed(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise error("operator torchvision::nms does not exist")

    monkeypatch.setattr(deform, "import_module", fail)
    deform._missing.cache_clear()
    try:
        tensors = Case().tensors()
        torch.testing.assert_close(
            modulated_deform_conv2d(*tensors, padding=1),
            modulated_deform_conv2d(*tensors, padding=1, implementation="gather"),
            rtol=0,
            atol=0,
        )
        with pytest.raises(ValueError, match=rf"torchvision.*{error.__name__}: operator torchvision::nms does not"):
            modulated_deform_conv2d(*tensors, padding=1, implementation="torchvision")
    finally:
        deform._missing.cache_clear()


def test_a_meta_tensor_gets_a_shape() -> None:
    tensors = [t.to("meta") for t in Case().tensors()]
    assert modulated_deform_conv2d(*tensors, padding=1).shape == (2, 6, 5, 6)


X, OFFSET, MASK, WEIGHT = (2, 4, 5, 6), (2, 18, 5, 6), (2, 9, 5, 6), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (4, 5, 6)}, r"x has shape \(4, 5, 6\); wanted four dimensions, \(b, c, h, w\)"),
        ({"weight": (6, 4, 3)}, r"weight has shape \(6, 4, 3\); wanted four dimensions"),
        ({"weight": (6, 3, 3, 3)}, r"weight has shape \(6, 3, 3, 3\); wanted \(c_out, 4 / groups, kh, kw\)"),
        ({"weight": (6, 8, 3, 3)}, r"weight has shape \(6, 8, 3, 3\); wanted \(c_out, 4 / groups, kh, kw\)"),
        ({"weight": (5, 2, 3, 3)}, r"weight has shape \(5, 2, 3, 3\); wanted .* groups dividing c_out"),
        ({"offset": (2, 18, 5, 5)}, r"offset has shape \(2, 18, 5, 5\); wanted \(2, 2 \* G \* 9, 5, 6\)"),
        ({"offset": (1, 18, 5, 6)}, r"offset has shape \(1, 18, 5, 6\); wanted \(2, 2 \* G \* 9, 5, 6\)"),
        ({"offset": (2, 9, 5, 6)}, r"offset has shape \(2, 9, 5, 6\); wanted"),
        ({"offset": (2, 20, 5, 6)}, r"offset has shape \(2, 20, 5, 6\); wanted"),
        ({"offset": (2, 54, 5, 6)}, r"offset has shape \(2, 54, 5, 6\); .* G dividing the 4 channels of x"),
        ({"mask": (2, 18, 5, 6)}, r"mask has shape \(2, 18, 5, 6\); wanted \(2, 9, 5, 6\), as offset has G = 1"),
        ({"bias": (5,)}, r"bias has shape \(5,\); wanted \(6,\)"),
        ({"bias": (1, 6)}, r"bias has shape \(1, 6\); wanted \(c_out,\)"),
        ({"x": (2, 4, 5, 0)}, r"x has shape \(2, 4, 5, 0\); wanted at least 1x1 pixels"),
    ],
)
@pytest.mark.parametrize("implementation", [None, "gather"])
def test_a_wrong_shape_is_named_with_the_right_one(change: dict, message: str, implementation: str | None) -> None:
    shapes = {"x": X, "offset": OFFSET, "mask": MASK, "weight": WEIGHT, "bias": (6,)} | change
    with pytest.raises(ValueError, match="^modulated_deform_conv2d: " + message):
        modulated_deform_conv2d(
            **{name: torch.zeros(shape) for name, shape in shapes.items()}, padding=1, implementation=implementation
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"implementation": "fast"}, ValueError, "unknown implementation 'fast'; available: cpu, torchvision, gather"),
        ({"stride": 0}, ValueError, r"stride \(0, 0\)"),
        ({"dilation": (1, 0)}, ValueError, r"dilation \(1, 0\)"),
        ({"padding": -1}, ValueError, r"padding \(-1, -1\)"),
        ({"x": torch.zeros(X, dtype=torch.int64)}, TypeError, "x is torch.int64; wanted a floating point tensor"),
        ({"offset": torch.zeros(OFFSET, dtype=torch.complex64)}, TypeError, "offset is torch.complex64"),
        ({"mask": torch.zeros(MASK, device="meta")}, ValueError, "mask is on meta, x on cpu"),
        ({"x": np.zeros(X)}, TypeError, "x is a ndarray; wanted a tensor"),
        ({"offset": None}, TypeError, "offset is a NoneType; wanted a tensor"),
        ({"x": torch.zeros(2, 4, 0, 6)}, ValueError, "at least 1x1 pixels and one channel"),
        ({"dilation": 4}, ValueError, r"x has shape \(2, 4, 5, 6\); wanted at least 7x7 pixels"),
    ],
)
def test_other_wrong_arguments_are_refused(change: dict, error: type[Exception], message: str) -> None:
    given = {
        "x": torch.zeros(X),
        "offset": torch.zeros(OFFSET),
        "mask": torch.zeros(MASK),
        "weight": torch.zeros(WEIGHT),
    }
    with pytest.raises(error, match="^modulated_deform_conv2d: .*" + message):
        modulated_deform_conv2d(**{**given, "padding": 1, **change})


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("DEFORMMAMBA_GPU") != "1", reason="no CUDA device here"
)
@pytest.mark.parametrize("case", [CASES[0], CASES[8]])
def test_on_a_gpu_equals_the_cpu(case: Case) -> None:
    tensors = case.tensors()
    grad = torch.randn(modulated_deform_conv2d(*tensors, **case.geometry).shape, dtype=torch.float64)
    for implementation in (None, "gather"):

        def run(*t: torch.Tensor | None, implementation: str | None = implementation) -> torch.Tensor:
            return modulated_deform_conv2d(*t, **case.geometry, implementation=implementation)

        there = [t if t is None else t.cuda() for t in tensors]
        assert_close(run(*there).cpu(), run(*tensors))
        for found, wanted in zip(gradients(run, there, grad), gradients(run, tensors, grad), strict=True):
            assert_close(found.cpu(), wanted)
