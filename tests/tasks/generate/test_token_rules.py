"""Biases, allowed tokens, bad sequences and grammar masks, through the sampler that applies them."""

import math

import numpy as np
import pytest
import torch

from shuteye.tasks.generate.plans import Admission, TokenMask
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.tasks.generate.sampler import Sampler

VOCAB = 40
EOS = 1


def make():
    return Sampler(vocab_size=VOCAB, eos_token_ids=(EOS,), seed=0)


def admit(sampler, request_id, **params):
    sampler.admit([Admission(request_id, SamplingParams(**({"temperature": 0.0} | params)), (0,))])


def draw(sampler, logits, *request_ids, masks=()):
    return [token.token_id for token in sampler.sample(logits.numpy(), request_ids, masks)]


def falling(rows=1):
    """Token i is the i-th likeliest."""
    return -torch.arange(VOCAB, dtype=torch.float32).expand(rows, -1)


def mask_of(request_id, *allowed, width=VOCAB):
    bits = np.zeros(-(-width // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return TokenMask(request_id, np.packbits(bits, bitorder="little").tobytes())


def test_rules_hold_for_their_own_row_only():
    """A rule on another row, or on the logits that log-probabilities are read from."""
    sampler = make()
    admit(sampler, "bias", logit_bias={7: 100.0, 0: -100.0})
    admit(sampler, "plain")
    admit(sampler, "allowed", allowed_token_ids=[9, 30])
    admit(sampler, "bad", bad_token_ids=((0,),))
    logits = falling(4)
    assert draw(sampler, logits, "bias", "plain", "allowed", "bad") == [7, 0, 9, 1]
    assert torch.equal(logits, falling(4))


def test_only_the_end_of_a_bad_sequence_is_forbidden_and_only_after_its_beginning():
    """Single tokens of a bad word forbidden everywhere; or history lost, so that the word is written after all."""
    sampler = make()
    admit(sampler, "r", bad_token_ids=((3, 5, 0), (4, 0)))
    logits = falling()
    steps = [(3, 3), (5, 5), (0, 1), (4, 4), (0, 1), (5, 5), (0, 0)]  # pushed to the top → drawn
    for wanted, drawn in steps:
        pushed = logits.clone()
        pushed[0, wanted] += 100
        pushed[0, 1] += 50  # next best
        assert draw(sampler, pushed, "r") == [drawn]


def test_a_mask_leaves_what_it_allows_in_every_way_of_sampling():
    """A route of the sampler that goes around the mask."""
    ways = [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 39}, {"min_p": 0.5}]
    for way in ways:
        sampler = make()
        admit(sampler, "r", **({"temperature": 1.0} | way))
        drawn = {draw(sampler, falling(), "r", masks=[mask_of("r", 11, 31, 39)])[0] for _ in range(30)}
        assert drawn <= {11, 31, 39}, way


def test_a_mask_narrower_than_the_logits_forbids_the_rest():
    """Padding of the vocabulary, for which a tokenizer has no tokens, drawn."""
    sampler = make()
    admit(sampler, "r")
    logits = falling()
    logits[0, 35] = 100
    assert draw(sampler, logits, "r", masks=[mask_of("r", 4, width=32)]) == [4]


def test_rules_that_leave_nothing_yield_to_the_grammar_and_to_the_allowed_tokens():
    """All tokens at minus infinity: token 0 would be drawn, which nobody allowed."""
    sampler = make()
    admit(sampler, "grammar", min_tokens=5, bad_token_ids=((6,),))
    admit(sampler, "allowed", allowed_token_ids=[6], bad_token_ids=((6,),))
    masks = [mask_of("grammar", EOS, 6)]
    assert draw(sampler, falling(2), "grammar", "allowed", masks=masks) == [EOS, 6]


def test_penalties_and_masks_go_together():
    """A penalty that lifts a forbidden token from minus infinity (0 · ∞ is no number)."""
    sampler = make()
    admit(sampler, "r", repetition_penalty=2.0, presence_penalty=-2.0, frequency_penalty=-2.0)
    for _ in range(3):
        assert draw(sampler, falling(), "r", masks=[mask_of("r", 8)]) == [8]


def test_logprobs_are_of_the_logits_before_any_rule():
    """Log-probabilities that change with a grammar (vLLM's are raw)."""
    sampler = make()
    admit(sampler, "r", logprobs=1, logit_bias={7: 100.0})
    (token,) = sampler.sample(falling().numpy(), ["r"], [mask_of("r", 7)])
    raw = falling()[0].log_softmax(-1)
    assert token.token_id == 7
    assert token.logprobs.token_ids == (7, 0)
    assert token.logprobs.ranks == (8, 1)
    assert token.logprobs.logprobs == pytest.approx((raw[7].item(), raw[0].item()))
    assert not any(math.isinf(value) for value in token.logprobs.logprobs)
