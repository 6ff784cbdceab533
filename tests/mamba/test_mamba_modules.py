"""The blocks Mamba and Mamba2 and the norms: parameters as in mamba-ssm, sequences, single steps, packed sequences."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from deformmamba.errors import DeformMambaError
from deformmamba.mamba import (
    LayerNormGated,
    Mamba,
    Mamba2,
    RMSNorm,
    RMSNormGated,
    gated_norm_ref,
    layer_norm_fn,
    rms_norm_fn,
    rms_norm_ref,
    rmsnorm_fn,
    selective_scan_ref,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# names and shapes of the parameters in mamba-ssm 2.3, for d_model=8
MAMBA = {
    "A_log": (16, 4), "D": (16,), "in_proj.weight": (32, 8), "conv1d.weight": (16, 1, 4), "conv1d.bias": (16,),
    "x_proj.weight": (9, 16), "dt_proj.weight": (16, 1), "dt_proj.bias": (16,), "out_proj.weight": (8, 16),
}  # fmt: skip
MAMBA2 = {
    "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (52, 8), "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,), "norm.weight": (16,), "out_proj.weight": (8, 16),
}  # fmt: skip


def test_parameters_have_the_names_and_shapes_of_mamba_ssm() -> None:
    block = Mamba(8, d_state=4)
    assert {name: tuple(t.shape) for name, t in block.state_dict().items()} == MAMBA
    small = Mamba2(8, d_state=4, headdim=4, ngroups=2)
    assert {name: tuple(t.shape) for name, t in small.state_dict().items()} == MAMBA2
    added = {name for name in Mamba(8, bimamba_type="v3", nslices=2).state_dict() if name not in MAMBA}
    parts = ("conv1d_{}.weight", "conv1d_{}.bias", "x_proj_{}.weight", "dt_proj_{}.weight", "dt_proj_{}.bias")
    assert added == {name.format(way) for way in "bs" for name in (*parts, "A_{}_log", "D_{}")}


def test_initial_values_are_mambas() -> None:
    block = Mamba(32, dt_min=0.01, dt_max=0.02)
    steps = F.softplus(block.dt_proj.bias)
    assert ((steps > 0.0099) & (steps < 0.0201)).all()
    assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(64, -1))
    heads = Mamba2(32, headdim=8, A_init_range=(2, 3))
    assert ((heads.A_log.exp() >= 2 - 1e-5) & (heads.A_log.exp() <= 3 + 1e-5)).all()
    assert heads.A_log._no_weight_decay  # type: ignore[attr-defined]


BLOCKS: dict[str, Any] = {
    "Mamba": lambda: Mamba(8, d_state=4, layer_idx=0),
    "Mamba2": lambda: Mamba2(8, d_state=4, headdim=4, ngroups=2, layer_idx=0),
    "Mamba2 with an MLP": lambda: Mamba2(8, d_state=4, headdim=4, d_ssm=8, rmsnorm=False, layer_idx=0),
    "Mamba2 with limits": lambda: Mamba2(8, d_state=4, headdim=4, dt_limit=(0.01, 0.05), D_has_hdim=True, layer_idx=0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_filling_and_steps_give_what_the_whole_sequence_gives(name: str) -> None:
    block = BLOCKS[name]().double()
    x = torch.randn(2, 9, 8).double()
    whole = block(x)
    assert whole.shape == x.shape
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        parts = [block(x[:, :6], inference_params=params)]
        for t in range(6, 9):
            params.seqlen_offset = t
            parts.append(block(x[:, t : t + 1], inference_params=params))
    assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_has_a_gradient(name: str) -> None:
    block = BLOCKS[name]()
    block(torch.randn(2, 9, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and (p.grad != 0).any() for p in block.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_a_pack_of_sequences_gives_what_each_gives() -> None:
    block = Mamba2(8, d_state=4, headdim=4, layer_idx=0).double()
    x, starts = torch.randn(1, 10, 8).double(), torch.tensor([0, 4, 10])
    seq_idx = torch.tensor([[0] * 4 + [1] * 6])
    expected = torch.cat([block(part) for part in x.split([4, 6], 1)], 1)
    assert_close(block(x, seq_idx=seq_idx), expected)
    assert_close(block(x, cu_seqlens=starts), expected)
    longer = torch.cat([x, x[:, :2]], 1)
    assert_close(block(longer, cu_seqlens=starts), torch.cat([expected, block(x[:, :2])], 1))
    with pytest.raises(DeformMambaError, match="cu_seqlens is for one pack"):
        block(x.expand(2, -1, -1), cu_seqlens=starts)
    with pytest.raises(DeformMambaError, match=r"Mamba2: torch\.jit\.trace would record the length"):
        torch.jit.trace(block, x, check_trace=False)
    with pytest.raises(DeformMambaError, match=r"Mamba: torch\.jit\.trace would record the length"):
        torch.jit.trace(Mamba(8, d_state=4).double(), x, check_trace=False)
    assert_close(block(x[0], seqlen=10, seq_idx=seq_idx), expected[0])
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with torch.no_grad():
        block(x, seq_idx=seq_idx, cu_seqlens=starts, inference_params=params)
        params.seqlen_offset = 1
        following = torch.randn(2, 1, 8).double()
        y = block(following, inference_params=params)
        alone = [
            block(torch.cat([part[0], step])[None])[:, -1:]
            for part, step in zip(x.split([4, 6], 1), following, strict=True)
        ]
    assert_close(y, torch.cat(alone))


def test_both_directions_and_slices() -> None:
    block = Mamba(8, d_state=4, bimamba_type="v2")
    twin = {name: value for name, value in block.state_dict().items() if "_b" not in name or name == "dt_proj.bias"}
    block.load_state_dict(twin | {f"{n.split('.')[0]}_b.{n.split('.')[1]}": v for n, v in twin.items()
                                  if n.split(".")[0] in ("conv1d", "x_proj", "dt_proj")}
                          | {"A_b_log": twin["A_log"], "D_b": twin["D"]})  # fmt: skip
    x = torch.randn(1, 6, 8)
    # both directions have the same weights, so reversing the sequence reverses the output
    assert_close(block(x.flip(1)), block(x).flip(1))
    for other in ({"if_divide_out": True}, {"if_devide_out": True}):
        halved = Mamba(8, d_state=4, bimamba=True, **other)
        halved.load_state_dict(block.state_dict())
        assert_close(halved(x), block(x) / 2)
    sliced = Mamba(8, d_state=4, bimamba_type="v3", nslices=3)
    assert sliced(x).shape == x.shape
    with pytest.raises(ValueError, match="7 steps does not divide into 3 slices"):
        sliced(torch.randn(1, 7, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_can_be_differentiated_inside_autocast(dtype: torch.dtype) -> None:
    for block in (Mamba(8, d_state=4), Mamba2(8, d_state=4, headdim=4)):
        x = torch.randn(1, 9, 8)
        grads = []
        for inside in (True, False):
            with torch.autocast("cpu", dtype):
                y = block(x)
                if inside:
                    grads.append(torch.autograd.grad(y.float().sum(), block.parameters()))
            if not inside:
                grads.append(torch.autograd.grad(y.float().sum(), block.parameters()))
        for one, other in zip(*grads, strict=True):
            assert_close(one, other, atol=2e-2 * float(other.abs().max()), rtol=0)


def test_two_rates_and_a_factor_of_the_output() -> None:
    block = Mamba(8, d_state=4, bimamba_type="v1", init_layer_scale=0.5)
    assert set(block.state_dict()) == {*MAMBA, "A_b_log", "gamma"}
    x = torch.randn(2, 6, 8)
    u, z = block.in_proj(x).transpose(1, 2).chunk(2, 1)
    u = F.silu(block.conv1d(u)[..., :6])
    dt, B, C = (part.transpose(1, 2) for part in block.x_proj(u.transpose(1, 2)).split([1, 4, 4], -1))
    parts = [u, block.dt_proj.weight @ dt, B, C, z]

    def scan(A_log: torch.Tensor, u: Any, dt: Any, B: Any, C: Any, z: Any) -> Any:
        return selective_scan_ref(u, dt, -A_log.exp(), B, C, block.D, z, block.dt_proj.bias, True)

    with torch.no_grad():
        block.A_b_log.add_(0.3)
        block.gamma.add_(torch.rand(8))
    y = scan(block.A_log, *parts) + scan(block.A_b_log, *(part.flip(-1) for part in parts)).flip(-1)
    assert_close(block(x), block.gamma * block.out_proj(y.transpose(1, 2)))
    scaled, plain = Mamba(8, layer_idx=0, init_layer_scale=2.0), Mamba(8, layer_idx=0)
    plain.load_state_dict({name: value for name, value in scaled.state_dict().items() if name != "gamma"})
    for offset, piece in ((0, x), (6, x[:, :1])):
        caches = [SimpleNamespace(key_value_memory_dict={}, seqlen_offset=offset) for _ in range(2)]
        assert_close(scaled(piece, caches[0]), 2 * plain(piece, caches[1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba(8, bimamba_type="v9"),
        lambda: Mamba(8, dt_init="zero"),
        lambda: Mamba2(8, headdim=3),
        lambda: Mamba2(8, headdim=4, process_group=object()),
        lambda: Mamba2(8, headdim=4, A_init_range=(0, 1)),
        lambda: Mamba(8)(torch.zeros(1, 1, 8), SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)),
        lambda: Mamba(8).step(torch.zeros(1, 2, 8), torch.zeros(1), torch.zeros(1)),
        lambda: rms_norm_fn(torch.zeros(1, 2), torch.ones(2), None, x1=torch.zeros(1)),
        lambda: rmsnorm_fn(torch.zeros(1, 4), torch.ones(4), None, group_size=3),
        lambda: rmsnorm_fn(torch.zeros(1, 4), torch.ones(4), None, z=torch.zeros(1, 3)),
    ],
)
def test_what_is_not_supported_is_refused(make: Any) -> None:
    with pytest.raises(DeformMambaError):
        make()


# ---------------------------------------------------------------------------------------------------------------- norms


class Adapter(torch.nn.Module):
    """A layer of a user around one of the block's, as LoRA is: it adds to the result and has no weight."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside, self.added = inside, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x) + self.added


