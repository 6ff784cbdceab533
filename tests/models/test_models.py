"""The contract of every class in MODELS, loading by name and class, and the interpolations against scipy and torch."""

import ast
import copy
import inspect
import json
import pickle
import re
import resource
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from tolerances import assert_close
from torch import nn

import deformmamba
from deformmamba.errors import DeformMambaError
from deformmamba.extras import MissingExtra
from deformmamba.metrics import psnr
from deformmamba.models import MODELS, SRCNN, Bicubic, BSpline, DeformMambaSR, SRModel, ZeroFill, from_pretrained
from deformmamba.models.padding import pad_to_multiple
from deformmamba.physics.kspace import GRIDS, degrade, zero_fill
from deformmamba.weights import WeightsError, fetch, load_checkpoint, write_checkpoint

# arguments that make a class small enough for tests; a class without an entry is tested with {"scale": 2}
SMALL: dict[str, dict[str, Any]] = {
    "DeformMambaSR": {"scale": 2, "dims": (8, 12), "depths": (1, 1), "patch": 2, "stem_channels": 4, "d_state": 4},
    "SRCNN": {"scale": 2, "widths": (6, 4)},
    "VDSR": {"scale": 2, "layers": 4, "width": 6},
    "FMISR": {"scale": 2, "widths": (6, 4)},
    "T2Net": {"scale": 2, "width": 6, "blocks": 2},
    "SwinIR": {"scale": 2, "width": 8, "depths": (2, 2), "heads": (2, 2), "window": 4},
    "HAT": {"scale": 2, "width": 8, "depths": (2,), "heads": (2,), "window": 4, "squeeze": 2},
}


def build(name: str, **overrides: Any) -> SRModel:
    """A small model in eval mode. All parameters are random, because a zero initialisation could hide a mistake."""
    torch.manual_seed(0)
    model = MODELS[name](**{**SMALL.get(name, {"scale": 2}), **overrides}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def image(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))


@cache
def missing(name: str) -> str | None:
    """Which package a model lacks here."""
    try:
        build(name)
    except MissingExtra as error:
        return str(error)
    return None


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    if lacks := missing(request.param):
        pytest.skip(lacks)
    return str(request.param)


NO_IMAGES: list[tuple[Any, type[Exception]]] = [
    (torch.zeros(8, 8), ValueError),
    (torch.zeros(1, 1, 1, 8, 8), ValueError),
    (torch.zeros(1, 1, 8, 8, dtype=torch.int16), TypeError),
    (torch.zeros(1, 1, 8, 8, dtype=torch.complex64), TypeError),
    (np.zeros((1, 1, 8, 8), np.float32), TypeError),
    (torch.zeros(1, 1, 0, 8), ValueError),
    (torch.zeros(1, 0, 8, 8), ValueError),
    (torch.zeros(0, 1, 8, 8), ValueError),
]


