"""The network: sizes, presets, ablations, global skip, and the trained deform branch of the shipped checkpoint."""

import pytest
import torch
from tolerances import assert_close

from deformmamba.models.deform_mamba import PRESETS, DeformMambaSR
from deformmamba.physics.kspace import zero_fill

SMALL = {"dims": [8, 12], "depths": [1, 1], "patch": 2, "stem_channels": 2, "d_state": 4}


def network(**options):
    torch.manual_seed(0)
    return DeformMambaSR(**{**SMALL, **options}).eval()


def image(h, w, b=1):
    return torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (64, 8)])
def test_any_size_comes_out_scale_times_larger(scale, size):
    h, w = size
    assert network(scale=scale)(image(h, w, b=2)).shape == (2, 1, scale * h, scale * w)


@pytest.mark.parametrize("skip", [None, "zero-fill"])
def test_padding_does_not_move_the_image(skip):
    """A constant image does not change near the origin, whether or not its size needs padding."""
    model = network(skip=skip, scale=4, context=False)
    a, b = model(torch.full((1, 1, 16, 16), 0.5)), model(torch.full((1, 1, 15, 13), 0.5))
    assert a.shape[-1] == 64
    assert b.shape[-2:] == (60, 52)


@pytest.mark.slow
def test_presets_are_the_papers_widths_and_small_ones():
    with torch.device("meta"):
        count = {name: DeformMambaSR.from_preset(name).num_parameters() for name in PRESETS}
        paper = DeformMambaSR()
    assert paper.config["dims"] == [96, 192, 384, 768]
    assert paper.config["depths"] == [4, 4, 4, 4]
    assert count["paper"] == paper.num_parameters()
    assert count["tiny"] < count["small"] < 4e6 < 90e6 < count["paper"] < 99e6
    assert 110e6 < count["paper-literal"] < 120e6, "the pointwise convolutions"
    with pytest.raises(ValueError, match="unknown preset 'huge'; presets: paper"):
        DeformMambaSR.from_preset("huge")


@pytest.mark.parametrize("options", [{}, {"deform": False, "channel_attention": False}])
def test_further_blocks_return_their_input_until_they_are_trained(options):
    few, many = network(**options, normalise="slice"), network(**options, normalise="slice", depths=[3, 2])
    many.load_initial(few.state_dict())
    lr = image(16, 12)
    assert torch.equal(many(lr), few(lr))
    many(lr).square().sum().backward()
    for name, parameter in many.named_parameters():
        if name.endswith((".out.weight", ".deform.weight")):
            assert parameter.grad.abs().max() > 0, f"{name} learns"
    with pytest.raises(RuntimeError, match="Unexpected key"):
        few.load_initial(many.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        network(**options, dims=[8, 16], depths=[3, 2]).load_initial(few.state_dict())
    lacks = {name: tensor for name, tensor in few.state_dict().items() if not name.startswith("decoder.1.0.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        many.load_initial(lacks)


def test_each_ablation_removes_its_own_parameters_and_nothing_else():
    def shapes(**options):
        return {name: tuple(p.shape) for name, p in network(**options).named_parameters()}

    full = shapes()
    for option, part in (("deform", ".deform."), ("context", "context.")):
        ablated = shapes(**{option: False})
        assert ablated == {name: shape for name, shape in full.items() if part not in name}
        assert len(ablated) < len(full)


def test_the_skip_starts_as_zero_filling_and_takes_a_given_base():
    model = network(skip="zero-fill")
    lr = image(9, 10)
    assert_close(model(lr), zero_fill(lr, 4))
    base = torch.rand(1, 1, 36, 40)
    assert_close(model(lr, base), base)
    with pytest.raises(ValueError, match="base is"):
        model(lr, base[..., :-1])
    assert not torch.allclose(network()(lr), zero_fill(lr, 4), atol=0.1)


def test_every_parameter_is_trained():
    model = network(skip="zero-fill").train()
    torch.nn.init.normal_(model.project.weight, std=0.1)
    model(image(8, 8, b=2)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_checkpointing_changes_memory_only():
    torch.manual_seed(0)
    plain, saving = network().train(), network(checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    lr = image(8, 8)
    for model in (plain, saving):
        model(lr).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert_close(a.grad, b.grad)


def test_torch_func_works_with_checkpointing_too():
    plain, saving = network().train(), network(checkpointing=True).train()
    lr, parameters = image(8, 8), dict(plain.named_parameters())

    def gradients(model):
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (lr,)).square().mean())(parameters)

    wanted = gradients(plain)
    for name, found in gradients(saving).items():
        assert_close(found, wanted[name])


def test_what_goes_with_the_whole_slice_is_checked():
    lr = image(8, 8)
    for model, name, given, message in (
        (network(), "base", "garbage", "base must be a tensor of shape .*, not 'garbage'"),
        (network(), "base", torch.zeros(1, 1, 8, 8), "base is .*; wanted"),
        (network(), "norm", torch.zeros(1, 7), "norm is .*; wanted"),
        (network(normalise="slice"), "norm", [0, 1], "norm must be a tensor"),
        (network(normalise="slice"), "norm", torch.zeros(1, 7), "norm is .*; wanted"),
        (network(skip="zero-fill"), "base", torch.ones(1, 1, 32, 32).cfloat(), "base is torch.complex64; wanted a"),
        (network(normalise="slice"), "norm", torch.ones(1, 1, 2).cfloat(), "norm is torch.complex64; wanted a real"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^DeformMambaSR: {message}"):
            model(lr, **{name: given})
    for preset, message in ((["tiny"], r"unknown preset \['tiny'\]"), ("tinny", "did you mean 'tiny'")):
        with pytest.raises(ValueError, match=message):
            DeformMambaSR.from_preset(preset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = network(skip="zero-fill")
    torch.nn.init.normal_(model.project.weight, std=0.1)
    lr = image(12, 12)
    with torch.autocast("cpu", dtype=dtype):
        sr = model(lr)
    torch.testing.assert_close(sr.float(), model(lr), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_it_can_overfit_one_slice():
    model = network(scale=2, skip="zero-fill", dims=[16, 24]).train()
    hr = (image(16, 16) > 0.5).float().repeat_interleave(4, -1).repeat_interleave(4, -2)
    lr = hr[..., ::2, ::2].contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (model(lr) - hr).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [8]}, "one positive entry per level"),
        ({"depths": [1, 0]}, "at least one block"),
        ({"dims": [8] * 9, "depths": [1] * 9}, "1 to 8 levels"),
        ({"depths": [1, 300]}, "256 blocks"),
        ({"skip": "bicubic"}, "skip is 'bicubic'"),
        ({"scale": 0}, "scale must be an integer"),
        ({"dims": [1, 8]}, "at least the patch size"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
