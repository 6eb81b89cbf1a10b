"""One checkpoint for every engine: a directory in Hugging Face format, and the same weights as GGUF in bf16 and f16.

Knows the layout of llama.cpp's `llama` architecture; knows nothing of engines. Files are made once, in a process of
its own (`python benchmarks/checkpoints.py smollm2`), so that whoever measures holds no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuteye.config import default_cache_dir

KEPT = default_cache_dir() / "benchmarks"
"""Checkpoints that were made for benchmarks, and the engines' logs."""
LOGS = KEPT / "logs"
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, as `shuteye pull smollm2-135m` fetches it, dequantized to bfloat16",
    "llama-1b": "a Llama of TinyLlama's shape (1.1 billion parameters) with random weights, bfloat16",
}


@dataclass(frozen=True, slots=True)
class Format:
    """What the weights of one comparison are held in.

    Attributes:
        title: as people write it.
        gguf: the type that llama-quantize is told; None is the bfloat16 that all others are made of.
        openvino: the nearest that OpenVINO's own tools make of them.
    """

    title: str
    gguf: str | None
    openvino: str


FORMATS = {
    "bf16": Format("bfloat16", None, "bfloat16"),
    "q8_0": Format("Q8_0", "Q8_0", "int8"),
    "q4_0": Format("Q4_0", "Q4_0", "int4"),
    "q4_k_m": Format("Q4_K_M", "Q4_K_M", "int4"),
}
CONTEXT = 4096
"""Positions that the random Llama claims; a 2,048-token prompt and its answer fit."""

ALIGNMENT = 64
"""Bytes; GGUF's usual 32 would let half of llama.cpp's vector loads straddle two cache lines."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The same model as every engine reads it.

    Attributes:
        directory: config.json, tokenizer.json, model.safetensors in bfloat16, whatever the format.
        gguf: the matrices in `format`, norms in float32.
        gguf_f16: the matrices in float16, for what reads no bfloat16.
        format: a key of `FORMATS`.
    """

    name: str
    directory: Path
    gguf: Path
    gguf_f16: Path
    format: str = "bf16"

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer.json"

    @property
    def complete(self) -> bool:
        return all(path.exists() for path in (self.tokenizer, self.gguf, self.gguf_f16))


def checkpoint(name: str, form: str = "bf16") -> Checkpoint:
    """Where the files of a model are, whether or not they have been made."""
    return Checkpoint(name, KEPT / f"{name}-bf16", KEPT / f"{name}-{form}.gguf", KEPT / f"{name}-f16.gguf", form)


def prepare(name: str, form: str = "bf16", *, quantize: Path | None = None) -> Checkpoint:
    """The files of a model, made by a process of their own if any is missing.

    Args:
        quantize: the program llama-quantize, for formats other than bf16.
    """
    plain, found = checkpoint(name), checkpoint(name, form)
    if not plain.complete:
        print(f"Making the checkpoint {plain.directory} and its GGUF files …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, __file__, name], check=True)
    if not found.complete:
        quantize_gguf(plain.gguf, found.gguf, FORMATS[form].gguf or "", quantize)
    return found


def quantize_gguf(source: Path, target: Path, kind: str, quantize: Path | None) -> None:
    """Let llama-quantize make a file of another type; `quantize` is where it is."""
    if quantize is None:
        sys.exit(f"{target} is made by llama.cpp's llama-quantize; `make bench-peers PEERS=llama.cpp` installs it.")
    partial = target.with_suffix(".partial")
    command = [str(quantize), str(source), str(partial), kind]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")
    partial.rename(target)


def make(name: str) -> None:
    """Write whatever is missing; what stands under its final name is whole."""
    target = checkpoint(name)
    target.directory.parent.mkdir(parents=True, exist_ok=True)
    if not target.tokenizer.exists():
        partial = target.directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        {"smollm2": write_smollm2, "llama-1b": write_llama}[name](partial)
        partial.rename(target.directory)
    for path, dtype in ((target.gguf, "bfloat16"), (target.gguf_f16, "float16")):
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_gguf(target.directory, partial, dtype)
            partial.rename(path)


def write_smollm2(directory: Path) -> None:
    """The GGUF that shuteye's alias means, through transformers' dequantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from shuteye.models.modules import quiet
    from shuteye.models.sources import resolve_source

    source = resolve_source("smollm2-135m", cache_dir=default_cache_dir())
    if source.kind != "gguf":
        shutil.copytree(source.path, directory)
        return
    where = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    with quiet():
        unpack = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=unpack)
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


def write_llama(directory: Path) -> None:
    """The random model of sleep_wake.py, with a tokenizer whose every id is text (its own has only bytes)."""
    from sleep_wake import large_model

    random = large_model(KEPT / "llama-22", 22)
    words = prepare("smollm2").directory
    directory.mkdir()
    os.link(random / "model.safetensors", directory / "model.safetensors")
    config = json.loads((random / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}, indent=2))
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(words / name, directory / name)
    tokenizer = first_tokens(json.loads((words / "tokenizer.json").read_text()), config["vocab_size"])
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def first_tokens(tokenizer: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """A BPE tokenizer.json without the tokens from `vocab_size` on, nor the merges that make them."""
    model = tokenizer["model"]
    vocab = {token: index for token, index in model["vocab"].items() if index < vocab_size}
    merges = [merge for merge in map(pair, model["merges"]) if "".join(merge) in vocab]
    return tokenizer | {"model": model | {"vocab": vocab, "merges": merges}}


def pair(merge: str | list[str]) -> list[str]:
    """Both spellings of a merge that tokenizer.json knows, as two strings."""
    return merge.split(" ") if isinstance(merge, str) else merge


# --- GGUF ---------------------------------------------------------------------------------------

GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of transformers' Llama parameters; a KeyError for what no Llama has."""
    stem = name.removesuffix(".weight")
    if stem in GGUF_TOP:
        return f"{GGUF_TOP[stem]}.weight"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{GGUF_LAYER[part]}.weight"


def interleaved(weight: Any, num_heads: int) -> Any:
    """Rows of a query or key projection as llama.cpp rotates them: pairs side by side, not half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tensors(directory: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor, projection = file.get_tensor(name), name.split(".")[-2]
            yield gguf_name(name), interleaved(tensor, heads[projection]) if projection in heads else tensor


def write_gguf(directory: Path, path: Path, dtype: str) -> None:
    """A Llama checkpoint as GGUF.

    Args:
        dtype: "bfloat16" or "float16", for matrices; vectors are float32, as llama.cpp's own converter has them.
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    config = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else LlamaFileType.MOSTLY_F16)
    add_sizes(writer, config)
    add_tokenizer(writer, json.loads((directory / "tokenizer.json").read_text()), config)
    for name, tensor in gguf_tensors(directory, config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.float().numpy())
        elif dtype == "bfloat16":
            raw = tensor.contiguous().view(torch.uint16).numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.to(torch.float16).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_name(config.get("_model_name_or_path") or "random Llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    from gguf import TokenType

    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair(merge)) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


if __name__ == "__main__":
    make(sys.argv[1])