class TestContract:
    def test_the_constructor_is_the_config(self, name: str) -> None:
        signature = inspect.signature(MODELS[name])
        assert {p.kind for p in signature.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
        model = build(name)
        assert model.config.keys() == signature.parameters.keys()
        assert json.loads(json.dumps(model.config)) == model.config
        defaults = {k: p.default for k, p in signature.parameters.items() if k not in SMALL.get(name, {"scale": 2})}
        assert {k: model.config[k] for k in defaults} == json.loads(json.dumps(defaults))
        assert MODELS[name](**model.config).config == model.config

    def test_every_model_names_scale_grid_and_intensity(self, name: str) -> None:
        model = build(name)
        assert model.grid in GRIDS
        assert model.config["intensity"] == model.intensity == model.info["intensity"]
        assert model.config["scale"] == model.scale == model.info["scale"]
        assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == model.info["parameters"]
        assert model.provenance == {}
        assert model.source is None

    @pytest.mark.parametrize("layout", [pytest.param("folder", marks=pytest.mark.slow), "file.safetensors"])
    def test_saved_and_loaded_it_gives_the_same_bits(self, name: str, layout: str, tmp_path: Path) -> None:
        model, lr = build(name), image(2, 1, 9, 11)
        model.save_pretrained(tmp_path / layout, provenance={"spacings_mm": [0.9, 0.9]})
        before = torch.get_rng_state()
        for load in (from_pretrained, MODELS[name].from_pretrained, SRModel.from_pretrained):
            again = load(tmp_path / layout)
            assert type(again) is type(model)
            assert not again.training
            assert again.config == model.config
            assert again.provenance == {"spacings_mm": [0.9, 0.9]}
            assert again.info["spacings_mm"] == [0.9, 0.9]
            assert again.source is not None
            assert again.source.startswith(str(tmp_path / layout))
            assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
            with torch.no_grad():
                assert torch.equal(again(lr), model(lr))
        assert torch.equal(torch.get_rng_state(), before), "loading must not draw random numbers"

    def test_equal_models_are_equal_files_and_keep_their_provenance(self, name: str, tmp_path: Path) -> None:
        hashes = {build(name).save_pretrained(tmp_path / f"{i}.safetensors", {"seed": 0}) for i in range(3)}
        again = from_pretrained(tmp_path / "0.safetensors")
        assert hashes == {again.save_pretrained(tmp_path / "again.safetensors")}

    @pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 7)])
    @torch.no_grad()
    def test_sizes(self, name: str, size: tuple[int, int]) -> None:
        model = build(name)
        h, w = (max(n, model.minimum_size) for n in size)
        sr = model(image(2, 1, h, w))
        assert sr.shape == (2, 1, model.scale * h, model.scale * w)
        assert sr.dtype == torch.float32
        assert sr.isfinite().all()

    @torch.no_grad()
    def test_images_of_a_batch_do_not_mix(self, name: str) -> None:
        model, lr = build(name), image(3, 1, 9, 10)
        assert_close(model(lr)[1:2], model(lr[1:2]))

    @torch.no_grad()
    def test_it_runs_in_every_precision_that_it_names(self, name: str) -> None:
        model, lr = build(name), image(1, 1, 9, 10)
        expected = model(lr).double()
        for precision in model.precisions:
            dtype = getattr(torch, precision.split()[0])
            if precision.endswith("autocast"):
                with torch.autocast("cpu", dtype):
                    sr = model(lr)
            else:
                sr = build(name).to(dtype)(lr.to(dtype))
                assert sr.dtype == dtype
            tolerance = max(4 * torch.finfo(dtype).eps, 2e-6)
            torch.testing.assert_close(sr.double(), expected, atol=tolerance, rtol=0)

    @torch.no_grad()
    def test_base_is_accepted(self, name: str) -> None:
        model, lr = build(name), image(1, 1, 9, 10)
        torch.testing.assert_close(model(lr, base=zero_fill(lr, model.scale)), model(lr), atol=1e-5, rtol=1e-5)

    def test_what_is_no_image_is_refused_in_one_line(self, name: str) -> None:
        model = build(name)
        for bad, error in NO_IMAGES:
            with pytest.raises(error) as caught:
                model(bad)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_scanner_units_are_warned_about_where_the_model_was_called(self, name: str) -> None:
        model, lr = build(name), image(1, 1, 8, 8)
        if not model.num_parameters():  # linear in the image, in any unit
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(lr * 1000)
            return
        with pytest.warns(UserWarning, match=r"reaches .* expect about \[0, 1\]") as caught:
            model(lr * 1000)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="reaches nan"):
            model(torch.full_like(lr, torch.nan))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(lr * 1.5)  # Gibbs overshoot causes no warning
            model.train()(lr * 1000)

    def test_scale_is_a_small_integer(self, name: str) -> None:
        for scale in (0, -2, 17, 2.0, True, "2", None):
            with pytest.raises(ValueError, match="scale must be an integer from 1 to 16"):
                build(name, scale=scale)

    def test_a_copy_is_a_model_of_its_own(self, name: str) -> None:
        model = build(name)
        twin = copy.deepcopy(model)
        twin.config["scale"] = 3
        assert model.config["scale"] == 2


def test_arguments_that_json_cannot_hold_are_refused() -> None:
    for intensity in (None, 99.9):
        with pytest.raises(TypeError, match="intensity"):
            ZeroFill(scale=2, intensity=intensity)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plain values that JSON can hold: rate"):
        Rated(rate=float("nan"))
    with pytest.raises(ValueError, match="plain values"):
        Rated(rate=1 << 40)
    with pytest.raises(ValueError, match="dims must be a list of int, not Tensor"):
        DeformMambaSR(dims=torch.tensor([8]))  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [torch.zeros(2), torch.device("cpu"), np.float32(1), {1, 2}])
