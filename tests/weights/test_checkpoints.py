"""The checkpoints in the package: they load, their cards describe them, and they reach the scores in their entries."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import deformmamba
from deformmamba.data.patches import find_scans, load_slices
from deformmamba.data.thick_slices import thick
from deformmamba.inference import upscale
from deformmamba.layers import ModulatedDeformBlock
from deformmamba.metrics import psnr
from deformmamba.models import from_pretrained
from deformmamba.physics.kspace import degrade, zero_fill
from deformmamba.physics.slice_profile import SliceProfile
from deformmamba.weights import card, list_weights, manifest, verify

ENTRIES = {entry["name"]: entry for entry in list_weights()}
IN_PLANE = [name for name, entry in ENTRIES.items() if entry["scale"] > 1]  # the others are for the slice direction


@pytest.fixture(params=ENTRIES)
def entry(request):
    return ENTRIES[request.param]


@pytest.fixture
def model(entry):
    return from_pretrained(entry["name"])


def test_ixi_4x_is_there_and_the_packaged_files_are_those_of_the_manifest():
    assert "ixi-4x" in ENTRIES
    folder = Path(deformmamba.__file__).parent / "checkpoints"
    assert {path.name for path in folder.glob("*.safetensors")} == {entry["file"] for entry in ENTRIES.values()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 36e6
    assert not set(ENTRIES) & set(manifest()["planned"])


def test_the_entry_is_true_of_the_file(entry, model):
    assert verify(entry["name"]) == entry["sha256"]
    assert (type(model).__name__, model.scale, model.grid) == (entry["class"], entry["scale"], entry["grid"])
    assert model.num_parameters() == entry["parameters"]
    assert model.info["spacings_mm"] == entry["spacings_mm"]
    assert model.consistency == entry["consistency"]
    assert model.provenance["trained_on"] == entry["trained_on"]


def test_the_card_says_what_it_was_trained_on_and_whether_ixi_was_among_it(entry):
    text = card(entry)
    for source in entry["trained_on"]:
        assert source["source"] in text
        assert source["licence"] in text
        assert "NC" not in source["licence"]  # a published checkpoint must not be trained on non-commercial data
    if any("IXI" in source["source"] for source in entry["trained_on"]):
        assert entry["license"] == "cc-by-sa-4.0"  # IXI's CC BY-SA 3.0 requires this of derived works
        assert "brain-development.org" in text
    else:
        assert "not trained on IXI" in text
    assert text.split(f"# {entry['name']}\n\n")[1].startswith("For: ")
    assert max(line.count(" | ") for line in text.splitlines() if line.startswith("|")) <= 6  # seven columns


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (64, 64)])
def test_any_size_of_at_least_eight(model, size):
    lr = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sr = model(lr)
    assert sr.shape == (1, 1, size[0] * model.scale, size[1] * model.scale)
    assert sr.isfinite().all()


@pytest.fixture
def brain():
    """A real slice (128, 96) from nibabel's test data, with intensities of about [0, 1]."""
    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    image = np.asarray(nibabel.load(path).dataobj[:, :, 12, 0], np.float32)
    return torch.from_numpy(image / np.percentile(image, 99.9))


def offsets(model, lr):
    """The offsets of each deform block, in pixels of its feature map, as (2, taps * h * w)."""
    found = []

    def keep(block, inputs, _):
        offset, _ = block.offsets_and_mask(inputs[0])
        found.append(offset.unflatten(1, (-1, 2)).transpose(1, 2)[0].flatten(1))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, ModulatedDeformBlock)]
    with torch.inference_mode():
        model(lr)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
def test_the_deform_branch_is_alive(model, brain):
    lr = degrade(brain, model.scale)[None, None]
    found = offsets(model, lr)
    assert found
    assert max(float(offset.abs().mean()) for offset in found) > 0.1
    assert max(float(offset.std(1).max()) for offset in found) > 0.1  # they depend on the image


