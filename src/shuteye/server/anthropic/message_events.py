"""One message of /v1/messages, built piece by piece: its blocks, and the events that tell of them, as Anthropic's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import pydantic_core
from fastapi import Request, Response
from msgspec import Struct

from shuteye.errors import InternalError, RequestAborted, ShuteyeError
from shuteye.server.anthropic.errors import error_event
from shuteye.server.context import ServerContext
from shuteye.server.generation.run import Job, PromptOutput, first_of, run, take_all
from shuteye.server.http.answers import JsonAnswer, encode_json
from shuteye.server.http.events import BUG, EventStream, until_disconnect
from shuteye.server.http.middleware import current_request_id
from shuteye.server.parsing.parser import ReadingPlan
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, Piece, Reasoning
from shuteye.tasks.generate.requests import CompletionOutput

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]

# --- the message ----------------------------------------------------------------------------------


class WordsBlock(Struct, tag_field="type", tag="text"):
    """What the model said."""

    text: str = ""
    citations: None = None


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    """What the model wrote to itself; nothing is signed here, as nothing is hidden."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(Struct, tag_field="type", tag="tool_use", kw_only=True):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any] = {}


AnswerBlock = WordsBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(Struct, kw_only=True):
    """Token counts of one message; the prompt's are the sum of the three that count input."""

    input_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int = 0


class MessageAnswer(Struct, kw_only=True):
    """Answer of POST /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


@dataclass(frozen=True, slots=True)
class InputUsage:
    """What becomes of a prompt's tokens: found in the prefix cache, kept there for the next one, or neither.

    Attributes:
        block_size: tokens of the prefix cache's blocks, of which only whole ones are kept; None if there is no cache.
    """

    num_tokens: int
    block_size: int | None

    def told(self, num_cached: int, num_output: int) -> MessageUsage:
        """The counts, once it is known how many tokens were found."""
        kept = 0 if self.block_size is None else self.num_tokens // self.block_size * self.block_size
        created = max(0, kept - num_cached)
        return MessageUsage(
            input_tokens=self.num_tokens - num_cached - created,
            cache_creation_input_tokens=created,
            cache_read_input_tokens=num_cached,
            output_tokens=num_output,
        )


# --- events ---------------------------------------------------------------------------------------


class MessageStart(Struct, tag_field="type", tag="message_start"):
    """Tells of the message before anything is said; its usage counts the whole prompt as input."""

    message: MessageAnswer


class Ping(Struct, tag_field="type", tag="ping"):
    """Says that the stream is alive."""


class BlockStart(Struct, tag_field="type", tag="content_block_start"):
    """Tells of a block that begins."""

    index: int
    content_block: AnswerBlock


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    """More words."""

    text: str


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    """More thoughts."""

    thinking: str


class InputDelta(Struct, tag_field="type", tag="input_json_delta"):
    """More of a call's input, which is JSON only once it is whole."""

    partial_json: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    """Tells of more of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(Struct, tag_field="type", tag="content_block_stop"):
    """Tells of a block that is complete."""

    index: int


class EndOfMessage(Struct):
    """Why the message ends."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    """Tells why the message ends, and what it took."""

    delta: EndOfMessage
    usage: MessageUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    """Ends the stream."""


class MessageBlocks:
    """Thinking, words and calls, in the order in which they were begun; only the last one is open.

    Args:
        one_call: calls after the first are left out.
        shows_thinking: thinking is not.
    """

    def __init__(self, *, one_call: bool, shows_thinking: bool) -> None:
        self.blocks: list[AnswerBlock] = []
        self.has_calls = False
        self.has_broken_call = False
        self._one_call = one_call
        self._shows_thinking = shows_thinking
        self._is_open = False
        self._arguments = ""

    def add(self, pieces: Iterable[Piece]) -> Iterator[Struct]:
        """Take pieces; the events that tell of them."""
        for piece in pieces:
            match piece:
                case Content(text):
                    yield from self._more_words(text)
                case Reasoning(text) if self._shows_thinking:
                    yield from self._more_thoughts(text)
                case CallBegin(index, name) if index == 0 or not self._one_call:
                    self.has_calls = True
                    yield from self._begin(ToolUseBlock(id=f"toolu_{uuid4().hex[:24]}", name=name))
                case CallArguments(index, text) if index == 0 or not self._one_call:
                    self._arguments += text
                    yield self._delta(InputDelta(text))

    def finish(self) -> Iterator[Struct]:
        """Close what is open."""
        if not self._is_open:
            return
        last = self.blocks[-1]
        if isinstance(last, ToolUseBlock):
            self.has_broken_call |= not _is_object(self._arguments)
            last.input, self._arguments = _input_of(self._arguments), ""
        self._is_open = False
        yield BlockStop(len(self.blocks) - 1)

    def _more_words(self, text: str) -> Iterator[Struct]:
        block = self.blocks[-1] if self._is_open else None
        if not isinstance(block, WordsBlock):
            block = WordsBlock()
            yield from self._begin(block)
        block.text += text
        yield self._delta(TextDelta(text))

    def _more_thoughts(self, text: str) -> Iterator[Struct]:
        block = self.blocks[-1] if self._is_open else None
        if not isinstance(block, ThinkingBlock):
            block = ThinkingBlock()
            yield from self._begin(block)
        block.thinking += text
        yield self._delta(ThinkingDelta(text))

    def _begin(self, block: AnswerBlock) -> Iterator[Struct]:
        yield from self.finish()
        self.blocks.append(block)
        self._is_open = True
        yield BlockStart(len(self.blocks) - 1, block)

    def _delta(self, delta: TextDelta | ThinkingDelta | InputDelta) -> BlockDelta:
        return BlockDelta(len(self.blocks) - 1, delta)


MALFORMED = "malformed_arguments"
"""The key under which a call's input shows what the model wrote, if that is no JSON object."""


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(pydantic_core.from_json(arguments or "{}"), dict)
    except ValueError:
        return False