def test_a_class_with_other_arguments_works_and_is_not_saved(rate: Any, tmp_path: Path) -> None:
    model = Rated(rate=rate)
    assert model.config == {"names": ["a", "b"]}
    with pytest.raises(WeightsError, match="cannot be saved: its argument rate is a"):
        model.save_pretrained(tmp_path / "x.safetensors")


class Rated(SRModel):
    """A subclass whose arguments have no annotations, and whose scale is not an argument."""

    def __init__(self, *, rate=0.5, names=("a", "b")):
        super().__init__(scale=2)


class Passed(Bicubic):
    """A subclass that passes its other arguments to the base class."""

    def __init__(self, *, extra: int = 3, **rest: Any) -> None:
        super().__init__(**rest)


def test_the_config_is_read_from_the_call() -> None:
    assert Rated(names=range(3)).config == {"rate": 0.5, "names": [0, 1, 2]}
    assert Rated(**Rated().config).config == Rated().config
    assert Passed(scale=2, a=-1).config == {"scale": 2, "extra": 3, "a": -1}
    assert Passed(**Passed(scale=2).config).grid == "origin"
    assert Grown(width=4).config == {"scale": 2, "width": 4, "intensity": "p99.9"}
    assert copy.deepcopy(Grown(width=4)).config["width"] == 4
    assert DeformMambaSR(dims=torch.Size([8]), depths=[1]).config["dims"] == [8]
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        Grown(colour=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="plain values"):
        SRModel(scale=2, rate=float("nan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": 2}, "depths must be a list of int, not 2"),
        ({"dims": (8, 12.5)}, "dims must be a list of int"),
        ({"d_state": "4"}, "d_state must be int, not '4'"),
        ({"deform": 1}, "deform must be bool, not 1"),
        ({"expand": True}, "expand must be float, not True"),
    ],
)
def test_a_value_that_does_not_fit_its_annotation_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DeformMambaSR: {message}") as caught:
        build("DeformMambaSR", **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)
def test_no_constructor_lists_its_arguments_twice(cls: type[SRModel]) -> None:
    base = next(b for b in cls.__mro__[1:] if "__init__" in vars(b) and issubclass(b, SRModel))
    code = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
    calls = [n for n in ast.walk(code) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
    assert len(calls) == 1
    used = {p.name for p in inspect.signature(base.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}  # type: ignore[misc]
    assert {keyword.arg for keyword in calls[0].keywords} <= used


# ------------------------------------------------------------------------------------------------------------ loading


class Toy(SRModel):
    """A subclass for `from_checkpoint` with a stored buffer, a buffer that is not stored, and integers."""

    def __init__(self, *, scale: int = 2, width: int = 3, intensity: str = "p99.9") -> None:
        super().__init__(scale=scale, width=width, intensity=intensity)
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.register_buffer("window", torch.hann_window(8), persistent=False)


class Grown(Toy):
    pass


def test_a_checkpoint_of_another_class_is_refused_and_both_are_named(tmp_path: Path) -> None:
    ZeroFill(scale=2).save_pretrained(tmp_path / "zero-fill")
    with pytest.raises(WeightsError, match=r"holds a ZeroFill, not a DeformMambaSR; load it with ZeroFill\.from_"):
        DeformMambaSR.from_pretrained(tmp_path / "zero-fill")
    Grown().save_pretrained(tmp_path / "grown")
    assert type(Toy.from_pretrained(tmp_path / "grown")) is Grown
    Toy().save_pretrained(tmp_path / "toy")
    with pytest.raises(WeightsError, match="holds a Toy, not a Grown"):
        Grown.from_pretrained(tmp_path / "toy")
    with pytest.raises(
        WeightsError, match=r'holds a Toy, which is not a model of this version.*deformmamba.MODELS\["Toy"\] = Toy'
    ):
        from_pretrained(tmp_path / "toy")


def test_a_class_of_the_users_is_registered_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deformmamba.MODELS, "Toy", Toy)
    toy = Toy(width=4).eval()
    toy.save_pretrained(tmp_path / "toy")
    again = deformmamba.from_pretrained(tmp_path / "toy")
    assert isinstance(again, deformmamba.SRModel)
    assert type(again) is Toy
    assert again.config == toy.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), toy.state_dict().values(), strict=True))