@pytest.mark.parametrize("entry", IN_PLANE, indirect=True)
def test_it_beats_zero_filling_on_a_scan_from_elsewhere(model, brain):
    lr = degrade(brain, model.scale)
    sr = upscale(model, lr)
    assert psnr(sr, brain) > psnr(zero_fill(lr, model.scale), brain)


@pytest.mark.slow
@pytest.mark.parametrize("entry", IN_PLANE, indirect=True)
def test_offsets_are_of_use(entry, model, real_data, monkeypatch):
    """Without offsets the quality falls; at 4x also if pixels exchange their offsets. (At 2x offsets hardly vary.)"""
    group = model.provenance["recipe"]["data"]["validation"][0]
    scan = next(s for s in find_scans(real_data) if s.split == "val" and s.group == group)
    hr = torch.from_numpy(load_slices(scan.path, model.scale).array)
    hr = hr[len(hr) // 4 : 3 * len(hr) // 4 : len(hr) // 8]
    lr = degrade(hr, model.scale)
    intact = psnr(upscale(model, lr, axis=0), hr)
    original = ModulatedDeformBlock.offsets_and_mask

    def none(block, x):
        offset, mask = original(block, x)
        return torch.zeros_like(offset), mask

    def shuffled(block, x):
        offset, mask = original(block, x)
        order = torch.randperm(offset[0, 0].numel(), generator=torch.Generator().manual_seed(0))
        return offset.flatten(2)[:, :, order].view_as(offset), mask

    monkeypatch.setattr(ModulatedDeformBlock, "offsets_and_mask", none)
    assert psnr(upscale(model, lr, axis=0), hr) < intact - 0.01
    if entry["scale"] == 4:
        monkeypatch.setattr(ModulatedDeformBlock, "offsets_and_mask", shuffled)
        assert psnr(upscale(model, lr, axis=0), hr) < intact - 0.05


@pytest.mark.parametrize("entry", ["thick"], indirect=True)
@pytest.mark.parametrize("turned", [False, True])
def test_thick_beats_the_spline_on_a_scan_from_elsewhere(model, brain, turned):
    hr = brain.mT if turned else brain
    spline = thick(hr, ratio=4.0, profile=SliceProfile("gaussian", 4.0), phase=1.2)
    with torch.inference_mode():
        sr = model(spline[None, None])[0, 0]
    assert psnr(sr, hr) > psnr(spline, hr) + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("entry", IN_PLANE, indirect=True)
def test_the_scores_of_the_entry_are_reproduced(entry, model, real_data):
    """Only those on the six IXI slices; the others take minutes. examples/publish_checkpoint.py wrote all of them."""
    from deformmamba.evaluation.compare import evaluate, mean_scores

    row = next(row for row in entry["scores"] if row["split"] == "external" and row["group"] == "T2 brain")
    scans = [s for s in find_scans(real_data) if s.split == "external" and s.group == "T2 brain"]
    scores = mean_scores(evaluate(model, scans))
    assert scores["psnr"] == pytest.approx(row["psnr"], abs=0.01)
    assert scores["ssim"] == pytest.approx(row["ssim"], abs=0.001)
    assert row["psnr"] > row["zero_fill_psnr"]
    assert row["ssim"] > row["zero_fill_ssim"]


@pytest.mark.slow
@torch.no_grad()
def test_units_and_a_marker_do_not_matter(model, brain):
    if not model.any_intensity:
        pytest.skip(f"{model.source} is for images of about [0, 1]")
    lr = degrade(brain, model.scale)[None, None]
    wanted = model(lr)
    # float32 stores an offset of 3 / 0.05 ranges to 7e-6 of the range, and the network amplifies this error a few times
    torch.testing.assert_close((model(0.05 * lr - 3) + 3) / 0.05, wanted, rtol=0, atol=2e-4)
    marked = lr.clone()
    marked[..., 2:4, 2:4] = 20
    far = (..., slice(12 * model.scale, None), slice(12 * model.scale, None))
    network = wanted - model.whole_slice(lr)["base"]
    change = model(marked) - model.whole_slice(marked)["base"] - network
    assert change[far].abs().mean() < 0.3 * network[far].abs().mean()
