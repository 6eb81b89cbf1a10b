"""POST /v1/completions: OpenAI's request, what it asks of the engine, answer and chunks, with vLLM's additions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from fastapi import APIRouter, Request, Response
from msgspec import Struct, UnsetType
from pydantic import Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import (
    ChoiceAccumulator,
    ResponseWriter,
    UsageAnswer,
    answer_stream,
    answer_whole,
    new_request_id,
)
from shuteye.server.generation.run import Job, Prompt
from shuteye.server.http.admission import ModelRoute, require_prompt_tokens, require_sequences, require_task
from shuteye.server.openai.beams import beams_of
from shuteye.server.openai.fields import GenerationBody, Many, one_message
from shuteye.server.openai.logprobs import CompletionLogprobs, PromptLogprobs, TextOffset, TokenNames, prompt_logprobs
from shuteye.server.openai.prompts import encode, require_known, require_room, require_tokens
from shuteye.tasks.generate.logprob_limits import LogprobLimits
from shuteye.tasks.generate.requests import WHOLE_VOCABULARY, CompletionOutput, FinishReason, Logprob, SamplingParams
from shuteye.tokenizer import LONG_TEXT

DEFAULT_MAX_TOKENS = 16
PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids, none of them empty"


class CompletionBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=-1)
    best_of: int | None = Field(default=None, ge=1, le=128)

    _prompt_message = field_validator("prompt", mode="wrap")(one_message(PROMPT_FORMS))

    @model_validator(mode="after")
    def _check_completion_fields_that_go_together(self) -> CompletionBody:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise InvalidRequest(f"best_of ({self.best_of}) must be at least n ({n}).", param="best_of")
        if self.stream and self.best_of not in {None, n}:
            raise InvalidRequest(
                f"best_of ({self.best_of}) other than n ({n}) cannot be streamed: the best are known only at the end.",
                param="best_of",
            )
        if self.logprob_token_ids is not None and self.logprobs is None:
            raise InvalidRequest("logprob_token_ids requires logprobs.", param="logprob_token_ids")
        if self.logprob_token_ids is not None and self.echoes_only:
            raise InvalidRequest(
                "logprob_token_ids is about tokens that are generated, and max_tokens is 0.", param="logprob_token_ids"
            )
        if self.use_beam_search and self.echo and (self.logprobs is not None or self.echoes_only):
            raise InvalidRequest("echo with use_beam_search has no log-probabilities to tell.", param="echo")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 unless echo is true, got 0.", param="max_tokens")
        return self

    @property
    def echoes_only(self) -> bool:
        """Whether nothing but the prompt is wanted, as those do who score texts."""
        return self.max_tokens == 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt per completion asked for, whatever form they came in.

        Raises:
            InvalidRequest: a prompt is empty.
        """
        prompts = _listed(self.prompt)
        if not prompts or not all(prompts):
            raise InvalidRequest(f"prompt must be {PROMPT_FORMS}.", param="prompt")
        return prompts


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):  # all of them are: validated, and too many to look at again
        return [prompt]
    return list(cast("list[str] | list[list[int]]", prompt))


class CompletionChoiceAnswer(Struct):
    """One of `n` continuations of one prompt, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: Sequence[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: Sequence[int] | None = None


class CompletionAnswer(Struct, kw_only=True):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoiceAnswer]
    usage: UsageAnswer
    service_tier: None = None
    system_fingerprint: None = None
    kv_transfer_params: None = None


class CompletionChunk(Struct, kw_only=True):
    """One event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoiceAnswer]
    usage: UsageAnswer | UnsetType | None


