"""Leads recordings through windows, token by token: which window is opened next, what its tokens give.

Knows nothing of tensors, text or sleep: samples and `SpeechResult` in, `SpeechPlan` and `TranscriptDelta` out.

A step opens at most one window (the encoder's pass is the long part) and takes one token of every window that is open,
so nobody waits for another's recording. A request that was preempted hears its window again, given the tokens it had.

    frames   [0 ........ seek) [seek ........ num_frames)
              transcribed       this window, and later ones
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from shuteye.errors import ErrorInfo, InvalidRequest
from shuteye.model_info import WhisperSpec
from shuteye.state import Epoch, SchedulerStats
from shuteye.tasks.base import RequestDelta
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
class _AudioRequest:
    """A request on its way.

    Attributes:
        num_frames: how much there is to hear; the whole window if `pad`.
        prompt: what stands before the tokens of every window; None until the language is known.
        token_ids: sampled in this window.
        num_shown: how many of them were given out.
        drawn: tokens sampled in all windows.
        admitted: the worker has the recording. `known`: it may have some of it. `open`: it has this window.
        attempt: raised by a preemption; what is on its way for an earlier one is ignored.
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
    admitted: bool = False
    known: bool = False
    open: bool = False
    attempt: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id


class SpeechScheduler:
    """First come, first served, up to `max_num_seqs` recordings at a time; see `TaskScheduler`.

    Args:
        facts: the model's.
        max_num_seqs: recordings of which the decoder may keep something.
        available_bytes: memory left after loading, which bounds them too.
    """

    def __init__(self, *, facts: WhisperSpec | None, max_num_seqs: int, available_bytes: int) -> None:
        assert facts is not None, "a model that transcribes says how"
        self._facts = facts
        names = reversed(facts.language_names.items())  # the first name of a language is the usual one
        self._names: dict[str | None, str] = {code: name for name, code in names}
        self._limit = max(1, min(max_num_seqs, int(available_bytes * MEMORY_SHARE) // facts.state_bytes))
        self._recordings: dict[str, _AudioRequest] = {}
        self._waiting: deque[_AudioRequest] = deque()
        self._running: list[_AudioRequest] = []
        self._forget: list[str] = []
        self._in_flight: tuple[SpeechPlan, tuple[tuple[_AudioRequest, int], ...]] | None = None
        self._epoch: Epoch = ()
        self._num_prompt_tokens = 0
        self._num_tokens = 0
        self._num_preemptions = 0

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: TranscribeRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: the audio is too short or broken, the language unknown, or the id in use.
        """
        self.check(request)
        facts, num_samples = self._facts, len(request.pcm) // SAMPLE_BYTES
        fits = num_samples <= facts.window_frames * facts.hop_samples
        pad = fits and not request.params.timestamps
        language = self._language(request.params.language)
        recording = _AudioRequest(
            request=request,
            num_frames=facts.window_frames if pad else num_samples // facts.hop_samples,
            pad=pad,
            rules="text" if pad else "timestamps",
            prompt=None,
            language=language,
        )
        if language is not None:
            recording.prompt = self._prompt(recording, language)
        self._recordings[request.request_id] = recording
        self._waiting.append(recording)

    def check(self, request: TranscribeRequest) -> None:
        """Refuse what can never run; raises as `add` does, and changes nothing."""
        if request.request_id in self._recordings:
            raise InvalidRequest(
                f"Request id {request.request_id!r} is in use; wait for it to end or choose another.",
                param="request_id",
            )
        if len(request.pcm) % SAMPLE_BYTES:
            raise InvalidRequest(f"The audio is {len(request.pcm)} bytes, not a whole number of samples.", param="file")
        num_samples = len(request.pcm) // SAMPLE_BYTES
        if num_samples < MIN_SAMPLES:
            raise InvalidRequest(
                f"The audio has {num_samples} samples; at least {MIN_SAMPLES} (0.1 seconds) are needed.", param="file"
            )
        if any(token >= self._facts.eos_token_id for token in request.prompt_token_ids):
            raise InvalidRequest("The prompt must be plain text; it has special tokens.", param="prompt")
        self._language(request.params.language)

    def _language(self, wanted: str | None) -> str | None:
        """The code of a language; None if the model is to find out.

        Raises:
            InvalidRequest: the model does not know it.
        """
        facts = self._facts
        known = facts.languages or {ENGLISH: 0}
        if wanted is None:
            return None if facts.languages else ENGLISH
        code = facts.language_names.get(wanted.lower(), wanted.lower())
        if code not in known:
            what = "is English-only" if not facts.languages else f"knows {', '.join(sorted(known))}"
            raise InvalidRequest(f"The model does not transcribe {wanted!r}; it {what}.", param="language")
        return code

    def _prompt(self, recording: _AudioRequest, language: str) -> tuple[int, ...]:
        """What Whisper was trained to continue: [previous text] start [language, task] [no timestamps]."""
        facts = self._facts
        tokens: list[int] = []
        before = recording.request.prompt_token_ids
        if before and facts.previous_token_id is not None:
            tokens += [facts.previous_token_id, *before[-(facts.max_tokens // 2 - 1) :]]
        tokens.append(facts.start_token_id)
        if facts.languages:
            assert facts.transcribe_token_id is not None
            tokens += [facts.languages[language], facts.transcribe_token_id]
        if recording.rules == "text":
            tokens.append(facts.no_timestamps_token_id)
        return tuple(tokens)

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End requests with reason "abort"; ids not known are ignored."""
        found = [self._recordings[request_id] for request_id in request_ids if request_id in self._recordings]
        for recording in dict.fromkeys(found):
            self._remove(recording)
        return [RequestDelta(each.request_id, finish_reason="abort") for each in dict.fromkeys(found)]

    def abort_all(self) -> list[RequestDelta]:
        """Abort every request, in order of arrival."""
        return self.abort(list(self._recordings))

    def preempt_all(self) -> int:
        """Send every running request back to the head of the queue; its tokens stay, its window is heard again."""
        count = len(self._running)
        for recording in reversed(self._running):
            recording.admitted = recording.open = False
            recording.attempt += 1
            self._waiting.appendleft(recording)
        self._running.clear()
        self._num_preemptions += count
        return count

    def reset_prefix_cache(self) -> None:
        """Nothing is kept between requests."""

    def enter_epoch(self, epoch: Epoch) -> None:
        """If it is another one, preempt every request."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.preempt_all()

    def _remove(self, recording: _AudioRequest) -> None:
        del self._recordings[recording.request_id]
        if recording in self._running:
            self._running.remove(recording)
        else:
            self._waiting.remove(recording)
        if recording.known:
            self._forget.append(recording.request_id)

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> SpeechPlan | None:
        """The next step, or None if there is nothing to do; it may be only to forget those that have ended."""
        assert self._in_flight is None, "schedule() before update() or fail_step() of the previous plan"
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
        self._in_flight = (plan, tuple((each, each.attempt) for each in [*opening, *stepping]))
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

    def _window(self, recording: _AudioRequest) -> SpeechWindow:
        facts = self._facts
        num_frames = min(facts.window_frames, recording.num_frames - recording.seek)
        finds_language = recording.prompt is None
        prompt = recording.prompt or (facts.start_token_id,)
        self._num_prompt_tokens += len(prompt)
        return SpeechWindow(
            request_id=recording.request_id,
            start_frame=recording.seek,
            num_frames=num_frames,
            prompt_token_ids=prompt,
            rules="language" if finds_language else recording.rules,
            token_ids=tuple(recording.token_ids),
            num_sampled=recording.num_sampled,
        )

    # --- its outcome -----------------------------------------------------------------------------

    def update(self, plan: SpeechPlan, result: SpeechResult) -> list[TranscriptDelta]:
        """Take the step's tokens; a delta per request for which something is new."""
        deltas = []
        for (recording, attempt), token in zip(self._land(plan), result.tokens, strict=True):
            if recording.request_id not in self._recordings or recording.attempt != attempt:
                continue  # aborted or preempted while the step ran
            assert token.request_id == recording.request_id, "results are not in the order of the plan"
            delta = self._advance(recording, token)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def fail_step(self, plan: SpeechPlan, error: ErrorInfo) -> list[RequestDelta]:
        """The step was not computed: end its requests with `error`."""
        found = [each for each, _ in self._land(plan) if each.request_id in self._recordings]
        for recording in found:
            self._remove(recording)
        return [RequestDelta(each.request_id, error=error) for each in found]

    def _land(self, plan: SpeechPlan) -> tuple[tuple[_AudioRequest, int], ...]:
        assert self._in_flight is not None, "the outcome of a plan that is not in flight"
        assert self._in_flight[0] is plan, "the outcome of a plan that is not in flight"
        (_, taking_part), self._in_flight = self._in_flight, None
        return taking_part

    def _advance(self, recording: _AudioRequest, token: TranscribedToken) -> TranscriptDelta | None:
        recording.num_sampled += 1
        self._num_tokens += 1
        if recording.prompt is None:
            return self._take_language(recording, token)
        if not recording.logprobs:
            recording.no_speech_prob = token.no_speech_prob
        recording.logprobs.append(token.logprob)
        recording.open = True
        ends = token.token_id == self._facts.eos_token_id
        if not ends:
            recording.token_ids.append(token.token_id)
            ends = len(recording.prompt) + len(recording.token_ids) >= self._facts.max_tokens
        if ends:
            return self._end_window(recording)
        return self._show(recording, self._num_final(recording))

    def _take_language(self, recording: _AudioRequest, token: TranscribedToken) -> TranscriptDelta:
        by_token = {token_id: code for code, token_id in self._facts.languages.items()}
        recording.language = by_token[token.token_id]
        recording.prompt = self._prompt(recording, recording.language)
        return TranscriptDelta(
            recording.request_id, language=self._names.get(recording.language), num_tokens=recording.num_sampled
        )

    def _num_final(self, recording: _AudioRequest) -> int:
        """How many tokens of the window are sure to be kept."""
        if recording.rules == "text":
            return len(recording.token_ids)
        return num_final(recording.token_ids, self._facts.first_timestamp_id)

    def _show(self, recording: _AudioRequest, num_final: int) -> TranscriptDelta | None:
        """Give out what is new of the window's first `num_final` tokens."""
        fresh = recording.token_ids[recording.num_shown : max(num_final, recording.num_shown)]
        recording.num_shown += len(fresh)
        if not fresh and recording.num_sampled > 1:  # the first delta tells that the request runs
            return None
        return TranscriptDelta(
            recording.request_id,
            self._text(fresh),
            language=self._names.get(recording.language),
            num_tokens=recording.num_sampled,
        )

    def _end_window(self, recording: _AudioRequest) -> TranscriptDelta:
        stretches, num_frames = split_window(
            recording.token_ids,
            facts=self._facts,
            start_frame=recording.seek,
            num_frames=min(self._facts.window_frames, recording.num_frames - recording.seek),
        )
        kept = sum(len(each.token_ids) for each in stretches)
        segments = tuple(
            TranscribedTokens(
                start=each.start,
                end=each.end,
                token_ids=self._text(each.token_ids),
                seek=recording.seek,
                temperature=recording.request.params.temperature,
                avg_logprob=sum(recording.logprobs) / len(recording.logprobs),
                no_speech_prob=recording.no_speech_prob,
            )
            for each in stretches
        )
        shown = self._text(recording.token_ids[recording.num_shown : kept])
        recording.seek += num_frames
        recording.token_ids, recording.num_shown, recording.logprobs, recording.open = [], 0, [], False
        finished = recording.seek >= recording.num_frames
        if finished:
            self._remove(recording)
        return TranscriptDelta(
            recording.request_id,
            shown,
            segments,
            language=self._names.get(recording.language),
            num_tokens=recording.num_sampled,
            finished=finished,
        )

    def _text(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """Those that are text; all special tokens and timestamps come after it in the vocabulary."""
        return tuple(token for token in token_ids if token < self._facts.eos_token_id)

    # --- what can be seen ------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request, or the worker still keeps something of one that has ended."""
        return bool(self._recordings or self._forget)

    @property
    def num_running(self) -> int:
        """Requests that the decoder keeps something of."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun, or were preempted."""
        return len(self._waiting)

    def stats(self) -> SchedulerStats:
        """Gauges and counters; there are no blocks."""
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generation_tokens_total=self._num_tokens,
            num_preemptions_total=self._num_preemptions,
        )


def _admission(recording: _AudioRequest) -> SpeechAdmission:
    request = recording.request
    params = request.params
    return SpeechAdmission(request.request_id, request.pcm, params.temperature, params.seed, recording.pad)
