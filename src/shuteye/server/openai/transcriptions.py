"""POST /v1/audio/transcriptions: the form, the five formats of an answer, and the events of a stream.

SRT and WebVTT as OpenAI writes them; WebVTT's standard is https://www.w3.org/TR/webvtt1/.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request, Response, UploadFile
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect

from shuteye.audio import SAMPLE_BYTES, SAMPLE_RATE, decode
from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.run import first_of
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.http.answers import JsonAnswer, encode_json
from shuteye.server.http.errors import ClientDisconnected, invalid_request
from shuteye.server.http.events import EventStream, event, until_disconnect
from shuteye.tasks.base import OutputKind
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription, TranscriptSegment

ResponseFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]

MEDIA_TYPES: Mapping[str, str] = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "text/plain; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}
STREAMABLE = ("json", "text")

UNSUPPORTED = frozenset(
    {
        "chunking_strategy", "include", "keywords", "known_speaker_names", "known_speaker_references", "languages",
        "to_language", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "max_completion_tokens", "stream_include_usage", "stream_continuous_usage_stats", "vllm_xargs",
    }
)  # fmt: skip
"""Fields of OpenAI's API, and of vLLM's, that would change the answer."""

_LISTS = frozenset({"timestamp_granularities"})


class TranscriptionForm(BaseModel):
    """The form's fields; None means that the caller did not say."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    file: UploadFile
    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: ResponseFormat = "json"
    temperature: float = Field(default=0.0, ge=0.0, le=1.0)
    timestamp_granularities: list[Literal["segment", "word"]] | None = None
    stream: bool = False
    seed: int = Field(default=0, ge=0, lt=2**63)
    user: str | None = None

    @field_validator("file", mode="before")
    @classmethod
    def _is_a_file(cls, value: object) -> object:
        if isinstance(value, str):
            raise InvalidRequest("file must be an uploaded file (a part with a file name), got text.", param="file")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TranscriptionForm:
        wanted = self.timestamp_granularities or []
        if "word" in wanted:
            raise InvalidRequest(
                "Timestamps of words are not supported by this server; ask for 'segment'.",
                param="timestamp_granularities[]",
            )
        if wanted and self.response_format != "verbose_json":
            raise InvalidRequest(
                f"timestamp_granularities[] needs response_format 'verbose_json', got {self.response_format!r}.",
                param="timestamp_granularities[]",
            )
        if self.stream and self.response_format not in STREAMABLE:
            raise InvalidRequest(
                f"stream needs response_format 'json' or 'text', got {self.response_format!r}: the others are known "
                "only at the end.",
                param="response_format",
            )
        return self

    @classmethod
    def of(cls, fields: Mapping[str, list[Any]]) -> TranscriptionForm:
        """Validate the parts of a form, by name without `[]`; an empty text is as good as none.

        Raises:
            InvalidRequest: a field is unknown, not supported, given twice, or has a bad value; `param` names it.
        """
        given = {name: values for name, values in fields.items() if values != [""]}
        for name, values in given.items():
            if name in UNSUPPORTED:
                raise InvalidRequest(
                    f"'{name}' is not supported by this server. Remove it from the request.", param=name
                )
            if len(values) > 1 and name not in _LISTS:
                raise InvalidRequest(f"Field '{name}' is given {len(values)} times.", param=name)
        try:
            return cls.model_validate({name: each if name in _LISTS else each[0] for name, each in given.items()})
        except ValidationError as error:
            raise invalid_request([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error

    @property
    def params(self) -> TranscribeParams:
        """What the engine is asked for; the formats that show times need them."""
        return TranscribeParams(
            language=self.language,
            temperature=self.temperature,
            seed=self.seed,
            timestamps=self.response_format not in STREAMABLE,
        )


FORM_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "wav, flac, mp3 or ogg (Vorbis, Opus)."},
        "model": {"type": "string"},
        "language": {"type": "string", "description": "ISO 639-1 code or English name of what is spoken."},
        "prompt": {"type": "string", "description": "Taken for the text before the audio."},
        "response_format": {"type": "string", "enum": list(MEDIA_TYPES), "default": "json"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1, "default": 0},
        "timestamp_granularities[]": {"type": "array", "items": {"enum": ["segment"]}},
        "stream": {"type": "boolean", "default": False},
        "seed": {"type": "integer", "minimum": 0},
        "user": {"type": "string"},
    },
}
"""The form in the OpenAPI document."""


# --- answers ------------------------------------------------------------------------------------


class DurationUsage(Struct, kw_only=True):
    """What the audio counts for: its length in whole seconds."""

    type: Literal["duration"] = "duration"
    seconds: int


class TranscriptionAnswer(Struct):
    """Answer of POST /v1/audio/transcriptions; `verbose_json` has more, the other formats are text."""

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

    task: Literal["transcribe"] = "transcribe"
    language: str | None
    duration: float
    text: str
    segments: list[SegmentAnswer]
    usage: DurationUsage


