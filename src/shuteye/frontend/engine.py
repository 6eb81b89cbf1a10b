"""An engine as its callers see it: the few verbs that every engine has, and those that are made of them.

Knows nothing of processes or tensors; the server is written against it, and tests serve a fake of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

from shuteye.calls import AsyncControls
from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest, ShuteyeError
from shuteye.frontend.mailbox import Backlog
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, WakeReport
from shuteye.tasks.base import Job, OutputKind
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams
from shuteye.tasks.pool.inputs import PoolInputs, Prompt, Texts, as_list, classes_of, embeddings_of, encoded, score_job
from shuteye.tasks.pool.outputs import PoolingJob
from shuteye.tasks.pool.requests import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PooledOutput,
    PoolingParams,
    PoolInput,
    ScoringRequestOutput,
)
from shuteye.tasks.transcribe.outputs import TranscriptionJob
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

OutputT = TypeVar("OutputT")

Status = Literal["starting", "ready", "unloaded", "hung", "failed", "dead", "closed"]


@dataclass(frozen=True, slots=True)
class EngineView:
    """What is known of an engine without asking it.

    Attributes:
        config: complete once the model is loaded.
        failure: why the engine can serve nothing, if so.
        hang: why the engine counts as hung; None while it does not. It may go on by itself; `restart` ends it for sure.
        state: where its memory is, as it pushed last.
        stats: the scheduler's counters as of the last step.
    """

    config: EngineConfig
    status: Status
    failure: ShuteyeError | None
    hang: str | None
    state: EngineState
    stats: SchedulerStats


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model, as callers see it."""

    info: ModelInfo
    tokenizer: Tokenizer


class KnownEngine(ABC):
    """What can be read of an engine at any time, without asking it."""

    @property
    @abstractmethod
    def view(self) -> EngineView:
        """All that is known now."""

    @property
    @abstractmethod
    def model(self) -> ServedModel:
        """The loaded model.

        Raises:
            EngineNotReady: still loading.
            ShuteyeError: the engine is gone; see `EngineView.failure`.
        """

    @property
    def config(self) -> EngineConfig:
        """See `EngineView.config`."""
        return self.view.config

    @property
    def status(self) -> Status:
        """Whether the engine is starting, ready, unloaded, hung, failed, dead or closed."""
        return self.view.status

    @property
    def failure(self) -> ShuteyeError | None:
        """See `EngineView.failure`."""
        return self.view.failure

    @property
    def hang(self) -> str | None:
        """See `EngineView.hang`."""
        return self.view.hang

    @property
    def state(self) -> EngineState:
        """See `EngineView.state`."""
        return self.view.state

    @property
    def stats(self) -> SchedulerStats:
        """See `EngineView.stats`."""
        return self.view.stats

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return self.state.is_sleeping

    @property
    def is_paused(self) -> bool:
        """True while a `pause()` or `sleep(level=0)` is in force."""
        return self.state.paused

    @property
    def info(self) -> ModelInfo:
        """The loaded model's facts; raises as `model`."""
        return self.model.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The loaded model's tokenizer; raises as `model`."""
        return self.model.tokenizer


def _ignore(_outcome: WakeReport | ShuteyeError) -> None:
    """Nobody wants to know."""


