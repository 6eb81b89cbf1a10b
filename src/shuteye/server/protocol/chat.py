"""`/v1/chat/completions`: OpenAI's request.

Knows nothing of engines or sockets, nor of how answers are written.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.protocol.fields import GenerationBody, one_message
from shuteye.server.protocol.lists import Many
from shuteye.server.protocol.messages import Message
from shuteye.server.protocol.tools import NamedToolChoice, Tool

CHOICES = "'none', 'auto', 'required' or a function's name in an object"


class ChatBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    messages: Many[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None
    documents: Many[dict[str, str]] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    _choice_message = field_validator("tool_choice", mode="wrap")(one_message(CHOICES))

    @model_validator(mode="after")
    def _check_chat_fields_that_go_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        if self.tools and self.tool_choice != "none" and self.structure is not None:
            raise InvalidRequest(
                "The output's structure cannot be given together with tools that may be called; "
                "send tool_choice 'none', or no tools.",
                param="tools",
            )
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