def test_a_class_of_the_same_name_does_not_replace_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's class of its parent's name, and one that is registered for files of an earlier name."""
    mine = type("ZeroFill", (ZeroFill,), {})
    ZeroFill(scale=2).save_pretrained(tmp_path / "x")
    for load in (deformmamba.from_pretrained, ZeroFill.from_pretrained):
        assert type(load(tmp_path / "x")) is ZeroFill
    assert type(mine.from_pretrained(tmp_path / "x")) is mine
    Toy(width=4).save_pretrained(tmp_path / "toy")
    renamed = type("NewToy", (Toy,), {})
    monkeypatch.setitem(deformmamba.MODELS, "Toy", renamed)
    assert type(deformmamba.from_pretrained(tmp_path / "toy")) is renamed


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/folder", "~/file.safetensors"):
        ZeroFill(scale=2).save_pretrained(name)
        assert ZeroFill.from_pretrained(name).scale == 2
    assert fetch("~/folder", "~/copy").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file.safetensors", "folder"]


def test_a_device_and_a_dtype_are_obeyed_or_refused(tmp_path: Path) -> None:
    build("SRCNN").save_pretrained(tmp_path / "x")
    model = from_pretrained(tmp_path / "x", device="cpu", dtype=torch.float64)
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert SRCNN.from_pretrained(tmp_path / "x", device=torch.device("meta")).device.type == "meta"
    assert ZeroFill(scale=2).dtype == torch.float32
    for options, error, message in (
        ({"dtype": torch.float16}, ValueError, r"does not run in torch\.float16; it runs in float32, .*autocast"),
        ({"dtype": torch.int8}, ValueError, "does not run in torch.int8"),
        ({"dtype": "float16"}, TypeError, "dtype must be a torch.dtype"),
        ({"device": "gpu"}, ValueError, "device 'gpu': not available on this machine"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99': not available on this machine"),
    ):
        with pytest.raises(error, match=message) as caught:
            from_pretrained(tmp_path / "x", **options)
        assert isinstance(caught.value, DeformMambaError)
        assert "\n" not in str(caught.value)


def test_what_a_model_supports_is_a_value(name: str) -> None:
    model = build(name)
    assert model.supports_half == model.info["supports_half"] == ("float16" in model.precisions)
    assert model.supports_bfloat16 == model.info["supports_bfloat16"] == ("bfloat16" in model.precisions)


def test_the_repr_names_weights_scale_size_and_training() -> None:
    first, second = repr(from_pretrained("ixi-4x")).splitlines()[:2]
    assert first == "DeformMambaSR("
    assert re.fullmatch(r"  'ixi-4x', 4x, \d\.\d\d M parameters, trained on pixels of [\d.]+ to [\d.]+ mm", second)
    assert repr(Bicubic(scale=3)) == "Bicubic(3x, 0 parameters)"


def test_the_hub_gets_what_is_saved() -> None:
    made = build("SRCNN").push_to_hub("org/name", dry_run=True, license="cc-by-4.0")
    assert set(made.files) == {"model.safetensors", "config.json", "README.md"}
    assert made.revision is None


@pytest.mark.portable
@torch.no_grad()
def test_shapes_without_values(name: str) -> None:
    """On the meta device and under FakeTensor, a model computes shapes and reads no value."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = build(name)
    h = max(9, model.minimum_size)
    shape = (1, 1, model.scale * h, model.scale * (h + 2))
    assert copy.deepcopy(model).to("meta")(torch.empty(1, 1, h, h + 2, device="meta")).shape == shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(1, 1, h, h + 2)).shape == shape


def test_stored_and_computed_buffers_survive(tmp_path: Path) -> None:
    toy = Toy()
    toy.norm(torch.randn(4, 3, 5, 5))
    toy.save_pretrained(tmp_path / "toy")
    again = Toy.from_pretrained(tmp_path / "toy")
    assert again.norm.num_batches_tracked == 1
    assert torch.equal(again.norm.running_mean, toy.norm.running_mean)  # type: ignore[arg-type]
    assert torch.equal(again.window, torch.hann_window(8))  # type: ignore[arg-type]


