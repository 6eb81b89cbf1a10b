"""The sampler against naive references and against statistics, with fixed seeds throughout."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.tasks.generate import sampler as sampler_module
from shuteye.tasks.generate.adjustments import SeenTokens
from shuteye.tasks.generate.plans import Admission
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.tasks.generate.sampler import LARGE_WIDTH, SMALL_WIDTH, Sampler

EOS = 1


def make(vocab_size, *, seed=0):
    return Sampler(vocab_size=vocab_size, eos_token_ids=(EOS,), seed=seed)


def admit(sampler, request_id, prompt=(0,), **params):
    sampler.admit([Admission(request_id, SamplingParams(**params), tuple(prompt))])


def draw(sampler, logits, *request_ids):
    return [token.token_id for token in sampler.sample(logits.numpy(), request_ids)]


def draw_many(logits, *, times, vocab_size=None, sampler_seed=0, **params):
    """`times` independent first tokens from the same logits: one batch of equal rows."""
    sampler = make(len(logits), seed=sampler_seed)
    ids = [f"r{i}" for i in range(times)]
    for request_id in ids:
        admit(sampler, request_id, **params)
    return draw(sampler, logits.expand(times, -1), *ids)


def naive_probs(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Textbook filters, one token at a time, in float64; ties at an edge are the caller's problem."""
    scores = [value / temperature for value in logits.double().tolist()]
    largest = max(scores)
    weights = {token: math.exp(score - largest) for token, score in enumerate(scores)}
    weights = {token: weight for token, weight in weights.items() if weight >= min_p}  # the likeliest weighs 1
    ordered = sorted(weights, key=weights.__getitem__, reverse=True)[: top_k if top_k > 0 else None]
    total = sum(weights[token] for token in ordered)
    kept, before = {}, 0.0
    for token in ordered:
        if kept and top_p < 1.0 and before >= top_p:
            break
        kept[token] = weights[token]
        before += weights[token] / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def assert_follows(tokens, expected):
    """Chi-square against `expected`, at a bound that chance exceeds about once in 10,000 (fixed seeds: never again)."""
    counts = Counter(tokens)
    assert set(counts) <= set(expected), "a filtered token was drawn"
    common = {token: prob for token, prob in expected.items() if prob * len(tokens) >= 5}
    rest = len(tokens) - sum(counts[token] for token in common)
    cells = [(counts[token], prob * len(tokens)) for token, prob in common.items()]
    rest_expected = len(tokens) - sum(mean for _, mean in cells)
    if rest_expected >= 5:
        cells.append((rest, rest_expected))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert chi_square <= freedom + 3.72 * math.sqrt(2 * freedom) + 10, (chi_square, freedom)