class TextDelta(Struct, tag_field="type", tag="transcript.text.delta"):
    """New text of a stream."""

    delta: str


class TextDone(Struct, tag_field="type", tag="transcript.text.done"):
    """The end of a stream: the whole text again."""

    text: str
    usage: DurationUsage


def _answer(found: Transcription, response_format: ResponseFormat) -> Response:
    """A finished transcript in the wanted format."""
    match response_format:
        case "json":
            return JsonAnswer(TranscriptionAnswer(found.text, _usage(found)))
        case "verbose_json":
            segments = [_segment(each) for each in found.segments]
            return JsonAnswer(
                VerboseAnswer(
                    language=found.language,
                    duration=found.duration,
                    text=found.text,
                    segments=segments,
                    usage=_usage(found),
                )
            )
        case "text":
            text = f"{found.text}\n"
        case "srt":
            text = "".join(f"{index}\n{_cue(each, ',')}\n\n" for index, each in enumerate(found.segments, start=1))
        case "vtt":
            text = "WEBVTT\n\n" + "".join(f"{_cue(each, '.')}\n\n" for each in found.segments)
    return Response(text, media_type=MEDIA_TYPES[response_format])


def _usage(found: Transcription) -> DurationUsage:
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


router = APIRouter(route_class=ModelRoute)

_MULTIPART = "multipart/form-data"
_DOCUMENTED = {"requestBody": {"required": True, "content": {_MULTIPART: {"schema": FORM_SCHEMA}}}}


@dataclass(frozen=True, slots=True)
class _Job:
    """One piece of audio as the engine takes it."""

    pcm: bytes
    params: TranscribeParams
    prompt: str | None


@router.post("/v1/audio/transcriptions", response_model=None, openapi_extra=_DOCUMENTED)
async def transcriptions(request: Request, context: Context) -> Response:
    """Writes down what is said in an audio file, whole or streamed."""
    require_task(context, "transcribe", request.url.path)
    form = await _read_form(request)
    try:
        context.served_name(form.model)
        job = await until_disconnect(request.receive, _decoded(form, context))
    finally:
        await form.file.close()
    if form.stream:
        steps = _run(context, job, "delta")
        first = await until_disconnect(request.receive, first_of(steps))
        return EventStream(_events(first, steps), source=steps, with_done=True)
    found = await until_disconnect(request.receive, _last(_run(context, job, "final_only")))
    return _answer(found, form.response_format)


async def _read_form(request: Request) -> TranscriptionForm:
    """The validated form.

    Raises:
        InvalidRequest: no form, or a wrong one.
        ClientDisconnected: the client went before it was whole.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith(_MULTIPART):
        raise InvalidRequest(f"The body must be {_MULTIPART} with the audio as 'file', got {kind or 'no type'!r}.")
    try:
        form = await request.form(max_files=1, max_fields=100)
    except ClientDisconnect:
        raise ClientDisconnected from None
    try:
        return TranscriptionForm.of(_fields_of(form))
    except BaseException:
        await form.close()
        raise


def _fields_of(form: FormData) -> dict[str, list[object]]:
    """Values by field; clients write lists as `name[]`."""
    fields: dict[str, list[object]] = {}
    for name, value in form.multi_items():
        fields.setdefault(name.removesuffix("[]"), []).append(value)
    return fields


async def _decoded(form: TranscriptionForm, context: ServerContext) -> _Job:
    file = await form.file.read()
    pcm = await asyncio.to_thread(decode, file, max_seconds=context.config.max_audio_s)
    return _Job(pcm, form.params, form.prompt)


async def _run(context: ServerContext, job: _Job, output_kind: OutputKind) -> AsyncGenerator[Transcription, None]:
    """The engine's outputs, timed; closing it aborts the request."""
    outputs = context.engine.transcribe(
        job.pcm, job.params, prompt=job.prompt, request_id=None, output_kind=output_kind
    )
    seconds = len(job.pcm) / SAMPLE_BYTES / SAMPLE_RATE
    with (
        context.metrics.request() as timer,
        context.audio.holding(seconds, limit_s=context.config.max_waiting_audio_s),
    ):
        async with aclosing(outputs):
            async for output in outputs:
                if output.finished:
                    timer.finish(num_prompt_tokens=0)
                yield output


async def _last(outputs: AsyncGenerator[Transcription, None]) -> Transcription:
    async with aclosing(outputs):
        async for output in outputs:
            if output.finished:
                return output
    raise AssertionError("the engine ended a request without its last output")


async def _events(first: Transcription, rest: AsyncGenerator[Transcription, None]) -> AsyncGenerator[bytes, None]:
    texts: list[str] = []
    output: Transcription | None = first
    while output is not None:
        if output.text:
            texts.append(output.text)
            yield event(encode_json(TextDelta(output.text)))
        if output.finished:
            yield event(encode_json(TextDone("".join(texts), _usage(output))))
        output = await anext(rest, None)
