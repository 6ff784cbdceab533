"""Arguments of upscale(): models and their wrappers, names, paths, lists; and the messages for wrong arguments."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import deformmamba
from deformmamba import upscale, upscale_with_uncertainty
from deformmamba.errors import InvalidArgument
from deformmamba.inference import upscale_file
from deformmamba.models import VDSR, SRModel, ZeroFill
from deformmamba.volume import Volume, VolumeError, read_volume, write_volume


@pytest.fixture
def model() -> VDSR:
    torch.manual_seed(0)
    return VDSR(scale=2, layers=2, width=4).eval()


def slices(n: int = 3, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 900, (n, 12, 10)).astype(dtype)


@pytest.mark.portable
def test_wrappers_give_what_the_model_inside_gives(model: VDSR) -> None:
    expected = upscale(model, slices(), axis=0)
    mean = upscale(model, slices(), axis=0, ensemble=True)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapper in (nn.DataParallel(model), averaged, torch.compile(model, backend="eager"), nn.DataParallel(averaged)):
        # compiled programs fuse operations, and batch sizes differ
        np.testing.assert_allclose(upscale(wrapper, slices(), axis=0), expected, rtol=1e-4, atol=0.05)
        np.testing.assert_allclose(upscale(wrapper, slices(), axis=0, ensemble=True), mean, rtol=1e-4, atol=0.05)


def test_a_model_that_returns_another_size_is_refused() -> None:
    class Unchanged(SRModel):
        def __init__(self, *, scale: int = 2) -> None:
            super().__init__(scale=scale)

        def forward(self, lr: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
            return lr

    for settings in ({}, {"ensemble": True}):
        with pytest.raises(InvalidArgument, match=r"the model returned images of \(12, 8\); wanted \(24, 16\)"):
            upscale(Unchanged(), np.ones((12, 8), np.float32), **settings)


@pytest.mark.parametrize("recipe", ["my.toml", None, {"data": None}, {"data": "T2"}])
def test_a_recipe_in_the_provenance_may_be_any_json(model: VDSR, recipe: object) -> None:
    model.provenance = {"recipe": recipe}
    assert upscale(model, slices(1)[0]).shape == (24, 20)


def test_weights_for_the_slice_direction_do_not_upscale_slices(model: VDSR) -> None:
    model.provenance = {"recipe": {"data": {"kind": "thick"}}}
    with pytest.raises(InvalidArgument, match="use deformmamba isotropic"):
        upscale(model, slices(1)[0])


def test_a_name_a_path_and_a_nibabel_image(tmp_path: Path, model: VDSR) -> None:
    model.save_pretrained(tmp_path / "mine.safetensors")
    path = tmp_path / "scan.nii"
    write_volume(path, Volume(np.moveaxis(slices(), 0, 2), np.diag([1.0, 1, 4, 1])))
    expected = upscale(model, read_volume(path))
    assert expected.spacing == (0.5, 0.5, 4)
    for name in (tmp_path / "mine.safetensors", str(tmp_path / "mine.safetensors")):
        np.testing.assert_array_equal(upscale(name, path).array, expected.array)
    np.testing.assert_array_equal(upscale(model, str(path)).array, expected.array)
    sharp = upscale(model, nibabel.load(path))
    np.testing.assert_array_equal(sharp.get_fdata(dtype=np.float32), expected.array)
    deformmamba.write_volume(tmp_path / "out.nii.gz", sharp)
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii.gz").array, expected.array)
    with pytest.raises(VolumeError, match="a Volume or a nibabel image, not a ndarray"):
        deformmamba.write_volume(tmp_path / "out.nii.gz", slices())
    upscale_file(tmp_path / "mine.safetensors", path, tmp_path / "out.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii").array, expected.array)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_list_of_slices_gives_a_list_of_slices(model: VDSR, kind: object) -> None:
    array = np.random.default_rng(0).uniform(0, 900, (2, 64, 64)).astype(np.float32)
    given = [kind(one) for one in array]  # type: ignore[operator]
    made = upscale(ZeroFill(scale=4), given)
    assert isinstance(made, list)
    assert [tuple(one.shape) for one in made] == [(256, 256)] * 2
    assert all(type(one) is type(given[0]) for one in made)
    together = upscale(ZeroFill(scale=4), array, axis=0)
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in made]), together)
    sharp, spread = upscale_with_uncertainty(model, given)
    assert [tuple(one.shape) for one in sharp] == [tuple(one.shape) for one in spread] == [(128, 128)] * 2
    volumes = upscale(model, [Volume(slices().T, np.eye(4)), Volume(slices(5).T, np.eye(4))])
    assert [volume.array.shape for volume in volumes] == [(20, 24, 3), (20, 24, 5)]
    mixed = upscale(model, (slices()[0], slices()[0, :6]))
    assert [one.shape for one in mixed] == [(24, 20), (12, 20)]
    assert upscale(ZeroFill(scale=2), [[1.0, 2.0], [3.0, 4.0]]).shape == (4, 4), "a nested list of numbers is one image"


def test_lists_keep_what_each_scan_is(model: VDSR) -> None:
    one, other = slices(2)
    with pytest.raises(VolumeError, match="the list of scans is empty"):
        upscale(model, [])
    for given in ([one], [one, other]):
        with pytest.raises(VolumeError, match="axis is for 3-D scans"):
            upscale(model, given, axis=0)

    class Converted:  # such as an image of PIL
        def __init__(self, array: np.ndarray) -> None:
            self.__array_interface__ = array.__array_interface__
            self.array = array

    made = upscale(model, [Converted(one), Converted(other)])
    assert [image.shape for image in made] == [(24, 20)] * 2
    masked = np.ma.masked_less(one, 100)
    for given in (masked, [masked, masked]):
        with pytest.raises(VolumeError, match=r"masked array that hides \d+ voxels; fill it first"):
            upscale(model, given)


def test_any_tensor_with_numbers_will_do_and_others_are_named(model: VDSR) -> None:
    one = torch.from_numpy(slices(1)[0])
    expected = upscale(model, one)
    zero = torch.zeros_like(one)
    for same in (torch.complex(zero, -one).conj().imag, nn.Parameter(one.clone()), one.mT.contiguous().mT):
        assert torch.equal(upscale(model, same), expected)
    for given, said in (
        (one.to_sparse(), "dense"),
        (one.to("meta"), "a tensor without values"),
        (None, "of the type NoneType; give a path, a Volume"),
        ({"scan": one}, "of the type dict"),
        (iter([one]), "iterator; give"),
        (3, "of the type int"),
        (b"scan.nii", "of the type bytes"),
        ([one, None], "of the type NoneType"),
    ):
        with pytest.raises(TypeError, match=said):
            upscale(model, given)
    for given, said in (
        ([[1, 2], [3]], "cannot be converted"),
        (np.ones((4, 4), object), "as with scan.astype"),
    ):
        with pytest.raises(VolumeError, match=said):
            upscale(model, given)
    with pytest.raises(VolumeError, match="a numpy array, not a Tensor"):
        Volume(one[..., None], np.eye(4))  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match="AnalyzeImage; give NIfTI or MGH"):
        upscale(model, nibabel.AnalyzeImage(slices(), np.eye(4)))


def test_a_model_without_values_is_refused_and_none_loses_its_values(model: VDSR) -> None:
    before = copy.deepcopy(model.state_dict())
    for device in ("meta", "gpu", [], -1):
        with pytest.raises(ValueError, match="not available on this machine"):
            upscale(model, slices(), axis=0, device=device)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(TypeError, match="weights have no values"):
        upscale(copy.deepcopy(model).to("meta"), slices(), axis=0)
    thick = deformmamba.from_pretrained("thick")
    for call in (upscale, upscale_with_uncertainty):
        with pytest.raises(ValueError, match="deformmamba isotropic"):
            call(thick, slices())


def test_wrong_arguments_get_one_sentence(tmp_path: Path, model: VDSR) -> None:
    scan = slices()
    for call, said in (
        (lambda: upscale(scan, model), "the model is a ndarray"),
        (lambda: upscale(model, model), "arguments are swapped"),
        (lambda: upscale("scan.nii.gz", "ixi-4x"), "a scan was given as the model"),
        (lambda: upscale(tmp_path / "scan.nii.gz", model), "a scan was given as the model"),
        (lambda: upscale(nn.Linear(2, 2), scan), "the model is a Linear"),
        (lambda: upscale_file("a.nii", model, tmp_path / "b.nii"), "a scan was given as the model"),
        (lambda: upscale(copy.deepcopy(model).half(), scan, axis=0), "weights are float16; .*model.float"),
        (lambda: upscale(copy.deepcopy(model).bfloat16(), scan, axis=0), "weights are bfloat16"),
    ):
        with pytest.raises(TypeError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda': not available on this machine; available: cpu"):
            upscale(model, scan, device="cuda")
    with pytest.raises(ValueError, match="not available on this machine"):
        upscale(model, scan, device="gpu")
    for factor in (1e300, 1e-300):
        with pytest.raises(VolumeError, match="float32 results; scale the scan"):
            upscale(model, scan.astype(np.float64) * factor, axis=0)


def test_precisions_of_model_and_scan(model: VDSR) -> None:
    expected = upscale(model, slices(), axis=0)
    precise = upscale(copy.deepcopy(model).double(), slices(), axis=0)
    assert precise.dtype == np.float32
    np.testing.assert_allclose(precise, expected, rtol=1e-4, atol=0.05)  # float32 against float64
    for scan in (slices(dtype=np.float64), torch.from_numpy(slices()).double()):
        np.testing.assert_allclose(np.asarray(upscale(model, scan, axis=0)), expected, rtol=1e-6)
    half = torch.from_numpy(slices()).half()
    np.testing.assert_allclose(upscale(model, half, axis=0).numpy(), expected, rtol=0.01, atol=2)  # float16 input


def test_every_module_is_in_the_mode_that_it_had(model: VDSR) -> None:
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    frozen.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    upscale(model, slices(), axis=0)
    assert [module.training for module in model.modules()] == before
    averaged = torch.optim.swa_utils.AveragedModel(model).train()
    upscale(averaged, slices(), axis=0)
    assert averaged.training
    assert averaged.module.training


def test_torchs_threads_are_as_before_after_eight_jobs_at_once(model: VDSR) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = upscale(model, slices(9), axis=0)
        state = torch.random.get_rng_state()
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: upscale(model, slices(9), axis=0, batch_size=1), range(16)))
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=0.05)  # batches of another size
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 4, "new threads"
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


def test_progress_without_a_terminal_is_lines(
    model: VDSR, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("deformmamba.inference.progress.time.monotonic", lambda: next(clock))
    upscale(model, slices(6), axis=0, batch_size=1, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 6 slices, about 100 s left"
    assert len(lines) == 3, "one after the first slice, then at most one in 30 s"
    upscale(model, slices(6), axis=0)
    assert capsys.readouterr().err == ""
