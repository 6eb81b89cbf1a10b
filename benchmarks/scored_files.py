"""Checkpoints whose perplexity is measured: every format of weights that is served, and what a file of it stands for.

SmolLM2 has 576 columns where blocks of 256 and groups of 128 do not fit, so that llama-quantize would give most of its
matrices other formats. For these it is widened with zeros to 768, which changes hardly anything that it computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import KEPT, Checkpoint, checkpoint, prepare, quantize_gguf, write_gguf
from peers.llama_cpp import program

MODEL = "smollm2"
WIDE = "smollm2-wide"
WIDE_HIDDEN, WIDE_HEADS = 768, 12
"""Of 576 and 9: a fourth query head for each of the three KV heads."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Integers with a bfloat16 scale for each group of columns, as compressed-tensors stores them.

    Attributes:
        size: of a group; None: all of a row.
    """

    bits: int
    size: int | None


@dataclass(frozen=True, slots=True)
class Scored:
    """A format.

    Attributes:
        title: as people write it.
        made: the type that llama-quantize is told, or groups; None is the bfloat16 that all others are made of.
        wide: of the model with zeros.
    """

    title: str
    made: str | Groups | None
    wide: bool = False


SCORED: dict[str, Scored] = {
    "bf16": Scored("bfloat16", None),
    **{name.lower(): Scored(name, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")},
    **{
        name.lower(): Scored(name, name, wide=True) for name in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")
    },
    "int4_g32": Scored("int4, groups of 32", Groups(4, 32)),
    "int4_g128": Scored("int4, groups of 128", Groups(4, 128), wide=True),
    "int8_row": Scored("int8 by row", Groups(8, None)),
}


def prepare_scored(form: str) -> Checkpoint:
    """The file or directory of a format, made if it is missing; of groups, `directory` is what is served."""
    scored = SCORED[form]
    name = WIDE if scored.wide else MODEL
    plain = _wide() if scored.wide else prepare(MODEL)
    found = checkpoint(name, form)
    match scored.made:
        case str() as kind:
            if not found.gguf.exists():
                quantize_gguf(plain.gguf, found.gguf, kind, program("llama-quantize"))
            return found
        case Groups() as groups:
            directory = KEPT / f"{name}-{form}"
            if not directory.exists():
                partial = directory.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                _write_groups(plain.directory, partial, groups)
                partial.rename(directory)
            return Checkpoint(name, directory, found.gguf, found.gguf_f16, form)
    return plain


def stands_for(form: str) -> Iterator[tuple[str, Any]]:
    """The float32 tensors that a checkpoint of groups stands for, by transformers' names."""
    scored = SCORED[form]
    assert isinstance(scored.made, Groups), f"{form} is a GGUF file, which transformers reads"
    plain = _wide() if scored.wide else prepare(MODEL)
    return _meant(plain.directory, scored.made)


def _meant(directory: Path, groups: Groups) -> Iterator[tuple[str, Any]]:
    import torch

    for name, tensor in _tensors(directory):
        if not _is_quantized(name):
            yield name, tensor.float()
            continue
        u, scales = _rounded(tensor.float().numpy(), groups)
        by_group = u.reshape(len(u), scales.shape[1], -1).astype(np.float32)
        meant = scales.float().numpy()[:, :, None] * by_group
        yield name, torch.from_numpy(meant.reshape(u.shape))


# --- with zeros -----------------------------------------------------------------------------------


def _wide() -> Checkpoint:
    """SmolLM2 in a wider hidden state, whose further numbers are 0 throughout."""
    plain, wide = prepare(MODEL), checkpoint(WIDE)
    if not wide.directory.exists():
        partial = wide.directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(plain.directory, partial)
        _widen(plain.directory, partial)
        partial.rename(wide.directory)
    if not wide.gguf.exists():
        made = wide.gguf.with_suffix(".partial")
        write_gguf(wide.directory, made, "bfloat16")
        made.rename(wide.gguf)
    return wide


