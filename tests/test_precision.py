"""docs/blocks.md has a table of what works with which block. Every cell is tested; a cell without a test fails."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn

from deformmamba.errors import UnsupportedCall
from deformmamba.export import portable_program
from deformmamba.layers import SS2D, DeformMambaBlock, ModulatedDeformBlock, MultiViewContext, VisionMambaBlock
from deformmamba.losses import ContrastiveEdgeLoss, SRLoss
from deformmamba.models import DeformMambaSR
from deformmamba.scan import scan_backend

TABLE = Path(__file__).parents[1] / "docs" / "blocks.md"

SMALL: dict[str, Any] = {
    "scale": 2, "dims": [4], "depths": [1], "patch": 2, "stem_channels": 2, "d_state": 2, "context_rates": [1, 2],
}  # fmt: skip

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "SS2D": lambda: SS2D(4, d_state=2),
    "VisionMambaBlock": lambda: VisionMambaBlock(4, d_state=2),
    "ModulatedDeformBlock": lambda: ModulatedDeformBlock(4),
    "DeformMambaBlock": lambda: DeformMambaBlock(4, d_state=2),
    "MultiViewContext": lambda: MultiViewContext(4),
    "ContrastiveEdgeLoss": ContrastiveEdgeLoss,
    "DeformMambaSR": lambda: DeformMambaSR(**SMALL),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The block with random parameters: offsets are not integers, and no parameter is zero."""
    torch.manual_seed(0)
    block = BLOCKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def inputs(
    name: str, h: int = 6, w: int = 5, dtype: torch.dtype = torch.float32, b: int = 2
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(h * w)
    channels = 1 if name == "DeformMambaSR" else 4
    n = 2 if name == "ContrastiveEdgeLoss" else 1
    return tuple(torch.rand(b, channels, h, w, dtype=torch.float64, generator=generator).to(dtype) for _ in range(n))


def value_and_gradients(
    block: Callable[..., Any], xs: tuple[torch.Tensor, ...], parameters: Any, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """The forward pass runs under autocast to `dtype`, the backward pass outside it, as PyTorch recommends."""
    xs = tuple(x.clone().requires_grad_() for x in xs)
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        y = block(*xs)
    return [y, *torch.autograd.grad(y.float().square().mean(), [*xs, *parameters])]


def fp32(name: str) -> None:
    y = make(name)(*inputs(name))
    assert y.dtype == torch.float32
    assert y.isfinite().all()


def fp64(name: str) -> None:
    single, double = make(name), make(name).double()
    y = double(*inputs(name, dtype=torch.float64))
    assert y.dtype == torch.float64
    double.load_state_dict(single.state_dict())
    torch.testing.assert_close(
        double(*inputs(name, dtype=torch.float64)).float(), single(*inputs(name)), rtol=1e-4, atol=1e-5
    )


def autocast(dtype: torch.dtype) -> Callable[[str], None]:
    def check(name: str) -> None:
        block = make(name)
        xs = inputs(name)
        with torch.autocast("cpu", dtype=dtype):
            y = block(*xs)
        torch.testing.assert_close(y.float(), block(*xs), rtol=0.05, atol=0.05)
        spot = torch.zeros_like(xs[0])
        spot[..., 3, 2] = 1
        for scale in (0.0, 1e-6, 1e3):
            for image in (xs[0], xs[0] - 0.5, spot):
                results = value_and_gradients(block, (scale * image, *xs[1:]), list(block.parameters()), dtype)
                assert results[0].isfinite().all(), f"input of {scale}"
                assert not any(r.isnan().any() for r in results), f"gradient at an input of {scale}"

    return check


def compiled(name: str, backend: str = "aot_eager", sizes: tuple[tuple[int, int], ...] = ((6, 5), (7, 9))) -> None:
    torch.compiler.reset()
    block = make(name)
    # torch 2.13's Inductor cannot order strides of unknown sizes; with dynamic=False it compiles one graph per size
    dynamic = False if backend == "inductor" and torch.__version__ < "2.15" else None
    other = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in sizes:
        xs = inputs(name, *size)
        wanted, got = (value_and_gradients(f, xs, list(block.parameters())) for f in (block, other))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def free_sizes(name: str) -> Any:
    h, w = (torch.export.Dim(n, min=4, max=512) for n in "hw")
    return tuple({2: h, 3: w} for _ in inputs(name))


def exported(name: str) -> None:
    block = make(name).eval()
    with torch.no_grad():
        program = torch.export.export(
            block, inputs(name), dynamic_shapes=free_sizes(name), prefer_deferred_runtime_asserts_over_guards=True
        ).module()
    for size in ((6, 5), (11, 8)):
        xs = inputs(name, *size)
        torch.testing.assert_close(program(*xs), block(*xs), rtol=1e-4, atol=1e-5)


def onnx(name: str) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    block = make(name).eval()
    program = portable_program(block, inputs(name), dynamic_shapes=free_sizes(name))
    file = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    assert file is not None
    session = onnxruntime.InferenceSession(file.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in ((6, 5), (11, 8)):
        xs = inputs(name, *size)
        names = [i.name for i in session.get_inputs()]
        (y,) = session.run(None, {n: x.numpy() for n, x in zip(names, xs, strict=True)})
        torch.testing.assert_close(torch.as_tensor(y), block(*xs).detach(), rtol=1e-4, atol=1e-5)


def double_backward(name: str, backend: str = "auto") -> None:
    """A Hessian-vector product, compared with a difference of two gradients."""
    block = make(name, torch.float64)
    x, *rest = inputs(name, 4, 5, torch.float64, b=1)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(x: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(block(x, *rest).square().sum(), x, create_graph=create_graph)[0]

    with scan_backend(backend):
        x = x.clone().requires_grad_()
        (product,) = torch.autograd.grad((gradient(x, create_graph=True) * v).sum(), x)
        step = 1e-6
        difference = (gradient(x.detach() + step * v) - gradient(x.detach() - step * v)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-6)


def double_backward_eager(name: str) -> None:
    double_backward(name, "eager")
    with pytest.raises(RuntimeError):
        double_backward(name, "cpu")


def traced(name: str) -> None:
    block = make(name).eval()
    program = torch.jit.trace(block, inputs(name), check_trace=False)
    for size in ((9, 4), (5, 6)):
        xs = inputs(name, *size)
        assert_close(program(*xs), block(*xs))


def trace_refused(name: str) -> None:
    with pytest.raises(UnsupportedCall, match=r"torch\.jit\.trace .*torch\.export"):
        torch.jit.trace(make(name).eval(), inputs(name))


def fx(name: str) -> None:
    block = make(name).eval()
    network = nn.Sequential(nn.Identity(), block) if name != "ContrastiveEdgeLoss" else block
    for program in (torch.fx.symbolic_trace(block), torch.fx.symbolic_trace(network)):
        for size in ((6, 5), (9, 4)):
            xs = inputs(name, *size)
            torch.testing.assert_close(program(*xs), block(*xs), rtol=0, atol=0)


def fx_refused(name: str) -> None:
    with pytest.raises(TypeError, match="must be a floating-point tensor, not Proxy"):
        torch.fx.symbolic_trace(make(name).eval())


def fsdp(name: str) -> None:
    """One process is enough: FSDP still shards the parameters, gathers them for each pass, and frees them again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    block, sharded = make(name), make(name)
    xs = inputs(name)
    wanted = value_and_gradients(block, xs, list(block.parameters()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for _ in range(2):
            sharded.zero_grad()
            y = sharded(*xs)
            y.square().mean().backward()
        found = [y, *(p.grad.full_tensor() for p in sharded.parameters())]
        assert_close(found, [wanted[0], *wanted[1 + len(xs) :]])
    finally:
        torch.distributed.destroy_process_group()


def none_to_shard(name: str) -> None:
    assert not list(make(name).parameters())


class MetaTensor(torch.Tensor):
    """Like MONAI's class: results have this class too, and `new_empty` takes the sizes as one tuple."""

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        return torch.empty(size, dtype=dtype or self.dtype, device=device or self.device).as_subclass(type(self))


def metatensor(name: str) -> None:
    block, xs = make(name), inputs(name)
    given = [x.clone().requires_grad_() for x in xs]
    y = block(*(x.as_subclass(MetaTensor) for x in given))
    assert type(y) is MetaTensor
    y.square().mean().backward()
    found = [y.as_subclass(torch.Tensor), *(x.grad for x in (*given, *block.parameters()))]
    assert_close(found, value_and_gradients(block, xs, list(block.parameters())))


def meta_device(name: str) -> None:
    block, xs = make(name), inputs(name)
    y = block.to("meta")(*(x.to("meta").requires_grad_() for x in xs))
    assert y.is_meta
    assert y.shape == make(name)(*xs).shape
    y.square().mean().backward()


def vmapped(name: str) -> None:
    block, (x, *rest) = make(name), inputs(name, 4, 4, b=1)

    def rows(x: torch.Tensor) -> torch.Tensor:
        y = block(x, *rest)
        return y.sum((0, 1, 3)) if y.ndim else y[None]

    one_by_one = torch.autograd.functional.jacobian(rows, x)
    assert_close(torch.autograd.functional.jacobian(rows, x, vectorize=True), one_by_one)
    several = torch.stack([x, x.flip(-1), x.square()])
    with torch.no_grad():
        assert_close(torch.func.vmap(rows)(several), torch.stack([rows(each) for each in several]))


# (column, cell): (the function that tests it, its mark: some take seconds, ONNX's exporter half a minute)
CHECKS: dict[tuple[str, str], tuple[Callable[[str], None], str | None]] = {
    ("fp32", "yes"): (fp32, None),
    ("bf16 autocast", "yes"): (autocast(torch.bfloat16), None),
    ("fp16 autocast", "yes"): (autocast(torch.float16), None),
    ("fp64", "yes"): (fp64, None),
    ("compile", "yes"): (compiled, "slow"),
    ("export", "yes"): (exported, "slow"),
    ("ONNX", "yes"): (onnx, "long"),
    ("double backward", "yes"): (double_backward, None),
    ("double backward", "eager scan"): (double_backward_eager, None),
    ("jit.trace", "yes"): (traced, None),
    ("jit.trace", "refused"): (trace_refused, None),
    ("fx", "yes"): (fx, None),
    ("fx", "refused"): (fx_refused, None),
    ("FSDP", "yes"): (fsdp, "slow"),
    ("FSDP", "no parameters"): (none_to_shard, None),
    ("MetaTensor", "yes"): (metatensor, None),
    ("meta device", "yes"): (meta_device, None),
    ("vmap", "yes"): (vmapped, None),
}


def marks_of(block: str, column: str, cell: str) -> list[pytest.MarkDecorator]:
    _, mark = CHECKS.get((column, cell), (None, None))
    if column == "compile" and block in ("DeformMambaBlock", "DeformMambaSR"):
        mark = "long"  # they contain the other blocks
    return [getattr(pytest.mark, mark)] if mark else []


def table() -> dict[tuple[str, str], str]:
    """{(block, column): cell} of docs/blocks.md."""
    lines = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (_, *columns), _, *body = rows
    return {(row[0], column): cell for row in body for column, cell in zip(columns, row[1:], strict=True)}


def test_the_table_has_every_block_and_every_column() -> None:
    columns = {column for column, _ in CHECKS}
    assert set(table()) == {(block, column) for block in BLOCKS for column in columns}


@pytest.mark.parametrize(
    ("block", "column", "cell"),
    [
        pytest.param(block, column, cell, marks=marks_of(block, column, cell))
        for (block, column), cell in table().items()
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's exporters and compilers warn about their own code
def test_the_table_is_true(block: str, column: str, cell: str) -> None:
    assert (column, cell) in CHECKS, f"docs/blocks.md says {cell!r} of {block}, {column}; no test tries that"
    CHECKS[column, cell][0](block)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_inductor_gives_the_same_network() -> None:
    compiled("DeformMambaSR", "inductor", sizes=((6, 5),))  # it compiles a second size anew, for more than a minute


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_training_at_the_papers_learning_rate_stays_finite(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = DeformMambaSR(**SMALL | {"dims": [8, 12], "depths": [1, 1], "skip": "zero-fill"}).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    loss_of = SRLoss()
    hr = torch.rand(4, 1, 16, 16).round()
    lr = hr[..., ::2, ::2].contiguous()
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss = loss_of(model(lr), hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]
