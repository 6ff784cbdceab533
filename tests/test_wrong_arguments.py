"""A wrong argument of a function is refused in one sentence, by an exception of this package, before any work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deformmamba
from deformmamba import layers, metrics, training, volume, weights
from deformmamba.data import patches, scans, splits
from deformmamba.errors import DeformMambaError
from deformmamba.evaluation import compare
from deformmamba.inference import adapters, choice
from deformmamba.models import SRCNN, ZeroFill
from deformmamba.physics import consistency, degradations, kspace
from deformmamba.pictures import figures
from deformmamba.training import recipe
from deformmamba.volume import inspection

MODULES = (
    *(patches, layers, metrics, training, volume, weights, scans, splits, compare, adapters, choice),
    *(consistency, degradations, kspace, figures, recipe, inspection),
)
# one line for each call; names as in `names` below
CALLS = {
    "metrics": """
        d.psnr(lr, hr)
        d.psnr("a", lr)
        d.psnr(None, lr)
        d.psnr([1, 2, 3], [1, 2, 3])
        d.psnr(empty[0], empty[0])
        d.psnr(flat, flat)
        d.psnr(lr[0], lr[0], protocol="vol")
        d.psnr(lr[0] * 1j, lr[0])
        d.ssim(tiny, tiny)
        d.ssim(array, lr)
        d.nmse(lr[0], 0 * lr[0])
        metrics.by_slice(array, array[:4])
        metrics.foreground("x")
        metrics.foreground(flat)
    """,
    "physics": """
        d.degrade(lr, 3)
        d.degrade(lr, 0)
        d.degrade(lr, 2.5)
        d.degrade(lr, "2")
        d.degrade(lr, True)
        d.degrade(lr, None)
        d.degrade(array, 2)
        d.degrade(flat, 2)
        d.degrade(lr, 2, output="mag")
        d.zero_fill(lr, 0)
        d.zero_fill(lr, -2)
        d.zero_fill("a", 2)
        d.zero_fill(empty, 2)
        kspace.fft2c(array)
        kspace.fft2c(flat)
        kspace.ifft2c(None)
        kspace.crop_spectrum(lr, (9, 9))
        kspace.crop_spectrum(lr, (4,))
        kspace.crop_spectrum(lr, (0, 4))
        kspace.pad_spectrum(lr, (4, 4))
        kspace.pad_spectrum(lr, 16)
        kspace.resize(lr, (0, 3))
        kspace.resize(lr, "ab")
        d.data_consistency(hr, lr, 3)
        d.data_consistency(hr, hr, 2)
        d.data_consistency(hr, lr, 2, within=lr)
        d.data_consistency(hr, lr, 2, within=0.5)
        d.data_consistency("b", lr, 2)
        consistency.check_consistency("exat")
        degradations.parse(3)
        degradations.parse("k-spce")
        degradations.parse("k-space")
        degradations.parse("rician:snr=-1")
        degradations.parse("k-space", scale=2)(array)
        degradations.parse("k-space", scale=2)(lr.int())
    """,
    "files": """
        volume.Volume(array, None)
        volume.Volume(array, "x")
        volume.Volume(array, eye[:3])
        volume.Volume("x", eye)
        volume.Volume(array[0], eye)
        volume.read_volume(3)
        volume.read_volume(None)
        volume.read_volume("nope.nii")
        volume.read_volume("s.nii", volume="a")
        volume.read_volume("s.nii", volume=2)
        volume.read_volume("s.nii", nan="drop")
        volume.read_volume("s.nii", partial="yes")
        volume.count_volumes(3)
        volume.write_volume(3, scan)
        volume.write_volume("o.nii", array)
        volume.write_volume("o.nii", scan, dtype="flaot32")
        volume.write_volume("o.nii", scan, derivation=3)
        volume.write_volume("o.xyz", scan)
        volume.in_plane(5)
        inspection.inspect_volume("s.nii")
        inspection.inspect_volume(array)
        inspection.inspect_volume(scan, axis=9)
        choice.ranked_weights(scan, 7)
        choice.ranked_weights("x", 2)
        figures.oriented(scan, 5, 0)
        figures.oriented(scan, 2, 99)
        figures.before_after(array, {}, 3)
        weights.verify(3)
        weights.verify("s.nii", sha256=3)
        weights.describe(None)
        weights.fetch(3)
        weights.publish(3, "a/b", dry_run=True)
        d.from_pretrained(3)
        d.from_pretrained("ixi4x")
        zero.save_pretrained(None)
        zero.save_pretrained("m", provenance=3)
        zero.push_to_hub(3, dry_run=True)
    """,
    "data": """
        scans.find_scans(3)
        scans.find_scans("nope")
        scans.find_scans("folder", val="a")
        scans.find_scans("folder", val=2)
        scans.find_scans("folder", seed="x")
        scans.find_scans("folder", subject="[")
        scans.load_volume(3)
        scans.load_slices("s.nii", 0)
        scans.load_slices("s.nii", "2")
        splits.read_splits("nope.csv", ["a"])
        patches.PatchDataset([], scale=2, length=3)
        d.evaluate("ixi-2x", ["s.nii"])
        d.evaluate(zero, ["s.nii"], most=0)
        d.evaluate(zero, ["s.nii"], protocol=3)
        d.evaluate(zero, "s.nii")
        compare.compare({}, ["s.nii"])
        compare.compare({"a": zero}, ["s.nii"], against="b")
        recipe.load_recipe(3)
        recipe.load_recipe("fintune")
        training.train_recipe(3, "folder", "r")
        adapters.UpscaleTransform("nope")
        adapters.UpscaleTransform(zero, keys=3)
        adapters.UpscaleTransform(zero)(masked)
        adapters.UpscaleInferer(tiel=3)
        adapters.UpscaleInferer()(array, zero)
        adapters.UpscaleInferer()(lr, "x")
        d.upscale_cohort(zero, 3, "o")
    """,
    "fit": """
        d.fit("ixi-4x", pairs, out="r", steps=1)
        d.fit(net, 3, out="r", steps=1)
        d.fit(net, pairs, out=None, steps=1)
        d.fit(net, pairs, out="s.nii", steps=1)
        d.fit(net, pairs, out="r")
        d.fit(net, pairs, out="r", steps="1")
        d.fit(net, pairs, out="r", steps=1, epochs=1)
        d.fit(net, pairs, out="r", steps=1, batch=0)
        d.fit(net, pairs, out="r", steps=1, lr=-1)
        d.fit(net, pairs, out="r", steps=1, lr="x")
        d.fit(net, pairs, out="r", steps=1, optimizer="adamw")
        d.fit(net, pairs, out="r", steps=1, loss="l1")
        d.fit(net, pairs, out="r", steps=1, validate=3)
        d.fit(net, pairs, out="r", steps=1, precision="fp8")
        d.fit(net, pairs, out="r", steps=1, schedule="cos")
    """,
    "blocks": """
        d.SS2D(0)
        d.SS2D("8")
        d.SS2D(8.5)
        d.SS2D(True)
        d.SS2D(8, d_state=0)
        d.SS2D(8, directions=3)
        d.SS2D(8, dt_min="a")
        d.SS2D(8, dt_min=1, dt_max=0.1)
        d.SS2D(8, backend="cpuu")
        d.SS2D(8, discretization="eulr")
        d.SS2D(8)(array)
        d.SS2D(8)(lr)
        d.ModulatedDeformBlock("8")
        d.ModulatedDeformBlock(8, kernel_size=2)
        d.ModulatedDeformBlock(8, stride=1.5)
        d.ModulatedDeformBlock(8, groups=3)
        d.ModulatedDeformBlock(8, norm="batchh")
        d.ModulatedDeformBlock(8, activation="relu")
        d.MultiViewContext(1.5)
        d.MultiViewContext(8, rates=3)
        d.MultiViewContext(8, rates=())
        d.MultiViewContext(8, rates=(1.5,))
        d.MultiViewContext(8, rates="12")
        d.VisionMambaBlock("8")
        d.VisionMambaBlock(8, expand=0)
        d.VisionMambaBlock(8, kernel_size=2)
        d.VisionMambaBlock(8, drop_path=2)
        d.DeformMambaBlock(8, deform_groups=5)
        layers.PatchEmbed(1, 8, 0)
        layers.PatchEmbed(1, 8, 4)(lr[..., :6])
        layers.PatchMerge(8, 0)
        layers.PatchExpand(8, 4, 0)
        d.ContrastiveEdgeLoss()(lr, hr)
        d.ContrastiveEdgeLoss()(lr, None)
        d.ContrastiveEdgeLoss()(array, array)
        d.ContrastiveEdgeLoss()(lr[:0], lr[:0])
        d.SRLoss(beta=-1)
        d.SRLoss(beta="x")
        d.SRLoss()("x", hr)
    """,
    "one number": """
        d.psnr(array, array, protocol=array)
        d.psnr(masked, masked)
        d.psnr(lr[0, 0].to_sparse(), lr[0, 0])
        d.degrade(lr, array)
        d.degrade(lr, lr)
        d.degrade(lr, lr[0, 0, 0, 0])
        d.degrade(lr, np.float32(2))
        d.degrade(lr, 2, output=array)
        d.degrade(lr[0, 0].to_sparse(), 2)
        d.zero_fill(lr, np.array([2]))
        d.data_consistency(hr.int(), lr.int(), 2)
        d.data_consistency(hr, lr.double(), 2)
        d.data_consistency(hr, lr.cfloat(), 2)
        consistency.check_consistency(array)
        volume.Volume(masked, eye)
        volume.Volume(array, lr.requires_grad_())
        volume.Volume(array, eye, codes="ab")
        volume.Volume(array, eye, codes=(1, 1.5))
        volume.Volume(array, eye, slices=3)
        volume.Volume(array, eye, slices=array)
        volume.in_plane(array)
        volume.intensity_scale(array, array)
        volume.upscaled_affine(eye, 2, (0, 1), array)
        volume.read_volume("s.nii", volume=array)
        volume.read_volume("s.nii", nan=array)
        d.upscale(zero, array, axis=array)
        d.upscale(zero, array, tile=array)
        d.upscale(zero, array, batch_size=lr)
        d.upscale(zero, array, device="cudda")
        d.upscale_cohort(zero, "folder", "o", device="cudda")
        d.SRLoss(array)
        d.SRLoss(np.str_("1"))
        d.SS2D(array)
        d.SS2D(8, directions=array)
        d.SS2D(8, discretization=array)
        d.ModulatedDeformBlock(8, norm=array)
        d.ModulatedDeformBlock(8, activation=array)
        SRCNN(scale=array)
        patches.PatchDataset(pairs, scale=2, length=array)
        d.evaluate(zero, ["s.nii"], most=array)
        d.evaluate(zero, ["s.nii"], seed=array)
        d.evaluate(zero, ["s.nii"], metrics=array)
        d.evaluate(zero, array)
        d.evaluate(zero, [b"s.nii"])
        d.upscale_file(zero, array, "o.nii")
        d.upscale_file(zero, "s.nii", b"o.nii")
        d.upscale_file(zero, "s.nii", "o.nii", report=array)
        d.upscale_file(zero, "s.nii", "o.nii", dtype=array)
        d.upscale_file(zero, "s.nii", "o.nii", keep=array)
        d.upscale_file(zero, "s.nii", "o.nii", sidecar=array)
        volume.write_volume("o.nii", scan, dtype=array)
    """,
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).uniform(1, 2, (8, 8, 3)).astype(np.float32)
    scan = volume.Volume(array, np.diag([3.0, 3, 5, 1]))
    volume.write_volume("s.nii", scan)
    (tmp_path / "folder").mkdir()
    volume.write_volume("folder/sub-1_T2w.nii", scan)
    lr, hr = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 16, 16)
    return {
        **{module.__name__.rpartition(".")[2]: module for module in MODULES},
        "d": deformmamba,
        "lr": lr,
        "hr": hr,
        "np": np,
        "SRCNN": SRCNN,
        "array": array,
        "masked": np.ma.masked_greater(array, 1.5),
        "scan": scan,
        "eye": np.eye(4),
        "flat": torch.rand(8),
        "tiny": torch.rand(1, 4, 4),
        "empty": torch.rand(1, 0, 8),
        "zero": ZeroFill(scale=2),
        "net": SRCNN(scale=2),
        "pairs": [(lr[0], hr[0])],
    }


@pytest.mark.parametrize("subject", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_one_sentence(subject: str, names: dict[str, Any], tmp_path: Path) -> None:
    before, wrong = sorted(path.name for path in tmp_path.rglob("*")), []
    for call in filter(None, map(str.strip, CALLS[subject].splitlines())):
        try:
            eval(call, names)
        except DeformMambaError as error:
            if "\n" in str(error) or not str(error):
                wrong.append(f"{call}: {error}")
        except Exception as error:
            wrong.append(f"{call}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{call}: accepted")
    assert not wrong, "\n".join(wrong)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
