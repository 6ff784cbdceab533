"""The networks of table 2 agree with their papers: sizes, intermediate shapes, values; and they learn."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn

from deformmamba.extras import MissingExtra
from deformmamba.metrics import psnr
from deformmamba.models import FMISR, HAT, MODELS, SRCNN, VDSR, Bicubic, SRModel, SwinIR, T2Net
from deformmamba.models.t2net import task_attention
from deformmamba.physics.kspace import degrade, zero_fill

SMALL: dict[str, dict[str, Any]] = {
    "SRCNN": {"kernels": (5, 3, 3), "widths": (12, 8)},
    "VDSR": {"layers": 5, "width": 12},
    "FMISR": {"widths": (16, 16)},
    "T2Net": {"width": 12, "blocks": 2},
    "SwinIR": {"width": 16, "depths": (2,), "heads": (2,), "window": 4, "drop_path": 0.0},
    "HAT": {"width": 16, "depths": (2,), "heads": (2,), "window": 4, "squeeze": 4, "drop_path": 0.0},
}


def build(name: str, **arguments: Any) -> SRModel:
    torch.manual_seed(0)
    try:
        return MODELS[name](**arguments)
    except MissingExtra as missing:
        pytest.skip(str(missing))


def phantom(n: int) -> torch.Tensor:
    """(n, n), within [0, 1]: a head of smooth tissue with a few sharp structures."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, n)] * 2, indexing="ij")
    head = ((x / 0.7) ** 2 + (y / 0.9) ** 2 < 1).float() * (0.5 + 0.2 * torch.sin(7 * x + 3 * y))
    return head + 0.3 * ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.04)


# ------------------------------------------------------------------------------------------------------------ sizes


def weights(model: nn.Module) -> int:
    """The number of weights without biases, as the earlier papers count."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))


@pytest.mark.parametrize(("kernels", "printed"), [((9, 1, 5), 8_032), ((9, 3, 5), 24_416), ((9, 5, 5), 57_184)])
def test_srcnn_has_the_weights_that_its_paper_prints(kernels: tuple[int, ...], printed: int) -> None:
    assert weights(SRCNN(kernels=kernels)) == printed


def test_vdsr_has_the_weights_that_are_quoted_for_it() -> None:
    assert round(weights(VDSR()) / 1000) == 665
    assert len(VDSR().convolutions) == 20


@pytest.mark.portable
@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("SwinIR", {"scale": 2}, 11.8),  # table 6 of the HAT paper
        ("SwinIR", {"scale": 4}, 11.9),
        (
            "SwinIR",
            {"scale": 4, "width": 60, "depths": [6] * 4, "heads": [6] * 4, "upsampler": "pixelshuffledirect"},
            0.93,  # count of the released code in later papers; table 3 of its own paper has 0.897
        ),
        ("HAT", {"scale": 4}, 20.8),  # table 6 of the HAT paper
    ],
)
def test_transformers_have_the_parameters_that_their_papers_print(
    name: str, arguments: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        model = build(name, in_channels=3, **arguments)
    digits = len(str(millions).partition(".")[2])
    assert round(model.num_parameters() / 1e6, digits) == millions


def test_t2net_and_fmisr_have_the_parameters_that_are_stated() -> None:
    conv = lambda a, b, k: a * b * k * k + b  # noqa: E731
    branch = conv(1, 64, 5) + 8 * 2 * conv(64, 64, 3)
    expected = 2 * branch + 8 * conv(128, 64, 1) + 2 * conv(64, 256, 3) + conv(64, 1, 3)
    assert T2Net().num_parameters() == expected
    assert round(expected / 1e6, 2) == 1.55, "as its docstring says"
    hidden = [(1, 64), (64, 64), (64, 32)]
    assert FMISR().num_parameters() == sum(conv(a, b, 3) + conv(b, b, 3) for a, b in hidden) + conv(32, 16, 3)


# ----------------------------------------------------------------------------------------------- shapes on the way


def shapes(model: nn.Module, lr: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The output shape of every module, by name, in one forward pass."""
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: tuple(out.shape)}) if torch.is_tensor(out) else None
        )
    with torch.no_grad():
        model(lr)
    return seen


def test_srcnn_and_vdsr_work_on_the_interpolated_image() -> None:
    lr = torch.rand(2, 1, 6, 7)
    seen = shapes(build("SRCNN"), lr)
    assert seen["extract"] == (2, 64, 24, 28)
    assert seen["map"] == (2, 32, 24, 28)
    assert seen["reconstruct"] == seen[""] == (2, 1, 24, 28)
    seen = shapes(build("VDSR"), lr)
    assert {seen[f"convolutions.{i}"] for i in range(19)} == {(2, 64, 24, 28)}
    assert seen["convolutions.19"] == (2, 1, 24, 28)