def test_loading_does_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    Toy().save_pretrained(tmp_path / "toy")
    torch.set_default_dtype(torch.float64)
    try:
        assert Toy.from_pretrained(tmp_path / "toy").conv.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_in_several_threads_changes_nothing_that_they_share(tmp_path: Path) -> None:
    """PyTorch's tables of hooks belong to the process: a change fails in a thread that builds a module meanwhile."""
    Toy().save_pretrained(tmp_path / "toy")
    Toy.from_pretrained(tmp_path / "toy")
    hooks = nn.modules.module
    tables = [
        hooks._global_parameter_registration_hooks,
        hooks._global_buffer_registration_hooks,
        hooks._global_module_registration_hooks,
    ]
    before = [dict(table) for table in tables]
    seen = []

    class Watching(Toy):
        def __init__(self, *, scale: int = 2, width: int = 3) -> None:
            super().__init__(scale=scale, width=width)
            seen.append([dict(table) for table in tables])

    Watching().save_pretrained(tmp_path / "watching")
    Watching.from_pretrained(tmp_path / "watching")
    assert seen == [before] * 4  # the model, once to save it, and twice to load it
    assert [dict(table) for table in tables] == before


def test_models_of_one_checkpoint_share_nothing(tmp_path: Path) -> None:
    Toy().save_pretrained(tmp_path / "toy", provenance={"steps": [1]})
    checkpoint = load_checkpoint(tmp_path / "toy")
    first, second = (Toy.from_checkpoint(checkpoint) for _ in range(2))
    wanted = second.conv.weight.clone()
    for parameter in first.parameters():
        parameter.data.zero_()
    first.norm.running_mean.fill_(7)  # type: ignore[union-attr]
    first.provenance["steps"].append(2)
    assert torch.equal(second.conv.weight, wanted)
    assert torch.equal(checkpoint.tensors["conv.weight"], wanted)
    assert not second.norm.running_mean.any()  # type: ignore[union-attr]
    assert second.provenance == checkpoint.provenance == {"steps": [1]}
    assert all(parameter.untyped_storage().resizable() for parameter in second.parameters())
    with torch.inference_mode():
        third = Toy.from_checkpoint(checkpoint)
    assert not third.conv.weight.is_inference()


class Tied(Toy):
    """A model with one parameter under three names."""

    def __init__(self, *, scale: int = 2, width: int = 3) -> None:
        super().__init__(scale=scale, width=width)
        self.again = nn.Conv2d(1, width, 3)
        self.again.weight = self.conv.weight
        self.listed = nn.ParameterList([self.conv.weight])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    model.save_pretrained(tmp_path / "tied")
    loaded = Tied.from_pretrained(tmp_path / "tied")
    assert loaded.again.weight is loaded.conv.weight is loaded.listed[0]
    assert torch.equal(loaded.conv.weight, model.conv.weight)
    assert loaded.num_parameters() == model.num_parameters()
    untied = copy.deepcopy(model)
    untied.again.weight = nn.Parameter(model.conv.weight + 1)
    with pytest.raises(WeightsError, match=r"'conv.weight' and 'again.weight' are one parameter .* different values"):
        untied.save_pretrained(tmp_path / "untied")
    tensors = dict(untied.state_dict())
    write_checkpoint(tmp_path / "x.safetensors", class_name="Tied", config=model.config, tensors=tensors)
    with pytest.raises(WeightsError, match=r"not those of its config: 'conv.weight' and 'again.weight' are one"):
        Tied.from_pretrained(tmp_path / "x.safetensors")
    with torch.no_grad():
        model.conv.weight.fill_(torch.nan)
    with pytest.raises(WeightsError, match=r"'conv.weight' holds NaN"):
        model.save_pretrained(tmp_path / "nan")