ADAPTED = {
    "Mamba": lambda: Mamba(8, d_state=4),
    "v1": lambda: Mamba(8, d_state=4, bimamba_type="v1"),
    "v3": lambda: Mamba(8, d_state=4, bimamba_type="v3", nslices=2),
    "Mamba2": lambda: Mamba2(8, d_state=4, headdim=4),
    "Mamba2 without norm": lambda: Mamba2(8, d_state=4, headdim=4, rmsnorm=False),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_and_hooks_inside_a_block_are_called(name: str) -> None:
    block, x = ADAPTED[name](), torch.randn(2, 6, 8)
    expected = block(x)
    called = []
    layers = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d)}
    for n, layer in layers.items():
        handle = layer.register_forward_hook(lambda *_, n=n: called.append(n))
        assert_close(block(x), expected)
        handle.remove()
        block.set_submodule(n, Adapter(layer))
        assert_close(block(x), expected)
    assert set(called) == layers.keys()
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for n, p in block.named_parameters() if n.endswith("added"))


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba2 without norm"])
def test_steps_with_adapters_are_the_whole_sequence(name: str) -> None:
    block, x = ADAPTED[name](), torch.randn(2, 6, 8)
    for n, layer in list(block.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            block.set_submodule(n, Adapter(layer))
            torch.nn.init.constant_(block.get_parameter(f"{n}.added"), 0.1)
    states = block.allocate_inference_cache(2, 6)
    steps = [block.step(x[:, t, None], *states)[0] for t in range(6)]
    assert_close(torch.cat(steps, 1), block(x))
    block.conv1d = Adapter(block.conv1d)
    with pytest.raises(DeformMambaError, match=r"^Mamba2?\.step: conv1d is an? Adapter; a step needs"):
        block.step(x[:, :1], *states)


@pytest.mark.parametrize("name", ADAPTED)
def test_copies_keep_what_weight_decay_leaves_out(name: str) -> None:
    def marked(block: torch.nn.Module) -> set[str]:
        return {n for n, p in block.named_parameters() if hasattr(p, "_no_weight_decay")}

    block = ADAPTED[name]()
    expected = {n for n in block.state_dict() if n.startswith(("A_", "D")) or n == "dt_bias"}
    assert marked(block) == expected
    assert marked(copy.deepcopy(block)) == expected
    assert marked(pickle.loads(pickle.dumps(block))) == expected
    assert marked(ADAPTED[name]().to("meta").to_empty(device="cpu")) == expected
    block.load_state_dict(ADAPTED[name]().state_dict(), assign=True)
    assert marked(block) == expected


def test_norms_are_pytorchs() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    assert_close(rms_norm_fn(x, weight, None, eps=1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    assert_close(layer_norm_fn(x, weight, bias, eps=1e-5), F.layer_norm(x, (8,), weight, bias, 1e-5))
    assert_close(LayerNormGated(8)(x), F.layer_norm(x, (8,)))


def test_a_residual_is_added_first_and_returned() -> None:
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)
    y, total = rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert_close(total, x.float() + residual)
    assert_close(y.float(), rms_norm_ref(x.float() + residual, weight, None).bfloat16().float())
    assert RMSNorm(8)(x, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_the_gated_norm_equals_its_definition(before: bool, size: int | None) -> None:
    given = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    norm = RMSNormGated(8, group_size=size, norm_before_gate=before).double()
    torch.nn.init.normal_(norm.weight)
    y = norm(*given)
    expected = gated_norm_ref(given[0], norm.weight, None, given[1], 1e-5, size, before)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    wanted = [*given, norm.weight]
    assert_close(list(torch.autograd.grad(y, wanted, dy)), list(torch.autograd.grad(expected, wanted, dy)))
