"""POST /v1/completions.

Knows nothing of how tokens are made, nor of how answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from shuteye.request import SamplingParams
from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.budget import require_prompt_tokens, require_sequences
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation import Job, Prompt, require_room
from shuteye.server.prompts import prompt_of, truncation_of
from shuteye.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionBody, CompletionShape
from shuteye.server.protocol.logprobs import TokenNames
from shuteye.tokenizer import LONG_TEXT

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionBody, context: Context) -> Response:
    """Continues one or more prompts, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job = await _job(body, context)
    shape = CompletionShape(
        names=TokenNames(context.engine.tokenizer, as_ids=body.return_tokens_as_token_ids is True),
        prompts=job.prompts,
        num_choices=job.best or job.params.n,
        wants_logprobs=body.logprobs is not None,
        echoes=body.echo is True,
        echoes_only=job.echoes_only,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        shows_token_ids=body.return_token_ids is True,
    )
    if body.stream:
        return await answer_stream(request, context, job, shape=shape, model=model, usage_in=body.usage_in)
    return await answer_whole(request, context, job, shape=shape, model=model)


async def _job(body: CompletionBody, context: ServerContext) -> Job:
    info = context.engine.info
    n = max(body.n or 1, body.best_of or 1)
    given = body.prompts
    require_sequences(context.config, len(given) * n, param="n" if len(given) == 1 else "prompt")
    prompts = await _prompts(body, given, context)
    require_prompt_tokens(sum(len(prompt.token_ids) for prompt in prompts) * n, param="prompt")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_tokens = 1 if body.echoes_only else body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.max_model_len - longest))
    params = body.sampling_params(info.default_sampling, max_tokens=max_tokens, logprobs=body.logprobs)
    require_room(longest, max_tokens, info.max_model_len)
    params, best = _ranked(body, params)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    return Job(new_request_id("cmpl"), prompts, params, best=best, echoes_only=body.echoes_only)


def _ranked(body: CompletionBody, params: SamplingParams) -> tuple[SamplingParams, int | None]:
    """With `best_of`, as many completions as that, with log-probabilities to rank them by; and how many to keep."""
    if body.best_of in {None, params.n}:
        return params, None
    return replace(params, n=body.best_of, logprobs=params.logprobs or 0), params.n


async def _prompts(
    body: CompletionBody, given: Sequence[str | list[int]], context: ServerContext
) -> tuple[Prompt, ...]:
    truncation = truncation_of(
        body, max_model_len=context.engine.info.max_model_len, max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS
    )
    many = sum(map(len, given)) > LONG_TEXT
    return tuple(
        [
            await prompt_of(
                context.engine.tokenizer,
                prompt,
                vocab_size=context.engine.info.vocab_size,
                add_special_tokens=body.add_special_tokens is not False,
                want_text=body.echo is True,
                truncation=truncation,
                one_of_many=many,
            )
            for prompt in given
        ]
    )
