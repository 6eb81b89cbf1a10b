"""CTranslate2's format 6, read back: a tiny Whisper written as CTranslate2 would, and the same bits again."""

import json
import struct

import pytest
import torch
from speech_harness import Reference

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.ctranslate2 import convert, read_variables

CODES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.float16: 4}


def text(value):
    raw = value.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def variable(name, tensor):
    tensor = tensor.contiguous()
    raw = tensor.numpy().tobytes()
    shape = b"".join(struct.pack("<I", size) for size in tensor.shape)
    return text(name) + struct.pack("<B", tensor.ndim) + shape + struct.pack("<BI", CODES[tensor.dtype], len(raw)) + raw


def write_model(path, tensors, *, version=6, spec="WhisperSpec"):
    body = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(tensors))
    body += b"".join(variable(name, tensor) for name, tensor in sorted(tensors.items()))
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
    body += struct.pack("<I", len(aliases)) + b"".join(text(alias) + text(name) for alias, name in aliases.items())
    path.write_bytes(body)


def as_ctranslate2(model):
    """The variables that CTranslate2's converter makes of a transformers Whisper, in float16."""
    state = {name.removeprefix("model."): value.half() for name, value in model.state_dict().items()}
    found = {
        "decoder/num_heads": torch.tensor(model.config.decoder_attention_heads, dtype=torch.int16),
        "encoder/num_heads": torch.tensor(model.config.encoder_attention_heads, dtype=torch.int16),
        "decoder/activation": torch.tensor(3, dtype=torch.int8),
        "decoder/scale_embeddings": torch.tensor(0, dtype=torch.int8),
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }

    def norm(new, old):
        found[f"{new}/gamma"], found[f"{new}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]

    def linear(new, *olds):
        found[f"{new}/weight"] = torch.cat([state[f"{old}.weight"] for old in olds])
        bias = [state.get(f"{old}.bias", torch.zeros(model.config.d_model).half()) for old in olds]
        found[f"{new}/bias"] = torch.cat(bias)

    for side, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(layers):
            new, old = f"{side}/layer_{index}", f"{side}.layers.{index}"
            linear(f"{new}/self_attention/linear_0", *(f"{old}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            norm(f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                linear(f"{new}/attention/linear_1", *(f"{old}.encoder_attn.{part}_proj" for part in "kv"))
                linear(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
                norm(f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm")
            linear(f"{new}/ffn/linear_0", f"{old}.fc1")
            linear(f"{new}/ffn/linear_1", f"{old}.fc2")
            norm(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"encoder.{name}")
    return found


@pytest.fixture
def packed(whisper_checkpoints, tmp_path):
    """A directory as CTranslate2's converter leaves it, the checkpoint that it was made of, and its variables."""

    def pack(multilingual=False):
        source, directory = whisper_checkpoints(0, multilingual), tmp_path / f"packed-{multilingual}"
        right = Reference(source)
        directory.mkdir()
        variables = as_ctranslate2(right.model)
        write_model(directory / "model.bin", variables)
        tokenizer = json.loads((source / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        rows = sorted(vocab, key=vocab.get)
        (directory / "vocabulary.txt").write_text("\n".join(rows) + "\n")
        tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if "." not in each["content"]]
        tokenizer["model"]["vocab"] = {row: index for row, index in vocab.items() if "." not in row or row == "."}
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        generation = right.model.generation_config
        settings = {
            "suppress_ids": generation.suppress_tokens,
            "suppress_ids_begin": generation.begin_suppress_tokens,
            "alignment_heads": [[0, 0]],
        }
        (directory / "config.json").write_text(json.dumps(settings))
        return directory, right, variables

    return pack


def test_every_tensor_comes_back_to_the_bit(packed, tmp_path):
    """Projections swapped, a bias dropped, or a tensor under another's name."""
    directory, right, _ = packed()
    convert(directory, tmp_path / "converted")
    found = Reference(_with_extractor(tmp_path / "converted", right)).model
    expected = right.model.state_dict()
    assert set(found.state_dict()) == set(expected)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
    for name in ("d_model", "encoder_layers", "decoder_layers", "num_mel_bins", "vocab_size", "max_source_positions"):
        assert getattr(found.config, name) == getattr(right.model.config, name), name
    for name in ("max_target_positions", "encoder_attention_heads", "decoder_ffn_dim", "activation_function"):
        assert getattr(found.config, name) == getattr(right.model.config, name), name


def _with_extractor(directory, right):
    """The tiny one: what `convert` writes is for windows of thirty seconds, which this model does not have."""
    right.extractor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("multilingual", [False, True])
def test_the_generation_config_is_made_of_the_tokenizer(packed, tmp_path, multilingual):
    """Special tokens guessed, so that another tokenizer's would be written."""
    directory, right, _ = packed(multilingual)
    convert(directory, tmp_path / "converted")
    found = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    expected = right.model.generation_config
    for name in ("eos_token_id", "decoder_start_token_id", "no_timestamps_token_id", "prev_sot_token_id",
                 "suppress_tokens", "begin_suppress_tokens", "max_length"):  # fmt: skip
        assert found[name] == getattr(expected, name), name
    if multilingual:
        assert found["lang_to_id"] == expected.lang_to_id
        assert found["task_to_id"] == expected.task_to_id


def test_what_is_not_read_is_refused_by_name(packed, tmp_path):
    """A quantized or foreign model converted to noise."""
    directory, _, variables = packed()
    name = "decoder/layer_0/ffn/linear_0/weight"
    cases = {
        "is quantized (int8)": {"tensors": variables | {name: variables[name].to(torch.int8)}},
        "format version 5": {"tensors": variables, "version": 5},
        "holds a TransformerSpec": {"tensors": variables, "spec": "TransformerSpec"},
        "has no complete 'encoder/conv1'": {"tensors": _without(variables, "encoder/conv1/bias")},
        "has no variable 'encoder/position": {"tensors": _without(variables, "encoder/position_encodings/encodings")},
        "has a bias for its keys": {
            "tensors": variables | {"decoder/layer_0/self_attention/linear_0/bias": torch.ones(96)}
        },
    }
    for number, (message, how) in enumerate(cases.items()):
        write_model(directory / "model.bin", **how)
        with pytest.raises(UnsupportedModel) as refused:
            convert(directory, tmp_path / f"case-{number}")
        assert message in refused.value.message
        assert not (tmp_path / f"case-{number}").exists()


def _without(variables, name):
    return {other: value for other, value in variables.items() if other != name}


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.999])
def test_a_file_that_was_cut_off_is_refused(packed, share):
    """Zeros, or an error of struct's, for a download that broke off."""
    directory, _, _ = packed()
    path = directory / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnsupportedModel, match="no complete CTranslate2 model"):
        read_variables(path)


def test_a_tokenizer_of_another_model_is_refused(packed, tmp_path):
    """Text that is written with another model's words."""
    directory, _, _ = packed()
    rows = (directory / "vocabulary.txt").read_text().split("\n")
    rows[70], rows[71] = rows[71], rows[70]
    (directory / "vocabulary.txt").write_text("\n".join(rows))
    with pytest.raises(UnsupportedModel, match="disagree"):
        convert(directory, tmp_path / "converted")


@pytest.mark.model
def test_converted_files_share_one_modification_time(whisper):
    """A fingerprint, and so an image, that changes with every conversion."""
    times = {file.stat().st_mtime for file in whisper.path.iterdir()}
    assert len(times) == 1
