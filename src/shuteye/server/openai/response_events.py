"""One response of /v1/responses, built piece by piece: its items, and the events that tell of them, as OpenAI's."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal
from uuid import uuid4

from fastapi import Request, Response
from msgspec import UNSET, Struct, UnsetType

from shuteye.errors import InternalError, ShuteyeError
from shuteye.server.context import ServerContext
from shuteye.server.generation.answer import Usage
from shuteye.server.generation.run import Job, PromptOutput, first_of, run, take_all
from shuteye.server.http.answers import JsonAnswer, encode_json
from shuteye.server.http.events import BUG, EventStream, until_disconnect
from shuteye.server.openai.logprobs import ChatLogprob, TextLogprobs, TokenNames
from shuteye.server.parsing.parser import ReadingPlan
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, Piece, Reasoning
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason

ItemStatus = Literal["in_progress", "completed", "incomplete"]

# --- the response ---------------------------------------------------------------------------------


class OutputText(Struct, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str = ""
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """The text of a reasoning item."""

    text: str = ""


class MessageItem(Struct, tag_field="type", tag="message", kw_only=True):
    """What the model said."""

    prefix: ClassVar[str] = "msg"
    id: str
    content: list[OutputText] = []
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"

    def begin_text(self) -> OutputText:
        """Its one part, empty."""
        self.content.append(OutputText())
        return self.content[0]


class ReasoningItem(Struct, tag_field="type", tag="reasoning", kw_only=True):
    """What the model wrote to itself."""

    prefix: ClassVar[str] = "rs"
    id: str
    content: list[ReasoningText] = []
    summary: list[Any] = []
    status: ItemStatus = "in_progress"

    def begin_text(self) -> ReasoningText:
        """Its one part, empty."""
        self.content.append(ReasoningText())
        return self.content[0]


class CallItem(Struct, tag_field="type", tag="function_call", kw_only=True):
    """A call that the model made."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


Item = MessageItem | ReasoningItem | CallItem


class RawMessage(Struct, kw_only=True):
    """A prompt, or what was generated, as the model has it (vLLM's `enable_response_messages`)."""

    message: str
    tokens: list[int]
    type: Literal["raw_message_tokens"] = "raw_message_tokens"


