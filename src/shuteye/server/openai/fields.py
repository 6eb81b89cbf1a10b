"""Fields that generation routes share, and what becomes of those that this server does not support.

A field is used, known to be harmless, or refused by name; what no one here knows is left out and named in the answer.
Lists are validated up to their first wrong item: a million complaints would keep the event loop for seconds. What the
output must be (`response_format`, `structured_outputs`, `guided_*`) is a field, too; whether a grammar can be used is
found where it is compiled.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, ValidationError

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.http.ignored_fields import ignore
from shuteye.tasks.generate.requests import SamplingParams, StructuredOutputsParams

T = TypeVar("T")


class _FirstOnly(FailFast):
    """pydantic's own, which can be part of a union: it lacks a hash."""

    def __hash__(self) -> int:
        return hash(type(self))


Many = Annotated[list[T], _FirstOnly()]


GUIDED: Mapping[str, str] = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
}  # fmt: skip
"""vLLM's older fields, and what they are called in `structured_outputs`."""


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. It is always held to strictly, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                "response_format needs json_schema if its type is 'json_schema', and has none otherwise.",
                param="response_format",
            )
        return self

    def structure(self, param: str = "response_format") -> StructuredOutputsParams | None:
        """What the output must be; None for plain text."""
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.json_schema, param=param)
        return StructuredOutputsParams(json_object=True, param=param) if self.type == "json_object" else None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    wanted_json: str | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Many[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = None  # there is one backend only
    whitespace_pattern: str | None = None
    structural_tag: None = None

    def structure(self) -> StructuredOutputsParams:
        """What the output must be.

        Raises:
            InvalidRequest: nothing, or several things.
        """
        return StructuredOutputsParams(
            json=self.wanted_json,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            disable_any_whitespace=self.disable_any_whitespace is True,
            whitespace_pattern=self.whitespace_pattern,
        )


class StructureFields(BaseModel):
    """The fields that ask for a structure; at most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Many[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the output must be, or None if it is free.

        Raises:
            InvalidRequest: several fields ask for something.
        """
        asked = [name for name in ("structured_outputs", *GUIDED) if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            asked.append("response_format")
        if len(asked) > 1:
            raise InvalidRequest(f"Only one of {' and '.join(asked)} can be used.", param=asked[0])
        if not asked:
            return None
        if asked[0] in GUIDED:
            return self._guided(asked[0])
        if self.structured_outputs is not None:
            return self.structured_outputs.structure()
        assert self.response_format is not None
        return self.response_format.structure()

    def _guided(self, name: str) -> StructuredOutputsParams:
        wanted = {GUIDED[name]: getattr(self, name)}
        return StructuredOutputsParams(**wanted, whitespace_pattern=self.guided_whitespace_pattern, param=name)


HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "session_id",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "vllm_xargs",
    }
)  # fmt: skip
"""Fields that change nothing in what is generated."""

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    # of other routes
    "best_of": (), "echo": (False,), "input": (), "messages": (), "prompt": (),
    # OpenAI's
    "audio": (), "function_call": ("none", "auto"), "functions": ([],), "modalities": (["text"],), "moderation": (),
    "prediction": (), "reasoning_effort": ("none",), "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],),
    "parallel_tool_calls": (True,), "verbosity": ("medium",), "web_search_options": (), "include_reasoning": (True,),
    # vLLM's
    "chat_template": (), "documents": ([],), "ec_transfer_params": (),
    "guided_decoding_backend": (), "kv_transfer_params": (), "logits_processors": ([],),
    "media_io_kwargs": ({},), "mm_processor_kwargs": ({},), "prompt_embeds": (),
    "repetition_detection": (), "return_mm_kwargs": (True,), "return_prompt_text": (False,),
    "return_token_offsets": (False,), "routed_experts_prompt_start": (0,), "stream_interval": (1,),
    "thinking_token_budget": (-1,), "watermarking": (False,),
}  # fmt: skip
"""Fields that would change what is generated, each with the values that ask for nothing; null is always one."""


def settle_unsupported(
    body: Any, declared: Mapping[str, Any], *, unsupported: Mapping[str, tuple[object, ...]] = UNSUPPORTED
) -> Any:
    """`body` without its harmless and neutral fields, and without unknown ones unless those are to be refused.

    Args:
        unsupported: the route's fields that would change its answer, each with the values that ask for nothing.

    Raises:
        InvalidRequest: a field asks for something that this server does not do.
    """
    if not isinstance(body, Mapping):
        return body
    kept = {
        name: value
        for name, value in body.items()
        if name in declared or not _ignorable(name, value, unsupported=unsupported)
    }
    unknown = [name for name in kept if name not in declared]
    if unknown and ignore(unknown):
        return {name: value for name, value in kept.items() if name in declared}
    return kept