class Engine(KnownEngine, AsyncControls):
    """Whatever serves a model to callers on one event loop; `control` carries out a call, see `shuteye.calls`.

    Attributes:
        on_auto_wake: told how each wake ended that policy `wake` began: nobody else gets its report.
    """

    on_auto_wake: Callable[[WakeReport | ShuteyeError], None] = staticmethod(_ignore)

    @abstractmethod
    async def start(self) -> None:
        """Load the model; the first time builds its image, which takes longer.

        Raises:
            InvalidRequest: it was started before.
            ShuteyeError: loading failed, as the message says.
        """

    async def launch(self) -> None:
        """Begin to load, for callers with other work to do before they `start`, which then waits for the end of it."""

    @abstractmethod
    async def restart(self) -> None:
        """Start again after the engine died, hung or failed to load; nothing of its memory is reused.

        Raises:
            TransitionConflict: the engine is alive, as when somebody else has restarted it just now.
            ShuteyeError: loading failed.
        """

    @abstractmethod
    async def close(self, reason: ShuteyeError | None = None) -> None:
        """End the engine; requests in flight fail with `reason`, else with EngineDead. Idempotent."""

    @property
    @abstractmethod
    def request_ids(self) -> tuple[str, ...]:
        """The requests that run or wait."""

    @abstractmethod
    async def abort(self, request_id: str) -> None:
        """End a request; its iterator ends with finish reason "abort". Unknown ids are ignored: they have finished."""

    @abstractmethod
    def stream(
        self, job: Job[OutputT], *, request_id: str | None = None, backlog: Backlog | None = None
    ) -> AsyncGenerator[OutputT, None]:
        """Carry out a job; the first output comes once it was admitted. Closing the iterator aborts it.

        Outputs that come faster than they are taken are joined.

        Args:
            backlog: counts deltas that were not taken, together with those of other jobs.

        Raises:
            InvalidRequest: the model is for another task, or cannot do this.
            ModelSleeping: asleep, or put to sleep before there was a result.
            RequestAborted: more deltas waited to be taken than may.
            ShuteyeError: refused or failed otherwise; before the first output if it never ran.
        """

    # --- requests: each raises as `stream` ------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
        backlog: Backlog | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt."""
        return self.stream(GenerationJob(prompt, params, output_kind), request_id=request_id, backlog=backlog)

    def transcribe(
        self,
        pcm: bytes,
        params: TranscribeParams | None = None,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[Transcription, None]:
        """Transcribe.

        Args:
            pcm: samples as `shuteye.audio.decode` gives them.
            prompt: what is to be taken for the text before the audio.
        """
        params = TranscribeParams() if params is None else params
        return self.stream(TranscriptionJob(pcm, params, prompt, output_kind), request_id=request_id)

    async def embed(
        self,
        prompts: str | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, in their order, computed in batches. Cancelling it aborts it."""
        params = PoolingParams() if params is None else params
        inputs = await self._inputs(prompts, params, add_special_tokens=add_special_tokens)
        return embeddings_of(inputs, await self._pooled(PoolingJob(inputs, params), request_id), params.embed_dtype)

    async def classify(
        self,
        prompts: str | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[ClassificationRequestOutput]:
        """The classes of every prompt, in their order. A cross-encoder has one, what it would score."""
        self._require_no_failure()
        if self.info.task not in {"classify", "score"}:
            raise InvalidRequest(f"{self.info.model!r} is a model for the task {self.info.task!r}; it has no classes.")
        params = PoolingParams() if params is None else params
        inputs = await self._inputs(prompts, params, add_special_tokens=add_special_tokens)
        if params.dimensions is not None or params.embed_dtype != "float32":
            raise InvalidRequest("dimensions and embed_dtype are for embeddings.", param="dimensions")
        output = await self._pooled(PoolingJob(inputs, params), request_id)
        labels = self.info.pooling.labels if self.info.pooling is not None else ()
        return classes_of(inputs, output, labels)

    async def _inputs(
        self, prompts: str | Sequence[Prompt], params: PoolingParams, *, add_special_tokens: bool
    ) -> tuple[PoolInput, ...]:
        prompt_list: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        maker = PoolInputs(self.tokenizer, self.info, params, add_special_tokens=add_special_tokens)
        return await encoded(prompt_list, lambda: maker.inputs(prompt_list))

    async def score(
        self, queries: Texts, documents: Texts, params: PoolingParams | None = None, *, request_id: str | None = None
    ) -> list[ScoringRequestOutput]:
        """How well each document goes with its query; one query is compared with every document.

        A cross-encoder reads both texts at once; for an embedding model it is the cosine of their embeddings.
        """
        self._require_no_failure()
        maker = PoolInputs(self.tokenizer, self.info, PoolingParams() if params is None else params)
        job = await encoded([*as_list(queries), *as_list(documents)], lambda: score_job(maker, queries, documents))
        return job.scores(await self._pooled(PoolingJob(job.inputs, job.params), request_id))

    def _require_no_failure(self) -> None:
        """An engine that is gone says so, and not what its model could not do."""
        if self.failure is not None:
            raise self.failure

    async def _pooled(self, job: PoolingJob, request_id: str | None) -> PooledOutput:
        async with aclosing(self.stream(job, request_id=request_id)) as outputs:
            return await anext(outputs)  # one, or an error
