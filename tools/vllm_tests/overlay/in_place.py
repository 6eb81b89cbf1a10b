"""Starts `shuteye serve` where vLLM's tests start `vllm serve`: which model stands for theirs, and what flags become.

Runs in the environment of vLLM's tests. SHUTEYE_PYTHON is the interpreter that shuteye is installed in.
"""

from __future__ import annotations

import os
from pathlib import Path

_SPEECH, _TEXTS, _DECODER = "whisper-tiny.en", "minilm-l6", "smollm2-135m"
_PAIRS, _CLASSES = "cross-encoder", "classifier"  # random ones, made by run.py
_CONTEXT = {_DECODER: 8192, _TEXTS: 256, _SPEECH: 448, _PAIRS: 128, _CLASSES: 128}
_SHORT_CONTEXT = "2048"
"""Of SmolLM2 where a test does not care: what nothing else ends goes on to the end of the context, on a CPU."""
_KEPT = {  # flags of vLLM that shuteye has, with how many values they take
    "--max-model-len": 1, "--max-num-seqs": 1, "--max-num-batched-tokens": 1, "--seed": 1, "--port": 1, "--host": 1,
    "--enable-prefix-caching": 0, "--no-enable-prefix-caching": 0, "--enable-sleep-mode": 0, "--served-model-name": 1,
    "--api-key": 1, "--tool-call-parser": 1, "--reasoning-parser": 1, "--uds": 1, "--root-path": 1,
    "--enable-force-include-usage": 0, "--return-tokens-as-token-ids": 0, "--shutdown-timeout": 1,
    "--max-logprobs": 1, "--chat-template": 1,
}  # fmt: skip
_DROPPED = {  # flags that change how vLLM computes, or turn on what shuteye always has
    "--enforce-eager": 0, "--gpu-memory-utilization": 1, "--runner": 1, "--trust-remote-code": 0,
    "--enable-chunked-prefill": 0, "--enable-auto-tool-choice": 0, "--enable-prompt-tokens-details": 0,
    "--attention-backend": 1, "--load-format": 1, "--disable-uvicorn-access-log": 0, "--tokenizer": 1,
    "--structured-outputs-config": 1, "--structured-outputs-config.backend": 1,
    "--no-async-scheduling": 0, "--enable-tokenizer-info-endpoint": 0,
    "--enable-request-id-headers": 0,
    "--show-hidden-metrics-for-version": 1, "--enable-server-load-tracking": 0, "--dtype": 1,
    "--tokenizer-mode": 1, "--config-format": 1, "--hf-overrides": 1, "--enable-scale-out": 0,
    "--enable-per-request-metrics": 0, "--ignore-patterns": 1,
    "--enable-lora": 0, "--lora-modules": 1, "--max-lora-rank": 1, "--max-cpu-loras": 1,
}  # fmt: skip


def stand_in(model: str) -> str:
    """What is served in the place of a model that cannot be had here."""
    name = model.lower()
    if "whisper" in name:
        return _SPEECH
    if any(part in name for part in ("cross-encoder", "reranker")):
        return _PAIRS
    if "apeach" in name:
        return _CLASSES
    if any(part in name for part in ("e5", "bge", "minilm", "arctic-embed", "gte-")):
        return _TEXTS
    return _DECODER


def command(model: str, arguments: list[str]) -> list[str]:
    """The command that serves `model`, by its own name, as `vllm serve MODEL ARGUMENTS` would."""
    served = stand_in(model)
    made = Path(os.environ["SHUTEYE_TEST_MODELS"]) / served
    where = str(made) if served in {_PAIRS, _CLASSES} else served
    line = [os.environ["SHUTEYE_PYTHON"], "-m", "shuteye", "serve", where]
    if not any(one.startswith("--served-model-name") for one in arguments):
        line += ["--served-model-name", model]
    line += ["--metrics-prefix", "vllm"]
    if served == _DECODER:
        line += ["--max-model-len", _SHORT_CONTEXT]  # the last one of a flag counts
    left = [part for one in arguments for part in (one.split("=", 1) if one.startswith("--") else [one])]
    while left:
        flag = left.pop(0)
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        count = _KEPT.get(flag, _DROPPED.get(flag))
        if count is None:
            line.append(flag)  # shuteye says that it does not know it
            continue
        values = [left.pop(0) for _ in range(count)]
        while flag == "--lora-modules" and left and not left[0].startswith("-"):
            left.pop(0)
        if flag == "--max-model-len":
            values = [_context(served, int(values[0]))]
        if flag in _KEPT:
            line += [flag, *values]
    return line


def _context(served: str, wanted: int) -> str:
    if served == _DECODER and wanted > _CONTEXT[served]:
        return _SHORT_CONTEXT
    return str(min(wanted, _CONTEXT[served]))


def environment(extra: dict[str, str] | None) -> dict[str, str]:
    """The environment of that command."""
    wanted = os.environ | (extra or {})
    wanted["PYTHONPATH"] = os.environ.get("SHUTEYE_PYTHONPATH", "")
    return {name: value for name, value in wanted.items() if value or name != "PYTHONPATH"}