def _widen(source: Path, target: Path) -> None:
    from safetensors.torch import save_file

    config = json.loads((source / "config.json").read_text())
    share = config["hidden_size"] / WIDE_HIDDEN
    sizes = {"hidden_size": WIDE_HIDDEN, "num_attention_heads": WIDE_HEADS}
    wide = config | sizes | {"rms_norm_eps": config["rms_norm_eps"] * share}
    (target / "config.json").write_text(json.dumps(wide, indent=2))
    tensors = {name: _widened(name, tensor, config) for name, tensor in _tensors(source)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _widened(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """A norm divides by the root of a mean over more numbers, and so takes its weights times the root of the share.

    These are rounded to bfloat16, as every engine would do that computes in it: all are to have the same weights.
    """
    from torch.nn.functional import pad

    more = WIDE_HIDDEN - config["hidden_size"]
    if tensor.ndim == 1:
        share = config["hidden_size"] / WIDE_HIDDEN
        return pad((tensor.float() * share**0.5).to(tensor.dtype), (0, more))
    part = name.split(".")[-2]
    if part in ("q_proj", "o_proj"):
        tensor = _with_heads(tensor if part == "q_proj" else tensor.T, config)
        tensor = tensor if part == "q_proj" else tensor.T
    columns = more if part not in {"down_proj", "o_proj"} else 0
    rows = more if part in {"down_proj", "o_proj"} else 0
    return pad(tensor, (0, columns, 0, rows)).contiguous()


def _with_heads(rows: Any, config: dict[str, Any]) -> Any:
    """Rows of query heads, with heads of zeros behind those of each KV head."""
    from torch.nn.functional import pad

    num_kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // num_kv_heads
    grouped = rows.reshape(num_kv_heads, per_group * head_dim, rows.shape[1])
    more = (WIDE_HEADS // num_kv_heads - per_group) * head_dim
    return pad(grouped, (0, 0, 0, more)).reshape(-1, rows.shape[1])


# --- integers in groups -----------------------------------------------------------------------------


def _is_quantized(name: str) -> bool:
    """Matrices of layers: quantizers of this kind leave the embedding alone."""
    return ".layers." in name and name.endswith("proj.weight")


def _rounded(rows: NDArray[np.float32], groups: Groups) -> tuple[NDArray[np.int8], Any]:
    """Integers [rows, columns] to the nearest, and bfloat16 scales [rows, groups], symmetric about 0."""
    import torch

    most = (1 << (groups.bits - 1)) - 1
    by_group = rows.reshape(len(rows), -1, groups.size or rows.shape[1])
    scales = torch.from_numpy(np.abs(by_group).max(axis=-1) / most).to(torch.bfloat16)
    wide = scales.float().numpy()[:, :, None]
    u = np.divide(by_group, wide, out=np.zeros_like(by_group), where=wide > 0)
    return np.clip(np.round(u), -most - 1, most).astype(np.int8).reshape(rows.shape), scales


def _write_groups(source: Path, target: Path, groups: Groups) -> None:
    import torch
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    stored: dict[str, Any] = {}
    for name, tensor in _tensors(source):
        if not _is_quantized(name):
            stored[name] = tensor
            continue
        u, scales = _rounded(tensor.float().numpy(), groups)
        module = name.removesuffix(".weight")
        stored[f"{module}.weight_scale"] = scales
        if groups.bits == 8:
            stored[f"{module}.weight"] = torch.from_numpy(u)
        else:
            stored[f"{module}.weight_packed"] = torch.from_numpy(_words(u + 8))
            stored[f"{module}.weight_shape"] = torch.tensor(u.shape)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    strategy: dict[str, Any] = {"strategy": "group", "group_size": groups.size} if groups.size else {}
    weights = {"num_bits": groups.bits, "type": "int", "symmetric": True, "strategy": "channel"} | strategy
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if groups.bits == 8 else "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _words(u: NDArray[np.int8]) -> NDArray[np.int32]:
    """Numbers of 4 bits, eight in a word, the first in the lowest bits."""
    nibbles = u.astype(np.uint32).reshape(len(u), -1, 8)
    words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    found: NDArray[np.int32] = words.astype(np.uint32).view(np.int32)
    return found


def _tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)