@dataclass(slots=True, kw_only=True)
class CompletionWriter(ResponseWriter):
    """Writes choices of a completion.

    Attributes:
        names: how tokens are shown.
        num_choices: choices per prompt.
        echoes: every choice begins with its prompt.
        echoes_only: and ends there.
        shows_prompt_logprobs: the caller asked for them by name.
    """

    answer = CompletionAnswer
    chunk = CompletionChunk

    names: TokenNames
    num_choices: int
    wants_logprobs: bool = False
    echoes: bool = False
    echoes_only: bool = False
    shows_prompt_logprobs: bool = False
    _offsets: dict[int, TextOffset] = field(default_factory=dict)

    def whole(self, index: int, transcript: ChoiceAccumulator) -> CompletionChoiceAnswer:
        """A finished choice."""
        made = ChoiceAccumulator(finish_reason=_echo_ends(transcript)) if self.echoes_only else transcript
        logprobs = self._logprobs(index, made.token_ids, made.logprobs)
        choice = CompletionChoiceAnswer(index, self._echo(index) + made.text, logprobs, made.finish_reason)
        choice.stop_reason = made.stop_reason
        if self.shows_token_ids:
            choice.token_ids, choice.prompt_token_ids = made.token_ids, self._prompt(index).token_ids
        if self.shows_prompt_logprobs:
            known = self.prompt_logprobs.get(index // self.num_choices)
            choice.prompt_logprobs = None if known is None else prompt_logprobs(known)
        return choice

    def opening(self, index: int) -> CompletionChoiceAnswer | None:
        """The echoed prompt, if it is to be, or its token ids."""
        if not self.echoes and not self.shows_token_ids:
            return None
        logprobs = self._logprobs(index, (), ()) if self.echoes else None
        choice = CompletionChoiceAnswer(index, self._echo(index), logprobs, None)
        if self.shows_token_ids:
            choice.token_ids, choice.prompt_token_ids = (), self._prompt(index).token_ids
        return choice

    def delta(self, index: int, delta: CompletionOutput) -> CompletionChoiceAnswer:
        """What is new of a choice."""
        if self.echoes_only:
            return CompletionChoiceAnswer(index, "", None, _echo_ends(delta))
        logprobs = self._logprobs(index, delta.token_ids, delta.logprobs or ()) if self.wants_logprobs else None
        choice = CompletionChoiceAnswer(index, delta.text, logprobs, delta.finish_reason)
        choice.stop_reason = delta.stop_reason
        if self.shows_token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.num_choices]

    def _echo(self, index: int) -> str:
        return (self._prompt(index).text or "") if self.echoes else ""

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]
    ) -> CompletionLogprobs | None:
        """Of these tokens; the first time, those of an echoed prompt stand before them."""
        if not self.wants_logprobs:
            return None
        if index in self._offsets or not self.echoes:
            return self._offsets.setdefault(index, TextOffset(self.names)).logprobs(token_ids, logprobs)
        self._offsets[index] = TextOffset(self.names)
        prompt = self._prompt(index).token_ids
        # nothing is known of a prompt that was aborted before it was computed
        known = self.prompt_logprobs.get(index // self.num_choices, [None] * len(prompt))
        return self._offsets[index].logprobs([*prompt, *token_ids], [*known, *logprobs])


def _echo_ends(source: ChoiceAccumulator | CompletionOutput) -> FinishReason:
    return "abort" if source.finish_reason == "abort" else "length"


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionBody, context: Context) -> Response:
    """Continues one or more prompts, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job = await completion_job(body, context)
    writer = CompletionWriter(
        names=TokenNames(context.engine.tokenizer, as_ids=body.names_by_id(context.config)),
        prompts=job.prompts,
        num_choices=job.best or job.params.n,
        wants_logprobs=body.logprobs is not None,
        echoes=body.echo is True,
        echoes_only=job.echoes_only,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        shows_token_ids=body.return_token_ids is True,
    )
    if body.stream:
        return await answer_stream(
            request, context, job, writer=writer, model=model, usage_in=body.usage_in(context.config)
        )
    return await answer_whole(request, context, job, writer=writer, model=model)


async def completion_job(body: CompletionBody, context: ServerContext) -> Job:
    """What a completion asks of the engine.

    Raises:
        InvalidRequest: a field is wrong, or asks for what this model cannot do; `param` names it.
    """
    info = context.engine.info
    n = max(body.n or 1, body.best_of or 1)
    given = body.prompts
    require_sequences(context.config, len(given) * n, param="n" if len(given) == 1 else "prompt")
    many = sum(map(len, given)) > LONG_TEXT
    prompts = tuple([await _prompt(body, context, each, one_of_many=many) for each in given])
    require_prompt_tokens(sum(len(prompt.token_ids) for prompt in prompts) * n, param="prompt")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_tokens = 1 if body.echoes_only else body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.max_model_len - longest))
    params = body.sampling_params(info.default_sampling, max_tokens=max_tokens, logprobs=body.logprobs)
    require_room(longest, max_tokens, info.max_model_len)
    params, best = _ranked(body, params)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=_larger(body.logprobs, body.prompt_logprobs or 0))
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    params = LogprobLimits.of(info).resolved(params, num_prompt_tokens=num_tokens, num_prompts=len(prompts))
    beams = beams_of(body, params, max_tokens=max_tokens)
    return Job(new_request_id("cmpl"), prompts, params, best=best, beams=beams, echoes_only=body.echoes_only)


def _ranked(body: CompletionBody, params: SamplingParams) -> tuple[SamplingParams, int | None]:
    """With `best_of`, as many completions as that, with log-probabilities to rank them by; and how many to keep."""
    if body.best_of in {None, params.n}:
        return params, None
    if params.logprob_token_ids is None:
        params = replace(params, logprobs=params.logprobs or 0)
    return replace(params, n=body.best_of), params.n


def _larger(one: int, other: int) -> int:
    """Of two numbers of log-probabilities, -1 being all."""
    return WHOLE_VOCABULARY if WHOLE_VOCABULARY in {one, other} else max(one, other)


async def _prompt(body: CompletionBody, context: ServerContext, given: str | list[int], *, one_of_many: bool) -> Prompt:
    """A prompt as the engine takes it; if it is echoed, one that came as ids, or was cut, is decoded."""
    info, tokenizer = context.engine.info, context.engine.tokenizer
    if isinstance(given, str):
        special = body.add_special_tokens is not False
        token_ids = await encode(tokenizer, given, add_special_tokens=special, one_of_many=one_of_many)
        require_tokens(token_ids)
    else:
        require_known(given, info.vocab_size, param="prompt")
        token_ids = given
    kept = body.truncated(token_ids, room=info.max_model_len - (body.max_tokens or DEFAULT_MAX_TOKENS))
    if isinstance(given, str) and kept is token_ids:
        return Prompt(kept, given)
    return Prompt(kept, tokenizer.decode(kept, skip_special_tokens=False) if body.echo else None)
