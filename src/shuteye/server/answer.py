"""Carries one generation from steps to bytes: all at once, or as a stream of events.

Knows nothing of OpenAI's shapes; a `Shape` writes them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, Protocol
from uuid import uuid4

from fastapi import Request, Response

from shuteye.errors import InternalError, ShuteyeError
from shuteye.outputs import CompletionOutput
from shuteye.server.context import ServerContext
from shuteye.server.disconnect import until_disconnect
from shuteye.server.errors import error_json
from shuteye.server.generation import Job, Step, run, started
from shuteye.server.protocol.chunks import ChunkWriter, encode_json
from shuteye.server.protocol.transcript import Transcript
from shuteye.server.protocol.usage import Usage
from shuteye.server.sse import DONE, EventStream, event


class Shape(Protocol):
    """How one route writes its answers; `index` numbers choices over all prompts."""

    @property
    def whole_object(self) -> str:
        """`object` of a whole answer."""
        ...

    @property
    def chunk_object(self) -> str:
        """`object` of a chunk."""
        ...

    def whole(self, index: int, transcript: Transcript) -> dict[str, Any]:
        """A finished choice."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """A streamed choice's first chunk, if it needs one before any text."""
        ...

    def delta(self, index: int, delta: CompletionOutput) -> dict[str, Any]:
        """What is new of a streamed choice."""
        ...


def new_request_id(prefix: str) -> str:
    """An id in OpenAI's style, as `cmpl-` or `chatcmpl-` and 32 hexadecimal digits."""
    return f"{prefix}-{uuid4().hex}"


async def answer_whole(request: Request, context: ServerContext, job: Job, *, shape: Shape, model: str) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused or failed.
    """
    usage = Usage.of(job)
    transcripts = await until_disconnect(request.receive, _collect(context, job, usage))
    choices = [shape.whole(index, transcripts[index]) for index in sorted(transcripts)]
    body = _envelope(job, shape.whole_object, model) | {"choices": choices, "usage": usage.as_dict()}
    return Response(encode_json(body), media_type="application/json")


async def _collect(context: ServerContext, job: Job, usage: Usage) -> dict[int, Transcript]:
    transcripts: dict[int, Transcript] = defaultdict(Transcript)
    async with aclosing(run(context, job)) as steps:
        async for prompt_index, output in steps:
            usage.add(prompt_index, output)
            for completion in output.outputs:
                transcripts[prompt_index * job.params.n + completion.index].add(completion)
    return transcripts


async def answer_stream(
    request: Request, context: ServerContext, job: Job, *, shape: Shape, model: str, include_usage: bool
) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = await until_disconnect(request.receive, started(run(context, job)))
    writer = ChunkWriter(_envelope(job, shape.chunk_object, model), include_usage=include_usage)
    return EventStream(_events(steps, job, shape=shape, writer=writer), source=steps)


def _envelope(job: Job, kind: str, model: str) -> dict[str, Any]:
    return {"id": job.request_id, "object": kind, "created": int(time.time()), "model": model}


async def _events(
    steps: AsyncIterator[Step], job: Job, *, shape: Shape, writer: ChunkWriter
) -> AsyncGenerator[bytes, None]:
    usage = Usage.of(job)
    opened: set[int] = set()
    try:
        async for prompt_index, output in steps:
            usage.add(prompt_index, output)
            for completion in output.outputs:
                index = prompt_index * job.params.n + completion.index
                for choice in _choices(shape, index, completion, opened):
                    yield writer.choice(choice)
        if writer.include_usage:
            yield writer.usage(usage)
    except ShuteyeError as error:
        yield event(error_json(error))
    except Exception:
        yield event(error_json(InternalError("Internal server error: a bug of ours; the server's log has more.")))
        yield DONE
        raise
    yield DONE


def _choices(shape: Shape, index: int, completion: CompletionOutput, opened: set[int]) -> Iterator[dict[str, Any]]:
    if index not in opened:
        opened.add(index)
        opening = shape.opening(index)
        if opening is not None:
            yield opening
    if completion.text or completion.logprobs or completion.finish_reason is not None:
        yield shape.delta(index, completion)