def distinct_logits(vocab_size, *, seed, scale=3.0):
    """Random logits without ties, and with gaps that float32 cannot blur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(vocab_size, generator=generator).float() * (2 * scale / vocab_size) - scale


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_k": 40},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.05, "temperature": 1.3},
    ],
)
def test_draws_follow_the_filtered_distribution(params):
    """Catches a wrong normaliser, a filter in the wrong order, a draw that is off by one place."""
    logits = distinct_logits(50, seed=3)
    assert_follows(draw_many(logits, times=8_000, **params), naive_probs(logits, **params))


@pytest.mark.parametrize(
    ("vocab_size", "params"),
    [
        (3000, {"top_k": SMALL_WIDTH, "top_p": 0.8}),
        (3000, {"top_k": SMALL_WIDTH + 1}),
        (3000, {"top_k": LARGE_WIDTH + 1, "top_p": 0.5}),
        (3000, {"top_p": 0.3}),  # the nucleus fits the candidates: normalised by the whole vocabulary all the same
        (3000, {"top_p": 0.99}),  # it does not: sorted
        (3000, {"top_p": 0.9, "min_p": 0.5}),
    ],
)
def test_wide_vocabulary_takes_every_route_correctly(vocab_size, params):
    """Catches a nucleus normalised over the candidates instead of the vocabulary, and a cut-off sort."""
    logits = distinct_logits(vocab_size, seed=5, scale=2.0)
    expected = naive_probs(logits, **params)
    tokens = draw_many(logits, times=4_000, **params)
    assert set(tokens) <= set(expected)
    order = logits.argsort(descending=True).argsort().tolist()  # rank of each token
    bucket = max(len(expected) // 20, 1)
    grouped = Counter()
    for token, prob in expected.items():
        grouped[order[token] // bucket] += prob
    assert_follows([order[token] // bucket for token in tokens], dict(grouped))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.integers(2, 200),
    params=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.9]),
            "top_k": st.one_of(st.just(0), st.just(-1), st.integers(1, 250)),
            "top_p": st.sampled_from([0.05, 0.31, 0.57, 0.83, 0.97, 1.0]),
            "min_p": st.sampled_from([0.0, 0.013, 0.17, 0.61, 1.0]),
        }
    ),
)
def test_support_equals_the_naive_filters(seed, vocab_size, params):
    """Catches off-by-one edges of each filter, for every combination: what may be drawn is compared exactly."""
    logits = distinct_logits(vocab_size, seed=seed)
    expected = set(naive_probs(logits, **params))
    assert support(logits, **params) == expected


def support(logits, **params):
    """The tokens left unfiltered, read where the noise would be added."""
    seen = {}

    class Spy(Sampler):
        def _pick(self, candidates, sampled):
            seen["candidates"] = candidates
            return super()._pick(candidates, sampled)

    spy = Spy(vocab_size=len(logits), eos_token_ids=(), seed=0)
    admit(spy, "a", **params)
    draw(spy, logits.unsqueeze(0), "a")
    kept = np.isfinite(seen["candidates"].scores[0])
    ids = seen["candidates"].token_ids
    return set((np.flatnonzero(kept) if ids is None else ids[0][kept]).tolist())


def test_ties_keep_exactly_top_k():
    """Catches bfloat16 ties widening top_k."""
    assert len(support(torch.zeros(100), top_k=7)) == 7
    assert len(support(torch.zeros(3000), top_k=7)) == 7


def test_greedy_is_one_argmax(monkeypatch):
    """Catches a greedy batch that pays for filters or draws."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    sampler = make(40)
    for name in "abc":
        admit(sampler, name, temperature=0.0)
    for name in ("draw", "top_k", "truncate", "mask_min_p"):
        monkeypatch.setattr(sampler_module, name, None)
    monkeypatch.setattr(SeenTokens, "penalize", None)
    assert draw(sampler, logits, *"abc") == logits.argmax(-1).tolist()


def test_tiny_temperature_is_greedy():
    """Catches the overflow of logits / 1e-30."""
    logits = distinct_logits(50, seed=1)
    assert set(draw_many(logits, times=50, temperature=1e-30)) == {int(logits.argmax())}


def test_mixed_batch_gives_each_row_its_own_parameters():
    """Catches rows scattered back to the wrong places, and parameters of a neighbour."""
    vocab_size, kinds = 3000, ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 100})
    logits = torch.stack([distinct_logits(vocab_size, seed=i) for i in range(20)])
    sampler = make(vocab_size)
    ids = [f"r{i}" for i in range(20)]
    for i, request_id in enumerate(ids):
        admit(sampler, request_id, **kinds[i % len(kinds)])
    tokens = draw(sampler, logits, *ids)
    for i, token in enumerate(tokens):
        allowed = 100 if i % len(kinds) == 4 else 1
        assert token in logits[i].topk(allowed).indices


ROUTES = [{}, {"top_k": 8}, {"top_k": 500}, {"top_p": 0.4}, {"top_p": 0.99}, {"top_k": 2000, "top_p": 0.9}]


