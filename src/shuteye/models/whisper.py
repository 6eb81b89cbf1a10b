"""Whisper: examined, bound to an arena, and run: features, encoder, decoder steps, and what may be sampled.

Knows nothing of requests, of windows of audio, or of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.model_info import WhisperSpec
from shuteye.models.binding import CONFIG_DIR, BoundModel, CommonSpec, read_image_config, slot_names_of
from shuteye.models.module_binding import bind_module
from shuteye.models.modules import build_module, quiet
from shuteye.models.tensors import torch_dtype

if TYPE_CHECKING:
    from shuteye.tasks.transcribe.plans import WindowRules
from dataclasses import dataclass
from pathlib import Path

from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.checkpoint import read_generation_config
from shuteye.models.sources import ModelSource

TASK = "transcribe"
SAMPLE_RATE = 16_000
CONVOLUTION_STRIDE = 2
"""Frames per position of the encoder, and so per timestamp token."""

_EXTRACTOR_FILE = "preprocessor_config.json"
_CANARY_FRAMES = 16

_ATTENTION = "shuteye_speech"
"""The name to set as `config._attn_implementation`."""

# --- examination ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WhisperImageSpec(CommonSpec):
    """What an image's metadata says of a model that transcribes."""

    eos_token_ids: tuple[int, ...]
    speech: WhisperSpec


def examine_speech(config: Any, source: ModelSource, *, dtype: torch.dtype) -> WhisperImageSpec:
    """What the image of a Whisper checkpoint is to say.

    Raises:
        UnsupportedModel: another architecture, or a checkpoint that does not say how it is to be led.
    """
    from transformers import __version__

    if config.model_type != "whisper":
        raise UnsupportedModel(f"Model type {config.model_type!r} transcribes, but only Whisper models are served.")
    generation = read_generation_config(source)
    wanted = ("no_timestamps_token_id", "eos_token_id", "decoder_start_token_id")
    missing = [name for name in wanted if not isinstance(generation.get(name), int)]
    if missing:
        raise UnsupportedModel(
            f"{source.name}: generation_config.json lacks {', '.join(missing)}, without which nobody can say what the "
            "model writes. Take that file from the original model on the hub."
        )
    return WhisperImageSpec(
        architecture=config.architectures[0],
        task=TASK,
        vocab_size=config.vocab_size,
        context_length=config.max_target_positions,
        eos_token_ids=(generation["eos_token_id"],),
        speech=_whisper_spec(config, generation, source, dtype),
        dtype=str(dtype).removeprefix("torch."),
        transformers=__version__,
    )


def _whisper_spec(config: Any, generation: Mapping[str, Any], source: ModelSource, dtype: torch.dtype) -> WhisperSpec:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    by_spelling = (generation.get("lang_to_id") or {}) if generation.get("is_multilingual", True) else {}
    languages = {spelling.strip("<|>"): token_id for spelling, token_id in by_spelling.items()}
    cached = config.decoder_layers * 2 * config.d_model * (config.max_source_positions + config.max_target_positions)
    return WhisperSpec(
        hop_samples=_extractor(config, source).hop_length,
        window_frames=CONVOLUTION_STRIDE * config.max_source_positions,
        frames_per_timestamp=CONVOLUTION_STRIDE,
        start_token_id=generation["decoder_start_token_id"],
        eos_token_id=generation["eos_token_id"],
        no_timestamps_token_id=generation["no_timestamps_token_id"],
        previous_token_id=generation.get("prev_sot_token_id"),
        transcribe_token_id=(generation.get("task_to_id") or {}).get("transcribe"),
        translate_token_id=(generation.get("task_to_id") or {}).get("translate"),
        languages=languages,
        language_names={name: code for name, code in TO_LANGUAGE_CODE.items() if code in (languages or ("en",))},
        max_tokens=config.max_target_positions,
        state_bytes=cached * dtype.itemsize,
    )


def _extractor(config: Any, source: ModelSource) -> Any:
    """The checkpoint's feature extractor, held against its model.

    Raises:
        UnsupportedModel: it makes other features than the model takes.
    """
    from transformers import WhisperFeatureExtractor

    if not (source.path / _EXTRACTOR_FILE).is_file():
        raise UnsupportedModel(f"{source.name} has no {_EXTRACTOR_FILE}, which says how sound becomes features.")
    extractor = WhisperFeatureExtractor.from_pretrained(source.path, local_files_only=True)
    made = (extractor.feature_size, extractor.nb_max_frames, extractor.sampling_rate)
    taken = (config.num_mel_bins, CONVOLUTION_STRIDE * config.max_source_positions, SAMPLE_RATE)
    if made != taken:
        raise UnsupportedModel(
            f"{source.name}: {_EXTRACTOR_FILE} makes {made}, the model takes {taken} (bins, frames, samples/s)."
        )
    return extractor