class InputTokensDetails(Struct):
    """How many tokens of the prompt were computed before."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """How many tokens were reasoning."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Token counts of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseAnswer(Struct, kw_only=True):
    """Answer of POST /v1/responses; what follows `model` is repeated of the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    output: list[Item] = []
    usage: ResponseUsage | None = None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, str | None]
    truncation: Literal["auto", "disabled"] = "disabled"
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    prompt: None = None
    service_tier: None = None
    user: None = None
    input_messages: list[RawMessage] | None = None
    output_messages: list[RawMessage] | None = None
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    metadata: dict[str, str]


# --- events ---------------------------------------------------------------------------------------


class Event(Struct, kw_only=True):
    """One event of a stream; its number is known when it is sent."""

    type: str
    sequence_number: int = 0


class ResponseEvent(Event, kw_only=True):
    """Tells of the whole response as it stands."""

    response: ResponseAnswer


class ItemEvent(Event, kw_only=True):
    """Tells of an item that begins or ends."""

    output_index: int
    item: Item


class PartEvent(Event, kw_only=True):
    """Tells of what is in an item: of a new part, of more of it, or of its end."""

    item_id: str
    output_index: int
    content_index: int | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[ChatLogprob] | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET


class ResponseItems:
    """Reasoning, message and calls, in the order in which they were begun; at most one is open.

    Events show items themselves, which change: encode one before the next is taken.

    Args:
        one_call: calls after the first are left out.
    """

    def __init__(self, *, one_call: bool = False) -> None:
        self.items: list[Item] = []
        self._one_call = one_call
        self._open: Item | None = None

    def add(self, pieces: Iterable[Piece], logprobs: Sequence[ChatLogprob] = ()) -> Iterator[Event]:
        """Take pieces, the words among which are made of tokens of these `logprobs`; the events that tell of them."""
        for piece in pieces:
            match piece:
                case Content(text):
                    yield from self._more_text(text, MessageItem, logprobs)
                    logprobs = ()
                case Reasoning(text):
                    yield from self._more_text(text, ReasoningItem)
                case CallBegin(index, name) if index == 0 or not self._one_call:
                    yield from self._begin(CallItem(id=_new_id("fc"), call_id=_new_id("call"), name=name))
                case CallArguments(index, text) if index == 0 or not self._one_call:
                    assert isinstance(self._open, CallItem)
                    self._open.arguments += text
                    yield self._part("response.function_call_arguments.delta", delta=text)

    def finish(self, status: ItemStatus) -> Iterator[Event]:
        """Close what is open; nothing may be added after that."""
        item = self._open
        if item is None:
            return
        if isinstance(item, CallItem):
            done = {"name": item.name, "arguments": item.arguments}
            yield self._part("response.function_call_arguments.done", **done)
        else:
            part = item.content[0]
            if isinstance(part, OutputText):
                yield self._part("response.output_text.done", content_index=0, text=part.text, logprobs=part.logprobs)
            else:
                yield self._part("response.reasoning_text.done", content_index=0, text=part.text)
            yield self._part("response.content_part.done", content_index=0, part=part)
        item.status = status
        self._open = None
        yield ItemEvent(type="response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _more_text(
        self, text: str, kind: type[MessageItem] | type[ReasoningItem], logprobs: Sequence[ChatLogprob] = ()
    ) -> Iterator[Event]:
        item = self._open
        if not isinstance(item, kind):
            item = kind(id=_new_id(kind.prefix))
            yield from self._begin(item)
            yield self._part("response.content_part.added", content_index=0, part=item.begin_text())
        part = item.content[0]
        part.text += text
        if isinstance(part, OutputText):
            part.logprobs.extend(logprobs)
            yield self._part("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
        else:
            yield self._part("response.reasoning_text.delta", content_index=0, delta=text)

    def _begin(self, item: Item) -> Iterator[Event]:
        yield from self.finish("completed")
        self.items.append(item)
        self._open = item
        yield ItemEvent(type="response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _part(self, kind: str, **fields: Any) -> PartEvent:
        return PartEvent(type=kind, item_id=self.items[-1].id, output_index=len(self.items) - 1, **fields)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex[:24]}"


_ABORTED = "The request was aborted before it was finished, as when the model is put to sleep with mode=abort."
_STATUS: dict[FinishReason, Literal["completed", "incomplete", "failed"]] = {
    "stop": "completed",
    "length": "incomplete",
    "abort": "failed",
}


class ResponseInProgress:
    """One response on its way.

    Args:
        answer: as it is before anything was generated.
        one_call: calls after the first are left out.
        names: how tokens are shown.
        shows_messages: the prompt and what was generated are part of the answer as the model has them.
    """

    def __init__(
        self,
        job: Job,
        reading: ReadingPlan,
        answer: ResponseAnswer,
        *,
        one_call: bool,
        names: TokenNames,
        shows_messages: bool,
    ) -> None:
        self.job = job
        self.answer = answer
        self._logprobs = TextLogprobs(names, num_top=answer.top_logprobs)
        self._raw = RawMessage(message="", tokens=[])
        self._reader = reading.reader()
        self._items = ResponseItems(one_call=one_call)
        self._usage = Usage.of(job)
        self._num_reasoning_tokens = 0
        answer.output = self._items.items
        if shows_messages:
            prompt = list(job.prompts[0].token_ids)
            text = names.tokenizer.decode(prompt, skip_special_tokens=False)
            answer.input_messages = [RawMessage(message=text, tokens=prompt)]
            answer.output_messages = [self._raw]

    def take(self, step: PromptOutput) -> Iterator[Event]:
        """What a step adds."""
        prompt_index, output = step
        self._usage.add(prompt_index, output)
        for completion in output.outputs:
            yield from self._take_completion(completion)

    def _take_completion(self, completion: CompletionOutput) -> Iterator[Event]:
        if self.answer.output_messages is not None:
            self._raw.message += completion.text
            self._raw.tokens.extend(completion.token_ids)
        pieces = self._reader.feed(completion.text)
        if any(isinstance(piece, Reasoning) for piece in pieces):
            self._num_reasoning_tokens += len(completion.token_ids)
        if completion.finish_reason is not None:
            pieces += self._reader.finish()
        yield from self._items.add(pieces, self._logprobs.of_words(completion, pieces))
        if completion.finish_reason is None:
            return
        yield from self._items.finish("completed" if completion.finish_reason == "stop" else "incomplete")
        self._finish(completion.finish_reason)

    def _finish(self, reason: FinishReason) -> None:
        if reason == "abort":
            self.fail(_ABORTED)
            return
        self.answer.status = _STATUS[reason]
        if reason == "length":
            self.answer.incomplete_details = {"reason": "max_output_tokens"}
        usage = self._usage
        self.answer.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(sum(usage.cached_tokens.values())),
            usage.completion_tokens,
            OutputTokensDetails(self._num_reasoning_tokens),
            usage.prompt_tokens + usage.completion_tokens,
        )

    def fail(self, message: str) -> None:
        """The response ends here."""
        self.answer.status = "failed"
        self.answer.error = {"code": "server_error", "message": message}


async def answer_response(request: Request, context: ServerContext, response: ResponseInProgress) -> Response:
    """One JSON object, once everything is generated.

    Raises:
        ClientDisconnected: the client went first; the job was aborted.
        ShuteyeError: the engine refused or failed.
    """
    await until_disconnect(request.receive, take_all(context, response.job, response.take))
    return JsonAnswer(response.answer)


async def stream_response(request: Request, context: ServerContext, response: ResponseInProgress) -> Response:
    """A stream of events, begun only once the engine has admitted the job and given its first output.

    Raises:
        ClientDisconnected: the client went before that.
        ShuteyeError: the engine refused the job.
    """
    steps = run(context, response.job)
    first = await until_disconnect(request.receive, first_of(steps))
    return EventStream(_events(first, steps, response), source=steps)


async def _events(
    first: PromptOutput, rest: AsyncGenerator[PromptOutput, None], response: ResponseInProgress
) -> AsyncGenerator[bytes, None]:
    numbers = itertools.count()
    answer = response.answer

    def frame(event: Event) -> bytes:
        event.sequence_number = next(numbers)
        return b"event: " + event.type.encode() + b"\ndata: " + encode_json(event) + b"\n\n"

    yield frame(ResponseEvent(type="response.created", response=answer))
    yield frame(ResponseEvent(type="response.in_progress", response=answer))
    step: PromptOutput | None = first
    try:
        while step is not None:
            for event in response.take(step):
                yield frame(event)
            step = await anext(rest, None)
    except ShuteyeError as error:
        response.fail(error.message)
    except Exception:
        response.fail(InternalError(BUG).message)
        yield frame(ResponseEvent(type="response.failed", response=answer))
        raise
    yield frame(ResponseEvent(type=f"response.{answer.status}", response=answer))
