"""Mamba's language model: mamba-ssm's `models.mixer_seq_simple`, with the same arguments and state_dict."""

import json
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deformmamba.atomic import renamed
from deformmamba.errors import InvalidArgument, UnsupportedCall, shown
from deformmamba.mamba.blocks import Block, GatedMLP, add_and_normalise
from deformmamba.mamba.generation import GenerationMixin
from deformmamba.mamba.modules import Mamba, Mamba2
from deformmamba.mamba.norm import RMSNorm

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    """The arguments of `MambaLMHeadModel`.

    d_model channels, n_layer blocks and a vocabulary of vocab_size, rounded up to a multiple of
    pad_vocab_size_multiple. d_intermediate: hidden channels of the MLPs; 0: without MLPs. ssm_cfg: "layer" ("Mamba1",
    the default, or "Mamba2") and the arguments of that block. attn_layer_idx, attn_cfg: must be empty, because
    attention is not supported. rms_norm, residual_in_fp32, fused_add_norm: as in `Block`. tie_embeddings: the output
    layer has the weight of the embedding.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Block:
    """A `Block` with `Mamba` or `Mamba2`; the arguments are those of `MambaConfig`.

    Raises:
        InvalidArgument: another "layer" than "Mamba1" or "Mamba2".
        UnsupportedCall: an attention layer.
    """
    where = {"device": device, "dtype": dtype}
    if layer_idx in (attn_layer_idx or []):
        raise UnsupportedCall(f"attn_layer_idx {attn_layer_idx}: attention layers are not supported; leave it empty")
    arguments = dict(ssm_cfg or {})
    layer = arguments.pop("layer", "Mamba1")
    if layer not in _MIXERS:
        raise InvalidArgument(f'ssm_cfg has the layer {shown(layer)}; it must be "Mamba1" or "Mamba2"')
    mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **where)
    block = Block(
        d_model,
        partial(_MIXERS[layer], layer_idx=layer_idx, **arguments, **where),
        mlp if d_intermediate else nn.Identity,
        partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **where),
        fused_add_norm,
        residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """mamba-ssm's `_init_weights`, for `apply`: biases 0, embeddings normal, outputs of blocks smaller with depth."""
    if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, weight in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                with torch.no_grad():
                    weight.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm; the arguments are those of `MambaConfig`."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int = 50277,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **where)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, i, **where,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **where)
        residuals = 2 if d_intermediate else 1
        self.apply(partial(init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=residuals))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of each layer, zero."""
        make = {"dtype": dtype, **kwargs}
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, **make)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: torch.Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> torch.Tensor:
        """(b, l) tokens to (b, l, d_model)."""
        x, total = self.embedding(input_ids), None
        for layer in self.layers:
            x, total = layer(x, total, inference_params=inference_params, **mixer_kwargs)
        return add_and_normalise(self.norm_f, x, total, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A `MixerModel` with an output layer: logits for the next token.

    Args:
        config: see `MambaConfig`.
        initializer_cfg: arguments of `init_weights`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Gives the output layer the weight of the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of each layer, zero."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """(b, l) tokens to an output with `logits` (b, l, vocabulary), or of the last `num_last_tokens` only.

        `position_ids` has no effect."""
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(x[:, -num_last_tokens:] if num_last_tokens else x))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> "MambaLMHeadModel":
        """A model from a folder or a name on the Hugging Face Hub; `kwargs` are those of the class."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Writes `pytorch_model.bin` and `config.json` to a folder, which is made if it is missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with renamed(folder / "pytorch_model.bin") as path:
            torch.save(self.state_dict(), path)
        with renamed(folder / "config.json") as path:
            path.write_text(json.dumps(asdict(self.config), indent=4), "utf-8")


def _file(model_name: str, name: str) -> Path:
    """A file of a folder, or of a repository on the Hugging Face Hub, which is downloaded."""
    if Path(model_name).is_dir():
        return Path(model_name) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_name, name))


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The contents of `config.json` of a folder or of a name on the Hugging Face Hub."""
    config: dict[str, Any] = json.loads(_file(model_name, "config.json").read_text("utf-8"))
    return config


def load_state_dict_hf(
    model_name: str, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of `pytorch_model.bin` of a folder or of a name on the Hugging Face Hub."""
    tensors = torch.load(_file(model_name, "pytorch_model.bin"), map_location=device or "cpu", weights_only=True)
    return tensors if dtype is None else {name: value.to(dtype) for name, value in tensors.items()}