def test_a_constructor_that_reads_values_is_named_with_what_to_do(tmp_path: Path) -> None:
    class Reads(SRModel):
        def __init__(self, *, scale: int = 2) -> None:
            super().__init__(scale=scale)
            self.rates = torch.linspace(0, 1, 3).tolist()

    with pytest.raises(
        WeightsError, match=r"Reads cannot be saved: its constructor must work on the meta device.*torch\.save\(model"
    ) as caught:
        Reads().save_pretrained(tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_loading_does_not_depend_on_the_default_device(tmp_path: Path) -> None:
    Toy().save_pretrained(tmp_path / "toy")
    torch.set_default_device("meta")
    try:
        loaded = Toy.from_pretrained(tmp_path / "toy")
    finally:
        torch.set_default_device(None)
    assert {x.device.type for x in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(loaded.window, torch.hann_window(8))  # type: ignore[arg-type]


@pytest.mark.portable
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own warning, on importing its compiler
def test_after_loading_a_user_module_compiles_copies_and_pickles(tmp_path: Path) -> None:
    """The hooks that count registrations stay in the process."""
    Toy().save_pretrained(tmp_path / "toy")
    Toy.from_pretrained(tmp_path / "toy")

    class Registers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.register_buffer("last", x + 1)
            self.activation = nn.ReLU()
            return self.activation(self.last)

    torch._dynamo.reset()
    compiled = torch.compile(Registers(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other[0].weight, net[0].weight)


def _tampered(path: Path, change: Any) -> Path:
    """A file whose header fits its bytes, after `change` has changed the class, config or tensors."""
    model = Toy()
    parts: dict[str, Any] = {"class_name": "Toy", "config": dict(model.config), "tensors": dict(model.state_dict())}
    change(parts)
    write_checkpoint(path, **parts)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["tensors"].pop("conv.bias"), r"1 missing \('conv.bias'\)"),
        (lambda p: p["tensors"].update(x=torch.zeros(1)), r"1 too many \('x'\)"),
        (lambda p: p["tensors"].update({"conv.bias": torch.zeros(4)}), r"'conv.bias' is \(4,\), should be \(3,\)"),
        (lambda p: p["tensors"].update({"conv.bias": torch.zeros(3).half()}), "is torch.float16"),
        (lambda p: p["tensors"].update({"norm.num_batches_tracked": torch.tensor(0.0)}), "is torch.float32"),
        (lambda p: p["config"].update(width=4), "not those of its config"),
        (lambda p: p["config"].update(width=0), "not those of its config|does not build"),
        (lambda p: p["config"].update(width=-1), "does not build"),
        (lambda p: p["config"].update(width="3"), "does not build"),
        (lambda p: p["config"].update(colour=1), "does not build a Toy: .*colour"),
        (lambda p: p["config"].update(scale=99), "scale must be an integer from 1 to 16"),
    ],
)
def test_what_is_not_exactly_the_model_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        Toy.from_pretrained(_tampered(tmp_path / "x.safetensors", change))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "config",
    [
        {"dims": [65536] * 4, "depths": [1] * 4},
        {"dims": [65536] * 64, "depths": [65536] * 64},
        {"dims": [8, 12], "depths": [65536, 65536]},
        {"d_state": 65536, "expand": 1e9},
        {"expand": 1e300},
        {"stem_channels": 65536, "in_channels": 65536},
        {"context_rates": [65536] * 64},
    ],
)
def test_a_config_larger_than_its_file_is_refused_before_it_is_built(config: dict[str, Any], tmp_path: Path) -> None:
    model = build("DeformMambaSR")
    write_checkpoint(
        tmp_path / "x.safetensors",
        class_name="DeformMambaSR",
        config={**model.config, **config},
        tensors=model.state_dict(),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=r"not those of its config|does not build"):
        from_pretrained(tmp_path / "x.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes; one layer takes more"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.half(), "call model.float"),
        (lambda m: m.double(), "call model.float"),
        (lambda m: m.add_module("extra", nn.Conv2d(1, 1, 1)), "2 too many"),
        (lambda m: delattr(m, "conv"), "2 missing"),
        (lambda m: m.conv.bias.data.fill_(torch.nan), "'conv.bias' holds NaN"),
    ],
)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(spoil: Any, message: str, tmp_path: Path) -> None:
    toy = Toy()
    toy.save_pretrained(tmp_path / "toy")
    kept = (tmp_path / "toy" / "model.safetensors").read_bytes()
    spoil(toy)
    with pytest.raises(WeightsError, match=message):
        toy.save_pretrained(tmp_path / "toy")
    assert (tmp_path / "toy" / "model.safetensors").read_bytes() == kept


