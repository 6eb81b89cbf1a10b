"""Log-probabilities of the prompt: the same as transformers', whatever the chunks, the cache and the sleeps."""

import functools
from dataclasses import replace

import pytest
import torch

from shuteye.calls import SleepCall, WakeCall
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(3, 103))
SCORED = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=2)


class Scores:
    """Collects what an engine core's deltas say of prompts."""

    def __init__(self, harness):
        self.found = {}
        step = harness.core.step

        @functools.wraps(step)
        def listening():
            deltas = step()
            for delta in deltas:
                self.found.setdefault(delta.request_id, []).extend(delta.prompt_logprobs)
            return deltas

        harness.core.step = listening


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    """Per position from the second on: log-probability and rank of the prompt's own token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    own = [logprobs[at, token] for at, token in enumerate(PROMPT[1:])]
    return [(value.item(), int((logprobs[at] > value).sum()) + 1) for at, value in enumerate(own)]


def check(scores, expected):
    assert [score.token_ids[0] for score in scores] == list(PROMPT[1:])
    assert [score.logprobs[0] for score in scores] == pytest.approx([value for value, _rank in expected], abs=1e-4)
    assert [score.ranks[0] for score in scores] == [rank for _value, rank in expected]
    assert all(len(score.token_ids) == 3 and score.ranks[1:] == (1, 2) for score in scores)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("budget", [512, 7])
def test_scores_are_transformers_own(make_harness, expected, kernels, budget):
    """Rows taken from the wrong place of a packed batch, or lost between two chunks."""
    harness = make_harness(max_num_batched_tokens=budget, kernels=kernels)
    scores = Scores(harness)
    harness.add("plain", PROMPT[:20])
    harness.add("r", PROMPT, SCORED)
    harness.add("other", PROMPT[5:50])
    harness.run()
    check(scores.found["r"], expected)
    assert scores.found["plain"] == []
    assert harness.tokens["r"] == harness.generate(PROMPT, replace(SCORED, prompt_logprobs=None))


def test_the_prefix_cache_is_passed_by(make_harness, expected):
    """Positions that the cache holds have no logits: their scores would be missing."""
    harness = make_harness()
    harness.generate(PROMPT)
    scores = Scores(harness)
    harness.add("r", PROMPT, SCORED)
    harness.run()
    check(scores.found["r"], expected)


def test_a_sleep_in_the_midst_of_a_prompt_tells_no_score_twice(make_harness, expected):
    """Scores told again, or forgotten, when the prompt is computed anew."""
    harness = make_harness(max_num_batched_tokens=8)
    scores = Scores(harness)
    harness.add("r", PROMPT, SCORED)
    for _ in range(5):
        harness.step()
    assert 0 < len(scores.found["r"]) < len(PROMPT) - 1
    harness.call(SleepCall(1, mode="keep"))
    harness.call(WakeCall())
    harness.run()
    check(scores.found["r"], expected)


def test_a_prompt_of_one_token_has_nothing_to_score(harness):
    """An endless wait for scores that never come, or an index error."""
    scores = Scores(harness)
    harness.add("r", PROMPT[:1], SCORED)
    harness.run()
    assert scores.found["r"] == []
    assert harness.ended["r"] == "length"