def _input_of(arguments: str) -> dict[str, Any]:
    """A call's input; of one that was cut off, as much as there is, as Anthropic's client reads a stream."""
    try:
        found = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {MALFORMED: arguments}


class MessageInProgress:
    """One message on its way.

    Args:
        usage: of its prompt.
    """

    def __init__(
        self,
        job: Job,
        reading: ReadingPlan,
        *,
        model: str,
        one_call: bool,
        shows_thinking: bool,
        usage: InputUsage,
    ) -> None:
        self.job = job
        self._reader = reading.reader()
        self._blocks = MessageBlocks(one_call=one_call, shows_thinking=shows_thinking)
        self._input = usage
        self._num_output = 0
        self._num_cached = 0
        self.answer = MessageAnswer(id=job.request_id, model=model, usage=MessageUsage(input_tokens=usage.num_tokens))

    def take(self, step: PromptOutput) -> Iterator[Struct]:
        """What a step adds.

        Raises:
            RequestAborted: the request was ended from outside, for which messages have no reason to stop.
        """
        _prompt_index, output = step
        self._num_cached = max(self._num_cached, output.num_cached_tokens)
        for completion in output.outputs:
            self._num_output += len(completion.token_ids)
            pieces = self._reader.feed(completion.text)
            if completion.finish_reason is not None:
                pieces += self._reader.finish()
            yield from self._blocks.add(pieces)
            if completion.finish_reason is not None:
                yield from self._blocks.finish()
                yield self._end(completion)

    def _end(self, completion: CompletionOutput) -> Struct:
        answer = self.answer
        answer.content = self._blocks.blocks
        answer.stop_reason = self._stop_reason(completion)
        if answer.stop_reason == "stop_sequence":
            answer.stop_sequence = str(completion.stop_reason)
        answer.usage = self._input.told(self._num_cached, self._num_output)
        return MessageDelta(EndOfMessage(answer.stop_reason, answer.stop_sequence), answer.usage)

    def _stop_reason(self, completion: CompletionOutput) -> StopReason:
        if completion.finish_reason == "abort":
            raise RequestAborted(
                "The request was aborted before it was finished, as when the model is put to sleep with mode=abort."
            )
        if completion.finish_reason == "length":
            return "max_tokens"
        if isinstance(completion.stop_reason, str) and (not self._blocks.has_calls or self._blocks.has_broken_call):
            return "stop_sequence"  # but whole calls before it are to be answered
        return "tool_use" if self._blocks.has_calls else "end_turn"


# --- answers --------------------------------------------------------------------------------------


def _headers() -> dict[str, str]:
    """Anthropic's name for the id of a request, by which its clients show it."""
    return {"request-id": current_request_id()}


async def answer_message(request: Request, context: ServerContext, message: MessageInProgress) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused, failed, or ended the request.
    """
    await until_disconnect(request.receive, take_all(context, message.job, message.take))
    return JsonAnswer(message.answer, headers=_headers())


async def stream_message(request: Request, context: ServerContext, message: MessageInProgress) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = run(context, message.job)
    first = await until_disconnect(request.receive, first_of(steps))
    stream = EventStream(_events(first, steps, message), source=steps)
    stream.headers.update(_headers())
    return stream


async def _events(
    first: PromptOutput, rest: AsyncGenerator[PromptOutput, None], message: MessageInProgress
) -> AsyncGenerator[bytes, None]:
    yield _frame(MessageStart(message.answer))
    yield _frame(Ping())
    step: PromptOutput | None = first
    try:
        while step is not None:
            for event in message.take(step):
                yield _frame(event)
            step = await anext(rest, None)
    except ShuteyeError as error:
        yield _error(error)
    except Exception:
        yield _error(InternalError(BUG))
        raise
    else:
        yield _frame(MessageStop())


def _frame(event: Struct) -> bytes:
    return f"event: {event.__struct_config__.tag}\ndata: ".encode() + encode_json(event) + b"\n\n"


def _error(error: ShuteyeError) -> bytes:
    return b"event: error\ndata: " + encode_json(error_event(error)) + b"\n\n"
