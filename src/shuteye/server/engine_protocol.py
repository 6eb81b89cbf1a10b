"""The engine as the server sees it: the verbs of `AsyncEngine` that routes call, and nothing else.

Knows nothing of processes or tensors; tests serve a fake through the same seam.
"""

# ruff: noqa: D102 - AsyncEngine documents its verbs

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

from shuteye.config import EngineConfig
from shuteye.errors import ShuteyeError
from shuteye.outputs import (
    EngineState,
    ModelInfo,
    RequestOutput,
    SchedulerStats,
    SleepReport,
    UpdateReport,
    WakeReport,
)
from shuteye.request import OutputKind, SamplingParams
from shuteye.tokenizer import Tokenizer

EngineStatus = Literal["starting", "ready", "failed", "dead", "closed"]


class ServedEngine(Protocol):
    """What `create_app` needs; `info` and `tokenizer` raise `EngineNotReady` until `start` has finished."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def state(self) -> EngineState: ...
    @property
    def stats(self) -> SchedulerStats: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def status(self) -> EngineStatus: ...
    @property
    def failure(self) -> ShuteyeError | None: ...
    @property
    def is_sleeping(self) -> bool: ...
    @property
    def is_paused(self) -> bool: ...

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncIterator[RequestOutput]: ...

    async def sleep(
        self,
        level: int = 1,
        *,
        tags: Sequence[str] | None = None,
        mode: str | None = None,
        timeout_s: float | None = None,
    ) -> SleepReport: ...
    async def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport: ...
    async def pause(self, mode: str | None = None, *, timeout_s: float | None = None) -> None: ...
    async def resume(self) -> None: ...
    async def reload_weights(self, path: str | None = None) -> UpdateReport: ...
    async def reset_prefix_cache(self) -> None: ...
