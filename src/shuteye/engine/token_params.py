"""Sampling parameters that name tokens: checked against the vocabulary, bad words turned into token sequences.

Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shuteye.errors import InvalidRequest
from shuteye.request import SamplingParams
from shuteye.tokenizer import Tokenizer


def settled(params: SamplingParams, tokenizer: Tokenizer, *, vocab_size: int) -> SamplingParams:
    """The parameters as the engine takes them.

    Raises:
        InvalidRequest: a token id that the model does not know; `param` names the field.
    """
    if params.logit_bias is None and params.allowed_token_ids is None and not params.bad_words:
        return params
    _require_known(params.logit_bias or (), vocab_size, param="logit_bias")
    _require_known(params.allowed_token_ids or (), vocab_size, param="allowed_token_ids")
    if params.allowed_token_ids is not None:
        params = replace(params, allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids)))
    bad = [sequence for word in params.bad_words for sequence in _spellings(word, tokenizer)]
    return replace(params, bad_token_ids=tuple(bad))


def _require_known(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param} names token {token_id}, which is not in the vocabulary; ids go from 0 to {vocab_size - 1}.",
                param=param,
            )


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the beginning of a text, and within one if they differ in the first token only (as vLLM)."""
    opening = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    within = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
    if not opening:
        raise InvalidRequest(f"bad_words has {word!r}, which is no token of this model.", param="bad_words")
    if len(within) == len(opening) and within[0] != opening[0]:
        return [opening, within]
    return [opening]