@pytest.mark.parametrize("params", ROUTES)
def test_seed_means_the_same_alone_and_in_any_batch(params):
    """Catches a draw that depends on neighbours, on the row's place, or on steps in which the request did not run."""
    vocab_size, steps = 3000, 12
    logits = torch.stack([distinct_logits(vocab_size, seed=100 + i, scale=2.0) for i in range(steps)])

    alone = make(vocab_size)
    admit(alone, "a", seed=7, **params)
    expected = [draw(alone, logits[i : i + 1], "a")[0] for i in range(steps)]
    assert len(set(expected)) > 3

    crowd = make(vocab_size, seed=99)
    admit(crowd, "a", seed=7, **params)
    seen = []
    for step in range(steps):
        if step % 5 == 3:  # preempted or asleep: others run, it does not
            draw(crowd, logits[:1], f"other{step - 1}")
        others = [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}, {"seed": 7}][step % 5]
        admit(crowd, f"other{step}", **others)
        batch = ["a", f"other{step}"] if step % 2 else [f"other{step}", "a"]
        tokens = draw(crowd, logits[step : step + 1].expand(2, -1), *batch)
        seen.append(tokens[batch.index("a")])
    assert seen == expected


def test_seeds_and_positions_are_independent():
    """Catches one seed drawing alike at each token, and neighbouring seeds correlated with each other."""
    logits = distinct_logits(30, seed=2, scale=1.5)
    by_seed = [draw_many(logits, times=1, seed=seed)[0] for seed in range(5_000)]
    assert_follows(by_seed, naive_probs(logits))
    sampler = make(30)
    admit(sampler, "a", seed=1)
    by_position = [draw(sampler, logits.unsqueeze(0), "a")[0] for _ in range(5_000)]
    assert_follows(by_position, naive_probs(logits))
    repeats = sum(one == other for one, other in itertools.pairwise(by_position)) / 5_000
    assert abs(repeats - sum(prob**2 for prob in naive_probs(logits).values())) < 0.02


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed):
    """Catches seeds outside 64 bits that are refused."""
    logits = distinct_logits(30, seed=2)
    assert draw_many(logits, times=1, seed=seed) == draw_many(logits, times=1, seed=seed, sampler_seed=5)


def test_unseeded_rows_follow_the_engine_seed():
    """Catches unseeded requests drawing from global state, and equal rows drawing the same token."""
    logits = distinct_logits(200, seed=2, scale=1.0)
    first = draw_many(logits, times=100, sampler_seed=1)
    assert first == draw_many(logits, times=100, sampler_seed=1)
    assert first != draw_many(logits, times=100, sampler_seed=2)
    assert len(set(first)) > 30


def naive_penalized(logits, prompt, output, params):
    values = logits.double().tolist()
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token, count in Counter(output).items():
        values[token] -= params.frequency_penalty * count + params.presence_penalty
    return values


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    presence=st.sampled_from([-1.5, 0.0, 0.7]),
    frequency=st.sampled_from([-0.4, 0.0, 0.9]),
    prompt=st.lists(st.integers(0, 19), min_size=1, max_size=12),
)
def test_greedy_with_penalties_follows_the_naive_reference(seed, repetition, presence, frequency, prompt):
    """Catches history lost between steps or when the batch changes, and prompt tokens counted as output."""
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    generator = torch.Generator().manual_seed(seed)
    sampler = make(20)
    admit(sampler, "a", prompt, temperature=0.0, **params)
    admit(sampler, "b", (3, 4), temperature=0.0, repetition_penalty=2.0)
    admit(sampler, "plain", temperature=0.0)
    output = []
    for step in range(8):
        logits = torch.randn(3, 20, generator=generator)
        before = logits.clone()
        batch = (["a"], ["b", "a"], ["plain", "b", "a"])[step % 3]
        token = draw(sampler, logits[: len(batch)], *batch)[-1]
        reference = naive_penalized(logits[len(batch) - 1], prompt, output, SamplingParams(temperature=0.0, **params))
        assert reference[token] >= max(reference) - 1e-5
        assert torch.equal(logits, before), "the caller's logits were changed"
        output.append(token)


