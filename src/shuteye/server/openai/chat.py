"""POST /v1/chat/completions: OpenAI's request, answer and chunks, with vLLM's additions.

Knows nothing of how tokens are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from shuteye.server.context import Context
from shuteye.server.generation.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.generation.chunks import ChoiceAccumulator
from shuteye.server.generation.run import Prompt
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.openai.conversation import ChatBody, ChatJob, chat_job
from shuteye.server.openai.logprobs import TokenNames, chat_logprobs, prompt_logprobs_json
from shuteye.server.openai.messages import NamedToolChoice, call_delta, whole_call
from shuteye.server.parsing.parser import ReadingPlan
from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, OutputParser, Piece, Reasoning
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason, Logprob


@dataclass(slots=True)
class _Choice:
    """One streamed choice that is read for more than its text."""

    reader: OutputParser
    has_calls: bool = False


@dataclass(slots=True)
class ChatWriter:
    """Writes choices of a chat.

    Attributes:
        names: how tokens are shown.
        num_top: None if no log-probabilities were asked for.
        reading: how the answers are read.
        echo: what every answer begins with.
        named_call: the caller chose the function, so that its call is just how the answer stops (as OpenAI's).
        one_call: calls after the first are left out.
        show_reasoning: whether reasoning is part of the answer.
        token_ids_of: the prompt, if token ids are to be shown.
    """

    names: TokenNames
    num_top: int | None
    reading: ReadingPlan = field(default_factory=ReadingPlan)
    echo: str = ""
    named_call: bool = False
    one_call: bool = False
    show_reasoning: bool = True
    token_ids_of: Prompt | None = None
    _choices: dict[int, _Choice] = field(default_factory=dict)
    _prompt_logprobs: Sequence[Mapping[int, Logprob] | None] | None = None

    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    @property
    def shows_token_ids(self) -> bool:
        """Whether token ids are part of the answer."""
        return self.token_ids_of is not None

    def prompt_scored(self, _prompt_index: int, logprobs: Sequence[Mapping[int, Logprob] | None]) -> None:
        """The prompt's log-probabilities are known."""
        self._prompt_logprobs = logprobs

    def extra(self) -> dict[str, Any]:
        """What an answer carries beside its choices, or a stream in its first chunks."""
        extra: dict[str, Any] = {}
        if self.token_ids_of is not None:
            extra["prompt_token_ids"] = list(self.token_ids_of.token_ids)
        if self._prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs_json(self._prompt_logprobs)
        return extra

    def whole(self, index: int, transcript: ChoiceAccumulator) -> dict[str, Any]:
        """A finished choice."""
        reader = self.reading.reader()
        said = self._said([*reader.feed(transcript.text), *reader.finish()])
        message = {"role": "assistant", "content": self.echo + said.pop("content", ""), "refusal": None}
        if calls := said.pop("tool_calls", []):
            message["tool_calls"] = [whole_call(call) for call in calls]
            message["content"] = message["content"] or None
        return {
            "index": index,
            "message": message | said,
            "logprobs": self._logprobs(transcript.token_ids, transcript.logprobs),
            "finish_reason": self._finish_reason(transcript.finish_reason, has_calls=bool(calls)),
            "stop_reason": transcript.stop_reason,
        } | self._token_ids(transcript.token_ids)

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says whose words follow."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": self.echo},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, index: int, delta: CompletionOutput) -> dict[str, Any] | None:
        """What is new of a choice; the chunk that ends it may have no text, and there may be nothing to tell yet."""
        said, finish_reason = self._new(index, delta)
        choice = {
            "index": index,
            "delta": said,
            "logprobs": None if self.num_top is None else self._logprobs(delta.token_ids, delta.logprobs or ()),
            "finish_reason": finish_reason,
        }
        if self.token_ids_of is not None:
            choice["token_ids"] = list(delta.token_ids)
        if finish_reason is not None:
            return choice | {"stop_reason": delta.stop_reason}
        return choice if said or choice["logprobs"] or self.token_ids_of else None

    def _new(self, index: int, delta: CompletionOutput) -> tuple[dict[str, Any], str | None]:
        if self.reading.is_plain:
            return ({"content": delta.text} if delta.text or delta.token_ids else {}), delta.finish_reason
        choice = self._choices.setdefault(index, _Choice(self.reading.reader()))
        pieces = choice.reader.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += choice.reader.finish()
        said = self._said(pieces)
        choice.has_calls |= "tool_calls" in said
        return said, self._finish_reason(delta.finish_reason, has_calls=choice.has_calls)

    def _said(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """Pieces as fields of a message or delta; each call is one entry, however many pieces it came in."""
        said: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            match piece:
                case Content(text):
                    said["content"] = said.get("content", "") + text
                case Reasoning(text) if self.show_reasoning:
                    said["reasoning"] = said.get("reasoning", "") + text
                case CallBegin(index, name) if index == 0 or not self.one_call:
                    calls[index] = call_delta(index, call_id=f"call_{uuid4().hex[:24]}", name=name)
                case CallArguments(index, text) if index == 0 or not self.one_call:
                    calls.setdefault(index, call_delta(index))["function"]["arguments"] += text
        return said | ({"tool_calls": list(calls.values())} if calls else {})

    def _finish_reason(self, reason: FinishReason | None, *, has_calls: bool) -> str | None:
        return "tool_calls" if reason == "stop" and has_calls and not self.named_call else reason

    def _token_ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {} if self.token_ids_of is None else {"token_ids": list(token_ids)}

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        return chat_logprobs(self.names, token_ids, logprobs, num_top=self.num_top)


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    chat = await chat_job(context, new_request_id("chatcmpl"), body)
    shape = _shape(body, chat, names=TokenNames(context.engine.tokenizer, body.return_tokens_as_token_ids is True))
    if body.stream:
        return await answer_stream(request, context, chat.job, shape=shape, model=model, usage_in=body.usage_in)
    return await answer_whole(request, context, chat.job, shape=shape, model=model)


def _shape(body: ChatBody, chat: ChatJob, *, names: TokenNames) -> ChatWriter:
    return ChatWriter(
        names=names,
        num_top=body.num_logprobs,
        reading=chat.reading,
        echo=chat.echo,
        named_call=isinstance(body.tool_choice, NamedToolChoice),
        one_call=body.parallel_tool_calls is False,
        show_reasoning=body.include_reasoning is not False,
        token_ids_of=chat.job.prompts[0] if body.return_token_ids else None,
    )
