"""Mamba's language model: mamba-ssm's `models.mixer_seq_simple`, with the same arguments and state_dict."""

import inspect
import json
import math
import os
from collections import namedtuple
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from deformmamba.annotations import check_types
from deformmamba.atomic import renamed
from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, did_you_mean, one_line, shown
from deformmamba.mamba.arguments import check_not_negative, check_parameters, check_sizes, check_tensors, is_symbol
from deformmamba.mamba.blocks import Block, GatedMLP, add_and_normalise
from deformmamba.mamba.generation import GenerationMixin
from deformmamba.mamba.mamba2 import Mamba2
from deformmamba.mamba.mamba_simple import Mamba
from deformmamba.mamba.norm import RMSNorm
from deformmamba.mamba.pretrained import load_config_hf, load_state_dict_hf
from deformmamba.tensors import has_values
from deformmamba.weights import WeightsError

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
        InvalidArgument, InvalidType: a size below its least value, another "layer" than "Mamba1" or "Mamba2", or an
            argument that this layer does not have.
        UnsupportedCall: an attention layer.
    """
    where = {"device": device, "dtype": dtype}
    check_sizes("create_block", d_model=d_model)
    check_sizes("create_block", least=0, d_intermediate=d_intermediate)
    check_not_negative("create_block", norm_epsilon=norm_epsilon)
    check_parameters("create_block", device, dtype)
    if not isinstance(attn_layer_idx, list | tuple | NoneType):
        raise InvalidType(f"create_block: attn_layer_idx must be a list or None, got {shown(attn_layer_idx)}")
    if layer_idx in (attn_layer_idx or []):
        raise UnsupportedCall(f"attn_layer_idx {attn_layer_idx}: attention layers are not supported; leave it empty")
    arguments = _mixer_arguments(ssm_cfg)
    layer = arguments.pop("layer", "Mamba1")
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


def _mixer_arguments(ssm_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of `ssm_cfg`, checked: a known "layer" and arguments of that block that `create_block` does not set."""
    arguments = _dictionary("ssm_cfg", ssm_cfg)
    layer = arguments.get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in _MIXERS:
        raise InvalidArgument(f'ssm_cfg has the layer {shown(layer)}; it must be "Mamba1" or "Mamba2"')
    own = {"d_model", "layer_idx", "device", "dtype"}
    _check_keys("ssm_cfg", arguments, {"layer", *inspect.signature(_MIXERS[layer]).parameters} - own)
    return arguments


def _dictionary(name: str, given: Any) -> dict[str, Any]:
    """A copy of a dictionary or, for None, an empty one."""
    if given is not None and not isinstance(given, dict):
        raise InvalidType(f"{name} must be a dictionary or None, got {shown(given)}")
    return dict(given or {})


def _check_keys(name: str, given: dict[str, Any], allowed: Collection[str]) -> None:
    for key in given:
        if key not in allowed:
            hint = did_you_mean(key, allowed) if isinstance(key, str) else ""
            raise InvalidArgument(f"{name} has {shown(key)}{hint}; allowed: {', '.join(sorted(allowed))}")


