"""The engine for asyncio: every verb awaitable, `generate` an async iterator.

Knows nothing of HTTP. By default the engine runs in a process of its own; with `in_process` in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from shuteye.config import EngineConfig
from shuteye.engine.messages import (
    AddRequests,
    Control,
    ControlCall,
    FromEngine,
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    ToEngine,
    UpdateCall,
    WakeCall,
    tag_names,
)
from shuteye.errors import EngineDead, EngineHung, InvalidRequest, ShuteyeError, TransitionConflict
from shuteye.frontend.engine_client import EngineClient, Status
from shuteye.frontend.handover import tensor_file
from shuteye.frontend.mailbox import Backlog, outputs_of
from shuteye.frontend.process_link import ProcessLink
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, WakeReport
from shuteye.tasks.base import OutputKind
from shuteye.tasks.generate import outputs as output_processor
from shuteye.tasks.generate.requests import RequestOutput, SamplingParams
from shuteye.tasks.pool.inputs import PoolInputs, Prompt, Texts, as_list, embeddings_of, encoded, score_job
from shuteye.tasks.pool.requests import (
    EmbeddingRequestOutput,
    PooledOutput,
    PoolingParams,
    PoolInput,
    ScoringRequestOutput,
)
from shuteye.tasks.transcribe import outputs as transcript_outputs
from shuteye.tasks.transcribe.requests import TranscribeParams, Transcription
from shuteye.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from shuteye.frontend.thread_link import ThreadLink


class AsyncEngine:
    """An engine that serves many callers on one event loop; use as an async context manager.

    Args:
        config: what to serve and how.
        in_process: run the engine in a thread instead of a process; needs torch here.
    """

    def __init__(self, config: EngineConfig, *, in_process: bool = False) -> None:
        self._given_config = config
        self._in_process = in_process
        self._link: ProcessLink | ThreadLink | None = None
        self._restarting = asyncio.Lock()
        self._wake_listener: Callable[[WakeReport | ShuteyeError], None] | None = None
        self._client = self._new_client()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model; the first time builds its image, which takes longer.

        Raises:
            InvalidRequest: it was started before.
            ShuteyeError: loading failed, as the message says.
        """
        self._refuse_second_start()
        client = self._client
        client.begun = True
        if self._in_process:
            self._start_thread()
        else:
            self._link = link = ProcessLink(self._given_config, on_message=client.on_message, on_death=self._on_death)
            try:
                await link.start()
            except ShuteyeError as error:
                client.fail(error, status="failed")
        await asyncio.wrap_future(client.ready)

    def _refuse_second_start(self) -> None:
        if self._link is not None or self._client.failure is not None:
            raise InvalidRequest("The engine was started before; restart() starts one that has ended anew.")

    def _start_thread(self) -> None:
        from shuteye.frontend.thread_link import ThreadLink

        loop = asyncio.get_running_loop()

        def on_message(message: FromEngine) -> None:
            loop.call_soon_threadsafe(self._client.on_message, message)

        def on_death(error: ShuteyeError) -> None:
            loop.call_soon_threadsafe(self._on_death, error)

        self._link = ThreadLink(self._given_config, on_message=on_message, on_death=on_death)
        self._link.start()

    async def close(self, reason: ShuteyeError | None = None) -> None:
        """End the engine; requests in flight fail with `reason`, else with EngineDead. Idempotent."""
        link, self._link = self._link, None
        if link is None or link.inherited:
            return
        closed = EngineDead("The engine was closed: restart() starts it anew, or make another one.")
        self._client.fail(reason or closed, status="closed")
        if isinstance(link, ProcessLink):
            await link.close()
        else:
            await asyncio.to_thread(link.close)

    async def restart(self) -> None:
        """Start anew after the engine died, hung or failed to load; nothing of its memory is reused.

        Raises:
            TransitionConflict: the engine is alive, as when somebody else has restarted it just now.
            ShuteyeError: loading failed.
        """
        async with self._restarting:
            if self._client.failure is None:
                hang = self.hang
                if hang is None:
                    raise TransitionConflict("The engine is alive; only one that is dead or hangs can be restarted.")
                lost = EngineDead(f"The engine hung ({hang}) and was ended; its requests are lost. Send them again.")
                self._client.fail(lost, status="dead")
            await self.close()
            self._client = self._new_client()
            await self.start()

    async def __aenter__(self) -> Self:
        self._refuse_second_start()  # without ending the one that runs
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _new_client(self) -> EngineClient:
        client = EngineClient(self._given_config, self._post, on_own_wake=self._on_own_wake)
        client.begun = False
        return client

    def _on_own_wake(self, outcome: WakeReport | ShuteyeError) -> None:
        if self._wake_listener is not None:
            self._wake_listener(outcome)

    def listen_to_own_wakes(self, listener: Callable[[WakeReport | ShuteyeError], None]) -> None:
        """Tell `listener` how each wake ends that policy `wake` begins: nobody else gets its report."""
        self._wake_listener = listener

    def _post(self, message: ToEngine) -> None:
        if self._link is None:
            raise EngineDead("The engine is not running: await start().")
        if isinstance(message, AddRequests | Control) and self.hang is not None:
            raise EngineHung(f"The engine hangs: {self.hang}. It takes nothing new until it goes on or is restarted.")
        self._link.post(message)

    def _on_death(self, error: ShuteyeError) -> None:
        self._client.fail(error, status="dead")

    # --- what is known without asking -----------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The config; complete once started."""
        return self._client.config

    @property
    def info(self) -> ModelInfo:
        """The loaded model's facts; raises EngineNotReady while loading."""
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The loaded model's tokenizer; raises EngineNotReady while loading."""
        return self._client.tokenizer

    @property
    def state(self) -> EngineState:
        """The sleep state that the engine pushed last."""
        return self._client.state

    @property
    def stats(self) -> SchedulerStats:
        """The scheduler's counters as of the last step."""
        return self._client.stats

    @property
    def status(self) -> Status:
        """Whether the engine is starting, ready, hung, failed, dead or closed."""
        status = self._client.status
        return "hung" if status == "ready" and self.hang is not None else status

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung; None while it does not. It may go on by itself; `restart` ends it for sure."""
        return self._link.hang if isinstance(self._link, ProcessLink) else None

    @property
    def failure(self) -> ShuteyeError | None:
        """Why the engine can serve nothing, if so."""
        return self._client.failure

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return self.state.is_sleeping

    @property
    def is_paused(self) -> bool:
        """True while a `pause()` or `sleep(level=0)` is in force."""
        return self.state.paused

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None if it shares this process or is not running."""
        return self._link.pid if isinstance(self._link, ProcessLink) else None

    # --- generation -----------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
        backlog: Backlog | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate; the first output comes once the request was admitted. Closing the iterator aborts it.

        Outputs that come faster than they are taken are joined.

        Args:
            backlog: counts deltas that were not taken, together with those of other requests.

        Raises:
            RequestAborted: more deltas waited to be taken than may.
            ShuteyeError: refused or failed; before the first output if it never ran.
        """
        client = self._client
        submit = partial(client.submit, prompt, params, request_id=request_id, output_kind=output_kind)
        deltas = output_processor.DELTAS if output_kind == "delta" else None
        return outputs_of(client, submit, deltas=deltas, backlog=backlog)

    def transcribe(
        self,
        pcm: bytes,
        params: TranscribeParams | None = None,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[Transcription, None]:
        """Transcribe; the first output comes once the request was admitted. Closing the iterator aborts it.

        Args:
            pcm: samples as `shuteye.audio.decode` gives them.
            prompt: what is to be taken for the text before the recording.

        Raises:
            ModelSleeping: asleep, or put to sleep before it was finished.
            ShuteyeError: refused or failed otherwise.
        """
        client = self._client
        submit = partial(
            client.submit_transcription,
            pcm,
            TranscribeParams() if params is None else params,
            prompt=prompt,
            request_id=request_id,
            output_kind=output_kind,
        )
        deltas = transcript_outputs.DELTAS if output_kind == "delta" else None
        return outputs_of(client, submit, deltas=deltas)

    # --- embeddings and scores ------------------------------------------------------------------

    async def embed(
        self,
        prompts: str | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, in their order, computed in batches. Cancelling it aborts it.

        Raises:
            InvalidRequest: the model is for another task, or a prompt does not fit.
            ModelSleeping: asleep, or put to sleep before all of them were computed.
            ShuteyeError: failed otherwise.
        """
        params = PoolingParams() if params is None else params
        prompt_list: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        maker = PoolInputs(self.tokenizer, self.info, params, add_special_tokens=add_special_tokens)
        inputs = await encoded(prompt_list, lambda: maker.inputs(prompt_list))
        return embeddings_of(inputs, await self._pool(inputs, params, request_id))

    async def score(
        self, queries: Texts, documents: Texts, params: PoolingParams | None = None, *, request_id: str | None = None
    ) -> list[ScoringRequestOutput]:
        """How well each document goes with its query; one query is compared with every document.

        Raises:
            InvalidRequest: the model is for another task, the numbers do not match, or a pair does not fit.
            ModelSleeping: asleep, or put to sleep before all of them were computed.
            ShuteyeError: failed otherwise.
        """
        maker = PoolInputs(self.tokenizer, self.info, PoolingParams() if params is None else params)
        job = await encoded([*as_list(queries), *as_list(documents)], lambda: score_job(maker, queries, documents))
        return job.scores(await self._pool(job.inputs, job.params, request_id))

    async def _pool(self, inputs: Sequence[PoolInput], params: PoolingParams, request_id: str | None) -> PooledOutput:
        client = self._client
        submit = partial(client.submit_pooling, inputs, params, request_id=request_id)
        async with contextlib.aclosing(outputs_of(client, submit)) as outputs:
            output: PooledOutput = await anext(outputs)  # one, or an error
        return output

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator ends with finish reason "abort". Unknown ids are ignored: they have finished."""
        self._client.end(request_id)

    # --- control --------------------------------------------------------------------------------

    async def sleep(
        self,
        level: int = 1,
        *,
        tags: Sequence[str] | None = None,
        mode: str | None = None,
        timeout_s: float | None = None,
    ) -> SleepReport:
        """Give memory back; see `docs/sleep.md` for levels, tags and modes.

        Raises:
            InvalidRequest, TransitionConflict, SleepFailed, DrainTimeout: still awake.
            EngineFaulted: releasing failed half-way; `wake_up` recovers.
        """
        report: SleepReport = await self._call(SleepCall(level, tag_names(tags), mode, timeout_s))
        return report

    async def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport:
        """Map, fill and verify memory again.

        Raises:
            TransitionConflict, WakeFailed, VerificationFailed: still asleep.
            EngineFaulted: rolling back failed too; try again.
        """
        report: WakeReport = await self._call(WakeCall(tag_names(tags)))
        return report

    async def pause(self, mode: str | None = None, *, timeout_s: float | None = None) -> None:
        """Close the gate without giving memory back, until `resume`.

        Requests that arrive meanwhile raise `ModelPaused`; after mode `keep` they wait.

        Raises:
            InvalidRequest, DrainTimeout: nothing was paused.
        """
        await self._call(PauseCall(mode, timeout_s))

    async def resume(self) -> None:
        """Lift a pause.

        Raises:
            TransitionConflict: asleep.
        """
        await self._call(ResumeCall())

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        """Write tensors by their checkpoint names; requests in flight are recomputed with the new weights.

        Raises:
            InvalidRequest: an unknown name or a wrong shape; the message says how many were written before it.
            TransitionConflict: the weights are not mapped.
        """
        if self._in_process:
            report: UpdateReport = await self._call(UpdateCall(named_tensors=list(named_tensors)))
            return report
        file = tensor_file(named_tensors)
        try:
            answer = self._client.call(UpdateCall(path=file.path))
        except BaseException:
            file.close()
            raise
        answer.add_done_callback(lambda _answer: file.close())  # not before: the engine may still open the path
        report = await asyncio.wrap_future(answer)
        return report

    async def update_weights_from_file(self, path: str) -> UpdateReport:
        """`update_weights` with every tensor of a safetensors file, or of all such files in a directory.

        Raises:
            InvalidRequest: it is none that the engine can read, or as `update_weights`.
            TransitionConflict: the weights are not mapped.
        """
        report: UpdateReport = await self._call(UpdateCall(path=path))
        return report

    async def reload_weights(self, path: str | None = None) -> UpdateReport:
        """Load every weight again from the image, or from another checkpoint of the same model."""
        report: UpdateReport = await self._call(ReloadCall(path))
        return report

    async def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        await self._call(ResetPrefixCacheCall())

    async def collective_rpc(self, method: str, args: Sequence[Any] = ()) -> list[Any]:
        """Call a worker verb that changes nothing (see `engine.rpc.RPC_VERBS`) on every rank; plain data, one a rank.

        Raises:
            InvalidRequest: another verb, or other arguments than it takes.
        """
        results: list[Any] = msgspec.to_builtins(await self._call(RpcCall(method, tuple(args))))
        return results

    async def _call(self, call: ControlCall) -> Any:
        return await asyncio.wrap_future(self._client.call(call))
