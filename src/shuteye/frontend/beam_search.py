"""Beam search on any engine: each step is one token of every beam, as requests that share their beginnings' K/V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shuteye.errors import InvalidRequest
from shuteye.frontend.batch import last_of_all
from shuteye.frontend.engine import Engine
from shuteye.tasks.generate.beams import Beam, BeamSearch, BeamSearchParams
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tasks.generate.requests import CompletionOutput, Logprob, RequestOutput, SamplingParams
from shuteye.tokenizer import Tokenizer


async def beam_search(
    engine: Engine, prompt: Sequence[int], params: BeamSearchParams, *, request_id: str
) -> RequestOutput:
    """The `beam_width` best completions of a prompt, the best first; cancelling it aborts what runs.

    A sleep that ends its requests ends the search: what there is then has finish reason "abort".

    Raises:
        InvalidRequest: the engine gives fewer log-probabilities per token than the search looks at.
        ShuteyeError: refused or failed, as any request.
    """
    info = engine.info
    if 0 <= info.max_logprobs < min(params.num_candidates, info.vocab_size):
        raise InvalidRequest(
            f"A beam search with n={params.beam_width} looks at {params.num_candidates} log-probabilities per token, "
            f"of which this engine gives {info.max_logprobs} (--max-logprobs). Lower n.",
            param="n",
        )
    room = max(1, info.max_model_len - len(prompt))
    search = BeamSearch(replace(params, max_tokens=min(params.max_tokens, room)), frozenset(info.eos_token_ids))
    step = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprobs=min(params.num_candidates, info.vocab_size),
        priority=params.priority,
        cache_salt=params.cache_salt,
    )
    outputs = await _stepped(engine, prompt, search, step, request_id)
    begun = outputs[0]
    while not search.is_over:
        outputs = await _stepped(engine, prompt, search, step, request_id)
    completions = [_completion(index, beam, search, engine.tokenizer) for index, beam in enumerate(search.winners())]
    return replace(begun, request_id=request_id, outputs=tuple(completions), finished=True)


async def _stepped(
    engine: Engine, prompt: Sequence[int], search: BeamSearch, step: SamplingParams, request_id: str
) -> Sequence[RequestOutput]:
    """One token more of every beam; what came of the requests that asked for it."""
    jobs = [GenerationJob([*prompt, *beam.token_ids], step, "final_only") for beam in search.live]
    outputs = await last_of_all(engine, jobs, request_id=request_id)
    candidates = [output.outputs[0].logprobs for output in outputs if output.outputs[0].finish_reason != "abort"]
    if len(candidates) < len(jobs):
        search.abort()
    else:
        search.advance([_likeliest(found) for found in candidates])
    return outputs


def _likeliest(found: Sequence[Mapping[int, Logprob]] | None) -> Mapping[int, Logprob]:
    assert found, "a token came without log-probabilities"
    return found[0]


def _completion(index: int, beam: Beam, search: BeamSearch, tokenizer: Tokenizer) -> CompletionOutput:
    params = search.params
    ended = beam.finish_reason == "stop"
    shown = beam.token_ids[:-1] if ended and not params.include_stop_str_in_output else beam.token_ids
    logprobs = None
    if params.logprobs is not None:
        chosen = zip(beam.token_ids, beam.logprobs, strict=True)
        logprobs = tuple(_first(token_id, among, params.logprobs) for token_id, among in chosen)
    return CompletionOutput(
        index=index,
        text=tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens),
        token_ids=beam.token_ids,
        finish_reason=beam.finish_reason,
        logprobs=logprobs,
    )


def _first(chosen: int, among: Mapping[int, Logprob], count: int) -> dict[int, Logprob]:
    """The chosen token first, then as many of the likeliest as are wanted."""
    return {chosen: among[chosen]} | {token_id: one for token_id, one in among.items() if one.rank <= count}
