"""The engine as the server sees it: the verbs of `AsyncEngine` that routes call, and nothing else.

Knows nothing of processes or tensors; tests serve a fake through the same seam.
"""

# ruff: noqa: D102 - AsyncEngine documents its verbs

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal, Protocol

from shuteye.config import EngineConfig
from shuteye.errors import ShuteyeError
from shuteye.frontend.mailbox import Backlog
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, WakeReport
from shuteye.tasks.base import OutputKind
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams
from shuteye.tasks.pool.requests import EmbeddingRequestOutput, PoolingParams, ScoringRequestOutput
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

EngineStatus = Literal["starting", "ready", "hung", "failed", "dead", "closed"]


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
    def hang(self) -> str | None: ...
    @property
    def is_sleeping(self) -> bool: ...
    @property
    def is_paused(self) -> bool: ...

    async def start(self) -> None: ...
    async def close(self, reason: ShuteyeError | None = None) -> None: ...
    async def restart(self) -> None: ...
    def listen_to_own_wakes(self, listener: Callable[[WakeReport | ShuteyeError], None]) -> None: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
        backlog: Backlog | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...

    def transcribe(
        self,
        pcm: bytes,
        params: TranscribeParams | None = None,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[Transcription, None]: ...

    async def embed(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[EmbeddingRequestOutput]: ...
    async def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> list[ScoringRequestOutput]: ...

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
    async def update_weights_from_file(self, path: str) -> UpdateReport: ...
    async def reload_weights(self, path: str | None = None) -> UpdateReport: ...
    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Any]: ...
    async def reset_prefix_cache(self) -> None: ...