def save_extractor(source: ModelSource, directory: Path) -> None:
    """Put what `WhisperFeatureExtractor.from_pretrained` reads into a directory."""
    (directory / _EXTRACTOR_FILE).write_bytes((source.path / _EXTRACTOR_FILE).read_bytes())


# --- attention over the windows of several requests at once: no padding, no copies ---------------


def _register() -> None:
    """Make the attention known to transformers; harmless if it is already."""
    AttentionInterface.register(_ATTENTION, _attend)


def _new_cache() -> Any:
    """An empty memory: self-attention grows by a token each step, cross-attention is filled by the first."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | Sequence[torch.Tensor],
    value: torch.Tensor | Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA, row by row where rows have keys of their own."""
    if isinstance(key, torch.Tensor):
        found: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return found, None
    rows = [
        sdpa_attention_forward(module, query[index : index + 1], key[index], value[index], attention_mask, **arguments)[
            0
        ]
        for index in range(len(key))
    ]
    return torch.cat(rows), None


class _RowsCache(EncoderDecoderCache):  # type: ignore[misc]  # Whisper's attention asks for this very class
    """Several requests' memories seen as one batch's, for a step of one token each.

    What attention gets of it are lists, a tensor per row, that only `_attend` understands.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.self_attention_cache = _Rows([row.self_attention_cache for row in rows])
        self.cross_attention_cache = _Rows([row.cross_attention_cache for row in rows])
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache.layers)), True)


class _Rows(DynamicCache):  # type: ignore[misc]  # for what masks ask of a cache
    """One kind of memory of several requests."""

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__()
        self._rows = rows
        self.layers = [_RowsLayer([row.layers[index] for row in rows]) for index in range(len(rows[0].layers))]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append each row's new key and value to its own."""
        found = [
            row.update(key_states[index : index + 1], value_states[index : index + 1], layer_idx)
            for index, row in enumerate(self._rows)
        ]
        return [keys for keys, _ in found], [values for _, values in found]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Some row's; positions are given explicitly, so that nobody counts with it."""
        length: int = self._rows[0].get_seq_length(layer_idx)
        return length


