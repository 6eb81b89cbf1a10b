"""Turns what the engine did for audio into its transcripts: tokens become text, windows become segments."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from shuteye.audio import SAMPLE_BYTES, SAMPLE_RATE
from shuteye.errors import ErrorInfo
from shuteye.tasks.base import Delta, Deltas, Job, OutputKind, Processed, RequestDelta, TaskOutputs
from shuteye.tasks.transcribe.requests import (
    TranscribedTokens,
    TranscribeParams,
    TranscribeRequest,
    TranscriptDelta,
    Transcription,
    TranscriptSegment,
)
from shuteye.tokenizer import DecodeStream, Tokenizer
from shuteye.typed_fields import require_instance


@dataclass(frozen=True, slots=True)
class TranscriptionJob(Job[Transcription]):
    """Audio to transcribe.

    Attributes:
        pcm: samples as `shuteye.audio.decode` gives them.
        prompt: what is to be taken for the text before it.
        prompt_token_ids: the same, once it is prepared.
    """

    pcm: bytes
    params: TranscribeParams
    prompt: str | None = None
    output_kind: OutputKind = "cumulative"
    prompt_token_ids: tuple[int, ...] = ()

    @property
    def deltas(self) -> Deltas | None:
        """See `Job.deltas`."""
        return DELTAS if self.output_kind == "delta" else None


@dataclass(slots=True)
class _Transcript:
    """One request's. Lists grow; `num_*_sent` is how much of each was delivered as deltas."""

    request_id: str
    engine_id: str
    duration: float
    output_kind: OutputKind
    decoder: DecodeStream
    texts: list[str] = field(default_factory=list)
    segments: list[TranscriptSegment] = field(default_factory=list)
    language: str | None = None
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_texts_sent: int = 0
    num_segments_sent: int = 0


class TranscriptOutputs(TaskOutputs[TranscriptionJob]):
    """Follows jobs by their names in the engine. One per engine client.

    Args:
        why_aborted: the error that an aborted request ends with, asked for at that moment: half a transcript must not
            pass for a whole one.
    """

    def __init__(self, tokenizer: Tokenizer, *, why_aborted: Callable[[], ErrorInfo]) -> None:
        self._tokenizer = tokenizer
        self._why_aborted = why_aborted
        self._transcripts: dict[str, _Transcript] = {}
        self._by_engine_id: dict[str, _Transcript] = {}

    def prepare(self, job: TranscriptionJob) -> TranscriptionJob:
        """The job with its prompt as tokens.

        Raises:
            InvalidRequest: `params` are something else.
        """
        require_instance(job.params, TranscribeParams, param="params")
        if not job.prompt:
            return job
        before = self._tokenizer.encode(f" {job.prompt.strip()}", add_special_tokens=False)
        return replace(job, prompt_token_ids=tuple(before))

    def add(self, request_id: str, job: TranscriptionJob, *, engine_id: str) -> list[TranscribeRequest]:
        """Follow a prepared job; what to submit to the engine."""
        transcript = _Transcript(
            request_id=request_id,
            engine_id=engine_id,
            duration=len(job.pcm) / SAMPLE_BYTES / SAMPLE_RATE,
            output_kind=job.output_kind,
            decoder=self._tokenizer.decode_stream(),
        )
        self._transcripts[request_id] = self._by_engine_id[engine_id] = transcript
        return [TranscribeRequest(engine_id, job.pcm, job.prompt_token_ids, job.params)]

    def process(self, deltas: Iterable[Delta]) -> Processed:
        """Take what the engine did; deltas of requests that are not followed (any more) are ignored."""
        outputs: list[Transcription] = []
        errors: list[tuple[str, ErrorInfo]] = []
        for delta in deltas:
            transcript = self._by_engine_id.get(delta.request_id)
            if transcript is None:
                continue
            if isinstance(delta, TranscriptDelta):
                self._apply(transcript, delta)
                if delta.finished:
                    self.abort(transcript.request_id)
                if delta.finished or transcript.output_kind != "final_only":
                    outputs.append(_output(transcript, finished=delta.finished))
            else:
                self.abort(transcript.request_id)
                assert isinstance(delta, RequestDelta), "the delta of another kind of request"
                errors.append((transcript.request_id, delta.error or self._why_aborted()))
        return Processed(outputs=tuple(outputs), errors=tuple(errors))

    def abort(self, request_id: str) -> list[str]:
        """Stop following a request, if it is known; the engine-side ids to abort."""
        transcript = self._transcripts.pop(request_id, None)
        if transcript is None:
            return []
        del self._by_engine_id[transcript.engine_id]
        return [transcript.engine_id]

    def engine_ids(self, request_id: str) -> tuple[str, ...]:
        """The engine-side ids of a request; none if it is not known."""
        transcript = self._transcripts.get(request_id)
        return () if transcript is None else (transcript.engine_id,)

    # --- one delta -------------------------------------------------------------------------------

    def _apply(self, transcript: _Transcript, delta: TranscriptDelta) -> None:
        pieces = [transcript.decoder.step(token_id) or "" for token_id in delta.token_ids]
        if delta.finished:
            pieces.append(transcript.decoder.flush())
        text = "".join(pieces)
        if not any(transcript.texts):  # Whisper begins with a space
            text = text.lstrip()
        transcript.texts.append(text)
        transcript.language = delta.language or transcript.language
        transcript.num_tokens = delta.num_tokens
        transcript.num_prompt_tokens = delta.num_prompt_tokens
        for spoken in delta.segments:
            segment = self._segment(transcript, spoken)
            if segment.text.strip():
                transcript.segments.append(segment)

    def _segment(self, transcript: _Transcript, spoken: TranscribedTokens) -> TranscriptSegment:
        text = self._tokenizer.decode(spoken.token_ids)
        encoded = text.encode()
        return TranscriptSegment(
            id=len(transcript.segments),
            start=min(spoken.start, transcript.duration),
            end=min(spoken.end, transcript.duration),
            text=text,
            token_ids=spoken.token_ids,
            seek=spoken.seek,
            temperature=spoken.temperature,
            avg_logprob=spoken.avg_logprob,
            compression_ratio=len(encoded) / len(zlib.compress(encoded)),
            no_speech_prob=spoken.no_speech_prob,
        )


def _output(transcript: _Transcript, *, finished: bool) -> Transcription:
    """Everything so far, or what was not delivered yet, which is then marked as delivered."""
    since_text = since_segment = 0
    if transcript.output_kind == "delta":
        since_text, since_segment = transcript.num_texts_sent, transcript.num_segments_sent
        transcript.num_texts_sent, transcript.num_segments_sent = len(transcript.texts), len(transcript.segments)
    return Transcription(
        request_id=transcript.request_id,
        text="".join(transcript.texts[since_text:]),
        language=transcript.language,
        duration=transcript.duration,
        segments=tuple(transcript.segments[since_segment:]),
        num_tokens=transcript.num_tokens,
        finished=finished,
        num_prompt_tokens=transcript.num_prompt_tokens,
    )


def _joined(outputs: Sequence[Transcription]) -> Transcription:
    return replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        language=next((output.language for output in reversed(outputs) if output.language), None),
        segments=tuple(segment for output in outputs for segment in output.segments),
    )


def _num_entries(output: Transcription) -> int:
    return 1 + sum(len(segment.token_ids) for segment in output.segments)


DELTAS = Deltas(join=_joined, weigh=_num_entries)
