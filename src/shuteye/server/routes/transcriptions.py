"""POST /v1/audio/transcriptions.

Knows nothing of models, nor of how answers are written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect

from shuteye.audio import SAMPLE_BYTES, SAMPLE_RATE, decode
from shuteye.errors import InvalidRequest
from shuteye.outputs import Transcription
from shuteye.request import OutputKind, TranscribeParams
from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.context import Context, ServerContext
from shuteye.server.disconnect import until_disconnect
from shuteye.server.errors import ClientDisconnected
from shuteye.server.generation import started
from shuteye.server.protocol.chunks import encode_json
from shuteye.server.protocol.transcription import (
    FORM_SCHEMA,
    MEDIA_TYPES,
    TranscriptionForm,
    delta_event,
    done_event,
    written,
)
from shuteye.server.sse import EventStream, event, until_done

router = APIRouter(route_class=ModelRoute)

_MULTIPART = "multipart/form-data"
_DOCUMENTED = {"requestBody": {"required": True, "content": {_MULTIPART: {"schema": FORM_SCHEMA}}}}


@dataclass(frozen=True, slots=True)
class _Job:
    """One recording as the engine takes it."""

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
        steps = await until_disconnect(request.receive, started(_run(context, job, "delta")))
        return EventStream(until_done(_events(steps)), source=steps)
    found = await until_disconnect(request.receive, _last(_run(context, job, "final_only")))
    answer = written(found, form.response_format)
    content = answer.encode() if isinstance(answer, str) else encode_json(answer)
    return Response(content, media_type=MEDIA_TYPES[form.response_format])


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
    outputs = cast(  # the engine promises an iterator that can be closed, which aborts
        "AsyncGenerator[Transcription, None]",
        context.engine.transcribe(job.pcm, job.params, prompt=job.prompt, request_id=None, output_kind=output_kind),
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


async def _events(steps: AsyncIterator[Transcription]) -> AsyncGenerator[bytes, None]:
    texts: list[str] = []
    async for output in steps:
        if output.text:
            texts.append(output.text)
            yield event(encode_json(delta_event(output.text)))
        if output.finished:
            yield event(encode_json(done_event("".join(texts), output)))
