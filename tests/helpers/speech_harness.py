"""What the tests of speech share: audio, an engine core stepped by hand, and what transformers makes of the same."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from core_harness import Stepped

from shuteye.audio import SAMPLE_RATE
from shuteye.engine.core import EngineCore
from shuteye.errors import ShuteyeError, rebuild
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.transcribe.requests import TranscribedTokens, TranscribeParams, TranscribeRequest


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes ten times a second: enough for a random model to say something else each time."""
    rng = np.random.default_rng(seed)
    num_samples = int(seconds * SAMPLE_RATE)
    loudness = np.repeat(rng.random(num_samples // 1600 + 1), 1600)[:num_samples]
    return (rng.standard_normal(num_samples) * loudness * 0.1).astype("float32")


@dataclass
class Received:
    """What a request has received so far."""

    token_ids: list[int] = field(default_factory=list)
    segments: list[TranscribedTokens] = field(default_factory=list)
    ended: object = None  # True, a finish reason, or the error
    language: str | None = None

    @property
    def stretches(self):
        """Times and text tokens of every segment."""
        return [(round(each.start, 4), round(each.end, 4), list(each.token_ids)) for each in self.segments]


@dataclass
class SpeechHarness(Stepped):
    """A core and what its requests have received so far."""

    LIMIT: ClassVar[int] = 5000
    core: EngineCore
    received: dict[str, Received] = field(default_factory=dict)

    def add(self, request_id, samples, *, prompt=(), **params):
        self.received[request_id] = Received()
        self.core.add(TranscribeRequest(request_id, samples.tobytes(), tuple(prompt), TranscribeParams(**params)))

    def step(self):
        for delta in self.core.step():
            received = self.received[delta.request_id]
            assert received.ended is None, "a request that had ended got more"
            if isinstance(delta, RequestDelta):
                error = delta.error
                received.ended = (
                    delta.finish_reason if error is None else rebuild(error.kind, error.message, error.param)
                )
                continue
            received.token_ids += delta.token_ids
            received.segments += delta.segments
            received.language = delta.language or received.language
            received.ended = delta.finished or None

    def transcribe(self, samples, **params) -> Received:
        """One request run to its end."""
        request_id = f"transcribe-{len(self.received)}"
        self.add(request_id, samples, **params)
        self.run()
        received = self.received[request_id]
        if isinstance(received.ended, ShuteyeError):
            raise received.ended
        return received

    @property
    def kept(self):
        """Requests that the rank keeps something of."""
        return set(self.worker._runner._states)


class Reference:
    """A checkpoint as transformers loads and runs it by itself."""

    def __init__(self, path):
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        from shuteye.models.modules import quiet

        with quiet():
            self.model = WhisperForConditionalGeneration.from_pretrained(path)
        self.extractor = WhisperFeatureExtractor.from_pretrained(path)
        self.end = self.model.generation_config.eos_token_id

    def text_of(self, token_ids):
        return [token for token in token_ids if token < self.end]

    def features(self, samples, **how):
        return self.extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", **how).input_features

    def short(self, samples, **options):
        """Text tokens of a recording that fits one window, without timestamps."""
        config = self.model.generation_config
        timestamps = list(range(config.no_timestamps_token_id + 1, self.model.config.vocab_size))
        # a random model writes timestamps where none are wanted, and is then led astray
        options["suppress_tokens"] = sorted({*config.suppress_tokens, *timestamps})
        return self.text_of(self._generate(self.features(samples), **options)[0].tolist())

    def long(self, samples, **options):
        """Segments as (start, end, text tokens), by transformers' long-form algorithm."""
        features = self.features(samples, truncation=False, padding="longest")
        found = self._generate(features, return_timestamps=True, return_segments=True, **options)
        return [
            (round(float(each["start"]), 4), round(float(each["end"]), 4), self.text_of(each["tokens"].tolist()))
            for each in found["segments"][0]
        ]

    def _generate(self, features, **options):
        from shuteye.models.modules import quiet

        with quiet():
            return self.model.generate(features, **options)
