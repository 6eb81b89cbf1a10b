"""Sleep, wake, updates and reloads of models whose matrices are packed into panels, or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_gguf

from shuteye import LLM, SamplingParams
from shuteye.errors import InvalidRequest
from shuteye.testing import tiny_model

SPEECH = (Path(__file__).parent / "data" / "speech.ogg").read_bytes()
WORDS = "We went to the market and bought apples, bread and cheese."
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 80, 33, 140, 12, 9], [7] * 40]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two of the same sizes and other weights."""
    directory = tmp_path_factory.mktemp("checkpoints")
    return [tiny_model(directory / str(seed), seed=seed, vocab_size=323) for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """The same as GGUF files."""
    directory = tmp_path_factory.mktemp("files")
    paths = [directory / f"{checkpoint.name}.gguf" for checkpoint in checkpoints]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        write_gguf(path, checkpoint, lambda name: "q8_0" if "embed" in name else "q4_0")
    return paths


def open_llm(model, cache, **options: Any) -> LLM:
    return LLM(
        str(model), cache_dir=cache, enable_sleep_mode=True, verify_wake="full",
        dtype="bfloat16", kv_cache_memory=1 << 20, max_model_len=256, num_threads=1, **options,
    )  # fmt: skip


def tokens(llm) -> list[tuple[int, ...]]:
    """One prompt after the other: which of them share a step is a matter of time, and changes roundings of torch's."""
    return [tuple(llm.generate([prompt], GREEDY)[0].outputs[0].token_ids) for prompt in PROMPTS]


def tokens_of(model, cache, **options) -> list[tuple[int, ...]]:
    with open_llm(model, cache, **options) as llm:
        return tokens(llm)


def through_all_levels(llm, expected) -> None:
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        assert tokens(llm) == expected


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_packed_model_is_updated_as_one_in_rows(checkpoints, cache, kernels):
    """Would catch tensors written in rows over panels, or an update that is lost by a sleep."""
    first, second = checkpoints
    expected = tokens_of(second, cache, kernels=kernels)
    with open_llm(first, cache, kernels=kernels) as llm:
        assert tokens(llm) != expected
        llm.update_weights(load_file(second / "model.safetensors").items())
        assert tokens(llm) == expected
        llm.sleep(1)
        llm.wake_up()
        assert tokens(llm) == expected


def test_blank_panels_are_filled_tensor_by_tensor(checkpoints, cache):
    """Would catch a panel of which only the rows that exist are written, or a tensor that stays blank."""
    first, second = checkpoints
    expected = tokens_of(second, cache)
    with open_llm(first, cache) as llm:
        llm.sleep(2)
        llm.wake_up(tags=["weights"])
        llm.update_weights(load_file(second / "model.safetensors").items())
        llm.wake_up()
        assert tokens(llm) == expected


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_quantized_model_sleeps_wakes_and_is_reloaded(files, cache, kernels):
    """Would catch a canary that differs from wake to wake, a checksum of other bytes, a reload into other kinds."""
    first, second = files
    expected = tokens_of(second, cache, kernels=kernels)
    with open_llm(first, cache, kernels=kernels) as llm:
        before = tokens(llm)
        assert before != expected
        through_all_levels(llm, before)
        llm.reload_weights(str(second))
        through_all_levels(llm, expected)


def test_modules_with_quantized_weights_sleep_wake_and_are_reloaded(tmp_path, cache):
    """Would catch parameters that look at memory which a wake has mapped anew, or an update that is rounded."""
    options: dict[str, Any] = {"architecture": "phi", "tie_word_embeddings": False}
    first, second = (tiny_model(tmp_path / str(seed), seed=seed, **options) for seed in (0, 1))
    expected = tokens_of(second, cache, quantization="q4_0")
    with open_llm(first, cache, quantization="q4_0") as llm:
        before = tokens(llm)
        assert before != expected
        through_all_levels(llm, before)
        with pytest.raises(InvalidRequest, match="held as q4_0"):
            llm.update_weights([("model.layers.0.mlp.fc1.weight", torch.zeros(128, 64))])
        llm.reload_weights(str(second))
        through_all_levels(llm, expected)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("minilm")
def test_embeddings_of_eight_bits_point_where_floats_do():
    """Would catch a layer of a real encoder that reads another's blocks, which random weights forgive."""
    texts = ["The capital of France is Paris.", "A cat sat on the mat.", "How is bread baked?"]
    with LLM("minilm-l6") as exact, LLM("minilm-l6", quantization="q8_0", enable_sleep_mode=True) as llm:
        expected = torch.tensor([output.outputs.embedding for output in exact.embed(texts)])
        for _ in range(2):
            found = torch.tensor([output.outputs.embedding for output in llm.embed(texts)])
            assert torch.cosine_similarity(found, expected).min() >= 0.999
            llm.sleep(1)
            llm.wake_up()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("whisper")
def test_whisper_in_eight_bits_writes_the_same_words():
    """Would catch an encoder, or attention to it, that is wrong by more than rounding."""
    said = []
    for quantization in ("none", "q8_0"):
        with LLM("whisper-tiny.en", quantization=quantization) as llm:
            said.append(llm.transcribe(SPEECH)[0].text)
    assert WORDS in said[0]
    assert said[0] == said[1]


def test_what_is_written_to_a_quantized_matrix_is_refused(files, checkpoints, cache):
    """Would catch a tensor that is rounded to four bits without a word, or written over blocks as it is."""
    with open_llm(files[0], cache) as llm:
        before = tokens(llm)
        name = "model.layers.0.mlp.up_proj.weight"
        with pytest.raises(InvalidRequest, match="held as q4_0") as refusal:
            llm.update_weights([(name, torch.zeros(128, 64))])
        assert "--quantization none" in refusal.value.message
        assert tokens(llm) == before
        llm.update_weights([("model.norm.weight", torch.zeros(64))])
        assert tokens(llm) != before


def test_a_checkpoint_in_other_bits_is_not_reloaded(files, checkpoints, cache):
    """Would catch blocks that are mapped under kernels bound to panels of another kind."""
    with open_llm(files[0], cache) as llm:
        before = tokens(llm)
        with pytest.raises(InvalidRequest):
            llm.reload_weights(str(checkpoints[1]))
        assert tokens(llm) == before


def test_how_weights_are_held_is_told(files, cache):
    """Would catch a model of five bits that says it is bfloat16."""
    with open_llm(files[0], cache) as llm:
        assert llm.info.weights_format == "q4_0 and q8_0"
        assert 4.5 < llm.info.bits_per_weight < 8.5
        assert "served as q4_0 and q8_0" in llm.info.weights_are
