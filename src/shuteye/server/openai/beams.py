"""`use_beam_search`: which other fields of a request go together with it, and what the search is asked for."""

from __future__ import annotations

from shuteye.errors import InvalidRequest
from shuteye.server.openai.fields import GUIDED, GenerationBody
from shuteye.tasks.generate.beams import BeamSearchParams
from shuteye.tasks.generate.requests import SamplingParams

_LEFT_OUT = (
    "stop", "stop_token_ids", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs",
    "logprob_token_ids", "best_of", "structured_outputs", *GUIDED,
)  # fmt: skip
"""Fields that a search would not heed."""

_NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def beams_of(body: GenerationBody, params: SamplingParams, *, max_tokens: int) -> BeamSearchParams | None:
    """What a search is asked for; None if the request does not ask for one. `temperature` and its like change nothing.

    Raises:
        InvalidRequest: a field that a search would not heed is given, or `length_penalty` without a search.
    """
    if not body.use_beam_search:
        if body.length_penalty not in {None, 1.0}:
            raise InvalidRequest("length_penalty is only allowed with use_beam_search.", param="length_penalty")
        return None
    given = [name for name in _LEFT_OUT if getattr(body, name, None)]
    given += [name for name, neutral in _NEUTRAL.items() if getattr(body, name) not in {None, neutral}]
    if params.structured_outputs is not None and not given:
        given = [params.structured_outputs.param]
    if given:
        raise InvalidRequest(f"{given[0]} is not supported together with use_beam_search.", param=given[0])
    return BeamSearchParams(
        beam_width=params.n,
        max_tokens=max_tokens,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        logprobs=params.logprobs,
        priority=params.priority,
        cache_salt=params.cache_salt,
    )
