"""The blocks of the paper's figure 1: shapes, definitions, initial values, every option, errors that name the block."""

import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

from deformmamba.flops import count_flops
from deformmamba.layers import (
    SS2D,
    ChannelAttention,
    DeformMambaBlock,
    DropPath,
    ModulatedDeformBlock,
    MultiViewContext,
    PatchEmbed,
    PatchExpand,
    PatchMerge,
    VisionMambaBlock,
)
from deformmamba.models import DeformMambaSR
from deformmamba.scan import selective_scan

BLOCKS = {
    "SS2D": lambda: SS2D(8),
    "VisionMambaBlock": lambda: VisionMambaBlock(8),
    "ModulatedDeformBlock": lambda: ModulatedDeformBlock(8),
    "DeformMambaBlock": lambda: DeformMambaBlock(8),
    "MultiViewContext": lambda: MultiViewContext(8),
    "ChannelAttention": lambda: ChannelAttention(8),
}


def feature_map(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1), (1, 13)])
def test_shape_and_memory_format_do_not_matter(name, size):
    block = BLOCKS[name]().eval()
    x = feature_map(2, 8, *size)
    y = block(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert_close(block(x.contiguous(memory_format=torch.channels_last)), y)
    wide = feature_map(2, 16, *size)
    assert_close(block(wide[:, ::2]), block(wide[:, ::2].contiguous()))


@pytest.mark.parametrize("name", BLOCKS)
def test_one_sample_does_not_see_another(name):
    block = BLOCKS[name]().eval()
    x = feature_map(3, 8, 6, 7)
    assert_close(block(x)[1:2], block(x[1:2]))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_gets_a_gradient(name):
    block = BLOCKS[name]()
    block(feature_map(2, 8, 6, 7) + torch.arange(8.0)[:, None, None]).square().sum().backward()
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", BLOCKS)
def test_double_precision_stays_double(name):
    block = BLOCKS[name]().double()
    assert block(feature_map(1, 8, 4, 5, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_about_the_same_numbers(name, dtype):
    block = BLOCKS[name]()
    x = feature_map(1, 8, 6, 5)
    with torch.autocast("cpu", dtype=dtype):
        y = block(x)
    torch.testing.assert_close(y.float(), block(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_patches_in_bfloat16():
    block, x = PatchEmbed(16, 40, 4), feature_map(1, 16, 24, 24)  # as in the published weights
    traced = torch.fx.symbolic_trace(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        torch.testing.assert_close(traced(x), y, rtol=0, atol=0)
    torch.testing.assert_close(y.float(), block(x), rtol=0.05, atol=0.05)
    block, x = block.bfloat16(), x.bfloat16()
    torch.testing.assert_close(block(x).float(), y.float(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 7, 4, 4),
        torch.zeros(8, 4, 4),
        torch.zeros(1, 8, 4, 4).long(),
        torch.zeros(1, 8, 4, 4, dtype=torch.complex64),
        torch.zeros(1, 8, 0, 4),
        torch.zeros(1, 8, 4, 0),
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_a_wrong_map_is_refused_by_name_with_the_shape_given_and_wanted(name, x):
    wanted = (
        rf"^{name}: given {x.dtype} {re.escape(str(tuple(x.shape)))}; wanted floating point \(b, 8, h, w\), h and w at"
    )
    with pytest.raises(ValueError, match=wanted):
        BLOCKS[name]()(x)
    with pytest.raises(ValueError, match=f"^{name}: given list; wanted"):
        BLOCKS[name]()([1.0])


@pytest.mark.parametrize(
    ("block", "x", "wanted"),
    [
        (
            PatchEmbed(3, 8, 4),
            torch.zeros(1, 3, 8, 6),
            "PatchEmbed: .*wanted floating point .b, 3, h, w., h and w multiples of 4",
        ),
        (PatchEmbed(3, 8, 4), torch.zeros(1, 3, 0, 4), "PatchEmbed: .*multiples of 4"),
        (
            PatchMerge(3, 6),
            torch.zeros(1, 3, 8, 7),
            "PatchMerge: .*wanted floating point .b, 3, h, w., h and w multiples of 2",
        ),
        (
            PatchExpand(3, 6),
            torch.zeros(1, 4, 8, 7),
            "PatchExpand: .*wanted floating point .b, 3, h, w., h and w at least 1",
        ),
    ],
)
def test_patches_that_do_not_fit_are_refused(block, x, wanted):
    with pytest.raises(ValueError, match=wanted):
        block(x)


# SS2D


def plain_ss2d(block, x):
    """The definition: unfold the map in each direction, scan, fold back, sum."""
    _, d, h, w = x.shape
    rows, columns = x.flatten(2), x.mT.flatten(2)
    sequences = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)][:4], 1)
    if block.directions < 4:
        sequences = sequences[:, [0, 2][: block.directions]]
    projected = torch.einsum("bkdl,kcd->bkcl", sequences, block.x_proj)
    dt, B, C = projected.split([block.dt_rank, block.d_state, block.d_state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, block.dt_proj)
    y = selective_scan(
        sequences.flatten(1, 2),
        delta.flatten(1, 2),
        -block.A_log.exp(),
        B,
        C,
        block.D,
        delta_bias=block.dt_bias.flatten(),
        delta_softplus=True,
        discretization=block.discretization,
        backend="reference",
    ).unflatten(1, (block.directions, d))
    if block.directions < 4:
        back = [y[:, 0], y[:, 1].flip(-1)] if block.directions == 2 else [y[:, 0]]
        return sum(back).unflatten(-1, (h, w))
    rows = y[:, 0] + y[:, 2].flip(-1)
    columns = y[:, 1] + y[:, 3].flip(-1)
    return rows.unflatten(-1, (h, w)) + columns.unflatten(-1, (w, h)).mT


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_ss2d_is_its_definition_in_value_and_gradient(directions, discretization):
    block = SS2D(6, d_state=4, directions=directions, discretization=discretization).double()
    with torch.no_grad():  # four different directions: swapping two of them changes the result
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = feature_map(2, 6, 3, 5, dtype=torch.float64).requires_grad_()
    weight = feature_map(2, 6, 3, 5, dtype=torch.float64, seed=1)
    got, wanted = block(x), plain_ss2d(block, x)
    assert_close(got, wanted)
    inputs = [x, *block.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert_close(a, b)


def test_ss2d_starts_as_mamba_does():
    block = SS2D(64)
    step = F.softplus(block.dt_bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    assert step.log().std() > 0.9  # log-uniform over two decades: 4.6 / sqrt(12) = 1.33
    assert_close(-block.A_log.exp()[0], -torch.arange(1.0, 17))
    assert block.D.eq(1).all()
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "x_proj": (4, 4 + 32, 64), "dt_proj": (4, 64, 4), "dt_bias": (4, 64), "A_log": (256, 16), "D": (256,)
    }  # fmt: skip


def test_a_pixel_of_ss2d_sees_the_whole_map():
    block = SS2D(4)
    x = feature_map(1, 4, 6, 7).requires_grad_()
    block(x)[0, :, 2, 3].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()


# the deform branch


def test_the_deform_block_starts_as_half_a_convolution():
    block = ModulatedDeformBlock(4, 6, stride=2, dilation=2)
    x = feature_map(1, 4, 9, 8)
    wanted = F.conv2d(x, block.weight / 2, block.bias, stride=2, padding=2, dilation=2)
    assert_close(block(x), wanted)


def test_offsets_move_the_samples_dy_before_dx():
    block = ModulatedDeformBlock(1, bias=False)
    with torch.no_grad():
        block.offset_mask.bias[0:18:2] = 1  # dy of every tap
        block.offset_mask.bias[18:] = 100  # all masks 1
        block.weight.zero_()[0, 0, 1, 1] = 1
    x = feature_map(1, 1, 5, 5)
    assert_close(block(x)[0, 0, :4], x[0, 0, 1:])


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 5},
        {"groups": 4},
        {"deform_groups": 2},
        {"bias": False},
        {"norm": "layer"},
        {"norm": torch.nn.BatchNorm2d},
        {"activation": torch.nn.ReLU()},
        {"stride": 3, "dilation": 2},
    ],
    ids=str,
)
def test_options_of_the_deform_block(options):
    block = ModulatedDeformBlock(4, 8, **options)
    y = block(feature_map(1, 4, 6, 7))
    stride = options.get("stride", 1)
    assert y.shape == (1, 8, math.ceil(6 / stride), math.ceil(7 / stride))
    kernel, groups = options.get("kernel_size", 3), options.get("deform_groups", 1)
    assert block.weight.shape == (8, 4 // options.get("groups", 1), kernel, kernel)
    assert block.offset_mask.weight.shape[0] == 3 * groups * kernel**2
    assert (block.bias is None) == (options.get("bias") is False)
    if "activation" in options:
        assert (y >= 0).all()
    if "norm" in options:
        axes = 1 if options["norm"] == "layer" else (0, 2, 3)
        torch.testing.assert_close(y.mean(axes), torch.zeros_like(y.mean(axes)), atol=1e-5, rtol=0)


def test_deformable_groups_have_offsets_of_their_own():
    block = ModulatedDeformBlock(2, groups=2, deform_groups=2, bias=False)
    with torch.no_grad():
        block.offset_mask.bias[1:18:2] = 1  # dx of every tap, first group
        block.offset_mask.bias[36:] = 100  # all masks 1
        block.weight.zero_()[:, 0, 1, 1] = 1
    x = feature_map(1, 2, 5, 5)
    y = block(x)
    assert_close(y[0, 0, :, :4], x[0, 0, :, 1:])
    assert_close(y[0, 1], x[0, 1])


@pytest.mark.parametrize("options", [
        {"kernel_size": 4}, {"deform_groups": 3}, {"groups": 3}, {"stride": 0}, {"dilation": 0}, {"out_channels": 0},
        {"norm": "batch"}, {"activation": torch.nn.ReLU},
    ], ids=str)  # fmt: skip
def test_impossible_deform_blocks_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=f"^ModulatedDeformBlock: .*{next(iter(options))}"):
        ModulatedDeformBlock(4, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SS2D(0), "SS2D: channels is 0"),
        (lambda: SS2D(8, d_state=0), "SS2D: d_state is 0"),
        (lambda: SS2D(8, dt_rank=0), "SS2D: dt_rank is 0"),
        (lambda: SS2D(8, directions=3), r"SS2D: directions is 3; it must be one of \(1, 2, 4\)"),
        (lambda: SS2D(8, dt_min=0.2), "SS2D: dt_min is 0.2 and dt_max 0.1"),
        (lambda: SS2D(8, discretization="bilinear"), "SS2D: discretization is 'bilinear'"),
        (lambda: VisionMambaBlock(0), "VisionMambaBlock: channels is 0"),
        (lambda: VisionMambaBlock(8, expand=0), "VisionMambaBlock: expand is 0"),
        (lambda: VisionMambaBlock(8, expand=float("inf")), "VisionMambaBlock: expand is inf; .* and finite"),
        (lambda: SS2D(8, dt_max=float("inf")), "SS2D: dt_max is inf"),
        (lambda: SS2D(8, dt_min=float("nan")), "SS2D: dt_min is nan"),
        (lambda: VisionMambaBlock(8, expand=0.01), "VisionMambaBlock: inner_channels is 0"),
        (lambda: VisionMambaBlock(8, kernel_size=2), "VisionMambaBlock: kernel_size is 2; it must be odd"),
        (lambda: VisionMambaBlock(8, drop_path=1), "DropPath: p is 1"),
        (lambda: VisionMambaBlock(8, drop_path="0.1"), "DropPath: p must be a number"),
        (lambda: VisionMambaBlock(8, drop_path=None), "DropPath: p must be a number"),
        (lambda: ModulatedDeformBlock(8, stride=None), "ModulatedDeformBlock: stride must be an integer above 0"),
        (lambda: ModulatedDeformBlock(8, norm=torch.nn.BatchNorm2d(8)), ".*the class nn.BatchNorm2d"),
        (lambda: ModulatedDeformBlock(8, norm=lambda c: torch.relu), ".*the class nn.BatchNorm2d"),
        (lambda: SS2D(8, d_state=None), "SS2D: d_state must be an integer above 0, not None"),
        (lambda: SS2D(8, dt_min=None), "SS2D: dt_min must be a number above 0, not None"),
        (lambda: SS2D(8, directions=True), "SS2D: directions is True"),
        (lambda: MultiViewContext(None), "MultiViewContext: channels must be an integer"),
        (lambda: MultiViewContext(8, activation="relu"), "MultiViewContext: activation is 'relu'; it must be a module"),
        (lambda: MultiViewContext(8, activation=torch.nn.ReLU), "MultiViewContext: activation is .*ReLU"),
        (lambda: DeformMambaBlock(8, deform_groups=3), "ModulatedDeformBlock: .*deform_groups=3"),
        (lambda: MultiViewContext(8, rates=()), "MultiViewContext: rates"),
        (lambda: MultiViewContext(8, rates=(1, 65536)), "MultiViewContext: rates"),
        (lambda: MultiViewContext(8, branch_channels=0), "MultiViewContext: branch_channels is 0"),
        (lambda: ChannelAttention(8, reduction=0), "ChannelAttention: reduction is 0"),
    ],
)
def test_impossible_blocks_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


def test_small_integers_of_numpy_do_not_overflow():
    few, many = np.uint8(4), np.uint8(200)
    assert MultiViewContext(many, branch_channels=np.uint8(100)).fuse.weight.shape == (200, 400, 1, 1)
    wide = ModulatedDeformBlock(8, kernel_size=np.uint8(11), dilation=np.uint8(60))
    assert (wide.offset_mask.out_channels, wide.padding) == (363, 300)
    scan = SS2D(8, d_state=np.uint8(130), dt_rank=few, directions=np.int64(2))
    assert scan.x_proj.shape == (2, 264, 8)
    assert type(scan.directions) is int
    assert PatchExpand(many, many, few).expand.out_features == 3200


def test_time_steps_start_in_the_range_that_was_asked_for():
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(SS2D(64, dt_min=1e-6, dt_max=1e-5).dt_bias)
    assert 0.99e-6 < steps.min() < 2e-6
    assert 0.8e-5 < steps.max() < 1.01e-5


# the others


def test_the_mamba_block_is_gated_and_residual():
    block = VisionMambaBlock(8)
    x = feature_map(1, 8, 4, 4)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.bias.zero_()  # a closed gate leaves only the bias of the last linear layer, which is zero too
    assert_close(block(x), x + block.attention(block.out.bias[:, None, None].expand(1, 8, 4, 4)))


@pytest.mark.parametrize("options", [
        {"channel_attention": False}, {"directions": 1}, {"directions": 2}, {"expand": 1.5}, {"d_state": 3},
        {"kernel_size": 1}, {"dt_rank": 1},
    ], ids=str)  # fmt: skip
def test_options_of_the_mamba_block(options):
    default, changed = VisionMambaBlock(16), VisionMambaBlock(16, **options)
    assert sum(p.numel() for p in changed.parameters()) < sum(p.numel() for p in default.parameters())
    assert changed(feature_map(1, 16, 4, 5)).shape == (1, 16, 4, 5)


def test_drop_path_drops_a_branch_not_the_input():
    block = VisionMambaBlock(8, drop_path=0.9)
    x = feature_map(20, 8, 2, 2)
    kept = [torch.equal(a, b) for a, b in zip(block(x), x, strict=True)]
    assert 10 < sum(kept) < 20


@pytest.mark.parametrize("options", [{"deform_groups": 2}, {"dt_rank": 2}, {"drop_path": 0.5}], ids=str)
def test_options_of_a_deform_mamba_block_reach_their_branch(options):
    block = DeformMambaBlock(8, **options)
    reached = {
        "deform_groups": block.deform.taps // 9,
        "dt_rank": block.mamba.ss2d.dt_rank,
        "drop_path": block.mamba.drop_path.p,
    }
    for name, value in options.items():
        assert reached[name] == value


def test_the_branches_of_a_deform_mamba_block_are_summed():
    block = DeformMambaBlock(8)
    x = feature_map(1, 8, 6, 6)
    assert_close(block(x), block.mamba(x) + block.deform(x))
    plain = DeformMambaBlock(8, deform=False)
    assert not any("deform" in name for name, _ in plain.named_parameters())


def test_all_context_branches_cost_at_most_one_convolution():
    context = MultiViewContext(64)
    assert sum(b.weight.numel() for b in context.branches) <= 64 * 64 * 9
    assert [b.dilation[0] for b in context.branches] == [1, 2, 3, 4]
    wide = MultiViewContext(8, rates=(1, 6), branch_channels=8, activation=torch.nn.Identity())
    assert [(b.weight.shape[0], b.dilation) for b in wide.branches] == [(8, (1, 1)), (8, (6, 6))]
    x, y = feature_map(2, 8, 5, 6)  # without an activation it is affine, so it commutes with means
    assert_close(wide((x + y)[None] / 2), (wide(x[None]) + wide(y[None])) / 2)


def test_drop_path_keeps_the_mean_and_only_drops_in_training():
    drop = DropPath(0.25)
    x = torch.ones(4000, 1, 1, 1)
    assert_close(drop(x).unique(), torch.tensor([0, 4 / 3]))
    assert drop(x).mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    with pytest.raises(ValueError, match="DropPath"):
        DropPath(1.0)


def test_patches_are_rearranged_and_back():
    x = feature_map(1, 3, 8, 12)
    assert PatchEmbed(3, 10, 4)(x).shape == (1, 10, 2, 3)
    assert PatchMerge(3, 5)(x).shape == (1, 5, 4, 6)
    assert PatchExpand(3, 2, 4)(x).shape == (1, 2, 32, 48)
    expand = PatchExpand(1, 1, 2)
    expand.norm = torch.nn.Identity()
    with torch.no_grad():
        expand.expand.weight.copy_(torch.tensor([[1.0], [2], [3], [4]]))
    assert_close(expand(torch.ones(1, 1, 1, 1))[0, 0], torch.tensor([[1.0, 2], [3, 4]]))


def test_dt_rank_is_a_sixteenth_rounded_up():
    assert SS2D(40).dt_rank == math.ceil(40 / 16) == 3


def flops(block, x):
    """{operator: operations} of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        block(x).square().sum().backward()
    return {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}


def test_torchs_flop_counter_counts_the_scan_and_the_deformable_convolution():
    x = feature_map(2, 8, 6, 5)
    counted = flops(SS2D(8, d_state=4, dt_rank=3, directions=2), x)
    assert counted["scan"] == 2 * 6 * 5 * 2 * 8 * (9 * 4 + 2 * 3)
    assert counted["scan_backward"] == 2 * counted["scan"]
    block = ModulatedDeformBlock(8, 12, stride=2, groups=2)
    counted = flops(block, x.requires_grad_())
    plain = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
    with FlopCounterMode(display=False) as counter:
        plain(x)
    assert counted["deform_conv2d"] == counter.get_total_flops()
    assert counted["deform_conv2d_backward"] == 2 * counted["deform_conv2d"]
    assert count_flops(block, x)["deform_conv2d"] == counted["deform_conv2d"]


def kept_for_backward(model, x):
    """Bytes of the tensors kept for the backward pass. Each storage counts once, parameters do not count."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(storages.values())


def test_checkpointing_keeps_a_fraction_of_the_activations():
    options = {"scale": 2, "dims": [8, 16], "depths": [2, 2], "patch": 2, "stem_channels": 4, "d_state": 4}
    x = torch.rand(1, 1, 16, 16)
    plain, saving = (kept_for_backward(DeformMambaSR(**options, checkpointing=on).train(), x) for on in (False, True))
    assert saving < plain / 3


@pytest.mark.parametrize("make", [SS2D, ModulatedDeformBlock, VisionMambaBlock, DeformMambaBlock, MultiViewContext])
def test_a_block_made_without_memory_can_be_initialised(make: Any) -> None:
    with torch.device("meta"):
        block = make(8)
    marked = {name for name, p in make(8).named_parameters() if hasattr(p, "_no_weight_decay")}
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert {name for name, p in block.named_parameters() if hasattr(p, "_no_weight_decay")} == marked
    torch.manual_seed(0)
    fresh = make(8)
    for (name, given), wanted in zip(block.named_parameters(), fresh.parameters(), strict=True):
        assert given.isfinite().all(), name
        if "A_log" in name or "offset_mask" in name or name.endswith(".D"):
            assert_close(given, wanted)
    assert block(torch.rand(1, 8, 6, 5)).isfinite().all()


# each of 8 channels; they check their input against their first layer
CHECKING = (
    ModulatedDeformBlock,
    VisionMambaBlock,
    DeformMambaBlock,
    MultiViewContext,
    ChannelAttention,
    partial(PatchEmbed, channels=8, patch=2),
    partial(PatchMerge, out_channels=8),
    partial(PatchExpand, out_channels=8),
)


@pytest.mark.parametrize("make", CHECKING)
def test_another_dtype_than_the_weights_is_named(make: Any) -> None:
    block, x = make(8), torch.rand(1, 8, 6, 4)
    name = "VisionMambaBlock" if make is DeformMambaBlock else type(block).__name__
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=rf"^{name}: given {dtype}, and its weights are torch.float32; convert"):
            block(x.to(dtype))
    with pytest.raises(ValueError, match=rf"^{name}: given torch.float16, and its weights are torch.float32; convert"):
        make(8, device="meta")(x.half().to("meta"))  # a device without autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x.bfloat16())
    assert block.double()(x.double()).dtype == torch.float64


class Wrapped(torch.nn.Module):
    """A layer of a user around one of ours, as adapters (LoRA) are; it has no weight."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


@pytest.mark.parametrize("make", CHECKING)
def test_layers_inside_may_be_replaced_by_wrapped_ones(make: Any) -> None:
    block, x = make(8), torch.rand(1, 8, 6, 4)
    expected = block(x)
    for name, layer in list(block.named_modules()):
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            block.set_submodule(name, Wrapped(layer))
    assert torch.equal(block(x), expected)


def test_rates_may_be_an_array() -> None:
    assert len(MultiViewContext(8, rates=np.array([1, 2])).branches) == 2
