"""The scan with PyTorch's tools: compile, export, functional calls, checkpointing, copies, data parallelism."""

import copy
import pickle
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from deformmamba.scan import ScanBackendError, cpu, operator, scan_backend, selective_scan, selective_scan_2d


class Line(nn.Module):
    """A module: a selective scan and its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(12, 3) - 0.1)
        self.D = nn.Parameter(torch.rand(12))

    def forward(self, u: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> Any:
        return selective_scan(u, delta, self.A, B, C, self.D, delta_softplus=True, return_last_state=True)


class Map(nn.Module):
    """The core of SS2D: step sizes (of low rank) and matrices are computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(10, 4 * (2 + 2 * 3))
        self.mix = nn.Parameter(torch.randn(40, 2))
        self.A = nn.Parameter(-torch.rand(40, 3) - 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        delta, B, C = self.project(x).unflatten(-1, (4, 8)).split([2, 3, 3], -1)
        y: torch.Tensor = selective_scan_2d(x, delta.permute(3, 0, 1, 2, 4), self.A, B, C, delta_weight=self.mix)
        return y.permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def line() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 12, 70), torch.randn(2, 12, 70), torch.randn(2, 3, 70), torch.randn(2, 3, 70)


def gradients(call: Any, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    result = call(*inputs)
    loss = sum(x.square().sum() for x in result) if isinstance(result, tuple) else result.square().sum()
    return list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "compiler",
    [pytest.param("aot_eager", marks=pytest.mark.portable), pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiles_in_one_graph(line: tuple[torch.Tensor, ...], compiler: str) -> None:
    for module, inputs in ((Line(), line), (Map(), (torch.randn(2, 10, 5, 7),))):
        compiled = torch.compile(module, fullgraph=True, backend=compiler)
        with warnings.catch_warnings():  # Inductor warns about the machine, Python about Inductor's imports
            warnings.simplefilter("ignore")
            results = gradients(compiled, module, *inputs)
        assert_close(results, gradients(module, module, *inputs))


@pytest.mark.portable
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_function_follows_the_choice(line: tuple[torch.Tensor, ...]) -> None:
    graphs = []

    def remember(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    module = torch.compile(Line(), fullgraph=True, backend=remember)
    module(*line)
    with scan_backend("eager"):
        module(*line)
    module(*line)
    assert [any("deformmamba" in target for target in graph) for graph in graphs] == [True, False]


@pytest.mark.portable
def test_exports(line: tuple[torch.Tensor, ...]) -> None:
    for module, inputs in ((Line(), line), (Map(), (torch.randn(2, 10, 5, 7),))):
        for name in ("cpu", "eager"):
            with scan_backend(name):
                exported = torch.export.export(module.eval(), inputs)
            assert_close(exported.module()(*inputs), module(*inputs))
            inside = any("deformmamba" in str(node.target) for node in exported.graph.nodes)
            assert inside == (name == "cpu")


def test_functional_call(line: tuple[torch.Tensor, ...]) -> None:
    module, other = Line(), Line()
    weights = dict(other.named_parameters())
    assert_close(torch.func.functional_call(module, weights, line), other(*line))


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, in forward mode
def test_transforms_of_torch_func(line: tuple[torch.Tensor, ...]) -> None:
    """Kernels have no rule for transforms: `auto` takes a backend that has one, and a named kernel raises."""
    module = Map()
    weights, x, tangent = dict(module.named_parameters()), torch.randn(2, 10, 5, 7), torch.randn(2, 10, 5, 7)

    def loss(weights: Any) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, weights, (x,)).square().sum()
        return result

    expected = dict(zip(weights, torch.autograd.grad(loss(weights), list(weights.values())), strict=True))
    torch.testing.assert_close(torch.func.grad(loss)(weights), expected, rtol=1e-5, atol=1e-3)
    with scan_backend("reference"):
        value, derivative = torch.func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(module, (x,), (tangent,)), (value, derivative), rtol=1e-5, atol=1e-4)
    assert derivative.abs().max() > 0.1
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, derivative, rtol=1e-5, atol=1e-4)
    with scan_backend("cpu"), pytest.raises(ScanBackendError, match=r"no rule for torch\.func.*use backend 'eager'"):
        torch.func.grad(loss)(weights)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(line: tuple[torch.Tensor, ...], reentrant: bool) -> None:
    module = Line()
    leaves = [[x.detach().clone().requires_grad_() for x in line] for _ in range(2)]
    found = []
    for inputs, call in zip(leaves, (module, lambda *x: checkpoint(module, *x, use_reentrant=reentrant)), strict=True):
        module.zero_grad()
        sum(x.square().sum() for x in call(*inputs)).backward()
        found.append([x.grad for x in (*inputs, *module.parameters())])
    assert_close(*found)


