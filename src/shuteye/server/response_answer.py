"""Carries one response from steps to bytes: all at once, or as a stream of OpenAI's typed events.

Knows nothing of the request beyond what a response repeats of it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from shuteye.errors import InternalError, ShuteyeError
from shuteye.outputs import CompletionOutput, FinishReason
from shuteye.server.chat_job import ChatJob
from shuteye.server.context import ServerContext
from shuteye.server.disconnect import until_disconnect
from shuteye.server.generation import Step, run, started
from shuteye.server.protocol.chunks import encode_json
from shuteye.server.protocol.response_items import Event, ResponseItems
from shuteye.server.protocol.usage import Usage
from shuteye.server.reading.pieces import Reasoning
from shuteye.server.sse import EventStream

_ABORTED = "The request was aborted before it was finished, as when the model is put to sleep with mode=abort."


class ResponseAnswer:
    """One response on its way.

    Args:
        about: what the response repeats of its request.
    """

    def __init__(self, chat: ChatJob, about: dict[str, Any], *, one_call: bool) -> None:
        self._chat = chat
        self._about = about
        self._reader = chat.reading.reader()
        self._items = ResponseItems(one_call=one_call)
        self._usage = Usage.of(chat.job)
        self._num_reasoning_tokens = 0
        self._created_at = int(time.time())
        self._finish_reason: FinishReason | None = None

    def take(self, step: Step) -> Iterator[Event]:
        """What a step adds."""
        prompt_index, output = step
        self._usage.add(prompt_index, output)
        for completion in output.outputs:
            yield from self._take_completion(completion)

    def _take_completion(self, completion: CompletionOutput) -> Iterator[Event]:
        pieces = self._reader.feed(completion.text)
        if any(isinstance(piece, Reasoning) for piece in pieces):
            self._num_reasoning_tokens += len(completion.token_ids)
        if completion.finish_reason is not None:
            pieces += self._reader.finish()
            self._finish_reason = completion.finish_reason
        yield from self._items.add(pieces)
        if completion.finish_reason is not None:
            yield from self._items.finish("completed" if completion.finish_reason == "stop" else "incomplete")

    def body(self, error: ShuteyeError | None = None) -> dict[str, Any]:
        """The response as it stands."""
        status = "failed" if error else _status(self._finish_reason)
        message = error.message if error else _ABORTED
        return {
            "id": self._chat.job.request_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "error": {"code": "server_error", "message": message} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.items,
            "usage": self._usage_json() if status in {"completed", "incomplete"} else None,
            **self._about,
        }

    def _usage_json(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": sum(usage.cached_tokens.values()), "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _status(reason: FinishReason | None) -> str:
    if reason is None:
        return "in_progress"
    return {"stop": "completed", "length": "incomplete", "abort": "failed"}[reason]


async def answer_response(request: Request, context: ServerContext, chat: ChatJob, answer: ResponseAnswer) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused or failed.
    """
    await until_disconnect(request.receive, _collect(context, chat, answer))
    return Response(encode_json(answer.body()), media_type="application/json")


async def _collect(context: ServerContext, chat: ChatJob, answer: ResponseAnswer) -> None:
    async with aclosing(run(context, chat.job)) as steps:
        async for step in steps:
            for _event in answer.take(step):
                pass


async def stream_response(request: Request, context: ServerContext, chat: ChatJob, answer: ResponseAnswer) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = await until_disconnect(request.receive, started(run(context, chat.job)))
    return EventStream(_frames(_events(steps, answer)), source=steps)


async def _frames(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    number = 0
    async with aclosing(events):
        async for kind, fields in events:
            payload = encode_json({"type": kind, "sequence_number": number, **fields})
            yield b"event: " + kind.encode() + b"\ndata: " + payload + b"\n\n"
            number += 1


async def _events(steps: AsyncIterator[Step], answer: ResponseAnswer) -> AsyncGenerator[Event, None]:
    yield "response.created", {"response": answer.body()}
    yield "response.in_progress", {"response": answer.body()}
    try:
        async for step in steps:
            for event in answer.take(step):
                yield event
    except ShuteyeError as error:
        yield "response.failed", {"response": answer.body(error)}
    except Exception:
        bug = InternalError("Internal server error: a bug of ours; the server's log has more.")
        yield "response.failed", {"response": answer.body(bug)}
        raise
    else:
        body = answer.body()
        yield f"response.{body['status']}", {"response": body}
