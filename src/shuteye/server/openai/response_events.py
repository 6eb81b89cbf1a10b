"""One response of /v1/responses, built piece by piece: its items, and the events that tell of them in OpenAI's order.

Knows nothing of the request beyond what a response repeats of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Literal
from uuid import uuid4

from fastapi import Request, Response

from shuteye.errors import InternalError, ShuteyeError
from shuteye.server.context import ServerContext
from shuteye.server.generation.chunks import Usage, encode_json
from shuteye.server.generation.run import PromptOutput, first_of, run
from shuteye.server.http.events import BUG, EventStream, until_disconnect
from shuteye.server.openai.conversation import ChatJob
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, Piece, Reasoning
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason

Event = tuple[str, dict[str, Any]]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponseItems:
    """Reasoning, message and calls, in the order in which they were begun; at most one is open.

    Args:
        one_call: calls after the first are left out.
    """

    def __init__(self, *, one_call: bool = False) -> None:
        self.items: list[dict[str, Any]] = []
        self._one_call = one_call
        self._open = False

    def add(self, pieces: Iterable[Piece]) -> Iterator[Event]:
        """Take pieces; the events that tell of them."""
        for piece in pieces:
            match piece:
                case Content(text):
                    yield from self._more_text(text, "message")
                case Reasoning(text):
                    yield from self._more_text(text, "reasoning")
                case CallBegin(index, name) if index == 0 or not self._one_call:
                    yield from self._begin_call(name)
                case CallArguments(index, text) if index == 0 or not self._one_call:
                    self.items[-1]["arguments"] += text
                    yield "response.function_call_arguments.delta", self._at() | {"delta": text}

    def finish(self, status: ItemStatus) -> Iterator[Event]:
        """Close what is open; nothing may be added after that."""
        if self._open:
            yield from self._close(status)

    # --- items ----------------------------------------------------------------------------------

    def _more_text(self, text: str, kind: Literal["message", "reasoning"]) -> Iterator[Event]:
        if not self._open or self.items[-1]["type"] != kind:
            yield from self._begin_text(kind)
        self.items[-1]["content"][0]["text"] += text
        if kind == "message":
            yield "response.output_text.delta", self._at_part() | {"delta": text, "logprobs": []}
        else:
            yield "response.reasoning_text.delta", self._at_part() | {"delta": text}

    def _begin_text(self, kind: Literal["message", "reasoning"]) -> Iterator[Event]:
        if kind == "message":
            head: dict[str, Any] = {"role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            head, part = {"summary": []}, {"type": "reasoning_text", "text": ""}
        yield from self._begin(
            {"id": _new_id("msg" if kind == "message" else "rs"), "type": kind, "content": [], **head}
        )
        self.items[-1]["content"].append(part)
        yield "response.content_part.added", self._at_part() | {"part": part.copy()}

    def _begin_call(self, name: str) -> Iterator[Event]:
        ids = {"id": _new_id("fc"), "call_id": _new_id("call")}
        yield from self._begin({**ids, "type": "function_call", "name": name, "arguments": ""})

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        if self._open:
            yield from self._close("completed")
        self.items.append(item | {"status": "in_progress"})
        self._open = True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": _copy(self.items[-1])}

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        item = self.items[-1]
        self._open = False
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", self._at() | done
        else:
            part = item["content"][0]
            if item["type"] == "message":
                yield "response.output_text.done", self._at_part() | {"text": part["text"], "logprobs": []}
            else:
                yield "response.reasoning_text.done", self._at_part() | {"text": part["text"]}
            yield "response.content_part.done", self._at_part() | {"part": part.copy()}
        item["status"] = status
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": _copy(item)}

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _at_part(self) -> dict[str, Any]:
        return self._at() | {"content_index": 0}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """The item as it is now, since it will change before the event about it is read."""
    return item | ({"content": [part.copy() for part in item["content"]]} if "content" in item else {})


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex[:24]}"


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

    def take(self, step: PromptOutput) -> Iterator[Event]:
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
    steps = run(context, chat.job)
    first = await until_disconnect(request.receive, first_of(steps))
    return EventStream(_events(first, steps, answer), source=steps)


async def _events(
    first: PromptOutput, rest: AsyncGenerator[PromptOutput, None], answer: ResponseAnswer
) -> AsyncGenerator[bytes, None]:
    numbers = itertools.count()

    def frame(kind: str, fields: dict[str, Any]) -> bytes:
        payload = encode_json({"type": kind, "sequence_number": next(numbers), **fields})
        return b"event: " + kind.encode() + b"\ndata: " + payload + b"\n\n"

    yield frame("response.created", {"response": answer.body()})
    yield frame("response.in_progress", {"response": answer.body()})
    step: PromptOutput | None = first
    try:
        while step is not None:
            for kind, fields in answer.take(step):
                yield frame(kind, fields)
            step = await anext(rest, None)
    except ShuteyeError as error:
        yield frame("response.failed", {"response": answer.body(error)})
    except Exception:
        yield frame("response.failed", {"response": answer.body(InternalError(BUG))})
        raise
    else:
        body = answer.body()
        yield frame(f"response.{body['status']}", {"response": body})