def test_copies(line: tuple[torch.Tensor, ...]) -> None:
    module = Line()
    with scan_backend("eager"):
        expected = module(*line)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(twin(*line), expected)


def test_replicas_in_threads(line: tuple[torch.Tensor, ...]) -> None:
    """DataParallel does this with several GPUs."""
    module = Line()
    inputs = [tuple(x + i for x in line) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda given: gradients(replica := copy.deepcopy(module), replica, *given), inputs))
    assert_close(found, [gradients(module, module, *given) for given in inputs])
    assert_close(nn.DataParallel(module)(*line), module(*line))


@pytest.mark.slow
def test_distributed_data_parallel(line: tuple[torch.Tensor, ...]) -> None:
    """One process is enough: gradients pass through the reducer's hooks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        module = Line()
        alone = gradients(module, module, *line)[4:]
        parallel = nn.parallel.DistributedDataParallel(module)
        sum(x.square().sum() for x in parallel(*line)).backward()
        assert_close([x.grad for x in module.parameters()], alone)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own warning, in PyTorch 2.15
@pytest.mark.parametrize("zoh", [False, True])
def test_the_operator_keeps_pytorchs_rules(zoh: bool) -> None:
    def rand(*shape: int, grad: bool = True) -> torch.Tensor:
        return (torch.rand(shape) - 1).requires_grad_(grad)

    inputs = rand(2, 1, 35, 20), rand(4, 2, 1, 35, 20), rand(4, 1, 20, 3), rand(4, 2, 1, 35, 3, grad=False)
    rest = rand(4, 2, 1, 35, 3), None, rand(4, 1, 20), rand(4, 2, 1, 20, 3)
    torch.library.opcheck(operator.scan, ("cpu", *inputs, *rest, 5, 7, True, zoh, True))
    low = rand(4, 2, 1, 35, 5), rand(4, 1, 20, 5)
    given = ("cpu", inputs[0], low[0], *inputs[2:], *rest, 5, 7, True, zoh, True)
    torch.library.opcheck(operator.scan, given, {"delta_weight": low[1]})


def test_gradients_of_gradients_are_refused(line: tuple[torch.Tensor, ...]) -> None:
    """The backward kernels have no derivative: they raise, and do not return zero. The eager backend has one."""
    module = Line()
    u = line[0].clone().requires_grad_()
    for name, works in (("cpu", False), ("eager", True)):
        with scan_backend(name):
            (gradient,) = torch.autograd.grad(module(u, *line[1:])[0].square().sum(), u, create_graph=True)
        if works:
            assert torch.autograd.grad(gradient.sum(), u)[0].any()
        else:
            with pytest.raises(RuntimeError, match=r"has no second derivative; .*scan_backend\('eager'\)"):
                torch.autograd.grad(gradient.sum(), u)


def test_nothing_is_kept_without_gradients() -> None:
    module = Map()
    kept = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.deformmamba.scan.default:
                kept.append(result[2].numel())
            return result

    with Watch():
        module(torch.randn(1, 10, 9, 8))
        with torch.no_grad():
            module(torch.randn(1, 10, 9, 8))
        with torch.inference_mode():
            module(torch.randn(1, 10, 9, 8))
    assert kept == [4 * -(-72 // cpu.CHUNK) * 3 * 10, 0, 0]