def _initial(initializer_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """The checked arguments of `init_weights` that a user may give."""
    arguments = _dictionary("initializer_cfg", initializer_cfg)
    _check_keys("initializer_cfg", arguments, ("initializer_range", "rescale_prenorm_residual"))
    check_not_negative("initializer_cfg", initializer_range=arguments.get("initializer_range", 0))
    return arguments


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
        check_sizes("MixerModel", d_model=d_model, vocab_size=vocab_size)
        check_sizes("MixerModel", least=0, n_layer=n_layer, d_intermediate=d_intermediate)
        check_parameters("MixerModel", device, dtype)
        initial = _initial(initializer_cfg)
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
        self.apply(partial(init_weights, n_layer=n_layer, **initial, n_residuals_per_layer=residuals))

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
        self._check_tokens(input_ids)
        x, total = self.embedding(input_ids), None
        for layer in self.layers:
            x, total = layer(x, total, inference_params=inference_params, **mixer_kwargs)
        return add_and_normalise(self.norm_f, x, total, self.fused_add_norm, self.residual_in_fp32)[0]

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        """Refuses other tokens than (b, l) numbers of the vocabulary. The numbers are read on a CPU only."""
        if is_symbol(tokens):
            return
        check_tensors(input_ids=(tokens, "int:b l"))
        if tokens.dtype not in (torch.int32, torch.int64):
            raise InvalidType(f"input_ids must be torch.int64 or torch.int32, got {tokens.dtype}; use .long()")
        if type(self.embedding) is not nn.Embedding:
            return
        weight = self.embedding.weight
        if tokens.device != weight.device and not weight.is_meta:
            raise InvalidArgument(
                f"input_ids is on {tokens.device}, and the weights are on {weight.device}; move one of the two"
            )
        if tokens.device.type == "cpu" and has_values(tokens) and tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= len(weight):
                raise InvalidArgument(
                    f"input_ids has the token {low if low < 0 else high}; the vocabulary has 0 to {len(weight) - 1}"
                )


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
        _check_config(config)
        initial = _initial(initializer_cfg)
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(init_weights, n_layer=config.n_layer, **initial))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Gives the output layer the weight of the embedding, if the config has `tie_embeddings`."""
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
        if not torch.compiler.is_compiling():
            check_sizes("MambaLMHeadModel", least=0, num_last_tokens=num_last_tokens)
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(x[:, -num_last_tokens:] if num_last_tokens else x))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> "MambaLMHeadModel":
        """A model from a folder or a name on the Hugging Face Hub; `kwargs` are those of the class.

        Raises:
            WeightsError: there is no such model, or its files cannot be read or do not fit together.
        """
        given, name = load_config_hf(pretrained_model_name), shown(os.fspath(pretrained_model_name))
        known = [setting.name for setting in fields(MambaConfig)]
        for key in given:
            if key not in known:
                raise WeightsError(
                    f"the config.json of {name} has {shown(key)}"
                    f"{did_you_mean(key, known)}; allowed: {', '.join(known)} (transformers loads models of another "
                    "format)"
                )
        model = cls(MambaConfig(**given), device=device, dtype=dtype, **kwargs)
        tensors = load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise WeightsError(f"the tensors of {name} do not fit its config.json: {one_line(error)}") from error
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `pytorch_model.bin` and `config.json` to a folder, which is made if it is missing.

        Raises:
            WeightsError: the folder cannot be written.
        """
        check_types(MambaLMHeadModel.save_pretrained, locals())
        folder = Path(os.path.expanduser(save_directory))
        settings = {setting.name: getattr(self.config, setting.name) for setting in fields(MambaConfig)}
        try:
            text = json.dumps(settings, indent=4)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidType(f"the config cannot be written as JSON ({one_line(error)}); use plain values") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with renamed(folder / "pytorch_model.bin") as path:
                torch.save(self.state_dict(), path)
            with renamed(folder / "config.json") as path:
                path.write_text(text, "utf-8")
        except (OSError, RuntimeError, ValueError) as error:  # PyTorch's writer raises RuntimeError, a NUL ValueError
            reason = getattr(error, "strerror", None) or one_line(error)
            raise WeightsError(f"cannot write {folder}: {reason}; choose a place that can be written") from error


def _check_config(config: Any) -> None:
    missing = [setting.name for setting in fields(MambaConfig) if not hasattr(config, setting.name)]
    if missing:
        raise InvalidType(f"MambaLMHeadModel: config must be a MambaConfig, got {shown(config)}, without {missing[0]}")
    sizes = {"vocab_size": config.vocab_size, "pad_vocab_size_multiple": config.pad_vocab_size_multiple}
    check_sizes("MambaConfig", d_model=config.d_model, **sizes)