def test_public_names_are_the_models() -> None:
    assert deformmamba.MODELS is MODELS
    assert deformmamba.from_pretrained is from_pretrained
    assert deformmamba.DeformMambaSR is MODELS["DeformMambaSR"]
    assert all(cls.__name__ == name for name, cls in MODELS.items())


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 15), (3, 17)])
def test_padding_fills_up_and_leaves_the_image_where_it_is(size: tuple[int, int]) -> None:
    lr = image(2, 3, *size)
    padded, (h, w) = pad_to_multiple(lr, 4, minimum=8)
    assert (h, w) == size
    assert all(
        n % 4 == 0 and n >= max(8, m) and n - max(8, m) < 4 for n, m in zip(padded.shape[-2:], size, strict=True)
    )
    assert torch.equal(padded[..., :h, :w], lr)
    assert torch.equal(padded[..., h:, :w], lr[..., -1:, :].expand_as(padded[..., h:, :w]))
    assert torch.equal(padded[..., :h, w:], lr[..., :, -1:].expand_as(padded[..., :h, w:]))
    assert pad_to_multiple(lr, 1)[0] is lr


@pytest.mark.slow
def test_the_input_check_does_not_break_a_compiled_graph() -> None:
    model, lr = Bicubic(scale=2).eval(), image(1, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(lr), model(lr))


# ------------------------------------------------------------------------------------------------------ interpolation

SIZES = [(8, 8), (9, 13), (2, 7), (1, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("cls", [Bicubic, BSpline, ZeroFill])
def test_on_the_origin_grid_the_samples_are_kept(cls: Any, scale: int, size: tuple[int, int]) -> None:
    lr = image(1, 2, *size).double()
    assert_close(cls(scale=scale)(lr)[..., ::scale, ::scale], lr)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_bspline_is_the_spline_of_scipy(grid: Any, scale: int, size: tuple[int, int]) -> None:
    lr = image(1, 1, *size).double()
    model = BSpline(scale=scale, grid=grid)
    positions = np.meshgrid(*(model.positions(n).numpy() for n in size), indexing="ij")
    # scipy's spline_filter treats an axis of length 1 as a constant, as we do, but scipy cannot evaluate it mirrored
    expected = ndimage.map_coordinates(
        lr[0, 0].numpy(), positions, order=3, mode="mirror" if min(size) > 1 else "nearest"
    )
    if min(size) > 1:
        np.testing.assert_allclose(model(lr)[0, 0].numpy(), expected, atol=1e-12)
    else:
        row = ndimage.map_coordinates(lr[0, 0, 0].numpy(), [positions[1][0]], order=3, mode="mirror")
        np.testing.assert_allclose(model(lr)[0, 0].numpy(), np.tile(row, (scale, 1)), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_is_that_of_torch_where_torch_has_one(scale: int, size: tuple[int, int]) -> None:
    lr = image(2, 1, *size).double()
    expected = F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)
    assert_close(Bicubic(scale=scale, a=-0.75, grid="half-pixel")(lr), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("model", "degree", "margin"),
    [(Bicubic, 2, 8), (BSpline, 3, 120)],  # the effect of a spline's mirrored edge falls by 0.27 per sample
)
def test_polynomials_are_reproduced_away_from_the_edges(model: Any, degree: int, margin: int, grid: Any) -> None:
    net = model(scale=4, grid=grid)
    x, y = torch.arange(80.0, dtype=torch.float64), net.positions(80)

    def polynomial(t: torch.Tensor, power: int) -> torch.Tensor:
        return ((t - 40) / 40) ** power

    inside = slice(margin, -margin)
    for power in range(degree + 1):
        lr = polynomial(x, power)[:, None] * polynomial(x, degree - power)[None, :]
        sr = polynomial(y, power)[:, None] * polynomial(y, degree - power)[None, :]
        torch.testing.assert_close(net(lr[None, None])[0, 0][inside, inside], sr[inside, inside], atol=1e-10, rtol=0)
    lr = (polynomial(x, degree + 1)[:, None] * torch.ones(80))[None, None]
    sr = polynomial(y, degree + 1)[:, None].expand(320, 320)
    assert (net(lr)[0, 0] - sr)[inside, inside].abs().max() > 1e-9, "and no higher degree: the bound above is the order"


def test_constants_keep_their_value_up_to_the_edge() -> None:
    lr = torch.full((1, 1, 7, 10), 0.7, dtype=torch.float64)
    for model in (Bicubic(scale=3), BSpline(scale=3), ZeroFill(scale=3), Bicubic(scale=3, grid="half-pixel")):
        assert_close(model(lr), torch.full((1, 1, 21, 30), 0.7, dtype=torch.float64))


def test_the_right_grid_is_worth_decibels() -> None:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 128, dtype=torch.float64)] * 2, indexing="ij")
    head = ((x / 0.7) ** 2 + (y / 0.9) ** 2 < 1).double() * (0.6 + 0.3 * torch.sin(9 * x + 5 * y))
    hr = head + 0.3 * ((x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.04)
    for scale in (2, 4):
        lr = degrade(hr, scale)[None, None]
        for cls in (Bicubic, BSpline):
            right, wrong = (psnr(cls(scale=scale, grid=grid)(lr)[0, 0], hr) for grid in ("origin", "half-pixel"))
            assert right > wrong + 1
            assert_close(
                cls(scale=scale, grid="origin")(lr).flip(-1)[..., scale - 1 :],
                cls(scale=scale, grid="origin")(lr.flip(-1))[..., : -(scale - 1)],
                msg="reversed about the origin, not about the middle of the pixels",
            )


def test_zero_fill_takes_the_whole_slice_where_it_is_given() -> None:
    lr = image(1, 1, 12, 12)
    model = ZeroFill(scale=2)
    whole = model(lr)
    assert torch.equal(whole, zero_fill(lr, 2))
    tile = whole[..., 4:16, 8:24]
    assert torch.equal(model(lr[..., 2:8, 4:12], base=tile), tile)


def test_a_base_that_does_not_fit_is_one_line(name: str) -> None:
    """`base` is a real floating-point tensor of the output's shape, for models that do not use it too."""
    lr = image(1, 1, 12, 12)
    models = [build(name)]
    if "skip" in models[0].config:
        models = [type(models[0])(**{**models[0].config, "skip": skip}).eval() for skip in (None, "zero-fill")]
    for model in models:
        shape = 1, 1, 12 * model.scale, 12 * model.scale
        for base, error, message in (
            ("a", TypeError, "base must be a tensor of shape .*, not 'a'"),
            (np.zeros(shape), TypeError, "base must be a tensor of shape"),
            (torch.zeros(shape, dtype=torch.complex64), TypeError, "base is torch.complex64; wanted a real floating"),
            (torch.zeros(shape, dtype=torch.int32), TypeError, "base is torch.int32; wanted a real floating"),
            (torch.zeros(1, 1, 3, 3), ValueError, r"base is \(1, 1, 3, 3\); wanted \(1, 1, "),
            (torch.zeros(1, 1, 1, 1), ValueError, r"base is \(1, 1, 1, 1\); wanted \(1, 1, "),
        ):
            with pytest.raises(error, match=f"^{type(model).__name__}: {message}"):
                model(lr, base=base)


@pytest.mark.parametrize("bad", [{"grid": "corner"}, {"grid": None}, {"a": 0.5}, {"a": float("nan")}])
def test_interpolation_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"grid must be|a must lie|plain values"):
        Bicubic(scale=2, **bad)


