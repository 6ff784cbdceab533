"""MONAI's and TorchIO's objects as input and output, at the right position; with the packages if installed."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from deformmamba.inference import upscale
from deformmamba.inference.adapters import UpscaleInferer, UpscaleTransform
from deformmamba.models import VDSR, ZeroFill
from deformmamba.volume import Volume, VolumeError

AFFINE = np.array([[-0.9, 0, 0, 12], [0, 0.8, 0, -7], [0, 0, 4, 3], [0, 0, 0, 1.0]])


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0)) * 900


def imported(name: str) -> Any:
    with warnings.catch_warnings():  # MONAI and TorchIO warn on import
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def expected(scan: torch.Tensor) -> Volume:
    return upscale(ZeroFill(scale=2), Volume(scan.numpy(), AFFINE))


@pytest.mark.parametrize("n", [3, 4])
def test_the_affine_of_a_slice_follows(n: int) -> None:
    keep = [0, 1, 3] if n == 3 else [0, 1, 2, 3]
    affine = torch.from_numpy(AFFINE[np.ix_(keep, keep)])
    sharp = UpscaleTransform(ZeroFill(scale=2))(Meta(image(2, 6, 8), affine=affine, meta={}))
    assert sharp.shape == (2, 12, 16)
    wanted = affine.clone()
    wanted[:, :2] /= 2
    assert_close(sharp.affine, wanted)


def test_an_affine_that_fits_no_image_is_refused() -> None:
    """As that of a batch, which kept its old pixel size."""
    transform = UpscaleTransform(ZeroFill(scale=2))
    for size, affine in (((2, 1, 6, 8), torch.eye(4).repeat(2, 1, 1)), ((1, 6, 8, 3), torch.eye(3))):
        with pytest.raises(VolumeError, match=r"without a batch axis, with an affine of 4x4, or 3x3 for a slice"):
            transform(Meta(image(*size), affine=affine, meta={}))


def test_an_inferer_takes_batches_of_slices_and_volumes() -> None:
    model, inferer = ZeroFill(scale=2), UpscaleInferer(batch_size=2)
    volumes = image(2, 2, 6, 8, 3)
    sharp = inferer(volumes, model)
    assert sharp.shape == (2, 2, 12, 16, 3)
    assert_close(sharp[1, 0], upscale(model, volumes[1, 0]))
    slices = inferer(inputs=volumes[..., 0], network=model)
    assert slices.shape == (2, 2, 12, 16)
    assert_close(slices[0, 1], upscale(model, volumes[0, 1, :, :, 0]))
    assert UpscaleInferer(axis=0)(volumes, model).shape == (2, 2, 6, 16, 6)
    with pytest.raises(TypeError, match="the model is a Linear; give a model of deformmamba"):
        inferer(volumes, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the network is the name 'ixi-4x'; give a model"):
        inferer(volumes, "ixi-4x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes only the image"):
        inferer(volumes, model, 3)
    with pytest.raises(VolumeError, match=r"\(b, c, h, w\)"):
        inferer(volumes[0, 0], model)


def test_an_inferer_takes_the_models_that_upscale_takes() -> None:
    model, slices = VDSR(scale=2, layers=2, width=4).eval(), image(1, 1, 6, 8)
    assert_close(UpscaleInferer()(slices, torch.nn.DataParallel(model)), UpscaleInferer()(slices, model))


@pytest.mark.parametrize("shape", [(0, 1, 6, 8), (2, 0, 6, 8), (1, 1, 0, 8, 3)])
def test_empty_batches_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(VolumeError, match=r"hold no image; give one or more"):
        UpscaleInferer()(torch.zeros(shape), ZeroFill(scale=2))


@pytest.mark.parametrize("shape", [(0, 6, 8), (1, 0, 8, 3)])
def test_empty_images_are_refused_in_one_line(shape: tuple[int, ...]) -> None:
    for given in (torch.zeros(shape), np.zeros(shape)):
        with pytest.raises(VolumeError, match="is empty; give one channel or more"):
            UpscaleTransform(ZeroFill(scale=2))(given)


@pytest.mark.parametrize("dtype", [">f4", ">i2", "float16"])
def test_arrays_of_any_type(dtype: str) -> None:
    given = image(1, 6, 8).numpy().astype(dtype)
    made = UpscaleTransform(ZeroFill(scale=2))(given)
    np.testing.assert_array_equal(made, UpscaleTransform(ZeroFill(scale=2))(given.astype(np.float32)))


def test_plain_arrays_and_dictionaries() -> None:
    transform = UpscaleTransform(ZeroFill(scale=2), keys=("t2",))
    volume = image(1, 6, 8, 3)
    sharp = transform(volume)
    assert_close(sharp[0], upscale(ZeroFill(scale=2), volume[0]))
    np.testing.assert_array_equal(transform(volume.numpy()), sharp.numpy())
    data = {"t2": volume, "label": 3}
    made = transform(data)
    assert made["label"] == 3
    assert torch.equal(made["t2"], sharp)
    assert data["t2"] is volume
    with pytest.raises(VolumeError, match="no entry 't2'; entries: t1"):
        transform({"t1": volume})
    with pytest.raises(VolumeError, match="entries to upscale in keys="):
        UpscaleTransform(ZeroFill(scale=2))(data)
    with pytest.raises(VolumeError, match="cannot upscale a str"):
        transform("volume")
    with pytest.raises(VolumeError, match=r"not \(6, 8\)"):
        transform(volume[0, :, :, 0])


class Meta(torch.Tensor):
    """The part of MetaTensor's interface that the adapters use."""

    affine: torch.Tensor
    meta: dict[str, Any]

    def __new__(cls, x: torch.Tensor, affine: torch.Tensor, meta: dict[str, Any]) -> "Meta":
        made = x.as_subclass(cls)
        made.affine, made.meta = affine, meta
        return made

    def as_tensor(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def check_meta_tensors(kind: Any) -> None:
    scans = image(2, 6, 8, 3)
    given = kind(scans, affine=torch.from_numpy(AFFINE), meta={"kept": 7})
    made = UpscaleTransform(ZeroFill(scale=2))(given)
    assert type(made) is type(given)
    assert made.meta["kept"] == 7
    assert_close(made.affine.numpy(), expected(scans[0]).affine)
    np.testing.assert_array_equal(made.as_tensor()[1].numpy(), expected(scans[1]).array)
    flat = UpscaleTransform(ZeroFill(scale=2))(kind(scans[..., 0], affine=torch.from_numpy(AFFINE), meta={}))
    assert flat.shape == (2, 12, 16)
    assert_close(flat.affine.numpy(), expected(scans[0]).affine)
    assert type(UpscaleInferer()(given[None], ZeroFill(scale=2))) is torch.Tensor


def test_what_looks_like_a_meta_tensor() -> None:
    check_meta_tensors(Meta)


def test_a_meta_tensor_of_half_precision() -> None:
    scans = image(1, 6, 8, 3).to(torch.bfloat16)
    made = UpscaleTransform(ZeroFill(scale=2))(Meta(scans, affine=torch.from_numpy(AFFINE), meta={}))
    np.testing.assert_array_equal(made.as_tensor()[0].numpy(), expected(scans[0].float()).array)


@pytest.mark.portable
def test_monai() -> None:
    imported("monai")
    data, transforms = imported("monai.data"), imported("monai.transforms")
    check_meta_tensors(data.MetaTensor)
    scan = image(1, 6, 8, 3)
    pipeline = transforms.Compose(
        [transforms.ScaleIntensityd("t2"), UpscaleTransform(ZeroFill(scale=2), keys="t2"), transforms.ToTensord("t2")]
    )
    made = pipeline({"t2": data.MetaTensor(scan, affine=torch.from_numpy(AFFINE)), "name": "x"})
    assert made["t2"].shape == (1, 12, 16, 3)
    assert made["name"] == "x"
    assert_close(made["t2"].affine.numpy(), expected(scan[0]).affine)


def test_torchio() -> None:
    tio = imported("torchio")
    scans = image(2, 6, 8, 3)
    subject = tio.Subject(
        t2=tio.ScalarImage(tensor=scans, affine=AFFINE),
        mask=tio.LabelMap(tensor=torch.ones(1, 6, 8, 3), affine=AFFINE),
        age=40,
    )
    transform = UpscaleTransform(ZeroFill(scale=2))
    made = tio.Compose([transform, tio.RescaleIntensity(percentiles=(0, 100), masking_method=None)])(subject)
    assert type(made) is tio.Subject
    assert (made.age, made.mask.spatial_shape, made.t2.spatial_shape) == (40, (6, 8, 3), (12, 16, 3))
    assert_close(made.t2.affine, expected(scans[0]).affine)
    assert subject.t2.spatial_shape == (6, 8, 3)
    alone = transform(subject.t2)
    assert type(alone) is tio.ScalarImage
    np.testing.assert_array_equal(alone.data[1].numpy(), expected(scans[1]).array)
    with pytest.raises(VolumeError, match="label map"):
        UpscaleTransform(ZeroFill(scale=2), keys="mask")(subject)


def test_a_torchio_image_keeps_its_attributes(tmp_path: Path) -> None:
    tio = imported("torchio")
    tio.ScalarImage(tensor=image(1, 6, 8, 3), affine=AFFINE).save(tmp_path / "a.nii.gz")
    given = tio.ScalarImage(tmp_path / "a.nii.gz", site="X", check_nans=True)
    for transform in (tio.ToCanonical(), UpscaleTransform(ZeroFill(scale=2))):
        made = transform(given)
        assert (made["site"], made["stem"], made["path"]) == ("X", "a", str(tmp_path / "a.nii.gz"))
        assert (made.path, made.check_nans, made.type) == (tmp_path / "a.nii.gz", True, "intensity")
    assert (made.shape, given.shape) == ((1, 12, 16, 3), (1, 6, 8, 3))
    assert_close(made.affine, expected(given.data[0]).affine, atol=1e-4)
    subject = UpscaleTransform(ZeroFill(scale=2))(tio.Subject(t2=given, name="x"))
    assert (subject.t2["site"], subject.name) == ("X", "x")
