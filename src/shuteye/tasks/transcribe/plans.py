"""One step of a model that transcribes, and its result, as frozen data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shuteye.state import Epoch
from shuteye.tasks.transcribe.requests import TranscribeParams

WindowRules = Literal["text", "timestamps", "language"]
"""What may be sampled in a window: text alone, text between timestamps, or one of the language tokens."""


@dataclass(frozen=True, slots=True)
class SpeechAdmission:
    """Audio the worker does not have (any more). `pad`: it fits one window, and is filled up with silence."""

    request_id: str
    pcm: bytes
    params: TranscribeParams
    pad: bool


@dataclass(frozen=True, slots=True)
class SpeechWindow:
    """Encode frames [start_frame, start_frame + num_frames); sample the token after `prompt_token_ids` and `token_ids`.

    `token_ids` were sampled in this window before, by a worker that has forgotten. `num_sampled`: how many tokens were
    sampled for the request so far.
    """

    request_id: str
    start_frame: int
    num_frames: int
    prompt_token_ids: tuple[int, ...]
    rules: WindowRules
    token_ids: tuple[int, ...] = ()
    num_sampled: int = 0


@dataclass(frozen=True, slots=True)
class SpeechStep:
    """In the request's open window: the token sampled last, after which the next one is to be sampled."""

    request_id: str
    token_id: int
    num_sampled: int


@dataclass(frozen=True, slots=True)
class SpeechPlan:
    """Windows to open, then one decoder step for all others. `forget` names requests whose state can go."""

    windows: tuple[SpeechWindow, ...] = ()
    steps: tuple[SpeechStep, ...] = ()
    admissions: tuple[SpeechAdmission, ...] = ()
    forget: tuple[str, ...] = ()
    epoch: Epoch = ()
    starts: tuple[str, ...] = ()  # a request's first output tells that it began

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return len(self.steps) + sum(len(each.prompt_token_ids) + len(each.token_ids) for each in self.windows)


@dataclass(frozen=True, slots=True)
class TranscribedToken:
    """The token chosen; `no_speech_prob` comes with the first of a window."""

    request_id: str
    token_id: int
    logprob: float
    no_speech_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeechResult:
    """One token per window, then one per step, in the order of the plan."""

    tokens: tuple[TranscribedToken, ...]