def test_fmisr_and_t2net_work_on_the_coarse_grid() -> None:
    lr = torch.rand(2, 1, 6, 7)
    seen = shapes(build("FMISR"), lr)
    assert [seen[f"hidden.{i}"] for i in range(3)] == [(2, 64, 6, 7), (2, 64, 6, 7), (2, 32, 6, 7)]
    assert seen["subpixel"] == (2, 16, 6, 7)
    seen = shapes(build("T2Net"), lr)
    assert {seen[f"{branch}.{i}"] for branch in ("sharp", "clean", "fuse") for i in range(8)} == {(2, 64, 6, 7)}
    assert [seen[f"upsample.{i}"] for i in range(3)] == [(2, 64, 12, 14), (2, 64, 24, 28), (2, 1, 24, 28)]
    assert shapes(T2Net(scale=3, width=4, blocks=1), lr)["upsample.0"] == (2, 4, 18, 21)


@pytest.mark.parametrize("name", ["SwinIR", "HAT"])
def test_the_transformers_see_whole_windows(name: str) -> None:
    model = build(name, **{**SMALL[name], "scale": 2, "in_channels": 3})
    seen = shapes(model, torch.rand(2, 3, 6, 7))
    assert seen["network.conv_first"] == (2, 16, 8, 8)
    assert seen["network"] == (2, 3, 16, 16)
    assert seen[""] == (2, 3, 12, 14)


# ------------------------------------------------------------------------------------------------ what they compute


@pytest.mark.parametrize("grid", ["origin", "half-pixel"])
@pytest.mark.parametrize("scale", [2, 4])
def test_vdsr_without_its_residual_is_bicubic_on_its_grid(grid: Any, scale: int) -> None:
    model, lr = build("VDSR", scale=scale, layers=3, width=4, grid=grid), torch.rand(1, 1, 9, 8)
    model.convolutions[-1].weight.data.zero_()  # type: ignore[index,union-attr]
    assert model.grid == model.config["grid"] == grid
    assert_close(model(lr), Bicubic(scale=scale, grid=grid)(lr))


def test_srcnn_of_unit_kernels_is_bicubic() -> None:
    model, lr = build("SRCNN", scale=3, kernels=(9, 1, 5), widths=(1, 1)), torch.rand(2, 1, 8, 8).square()
    for layer in (model.extract, model.map, model.reconstruct):
        layer.weight.data.zero_()  # type: ignore[union-attr,operator]
        middle = layer.kernel_size[0] // 2  # type: ignore[union-attr,index]
        layer.weight.data[..., middle, middle] = 1  # type: ignore[union-attr,index]
    assert_close(model(lr), Bicubic(scale=3)(lr).clamp(min=0))


def test_interpolation_before_a_network_stays_in_full_precision() -> None:
    model, lr = build("VDSR", scale=2, layers=3, width=4), torch.rand(1, 1, 8, 8)
    model.convolutions[-1].weight.data.zero_()  # type: ignore[index,union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(lr).float(), Bicubic(scale=2)(lr))


