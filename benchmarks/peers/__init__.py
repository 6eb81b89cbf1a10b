"""The engines that serve.py compares, one module each; `ENGINES` has them by name, in the order they take turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checkpoints import Checkpoint
from peers.base import Engine
from peers.llama_cpp import LlamaCpp
from peers.openvino_genai import OpenVino
from peers.shuteye import Shuteye
from peers.transformers_serve import TransformersServe
from peers.vllm_cpu import Vllm

ENGINES: dict[str, Callable[[Checkpoint, Path], Engine]] = {
    "shuteye": Shuteye,
    "shuteye-plain": lambda checkpoint, logs: Shuteye(checkpoint, logs, sleep_mode=False),
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "transformers": TransformersServe,
    "vllm": Vllm,
}
