"""Generating tokens with a model that has Mamba's states: mamba-ssm's `utils.generation`."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from deformmamba.annotations import is_integer, is_number
from deformmamba.errors import InvalidArgument, InvalidType, UnsupportedCall, one_line, shown
from deformmamba.mamba.arguments import check_positive, check_sizes, check_tensors


@dataclass
class InferenceParams:
    """The states of a model while it generates: `key_value_memory_dict` has those of each layer by its `layer_idx`."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Starts a new sequence; the next call of the model replaces the states."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def sample(
    logits: torch.Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """One token (b,) for each row of logits (b, vocabulary).

    Args:
        top_k: 1: the most probable token. Otherwise one of the `top_k` most probable, or of all with 0, at random.
        top_p: only the most probable tokens that together have this probability, if it is between 0 and 1.
        min_p: only tokens of at least this fraction of the largest probability; only used with a `top_k` of 0.
        temperature: logits are divided by it.

    Raises:
        InvalidArgument: top_k, top_p, min_p or temperature outside its range; logits of another shape, or no numbers.
        InvalidType: logits are not floating point.
    """
    _check_sampling(top_k, top_p, min_p, temperature)
    sizes = check_tensors(logits=(logits, "... vocabulary" if top_k == 1 else "b vocabulary"))
    if not sizes["vocabulary"]:
        raise InvalidArgument(f"logits must have at least one token, got shape {tuple(logits.shape)}")
    if top_k == 1:
        return logits.argmax(-1)
    logits = logits / float(temperature)
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    elif 0 < min_p < 1:
        probability = logits.softmax(-1)
        logits = logits.masked_fill(probability < min_p * probability.amax(-1, keepdim=True), -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(-1)
        rare = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        logits = logits.masked_fill(rare.scatter(-1, order, rare), -torch.inf)
    try:
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]
    except RuntimeError as error:
        raise InvalidArgument(
            f"logits have no probabilities to sample from ({one_line(error)}); check the model's weights for NaN"
        ) from error


def _check_sampling(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    fits = is_integer(top_k) and top_k >= 0 and all(is_number(p) and 0 <= p <= 1 for p in (top_p, min_p))
    if not fits or not is_number(temperature) or not 0 < temperature < math.inf:
        raise InvalidArgument(
            "top_k must be a whole number of at least 0, top_p and min_p between 0 and 1 and temperature above 0, got "
            f"{shown(top_k)}, {shown(top_p)}, {shown(min_p)} and {shown(temperature)}"
        )


def _check_prompt(input_ids: torch.Tensor, teacher_outputs: torch.Tensor | None) -> None:
    sizes = check_tensors(input_ids=(input_ids, "int:b l"), teacher_outputs=(teacher_outputs, "?int:b n"))
    if not sizes["l"]:
        raise InvalidArgument(
            f"input_ids must have at least one token in each sequence, got shape {tuple(input_ids.shape)}; begin with "
            "the tokenizer's first token"
        )


def _check_ends(eos_token_id: int | None, vocab_size: int | None, streamer: Any) -> None:
    if eos_token_id is not None and not is_integer(eos_token_id):
        raise InvalidType(f"generate: eos_token_id must be one whole number or None, got {shown(eos_token_id)}")
    if vocab_size is not None:
        check_sizes("generate", vocab_size=vocab_size)
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InvalidType(f"generate: streamer must have the methods put and end, got {shown(streamer)}")


class GenerationMixin:
    """Adds `generate` to a model whose call takes `inference_params`, `position_ids` and `num_last_tokens`."""

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of all layers; models that generate define it."""
        raise UnsupportedCall(f"{type(self).__name__} defines no allocate_inference_cache")

    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        *,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        teacher_outputs: torch.Tensor | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        streamer: Any = None,
    ) -> Any:
        """Continues sequences of equal length.

        Args:
            input_ids: (b, l) tokens.
            max_length: length of the result, with the given tokens; nothing is generated if these are as many or more.
            top_k, top_p, min_p, temperature: as in `sample`.
            return_dict_in_generate: return an object with `sequences` and `scores`, not only the sequences.
            output_scores: keep the logits (b, vocabulary) of each step.
            repetition_penalty: logits of earlier tokens are divided by it if positive, and multiplied if negative.
            eos_token_id: stops after a step in which all sequences get this token, as mamba-ssm does. A sequence that
                gets it before the others is continued; cut it there, or generate one sequence at a time.
            teacher_outputs: (b, n) tokens that are taken instead of sampled ones.
            vocab_size: only the first logits are used.
            cg, enable_timing: accepted, without effect, because there are no CUDA graphs here.
            streamer: its `put` is called with the tokens of each step, then its `end`.

        Returns:
            (b, at most max_length) tokens, or the given ones if they are as many or more; or the object.

        Raises:
            InvalidArgument, InvalidType: a wrong argument, before the first step.
        """
        _check_prompt(input_ids, teacher_outputs)
        _check_sampling(top_k, top_p, min_p, temperature)
        check_sizes("generate", least=0, max_length=max_length)
        check_positive("generate", repetition_penalty=repetition_penalty)
        _check_ends(eos_token_id, vocab_size, streamer)
        tokens, scores = input_ids, []
        params = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
        new = input_ids
        with torch.inference_mode():
            while True:
                if streamer is not None:
                    streamer.put(new.cpu())
                stopped = eos_token_id is not None and params.seqlen_offset and bool((new == eos_token_id).all())
                if stopped or tokens.shape[1] >= max_length:
                    break
                logits = self._next_logits(new, params)[..., :vocab_size]
                params.seqlen_offset += new.shape[1]
                if output_scores:
                    scores.append(logits.clone())
                logits = _penalised(logits, tokens, repetition_penalty)
                if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
                    new = teacher_outputs[:, params.seqlen_offset, None]
                else:
                    new = sample(logits, top_k, top_p, min_p, temperature)[:, None]
                tokens = torch.cat([tokens, new], 1)
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            return tokens
        return SimpleNamespace(sequences=tokens, scores=tuple(scores) if output_scores else None)

    def _next_logits(self, new: torch.Tensor, params: InferenceParams) -> torch.Tensor:
        positions = torch.full_like(new, params.seqlen_offset) if params.seqlen_offset else None
        output = self(new, position_ids=positions, inference_params=params, num_last_tokens=1)  # type: ignore[operator]
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _penalised(logits: torch.Tensor, earlier: torch.Tensor, penalty: float) -> torch.Tensor:
    if penalty == 1:
        return logits
    earlier = earlier.long()
    score = logits.gather(1, earlier)
    return logits.scatter(1, earlier, torch.where(score < 0, score * penalty, score / penalty))
