"""The items of one response, built piece by piece, and the events that tell of them in OpenAI's order.

Knows nothing of requests or sockets. Every event is (type, fields); numbering them is the stream's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal
from uuid import uuid4

from shuteye.server.reading.pieces import CallArguments, CallBegin, Content, Piece, Reasoning

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