def _ignorable(name: str, value: object, *, unsupported: Mapping[str, tuple[object, ...]]) -> bool:
    if name in HARMLESS:
        return True
    if name not in unsupported:
        return False
    if value is None or value in unsupported[name]:
        return True
    raise InvalidRequest(f"'{name}' is not supported by this server. Remove it from the request.", param=name)


def refuse_other_content(part: Any, *, known: Container[str] = ("text",), param: str) -> None:
    """Refuse a part of a kind that cannot be read, by its name; what has none is left to the model's own checks.

    Raises:
        InvalidRequest: its kind is not `known`.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind not in known:
        raise InvalidRequest(f"Content of type '{kind}' is not supported: this model reads text only.", param=param)


def one_message(expected: str) -> Any:
    """A validator that replaces a union's many complaints by `must be {expected}`."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("wrong_type", "must be {expected}", {"expected": expected}) from None

    return validate


class StreamOptions(BaseModel):
    """`stream_options`; obfuscation only pads events, so leaving it out is harmless."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(StructureFields):
    """Fields of both `/v1/chat/completions` and `/v1/completions`; None means that the caller did not say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Many[int] | None = None
    bad_words: Many[str] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Many[int] | None = None
    priority: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    cache_salt: str | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields)

    _stop_message = field_validator("stop", mode="wrap")(one_message("a string or a list of strings"))

    @model_validator(mode="after")
    def _check_fields_that_go_together(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs is only allowed when stream is false.", param="prompt_logprobs")
        if self.spaces_between_special_tokens is False and self.skip_special_tokens is False:
            raise InvalidRequest(
                "spaces_between_special_tokens=false is not supported together with skip_special_tokens=false: special "
                "tokens are shown as the tokenizer decodes them.",
                param="spaces_between_special_tokens",
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise InvalidRequest("truncation_side requires truncate_prompt_tokens.", param="truncation_side")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest(
                "truncate_prompt_tokens must be -1 or at least 1, got 0.", param="truncate_prompt_tokens"
            )
        return self

    def usage_in(self, config: ServerConfig) -> Literal["no chunk", "last chunk", "every chunk"]:
        """Where a stream is to tell how many tokens it took."""
        if config.enable_force_include_usage:
            return "every chunk"
        options = self.stream_options or StreamOptions()
        if not options.include_usage:
            return "no chunk"
        return "every chunk" if options.continuous_usage_stats else "last chunk"

    def names_by_id(self, config: ServerConfig) -> bool:
        """Whether log-probabilities name tokens by their ids."""
        asked = self.return_tokens_as_token_ids
        return config.return_tokens_as_token_ids if asked is None else asked

    def truncated(self, token_ids: Sequence[int], *, room: int) -> Sequence[int]:
        """At most `truncate_prompt_tokens` tokens of a prompt; -1 keeps as many as there is `room` for."""
        kept = max(1, room) if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        if kept is None or len(token_ids) <= kept:
            return token_ids
        return token_ids[:kept] if self.truncation_side == "right" else token_ids[len(token_ids) - kept :]

    def sampling_params(
        self, defaults: Mapping[str, float], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """What the caller said; else the checkpoint's `generation_config`; else what `SamplingParams` says.

        Raises:
            InvalidRequest: a value is out of range.
        """
        said = {name: getattr(self, name) for name in _PASSED_ON if getattr(self, name) is not None}
        advised = {name: _DEFAULTED[name](value) for name, value in defaults.items() if name in _DEFAULTED}
        return SamplingParams(
            **(advised | said),
            max_tokens=max_tokens,
            logprobs=None if self.logprob_token_ids is not None else logprobs,
            logprob_token_ids=self.logprob_token_ids,
            logit_bias=_by_token_id(self.logit_bias),
            structured_outputs=self.structure,
        )


def _by_token_id(logit_bias: Mapping[str, float] | None) -> dict[int, float] | None:
    try:
        return {int(token_id): bias for token_id, bias in logit_bias.items()} if logit_bias else None
    except ValueError:
        raise InvalidRequest(
            f"logit_bias must map token ids to numbers, got {', '.join(map(repr, logit_bias or ()))} as ids.",
            param="logit_bias",
        ) from None


_DEFAULTED: Mapping[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}

_PASSED_ON = (
    *_DEFAULTED, "n", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "allowed_token_ids", "bad_words",
    "prompt_logprobs", "priority", "cache_salt",
)  # fmt: skip
