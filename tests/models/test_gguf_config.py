"""The configuration and tokenizer of GGUF files, against what transformers makes of the same file."""

import json

import pytest
from tiny_gguf import write_gguf

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.checkpoint import read_config, read_tokenizer_facts, save_tokenizer
from shuteye.models.modules import quiet
from shuteye.models.sources import resolve_source
from shuteye.testing import tiny_model

OURS_BY_PURPOSE = {"_name_or_path", "_model_name_or_path", "architectures"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("configs")
    return {
        name: tiny_model(directory / name, architecture=name, num_layers=1, max_position_embeddings=777)
        for name in ("llama", "qwen2", "qwen3")
    }


@pytest.fixture
def source(tmp_path, checkpoints):
    """Writes a file, and finds it."""

    def make(architecture, **options):
        path = tmp_path / "model.gguf"
        write_gguf(path, checkpoints[architecture], "q8_0", **options)
        return resolve_source(str(path), cache_dir=tmp_path)

    return make


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_is_the_configuration_that_transformers_reads(source, architecture):
    """A setting of another name, which the config takes and nobody reads: the default is served in its place."""
    from transformers import AutoConfig

    found = source(architecture)
    with quiet():
        theirs = AutoConfig.from_pretrained(found.path.parent, gguf_file=found.path.name).to_dict()
    ours = read_config(found).to_dict()
    wrong_there = {"head_dim"} if architecture != "llama" else set()
    for key in theirs.keys() - OURS_BY_PURPOSE - wrong_there:
        assert ours[key] == theirs[key], key
    assert ours["head_dim"] == 16


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_its_tokenizer_is_that_of_transformers(source, architecture, tmp_path):
    """A tokenizer of another class: other special tokens, texts split elsewhere."""
    from transformers import AutoTokenizer

    found = source(architecture)
    save_tokenizer(found, tmp_path / "ours")
    with quiet():
        theirs = AutoTokenizer.from_pretrained(found.path.parent, gguf_file=found.path.name, local_files_only=True)
        theirs.save_pretrained(tmp_path / "theirs")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    for name in names:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text(), name
    assert read_tokenizer_facts(found).has_chat_template


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_scaled_rotary_positions_are_read(source, metadata, rope):
    """Transformers drops them without a word: wrong from the first token of a long text on."""
    found = read_config(source("qwen2", metadata=metadata)).rope_parameters
    assert {key: found.get(key) for key in rope} == rope
    assert found["rope_theta"] == 10_000


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 8.0}, "yarn"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.factor None"),
        ({"rope.dimension_count": 8}, "a part of each head"),
        ({"block_count": "two"}, "block_count 'two'"),
        ({"attention.head_count": 0}, "head_count 0"),
        ({"context_length": 7.5}, "context_length 7.5"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(source, metadata, says):
    """A configuration made of defaults where the file says something else."""
    with pytest.raises(UnsupportedModel, match=says):
        read_config(source("llama", metadata=metadata))


def test_every_token_that_ends_a_turn_is_known(source):
    """A chat model that goes on talking to itself: its turns end with another token than its texts."""
    assert read_config(source("llama")).eos_token_id == 2
    assert read_config(source("llama", metadata={"tokenizer.ggml.eot_token_id": 9})).eos_token_id == [2, 9]


def test_json_of_the_config_is_plain(source):
    """Numbers of numpy, which an image's config.json cannot hold."""
    assert json.loads(json.dumps(read_config(source("qwen3")).to_dict()))["num_hidden_layers"] == 1
