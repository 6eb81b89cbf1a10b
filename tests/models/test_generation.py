"""The bound model says what transformers says: token for token in float32, within rounding in bfloat16."""

import pytest
import torch

from shuteye.models.tensors import arena_view
from shuteye.testing import tiny_model

ARCHITECTURES = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {},  # biases on q, k, v
    "qwen3": {},  # norms on q and k
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 20},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def prompt_of(length, seed=0):
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    architecture = request.param.split("-")[0]
    directory = tmp_path_factory.mktemp("model") / request.param
    return tiny_model(directory, architecture=architecture, **ARCHITECTURES[request.param])


@pytest.fixture(scope="module")
def expected(checkpoint, reference):
    """Prompts around block boundaries, and what transformers continues them with, each alone."""
    model = reference.model(checkpoint, torch.float32)
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 15, 16, 17, 33, 90)]
    return prompts, [reference.tokens(model, prompt, 24) for prompt in prompts]


def test_each_prompt_alone_matches_transformers(checkpoint, expected, load):
    driver = load(checkpoint)
    for prompt, tokens in zip(*expected, strict=True):
        assert driver.generate([prompt], 24) == [tokens]


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 10_000])
def test_batched_and_chunked_prompts_match_transformers(checkpoint, expected, load, chunk_size):
    """Short prompts decode while long ones are still read, so every step mixes lengths and kinds."""
    prompts, tokens = expected
    assert load(checkpoint).generate(prompts, 24, chunk_size=chunk_size) == tokens


def test_sequences_of_one_step_share_prefix_blocks(checkpoint, load):
    """The second sequence reads, in the same step, blocks that only the first one writes."""
    driver = load(checkpoint)
    prefix = prompt_of(48, seed=1)
    first = driver.sequence([*prefix, 7, 8, 9], room=8)
    second = driver.sequence([*prefix, 5], room=8, shared=first.block_ids[:3])
    second.computed = len(prefix)
    for _ in range(4):
        driver.step([first, second], [1000, 1000])
    assert [first.token_ids[51:], second.token_ids[49:]] == driver.generate([[*prefix, 7, 8, 9]], 4) + (
        driver.generate([[*prefix, 5]], 4)
    )


def test_only_sampled_rows_get_logits_in_plan_order(tiny_checkpoint, load):
    driver = load(tiny_checkpoint)
    sequences = [driver.sequence(prompt_of(length, seed=length), room=4) for length in (9, 30, 5)]
    driver.step(sequences, [100, 8, 100])
    assert [len(each.logits) for each in sequences] == [1, 0, 1]
    alone = [driver.sequence(prompt_of(length, seed=length), room=4) for length in (9, 5)]
    for each in alone:
        driver.step([each], [100])
    torch.testing.assert_close(sequences[0].logits[0], alone[0].logits[0])
    torch.testing.assert_close(sequences[2].logits[0], alone[1].logits[0])


def test_a_step_that_samples_nothing_gives_no_rows(tiny_checkpoint, load):
    driver = load(tiny_checkpoint)
    sequence = driver.sequence(prompt_of(30), room=4)
    driver.step([sequence], [8])
    assert sequence.logits == []
    assert sequence.computed == 8


def test_nan_left_in_a_block_by_another_request_is_not_read(tiny_checkpoint, load):
    """0 * NaN is NaN: masking alone would let an earlier request poison a later one."""
    driver = load(tiny_checkpoint)
    prompts = [prompt_of(5), prompt_of(37)]
    expected = driver.generate(prompts, 8, chunk_size=3)
    arena_view(driver.kv_arena, 0, (driver.kv_arena.nbytes // 4,), "float32").fill_(float("nan"))
    assert driver.generate(prompts, 8, chunk_size=3) == expected


def test_bfloat16_logits_are_as_true_as_transformers_own(checkpoint, reference, load):
    """Both round to 8 bits, in places of their own: against the same weights in float32 neither may be much worse."""
    model = reference.model(checkpoint, torch.bfloat16)
    driver = load(checkpoint, dtype="bfloat16")
    prompt = prompt_of(60)
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0, -1].float()
        exact = model.float()(torch.tensor([prompt])).logits[0, -1]
    whole, chunked = driver.sequence(prompt, room=1), driver.sequence(prompt, room=1)
    driver.step([whole], [1000])
    while not chunked.logits:
        driver.step([chunked], [13])
    allowed = 2 * (theirs - exact).norm()
    for found in (whole.logits[0], chunked.logits[0]):
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= allowed