def naive_attention(query: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`task_attention` of one image by definition."""
    c, h, w = query.shape
    a, b = (F.pad(x, (1, 1, 1, 1)) for x in (query, source))
    offered = [b[:, y : y + 3, x : x + 3] for y in range(source.shape[1]) for x in range(source.shape[2])]
    relevance, found = torch.zeros(1, h, w), torch.zeros(c, h + 2, w + 2)
    for y in range(h):
        for x in range(w):
            patch = a[:, y : y + 3, x : x + 3].flatten()
            cosines = [float(torch.dot(patch, o.flatten()) / (patch.norm() * o.norm())) for o in offered]
            best = max(range(len(offered)), key=cosines.__getitem__)
            relevance[0, y, x] = cosines[best]
            found[:, y : y + 3, x : x + 3] += offered[best] / 9
    return relevance, found[:, 1:-1, 1:-1]


@pytest.mark.parametrize("entries", [1 << 24, 100, 1])
def test_task_attention_finds_the_most_similar_patch(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deformmamba.models.t2net.RELEVANCE_ENTRIES", entries)
    torch.manual_seed(0)
    query, source = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 6)
    relevance, found = task_attention(query, source)
    for k in range(2):
        expected = naive_attention(query[k], source[k])
        assert_close(relevance[k], expected[0])
        assert_close(found[k], expected[1])


def test_an_image_finds_itself() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 4, 6, 6)
    relevance, found = task_attention(image, image)
    assert_close(relevance, torch.ones(1, 1, 6, 6))
    assert_close(found[..., 1:-1, 1:-1], image[..., 1:-1, 1:-1])


def test_the_reconstruction_branch_of_t2net_learns_from_super_resolution() -> None:
    model = build("T2Net", scale=2, width=6, blocks=2)
    model(torch.rand(1, 1, 6, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_learns_one_slice_far_better_than_bicubic(name: str) -> None:
    hr = phantom(16)
    lr, hr = degrade(hr, 2)[None, None], hr[None, None]
    model = build(name, scale=2, **SMALL[name]).train()
    rate, steps = (5e-3, 100) if name in ("SwinIR", "HAT") else (1e-2, 200)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(lr), hr).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        reached, bicubic = (psnr(m(lr)[:, 0], hr[:, 0]) for m in (model, Bicubic(scale=2)))
    assert reached > bicubic + 4


@pytest.mark.parametrize("name", ["FMISR", "T2Net", "SwinIR", "HAT"])
@pytest.mark.parametrize("scale", [2, 4])
def test_with_a_skip_training_starts_from_zero_filling(name: str, scale: int) -> None:
    model, lr = build(name, scale=scale, skip="zero-fill", **SMALL[name]).eval(), torch.rand(2, 1, 8, 10)
    assert_close(model(lr), zero_fill(lr, scale))
    base = torch.rand(2, 1, scale * 8, scale * 10)
    assert torch.equal(model(lr, base), base), "a patch adds to its cut of the whole slice"
    with pytest.raises(ValueError, match=rf"{name}: base is \(2, 1, 8, 10\); wanted \(2, 1, {scale * 8}"):
        model(lr, lr)
    model(lr).square().mean().backward()
    last = [p for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert last, "and its last convolution learns"
    assert build(name, scale=2, **SMALL[name]).config["skip"] is None, "as published unless asked"


def test_swinir_of_the_lightweight_kind_starts_from_zero_filling_too() -> None:
    small = {**SMALL["SwinIR"], "upsampler": "pixelshuffledirect"}
    lr = torch.rand(1, 1, 8, 8)
    assert_close(build("SwinIR", scale=2, skip="zero-fill", **small)(lr), zero_fill(lr, 2))


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRCNN(kernels=(9, 4, 5)), "three odd kernels"),
        (lambda: SRCNN(kernels=(9, 5)), "three odd kernels"),
        (lambda: SRCNN(widths=(64,)), "three odd kernels"),
        (lambda: VDSR(layers=1), "2 to 256 layers"),
        (lambda: VDSR(width=0), "VDSR: width must be at least 1, not 0"),
        (lambda: FMISR(widths=()), "channels per hidden layer"),
        (lambda: FMISR(widths=(4, 0)), "channels per hidden layer"),
        (lambda: T2Net(scale=5), "power of two or 3"),
        (lambda: T2Net(blocks=0), "1 to 128 blocks"),
        (lambda: SRCNN(grid="corner"), "grid must be .origin. or .half-pixel., not .corner."),  # type: ignore[arg-type]
        (lambda: T2Net(grid="corner"), "grid must be .origin. or .half-pixel., not .corner."),  # type: ignore[arg-type]
        (lambda: FMISR(skip="bicubic"), "skip must be one of"),
        (lambda: T2Net(skip="zero-fill", grid="half-pixel"), "not 'zero-fill' on half-pixel"),
        (lambda: SwinIR(skip="bicubic"), "SwinIR: skip must be one of"),
        (lambda: SwinIR(scale=5), "power of two or 3"),
        (lambda: SwinIR(width=60, heads=(7,) * 6), "multiple of every entry"),
        (lambda: SwinIR(depths=(6,)), "one positive"),
        (lambda: SwinIR(upsampler="nearest"), "pixelshuffledirect"),
        (lambda: SwinIR(grid="corner"), "grid must be .origin. or .half-pixel., not .corner."),  # type: ignore[arg-type]
        (lambda: HAT(window=7), "window must be even"),
        (lambda: HAT(squeeze=1000), "between 1 and width"),
    ],
)
def test_arguments_that_build_nothing(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_without_spandrel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == "spandrel"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchvision", torch)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    for model in (SwinIR, HAT):
        with pytest.raises(MissingExtra, match=rf"{model.__name__} needs spandrel.*deformmamba\[baselines\]"):
            model()


def test_a_torchvision_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("deformmamba.models.transformers.require", broken)
    with pytest.raises(MissingExtra, match=r"HAT needs spandrel, which needs the torchvision that fits torch .*nms"):
        HAT()
