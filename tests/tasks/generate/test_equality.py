"""The real model against transformers' own generate: equal tokens in float32, equal logits within bf16 rounding."""

import random

import pytest
import torch

from shuteye import LLM, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(400)]

LENGTHS = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 64, 100, 257, 400, 1500]
NUM_NEW = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
TEXT = (
    "The tide was out when the two engineers walked down to the harbour, and the boats lay on their sides like "
    "tired animals. One of them had slept badly. She said that a machine which sleeps should wake as the same "
    "machine, or it should not sleep at all; he answered that people do not manage it either. "
)


@pytest.fixture(scope="module")
def prompts(llm):
    """Slices of natural text, one per length, each from another place."""
    chooser = random.Random(0)
    words = TEXT.split()
    ids = llm.get_tokenizer().encode(
        " ".join(chooser.choice(words) if chooser.random() < 0.3 else words[i % len(words)] for i in range(2500))
    )
    offsets = [chooser.randrange(len(ids) - length) for length in LENGTHS]
    return [ids[offset : offset + length] for offset, length in zip(offsets, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def transformers_answers(smollm2_reference, prompts):
    """What transformers generates in float32, one prompt at a time: tokens, and the logits of the first."""
    model = smollm2_reference(torch.float32)
    answers = []
    for prompt in prompts:
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            eos_token_id=None,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append((tuple(generated.sequences[0, len(prompt) :].tolist()), generated.logits[0][0]))
    return answers


@pytest.fixture(scope="module")
def reference(transformers_answers):
    return [tokens for tokens, _logits in transformers_answers]


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llm(smollm2_options):
    with LLM(**smollm2_options, dtype="float32", max_model_len=2048, kv_cache_memory=512 << 20) as engine:
        yield engine


def test_alone(llm, prompts, reference):
    """Would catch a wrong mask, position or cache write at some length."""
    assert [tokens_of(llm.generate([prompt], GREEDY))[0] for prompt in prompts] == reference


def test_batched_and_then_from_the_prefix_cache(llm, prompts, reference):
    """Would catch sequences that see each other, or a prefix hit on a block of other content."""
    llm.reset_prefix_cache()
    assert tokens_of(llm.generate(prompts, GREEDY)) == reference
    again = llm.generate(prompts, GREEDY)
    assert tokens_of(again) == reference
    assert sum(output.num_cached_tokens for output in again) > 0.8 * sum(LENGTHS)


def test_without_a_prefix_cache_in_small_chunks(smollm2_options, prompts, reference):
    """Would catch chunked prefill that forgets or repeats a token."""
    options = {"enable_prefix_caching": False, "max_num_batched_tokens": 100, "kv_cache_memory": 128 << 20}
    with LLM(**smollm2_options, dtype="float32", max_model_len=2048, **options) as llm:
        assert tokens_of(llm.generate(prompts, GREEDY)) == reference
        assert all(output.num_cached_tokens == 0 for output in llm.generate(prompts[:3], GREEDY))


def test_bfloat16_logprobs_agree_within_rounding(smollm2_options, smollm2_reference, transformers_answers, prompts):
    """The next-token distribution of every prompt, against transformers at the same precision.

    Two bfloat16 computations differ by rounding: the bound is how far transformers' own bfloat16 is from float32.
    """
    exact = [logits.log_softmax(-1) for _tokens, logits in transformers_answers]
    short = [(prompt, logprobs) for prompt, logprobs in zip(prompts, exact, strict=True) if len(prompt) <= 100]
    model = smollm2_reference(torch.bfloat16)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, ignore_eos=True)
    with LLM(**smollm2_options, dtype="bfloat16", max_model_len=2048, kv_cache_memory=128 << 20) as llm:
        ours = llm.generate([prompt for prompt, _logprobs in short], params)
    for (prompt, expected), output in zip(short, ours, strict=True):
        reported = output.outputs[0].logprobs[0]
        ids = torch.tensor(list(reported))
        found = torch.tensor([entry.logprob for entry in reported.values()])
        with torch.inference_mode():
            rounded = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)[ids]
        allowed = 2.0 * (rounded - expected[ids]).abs().max() + 0.02
        assert (found - rounded).abs().max() <= allowed, len(prompt)
