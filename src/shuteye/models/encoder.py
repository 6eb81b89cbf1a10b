"""Models that read a whole text, or a pair, at once, to embed, score or classify it: examined, bound, run in batches.

The computation is transformers' own; inputs are padded to the longest, and the padding is masked. How token states
become one embedding is said by sentence-transformers' files.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn
from torch.nn.functional import normalize

from shuteye.errors import UnsupportedModel
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.model_info import PoolingInfo
from shuteye.models.binding import BoundModel, CommonSpec, read_image_config, slot_names_of
from shuteye.models.formats.checkpoint import read_tokenizer_facts
from shuteye.models.module_binding import bind_module
from shuteye.models.modules import build_module, model_class, quiet
from shuteye.models.sentence_files import (
    Activation,
    Pooling,
    SentenceFiles,
    read_activation,
    read_prompts,
    read_sentence_files,
)
from shuteye.models.sources import ModelSource
from shuteye.models.tensors import dtype_name, torch_dtype

if TYPE_CHECKING:
    from shuteye.tasks.pool.requests import PoolInput

logger = logging.getLogger(__name__)

_UNKNOWN_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class EncoderSpec(CommonSpec):
    """What an image's metadata says of a model that embeds, scores or classifies.

    Attributes:
        size: numbers per input.
        pooling: how token states become an embedding; None for logits.
        normalize: whether embeddings have length 1 unless the caller asks otherwise.
        activation: what logits go through; None for embeddings.
        dimensions: lengths that embeddings were trained to be cut to; empty if none, None if any.
        uses_type_ids: whether the model is told which text of a pair a token belongs to.
        labels: names of the classes, one per logit; empty for embeddings.
        prompts: what goes before a text, by what its embedding is for.
    """

    size: int
    pad_token_id: int
    uses_type_ids: bool
    pooling: Pooling | None = None
    normalize: bool = False
    activation: Activation | None = None
    dimensions: tuple[int, ...] | None = ()
    labels: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)


# --- examination ----------------------------------------------------------------------------------


def examine_encoder(config: Any, source: ModelSource, *, task: str, dtype: torch.dtype) -> EncoderSpec:
    """What serving the checkpoint takes, from its config and sentence-transformers files.

    Raises:
        UnsupportedModel: it cannot be served correctly; the message says why.
    """
    from transformers import __version__

    if source.kind == "gguf":
        raise UnsupportedModel(f"{source.name} is a .gguf file of a model for {task!r}; give a checkpoint's directory.")
    accepted = _check_class(config, task)
    files = read_sentence_files(source.path)
    if files.lowercase:
        raise UnsupportedModel(
            f"{source.name} has texts lowercased before its tokenizer (do_lower_case), which is not supported."
        )
    has_logits = task in {"score", "classify"}
    tokenizer = read_tokenizer_facts(source)
    if task == "score" and tokenizer.has_chat_template:
        raise UnsupportedModel(
            f"{source.name} has a chat template that pairs of texts must be put through, which is not supported."
        )
    return EncoderSpec(
        architecture=(config.architectures or [config.model_type])[0],
        task=task,
        vocab_size=config.vocab_size,
        context_length=min(files.max_length or tokenizer.max_length, _num_positions(config, task)),
        size=config.num_labels if has_logits else config.hidden_size,
        pad_token_id=_pad_token_id(config),
        uses_type_ids="token_type_ids" in accepted & frozenset(tokenizer.outputs),
        dtype=dtype_name(dtype),
        transformers=__version__,
        pooling=None if has_logits else _pooling(files, config, source),
        normalize=not has_logits and files.normalize is not False,
        activation=read_activation(source.path, config) if has_logits else None,
        dimensions=_dimensions(config),
        labels=_labels(config) if has_logits else (),
        prompts={} if has_logits else read_prompts(source.path, config),
    )


def _check_class(config: Any, task: str) -> frozenset[str]:
    """The names of what the model's forward accepts."""
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"Model type {config.model_type!r} is an encoder-decoder, which is not served for {task!r}."
        )
    found = model_class(config, task)
    accepted = frozenset(inspect.signature(found.forward).parameters)
    if found._is_stateful or not {"input_ids", "attention_mask"} <= accepted:
        raise UnsupportedModel(f"{found.__name__} does not take a mask for padding, which batches of texts need.")
    if task != "embed" and _is_causal(config) and config.pad_token_id is None:
        raise UnsupportedModel(
            f"{found.__name__} finds the end of a text by the padding after it, and config.json names no pad_token_id."
        )
    return accepted


def _num_positions(config: Any, task: str) -> int:
    """Positions for tokens. Some models number them from after their padding token's id, as fairseq did."""
    with quiet():
        module = build_module(config, dtype=torch.bfloat16, attention="eager", buffers_on_meta=True, task=task)
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return getattr(config, "max_position_embeddings", None) or _UNKNOWN_CONTEXT


def _pad_token_id(config: Any) -> int:
    """What inputs are padded with. It is masked, so that any token would do for a model that names none."""
    return config.pad_token_id if config.pad_token_id is not None else 0


