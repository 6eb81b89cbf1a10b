"""Transcripts as answers: JSON with and without times, text, and subtitles.

SRT and WebVTT as OpenAI writes them; WebVTT's standard is https://www.w3.org/TR/webvtt1/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from fastapi import Response
from msgspec import UNSET, Struct, UnsetType

from shuteye.server.http.answers import JsonAnswer
from shuteye.server.openai.speech_form import ResponseFormat
from shuteye.tasks.transcribe.requests import Transcription, TranscriptSegment

SpeechTask = Literal["transcribe", "translate"]

MEDIA_TYPES: Mapping[str, str] = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "text/plain; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}


class DurationUsage(Struct, kw_only=True):
    """What the audio counts for: its length in whole seconds; in a stream that is asked for them, the tokens, too."""

    type: Literal["duration"] = "duration"
    seconds: int
    prompt_tokens: int | UnsetType = UNSET
    completion_tokens: int | UnsetType = UNSET
    total_tokens: int | UnsetType = UNSET


class TranscriptionAnswer(Struct):
    """Answer in `json`; `verbose_json` has more, the other formats are text."""

    text: str
    usage: DurationUsage


class SegmentAnswer(Struct):
    """A piece of the transcript, with times in seconds."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: Sequence[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseAnswer(Struct, kw_only=True):
    """The same with times, for `verbose_json`."""

    task: Literal["transcribe", "translate"]
    language: str | None
    duration: float
    text: str
    segments: list[SegmentAnswer]
    usage: DurationUsage


def transcript(found: Transcription, response_format: ResponseFormat, task: SpeechTask) -> Response:
    """A finished transcript in the wanted format; a translation is in English."""
    match response_format:
        case "json":
            return JsonAnswer(TranscriptionAnswer(found.text, duration_of(found)))
        case "verbose_json":
            segments = [_segment(each) for each in found.segments]
            return JsonAnswer(
                VerboseAnswer(
                    task=task,
                    language="en" if task == "translate" else found.language,
                    duration=found.duration,
                    text=found.text,
                    segments=segments,
                    usage=duration_of(found),
                )
            )
        case "text":
            text = f"{found.text}\n"
        case "srt":
            text = "".join(f"{index}\n{_cue(each, ',')}\n\n" for index, each in enumerate(found.segments, start=1))
        case "vtt":
            text = "WEBVTT\n\n" + "".join(f"{_cue(each, '.')}\n\n" for each in found.segments)
    return Response(text, media_type=MEDIA_TYPES[response_format])


def duration_of(found: Transcription) -> DurationUsage:
    """How long the audio is."""
    return DurationUsage(seconds=math.ceil(found.duration))


def _segment(segment: TranscriptSegment) -> SegmentAnswer:
    return SegmentAnswer(
        id=segment.id,
        seek=segment.seek,
        start=round(segment.start, 2),
        end=round(segment.end, 2),
        text=segment.text,
        tokens=segment.token_ids,
        temperature=segment.temperature,
        avg_logprob=segment.avg_logprob,
        compression_ratio=segment.compression_ratio,
        no_speech_prob=segment.no_speech_prob,
    )


def _cue(segment: TranscriptSegment, point: str) -> str:
    """A subtitle: when, and what. An arrow in the text would be taken for another cue's times."""
    text = segment.text.strip().replace("-->", "->")
    return f"{_clock(segment.start, point)} --> {_clock(segment.end, point)}\n{text}"


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
