"""Tiny checkpoints quantized as AutoAWQ, GPTQ's tools and compressed-tensors store them, by the definitions of each."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of AutoAWQ's WQLinear_GEMM.from_linear: which row nibble i of a word has


def write_packed(
    path, checkpoint, method, *, bits=4, group=32, symmetric=True, scale_dtype=torch.float16, edit=None, declared=None
):
    """Quantize a checkpoint's layers; what its tensors stand for, under transformers' names.

    Args:
        method: `awq`, `gptq`, `pack-quantized` or `int-quantized`.
        group: columns that share a scale; None: all of a row.
        edit: changes the tensors before they are written.
        declared: more of `quantization_config`.
    """
    path = Path(shutil.copytree(checkpoint, path))
    meant, stored = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if tensor.ndim != 2 or ".layers." not in name:
            meant[name], stored[name] = tensor.float().numpy(), tensor
            continue
        u, scales, zeros = quantized(tensor.float().numpy(), bits, group, symmetric, scale_dtype)
        parts = PACKERS[method](u, scales, zeros, bits, symmetric)
        stored |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
        width = u.shape[1] // scales.shape[1]
        wide = [np.repeat(each, width, axis=1) for each in (scales.float().numpy(), zeros.astype(np.float32))]
        meant[name] = wide[0] * (u.astype(np.float32) - wide[1])
    if edit is not None:
        edit(stored)
    save_file(stored, path / "model.safetensors")
    model = json.loads((path / "config.json").read_text())
    model["quantization_config"] = _config(method, bits, group, symmetric) | (declared or {})
    (path / "config.json").write_text(json.dumps(model))
    return meant


def quantized(rows, bits, group, symmetric, scale_dtype):
    """Integers, scales (a torch tensor) and zero points of rows."""
    by_group = rows.reshape(len(rows), -1, group or rows.shape[1])
    low, high = by_group.min(axis=-1), by_group.max(axis=-1)
    steps, middle = (1 << bits) - 1, 1 << (bits - 1)
    scales = np.abs(by_group).max(axis=-1) / (middle - 1) if symmetric else (high - low) / steps
    scales = torch.from_numpy(scales).to(scale_dtype)
    wide = scales.float().numpy()
    zeros = np.full(low.shape, middle) if symmetric else np.clip(np.round(-low / wide), 0, steps)
    u = np.clip(np.round(by_group / wide[..., None]) + zeros[..., None], 0, steps)
    return u.reshape(rows.shape).astype(np.int64), scales, zeros.astype(np.int64)


def words(values, bits, order=None):
    """Rows of unsigned integers, padded with zeros, into rows of words, the first in the lowest bits."""
    per_word = 32 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per_word))).reshape(len(values), -1, per_word)
    found = np.zeros(padded.shape[:2], np.int64)
    for index in range(per_word):
        found |= padded[:, :, index if order is None else order[index]] << (bits * index)
    return torch.from_numpy(found.astype(np.uint32).view(np.int32))


def _awq(u, scales, zeros, bits, _symmetric):
    return {
        "qweight": words(u.T, bits, AWQ_ORDER),
        "qzeros": words(zeros.T, bits, AWQ_ORDER),
        "scales": scales.T,
    }


def _gptq(u, scales, zeros, bits, _symmetric):
    less_one = words(zeros.T, bits).numpy().view(np.uint32) - np.uint32(0x11111111 if bits == 4 else 0x01010101)
    return {
        "qweight": words(u, bits).T,
        "qzeros": torch.from_numpy(less_one.view(np.int32)),
        "scales": scales.T,
        "g_idx": torch.arange(u.shape[1], dtype=torch.int32) // (u.shape[1] // scales.shape[1]),
    }


def _pack_quantized(u, scales, zeros, bits, symmetric):
    parts = {"weight_packed": words(u, bits), "weight_scale": scales, "weight_shape": torch.tensor(u.shape)}
    return parts if symmetric else parts | {"weight_zero_point": words(zeros.T, bits).T}


def _int_quantized(u, scales, zeros, bits, _symmetric):
    return {"weight": torch.from_numpy(u - (1 << (bits - 1))).to(torch.int8), "weight_scale": scales}


PACKERS = {"awq": _awq, "gptq": _gptq, "pack-quantized": _pack_quantized, "int-quantized": _int_quantized}


def _config(method, bits, group, symmetric):
    if method == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group or -1, "zero_point": True, "version": "gemm"}
    if method == "gptq":
        return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": method,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": group}}},
        "ignore": ["lm_head"],
    }