def _pooling(files: SentenceFiles, config: Any, source: ModelSource) -> Pooling:
    if files.pooling is not None:
        return files.pooling
    default: Pooling = "lasttoken" if _is_causal(config) else "mean"
    logger.warning(
        "%s does not say how its states are pooled (it has no modules.json); using %r, and length 1.",
        source.name,
        default,
    )
    return default


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def _labels(config: Any) -> tuple[str, ...]:
    """The names of the classes; transformers makes up LABEL_0 and so on for those that config.json does not name."""
    names = config.id2label or {}
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels))


def _dimensions(config: Any) -> tuple[int, ...] | None:
    """VLLM's rule: `matryoshka_dimensions` lists them, `is_matryoshka` allows any."""
    listed = getattr(config, "matryoshka_dimensions", None)
    if listed:
        return tuple(listed)
    return None if getattr(config, "is_matryoshka", False) else ()


# --- the bound model ------------------------------------------------------------------------------


class LoadedEncoder(BoundModel[EncoderSpec]):
    """A model that embeds, scores or classifies."""

    def __init__(self, facts: EncoderSpec, module: Any, slot_names: dict[str, str]) -> None:
        super().__init__(facts, slot_names)
        self.module = module
        self.pooling = PoolingInfo(facts.size, facts.normalize, facts.dimensions, facts.labels, facts.prompts)

    @torch.inference_mode()
    def forward(self, inputs: Sequence[PoolInput]) -> torch.Tensor:
        """Compute whole inputs in one batch.

        Returns:
            float32 [len(inputs), size]: embeddings as pooled, before they are normalised, or logits.
        """
        batch = self._padded(inputs)
        output = self.module(**batch)
        if self.facts.pooling is None:
            logits: torch.Tensor = output.logits
            return logits.float()
        return pool(output.last_hidden_state.float(), batch["attention_mask"], self.facts.pooling)

    def _padded(self, inputs: Sequence[PoolInput]) -> dict[str, torch.Tensor]:
        """The model's arguments, each int64 [len(inputs), longest]."""
        longest = max(len(each.token_ids) for each in inputs)
        fill, uses_type_ids = self.facts.pad_token_id, self.facts.uses_type_ids
        input_ids = [(*each.token_ids, *(fill,) * (longest - len(each.token_ids))) for each in inputs]
        mask = [(1,) * len(each.token_ids) + (0,) * (longest - len(each.token_ids)) for each in inputs]
        batch = {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
        if uses_type_ids:
            type_ids = [(*each.type_ids, *(0,) * (longest - len(each.type_ids))) for each in inputs]
            batch["token_type_ids"] = torch.tensor(type_ids)
        return batch

    def finish(
        self, rows: torch.Tensor, *, dimensions: int | None = None, use_activation: bool | None = None
    ) -> torch.Tensor:
        """What callers get of rows that `forward` gave: cut to `dimensions`, then made of length 1, or activated.

        Args:
            rows: [num_rows, size].
            use_activation: None means what the checkpoint says.
        """
        facts = self.facts
        if facts.activation is not None:
            return rows if use_activation is False else _activated(rows, facts.activation)
        cut = rows if dimensions is None else rows[:, :dimensions]
        wanted = facts.normalize if use_activation is None else use_activation
        return normalize(cut, dim=-1) if wanted else cut


def _activated(rows: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "sigmoid":
            return torch.sigmoid(rows)
        case "softmax":
            return torch.softmax(rows, dim=-1)
        case "identity":
            return rows


def pool(states: torch.Tensor, mask: torch.Tensor, how: Pooling) -> torch.Tensor:
    """One vector per input.

    Args:
        states: [num_inputs, num_tokens, size].
        mask: [num_inputs, num_tokens]; 1 for tokens, 0 for the padding after them.

    Returns:
        [num_inputs, size].
    """
    weights = mask[:, :, None]
    match how:
        case "cls":
            return states[:, 0]
        case "lasttoken":
            return states[torch.arange(len(states)), mask.sum(dim=1) - 1]
        case "max":
            return states.masked_fill(weights == 0, float("-inf")).amax(dim=1)
        case "mean":
            return (states * weights).sum(dim=1) / weights.sum(dim=1)


def bind_encoder(image: WeightImage, arena: Arena, *, native: bool = True) -> LoadedEncoder:
    """Let every tensor of an image look into `arena`, which has the image's layout; touches no weight.

    Args:
        native: let native kernels compute with quantized weights where they can be used.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
    """
    facts = msgspec.convert(dict(image.metadata), EncoderSpec)
    config = read_image_config(image)
    found = model_class(config, facts.task)
    with quiet():
        module = build_module(
            config,
            dtype=torch_dtype(facts.dtype),
            attention="sdpa" if found._supports_sdpa else "eager",
            task=facts.task,
        )
    bind_module(module, image, arena, native=native)
    return LoadedEncoder(facts, module, slot_names_of(image))
