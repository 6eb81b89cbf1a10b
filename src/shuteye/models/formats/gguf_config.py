"""The configuration of a llama-like model by its GGUF file's metadata: read here, as transformers takes seconds for it.

Transformers leaves out what the file says of scaled rotary positions, of heads of other sizes and of biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.files import damaged
from shuteye.models.formats.gguf_header import GgufHeader

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_DEFAULT_ROPE_THETA = 10_000.0
_SCALING = frozenset({"type", "factor", "original_context_length", "finetuned"})


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Settings of the transformers config, `model_type` among them.

    Raises:
        UnsupportedModel: the file does not say them, or scales rotary positions in a way that is not known here.
    """
    facts = _Metadata(header)
    heads = facts.count("attention.head_count")
    if _EMBEDDING not in header.tensors:
        raise damaged(header.path, f"it has no tensor {_EMBEDDING}")
    config = {
        "model_type": header.architecture,
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "hidden_size": facts.count("embedding_length"),
        "intermediate_size": facts.count("feed_forward_length"),
        "num_hidden_layers": facts.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.count("attention.head_count_kv", heads),
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(facts),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "bos_token_id": _token(header, "bos"),
        "eos_token_id": _ends(header),
        "pad_token_id": _token(header, "padding"),
    }
    if header.architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return config


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The metadata of the model itself."""

    header: GgufHeader

    def get(self, key: str) -> Any:
        """A value as it is; None: there is none."""
        return self.header.metadata.get(f"{self.header.architecture}.{key}")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        found = self.get(key)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
            raise damaged(self.header.path, f"it says of {self.header.architecture}.{key} {found!r}")
        return found

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        found = self.number(key, default)
        if not isinstance(found, int):
            raise damaged(self.header.path, f"it says of {self.header.architecture}.{key} {found!r}")
        return found

    @property
    def head_dim(self) -> int:
        """Of each query, key and value head."""
        usual = self.count("embedding_length") // self.count("attention.head_count")
        return self.count("attention.key_length", self.count("rope.dimension_count", usual))

    def scaling(self) -> set[str]:
        """What is said of scaled rotary positions."""
        prefix = f"{self.header.architecture}.rope.scaling."
        return {key.removeprefix(prefix) for key in self.header.metadata if key.startswith(prefix)}


def _rope(facts: _Metadata) -> dict[str, Any]:
    """Rotary positions, of whole heads."""
    path, scaling = facts.header.path, facts.get("rope.scaling.type") or "none"
    if facts.count("rope.dimension_count", facts.head_dim) != facts.head_dim:
        raise UnsupportedModel(f"{path} rotates a part of each head only, which is not read.")
    plain = {"rope_theta": float(facts.number("rope.freq_base", _DEFAULT_ROPE_THETA))}
    match scaling:
        case "none":
            return plain | {"rope_type": "default"}
        case "linear":
            return plain | {"rope_type": "linear", "factor": float(facts.number("rope.scaling.factor"))}
        case "yarn" if facts.scaling() <= _SCALING:
            original = facts.count("rope.scaling.original_context_length")
            factor = float(facts.number("rope.scaling.factor"))
            return plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModel(
        f"{path} scales its rotary positions ({scaling}) in a way that is not read from GGUF files. Use the checkpoint "
        "in Hugging Face format."
    )


def _token(header: GgufHeader, which: str) -> int | None:
    found = header.metadata.get(f"tokenizer.ggml.{which}_token_id")
    return found if isinstance(found, int) else None


def _ends(header: GgufHeader) -> int | list[int] | None:
    """What ends a text, or a turn."""
    found = list(dict.fromkeys(each for each in (_token(header, "eos"), _token(header, "eot")) if each is not None))
    return found[0] if len(found) == 1 else found or None
