"""Checkpoint to image to module: nothing lost, nothing kept of another checkpoint, nothing read twice."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from shuteye.errors import UnsupportedModel
from shuteye.memory.image_store import ImageStore
from shuteye.models import image_builder as loader
from shuteye.models.formats.checkpoint import open_checkpoint, read_config
from shuteye.models.formats.dtypes import served_dtype
from shuteye.models.image_builder import open_image
from shuteye.models.image_identity import identity_of
from shuteye.models.module_decoder import bind_modules
from shuteye.models.progress import Advanced, Finished, Started, no_progress
from shuteye.models.sources import resolve_source
from shuteye.models.tensors import dtype_name
from shuteye.testing import tiny_model
from shuteye.tokenizer import Tokenizer


def source_of(path, tmp_path):
    return resolve_source(str(path), cache_dir=tmp_path)


def streams(source):
    """Whether the tensors came one by one, in float32."""
    with open_checkpoint(source, read_config(source), dtype=torch.float32) as tensors:
        return tensors.read.__name__ == "read"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"architecture": "qwen2"}, {"tie_word_embeddings": False}])
def test_streaming_and_transformers_give_the_same_bytes(tmp_path, dtype, stored, settings):
    source = source_of(tiny_model(tmp_path / "model", dtype=stored, **settings), tmp_path)
    assert streams(source)
    images = []
    for streaming in (True, False):
        conversion = loader._Conversion(source, getattr(torch, dtype), no_progress, streaming)
        store = ImageStore(tmp_path / str(streaming))
        images.append(store.open_or_build(identity_of(source, dtype_name(conversion.dtype)), conversion.write))
    first, second = images
    assert first.layout == second.layout
    assert (first.aliases, first.metadata) == (second.aliases, second.metadata)
    weights = [(image.path / "weights.rank0.bin").read_bytes() for image in images]
    assert weights[0] == weights[1]


def test_sharded_checkpoints_stream(tmp_path, reference, load):
    from transformers import AutoModelForCausalLM

    from shuteye.models.modules import quiet

    path = tiny_model(tmp_path / "model")
    with quiet():
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / name, tmp_path / "shards" / name)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert streams(source_of(tmp_path / "shards", tmp_path))
    prompt = list(range(10, 40))
    assert load(tmp_path / "shards").generate([prompt], 8) == load(path).generate([prompt], 8)


def test_parameters_and_buffers_equal_those_of_transformers(tmp_path, reference, load):
    """A lost `inv_freq` or an unbound tensor would show here by name."""
    path = tiny_model(tmp_path / "model", architecture="qwen3")
    ours, theirs = load(path, modules=True).model.decoder.module, reference.model(path, torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert not found[name].requires_grad


def test_every_parameter_lies_in_the_arena_and_ties_hold(tiny_checkpoint, load):
    driver = load(tiny_checkpoint, modules=True)
    start, end = driver.weights.address, driver.weights.address + driver.weights.nbytes
    module = driver.model.decoder.module
    assert all(start <= each.data_ptr() < end for each in module.parameters())
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_binding_reads_neither_the_checkpoint_nor_the_weights(tmp_path, load):
    """After the first load the checkpoint may be gone, and the arena may still be asleep."""
    path = tiny_model(tmp_path / "model")
    source = source_of(path, tmp_path)
    expected = load(source, dtype="float32").generate([[5, 6, 7]], 8)
    shutil.rmtree(path)
    assert load(source, dtype="float32").generate([[5, 6, 7]], 8) == expected


def test_slots_are_known_by_checkpoint_names_tied_ones_too(tiny_checkpoint, load):
    model = load(tiny_checkpoint).model
    names = model.slot_names
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert names["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    assert "model.layers.9.mlp.up_proj.weight" not in names


def test_a_changed_checkpoint_makes_a_new_image(tmp_path):
    store = ImageStore(tmp_path / "cache")
    images = []
    for seed in (0, 1):
        path = tiny_model(tmp_path / "model", seed=seed)
        images.append(open_image(source_of(path, tmp_path), dtype="auto", store=store))
    assert images[0].path != images[1].path
    assert images[0].checksums != images[1].checksums


def test_dtypes_have_images_of_their_own_and_an_image_is_made_once(tiny_checkpoint, tmp_path):
    store, source = ImageStore(tmp_path), source_of(tiny_checkpoint, tmp_path)
    paths = [open_image(source, dtype=dtype, store=store).path for dtype in ("auto", "bfloat16", "float32", "auto")]
    assert len(set(paths)) == 2
    assert paths[0] == paths[2] == paths[3]


def test_float16_is_served_as_bfloat16(tmp_path):
    """An image that the kernels cannot compute with, or a second one of the same numbers."""
    source = source_of(tiny_model(tmp_path / "model"), tmp_path)
    assert [served_dtype(source, wanted) for wanted in ("float16", "bfloat16", "float32")] == [
        "bfloat16", "bfloat16", "float32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
@pytest.mark.parametrize("named", [True, False])
def test_auto_takes_the_checkpoints_dtype(tmp_path, stored, expected, named):
    path = tiny_model(tmp_path / "model", dtype=stored)
    if not named:
        config = json.loads((path / "config.json").read_text())
        del config["dtype"]
        (path / "config.json").write_text(json.dumps(config))
    assert served_dtype(source_of(path, tmp_path), "auto") == dtype_name(expected)


def test_facts_come_from_config_and_generation_config(tmp_path, load):
    path = tiny_model(tmp_path / "model")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True})
    )
    model = load(path).model
    assert model.eos_token_ids == (2, 7)
    assert model.default_sampling == {"temperature": 0.6, "top_p": 0.9}
    assert (model.facts.architecture, model.facts.task) == ("LlamaForCausalLM", "generate")
    assert (model.facts.vocab_size, model.facts.context_length) == (320, 512)
    cached = model.facts.attention
    assert (cached.num_layers, cached.num_kv_heads, cached.head_dim, model.dtype) == (2, 2, 16, "float32")


def test_the_images_tokenizer_needs_nothing_else(tiny_checkpoint, tmp_path):
    image = open_image(source_of(tiny_checkpoint, tmp_path), dtype="auto", store=ImageStore(tmp_path))
    tokenizer = Tokenizer.from_directory(image.path / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]).endswith("<|im_start|>assistant\n")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    """transformers would fill it with random numbers and log a line."""
    from safetensors.torch import load_file, save_file

    path = tiny_model(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        open_image(source_of(path, tmp_path), dtype="auto", store=ImageStore(tmp_path))


def test_a_refused_model_leaves_no_image(tmp_path):
    path = tiny_model(tmp_path / "model", architecture="gemma2")
    with pytest.raises(UnsupportedModel, match="softcapping"):
        open_image(source_of(path, tmp_path), dtype="auto", store=ImageStore(tmp_path / "cache"))
    assert ImageStore(tmp_path / "cache").list() == ()


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path):
    path = tiny_model(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        open_image(source_of(path, tmp_path), dtype="auto", store=ImageStore(tmp_path))


def test_remote_code_is_refused_without_running_it(tmp_path):
    path = tiny_model(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModel, match="configuration cannot be used"):
        open_image(source_of(path, tmp_path), dtype="auto", store=ImageStore(tmp_path))


def test_progress_covers_every_byte_and_nothing_is_printed(tiny_checkpoint, tmp_path, capfd):
    told = []
    image = open_image(
        source_of(tiny_checkpoint, tmp_path), dtype="auto", store=ImageStore(tmp_path), progress=told.append
    )
    written = sum(slot.nbytes for slot in image.layout.slots.values())
    assert [event.total for event in told if isinstance(event, Started)] == [None, None, written]
    assert [type(event) for event in told[:5]] == [Started, Finished, Started, Finished, Started]
    assert sum(event.nbytes for event in told if isinstance(event, Advanced)) == written
    assert capfd.readouterr() == ("", "")


def test_another_transformers_version_has_the_model_examined_again(tiny_checkpoint, load):
    """Would catch windows and heads of a version that is gone, served by the code of the one that is there."""
    driver = load(tiny_checkpoint, modules=True)
    made_with = driver.model.facts
    stale = replace(made_with, transformers="4.0.0", attention=replace(made_with.attention, num_kv_heads=9))
    assert bind_modules(driver.image, driver.weights, stale)[0] == made_with
