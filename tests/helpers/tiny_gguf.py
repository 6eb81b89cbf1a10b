"""GGUF files made of tiny checkpoints, as llama.cpp's convert_hf_to_gguf.py and llama-quantize would make them."""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from shuteye.matrices.ggml import block_dtype
from shuteye.matrices.kinds import kind_of
from shuteye.testing import CHAT_TEMPLATE

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_OTHERS = {"gemma3_text": "gemma3", "starcoder2": "starcoder2"}  # that transformers' modules compute
_MADE_HERE = frozenset({"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"})  # that `quantize` cannot make


def write_gguf(path, checkpoint, format_of, *, metadata=None, extra=None):
    """Write a checkpoint as a GGUF file; what its tensors stand for there, under transformers' names.

    Args:
        format_of: a format such as `q4_0`, `bf16` or `f32`, or a function from a matrix's name to one.
        metadata: keys of the model's own, such as `rope.scaling.type`, to what they are; and of its tokenizer.
        extra: more tensors by their names in the file, float32.
    """
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    architecture = (ARCHITECTURES | _OTHERS)[config["model_type"]]
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    writer = GGUFWriter(path, architecture)
    writer.add_name(config["model_type"])
    _write_config(writer, config, metadata or {})
    _write_tokenizer(writer, json.loads((Path(checkpoint) / "tokenizer.json").read_text()))
    meant = {}
    for name, rows in load_file(Path(checkpoint) / "model.safetensors").items():
        wanted = (format_of if isinstance(format_of, str) else format_of(name)) if rows.ndim == 2 else "f32"
        more = 1 if architecture == "gemma3" and rows.ndim == 1 else 0  # of norms, as convert_hf_to_gguf.py adds it
        stored, kind = _stored(rows.astype(np.float32) + np.float32(more), wanted)
        meant[name] = dequantize(stored, kind)
        if architecture == "llama" and ".self_attn.q_proj." in name:
            stored = _interleaved(stored, config["num_attention_heads"])
        if architecture == "llama" and ".self_attn.k_proj." in name:
            stored = _interleaved(stored, config["num_key_value_heads"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored, raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _stored(rows, wanted):
    """Rows as a file stores them, and the type of that."""
    kind = GGMLQuantizationType[wanted.upper()]
    if wanted in _MADE_HERE:
        return _random_blocks(wanted, *rows.shape), kind
    if wanted == "iq2_xs":  # is read by others only
        return _random_iq2_xs(*rows.shape), kind
    return quantize(np.ascontiguousarray(rows), kind), kind


def _random_blocks(name, rows, columns):
    """Blocks of arbitrary bits, with scales such that weights are of usual size."""
    random = np.random.default_rng(rows)
    kind, dtype = kind_of(name), block_dtype(name)
    blocks = random.integers(0, 256, (rows, columns // kind.block_columns * dtype.itemsize), np.uint8)
    widest = np.abs(dequantize(_with_scales(blocks, dtype, 1.0, 0.0), GGMLQuantizationType[name.upper()])).max()
    return _with_scales(blocks, dtype, 0.5 / widest, 0.1 / widest)


def _random_iq2_xs(rows, columns):
    block_columns, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType.IQ2_XS]
    blocks = np.random.default_rng(rows).integers(0, 256, (rows, columns // block_columns, nbytes), np.uint8)
    blocks[:, :, :2] = np.array([0.001], np.float16).view(np.uint8)  # the scale
    return blocks.reshape(rows, -1)


def _with_scales(blocks, dtype, scale, minimum):
    blocks = blocks.copy()
    for field, value in (("d", scale), ("m", minimum)):
        if field in dtype.names:
            blocks.view(dtype)[field] = np.float16(value).view(np.uint16)
    return blocks


def _interleaved(rows, num_heads):
    """As convert_hf_to_gguf.py's `LlamaModel.permute`."""
    return rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _write_config(writer, config, metadata):
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["norm_epsilon"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key if key.startswith("tokenizer.") else f"{writer.arch}.{key}", value)


def _write_tokenizer(writer, tokenizer):
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    added = {each["content"] for each in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL if token in added else TokenType.NORMAL for token, _ in vocabulary])
    writer.add_token_scores([0.0] * len(vocabulary))  # instead of merges, of which tiny tokenizers have none
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
