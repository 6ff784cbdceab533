"""Operators and blocks with tensor subclasses, tracers, meta tensors and vmap, and PyTorch's rules about storage."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deformmamba.deform.cpu
import deformmamba.mamba.causal_conv_cpu  # noqa: F401
from deformmamba import SRLoss
from deformmamba.deform import modulated_deform_conv2d
from deformmamba.errors import InvalidArgument, UnsupportedCall
from deformmamba.layers import (
    SS2D,
    DeformMambaBlock,
    ModulatedDeformBlock,
    MultiViewContext,
    PatchEmbed,
    PatchExpand,
    PatchMerge,
    VisionMambaBlock,
)
from deformmamba.models import DeformMambaSR
from deformmamba.scan import ScanBackendError, scan_backend, selective_scan
from deformmamba.tensors import as_array, check_device, constant, has_values

OURS = [SS2D, VisionMambaBlock, ModulatedDeformBlock, DeformMambaBlock]
BLOCKS = [*OURS, MultiViewContext]
OPS = torch.ops.deformmamba


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def deform_arguments() -> list[torch.Tensor]:
    return [torch.rand(1, 4, 5, 4), torch.rand(1, 4, 5, 18), torch.rand(1, 4, 5, 9), torch.rand(2, 3, 3, 4)]


def scan_arguments() -> list[Any]:
    u, delta, A, B = (
        torch.rand(1, 1, 12, 3),
        torch.rand(4, 1, 1, 12, 3),
        -torch.rand(4, 1, 3, 2),
        torch.rand(4, 1, 1, 12, 2),
    )
    return [u, delta, A, B, B.clone(), None, None]


# ------------------------------------------------------------------------------------------------------- raw operators


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("height", {"height": 300, "width": 400}),
        ("height", {"height": -3, "width": -4}),
        ("height", {"height": 2**62, "width": 2**62}),
        ("delta", {1: torch.rand(4, 1, 1, 11, 3)}),
        ("A", {2: torch.rand(3, 1, 3, 2)}),
        ("A", {2: torch.rand(4, 1, 2, 2)}),
        ("B", {3: torch.rand(4, 1, 1, 12, 1)}),
        ("C", {4: torch.rand(4, 1, 1, 12, 2).double()}),
        ("D", {5: torch.rand(4, 1, 2)}),
        ("delta_bias", {6: torch.rand(1, 1, 3)}),
        ("u", {0: torch.rand(1, 1, 12, 3).half()}),
        ("u", {0: torch.rand(1, 12, 3)}),
        ("delta_weight", {"weight": torch.rand(4, 1, 3, 0), 1: torch.rand(4, 1, 1, 12, 0)}),
        ("delta_weight", {"weight": torch.rand(4, 1, 2, 3)}),
        ("initial_state", {"state": torch.rand(4, 1, 1, 2, 2)}),
    ],
)
def test_the_scan_operator_refuses_what_does_not_fit(name: str, change: dict[Any, Any]) -> None:
    given = scan_arguments()
    size = {"height": 3, "width": 4, "weight": None, "state": None}
    for key, value in change.items():
        if isinstance(key, str):
            size[key] = value
        else:
            given[key] = value
    rest = size["height"], size["width"], True, False, True, size["weight"]
    with pytest.raises(InvalidArgument, match=rf"^deformmamba::scan: {name}.* (wanted|u has) "):
        OPS.scan("cpu", *given, size["state"], *rest)


@pytest.mark.parametrize("name", ["kept", "dy", "dlast"])
def test_the_backward_scan_refuses_what_does_not_fit(name: str) -> None:
    more = {"kept": torch.rand(4, 1, 1, 1, 2, 3), "dy": torch.rand(1, 1, 12, 3), "dlast": torch.rand(4, 1, 1, 3, 2)}
    OPS.scan_backward("cpu", *scan_arguments(), *more.values(), 3, 4, True, False)
    more[name] = more[name][..., :1]
    with pytest.raises(InvalidArgument, match=f"^deformmamba::scan_backward: {name} is .*; wanted"):
        OPS.scan_backward("cpu", *scan_arguments(), *more.values(), 3, 4, True, False)


@pytest.mark.parametrize("backend", ["eager", "reference", "mamba_ssm", "", "no such"])
def test_a_backend_without_kernels_is_refused_by_the_operator(backend: str) -> None:
    with pytest.raises(InvalidArgument, match="has no kernels; there are cpu, triton"):
        OPS.scan(backend, *scan_arguments(), None, 3, 4, True, False, True)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, torch.rand(1, 4, 0, 4)),
        (0, torch.rand(1, 4, 5, 3)),
        (0, torch.rand(1, 4, 5, 4).half()),
        (1, torch.rand(1, 4, 5, 17)),
        (1, torch.rand(1, 4, 5, 0)),
        (1, torch.rand(1, 3, 5, 18)),
        (2, torch.rand(1, 4, 5, 8)),
        (3, torch.rand(2, 3, 0, 4)),
        (3, torch.rand(2, 3, 3, 3)),
        (4, [1, 1, 1, 1, 1]),
        (4, [0, 1, 1, 1, 1, 1]),
        (4, [1, 1, -1, 1, 1, 1]),
        (4, [1, 1, 2**40, 1, 1, 1]),
    ],
)
def test_the_deform_operators_refuse_what_does_not_fit(index: int, change: Any) -> None:
    given = [*deform_arguments(), [1, 1, 1, 1, 1, 1]]
    given[index] = change
    *tensors, geometry = given
    with pytest.raises(InvalidArgument, match=r"^deformmamba::deform_conv2d: "):
        OPS.deform_conv2d(*tensors, None, geometry)
    with pytest.raises(InvalidArgument, match=r"^deformmamba::deform_conv2d_backward: "):
        OPS.deform_conv2d_backward(torch.rand(1, 4, 5, 2), *tensors, geometry, [True] * 4)


@pytest.mark.parametrize("index", range(5))
def test_what_the_scan_operator_needs_must_be_given(index: int) -> None:
    given = scan_arguments()
    given[index] = None
    with pytest.raises(InvalidArgument, match="must be given"):
        OPS.scan("cpu", *given, None, 3, 4, True, False, True)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_what_the_deform_operator_needs_must_be_given(index: int) -> None:
    given: list[Any] = deform_arguments()
    given[index] = None
    with pytest.raises(InvalidArgument, match="must be given"):
        OPS.deform_conv2d(*given, None, [1, 1, 1, 1, 1, 1])


def test_tensors_without_memory_must_be_given_as_well() -> None:
    x, offset, mask, weight = (tensor.to("meta") for tensor in deform_arguments())
    geometry = [1, 1, 1, 1, 1, 1]
    calls: list[Callable[[], Any]] = [
        lambda: OPS.deform_conv2d(x, None, mask, weight, None, geometry),
        lambda: OPS.deform_conv2d_backward(None, x, offset, mask, weight, geometry, [True] * 4),
        lambda: OPS.causal_conv(x[0, 0, None], None, None),
        lambda: OPS.causal_conv_backward(x[0, 0, None], weight[:, 0, 0], None),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match="must be given"):
            call()


@pytest.mark.parametrize("change", [{0: (2, 4, 6)}, {1: (4, 3)}, {1: (5, 0)}, {2: (4,)}, {2: (5, 1)}])
def test_the_causal_convolution_refuses_what_does_not_fit(change: dict[int, tuple[int, ...]]) -> None:
    shapes = {0: (2, 5, 6), 1: (5, 3), 2: (5,)} | change
    x, weight, bias = (torch.rand(shape) for shape in shapes.values())
    with pytest.raises(InvalidArgument, match=r"^deformmamba::causal_conv: "):
        OPS.causal_conv(x, weight, bias)
    with pytest.raises(InvalidArgument, match=r"^deformmamba::causal_conv_backward: "):
        OPS.causal_conv_backward(x, weight, torch.rand(2, 5, 7))


@pytest.mark.long
def test_random_calls_of_the_operators_do_not_end_the_process() -> None:
    """A short run; `python tests/fuzz_operators.py` makes 20,000 calls."""
    script = Path(__file__).with_name("fuzz_operators.py")
    command = [sys.executable, "-X", "faulthandler", str(script), "--calls", "300", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert int(counts["ok"]) > 30
    assert int(counts["InvalidArgument"]) > 60


# ------------------------------------------------------------------------------------------------------------- tracers


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates the function, and warns in the blocks' checks
@pytest.mark.parametrize("block", OURS)
def test_tracing_is_refused_in_one_line(block: Callable[..., nn.Module]) -> None:
    """A trace stores height and width as constants, so the traced program would be wrong at every other size."""
    with pytest.raises(UnsupportedCall, match=r"^\w+: torch\.jit\.trace .*use torch\.export\.export.*$"):
        torch.jit.trace(block(8).eval(), torch.rand(1, 8, 6, 6))


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates the function
def test_a_network_is_not_traced_or_scripted_either() -> None:
    model = DeformMambaSR.from_preset("tiny", scale=2).eval()
    with pytest.raises(UnsupportedCall, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, torch.rand(1, 1, 16, 16))
    with pytest.raises(UnsupportedCall, match=r"torch\.jit\.script does not support it; use torch\.export\.export"):
        torch.jit.script(model)


class Among(nn.Module):
    """A block between PyTorch's own layers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.block = block
        self.last = nn.Sequential(PatchMerge(8, 8), PatchExpand(8, 8), PatchEmbed(8, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(x)) + 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_fx_traces_networks_with_our_blocks(block: Callable[..., nn.Module]) -> None:
    network = Among(block(8)).eval()
    traced = torch.fx.symbolic_trace(network)
    for size in ((10, 14), (18, 6)):
        x = torch.rand(2, 3, *size)
        torch.testing.assert_close(traced(x), network(x), rtol=0, atol=0)
    alone = torch.fx.symbolic_trace(network.block)
    x = torch.rand(1, 8, 4, 6)
    torch.testing.assert_close(alone(x), network.block(x), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- tensor subclasses


class Meta(torch.Tensor):
    """Like MONAI's MetaTensor: results have this class too, and `new_empty` takes the sizes as one tuple."""

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        return torch.empty(size, dtype=dtype or self.dtype, device=device or self.device).as_subclass(type(self))

    new_zeros = new_ones = None  # type: ignore[assignment]


class Image(torch.Tensor):
    """Like torchvision's tv_tensors: results are plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(torch.Tensor) if isinstance(result, cls) else result


class Weight(nn.Parameter):
    """A subclass of Parameter, as in quantisation and sharding libraries."""


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [Meta, Image])
def test_subclasses_train_and_keep_their_type(block: Callable[..., nn.Module], kind: type[torch.Tensor]) -> None:
    module, x = block(8), torch.rand(2, 8, 5, 6)
    y = module(x.as_subclass(kind))
    assert type(y) is type(nn.Conv2d(8, 8, 1)(x.as_subclass(kind)))
    assert_close(y.as_subclass(torch.Tensor), module(x))
    found = torch.autograd.grad(y.square().sum().as_subclass(torch.Tensor), list(module.parameters()))
    assert_close(found, torch.autograd.grad(module(x).square().sum(), list(module.parameters())))


@pytest.mark.parametrize("block", BLOCKS)
def test_parameters_of_a_class_of_their_own_train(block: Callable[..., nn.Module]) -> None:
    module, x = block(8), torch.rand(2, 8, 5, 6)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, Weight(parameter.detach()))
    assert all(type(p) is Weight for p in module.parameters())
    assert_close(torch.autograd.grad(module(x).square().sum(), list(module.parameters())), expected)


@pytest.mark.slow
def test_distributed_tensors_are_gathered() -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module, x = SS2D(8), torch.rand(2, 8, 5, 6)
        expected = module(x)
        grads = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        y = module(distribute_tensor(x, mesh, [Replicate()]))
        assert isinstance(y, DTensor)
        assert_close(y.full_tensor(), expected)
        found = torch.autograd.grad(y.full_tensor().square().sum(), list(module.parameters()))
        assert_close([g.full_tensor() for g in found], list(grads))
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("block", OURS)
def test_a_call_leaves_storages_resizable(block: Callable[..., nn.Module]) -> None:
    """FSDP resizes the storages of parameters. After `tensor.numpy()`, PyTorch would no longer allow it."""
    module, x = block(8), torch.rand(1, 8, 5, 6, requires_grad=True)
    module(x).square().sum().backward()
    for tensor in (x, x.grad, *module.parameters(), *(p.grad for p in module.parameters())):
        assert tensor is not None
        assert tensor.untyped_storage().resizable()
    out = torch.empty(0)
    torch.add(x.detach(), 1, out=out)


def test_an_array_is_the_memory_itself() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    for view in (x, x[:, 1], x.permute(2, 0, 1), x[:1].expand(3, 3, 4), x[..., ::2], x[:0], x.double()):
        array = as_array(view)
        assert array.tolist() == view.tolist()
        assert array.shape == tuple(view.shape)
    as_array(x)[1, 1, 1] = 100
    assert x[1, 1, 1] == 100
    odd = torch.frombuffer(bytearray(17), dtype=torch.uint8)[1:].view(torch.uint8)
    assert as_array(torch.frombuffer(memoryview(odd.numpy()), dtype=torch.float32)).tolist() == [0] * 4


# -------------------------------------------------------------------------------------------------------- meta and fake


@pytest.mark.parametrize("block", BLOCKS)
def test_meta_tensors_give_shapes(block: Callable[..., nn.Module]) -> None:
    module = block(8, device="meta")
    x = torch.rand(2, 8, 5, 6, device="meta", requires_grad=True)
    y = module(x)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_losses_and_scans_take_meta_tensors() -> None:
    image = torch.rand(1, 1, 8, 8, device="meta")
    assert SRLoss().to("meta")(image, image).shape == ()
    u, A, B = (torch.rand(shape, device="meta") for shape in ((2, 6, 5), (6, 3), (2, 3, 5)))
    for backend in ("auto", "cpu", "eager", "reference"):
        y, last = selective_scan(u, u, A, B, B, return_last_state=True, backend=backend)
        assert (y.shape, last.shape) == ((2, 6, 5), (2, 6, 3))


@pytest.mark.slow
def test_a_network_runs_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = DeformMambaSR.from_preset("tiny", scale=2).eval()
        lr = torch.rand(1, 1, 16, 16)
        assert not has_values(lr)
        assert model(lr).shape == (1, 1, 32, 32)


def test_values_can_be_read_of_ordinary_tensors_only() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(has_values(x)) or x)(torch.ones(2))
    assert [has_values(torch.ones(2)), has_values(torch.ones(2, device="meta")), *seen] == [True, False, False]


# --------------------------------------------------------------------------------------------------- vmap, derivatives


@pytest.mark.parametrize("block", BLOCKS)
def test_batched_gradients_are_those_of_a_loop(block: Callable[..., nn.Module]) -> None:
    module, x = block(4), torch.rand(1, 4, 3, 4, requires_grad=True)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return module(x).sum((0, 1, 3))

    one_by_one = torch.autograd.functional.jacobian(rows, x)
    assert_close(torch.autograd.functional.jacobian(rows, x, vectorize=True), one_by_one)
    y = rows(x)
    (batched,) = torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True)
    assert_close(batched, one_by_one)


@pytest.mark.parametrize("block", BLOCKS)
def test_vmap_is_a_loop(block: Callable[..., nn.Module]) -> None:
    module, x = block(4), torch.rand(3, 2, 4, 3, 4)
    with torch.no_grad():
        assert_close(torch.func.vmap(module)(x), torch.stack([module(one) for one in x]))


@pytest.mark.parametrize("tool", [torch.autograd.functional.hessian, torch.autograd.functional.jvp])
def test_second_derivatives_of_a_kernel_name_the_cure(tool: Callable[..., Any]) -> None:
    module, x = SS2D(4), torch.rand(1, 4, 3, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x).square().sum()

    more = (x,) if tool is torch.autograd.functional.jvp else ()
    with pytest.raises(UnsupportedCall, match=r"no second derivative; .*scan_backend\('eager'\)"):
        tool(loss, x, *more)
    with scan_backend("eager"):
        assert tool(loss, x, *more) is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, in forward mode
def test_forward_mode_of_a_named_kernel_names_the_cure() -> None:
    module, x = SS2D(4), torch.rand(1, 4, 3, 4)
    with scan_backend("cpu"), pytest.raises(ScanBackendError, match="forward mode; use backend 'eager'"):
        torch.func.jvp(module, (x,), (x,))


# --------------------------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("block", [*BLOCKS, lambda c, **more: PatchEmbed(c, c, 1, **more)])
def test_blocks_follow_the_default_dtype_and_factory_arguments(block: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    plain = block(8).state_dict()
    torch.manual_seed(0)
    named = block(8, dtype=torch.float32, device="cpu").state_dict()
    assert all(plain[name].equal(named[name]) for name in plain)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        default = block(8)
    finally:
        torch.set_default_dtype(before)
    for module in (default, block(8, dtype=torch.float64)):
        assert {p.dtype for p in module.parameters()} == {torch.float64}
        assert module(torch.rand(1, 8, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert {p.dtype for p in block(8, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in block(8, device="meta").parameters()} == {"meta"}


def test_the_operator_runs_once_for_a_map() -> None:
    """The conversion of tensor subclasses adds no operation for plain tensors."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, offset, mask, weight = (x.permute(0, 3, 1, 2) for x in deform_arguments())
    with Watch():
        modulated_deform_conv2d(x, offset, mask, weight, padding=1)
    assert seen.count("deformmamba.deform_conv2d.default") == 1


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cudda", "did you mean 'cuda'\\?\\); available: auto, cpu"),
        ("CPU", "did you mean 'cpu'\\?\\); available"),
        ("gpu", "did you mean 'cuda'\\?\\); available"),
        ("cuda:99", "machine; available"),
        ("meta", "machine; available"),
        ([], "device \\[\\]: not available"),
        (torch.device("cuda", 99), "device 'cuda:99': not available on this machine; available"),
    ],
)
def test_a_device_that_is_not_there_gets_one_sentence(device: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        check_device(device, also=("auto",))


def test_a_constant_is_an_ordinary_tensor_wherever_it_is_first_computed() -> None:
    @constant(maxsize=1)
    def numbers(n: int) -> torch.Tensor:
        return torch.arange(float(n)) @ torch.eye(n)

    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        made = numbers(3)
    assert numbers(3) is made
    assert (made.device.type, made.dtype, made.is_inference()) == ("cpu", torch.float32, False)
