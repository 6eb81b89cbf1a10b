"""Leads audio requests through windows, token by token: which window is opened next, what its tokens give.

Knows nothing of tensors, text or sleep: samples and `SpeechResult` in, `SpeechPlan` and `TranscriptDelta` out.

A step opens at most one window (the encoder's pass is the long part) and takes one token of every window that is open,
so nobody waits for another's audio. A request that was preempted has its window encoded again, and keeps its tokens.

    frames   [0 ........ seek) [seek ........ num_frames)
              transcribed       this window, and later ones
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from shuteye.errors import InvalidRequest
from shuteye.model_info import WhisperSpec
from shuteye.tasks.base import ActiveRequest, TaskScheduler
from shuteye.tasks.transcribe.plans import (
    SpeechAdmission,
    SpeechPlan,
    SpeechResult,
    SpeechStep,
    SpeechWindow,
    TranscribedToken,
    WindowRules,
)
from shuteye.tasks.transcribe.requests import TranscribedTokens, TranscribeRequest, TranscriptDelta
from shuteye.tasks.transcribe.segments import num_final, split_window

SAMPLE_BYTES = 4
MIN_SAMPLES = 1600
"""A tenth of a second, as in OpenAI's API."""

MEMORY_SHARE = 0.25
"""Share of the memory left after loading that the decoder may take for what it keeps of requests."""

ENGLISH = "en"


@dataclass(slots=True, eq=False)
class _AudioRequest(ActiveRequest):
    """A request on its way.

    Attributes:
        num_frames: how long the audio is; the whole window if `pad`.
        prompt: what stands before the tokens of every window; None until the language is known.
        token_ids: sampled in this window.
        num_shown: how many of them were given out.
        num_sampled: tokens sampled in all windows; `num_taken` of them are in the transcript, timestamps included.
        num_prompt_tokens: tokens that its windows began with.
        admitted: the worker has the audio. `known`: it may have some of it. `open`: it has this window.
    """

    request: TranscribeRequest
    num_frames: int
    pad: bool
    rules: WindowRules
    prompt: tuple[int, ...] | None
    language: str | None
    seek: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_shown: int = 0
    logprobs: list[float] = field(default_factory=list)
    no_speech_prob: float = 0.0
    num_sampled: int = 0
    num_taken: int = 0
    num_prompt_tokens: int = 0
    admitted: bool = False
    known: bool = False
    open: bool = False


