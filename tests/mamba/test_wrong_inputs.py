"""Wrong inputs of the blocks, the language model, its files and `generate` raise one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refused
from tolerances import assert_close
from torch import nn

import deformmamba.mamba as m
from deformmamba.mamba.blocks import Block, GatedMLP
from deformmamba.mamba.generation import InferenceParams, sample
from deformmamba.mamba.language import MambaConfig, MambaLMHeadModel, MixerModel, create_block
from deformmamba.mamba.pretrained import load_config_hf, load_state_dict_hf
from deformmamba.weights import WeightsError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny(**kwargs: Any) -> MambaLMHeadModel:
    config = {"d_model": 8, "n_layer": 1, "vocab_size": 13, "ssm_cfg": {"d_state": 4}} | kwargs
    return MambaLMHeadModel(MambaConfig(**config)).eval()


MODULES: dict[str, Callable[..., nn.Module]] = {
    "Mamba": lambda **where: m.Mamba(16, layer_idx=0, **where),
    "Mamba2": lambda **where: m.Mamba2(16, headdim=8, layer_idx=0, **where),
    "GatedMLP": lambda **where: GatedMLP(16, multiple_of=8, **where),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_input_of_a_block(name: str) -> None:
    block, x = MODULES[name](), torch.rand(2, 8, 16)
    where = f"^{name}: "
    refused(lambda: block(x[..., :15]), where + r"\w+ must have shape \(.*16\), got \(2, 8, 15\)")
    refused(lambda: block(None), where + r"\w+ must be a tensor, \(.*16\), got None")
    with torch.device("cpu"):  # PyTorch then asks each call whether the device applies
        refused(lambda: block(None), where + r"\w+ must be a tensor")
    refused(lambda: block(x.long()), where + r"\w+ must be floating point, got torch.int64; convert it")
    refused(lambda: block(x.bfloat16()), where + r"\w+ is torch.bfloat16, and its weights are torch.float32; convert")
    refused(lambda: block(x.to("meta")), where + r"\w+ is on meta, and its weights are on cpu; move one")
    refused(lambda: block(x.to_sparse()), where + r"\w+ must be a dense tensor, got torch.sparse_coo")
    assert MODULES[name](device="meta")(x.to("meta")).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x.bfloat16()).shape == x.shape
    for device, dtype in (("no such", None), (None, "float32"), (None, torch.int32)):
        refused(lambda: MODULES[name](device=device, dtype=dtype), where + "d(evice|type) ")  # noqa: B023
    if name != "GatedMLP":
        refused(lambda: block(x[0]), where + r"\w+ must have shape \(b, l, 16\), got \(8, 16\); give one sequence as")
        states = block.allocate_inference_cache(2, 9)  # type: ignore[operator]
        for wrong in (x[:, 0], x[:, :1, :15], x[:, :1].bfloat16(), None):
            refused(lambda: block.step(wrong, *states), rf"^{name}\.step: hidden_states")  # type: ignore[operator]  # noqa: B023
        refused(lambda: block.step(x, *states), "takes one element at a time")  # type: ignore[operator]
        refused(lambda: block.step(x[:, :1], None, states[1]), "conv_state must be a tensor")  # type: ignore[operator]
        for wrong in (2.5, -1, "2"):
            refused(lambda: block.allocate_inference_cache(wrong, 9), "batch_size must be a whole number of 0")  # type: ignore[operator]  # noqa: B023


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_states_that_are_not_those_of_the_block(name: str) -> None:
    block, x = MODULES[name](), torch.rand(2, 8, 16)
    for params in ({}, SimpleNamespace(key_value_memory_dict=None, seqlen_offset=0)):
        refused(lambda: block(x, inference_params=params), f"^{name}: inference_params must have key_value")  # noqa: B023
    kept = InferenceParams(9, 2, key_value_memory_dict={0: None})
    refused(lambda: block(x, inference_params=kept), r"for layer 0; it must be \(conv_state, ssm_state\)")
    kept = InferenceParams(9, 2, key_value_memory_dict={0: (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))})
    refused(lambda: block(x, inference_params=kept), "conv_state must have shape")


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_a_scan_in_two_directions_has_no_step(kind: str) -> None:
    block = m.Mamba(16, bimamba_type=kind, layer_idx=0)
    states = block.allocate_inference_cache(1, 9)
    refused(
        lambda: block.step(torch.rand(1, 1, 16), *states), "bidirectional scan has no state .*; call the block with"
    )
    refused(lambda: block(torch.rand(1, 1, 16), InferenceParams(9, 1, 1)), "bidirectional scan has no state")


def test_rows_of_mamba2_equal_sequences() -> None:
    block, x = m.Mamba2(16, headdim=8, layer_idx=0), torch.rand(2, 4, 16)
    rows = x.flatten(0, 1)
    assert_close(block(rows, seqlen=4), block(x).flatten(0, 1))
    whole, flat = InferenceParams(9, 2), InferenceParams(9, 2)
    with torch.no_grad():
        assert_close(block(rows, seqlen=4, inference_params=flat), block(x, inference_params=whole).flatten(0, 1))
        whole.seqlen_offset = flat.seqlen_offset = 4
        step = torch.rand(2, 1, 16)
        assert_close(block(step[:, 0], seqlen=1, inference_params=flat), block(step, inference_params=whole)[:, 0])
    refused(lambda: block(rows, seqlen=3), r"^Mamba2: u has 8 rows \(b \* l\), which seqlen 3 does not divide")
    refused(lambda: block(x, seqlen=4), r"^Mamba2: u must have shape \(b\*l, 16\)")
    for wrong in (0, "4", 2.0):
        refused(lambda: block(rows, seqlen=wrong), "^Mamba2: seqlen must be a whole number of 1")  # type: ignore[arg-type]  # noqa: B023
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert_close(compiled(rows, seqlen=4), block(rows, seqlen=4))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: m.Mamba2(16, headdim=8, A_init_range=None), "A_init_range must be two numbers"),  # type: ignore[arg-type]
        (lambda: m.Mamba2(16, headdim=8, A_init_range=(1, float("inf"))), "A_init_range .* positive and finite"),
        (lambda: m.Mamba2(16, headdim=8, dt_limit=None), "dt_limit must be two numbers"),  # type: ignore[arg-type]
        (lambda: m.Mamba2(16, headdim=8, dt_limit="12"), "dt_limit must be two numbers"),  # type: ignore[arg-type]
        (lambda: m.Mamba(16, dt_init_floor=None), "dt_init_floor must be a finite number"),  # type: ignore[arg-type]
        (lambda: m.Mamba(16, dt_scale="1"), "dt_scale must be a finite number"),  # type: ignore[arg-type]
        (lambda: m.Mamba(16, init_layer_scale="x"), "init_layer_scale must be a number"),  # type: ignore[arg-type]
        (lambda: GatedMLP(8, multiple_of=0), "^GatedMLP: multiple_of must be a whole number of 1"),
        (lambda: GatedMLP(8, hidden_features="4"), "^GatedMLP: hidden_features"),  # type: ignore[arg-type]
        (lambda: GatedMLP(8, activation=None), "^GatedMLP: activation must be"),  # type: ignore[arg-type]
        (lambda: Block(8, None), "^Block: mixer_cls must be a class or a function"),  # type: ignore[arg-type]
        (lambda: Block(8, m.Mamba, norm_cls=nn.Identity), "makes Identity, which has no weight"),
        (lambda: Block(8, nn.Identity).allocate_inference_cache(1, 1), "Identity defines no allocate"),
        (lambda: Block(8, m.Mamba)(torch.rand(2, 5, 7)), "x must have shape .* with d = 8"),
        (lambda: Block(8, m.Mamba)(torch.rand(2, 5, 8), torch.rand(5, 8)), "residual must have the shape of x"),
        (lambda: Block(8, m.Mamba)(torch.rand(2, 5, 8, device="meta")), "weight is on cpu, but x is on meta"),
        (lambda: m.RMSNorm("8"), "^RMSNorm: hidden_size"),  # type: ignore[arg-type]
        (lambda: m.RMSNormGated(8, eps=None), "eps must be a number"),  # type: ignore[arg-type]
        (lambda: m.RMSNorm(8, dropout_p="x"), "dropout_p must be between"),  # type: ignore[arg-type]
        (lambda: m.rms_norm_fn(torch.ones(2, 4).long(), torch.ones(4), None, dropout_p=0.5), "x must be floating"),
        (lambda: m.SS3D(4, device="no such"), "^SS3D: device 'no such' is not available here"),
        (lambda: m.SS3D(4)(torch.zeros(1, 4, 2, 3, 5, device="meta")), "^SS3D: given a volume on meta"),
        (lambda: MixerModel(8, 1, vocab_size=0), "^MixerModel: vocab_size"),
        (lambda: create_block(8, ssm_cfg={"d_statee": 3}), r"ssm_cfg has 'd_statee' \(did you mean "),
        (lambda: create_block(8, ssm_cfg={"device": "cpu"}), "ssm_cfg has 'device'"),
        (lambda: create_block(8, ssm_cfg=3), "ssm_cfg must be a dictionary"),  # type: ignore[arg-type]
        (lambda: create_block(8, attn_layer_idx=3), "attn_layer_idx must be a list"),  # type: ignore[arg-type]
        (lambda: tiny(pad_vocab_size_multiple=0), "^MambaConfig: pad_vocab_size_multiple"),
        (lambda: tiny(n_layer="2"), "^MixerModel: n_layer"),
        (lambda: MambaLMHeadModel(3), "config must be a MambaConfig"),  # type: ignore[arg-type]
        (lambda: MambaLMHeadModel(MambaConfig(d_model=8), {"n_layer": 1}), "initializer_cfg has 'n_layer'"),
    ],
)  # fmt: skip
def test_arguments_of_blocks_and_models(make: Callable[[], Any], expected: str) -> None:
    refused(make, expected)


def test_arguments_of_functions() -> None:
    x, weight, bias = torch.randn(1, 2, 5), torch.randn(2, 3), torch.randn(2)
    refused(lambda: m.causal_conv1d_fn(x.to_sparse(), weight), "x must be a dense tensor")
    refused(lambda: m.causal_conv1d_update(x, torch.zeros(1, 2, 1), weight), "needs at least width - 1")
    refused(lambda: m.causal_conv1d_update_ref(x, torch.zeros(1, 2, 1), weight), "needs at least width - 1")
    refused(lambda: m.causal_conv1d_varlen_states_ref(x[0].T, torch.tensor([0, 9]), 2), "must start at 0")
    wide = m.causal_conv1d_ref(x.double(), weight.double(), bias.double())
    assert_close(m.causal_conv1d_ref(x, weight.double(), bias), wide.float())
    state, A, B = torch.zeros(1, 2, 3), -torch.rand(2, 3), torch.randn(1, 3)
    for name, given in (
        ("x", (torch.tensor(1.0), B)),
        ("B", (bias[None], torch.tensor(1.0))),
        ("B", (bias[None], B[0])),
    ):
        refused(lambda: m.selective_state_update(state, given[0], bias[None], A, given[1], B), f"^{name} must")  # noqa: B023
    mixed = m.selective_state_update(state.clone(), bias[None], bias[None], A.double(), B, B)
    assert_close(mixed, m.selective_state_update(state.clone(), bias[None], bias[None], A, B, B))


def test_tokens() -> None:
    model, ids = tiny(), torch.randint(13, (2, 3))
    refused(lambda: model(ids[0]), r"input_ids must have shape \(b, l\)")
    refused(lambda: model(ids.float()), "input_ids must have whole numbers")
    refused(lambda: model(ids.short()), "input_ids must be torch.int64 or torch.int32, got torch.int16")
    refused(lambda: model(ids + 16), "input_ids has the token 1[6-9]|2[0-8]; the vocabulary has 0 to 15")
    refused(lambda: model(ids - 14), "input_ids has the token -")
    refused(lambda: model(ids.to("meta")), "input_ids is on meta")
    refused(lambda: model(ids, num_last_tokens=-1), "num_last_tokens")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids must have shape \(b, l\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "at least one token in each sequence"),
        ({"input_ids": None}, "input_ids must be a tensor"),
        ({"max_length": "6"}, "generate: max_length must be a whole number of 0 or more, got '6'"),
        ({"repetition_penalty": 0}, "generate: repetition_penalty must be a finite number above 0, got 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"temperature": None}, "temperature above 0"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be one whole number"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of 1"),
        ({"teacher_outputs": torch.zeros(1, 9, dtype=torch.long)}, "teacher_outputs must have shape"),
        ({"streamer": 3}, "streamer must have the methods put and end"),
    ],
    ids=str,
)
def test_arguments_of_generate(given: dict[str, Any], expected: str) -> None:
    ids = torch.randint(13, (2, 3))
    refused(lambda: tiny().generate(**({"input_ids": ids, "max_length": 6} | given)), expected)


def test_arguments_of_sample() -> None:
    logits = torch.rand(2, 5)
    refused(lambda: sample(logits, top_k=1.5), "top_k must be a whole number")  # type: ignore[arg-type]
    refused(lambda: sample(logits[0], top_k=2), r"logits must have shape \(b, vocabulary\)")
    refused(lambda: sample(logits[:, :0]), "at least one token")
    refused(lambda: sample(logits * torch.nan, top_k=0), "logits have no probabilities to sample from")
    assert sample(logits[None]).shape == (1, 2)
    ids = torch.randint(13, (2, 3))
    model = tiny()
    wide, narrow = (model.generate(prompt, 6, repetition_penalty=2.0) for prompt in (ids, ids.int()))
    assert torch.equal(wide, narrow)


def test_generation_stops_when_all_sequences_end_in_one_step() -> None:
    """As in mamba-ssm: a sequence that ends before the others is continued."""
    model, prompt = tiny(), torch.randint(13, (2, 2))
    teacher = torch.tensor([[0, 0, 7, 1, 7, 3], [0, 0, 2, 7, 7, 3]])
    found = model.generate(prompt, 6, teacher_outputs=teacher, eos_token_id=7)
    assert torch.equal(found[:, 2:], teacher[:, 2:5])


def test_files_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    load = MambaLMHeadModel.from_pretrained
    refused(
        lambda: load("/no/such/dir"), "there is no folder '/no/such/dir'; check the path, or give a name", WeightsError
    )
    refused(
        lambda: load("org/name"),
        r"cannot fetch config.json of org/name from the Hub \(OSError: no network\)",
        WeightsError,
    )
    refused(lambda: load(None), "load_config_hf: model_name must be a text or .* path, not None")  # type: ignore[arg-type]
    refused(lambda: load(tmp_path), "has no config.json; give a folder that save_pretrained wrote", WeightsError)
    model = tiny()
    model.save_pretrained("~/kept")
    folder = tmp_path / "kept"
    assert_close(load("~/kept").lm_head.weight, model.lm_head.weight)
    refused(lambda: load(folder, device="no such"), "device 'no such' is not available")
    refused(lambda: load_state_dict_hf(folder, dtype="float16"), "load_state_dict_hf: dtype must be")  # type: ignore[arg-type]
    refused(lambda: load(folder / "config.json"), "there is no folder", WeightsError)
    refused(lambda: model.save_pretrained(folder / "config.json"), "cannot write .*; choose a place", WeightsError)
    refused(lambda: model.save_pretrained(None), "save_directory must be a text or .* path")  # type: ignore[arg-type]
    good = json.loads((folder / "config.json").read_text("utf-8"))
    for text, expected in (
        ("{", "cannot read .*config.json as JSON"),
        ("[]", "must hold a JSON object"),
        (json.dumps(good | {"d_modell": 8}), r"has 'd_modell' \(did you mean 'd_model'\?\); allowed: d_model, d_"),
        (json.dumps(good | {"d_model": 16}), "do not fit its config.json: "),
    ):
        (folder / "config.json").write_text(text, "utf-8")
        refused(lambda: load(folder), expected, WeightsError)
    (folder / "config.json").write_text(json.dumps(good), "utf-8")
    assert load_config_hf(folder) == good
    torch.save([1], folder / "pytorch_model.bin")
    refused(lambda: load(folder), "must hold a dictionary of tensors", WeightsError)
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    refused(lambda: load(folder), r"cannot read .*pytorch_model.bin \(", WeightsError)
    (folder / "pytorch_model.bin").unlink()
    refused(lambda: load(folder), "has no pytorch_model.bin", WeightsError)
    model.config.ssm_cfg["dtype"] = torch.float32
    refused(lambda: model.save_pretrained(folder), "config cannot be written as JSON")
