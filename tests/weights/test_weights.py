"""Checkpoint files and names: written files are read back, and everything else is refused in one line."""

import hashlib
import inspect
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_checkpoint import TINY, fuzz, join, split
from refusals import refused as refused_by_any
from safetensors import safe_open
from safetensors.torch import save_file

import deformmamba
from deformmamba import weights
from deformmamba.cli import main
from deformmamba.errors import InvalidType
from deformmamba.extras import MissingExtra
from deformmamba.models import MODELS, DeformMambaSR, SRModel, ZeroFill, from_pretrained
from deformmamba.weights import (
    Checkpoint,
    WeightsError,
    card,
    check_config,
    describe,
    fetch,
    list_weights,
    load_checkpoint,
    manifest,
    publish,
    read_checkpoint,
    verify,
    weights_entry,
    write_checkpoint,
)
from deformmamba.weights import checkpoint as files

refused = partial(refused_by_any, kind=WeightsError)

# number of mutated files; tests/weights/fuzz_checkpoint.py tests more
N_MUTANTS = int(os.environ.get("DEFORMMAMBA_FUZZ", "1000"))


@pytest.fixture(scope="module")
def model() -> DeformMambaSR:
    torch.manual_seed(0)
    return DeformMambaSR(**TINY).eval()


@pytest.fixture
def saved(model: DeformMambaSR, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tiny", provenance={"trained_on": ["noise"]})
    return tmp_path / "tiny"


# --------------------------------------------------------------------------------------------------- the file's format


def test_any_safetensors_reader_reads_it_and_it_says_what_it_is(saved: Path, model: DeformMambaSR) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in model.state_dict().items())
        metadata = file.metadata()
    assert metadata["format"] == "deformmamba-1"
    assert metadata["class"] == "DeformMambaSR"
    assert json.loads(metadata["config"]) == model.config
    assert json.loads(metadata["provenance"]) == {"trained_on": ["noise"]}
    beside = json.loads((saved / "config.json").read_text())
    assert beside == {"format": "deformmamba-1", "class": "DeformMambaSR", "config": model.config}
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool],
)
def test_tensors_of_every_kind_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {"a": values, "scalar": values[0, 0, 1], "none": values[:0], "strided": values.transpose(0, 2)[::2]}
    tensors["byte"] = torch.ones(3, dtype=torch.int8)  # in the order of names, wide items would be misaligned
    digest = write_checkpoint(tmp_path / "x.safetensors", class_name="X", config={"n": 1}, tensors=tensors)
    again = read_checkpoint(tmp_path / "x.safetensors")
    assert again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert digest == again.sha256 == hashlib.sha256(data).hexdigest()
    assert (again.class_name, again.config, again.provenance) == ("X", {"n": 1}, {})
    header, body = split(data)
    header.pop("__metadata__")
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "I16": 2}
    for entry in header.values():
        assert (len(data) - len(body) + entry["data_offsets"][0]) % sizes.get(entry["dtype"], 1) == 0


@pytest.mark.parametrize(
    "provenance",
    [{}, {"note": "naïve „quotes“\n\0 \ud800"}, {"deep": {"a": [[1.5, None, True], {"b": -(2**40)}]}}],
)
def test_provenance_comes_back(provenance: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.safetensors", class_name="X", config={}, tensors={}, provenance=provenance)
    assert read_checkpoint(tmp_path / "x.safetensors").provenance == provenance


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n": 10**9}, r"config\['n'\] is 1000000000; integers lie within"),
        ({"n": -(10**5000)}, "integers lie within"),
        ({"n": [1, [2, {"a": 70000}]]}, r"config\['n'\]\[1\]\[1\]\['a'\] is 70000"),
        ({"x": float("nan")}, "numbers are finite"),
        ({"x": float("-inf")}, "numbers are finite"),
        ({"n": list(range(65))}, "has 65 items"),
        ({f"k{i}": 0 for i in range(65)}, "has 65 items"),
        ({"x": [[[[[[[[[[]]]]]]]]]]}, "nested more than"),
        ({"x": "a" * 5000}, "a text of 5000 characters"),
        ({f"k{i}": "a" * 4000 for i in range(5)}, "bytes of JSON"),
        ({"a b": 1}, "not an argument name"),
        ({"a" * 65: 1}, "not an argument name"),
        ({1: 1}, "not an argument name"),
        ({"x": {1: 2}}, "JSON keys are texts"),
        ({"x": (1, 2)}, "is a tuple"),
        ({"x": torch.float32}, "is a dtype"),
        ([1], "not list"),
        (None, "not NoneType"),
    ],
)
def test_configs_out_of_bounds(config: Any, message: str) -> None:
    refused(lambda: check_config(config), message)


