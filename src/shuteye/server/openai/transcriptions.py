"""POST /v1/audio/transcriptions and /v1/audio/translations: speech in, text out, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect

from shuteye.audio import SAMPLE_BYTES, SAMPLE_RATE, decode
from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.run import first_of
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.http.errors import ClientDisconnected
from shuteye.server.http.events import EventStream, until_disconnect
from shuteye.server.http.model_choice import FORM_LIMITS
from shuteye.server.openai.speech_form import FORM_SCHEMA, SpeechForm
from shuteye.server.openai.transcript_events import TranscriptEvents
from shuteye.server.openai.transcripts import SpeechTask, transcript
from shuteye.tasks.base import OutputKind
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription

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
    return await _written_down(request, context, "transcribe")


@router.post("/v1/audio/translations", response_model=None, openapi_extra=_DOCUMENTED)
async def translations(request: Request, context: Context) -> Response:
    """Writes down in English what is said in an audio file, whole or streamed."""
    return await _written_down(request, context, "translate")


async def _written_down(request: Request, context: ServerContext, task: SpeechTask) -> Response:
    require_task(context, "transcribe", request.url.path)
    form = await _read_form(request)
    try:
        model = context.served_name(form.model)
        job = await until_disconnect(request.receive, _decoded(form, context, task))
    finally:
        await form.file.close()
    if form.stream:
        steps = _run(context, job, "delta")
        first = await until_disconnect(request.receive, first_of(steps))
        events = TranscriptEvents(
            new_request_id("trsc" if task == "transcribe" else "trsl"),
            model,
            tokens_at_end=form.stream_include_usage or context.config.enable_force_include_usage,
            tokens_everywhere=form.stream_include_usage and form.stream_continuous_usage_stats,
        )
        return EventStream(events.of(first, steps), source=steps, with_done=True)
    found = await until_disconnect(request.receive, _last(_run(context, job, "final_only")))
    return transcript(found, form.response_format, task)


async def _read_form(request: Request) -> SpeechForm:
    """The validated form.

    Raises:
        InvalidRequest: no form, or a wrong one.
        ClientDisconnected: the client went before it was whole.
    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith(_MULTIPART):
        raise InvalidRequest(f"The body must be {_MULTIPART} with the audio as 'file', got {kind or 'no type'!r}.")
    try:
        form = await request.form(**FORM_LIMITS)
    except ClientDisconnect:
        raise ClientDisconnected from None
    try:
        return SpeechForm.of(_fields_of(form))
    except BaseException:
        await form.close()
        raise


def _fields_of(form: FormData) -> dict[str, list[object]]:
    """Values by field; clients write lists as `name[]`."""
    fields: dict[str, list[object]] = {}
    for name, value in form.multi_items():
        fields.setdefault(name.removesuffix("[]"), []).append(value)
    return fields


async def _decoded(form: SpeechForm, context: ServerContext, task: SpeechTask) -> _Job:
    params = form.params(task)
    file = await form.file.read()
    pcm = await asyncio.to_thread(decode, file, max_seconds=context.config.max_audio_s)
    return _Job(pcm, params, form.prompt)


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
