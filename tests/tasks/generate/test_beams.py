"""Beam search without a model, beside one that is written down plainly and never stops early."""

import math
from random import Random

import pytest

from shuteye.errors import InvalidRequest
from shuteye.tasks.generate.beams import BeamSearch, BeamSearchParams
from shuteye.tasks.generate.requests import Logprob

EOS = 0


def candidates_after(seed, token_ids, count):
    """The likeliest tokens after these, of a model that is made up; the eos is often among them."""
    weights = [Random(f"{seed} {token_ids}").random() ** 3 for _ in range(7)]
    best = sorted(range(7), key=lambda token: -weights[token])[:count]
    return {token: Logprob(math.log(weights[token] / sum(weights)), rank + 1) for rank, token in enumerate(best)}


def searched(seed, params):
    search = BeamSearch(params, frozenset([EOS]))
    num_steps = 0
    while not search.is_over:
        search.advance([candidates_after(seed, beam.token_ids, params.num_candidates) for beam in search.live])
        num_steps += 1
    return search, num_steps


def plainly(seed, params):
    """Token ids and scores of the best, found by going on to the last token."""
    live, done = [((), 0.0)], []
    for _ in range(params.max_tokens):
        grown = [
            ((*token_ids, token), logprob + found.logprob)
            for token_ids, logprob in live
            for token, found in candidates_after(seed, token_ids, params.num_candidates).items()
        ]
        ends = [] if params.ignore_eos else [one for one in grown if one[0][-1] == EOS]
        done += ends
        live = sorted((one for one in grown if one not in ends), key=lambda one: -one[1])[: params.beam_width]
    scored = [(logprob / len(token_ids) ** params.length_penalty, token_ids) for token_ids, logprob in done + live]
    return sorted(scored, key=lambda one: -one[0])[: params.beam_width]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_it_finds_what_a_search_to_the_last_token_finds(length_penalty, ignore_eos):
    """Stopping while a beam could still win, a lost beam, a score by the wrong length."""
    saved = 0
    for seed in range(40):
        params = BeamSearchParams(3, 8, length_penalty=length_penalty, ignore_eos=ignore_eos)
        search, num_steps = searched(seed, params)
        winners, expected = search.winners(), plainly(seed, params)
        assert [beam.token_ids for beam in winners] == [token_ids for _score, token_ids in expected]
        assert [beam.score(length_penalty) for beam in winners] == pytest.approx([score for score, _ids in expected])
        saved += params.max_tokens - num_steps
    assert saved > 0 or ignore_eos or length_penalty > 0, "it goes on to the last token"


def test_an_abort_leaves_what_there_is():
    """A search that goes on after its model was put to sleep, or that has nothing to show for it."""
    params = BeamSearchParams(2, 8, ignore_eos=True)
    search = BeamSearch(params, frozenset())
    search.advance([candidates_after(1, (), 4)])
    search.abort()
    assert search.is_over
    assert [(len(beam.token_ids), beam.finish_reason) for beam in search.winners()] == [(1, "abort")] * 2
    fresh = BeamSearch(params, frozenset())
    fresh.abort()
    assert fresh.is_over


@pytest.mark.parametrize("wrong", [{"beam_width": 0}, {"max_tokens": 0}, {"length_penalty": math.nan}])
def test_what_is_out_of_range_is_refused_by_name(wrong):
    """A search without beams, or scores that are no numbers."""
    with pytest.raises(InvalidRequest) as refused:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | wrong))
    assert refused.value.param == next(iter(wrong))


def test_a_beam_that_may_still_win_by_its_length_is_followed():
    """An early end by what one more token would make of a score, where a long certain text has a better one."""
    search = BeamSearch(BeamSearchParams(1, 64, length_penalty=0.1), frozenset([EOS]))
    search.advance([{EOS: Logprob(math.log(0.4), 1), 1: Logprob(math.log(0.3), 2)}])
    while not search.is_over:
        search.advance([{1: Logprob(0.0, 1), EOS: Logprob(-50.0, 2)}])
    assert search.winners()[0].token_ids == (1,) * 64
