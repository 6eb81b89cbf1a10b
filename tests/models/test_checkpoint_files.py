"""Damaged checkpoints: refused in one line that names the file, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

from shuteye import LLM, SamplingParams
from shuteye.cli import main as cli
from shuteye.errors import MemoryExhausted, ShuteyeError, UnsupportedModel
from shuteye.memory.image_store import ImageStore
from shuteye.models.formats.checkpoint import stored_as
from shuteye.models.formats.files import missing_files, refusing, weight_files
from shuteye.models.image_builder import open_image
from shuteye.models.sources import resolve_source
from shuteye.testing import tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def store_whole_numbers(path: Path) -> None:
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)


DAMAGE = {
    "weights cut short": ("model.safetensors", lambda path: cut(path, 5000), "not a whole safetensors file"),
    "weights empty": ("model.safetensors", lambda path: cut(path, 0), "not a whole safetensors file"),
    "weights of noise": ("model.safetensors", lambda path: path.write_bytes(b"garbage!" * 99), "not a whole"),
    "weights in whole numbers": ("model.safetensors", store_whole_numbers, "stored as I8"),
    "config empty": ("config.json", lambda path: cut(path, 0), "not JSON"),
    "config not UTF-8": ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00{"), "not JSON"),
    "config a list": ("config.json", lambda path: path.write_text("[]"), "a list instead of a JSON object"),
    "config without type": ("config.json", lambda path: path.write_text("{}"), "configuration cannot be used"),
    "config of another type": ("config.json", lambda path: edit(path, hidden_size="many"), "expected int, got str"),
    "config without heads": ("config.json", lambda path: edit(path, num_attention_heads=0), "cannot be used"),
    "config of another size": ("config.json", lambda path: edit(path, hidden_size=128), "mismatched_keys"),
    "config of no dtype": ("config.json", lambda path: edit(path, dtype="float99"), "dtype 'float99'"),
    "config of whole numbers": ("config.json", lambda path: edit(path, dtype="int8"), "dtype 'int8'"),
    "config of no activation": ("config.json", lambda path: edit(path, hidden_act="nope"), "nope"),
    "tokenizer cut short": ("tokenizer.json", lambda path: cut(path, 3000), "tokenizer.json cannot be used: it is not"),
    "tokenizer of nothing": ("tokenizer.json", lambda path: path.write_text("{}"), "its tokenizer cannot be read"),
    "tokenizer config cut": ("tokenizer_config.json", lambda path: cut(path, 9), "tokenizer_config.json cannot be"),
    "generation config cut": ("generation_config.json", lambda path: path.write_text("{"), "generation_config.json ca"),
    "modules cut": ("modules.json", lambda path: path.write_text("["), "modules.json cannot be used: it is not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_leaves_no_image(checkpoint, tmp_path, kind) -> None:
    """Would catch a traceback, a bare KeyError, an engine that is said to have died, or numbers served as weights."""
    name, damage, says = DAMAGE[kind]
    damage(checkpoint / name)
    store = ImageStore(tmp_path / "cache")
    with pytest.raises(UnsupportedModel) as caught:
        open_image(resolve_source(str(checkpoint), cache_dir=tmp_path), dtype="auto", store=store)
    message = caught.value.message
    assert says in message
    assert "\n" not in message
    assert str(checkpoint) in message
    assert len(message) < 700
    assert store.list() == ()


def write_gguf(path: Path) -> bytes:
    writer = GGUFWriter(path, "llama")
    quantized = np.zeros((64, 20), dtype=np.uint8)  # a block of Q4_1 is 32 numbers in 20 bytes
    writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(("end", "says"), [(0, "empty"), (2, "magic"), (40, "not a whole"), (-9, "its tensors end at")])
def test_a_damaged_gguf_file_is_refused_by_name(tmp_path, end, says) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(write_gguf(path)[:end])
    with pytest.raises(UnsupportedModel, match=rf"model\.gguf cannot be used: .*{says}.*again") as caught:
        stored_as(resolve_source(str(path), cache_dir=tmp_path))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_among_the_files_is_refused_and_not_waited_for(checkpoint: Path, name: str) -> None:
    """Would catch a reload that stops the engine until somebody writes to the other end."""
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(UnsupportedModel, match=f"{name} is not a regular file"):
        resolve_source(str(checkpoint), cache_dir=checkpoint)


def test_how_a_checkpoint_stores_its_numbers_is_told(tmp_path, tiny_checkpoint) -> None:
    """Would catch a model of four bits that is served as if it were of sixteen, and says nothing of it."""
    write_gguf(tmp_path / "model.gguf")
    assert stored_as(resolve_source(str(tmp_path / "model.gguf"), cache_dir=tmp_path)) == "GGUF Q4_1"
    assert stored_as(resolve_source(str(tiny_checkpoint), cache_dir=tmp_path)) == "safetensors float32"
    half = tiny_model(tmp_path / "half", dtype=torch.float16)
    assert stored_as(resolve_source(str(half), cache_dir=tmp_path)) == "safetensors float16"


def test_a_checkpoint_is_whole_by_its_index(checkpoint: Path, tmp_path: Path) -> None:
    """Would catch half a sharded checkpoint that counts as one."""
    assert missing_files(checkpoint) == ()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    assert missing_files(checkpoint) == (INDEX,)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": names}))
    assert missing_files(checkpoint) == ("model-00002-of-00002.safetensors",)
    with pytest.raises(UnsupportedModel, match=r"only a part of a checkpoint: model-00002\S+ is missing"):
        resolve_source(str(checkpoint), cache_dir=tmp_path)
    (checkpoint / "model-00002-of-00002.safetensors").touch()
    assert missing_files(checkpoint) == ()
    assert [path.name for path in weight_files(checkpoint)] == sorted(names.values())


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused_by_name(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / INDEX).write_text(content)
    with pytest.raises(UnsupportedModel, match=rf"{INDEX} cannot be used"):
        resolve_source(str(checkpoint), cache_dir=tmp_path)


def test_only_foreign_errors_are_the_checkpoints_fault() -> None:
    """Would catch a bug of ours that is blamed on the checkpoint."""
    for raised, expected in [
        (AssertionError(), AssertionError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryExhausted),
        (KeyError("x"), UnsupportedModel),
    ]:
        with pytest.raises(expected), refusing("it"):
            raise raised


def test_pull_of_a_damaged_checkpoint_ends_with_one_line(checkpoint: Path, tmp_path: Path, capsys) -> None:
    cut(checkpoint / "model.safetensors", 5000)
    assert cli.run(["pull", str(checkpoint), "--cache-dir", str(tmp_path / "cache")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "shuteye:" in line]
    assert "not a whole safetensors file" in line


def generated(llm: LLM) -> tuple[int, ...]:
    return llm.generate([[5, 6, 7]], SamplingParams(temperature=0))[0].outputs[0].token_ids


def test_an_engine_refuses_damage_when_it_loads_and_is_unharmed_by_it_later(
    checkpoint: Path, tiny_checkpoint: Path, tiny_options
) -> None:
    """Would catch a 500, or an engine that serves nothing, or other weights, after a refused reload."""
    cut(checkpoint / "model.safetensors", 5000)
    with pytest.raises(UnsupportedModel, match="not a whole safetensors file"):
        LLM(str(checkpoint), **tiny_options)
    with LLM(str(tiny_checkpoint), enable_sleep_mode=True, **tiny_options) as llm:
        before = generated(llm)
        with pytest.raises(ShuteyeError, match="not a whole safetensors file") as caught:
            llm.reload_weights(str(checkpoint))
        assert caught.value.status_code == 400
        assert generated(llm) == before
        assert llm.sleep(level=1).changed
        assert llm.wake_up().changed
        assert generated(llm) == before
