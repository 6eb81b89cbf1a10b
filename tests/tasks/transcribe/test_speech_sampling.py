"""Penalties and filters of speech, by their definitions."""

from __future__ import annotations

import pytest
import torch

from shuteye.errors import InvalidRequest
from shuteye.tasks.transcribe.requests import TranscribeParams
from shuteye.tasks.transcribe.sampling import drawn, penalized

SCORES = torch.tensor([2.0, -1.0, 1.0, 0.5, -3.0])


def test_penalties_are_for_what_was_said():
    """A penalty of the wrong sign, of a token that was not said, or one that grows where it should not."""
    said = [0, 1, 1]
    repeated = penalized(SCORES, TranscribeParams(repetition_penalty=2.0), said)
    assert repeated.tolist() == [1.0, -2.0, 1.0, 0.5, -3.0]
    assert penalized(SCORES, TranscribeParams(frequency_penalty=0.5), said).tolist() == [1.5, -2.0, 1.0, 0.5, -3.0]
    assert penalized(SCORES, TranscribeParams(presence_penalty=0.5), said).tolist() == [1.5, -1.5, 1.0, 0.5, -3.0]
    assert SCORES.tolist() == [2.0, -1.0, 1.0, 0.5, -3.0], "the caller's logits were written to"
    assert penalized(SCORES, TranscribeParams(repetition_penalty=2.0), []) is SCORES


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.3}, {0, 2}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.7}, {0, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0001}, {0}),
        ({"top_p": 0.7, "top_k": 2}, {0}),  # of what is left, as in vLLM
    ],
)
def test_only_what_the_filters_leave_is_drawn(params, possible):
    """A filter that lets through what it should not, keeps nothing, or keeps less than all where it is off."""
    asked = [TranscribeParams(temperature=1.0, seed=seed, **params) for seed in range(400)]
    found = {drawn(SCORES, each, num_sampled=3) for each in asked}
    assert found == possible


def test_a_seed_draws_anew_for_each_token():
    """A transcript in which every token has the same luck."""
    asked = TranscribeParams(temperature=1.0, seed=7)
    found = [drawn(SCORES, asked, num_sampled=count) for count in range(60)]
    assert len({*found}) > 2
    assert found == [drawn(SCORES, asked, num_sampled=count) for count in range(60)]


def test_greedy_takes_no_notice_of_filters():
    assert drawn(SCORES, TranscribeParams(top_k=1, seed=5), num_sampled=0) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.0), ("top_k", -2), ("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", 3.0),
     ("frequency_penalty", -3.0), ("max_tokens", 0)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequest) as refused:
        TranscribeParams(**{name: value})
    assert refused.value.param == name
