"""Residual blocks, the language model, and generating tokens."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn

from deformmamba.errors import DeformMambaError
from deformmamba.mamba import Mamba, Mamba2, RMSNorm
from deformmamba.mamba.blocks import Block, BlockWithoutMLP, GatedMLP
from deformmamba.mamba.generation import GenerationMixin, InferenceParams, sample
from deformmamba.mamba.language import MambaConfig, MambaLMHeadModel, MixerModel, create_block


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(layer: str = "Mamba1", **kwargs: Any) -> MambaLMHeadModel:
    ssm = {"d_state": 4, **({"layer": layer, "headdim": 4} if layer == "Mamba2" else {})}
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=13, ssm_cfg=ssm, **kwargs)
    return MambaLMHeadModel(config).eval()


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
def test_a_fused_block_is_the_plain_one(norm: Any) -> None:
    mlp = partial(GatedMLP, multiple_of=4)
    block = Block(8, Mamba, mlp, norm, fused_add_norm=True)
    x, before = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    total = x + before
    mixed = block.mixer(block.norm(total))
    second = total + mixed
    gate = block.mlp.fc1(block.norm2(second))  # type: ignore[union-attr, operator]
    expected = block.mlp.fc2(gate[..., :24] * F.silu(gate[..., 24:]))  # type: ignore[union-attr, operator]
    for fused in (True, False):
        block.fused_add_norm = fused
        assert_close(list(block(x, before)), [expected, second])
    assert block.mlp.fc1.out_features == 48  # type: ignore[union-attr]
    block.residual_in_fp32 = True
    assert [block.bfloat16()(x.bfloat16())[1].dtype for block.fused_add_norm in (True, False)] == [torch.float32] * 2


def test_a_block_of_mamba_ssm_1_has_its_arguments() -> None:
    block = BlockWithoutMLP(8, Mamba, RMSNorm, True, True)
    del block.mlp  # its pickled blocks have none
    y, total = block(torch.ones(1, 3, 8))
    assert y.shape == total.shape == (1, 3, 8)
    assert next(iter(block.state_dict())) == "norm.weight"
    assert block.allocate_inference_cache(2, 9)[1].shape == (2, 16, 16)


def test_the_language_model_has_mamba_ssms_parameters() -> None:
    model = tiny(d_intermediate=8)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.lm_head.weight.shape == (16, 8)  # 13, rounded up to a multiple of 8
    block = {name for name in model.state_dict() if name.startswith("backbone.layers.1.")}
    mixer = {f"mixer.{name}" for name in Mamba(8).state_dict()}
    others = {"norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert block == {f"backbone.layers.1.{name}" for name in mixer | others}
    assert set(model.state_dict()) - {name for name in model.state_dict() if ".layers." in name} == {
        "backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"
    }  # fmt: skip
    assert model.backbone.layers[0].mixer.dt_proj.bias.abs().min() > 0.1  # type: ignore[union-attr, operator]
    assert isinstance(tiny("Mamba2").backbone.layers[1].mixer, Mamba2)
    assert isinstance(MixerModel(8, 1, 0, 16).norm_f, nn.LayerNorm)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_generating_step_by_step_is_the_whole_sequence(layer: str) -> None:
    model = tiny(layer)
    prompt = torch.randint(13, (2, 3))
    found = model.generate(prompt, 9, return_dict_in_generate=True, output_scores=True, cg=True)
    assert found.sequences.shape == (2, 9)
    with torch.no_grad():
        logits = model(found.sequences).logits
        assert_close(torch.stack(found.scores, 1), logits[:, 2:-1])
        assert_close(model(found.sequences, num_last_tokens=1).logits, logits[:, -1:])
    assert torch.equal(found.sequences[:, 3:], logits[:, 2:-1].argmax(-1))
    assert set(model.allocate_inference_cache(2, 9)) == {0, 1}


@pytest.mark.parametrize("longest", [0, 2, 3])
def test_a_prompt_that_is_long_enough_is_not_continued(longest: int) -> None:
    prompt = torch.randint(13, (2, 3))
    found = tiny().generate(prompt, longest, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, prompt)
    assert found.scores == ()
    assert tiny().generate(prompt, 4).shape == (2, 4)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_states_of_another_number_of_sequences_are_replaced(layer: str) -> None:
    model, params = tiny(layer), InferenceParams(9, 1)
    first, second = torch.randint(13, (1, 3)), torch.randint(13, (2, 3))
    with torch.no_grad():
        model(first, inference_params=params)
        params.reset(9, 2)
        model(second, inference_params=params)
        params.seqlen_offset = 3
        step = model(second[:, :1], inference_params=params).logits
        assert_close(step[:, 0], model(torch.cat([second, second[:, :1]], 1)).logits[:, -1])
        with pytest.raises(
            DeformMambaError, match="has the states of 2 sequences, but the input has 1; call its reset"
        ):
            model(first[:, :1], inference_params=params)


def test_generating_ends_follows_a_teacher_and_streams() -> None:
    model = tiny()
    prompt = torch.randint(13, (1, 2))
    free = model.generate(prompt, 8)
    seen: list[int] = []
    streamer = SimpleNamespace(put=lambda new: seen.extend(new.flatten().tolist()), end=lambda: seen.append(-1))
    stopped = model.generate(prompt, 8, eos_token_id=int(free[0, 2]), streamer=streamer)
    assert torch.equal(stopped, free[:, :3])
    assert seen == [*free[0, :3].tolist(), -1]
    teacher = torch.randint(13, (1, 8))
    assert torch.equal(model.generate(prompt, 8, teacher_outputs=teacher)[:, 2:], teacher[:, 2:])
    others = model.generate(prompt, 8, repetition_penalty=1e6, vocab_size=13)
    assert len(set(others[0].tolist())) == 8 - (2 - len(set(prompt[0].tolist())))
    with pytest.raises(DeformMambaError, match="Alone defines no allocate_inference_cache"):
        type("Alone", (GenerationMixin,), {})().allocate_inference_cache(1, 1)


def test_sampling_keeps_the_tokens_that_it_should() -> None:
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(500, 4)
    for arguments, kept in (
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_k": 0, "top_p": 0.6}, {0, 1}),
        ({"top_k": 0, "min_p": 0.45}, {0, 1, 2}),
        ({"top_k": 1}, {0}),
        ({"top_k": 0, "temperature": 0.01}, {0}),
    ):
        assert set(sample(probability.log(), **arguments).tolist()) == kept  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperature above 0, got 1, 0\.0, 0\.0 and 0"):
        sample(probability, temperature=0)
    params = InferenceParams(5, 1, seqlen_offset=3, lengths_per_sample=torch.ones(1))
    params.reset(7, 2)
    assert (params.max_seqlen, params.seqlen_offset, int(params.lengths_per_sample)) == (7, 0, 0)  # type: ignore[arg-type]


def test_a_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny("Mamba2", tie_embeddings=False)
    model.save_pretrained(str(tmp_path / "new"))
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "new"), dtype=torch.float64)
    assert again.config == model.config
    tokens = torch.randint(13, (1, 5))
    assert_close(again(tokens).logits.float(), model(tokens).logits)


def test_what_is_not_supported_is_named() -> None:
    with pytest.raises(DeformMambaError, match="attention layers are not supported; leave it empty"):
        create_block(8, attn_layer_idx=[0], layer_idx=0)
    with pytest.raises(ValueError, match="ssm_cfg has the layer 'Mamba3'; it must be"):
        create_block(8, ssm_cfg={"layer": "Mamba3"})
    with pytest.raises(ValueError, match=r"norm_cls makes Identity; with fused_add_norm it must make nn\.LayerNorm or"):
        Block(8, Mamba, norm_cls=nn.Identity, fused_add_norm=True)
