"""What a chat answers, whole and chunk by chunk, in OpenAI's shape with vLLM's additions.

Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from msgspec import UNSET, Struct, UnsetType

from shuteye.server.generation.answer import ChoiceAccumulator, ResponseWriter, UsageAnswer
from shuteye.server.openai.logprobs import ChatLogprobs, PromptLogprobs, TokenNames, chat_logprobs, prompt_logprobs
from shuteye.server.openai.tools import CalledFunctionAnswer, FunctionDelta, ToolCallAnswer, ToolCallDelta
from shuteye.server.parsing.parser import ReadingPlan
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, OutputParser, Piece, Reasoning
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason

ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatMessageAnswer(Struct, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    reasoning: str | None = None


class ChatChoiceAnswer(Struct):
    """One of `n` answers."""

    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None
    token_ids: Sequence[int] | None = None


class ChatAnswer(Struct, kw_only=True):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoiceAnswer]
    usage: UsageAnswer
    prompt_token_ids: Sequence[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    service_tier: None = None
    system_fingerprint: None = None
    kv_transfer_params: None = None


class ChatDelta(Struct, omit_defaults=True):
    """What is new of a message; fields without news are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Struct):
    """What is new of one of `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: Sequence[int] | None = None
    stop_reason: str | int | None = None


class ChatChunk(Struct, kw_only=True):
    """One event of a stream; the first has what a whole answer carries beside its choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | UnsetType | None
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


_NOTHING = ChatDelta()


@dataclass(slots=True)
class _Choice:
    """One streamed choice that is read for more than its text."""

    reader: OutputParser
    has_calls: bool = False


@dataclass(slots=True, kw_only=True)
class ChatWriter(ResponseWriter):
    """Writes choices of a chat.

    Attributes:
        names: how tokens are shown.
        num_top: None if no log-probabilities were asked for; -1 for all that are known.
        reading: how the answers are read.
        echo: what every answer begins with.
        named_call: the caller chose the function, so that its call is just how the answer stops (as OpenAI's).
        one_call: calls after the first are left out.
        show_reasoning: whether reasoning is part of the answer.
    """

    answer = ChatAnswer
    chunk = ChatChunk

    names: TokenNames
    num_top: int | None
    reading: ReadingPlan = field(default_factory=ReadingPlan)
    echo: str = ""
    named_call: bool = False
    one_call: bool = False
    show_reasoning: bool = True
    _choices: dict[int, _Choice] = field(default_factory=dict)

    def extra(self) -> dict[str, Any]:
        """The prompt's token ids and log-probabilities, as far as they were asked for."""
        extra: dict[str, Any] = {}
        if self.shows_token_ids:
            extra["prompt_token_ids"] = self.prompts[0].token_ids
        if self.prompt_logprobs:
            extra["prompt_logprobs"] = prompt_logprobs(self.prompt_logprobs[0])
        return extra

    def whole(self, index: int, transcript: ChoiceAccumulator) -> ChatChoiceAnswer:
        """A finished choice."""
        reader = self.reading.reader()
        said = self._said([*reader.feed(transcript.text), *reader.finish()])
        text = self.echo + (said.content or "")
        message = ChatMessageAnswer(content=text, reasoning=said.reasoning)
        if said.tool_calls:
            message.content = text or None
            message.tool_calls = [
                ToolCallAnswer(
                    call.id or "",
                    "function",
                    CalledFunctionAnswer(call.function.name or "", call.function.arguments),
                )
                for call in said.tool_calls
            ]
        logprobs = None
        if self.num_top is not None:
            logprobs = chat_logprobs(self.names, transcript.token_ids, transcript.logprobs, num_top=self.num_top)
        return ChatChoiceAnswer(
            index,
            message,
            logprobs,
            self._finish_reason(transcript.finish_reason, has_calls=bool(said.tool_calls)),
            transcript.stop_reason,
            transcript.token_ids if self.shows_token_ids else None,
        )

    def opening(self, index: int) -> ChatChunkChoice:
        """The chunk that says whose words follow."""
        token_ids = () if self.shows_token_ids else None
        return ChatChunkChoice(index, ChatDelta("assistant", self.echo), None, None, token_ids)

    def delta(self, index: int, delta: CompletionOutput) -> ChatChunkChoice | None:
        """What is new of a choice; the chunk that ends it may have no text, and there may be nothing to tell yet."""
        said, finish_reason = self._new(index, delta)
        logprobs = None
        if self.num_top is not None:
            logprobs = chat_logprobs(self.names, delta.token_ids, delta.logprobs or (), num_top=self.num_top)
        choice = ChatChunkChoice(index, said, logprobs, finish_reason)
        if self.shows_token_ids:
            choice.token_ids = delta.token_ids
        if finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        elif logprobs is None and said == _NOTHING and not self.shows_token_ids:
            return None
        return choice

    def _new(self, index: int, delta: CompletionOutput) -> tuple[ChatDelta, ChatFinishReason | None]:
        if self.reading.is_plain:
            return ChatDelta(None, delta.text if delta.text or delta.token_ids else None), delta.finish_reason
        choice = self._choices.setdefault(index, _Choice(self.reading.reader()))
        pieces = choice.reader.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += choice.reader.finish()
        said = self._said(pieces)
        choice.has_calls |= said.tool_calls is not None
        return said, self._finish_reason(delta.finish_reason, has_calls=choice.has_calls)

    def _said(self, pieces: Iterable[Piece]) -> ChatDelta:
        """Pieces as one delta; each call is one entry, however many pieces it came in."""
        said = ChatDelta()
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            match piece:
                case Content(text):
                    said.content = (said.content or "") + text
                case Reasoning(text) if self.show_reasoning:
                    said.reasoning = (said.reasoning or "") + text
                case CallBegin(index, name) if index == 0 or not self.one_call:
                    function, call_id = FunctionDelta(name=name, arguments=""), f"call_{uuid4().hex[:24]}"
                    calls[index] = ToolCallDelta(index=index, id=call_id, type="function", function=function)
                case CallArguments(index, text) if index == 0 or not self.one_call:
                    more = ToolCallDelta(index=index, function=FunctionDelta(arguments=""))
                    calls.setdefault(index, more).function.arguments += text
        if calls:
            said.tool_calls = list(calls.values())
        return said

    def _finish_reason(self, reason: FinishReason | None, *, has_calls: bool) -> ChatFinishReason | None:
        return "tool_calls" if reason == "stop" and has_calls and not self.named_call else reason
