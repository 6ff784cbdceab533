"""One test for each private part of PyTorch in use: it fails when a release of PyTorch breaks that part."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from deformmamba import torch_private
from deformmamba.errors import UnsupportedCall


def test_a_marked_function_is_a_constant_of_the_compiled_program() -> None:
    calls = []

    @torch_private.constant_when_compiled
    def probe(n: int) -> int:
        calls.append(sys.modules)  # torch.compile could not trace this
        return n + 1

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * probe(2), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3, 3]
    assert calls
    torch._dynamo.reset()


@pytest.mark.long
def test_the_public_way_to_mark_a_function_still_imports_the_compiler() -> None:
    """If this test fails, the public function can replace `constant_when_compiled`."""
    code = "import sys, torch\ntorch.compiler.assume_constant_result(lambda: 1)\nassert 'torch._dynamo' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, in forward mode
def test_transforms_are_seen() -> None:
    seen = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch_private.differentiates_by_transform(), torch_private.transforms_are_active()))
        return x.square().sum()

    x = torch.ones(3)
    watch(x)
    torch.func.grad(watch)(x)
    torch.func.jvp(watch, (x,), (x,))
    torch.func.vmap(watch)(x[None])
    with forward_ad.dual_level():
        watch(forward_ad.make_dual(x, x))
    assert seen == [(False, False), (True, True), (True, True), (False, True), (True, False)]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP comes with PyTorch on Linux")
def test_pytorch_brings_gnu_openmp_and_it_runs_our_function() -> None:
    torch.ones(1 << 20).add_(1)
    region = torch_private.gomp_parallel()
    if region is None:
        pytest.skip("this PyTorch has another OpenMP")
    threads = []
    region(torch_private.PARALLEL_REGION(lambda _: threads.append(threading.get_ident())), None, 2, 0)
    assert 1 <= len(threads) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has huge pages by madvise")
def test_a_large_tensor_can_be_written_after_asking_for_huge_pages() -> None:
    tensor = torch.empty(1 << 20)
    assert torch_private.with_huge_pages(tensor, smallest=1) is tensor
    assert tensor.fill_(3).sum() == 3 << 20


def test_registration_is_counted_in_this_thread_and_only_in_the_block() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))  # 4 parameters, 3 buffers, 2 modules

    with torch_private.limited_registration(parameters=4, buffers=3, modules=2):
        build()
        other = threading.Thread(target=build)
        other.start()
        other.join()
    for what, limit in (("parameters", 3), ("buffers", 2), ("modules", 1)):
        with (
            pytest.raises(ValueError, match=f"more than {limit} {what}"),
            torch_private.limited_registration(**{what: limit}),
        ):
            build()
    build()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # the function is deprecated
def test_scripting_is_refused_by_a_module_inside_a_module() -> None:
    class Ours(torch_private.NotScriptable, nn.Module):
        pass

    with pytest.raises(UnsupportedCall, match=r"^Ours: torch.jit.script does not support it; use torch.export.export"):
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), Ours()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, on importing its compiler
@pytest.mark.portable
def test_a_compiled_module_shows_the_one_inside() -> None:
    model = nn.Linear(2, 2)
    compiled: Any = torch.compile(model)
    assert torch_private.uncompiled(compiled) is model
    assert torch_private.uncompiled(model) is None


def test_the_scan_operator_runs_a_loop_with_a_state() -> None:
    def step(h: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> list[torch.Tensor]:
        h = factor * h + x
        return [h, h + 1]

    last, ys = torch_private.scan_operator()(step, (torch.zeros(2),), (torch.ones(3, 2),), (torch.tensor(2.0),))
    assert last.tolist() == [7, 7]
    assert ys.tolist() == [[2, 2], [4, 4], [8, 8]]


@pytest.mark.slow
def test_the_switches_for_exported_programs_exist_and_change_nothing() -> None:
    """Both are faster ways to the same program; only their number of calls differs."""
    import io

    import sympy
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, x = nn.Conv2d(1, 2, 3, padding=1), torch.rand(1, 1, 6, 5)
    sizes = {2: torch.export.Dim("h", min=2, max=64), 3: torch.export.Dim("w", min=2, max=64)}
    with torch_private.without_fake_tensor_cache():
        assert not FakeTensorMode().cache_enabled
        program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    assert FakeTensorMode().cache_enabled
    file = io.BytesIO()
    torch.export.save(program, file)
    parse, texts = sympy.sympify, []

    def counted(given: Any, *args: Any, **options: Any) -> Any:
        if type(given) is str:
            texts.append(given)
        return parse(given, *args, **options)

    sympy.sympify = counted
    try:
        with torch_private.expressions_parsed_once():
            loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
        assert 0 < len(texts) <= 2 * len(set(texts))  # with a size of the example, and without
    finally:
        sympy.sympify = parse
    for size in ((6, 5), (9, 8)):
        y = torch.rand(1, 1, *size)
        torch.testing.assert_close(loaded(y), net(y), rtol=0, atol=1e-6)


def test_overlapping_blocks_leave_pytorchs_parser_as_it_was() -> None:
    """Thread A enters, B enters, A leaves, B leaves."""
    from torch._export.serde import serialize

    deserializer: Any = serialize.GraphModuleDeserializer
    before = deserializer._parse_sym_expr
    first, second = torch_private.expressions_parsed_once(), torch_private.expressions_parsed_once()
    first.__enter__()
    second.__enter__()
    changed = deserializer._parse_sym_expr
    assert changed is not before
    first.__exit__(None, None, None)
    assert deserializer._parse_sym_expr is changed  # the second block still needs it
    second.__exit__(None, None, None)
    assert deserializer._parse_sym_expr is before
