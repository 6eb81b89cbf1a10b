"""`/v1/completions`: OpenAI's request, answer and chunks.

Knows nothing of engines or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.outputs import CompletionOutput
from shuteye.request import MAX_LOGPROBS
from shuteye.server.generation import Prompt
from shuteye.server.protocol.fields import GenerationBody, one_message
from shuteye.server.protocol.logprobs import CompletionLogprobs
from shuteye.server.protocol.transcript import Transcript
from shuteye.tokenizer import Tokenizer

MAX_PROMPTS = 2048
DEFAULT_MAX_TOKENS = 16
PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids, none of them empty"


class CompletionBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    _prompt_message = field_validator("prompt", mode="wrap")(one_message(PROMPT_FORMS))

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> CompletionBody:
        if self.best_of not in {None, self.n or 1}:
            raise InvalidRequest(f"best_of other than n is not supported, got {self.best_of}.", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo together with logprobs is not supported: the prompt's log-probabilities are not computed.",
                param="echo",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt per completion asked for, whatever form they came in.

        Raises:
            InvalidRequest: a prompt is empty, or there are too many.
        """
        prompts = _listed(self.prompt)
        if not prompts or not all(prompts):
            raise InvalidRequest(f"prompt must be {PROMPT_FORMS}.", param="prompt")
        if len(prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"At most {MAX_PROMPTS} prompts per request, got {len(prompts)}.", param="prompt")
        return prompts


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


@dataclass(slots=True)
class CompletionShape:
    """Writes choices of a completion; `echoed` is what each prompt's choices begin with."""

    tokenizer: Tokenizer
    wants_logprobs: bool
    num_choices: int
    echoed: tuple[Prompt, ...] | None
    _logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)

    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def whole(self, index: int, transcript: Transcript) -> dict[str, Any]:
        """A finished choice."""
        return {
            "index": index,
            "text": self._prompt_text(index) + transcript.text,
            "logprobs": self._take_logprobs(index, transcript),
            "finish_reason": transcript.finish_reason,
            "stop_reason": transcript.stop_reason,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The echoed prompt, if it is to be."""
        if self.echoed is None:
            return None
        return {"index": index, "text": self._prompt_text(index), "logprobs": None, "finish_reason": None}

    def delta(self, index: int, delta: CompletionOutput) -> dict[str, Any]:
        """What is new of a choice."""
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": self._take_logprobs(index, delta),
            "finish_reason": delta.finish_reason,
        }
        return choice if delta.finish_reason is None else choice | {"stop_reason": delta.stop_reason}

    def _prompt_text(self, index: int) -> str:
        if self.echoed is None:
            return ""
        return self.echoed[index // self.num_choices].text or ""

    def _take_logprobs(self, index: int, source: Transcript | CompletionOutput) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        logprobs = self._logprobs.setdefault(index, CompletionLogprobs(self.tokenizer))
        logprobs.add(source.token_ids, source.logprobs or ())
        return logprobs.take()