class SpeechScheduler(TaskScheduler):
    """First come, first served, up to `max_num_seqs` requests at a time.

    Args:
        spec: the model's.
        max_num_seqs: requests of which the decoder may keep something.
        available_bytes: memory left after loading, which bounds them too.
    """

    _requests: dict[str, _AudioRequest]

    def __init__(self, *, spec: WhisperSpec | None, max_num_seqs: int, available_bytes: int) -> None:
        super().__init__()
        assert spec is not None, "a model that transcribes says how"
        self._spec = spec
        self._limit = max(1, min(max_num_seqs, int(available_bytes * MEMORY_SHARE) // spec.state_bytes))
        self._waiting: deque[_AudioRequest] = deque()
        self._running: list[_AudioRequest] = []
        self._forget: list[str] = []

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: TranscribeRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: the audio is too short or broken, the language unknown, or the id in use.
        """
        self.check(request)
        spec, num_samples = self._spec, len(request.pcm) // SAMPLE_BYTES
        fits = num_samples <= spec.window_frames * spec.hop_samples
        pad = fits and not request.params.timestamps
        language = self._language(request.params.language)
        audio = _AudioRequest(
            request=request,
            num_frames=spec.window_frames if pad else num_samples // spec.hop_samples,
            pad=pad,
            rules="text" if pad else "timestamps",
            prompt=None,
            language=language,
        )
        if language is not None:
            audio.prompt = self._prompt(audio, language)
        self._requests[request.request_id] = audio
        self._waiting.append(audio)

    def check(self, request: TranscribeRequest) -> None:
        """Refuse what can never run; raises as `add` does, and changes nothing."""
        super().check(request)
        if len(request.pcm) % SAMPLE_BYTES:
            raise InvalidRequest(f"The audio is {len(request.pcm)} bytes, not a whole number of samples.", param="file")
        num_samples = len(request.pcm) // SAMPLE_BYTES
        if num_samples < MIN_SAMPLES:
            raise InvalidRequest(
                f"The audio has {num_samples} samples; at least {MIN_SAMPLES} (0.1 seconds) are needed.", param="file"
            )
        if any(token >= self._spec.eos_token_id for token in request.prompt_token_ids):
            raise InvalidRequest("The prompt must be plain text; it has special tokens.", param="prompt")
        self._language(request.params.language)
        if request.params.task == "translate" and not (self._spec.languages and self._spec.translate_token_id):
            raise InvalidRequest("The model is English-only; it does not translate.", param="model")

    def _language(self, wanted: str | None) -> str | None:
        """The code of a language; None if the model is to find out.

        Raises:
            InvalidRequest: the model does not know it.
        """
        spec = self._spec
        known = spec.languages or {ENGLISH: 0}
        if wanted is None:
            return None if spec.languages else ENGLISH
        code = spec.language_names.get(wanted.lower(), wanted.lower())
        if code not in known:
            what = "is English-only" if not spec.languages else f"knows {', '.join(sorted(known))}"
            raise InvalidRequest(f"The model does not transcribe {wanted!r}; it {what}.", param="language")
        return code

    def _prompt(self, audio: _AudioRequest, language: str) -> tuple[int, ...]:
        """What Whisper was trained to continue: [previous text] start [language, task] [no timestamps]."""
        spec = self._spec
        tokens: list[int] = []
        before = audio.request.prompt_token_ids
        if before and spec.previous_token_id is not None:
            tokens += [spec.previous_token_id, *before[-(spec.max_tokens // 2 - 1) :]]
        tokens.append(spec.start_token_id)
        if spec.languages:
            translates = audio.request.params.task == "translate"
            task = spec.translate_token_id if translates else spec.transcribe_token_id
            assert task is not None
            tokens += [spec.languages[language], task]
        if audio.rules == "text":
            tokens.append(spec.no_timestamps_token_id)
        return tuple(tokens)

    def preempt_all(self) -> int:
        """Send every running request back to the head of the queue; its tokens stay, its window is encoded again."""
        count = len(self._running)
        for audio in reversed(self._running):
            audio.admitted = audio.open = False
            self._waiting.appendleft(audio)
        self._running.clear()
        self._num_preemptions += count
        return count

    def _remove(self, active: _AudioRequest) -> None:
        super()._remove(active)
        if active in self._running:
            self._running.remove(active)
        else:
            self._waiting.remove(active)
        if active.known:
            self._forget.append(active.request_id)

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> SpeechPlan | None:
        """The next step, or None if there is nothing to do; it may be only to forget those that have ended."""
        assert not self._in_flight, "schedule() before update() or fail_step() of the previous plan"
        if not self.has_unfinished:
            return None
        stepping = [each for each in self._running if each.open]
        opening = self._next_to_open()
        admitted = [each for each in opening if not each.admitted]
        plan = SpeechPlan(
            windows=tuple(self._window(each) for each in opening),
            steps=tuple(SpeechStep(each.request_id, each.token_ids[-1], each.num_sampled) for each in stepping),
            admissions=tuple(_admission(each) for each in admitted),
            forget=tuple(self._forget),
            epoch=self._epoch,
        )
        for each in admitted:
            each.admitted = each.known = True
        self._forget.clear()
        self._in_flight.append((plan, (*opening, *stepping)))
        return plan

    def _next_to_open(self) -> list[_AudioRequest]:
        """The longest-running request without an open window, else the oldest waiting one: one at most."""
        for each in self._running:
            if not each.open:
                return [each]
        if self._waiting and len(self._running) < self._limit:
            self._running.append(self._waiting.popleft())
            return self._running[-1:]
        return []

    def _window(self, audio: _AudioRequest) -> SpeechWindow:
        spec = self._spec
        num_frames = min(spec.window_frames, audio.num_frames - audio.seek)
        finds_language = audio.prompt is None
        prompt = audio.prompt or (spec.start_token_id,)
        self._num_prompt_tokens += len(prompt)
        if not audio.token_ids:  # else it was opened before
            audio.num_prompt_tokens += len(prompt)
        return SpeechWindow(
            request_id=audio.request_id,
            start_frame=audio.seek,
            num_frames=num_frames,
            prompt_token_ids=prompt,
            rules="language" if finds_language else audio.rules,
            token_ids=tuple(audio.token_ids),
            num_sampled=audio.num_sampled,
        )

    # --- its outcome -----------------------------------------------------------------------------

    def update(self, plan: SpeechPlan, result: SpeechResult) -> list[TranscriptDelta]:
        """Take the step's tokens; a delta per request for which something is new."""
        deltas = []
        taking_part: tuple[_AudioRequest, ...] = self._land(plan)
        for audio, token in zip(taking_part, result.tokens, strict=True):
            if self._requests.get(audio.request_id) is not audio or not audio.admitted:
                continue  # aborted or preempted while the step ran
            assert token.request_id == audio.request_id, "results are not in the order of the plan"
            delta = self._advance(audio, token)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _advance(self, audio: _AudioRequest, token: TranscribedToken) -> TranscriptDelta | None:
        audio.num_sampled += 1
        self._num_generation_tokens += 1
        if audio.prompt is None:
            return self._take_language(audio, token)
        if not audio.logprobs:
            audio.no_speech_prob = token.no_speech_prob
        audio.logprobs.append(token.logprob)
        audio.open = True
        ends = token.token_id == self._spec.eos_token_id
        if not ends:
            audio.token_ids.append(token.token_id)
            audio.num_taken += 1
            ends = len(audio.prompt) + len(audio.token_ids) >= self._spec.max_tokens or _has_said_all(audio)
        if ends:
            return self._end_window(audio)
        return self._show(audio, self._num_final(audio))

    def _take_language(self, audio: _AudioRequest, token: TranscribedToken) -> TranscriptDelta:
        by_token = {token_id: code for code, token_id in self._spec.languages.items()}
        audio.language = by_token[token.token_id]
        audio.prompt = self._prompt(audio, audio.language)
        return self._delta(audio)

    def _num_final(self, audio: _AudioRequest) -> int:
        """How many tokens of the window are sure to be kept."""
        if audio.rules == "text":
            return len(audio.token_ids)
        return num_final(audio.token_ids, self._spec.first_timestamp_id)

    def _show(self, audio: _AudioRequest, num_final: int) -> TranscriptDelta | None:
        """Give out what is new of the window's first `num_final` tokens."""
        fresh = audio.token_ids[audio.num_shown : max(num_final, audio.num_shown)]
        audio.num_shown += len(fresh)
        if not fresh and audio.num_sampled > 1:  # the first delta tells that the request runs
            return None
        return self._delta(audio, self._text(fresh))

    def _delta(
        self,
        audio: _AudioRequest,
        token_ids: tuple[int, ...] = (),
        segments: tuple[TranscribedTokens, ...] = (),
        *,
        finished: bool = False,
    ) -> TranscriptDelta:
        return TranscriptDelta(
            audio.request_id,
            token_ids,
            segments,
            language=audio.language,
            num_tokens=audio.num_sampled,
            finished=finished,
            num_prompt_tokens=audio.num_prompt_tokens,
        )

    def _end_window(self, audio: _AudioRequest) -> TranscriptDelta:
        stretches, num_frames = split_window(
            audio.token_ids,
            spec=self._spec,
            start_frame=audio.seek,
            num_frames=min(self._spec.window_frames, audio.num_frames - audio.seek),
        )
        kept = sum(len(each.token_ids) for each in stretches)
        segments = tuple(
            TranscribedTokens(
                start=each.start,
                end=each.end,
                token_ids=self._text(each.token_ids),
                seek=audio.seek,
                temperature=audio.request.params.temperature,
                avg_logprob=sum(audio.logprobs) / len(audio.logprobs),
                no_speech_prob=audio.no_speech_prob,
            )
            for each in stretches
        )
        shown = self._text(audio.token_ids[audio.num_shown : kept])
        audio.seek += num_frames
        audio.token_ids, audio.num_shown, audio.logprobs, audio.open = [], 0, [], False
        finished = audio.seek >= audio.num_frames or _has_said_all(audio)
        if finished:
            self._remove(audio)
        return self._delta(audio, shown, segments, finished=finished)

    def _text(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Those that are text; all special tokens and timestamps come after it in the vocabulary."""
        return tuple(token for token in token_ids if token < self._spec.eos_token_id)

    # --- what can be seen ------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request, or the worker still keeps something of one that has ended."""
        return bool(self._requests or self._forget)

    @property
    def num_running(self) -> int:
        """Requests that the decoder keeps something of."""
        return len(self._running)


def _admission(audio: _AudioRequest) -> SpeechAdmission:
    request = audio.request
    return SpeechAdmission(request.request_id, request.pcm, request.params, audio.pad)


def _has_said_all(audio: _AudioRequest) -> bool:
    limit = audio.request.params.max_tokens
    return limit is not None and audio.num_taken >= limit
