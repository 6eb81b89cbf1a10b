"""How many log-probabilities a request may ask for, and what it is given of the whole vocabulary."""

import pytest
import torch

from shuteye.errors import InvalidRequest
from shuteye.tasks.generate.logprob_limits import MAX_WIDE_LOGPROBS, LogprobLimits, scored_per_step
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(3, 23))
OPEN = LogprobLimits(vocab_size=1000, max_logprobs=-1, max_model_len=4096)


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_the_whole_vocabulary_is_for_engines_that_allow_it(field):
    """A public server that anyone can have write out fifty thousand numbers for each token."""
    params = SamplingParams(max_tokens=2, **{field: -1})
    with pytest.raises(InvalidRequest, match=r"1,000 alternatives .* at most 20 .*--max-logprobs") as refused:
        LogprobLimits(vocab_size=1000).resolved(params, num_prompt_tokens=3)
    assert refused.value.param == field
    assert getattr(OPEN.resolved(params, num_prompt_tokens=3), field) == 1000


@pytest.mark.parametrize(
    ("params", "tokens", "prompts", "param"),
    [
        ({"logprobs": -1, "max_tokens": 2200}, 1, 1, "logprobs"),
        ({"logprobs": -1, "max_tokens": None}, 1, 1, "logprobs"),
        ({"logprobs": -1, "max_tokens": 220, "n": 10}, 1, 1, "logprobs"),
        ({"logprobs": -1, "max_tokens": 220}, 1, 10, "logprobs"),
        ({"prompt_logprobs": -1}, 2200, 1, "prompt_logprobs"),
        ({"prompt_logprobs": -1, "logprobs": 25, "max_tokens": 100}, 2200, 1, "prompt_logprobs"),
    ],
)
def test_what_all_tokens_come_to_is_bounded(params, tokens, prompts, param):
    """Memory for as many numbers as anyone likes: of long answers, of many choices, of many prompts."""
    with pytest.raises(InvalidRequest, match=f"at most {MAX_WIDE_LOGPROBS:,}") as refused:
        OPEN.resolved(SamplingParams(**params), num_prompt_tokens=tokens, num_prompts=prompts)
    assert refused.value.param == param


def test_the_usual_twenty_are_not_counted():
    """A long answer with OpenAI's most log-probabilities, refused."""
    params = SamplingParams(logprobs=20, prompt_logprobs=20, max_tokens=4096, n=128)
    assert OPEN.resolved(params, num_prompt_tokens=4096) == params


def test_wide_prompts_are_scored_in_small_steps():
    """A step whose answer is hundreds of megabytes, during which nobody else gets a token."""
    assert [scored_per_step(count, 256) for count in (0, 20, 999, 49_151, 10**9)] == [256, 256, 65, 1, 1]


@pytest.mark.parametrize("budget", [512, 7])
def test_the_whole_vocabulary_is_what_the_model_said(make_harness, tiny_checkpoint, budget):
    """Rows of another position or another request, or alternatives that are left out."""
    from transformers import AutoModelForCausalLM

    harness = make_harness(max_num_batched_tokens=budget)
    seen = {}
    step = harness.core.step

    def listening():
        deltas = step()
        for delta in deltas:
            for kind in ("prompt_logprobs", "logprobs"):
                seen.setdefault((delta.request_id, kind), []).extend(getattr(delta, kind))
        return deltas

    harness.core.step = listening
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    size = model.config.vocab_size
    wide = SamplingParams(temperature=0.0, max_tokens=1, logprobs=size, prompt_logprobs=size)
    harness.add("narrow", PROMPT, SamplingParams(temperature=0.0, max_tokens=1, logprobs=2))
    harness.add("wide", PROMPT, wide)
    harness.add("named", PROMPT, SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=(5, 9)))
    harness.run()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    found = [*seen["wide", "prompt_logprobs"], *seen["wide", "logprobs"]]
    assert len(found) == len(PROMPT)
    for row, at in enumerate(found):
        assert set(at.token_ids) == set(range(size))
        given = dict(zip(at.token_ids, at.logprobs, strict=True))
        assert [given[token] for token in range(size)] == pytest.approx(expected[row].tolist(), abs=1e-4)
    [narrow], [named] = seen["narrow", "logprobs"], seen["named", "logprobs"]
    best = narrow.token_ids[0]
    assert narrow.token_ids[:3] == found[-1].token_ids[:3]
    assert set(named.token_ids) == {best, 5, 9}
    assert named.logprobs == pytest.approx([expected[-1][token].item() for token in named.token_ids], abs=1e-4)
    ranks = [int((expected[-1] > expected[-1][token]).sum()) + 1 for token in named.token_ids]
    assert named.ranks == tuple(ranks)