def test_forgotten_requests_leave_nothing():
    """Catches a request inheriting the penalties of an earlier one of the same name."""
    logits = torch.zeros(1, 20)
    logits[0, 5] = 1.0
    sampler = make(20)
    for round_ in range(40):
        kept, gone = f"kept{round_}", f"gone{round_}"
        admit(sampler, gone, (5,), temperature=0.0, repetition_penalty=5.0, presence_penalty=2.0)
        admit(sampler, kept, (6,), temperature=0.0, presence_penalty=2.0)
        assert draw(sampler, logits, kept) == [5]
        assert draw(sampler, logits, gone) == [5]
        assert draw(sampler, logits, gone) != [5]
        sampler.forget([gone, "never seen"])
        assert draw(sampler, logits, kept) != [5]
        sampler.forget([kept])
    assert not sampler._requests


def test_same_id_with_new_parameters_is_a_new_request():
    """Catches the cached batch outliving the requests it was built from."""
    logits = distinct_logits(50, seed=4).unsqueeze(0)
    sampler = make(50)
    admit(sampler, "a", temperature=0.0)
    assert draw(sampler, logits, "a") == [int(logits.argmax())]
    sampler.forget(["a"])
    admit(sampler, "a", temperature=50.0, seed=1)
    assert len({draw(sampler, logits, "a")[0] for _ in range(50)}) > 10


def test_min_tokens_masks_eos_and_stop_ids_until_enough_are_out():
    """Catches masking one token too few or too many, and ids outside the vocabulary crashing the engine."""
    logits = torch.zeros(1, 20)
    logits[0, EOS], logits[0, 7], logits[0, 9] = 9.0, 8.0, 1.0
    sampler = make(20)
    admit(sampler, "a", temperature=0.0, min_tokens=3, stop_token_ids=(7, 10**6, -3))
    admit(sampler, "free", temperature=0.0, stop_token_ids=(7,))
    assert [draw(sampler, logits, "a")[0] for _ in range(2)] == [9, 9]
    assert draw(sampler, logits.expand(2, -1), "free", "a") == [EOS, 9]
    assert draw(sampler, logits, "a") == [EOS]


def test_logprobs_are_of_the_raw_logits():
    """Catches logprobs taken after temperature, penalties or masks, a wrong rank, and a neighbour's row."""
    logits = torch.stack([distinct_logits(50, seed=8), distinct_logits(50, seed=9), distinct_logits(50, seed=10)])
    sampler = make(50)
    admit(sampler, "none", temperature=0.0)
    admit(sampler, "a", temperature=3.0, seed=3, logprobs=4, repetition_penalty=1.5, prompt=(4, 5))
    admit(sampler, "b", temperature=0.0, logprobs=0, min_tokens=2, stop_token_ids=(int(logits[2].argmax()),))
    none, a, b = sampler.sample(logits.numpy(), ("none", "a", "b"))
    assert none.logprobs is None
    raw = logits.double().log_softmax(-1)
    order = logits.argsort(descending=True).tolist()
    assert a.logprobs.token_ids == (a.token_id, *order[1][:4])
    assert a.logprobs.ranks == (order[1].index(a.token_id) + 1, 1, 2, 3, 4)
    assert a.logprobs.logprobs == pytest.approx([raw[1, token].item() for token in a.logprobs.token_ids], abs=1e-5)
    assert (b.logprobs.token_ids, b.logprobs.ranks) == ((order[2][1],), (2,))


@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_logprobs_of_nothing_but_the_chosen_token(vocab_size):
    """`logprobs=0` in a batch where nobody wants more, which asks for none of the most likely tokens."""
    sampler = make(vocab_size)
    admit(sampler, "a", temperature=0.0, logprobs=0)
    logits = distinct_logits(vocab_size, seed=3)[None]
    (a,) = sampler.sample(logits.numpy(), ("a",))
    assert (a.logprobs.token_ids, a.logprobs.ranks) == ((a.token_id,), (1,))
    assert a.logprobs.logprobs == pytest.approx((float(logits.log_softmax(-1).max()),), abs=1e-5)


def test_admitting_twice_is_refused():
    """Catches a scheduler that forgets to forget."""
    sampler = make(10)
    admit(sampler, "a")
    with pytest.raises(AssertionError, match="twice"):
        admit(sampler, "a")
