"""The engines that serve.py compares, one module each; `ENGINES` has them by name, in the order they take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checkpoints import Checkpoint
from peers.base import Engine, SelfTimed
from peers.llama_cpp import LlamaBench, LlamaCpp
from peers.openvino_genai import OpenVino
from peers.shuteye import Shuteye
from peers.transformers_serve import TransformersServe
from peers.vllm_cpu import Vllm

ENGINES: dict[str, Callable[[Checkpoint, Path, str | None], Engine | SelfTimed]] = {
    "shuteye": Shuteye,
    "shuteye-plain": lambda checkpoint, logs, level: Shuteye(checkpoint, logs, level, sleep_mode=False),
    "llama.cpp": LlamaCpp,
    "llama-bench": LlamaBench,
    "openvino": OpenVino,
    "transformers": TransformersServe,
    "vllm": Vllm,
}

QUANTIZED_ENGINES = ("shuteye", "llama.cpp", "llama-bench", "openvino")
"""Those that serve the formats other than bf16; transformers and vLLM would dequantize the file."""
