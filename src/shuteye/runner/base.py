"""The part of a rank that depends on what the model is for: it binds the model, runs its steps and its canary.

Knows nothing of sleeping: memory comes and goes under the views that it made.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from shuteye.config import EngineConfig
from shuteye.errors import InternalError
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models.binding import BoundModel
from shuteye.plans import Result
from shuteye.runner.canary import Prove


class ModelRunner(Protocol):
    """One task's steps. Made while the weights are resident; used only while every tag is."""

    @property
    def model(self) -> BoundModel[Any]:
        """The bound model."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache bytes of one token; 0 if the engine keeps no KV cache for this task."""
        ...

    def attach_kv_cache(self, arena: Arena, *, num_blocks: int) -> None:
        """Look into the committed KV arena, of no bytes where `kv_bytes_per_token` is 0; called once, before steps."""
        ...

    def execute(self, plan: Any, *, prove: Prove | None = None) -> Result:
        """Run one step of this task's kind of plan; with `prove`, the canary too, before anything comes of the step."""
        ...

    def drop_computed(self) -> None:
        """Memory is about to be released: let go of what was computed for requests, who will begin anew."""
        ...

    def canary_pass(self) -> torch.Tensor:
        """The numbers (any shape) that a short fixed input gives; they depend on nothing but weights and buffers."""
        ...


def open_runner(image: WeightImage, weights: Arena, config: EngineConfig, *, num_threads: int) -> ModelRunner:
    """The runner for the task that the image's metadata names.

    Raises:
        ImageFailure, UnsupportedModel: binding failed, see `models.loaded.bind` and `models.encoder.bind_encoder`.
    """
    task = image.metadata["task"]
    if task == "generate":
        from shuteye.runner.generation import GenerationRunner

        return GenerationRunner(image, weights, config, num_threads=num_threads)
    if task in ("embed", "score"):
        from shuteye.runner.pooling import PoolingRunner

        return PoolingRunner(image, weights)
    if task == "transcribe":
        from shuteye.runner.speech import SpeechRunner

        return SpeechRunner(image, weights)
    raise InternalError(f"{image.path} is the image of a model for the task {task!r}, which no runner serves.")