def test_what_cannot_be_stored_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def write(**changes: Any) -> None:
        write_checkpoint(path, **{"class_name": "X", "config": {}, "tensors": {}, **changes})

    refused(lambda: write(tensors={"a": torch.zeros(2, device="meta")}), "'a'.*cannot be stored")
    refused(lambda: write(tensors={"a": torch.zeros(2, dtype=torch.complex64)}), "'a'.*cannot be stored")
    refused(lambda: write(tensors={"a": torch.zeros(2).to_sparse()}), "'a'.*cannot be stored")
    refused(lambda: write(config={"x": {1, 2}}), "is a set")
    refused(lambda: write(provenance={"when": object()}), "is a object")
    refused(lambda: write(provenance={"log": ["a" * 4000] * 100}), "shorten the provenance")
    model = ZeroFill(scale=2)
    with pytest.raises(InvalidType, match="provenance must be a dictionary or None, not a list"):
        model.save_pretrained(path, provenance=[1])  # type: ignore[arg-type]
    refused(lambda: model.save_pretrained(""), "the path is empty")
    on_meta = DeformMambaSR(dims=[8], depths=[1]).to("meta")
    refused(lambda: on_meta.save_pretrained(path), "weights have no values")
    assert not path.exists()


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    def write(**changes: Any) -> None:
        write_checkpoint(tmp_path / "x", **{"class_name": "X", "config": {}, "tensors": {}, **changes})

    refused(lambda: write(class_name="Größe"), "could not be read again: its class is .*not a class name")
    refused(lambda: write(class_name="A" * 65), "could not be read again: its class is .*not a class name")
    refused(lambda: write(tensors={"a": torch.zeros([1] * 9)}), "could not be read again: tensor 'a' has shape")
    refused(lambda: write(tensors={"__metadata__": torch.zeros(2)}), "could not be read again: its header has no text")
    refused(lambda: write(tensors={"a": torch.tensor(torch.nan)}), "tensor 'a' holds NaN")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        {"x": [[[[[[[1]]]]]]]},  # as deep as allowed
        {"x": [[0] * 64] * 60},  # with one number per line it takes more bytes than a config.json may have
    ],
)
def test_the_largest_config_is_read_back_from_a_folder(config: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", class_name="X", config=config, tensors={})
    assert read_checkpoint(tmp_path / "x").config == config
    refused(
        lambda: write_checkpoint(tmp_path / "y", class_name="X", config={"x": [[[[[[[[1]]]]]]]]}, tensors={}),
        "nested more than 8 levels",
    )
    assert not (tmp_path / "y").exists()


def safetensors_of_another_program(folder: Path) -> bytes:
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors", metadata={"format": "pt"})
    data = (folder / "other.safetensors").read_bytes()
    (folder / "other.safetensors").unlink()
    return data


def test_files_of_another_program_are_not_replaced(tmp_path: Path) -> None:
    model = ZeroFill(scale=2)
    theirs = [
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b'{"format": "deform'),  # damaged too early to tell
        ("config.json", b"[]"),
        ("config.json", b"\xff" * 99),
        ("model.safetensors", safetensors_of_another_program(tmp_path)),
        ("model.safetensors", b"\xff" * 99),
    ]
    for k, (name, data) in enumerate(theirs):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / name).write_bytes(data)
        refused(lambda folder=folder: model.save_pretrained(folder), f"holds another {name}, .*a new or empty folder")
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(name, data)]


def test_own_files_are_replaced_also_damaged_ones(saved: Path) -> None:
    model = ZeroFill(scale=2)
    config, whole = (saved / "config.json").read_bytes(), (saved / "model.safetensors").read_bytes()
    newer = (config.replace(b"deformmamba-1", b"deformmamba-2"), whole.replace(b"deformmamba-1", b"deformmamba-2"))
    for first, second in ((config, whole), newer, (config[:40], whole[:-9]), (b"", b"")):
        (saved / "config.json").write_bytes(first)
        (saved / "model.safetensors").write_bytes(second)
        model.save_pretrained(saved)
        assert isinstance(from_pretrained(saved), ZeroFill)


# -------------------------------------------------------------------------------------------------------- bad contents


def _with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def mutate(data: bytes) -> bytes:
        header, body = split(data)
        changed = change(header)
        return join(header if changed is None else changed, body)

    return mutate


def _metadata(**changes: Any) -> Callable[[bytes], bytes]:
    return _with_header(lambda header: header["__metadata__"].update(changes))


def _without(key: str) -> Callable[[bytes], bytes]:
    return _with_header(lambda h: {**h, "__metadata__": {k: v for k, v in h["__metadata__"].items() if k != key}})


