"""The tensors of a GGUF file of a llama-like model, as they are stored, under the names of transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.ggml import is_finite
from shuteye.matrices.kinds import KINDS, MatrixKind
from shuteye.matrices.packing import as_float32
from shuteye.matrices.stored import Blocks
from shuteye.models.formats.files import damaged
from shuteye.models.formats.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from shuteye.models.formats.gguf_modules import ModuleNames
from shuteye.models.formats.quantized import QuantizedTensors

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""Whose tensors have the names below; mistral's are called llama."""

_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"

_FLOATS = {"F32": ("f32", "<u4"), "F16": ("f16", "<u2"), "BF16": ("bf16", "<u2")}
_BLOCKS = {name.upper(): kind for name, kind in KINDS.items() if kind.is_quantized}


def hf_name(name: str) -> str | None:
    """What transformers' modules call the tensor `name` of a file; None: there is no such one."""
    if match := _LAYER_TENSOR.fullmatch(name):
        module = _LAYER_MODULES.get(match[2])
        return None if module is None else f"model.layers.{match[1]}.{module}.{match[3]}"
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES[module]}.{leaf}" if module in _MODULES and leaf in ("weight", "bias") else None


@contextmanager
def open_gguf(path: Path, modules: ModuleNames | None = None) -> Iterator[QuantizedTensors]:
    """The tensors of a file.

    Args:
        modules: what they are called, of a model that transformers' modules compute.

    Raises:
        UnsupportedModel: it is damaged, or has what is not read: tensors or formats of another kind of model.
    """
    header = read_gguf_header(path)
    if modules is None:
        _require_plain(header)
    file = _File(header, np.memmap(path, mode="r", dtype=np.uint8), modules)
    name_of = modules or hf_name
    names = {_known(header, name, name_of(name)): name for name in header.tensors if name != _ROPE_FACTORS}
    stored = {ours: header.tensors[theirs] for ours, theirs in names.items()}
    matrices = {
        name: (_kind(header, names[name], tensor), _two(header, names[name], tensor))
        for name, tensor in stored.items()
        if tensor.stored_as not in _FLOATS
    }
    floats = {name: tensor.shape for name, tensor in stored.items() if name not in matrices}
    factors = file.floats(_ROPE_FACTORS) if _ROPE_FACTORS in header.tensors else None
    yield QuantizedTensors(matrices, floats, lambda name: file.read(names[name]), factors)


def unknown_formats(path: Path) -> set[str]:
    """Formats of a file's tensors that are not read here, though others may; see `read_gguf_header`."""
    return {tensor.stored_as for tensor in read_gguf_header(path).tensors.values()} - _FLOATS.keys() - _BLOCKS.keys()


def _require_plain(header: GgufHeader) -> None:
    """Refuse what would be computed otherwise than the file means."""
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.path} is of the architecture {header.architecture!r}, whose weights are not kept quantized; "
            f"expected one of {', '.join(sorted(ARCHITECTURES))}. Serve it with --quantization none."
        )


def _known(header: GgufHeader, name: str, known: str | None) -> str:
    if known is None:
        raise UnsupportedModel(
            f"{header.path} has a tensor {name!r}, which no {header.architecture} model has that is served."
        )
    return known


def _kind(header: GgufHeader, name: str, tensor: GgufTensor) -> MatrixKind:
    if tensor.stored_as not in _BLOCKS:
        raise UnsupportedModel(
            f"{header.path}: {name} is stored as {tensor.stored_as}, which is not read; expected one of "
            f"{', '.join((*_FLOATS, *_BLOCKS))}. Use a file of another quantization, or --quantization none."
        )
    return _BLOCKS[tensor.stored_as]


def _two(header: GgufHeader, name: str, tensor: GgufTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise damaged(header.path, f"{name} is quantized and has {len(tensor.shape)} dimensions instead of 2")
    rows, columns = tensor.shape
    return rows, columns


@dataclass(frozen=True, slots=True)
class _File:
    """Numbers of a file, of which only what is used is read."""

    header: GgufHeader
    data: NDArray[np.uint8]
    modules: ModuleNames | None = None

    def read(self, name: str) -> Blocks | NDArray[np.float32]:
        """A tensor by its name in the file, its rows in the order that transformers has them."""
        tensor = self.header.tensors[name]
        if tensor.stored_as in _FLOATS:
            values = self.floats(name) if self.modules is None else self.modules.changed(name, self.floats(name))
            return np.ascontiguousarray(self._in_order(name, values))
        kind = _BLOCKS[tensor.stored_as]
        blocks = self._bytes(tensor).reshape(tensor.shape[0], -1)
        if not is_finite(kind.name, blocks):
            raise damaged(self.header.path, f"{name} has a scale that is infinite or no number")
        return Blocks(kind, self._in_order(name, blocks))

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor of floats in whatever precision."""
        tensor = self.header.tensors[name]
        if tensor.stored_as not in _FLOATS:
            raise damaged(self.header.path, f"{name} is stored as {tensor.stored_as} instead of floats")
        dtype, bits = _FLOATS[tensor.stored_as]
        return as_float32(self._bytes(tensor).view(bits).reshape(tensor.shape), dtype)

    def _bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]

    def _in_order(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Files of the llama architecture have the two halves of each query and key head interleaved."""
        match = _LAYER_TENSOR.fullmatch(name)
        if self.header.architecture != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
            return rows
        num_heads = self._num_heads(of_keys=match[2] == "attn_k")
        if len(rows) % (2 * num_heads):
            raise damaged(self.header.path, f"{name} has {len(rows)} rows, which are not {num_heads} heads")
        pairs = rows.reshape(num_heads, len(rows) // num_heads // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    def _num_heads(self, *, of_keys: bool) -> int:
        metadata: Mapping[str, object] = self.header.metadata
        key = f"{self.header.architecture}.attention.head_count"
        found = metadata.get(f"{key}_kv", metadata.get(key)) if of_keys else metadata.get(key)
        if not isinstance(found, int) or found < 1:
            raise damaged(self.header.path, f"it says of its number of heads {found!r}, expected one number")
        return found
