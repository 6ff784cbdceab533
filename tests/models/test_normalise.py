"""A network with `normalise="slice"`: gain, offset, outliers, constant regions."""

import pytest
import torch

from deformmamba import from_pretrained
from deformmamba.inference import upscale
from deformmamba.models import DeformMambaSR
from deformmamba.models.normalise import slice_range
from deformmamba.physics.kspace import zero_fill

# tolerance for an output of about [0, 1]: float32 rounding of the input, amplified by a few layers
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model() -> DeformMambaSR:
    torch.manual_seed(0)
    made = DeformMambaSR(scale=2, dims=[8, 12], depths=[1, 1], stem_channels=4, d_state=4, skip="zero-fill-edges",
                         normalise="slice")  # fmt: skip
    torch.nn.init.normal_(made.project.weight, std=0.3)  # its initial value is 0
    return made.eval()


@pytest.fixture(scope="module")
def lr() -> torch.Tensor:
    made = torch.rand(2, 1, 40, 36, generator=torch.Generator().manual_seed(1)) ** 2
    made[:, :, :20, :18] = 0
    return made


@torch.no_grad()
@pytest.mark.parametrize(("gain", "offset"), [(0.03, 0.0), (1e4, 0.0), (1.0, -1.5), (20.0, 2.0), (1e-6, 0.0)])
def test_gain_and_offset_pass_through(model: DeformMambaSR, lr: torch.Tensor, gain: float, offset: float) -> None:
    wanted = model(lr)
    torch.testing.assert_close((model(gain * lr + offset) - offset) / gain, wanted, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_no_warning_whatever_the_units(model: DeformMambaSR, lr: torch.Tensor) -> None:
    model(3000 * lr)  # warnings are errors


@torch.no_grad()
def test_a_marker_changes_what_is_far_from_it_little(model: DeformMambaSR, lr: torch.Tensor) -> None:
    marked = lr.clone()
    marked[:, :, 38:40, 34:36] = 20
    before, after = slice_range(lr), slice_range(marked)
    assert ((after - before).abs() < 0.05).all()
    # the zero-filled base rings around a marker; the network's residual hardly changes far from the marker
    far = (..., slice(0, 60), slice(40, 60))
    residuals = [model(image)[far] - model.whole_slice(image)["base"][far] for image in (lr, marked)]
    assert (residuals[1] - residuals[0]).abs().mean() < 0.25 * residuals[0].abs().mean()


@torch.no_grad()
@pytest.mark.portable
def test_a_line_of_outliers_is_invisible_to_the_network_far_from_it() -> None:
    made = from_pretrained("ixi-4x")
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(52.0), indexing="ij")
    inside = torch.exp(-(((y - 24) / 18) ** 4) - ((x - 26) / 19) ** 4)
    lr = (inside * (2 + torch.sin(x / 2) * torch.cos(y / 3)))[None, None]
    marked = lr.clone()
    index = torch.arange(12)  # half a percent of the pixels
    marked[..., 18 + index, 20 + index] = 20 * lr.max()
    far = torch.ones(192, 208, dtype=torch.bool)
    far[4 * 14 : 4 * 34, 4 * 16 : 4 * 36] = False
    ringing = (zero_fill(marked, 4) - zero_fill(lr, 4))[..., far].square().mean().sqrt()
    assert ringing > 0.05 * lr.max()
    for tile in (None, 24):
        clean, with_line = (upscale(made, image[0, 0], tile=tile) for image in (lr, marked))
        assert (with_line - clean)[far].square().mean().sqrt() < 0.001 * lr.max()


@torch.no_grad()
def test_constant_regions_stay_what_they_are(model: DeformMambaSR, lr: torch.Tensor) -> None:
    for offset in (0.0, -3.0):
        assert (model(lr + offset)[..., :36, :32] == offset).all()  # two LR pixels away from the region's border
    assert (model(torch.full((1, 1, 12, 12), 5.0)) == 5).all()


@torch.no_grad()
def test_whole_slice_gives_what_forward_computes(model: DeformMambaSR, lr: torch.Tensor) -> None:
    assert torch.equal(model(lr, **model.whole_slice(lr)), model(lr))
    with pytest.raises(ValueError, match="norm is"):
        model(lr, norm=torch.ones(2, 2))


@torch.no_grad()
def test_a_slice_of_one_value_but_for_a_few_pixels_is_interpolated(model: DeformMambaSR) -> None:
    lr = torch.zeros(1, 1, 24, 24)
    lr[..., 12, 12] = 100
    out = model(lr)
    assert out.isfinite().all()
    assert out[0, 0, 24, 24] == pytest.approx(100, rel=1e-4)


def test_the_argument_is_checked() -> None:
    with pytest.raises(ValueError, match="normalise is 'volume'"):
        DeformMambaSR(scale=2, dims=[8], depths=[1], normalise="volume")