def _first(**changes: Any) -> Callable[[bytes], bytes]:
    """Changes the header's entry of the first tensor."""
    return _with_header(lambda header: next(e for k, e in header.items() if k != "__metadata__").update(changes))


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda data: b"", "it has only 0 bytes"),
        (lambda data: data[:7], "it has only 7 bytes"),
        (lambda data: data[:100], "ends inside its header"),
        (lambda data: data[:-1], "bytes of tensors, but .* are present"),
        (lambda data: data + b"\0", "bytes of tensors, but .* are present"),
        (lambda data: (2**63 + 5).to_bytes(8, "little") + data[8:], "header claims 9223372036854775813 bytes"),
        (lambda data: b"<html>not found</html>" * 9, "header claims"),
        (lambda data: pickle.dumps({"a": 1}, protocol=4), "pickle or zip archive, not safetensors.*save_pretr"),
        (lambda data: join(b"[]", b""), "header is not a JSON object"),
        (lambda data: join(b"{", b""), "header is not valid JSON"),
        (lambda data: join(b"\xff\xfe{\0}\0", b""), "header is not valid JSON"),
        (lambda data: join(b'{"a": NaN}', b""), "NaN is not JSON"),
        (lambda data: join(b'{"a": {}, "a": {}}', b""), "a key occurs twice"),
        (lambda data: join(b"[" * 200_000 + b"]" * 200_000, b""), "header is not valid JSON"),
        (lambda data: join(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""), "header is not valid JSON"),
        (lambda data: join(b'{"a": 1' + b"0" * 5000 + b"}", b""), "not valid JSON|no metadata"),
        (lambda data: join({}, b""), "no text metadata"),
        (_with_header(lambda h: {"__metadata__": None}), "no text metadata"),
        (_with_header(lambda h: {"__metadata__": {"format": 1}}), "no text metadata"),
        (_with_header(lambda h: {"__metadata__": {"format": "pt"}}), "its format is 'pt', this version reads 'deformm"),
        (_without("format"), "its format is None"),
        (_without("config"), "its header lacks config"),
        (_metadata(format="deformmamba-2"), "newer deformmamba"),
        (_metadata(**{"class": "os.system"}), "not a class name"),
        (_metadata(**{"class": "A" * 100}), "not a class name"),
        (_metadata(**{"class": "Дeform"}), "not a class name"),
        (_metadata(**{"class": "\ud800\n"}), "not a class name"),
        (_metadata(**{"class": "Nothing"}), "holds a Nothing, which is not a model of this version"),
        (_metadata(config="{"), "its config is not valid JSON"),
        (_metadata(config='{"scale": 2, "scale": 4}'), "its config is not valid JSON: a key occurs twice"),
        (_metadata(config="[]"), "config must be a JSON object"),
        (_metadata(config="[" * 10_000), "its config is not valid JSON"),
        (_metadata(config='{"scale": 1e999}'), "numbers are finite"),
        (_metadata(config='{"scale": "' + "4" * 20_000 + '"}'), "its config takes 20013 bytes"),
        (_metadata(config='{"dims": [99999999999]}'), "integers lie within"),
        (_metadata(config='{"\\ud800": 1}'), "not an argument name"),
        (_metadata(config='{"größe": 1}'), r"does not build .*gr\\xf6\\xdfe"),
        (_metadata(config="{}"), "needs more than .* parameters, far more than the file contains"),
        (_metadata(config=json.dumps({**TINY, "dims": [8, 16]})), r"should be \(.*16.*\)"),
        (_metadata(provenance="7"), "provenance is not a JSON object"),
        (_metadata(provenance='{"a": Infinity}'), "its provenance is not valid JSON"),
        (_with_header(lambda h: {**h, "x": 3}), "tensor 'x' is not described by"),
        (_with_header(lambda h: {**h, "\n" * 300: 3}), "is not described by"),
        (_first(dtype="F8_E4M3"), "has dtype 'F8_E4M3'; allowed are F64"),
        (_first(dtype=["F32"]), "has dtype"),
        (_first(dtype="I32"), "not those of its config"),
        (_first(shape="3"), "which is not a shape"),
        (_first(shape=[-1]), "which is not a shape"),
        (_first(shape=[True]), "which is not a shape"),
        (_first(shape=[1.0]), "which is not a shape"),
        (_first(shape=[1] * 9), "which is not a shape"),
        (_first(shape=[2**62, 2**62]), "does not fill"),
        (_first(shape=[0, 2**70], data_offsets=[0, 0]), "starts at byte|safetensors refuses it"),
        (_first(data_offsets=[0]), "not two offsets"),
        (_first(data_offsets=[4, 0]), "does not fill"),
        (_first(data_offsets=[-4, 0]), "not two offsets"),
        (_first(extra=1), "is not described by"),
        (
            _with_header(lambda h: {k: v for k, v in h.items() if k != "project.bias"}),
            "starts at byte|bytes of tensors",
        ),
        (lambda data: data[:-4] + b"\x00\x00\xc0\x7f", "holds NaN or infinity"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_malformed_files(mutate: Callable[[bytes], bytes], message: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(mutate((saved / "model.safetensors").read_bytes()))
    assert str(path) in refused(lambda: from_pretrained(path), message)


def test_state_dicts_without_a_header_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    refused(lambda: from_pretrained(tmp_path / "plain.safetensors"), "does not identify its model")


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x.pkl", "X.PT", "x.safetensors", "x"])
@pytest.mark.parametrize("protocol", [None, 0, 2, 5])
def test_pickles_are_refused_by_name_and_by_content_and_never_run(
    name: str, protocol: int | None, tmp_path: Path
) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    if protocol is None:
        torch.save({"a": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung), protocol=protocol))
    by_hand = name.lower() in ("x", "x.safetensors") and protocol in (
        0,
        5,
    )  # no signature, or a frame in place of a header
    refused(lambda: from_pretrained(path), "only safetensors is read" if not by_hand else "only safetensors|header")
    assert not sprung.exists()


def test_a_folder_with_a_pickle_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(lambda: from_pretrained(tmp_path), r"holds 'pytorch_model.bin' but no model.safetensors.*weights_only=True")


# --------------------------------------------------------------------------------------------------- folders and paths


def test_a_folder_whose_config_disagrees_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    good = json.loads(path.read_text())

    def change(**changes: Any) -> None:
        path.write_text(json.dumps({**good, **changes}))

    change(config={**good["config"], "scale": 4})
    refused(lambda: from_pretrained(saved), "disagree on config")
    change(config={**good["config"], "deform": 1})
    refused(lambda: from_pretrained(saved), "disagree on config")  # 1 == True in Python, not in a file
    change(**{"class": "Bicubic"})
    refused(lambda: from_pretrained(saved), "disagree on class: 'Bicubic' and 'DeformMambaSR'")
    change(format="deformmamba-0")
    refused(lambda: from_pretrained(saved), "disagree on format")
    for text, message in [
        ("[]", "disagree on format: None"),
        ("{", "not valid JSON"),
        ("[" * 5000 + "]" * 5000, "not valid JSON|nested"),
        (" " * 50_000, "50000 bytes"),
    ]:
        path.write_text(text)
        refused(lambda: from_pretrained(saved), message)
    path.unlink()
    assert isinstance(from_pretrained(saved), DeformMambaSR), "the header alone is enough"


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    refused(lambda: from_pretrained(tmp_path), "holds no model.safetensors")
    refused(lambda: from_pretrained(tmp_path / "nothing"), "there is no file or folder")
    refused(lambda: from_pretrained(str(tmp_path / "nothing")), "there is no file or folder")
    refused(lambda: from_pretrained("nothing.safetensors"), "there is no file or folder 'nothing.safetensors'")
    refused(lambda: from_pretrained("folder/nothing.safetensors"), "there is no file or folder")
    refused(lambda: from_pretrained(Path("ixi-4x")), "there is no file or folder 'ixi-4x'")
    refused(lambda: from_pretrained("a/b/c"), "there is no file or folder")
    refused(lambda: from_pretrained("a\0b"), "unknown weights")
    refused(lambda: from_pretrained("a\n/b\n/"), "there is no file or folder")
    refused(lambda: from_pretrained("x" * 100_000), "unknown weights")
    refused(lambda: from_pretrained(""), "unknown weights ''")
    refused(lambda: read_checkpoint("a\0b"), "there is no file|cannot read")
    refused(lambda: read_checkpoint(tmp_path / "no\nfile"), r"no\\nfile")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(lambda: from_pretrained(tmp_path / "pipe"), "not a regular file")


def test_a_tilde_is_the_home(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_checkpoint("~/tiny").class_name == "DeformMambaSR"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(saved: Path) -> None:
    (saved / "model.safetensors").chmod(0)
    refused(lambda: from_pretrained(saved), "cannot read .*[Pp]ermission denied")


def test_paths_that_cannot_be_written(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZeroFill(scale=2)
    file = saved / "model.safetensors"
    refused(lambda: model.save_pretrained(file / "folder"), "cannot make the folder .*choose another one")
    refused(lambda: model.save_pretrained(file / "x.safetensors"), "cannot write")
    refused(lambda: model.save_pretrained(tmp_path / "no" / "x.safetensors"), "cannot write .*No such file")
    refused(lambda: model.save_pretrained(tmp_path / "x.pt"), "checkpoints are safetensors")
    refused(lambda: model.save_pretrained(tmp_path / "a\0b"), "cannot make the folder")
    refused(lambda: model.save_pretrained(tmp_path / "a\0.safetensors"), "cannot write")
    refused(lambda: model.save_pretrained(tmp_path / ("a" * 300)), "cannot make the folder .*: File name too long")
    refused(lambda: model.save_pretrained(tmp_path / f"{'a' * 300}.safetensors"), "cannot write .*: File name too long")
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: model.save_pretrained(tmp_path / "folder.safetensors"), "is a folder")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(saved.rglob("*"))
    kept = file.read_bytes()
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            refused(lambda: model.save_pretrained(saved), "cannot write .*No space left on device")
    assert sorted(saved.rglob("*")) == before, "nothing is left behind"
    assert file.read_bytes() == kept, "and what was there is untouched"


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_checkpoint(saved: Path) -> None:
    kept = (saved / "model.safetensors").read_bytes()
    script = (
        "import os, sys\n"
        "from deformmamba.models import ZeroFill\n"
        "os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
        f"ZeroFill(scale=2).save_pretrained({str(saved)!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert len(list(saved.iterdir())) == 4, "a partial file, under a name that nothing loads"
    assert (saved / "model.safetensors").read_bytes() == kept
    assert isinstance(from_pretrained(saved), DeformMambaSR)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def published(saved: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A manifest with one packaged checkpoint, one on the Hub and one planned; tests change it in place."""
    data = (saved / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    (saved / "checkpoints").mkdir()
    (saved / "checkpoints" / "ixi-4x.safetensors").write_bytes(data)
    entry = {
        "file": "ixi-4x.safetensors",
        "sha256": digest,
        "size": len(data),
        "class": "DeformMambaSR",
        "license": "cc-by-4.0",
        "summary": "T2 brain, 4x: a network of noise.",
        "trained_on": ["noise", "more noise"],
        "spacings_mm": [0.9],
        "repo": None,
        "scores": [{"data": "noise", "psnr": 28.0}, {"data": "more", "ssim": 0.9}],
    }
    known = {
        "format": 1,
        "weights": {
            "ixi-4x": entry,
            "ixi-2x": {**entry, "file": "elsewhere.safetensors", "repo": "org/ixi-2x", "revision": "c0ffee"},
        },
        "planned": {"fastmri-4x": {"recipe": "recipes/fastmri-4x.toml", "why": "the data need a signed agreement"}},
    }
    monkeypatch.setattr(weights, "manifest", lambda: known)
    monkeypatch.setattr(weights, "files", lambda package: saved)
    return known


def test_names_resolve_to_the_packaged_file(published: dict[str, Any], saved: Path) -> None:
    model = deformmamba.DeformMambaSR.from_pretrained("ixi-4x")
    assert model.source == "ixi-4x"
    assert verify("ixi-4x") == published["weights"]["ixi-4x"]["sha256"]
    assert [entry["name"] for entry in list_weights()] == ["ixi-4x", "ixi-2x"]
    assert fetch("ixi-4x") == saved / "checkpoints" / "ixi-4x.safetensors"
    refused(lambda: load_checkpoint("ixi-4x", revision="abc"), "the manifest pins")
    (saved / "checkpoints" / "ixi-4x.safetensors").unlink()
    refused(lambda: load_checkpoint("ixi-4x"), "missing from this installation")


def test_a_wrong_hash_is_found_before_the_file_is_parsed(
    published: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved / "checkpoints" / "ixi-4x.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(files, "_parse", lambda *args: pytest.fail("parsed before its hash was compared"))
    message = refused(lambda: load_checkpoint("ixi-4x"), "damaged")
    assert published["weights"]["ixi-4x"]["sha256"] in message
    assert hashlib.sha256(path.read_bytes()).hexdigest() in message


def test_unknown_names_suggest_the_nearest(published: dict[str, Any]) -> None:
    refused(lambda: load_checkpoint("ixi4x"), "unknown weights 'ixi4x' .did you mean 'ixi-4x'.*ixi-4x, ixi-2x")
    refused(lambda: load_checkpoint("fastmri4x"), "did you mean 'fastmri-4x'")
    refused(lambda: load_checkpoint("IXI-4X"), "did you mean 'ixi-4x'")
    refused(lambda: load_checkpoint("./ixi-2x.safetensors"), "there is no file or folder")
    refused(lambda: load_checkpoint("ixi-2x.safetensors"), "the published weights have the name 'ixi-2x'")
    assert "did you mean" not in refused(lambda: load_checkpoint("qqq"), "published are: ixi-4x, ixi-2x")
    refused(lambda: weights_entry("ixi-3x"), "did you mean")


@pytest.mark.parametrize("name", [None, 3, b"ixi-4x", ["ixi-4x"]])
def test_what_is_no_name_is_named(name: Any) -> None:
    with pytest.raises(TypeError, match="weights are a name, a path or org/repo, not"):
        from_pretrained(name)


def test_planned_names_name_the_recipe(published: dict[str, Any]) -> None:
    refused(lambda: load_checkpoint("fastmri-4x"), "weights 'fastmri-4x' do not exist yet.*recipes/fastmri-4x.toml")


def test_a_name_of_the_manifest_is_never_a_folder_of_that_name(
    published: dict[str, Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ZeroFill(scale=2).save_pretrained("ixi-4x")
    with pytest.warns(UserWarning, match=r"means the published weights of that name; .* give ./ixi-4x"):
        assert load_checkpoint("ixi-4x").class_name == "DeformMambaSR"
    assert load_checkpoint("./ixi-4x").class_name == "ZeroFill"
    assert load_checkpoint(tmp_path / "ixi-4x").class_name == "ZeroFill"
    assert load_checkpoint(Path("ixi-4x")).class_name == "ZeroFill"
    (tmp_path / "ixi-4x" / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="means the published weights"):
        assert verify("ixi-4x") == published["weights"]["ixi-4x"]["sha256"]
    ZeroFill(scale=2).save_pretrained("org/name")
    assert load_checkpoint("org/name").class_name == "ZeroFill"
    refused(lambda: load_checkpoint("org/name", revision="main"), "is a local path")


@pytest.mark.parametrize(
    "name",
    [
        "runs/mine",
        "here/mine",
        "mine/best.safetensor",
        "mine/best.safetensors",
        "mine/best.pth",
        "./mine",
        "a/b/c",
        "~/x",
    ],
)
def test_a_mistyped_path_is_not_sent_to_the_hub(
    name: str, published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(weights, "download", lambda *_, **__: pytest.fail("asked the Hub"))
    message = refused(lambda: load_checkpoint(name), "there is no file or folder")
    assert ("@main" in message) == (name.count("/") == 1 and not name.startswith((".", "~")))


def test_verify_is_ok_only_after_a_comparison(published: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    fetch("ixi-4x", folder)
    digest = published["weights"]["ixi-4x"]["sha256"]
    assert verify(folder) == digest
    assert verify(folder / "model.safetensors") == digest  # the manifest's hash
    model = ZeroFill(scale=2)
    other = model.save_pretrained(folder / "model.safetensors")
    (folder / "config.json").unlink()
    refused(lambda: verify(folder), rf"sha256 {other}, but the README.md beside it states {digest}")
    refused(lambda: verify(folder / "model.safetensors"), "no expected hash is known")
    assert verify(folder / "model.safetensors", sha256=other.upper()) == other
    refused(lambda: verify(folder / "model.safetensors", sha256="0" * 64), "was expected")
    model.save_pretrained(tmp_path / "own")
    assert verify(tmp_path / "own") == other  # the hash in its card


def test_fetching_replaces_nothing_of_another_origin(published: dict[str, Any], tmp_path: Path) -> None:
    for k, (name, data) in enumerate({"README.md": "# Mine", "config.json": "{}", "model.safetensors": "x"}.items()):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / name).write_text(data)
        refused(lambda folder=folder: fetch("ixi-4x", folder), f"holds another {name}, which would be replaced")
        assert (folder / name).read_text() == data
        assert len(list(folder.iterdir())) == 1
    path = fetch("ixi-4x", tmp_path / "new")
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    assert fetch("ixi-4x", tmp_path / "new").read_bytes() == whole


def test_a_saved_folder_has_a_card_and_one_of_a_person_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    digest = ZeroFill(scale=2).save_pretrained(folder, provenance={"license": "CC0-1.0", "steps": 3})
    text = (folder / "README.md").read_text()
    assert "# mine" in text
    assert digest in text
    assert 'license: "CC0-1.0"' in text
    again = ZeroFill(scale=4).save_pretrained(folder)
    assert again in (folder / "README.md").read_text()
    assert deformmamba.from_pretrained(folder).scale == 4
    assert main(["weights", "show", str(folder)]) == 0
    assert again in capsys.readouterr().out
    assert main(["weights", "show", str(folder / "model.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == again
    for by_hand in (b"# By hand", b"# M\xe9moire"):
        (folder / "README.md").write_bytes(by_hand)
        ZeroFill(scale=2).save_pretrained(folder)
        assert (folder / "README.md").read_bytes() == by_hand


def test_publishing_asks_for_a_licence(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    ZeroFill(scale=2).save_pretrained(folder)
    refused(lambda: publish(folder, "org/mine", dry_run=True), "has no licence; give license=")
    assert publish(folder, "org/mine", dry_run=True, license="cc0-1.0").revision is None
    ZeroFill(scale=2).save_pretrained(folder, provenance={"license": "CC0-1.0"})
    assert publish(folder, "org/mine", dry_run=True).repo == "org/mine"
    refused(lambda: ZeroFill(scale=2).push_to_hub("org/mine", dry_run=True), "has no licence")
    assert ZeroFill(scale=2).push_to_hub("org/mine", dry_run=True, license="cc0-1.0").repo == "org/mine"


def test_a_licence_is_one_of_the_hubs_and_is_written_into_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    ZeroFill(scale=2).save_pretrained(folder, provenance={"license": "no such"})
    refused(lambda: publish(folder, "org/mine", dry_run=True), "'no such' is no licence that the Hub lists")
    refused(lambda: publish(folder, "org/mine", dry_run=True, license="other"), "is no licence that the Hub lists")
    for name, nearest in (("cc by 4.0", "cc-by-4.0"), ("Apache 2", "apache-2.0")):
        refused(lambda name=name: publish(folder, "org/mine", dry_run=True, license=name), f"did you mean '{nearest}'")
    assert publish(folder, "org/mine", dry_run=True, license="CC-BY-SA-4.0").revision is None
    for text, said in (
        ("# By hand", "states no licence"),
        ("---\nlicense: mit\n---\n# By hand", "states the licence 'mit'"),
    ):
        (folder / "README.md").write_text(text)
        refused(lambda: publish(folder, "org/mine", dry_run=True, license="cc0-1.0"), f"{said}; write `license: cc0")
    assert publish(folder, "org/mine", dry_run=True).revision is None
    assert publish(folder, "org/mine", dry_run=True, license="MIT").revision is None


def test_the_card_is_markdown_with_the_facts(published: dict[str, Any]) -> None:
    entry = list_weights()[0]
    text = card(entry)
    front, body = text.removeprefix("---\n").split("\n---\n")
    assert 'license: "cc-by-4.0"' in front.splitlines()
    assert "# ixi-4x" in body
    assert 'from_pretrained("ixi-4x")' in body
    assert f"- **sha256**: {entry['sha256']}" in body
    assert f"- **size**: {entry['size'] / 1e6:.2f} MB ({entry['size']} bytes)" in body
    assert "there is no repository on the Hub" in body
    assert "## Training data" in body
    assert "| more noise |" in body
    assert "| data | network |" in body
    assert "| noise | 28.00 |" in body
    assert "Not a medical device" in body
    assert "\n\n\n" not in text
    assert text.isascii()
    assert "Scores" not in card({"name": "x"})


def test_the_card_has_a_table_for_each_list_of_an_assessment_and_loses_nothing() -> None:
    entry = {
        "name": "ixi-4x",
        "repo": "org/ixi-4x",
        "revision": "c0ffee",
        "intended_use": "Nothing but this test.",
        "limits": "Made up.",
        "preset": "small",
        "consistency": "off",
        "invented_later": {"a_b": [1, 2.34567], "c": None},
        "by_spacing": [{"spacing_mm": 0.9, "psnr": 30.123456, "zero_fill_psnr": 28.5}, {"spacing_mm": 1.2, "psnr": 29}],
        "out_of_domain": [{"case": "rotated | by 10 degrees", "psnr": 25.0}],
        "lesions": [{"diameter_mm": 2, "contrast_recovered": 0.51, "bicubic": 0.3}],
    }
    text = card(entry)
    assert text.count('from_pretrained("ixi-4x")') == 1, "a name of the manifest pins more than a repository does"
    assert 'from_pretrained("org/new")' in card({**entry, "repo": "org/new", "revision": None})
    assert "Nothing but this test.\n\nLimits: Made up.\n" in text
    assert "- **preset**: small" in text
    assert "- **invented later**: a b 1; 2.346, c" in text
    assert (
        "| spacing mm | psnr | zero fill psnr |\n| --- | --- | --- |\n| 0.9 | 30.12 | 28.50 |\n| 1.2 | 29.00 |  |"
        in text
    )
    assert "## Other inputs" in text
    assert "- **consistency**: off\n" in text
    assert "| rotated \\| by 10 degrees | 25.00 |" in text
    assert "| diameter mm | contrast recovered | bicubic |\n| --- | --- | --- |\n| 2 | 0.51 | 0.3 |" in text


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"meant_for": "T2 brain"}, "For: T2 brain."),
        ({"meant_for": ["T2", "T1"], "spacings_mm": "unknown"}, "For: T2; T1."),
        (
            {"meant_for": "T2", "spacings_mm": [1, 2.5]},
            "For: T2, pixels of 1 to 2.5 mm (0.5 to 1.25 mm after upscaling).",
        ),
        ({"scores": 3}, "| 3 |"),
        ({"trained_on": 7}, "| 7 |"),
        ({"trained_on": "IXI"}, "| IXI |"),
        ({"trained_on": "IXI"}, "Acknowledgements: IXI data set, brain-development.org, CC BY-SA 3.0."),
        ({"trained_on": {"IXI": 500}}, "Acknowledgements: IXI data set, brain-development.org, CC BY-SA 3.0."),
        ({"trained_on": [{"source": ["IXI T2"]}, {}, None]}, "| IXI T2 |  |"),
        ({"by_subject": {"psnr": "high"}}, "| high |"),
        ({"summary": {"a_b": 1}}, "a b 1"),
        ({"limits": [1, 2]}, "Limits: 1; 2"),
        ({"a\nb": "c\udc80"}, "- **a b**: c\\udc80"),
        ({"license": None}, 'license: "other"'),
    ],
)
def test_any_facts_are_written_into_the_card(tmp_path: Path, facts: dict[str, Any], line: str) -> None:
    ZeroFill(scale=2).save_pretrained(tmp_path / "mine", provenance=facts)
    assert line in (tmp_path / "mine" / "README.md").read_text("utf-8").splitlines()
    assert line in describe(tmp_path / "mine").splitlines()
    assert load_checkpoint(tmp_path / "mine").provenance == facts


def test_the_real_manifest_is_whole() -> None:
    known = manifest()
    assert known["format"] == 1
    assert known.keys() == {"format", "weights", "planned"}
    for entry in list_weights():
        checkpoint = load_checkpoint(entry["name"])
        assert verify(entry["name"]) == checkpoint.sha256 == entry["sha256"]
        assert checkpoint.class_name == entry["class"] in MODELS
        assert checkpoint.config["scale"] == entry["scale"]
        model = from_pretrained(entry["name"])
        assert model.grid == entry["grid"]
        assert model.num_parameters() == entry["parameters"]
        assert bool(entry["repo"]) == bool(entry["revision"])
        wanted = (
            "license",
            "limits",
            "trained_on",
            "spacings_mm",
            "degradation",
            "budget",
            "steps",
            "scores",
            "preset",
        )
        assert not [key for key in wanted if not entry[key]]
        assert model.config.items() >= entry["config"].items()  # arguments newer than the file have defaults
        assert "rician" not in entry["degradation"] or "SNR" in entry["limits"]
        assert re.fullmatch(r"[a-z0-9]+-\d+x(-[a-z0-9]+)?" if entry["scale"] > 1 else "[a-z0-9-]+", entry["name"])
    for name, plan in known["planned"].items():
        assert name not in known["weights"]
        assert plan.keys() >= {"recipe", "why"}


def test_listing_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from deformmamba.weights import list_weights, manifest, card\n"
        "[card(entry) for entry in list_weights()], manifest()\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------- fuzz


@pytest.mark.slow
def test_fuzz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first mutants of the run of `python tests/weights/fuzz_checkpoint.py`."""
    tally = fuzz(tmp_path, n=N_MUTANTS)
    with capsys.disabled():
        print(f"\n{tally}")
    assert len(tally.places) >= 25, "the mutants must reach deep into the loader"
    assert tally.loaded > 0, "flips in the tensors' mantissas and in the provenance are not damage that can be seen"


def hostile(value: Any) -> list[Any]:
    """Replacements for `value`: the largest values that a config may contain, and other types."""
    if isinstance(value, bool):
        return [1, "yes"]
    if isinstance(value, int):
        return [65_536, -1, 1.5, True]
    if isinstance(value, list):
        return [[65_536] * len(value), [65_536] * 64, [1] * 64, [], ["a"]]
    return [1e300, -1e300] if isinstance(value, float) else [7, "a" * 4000, ["a"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_config_that_asks_for_far_more_than_the_file_holds(name: str) -> None:
    """For every model, a wrong config is refused or harmless before it takes much memory or time."""
    small = {"scale": 2, "width": 36, "heads": [2, 2], **TINY}
    arguments = inspect.signature(MODELS[name]).parameters
    try:
        model = MODELS[name](**{key: value for key, value in small.items() if key in arguments})
    except MissingExtra as error:
        pytest.skip(str(error))
    tensors = dict(model.state_dict())
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    messages = []
    for key, value in model.config.items():
        for other in hostile(value):
            changed = Checkpoint(name, {**model.config, key: other}, tensors, {}, "", "the file")
            try:
                loaded = MODELS[name].from_checkpoint(changed)
            except WeightsError as error:
                messages.append(str(error))
            else:
                assert isinstance(value, (float, str)) or value is None, f"{key}={other!r}"
                assert loaded.num_parameters() == model.num_parameters()
    assert len(messages) > 4
    assert not any("\n" in message for message in messages)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert time.process_time() - begun < 30


class Tabled(SRModel):
    """A model with a table of a configurable size that is not stored in the file."""

    def __init__(self, *, scale: int = 2, size: int = 8) -> None:
        super().__init__(scale=scale, size=size)
        self.register_buffer("table", torch.ones(size, size), persistent=False)


class Modules(SRModel):
    """A model with a configurable number of layers that have no weight and no buffer."""

    def __init__(self, *, scale: int = 2, n: int = 8) -> None:
        super().__init__(scale=scale, n=n)
        self.layers = torch.nn.ModuleList(torch.nn.ReLU() for _ in range(n))


def test_what_a_file_holds_none_of_is_bounded_too() -> None:
    def load(cls: type[SRModel], **config: Any) -> SRModel:
        return cls.from_checkpoint(Checkpoint(cls.__name__, config, {}, {}, "", "the file"))

    assert load(Tabled, scale=2, size=100).table.sum() == 10_000
    refused(lambda: load(Tabled, scale=2, size=65_536), "asks for 17179869184 bytes of tables beside the weights")
    assert load(Modules, scale=2, n=100).scale == 2
    refused(lambda: load(Modules, scale=2, n=65_536), "needs more than 256 modules, far more than the file contains")
    refused(lambda: load(Tabled, scale=2, size=8.0), "size must be int, not 8.0")