@pytest.mark.parametrize(("argument", "value"), [("in_channels", 0), ("in_channels", -1), ("stem_channels", 0)])
def test_channel_counts_below_one_are_refused(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"DeformMambaSR: {argument} must be at least 1, not {value}"):
        DeformMambaSR(dims=[8], depths=[1], patch=2, d_state=2, **{argument: value})


def test_integers_of_numpy_are_integers() -> None:
    model = ZeroFill(scale=np.int64(2))
    assert type(model.scale) is int
    assert model.config["scale"] == 2
    assert type(model.config["scale"]) is int


def test_a_precision_that_does_not_fit_gets_one_sentence(name: str) -> None:
    """The image in another precision than the weights; weights in one that the model does not run in."""
    model, lr = build(name), image(1, 1, 12, 12)
    if next(model.parameters(), None) is None:
        assert_close(model(lr.half()), model(lr.half().float()).half(), atol=1e-3, rtol=0)  # a step of float16 near 1
        return
    for given in (torch.float64, torch.float16):
        if given == torch.float64 or not model.any_intensity:
            with pytest.raises(TypeError, match=r"the image is float.. and the weights are float32"):
                model(lr.to(given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(lr.bfloat16()).isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=r"in which this model does not run: .*model\.float"):
            model.to(dtype)(lr.to(dtype))