class _RowsLayer:
    """One layer's keys and values, a tensor per row."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.keys = [row.keys for row in rows]
        self.values = [row.values for row in rows]


# --- the bound model -----------------------------------------------------------------------------


class SpeechModel(BoundModel[WhisperImageSpec]):
    """A Whisper model; `token_rules` are what its checkpoint says of sampling."""

    speech: WhisperSpec

    def __init__(self, facts: WhisperImageSpec, module: Any, slot_names: Mapping[str, str], config_dir: str) -> None:
        from transformers import GenerationConfig, WhisperFeatureExtractor

        super().__init__(facts, slot_names)
        self.eos_token_ids = facts.eos_token_ids
        self.speech = facts.speech
        self._module = module
        self._extractor = WhisperFeatureExtractor.from_pretrained(config_dir)
        self.token_rules = TokenRules(
            GenerationConfig.from_pretrained(config_dir), facts.speech, vocab_size=facts.vocab_size
        )

    # --- encoding --------------------------------------------------------------------------------

    def features(self, pcm: bytes, *, pad: bool) -> torch.Tensor:
        """Log-mel features [num_mel_bins, num_frames], in the model's dtype.

        Args:
            pcm: float32 samples.
            pad: fill up to one window with silence; what does not fit is cut. Otherwise a frame per 160 samples.
        """
        samples = torch.frombuffer(bytearray(pcm), dtype=torch.float32).numpy()
        extracted = self._extractor(
            samples,
            sampling_rate=self._extractor.sampling_rate,
            return_tensors="pt",
            **({} if pad else {"truncation": False, "padding": "longest"}),
        )
        features: torch.Tensor = extracted.input_features[0].to(torch_dtype(self.dtype))
        return features

    @torch.inference_mode()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """What the decoder attends to, [1, positions, d_model].

        Args:
            features: [num_mel_bins, up to `window_frames`]; the rest of the window is zeros.
        """
        missing = self.speech.window_frames - features.shape[-1]
        window = torch.nn.functional.pad(features, (0, missing))
        encoder_output: torch.Tensor = self._module.model.encoder(window[None]).last_hidden_state
        return encoder_output

    # --- decoding --------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, encoder_output: torch.Tensor, token_ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """Read all tokens of a window at once.

        Returns:
            The window's memory, for `step`, and hidden states [num_tokens, d_model].
        """
        cache = _new_cache()
        found = self._decode([list(token_ids)], [range(len(token_ids))], encoder_output, cache)
        return cache, found[0]

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int], caches: Sequence[Any]) -> torch.Tensor:
        """One more token of each of several windows, whose memories grow by it.

        Returns:
            Hidden states [num_windows, d_model].
        """
        encoder_output = torch.empty(0)  # all of it is in the caches
        cache = _RowsCache(caches)
        found = self._decode([[token] for token in token_ids], [[each] for each in positions], encoder_output, cache)
        return found[:, 0]

    def _decode(
        self, token_ids: list[list[int]], positions: Sequence[Sequence[int]], encoder_output: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        output = self._module.model.decoder(
            input_ids=torch.tensor(token_ids),
            position_ids=torch.tensor([list(each) for each in positions]),
            encoder_hidden_states=encoder_output,
            cache=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [num_tokens, vocab_size] of hidden states [num_tokens, d_model]."""
        logits: torch.Tensor = self._module.proj_out(hidden)
        return logits.float()

    # --- the canary -----------------------------------------------------------------------------

    @torch.inference_mode()
    def short_pass(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [num_tokens, vocab_size] after a window of a few frames: every layer takes part, none for long.

        The encoder's forward wants a whole window; its layers do not.
        """
        encoder = self._module.model.encoder
        num_bins = encoder.num_mel_bins
        frames = torch.linspace(-1.0, 1.0, num_bins * _CANARY_FRAMES, dtype=torch_dtype(self.dtype)).view(
            1, num_bins, -1
        )
        hidden_states = torch.nn.functional.gelu(encoder.conv1(frames))
        hidden_states = torch.nn.functional.gelu(encoder.conv2(hidden_states)).permute(0, 2, 1)
        hidden_states = hidden_states + encoder.embed_positions.weight[: hidden_states.shape[1]]
        for layer in encoder.layers:
            hidden_states = layer(hidden_states, None)
        _, hidden = self.begin(encoder.layer_norm(hidden_states), token_ids)
        return self.logits(hidden)


def bind_speech(image: WeightImage, arena: Arena, *, native: bool = True) -> SpeechModel:
    """Let every tensor of an image look into `arena`, which has the image's layout; touches no weight.

    Args:
        native: let native kernels compute with quantized weights where they can be used.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
    """
    facts = msgspec.convert(dict(image.metadata), WhisperImageSpec)
    _register()
    config = read_image_config(image)
    with quiet():
        module = build_module(config, dtype=torch_dtype(facts.dtype), attention=_ATTENTION, task=TASK)
    bind_module(module, image, arena, native=native)
    return SpeechModel(facts, module, slot_names_of(image), str(image.path / CONFIG_DIR))


class TokenRules:
    """What may be sampled next, by transformers' own logits processors in the order that `generate` has them in.

    One rule is ours: where no timestamps are wanted there are none. `generate` takes one that slips in for the end of
    a stretch, and encodes the rest of the window again, possibly for ever.
    """

    def __init__(self, generation: Any, facts: WhisperSpec, *, vocab_size: int) -> None:
        from transformers.generation.logits_process import (
            SuppressTokensAtBeginLogitsProcessor,
            SuppressTokensLogitsProcessor,
            WhisperTimeStampLogitsProcessor,
        )

        self._processors: list[Any] = []
        if generation.begin_suppress_tokens:
            self._processors.append(
                SuppressTokensAtBeginLogitsProcessor(generation.begin_suppress_tokens, begin_index=0)
            )
        if generation.suppress_tokens:
            self._processors.append(SuppressTokensLogitsProcessor(generation.suppress_tokens))
        self._timestamps = WhisperTimeStampLogitsProcessor(generation, begin_index=0)
        self._first_timestamp = facts.first_timestamp_id
        self._no_timestamps = torch.full((vocab_size - facts.first_timestamp_id,), -torch.inf)
        self._languages = torch.tensor(sorted(facts.languages.values()), dtype=torch.long)

    def apply(self, logits: torch.Tensor, rules: WindowRules, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [vocab_size] with minus infinity for what must not follow `token_ids`, sampled in this window.

        Does not write to `logits`.
        """
        if rules == "language":
            allowed = torch.full_like(logits, -torch.inf)
            return allowed.index_copy(0, self._languages, logits[self._languages])
        sampled, scores = torch.tensor([list(token_ids)], dtype=torch.long), logits[None]
        for processor in self._processors:
            scores = processor(sampled, scores)
        if rules == "timestamps":
            found: torch.Tensor = self._timestamps(sampled, scores)[0]
            return found
        return torch.cat([scores[0, : self._first_timestamp], self._no_timestamps])
