"""Whisper bound to an arena: log-mel features, the encoder, decoder steps of several requests, and what may be sampled.

Knows nothing of requests, of windows in a recording, or of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shuteye.memory.arena import Arena, torch_dtype
from shuteye.memory.image import WeightImage
from shuteye.model_info import WhisperSpec
from shuteye.models import whisper_attention as speech_attention
from shuteye.models.binding import CONFIG_DIR, BoundModel, bind_module, read_image_config, slot_names_of
from shuteye.models.blueprint import build_module, quiet
from shuteye.models.whisper_facts import TASK, WhisperImageSpec

if TYPE_CHECKING:
    from shuteye.tasks.transcribe.plans import WindowRules

CANARY_FRAMES = 16


class SpeechModel(BoundModel[WhisperImageSpec]):
    """A Whisper model; what its checkpoint says of sampling, `allowed` heeds."""

    def __init__(self, facts: WhisperImageSpec, module: Any, slot_names: Mapping[str, str], config_dir: str) -> None:
        from transformers import GenerationConfig, WhisperFeatureExtractor

        super().__init__(facts, slot_names)
        self._module = module
        self._extractor = WhisperFeatureExtractor.from_pretrained(config_dir)
        self._rules = _TokenRules(
            GenerationConfig.from_pretrained(config_dir), facts.speech, vocab_size=facts.vocab_size
        )

    @property
    def speech(self) -> WhisperSpec:
        """How to lead it through a recording."""
        return self.facts.speech

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token that ends a window."""
        return self.facts.eos_token_ids

    # --- hearing --------------------------------------------------------------------------------

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
        features: torch.Tensor = extracted.input_features[0].to(self.dtype)
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

    # --- writing --------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, encoder_output: torch.Tensor, token_ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """Read all tokens of a window at once.

        Returns:
            The window's memory, for `step`, and hidden states [num_tokens, d_model].
        """
        cache = speech_attention.new_cache()
        found = self._decode([list(token_ids)], [range(len(token_ids))], encoder_output, cache)
        return cache, found[0]

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int], caches: Sequence[Any]) -> torch.Tensor:
        """One more token of each of several windows, whose memories grow by it.

        Returns:
            Hidden states [num_windows, d_model].
        """
        encoder_output = torch.empty(0)  # all of it is in the caches
        cache = speech_attention.RowsCache(caches)
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

    def allowed(self, logits: torch.Tensor, rules: WindowRules, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [vocab_size] with minus infinity for what must not follow `token_ids`, sampled in this window."""
        return self._rules.apply(logits, rules, token_ids)

    # --- the canary -----------------------------------------------------------------------------

    @torch.inference_mode()
    def short_pass(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [num_tokens, vocab_size] after a window of a few frames: every layer takes part, none for long.

        The encoder's forward wants a whole window; its layers do not.
        """
        encoder = self._module.model.encoder
        num_bins = encoder.num_mel_bins
        frames = torch.linspace(-1.0, 1.0, num_bins * CANARY_FRAMES, dtype=self.dtype).view(1, num_bins, -1)
        hidden_states = torch.nn.functional.gelu(encoder.conv1(frames))
        hidden_states = torch.nn.functional.gelu(encoder.conv2(hidden_states)).permute(0, 2, 1)
        hidden_states = hidden_states + encoder.embed_positions.weight[: hidden_states.shape[1]]
        for layer in encoder.layers:
            hidden_states = layer(hidden_states, None)
        _, hidden = self.begin(encoder.layer_norm(hidden_states), token_ids)
        return self.logits(hidden)


def bind_speech(image: WeightImage, arena: Arena) -> SpeechModel:
    """Let every tensor of an image look into `arena`, which has the image's layout; touches no weight.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
    """
    facts = msgspec.convert(dict(image.metadata), WhisperImageSpec)
    speech_attention.register()
    config = read_image_config(image)
    with quiet():
        module = build_module(
            config, dtype=torch_dtype(facts.dtype), attention=speech_attention.IMPLEMENTATION, task=TASK
        )
    bind_module(module, image, arena)
    return SpeechModel(facts, module, slot_names_of(image), str(image.path / CONFIG_DIR))


class _TokenRules:
    """What may be sampled next, by transformers' own logits processors in the order that `generate` has them in.

    One rule is ours: where no timestamps are wanted there are none. `generate` takes one that slips in for the end of
    a stretch, and hears the rest of the window again, possibly for ever.
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
        """See `SpeechModel.allowed`; does not write to `logits`."""
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
