"""`/v1/chat/completions`: OpenAI's request, answer and chunks.

Knows nothing of engines or sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field, model_validator

from shuteye.errors import InvalidRequest
from shuteye.outputs import CompletionOutput, Logprob
from shuteye.server.protocol.fields import GenerationBody
from shuteye.server.protocol.logprobs import chat_logprobs
from shuteye.server.protocol.messages import Message
from shuteye.server.protocol.transcript import Transcript
from shuteye.tokenizer import Tokenizer


class ChatBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`; None means what is left of the context.

        Raises:
            InvalidRequest: both are given and differ.
        """
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) mean the "
                "same and differ; send one of them.",
                param="max_completion_tokens",
            )
        return next(iter(limits), None)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True, slots=True)
class ChatShape:
    """Writes choices of a chat; `num_top` is None if no log-probabilities were asked for."""

    tokenizer: Tokenizer
    num_top: int | None

    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def whole(self, index: int, transcript: Transcript) -> dict[str, Any]:
        """A finished choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": transcript.text, "refusal": None},
            "logprobs": self._logprobs(transcript.token_ids, transcript.logprobs),
            "finish_reason": transcript.finish_reason,
            "stop_reason": transcript.stop_reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says whose words follow."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, index: int, delta: CompletionOutput) -> dict[str, Any]:
        """What is new of a choice; the chunk that ends it may have no text."""
        choice = {
            "index": index,
            "delta": {"content": delta.text} if delta.text or delta.token_ids else {},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs or ()),
            "finish_reason": delta.finish_reason,
        }
        return choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        return chat_logprobs(self.tokenizer, token_ids, logprobs, num_top=self.num_top)
