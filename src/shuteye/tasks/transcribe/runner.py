"""Steps of a model that transcribes: windows encoded, all open windows decoded together, tokens chosen.

What it keeps of a request is small beside the weights and lives outside of the arenas; it is gone when the request is
forgotten, and when memory is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shuteye.heap import return_free_heap
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models.whisper import SpeechModel, bind_speech
from shuteye.state import Epoch
from shuteye.tasks.base import ModelRunner
from shuteye.tasks.canary import Numbers, Prove, fixed_tokens
from shuteye.tasks.transcribe.plans import (
    SpeechAdmission,
    SpeechPlan,
    SpeechResult,
    SpeechStep,
    SpeechWindow,
    TranscribedToken,
    WindowRules,
)
from shuteye.tasks.transcribe.sampling import drawn, penalized


@dataclass(slots=True)
class _AudioState:
    """What is kept of one request.

    Attributes:
        features: [num_mel_bins, num_frames] of the whole audio.
        encoder_output: of a window whose language was asked for, until the window itself is opened.
        cache: the decoder's memory of the window, which has `num_read` tokens, the last ones of which are `token_ids`.
    """

    admission: SpeechAdmission
    features: torch.Tensor
    encoder_output: torch.Tensor | None = None
    cache: Any = None
    num_read: int = 0
    rules: WindowRules = "text"
    token_ids: list[int] = field(default_factory=list)


class SpeechRunner(ModelRunner):
    """Owns what the decoder keeps of every request."""

    model: SpeechModel

    def __init__(self, image: WeightImage, weights: Arena, *, native: bool = True) -> None:
        self.model = bind_speech(image, weights, native=native)
        self._states: dict[str, _AudioState] = {}
        self._epoch: Epoch = ()

    def drop_computed(self) -> None:
        """Forget every request: the scheduler admits again who is still to be served."""
        if self._states:
            self._states.clear()
            return_free_heap()

    def canary_pass(self) -> Numbers:
        """Logits of a few tokens after a window of a few frames."""
        return self.model.short_pass(fixed_tokens(self.model.facts.vocab_size)).float().numpy()

    @torch.inference_mode()
    def execute(self, plan: SpeechPlan, *, prove: Prove | None = None) -> SpeechResult:
        """Open the plan's windows one by one, then take one step in all others together."""
        if prove is not None:
            prove(self.canary_pass())
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self.drop_computed()
        for request_id in plan.forget:
            self._states.pop(request_id, None)
        for admission in plan.admissions:
            features = self.model.features(admission.pcm, pad=admission.pad)
            self._states[admission.request_id] = _AudioState(admission, features)
        opened = tuple(self._open(window) for window in plan.windows)
        return SpeechResult(tokens=opened + self._step(plan.steps))

    def _open(self, window: SpeechWindow) -> TranscribedToken:
        state = self._states[window.request_id]
        if state.encoder_output is None:
            end = window.start_frame + window.num_frames
            state.encoder_output = self.model.encode(state.features[:, window.start_frame : end])
        read = [*window.prompt_token_ids, *window.token_ids]
        state.cache, hidden = self.model.begin(state.encoder_output, read)
        state.num_read, state.rules, state.token_ids = len(read), window.rules, list(window.token_ids)
        spec = self.model.speech
        # Asked where OpenAI's implementation asks it: after the start token, before language and task are given.
        begin = window.prompt_token_ids.index(spec.start_token_id)
        at_begin, at_end = self.model.logits(hidden[[begin, -1]])
        no_speech = torch.softmax(at_begin, dim=-1)[spec.no_timestamps_token_id - 1]
        if window.rules != "language":
            state.encoder_output = None  # what the decoder needs of it is in its cache
        return self._choose(state, at_end, num_sampled=window.num_sampled, no_speech_prob=float(no_speech))

    def _step(self, steps: Sequence[SpeechStep]) -> tuple[TranscribedToken, ...]:
        if not steps:
            return ()
        states = [self._states[step.request_id] for step in steps]
        hidden = self.model.step(
            [step.token_id for step in steps], [state.num_read for state in states], [state.cache for state in states]
        )
        logits = self.model.logits(hidden)
        for state, step in zip(states, steps, strict=True):
            state.num_read += 1
            assert state.token_ids[-1] == step.token_id, "a step after another token than the last"
        return tuple(
            self._choose(state, row, num_sampled=step.num_sampled)
            for state, row, step in zip(states, logits, steps, strict=True)
        )

    def _choose(
        self, state: _AudioState, logits: torch.Tensor, *, num_sampled: int, no_speech_prob: float = 0.0
    ) -> TranscribedToken:
        """Greedy at temperature 0, else drawn; a sleep does not change it."""
        scores = self.model.token_rules.apply(logits, state.rules, state.token_ids)
        logprobs = torch.log_softmax(scores, dim=-1)
        admission = state.admission
        if state.rules == "language":
            token_id = int(scores.argmax())
        else:
            said = [token for token in state.token_ids if token < self.model.speech.eos_token_id]
            likely = penalized(scores, admission.params, said)
            token_id = drawn(likely, admission.params, num_sampled=num_sampled)
            state.token_ids.append(token_id)
        return TranscribedToken(admission.request_id, token_id, float(logprobs[token_id]), no_speech_prob)
