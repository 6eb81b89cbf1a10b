"""The engine for asyncio: every verb awaitable, `generate` an async iterator.

By default the engine runs in a process of its own; with `in_process` in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from shuteye.calls import Call, RpcCall, UnloadCall, UpdateCall, UpdateFromFileCall
from shuteye.config import EngineConfig
from shuteye.engine.messages import AddRequests, Control, FromEngine, ToEngine
from shuteye.errors import EngineDead, EngineHung, InvalidRequest, ShuteyeError, TransitionConflict
from shuteye.frontend.engine import Engine, EngineView, ServedModel
from shuteye.frontend.engine_client import EngineClient
from shuteye.frontend.mailbox import Backlog, outputs_of
from shuteye.frontend.process_link import ProcessLink
from shuteye.state import UpdateReport, WakeReport
from shuteye.tasks.base import Job

if TYPE_CHECKING:
    from torch import Tensor

    from shuteye.frontend.engine_process import EngineProcess
    from shuteye.frontend.thread_link import ThreadLink
    from shuteye.frontend.zygote import Zygote

R = TypeVar("R")
OutputT = TypeVar("OutputT")


class AsyncEngine(Engine):
    """An engine that serves many callers on one event loop; use as an async context manager.

    Args:
        config: what to serve and how.
        in_process: run the engine in a thread instead of a process; needs torch here.
        zygote: of whom its processes are forked; closed by whoever gives it. By default each has a zygote of its own.
        process: one that was forked before, and that somebody else tells to serve `config`; the first start takes it.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        in_process: bool = False,
        zygote: Zygote | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        self._given_config = config
        self._zygote = zygote
        self._process = process
        self._in_process = in_process
        self._link: ProcessLink | ThreadLink | None = None
        self._launched = False  # and not yet waited for
        self._restarting = asyncio.Lock()
        self._client = self._new_client()

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `Engine.start`."""
        if not self._launched:
            await self.launch()
        self._launched = False
        await asyncio.wrap_future(self._client.ready)

    async def launch(self) -> None:
        """See `Engine.launch`."""
        self._refuse_second_start()
        self._launched = True
        client = self._client
        client.begun = True
        if self._in_process:
            self._start_thread()
        else:
            self._link = link = ProcessLink(
                self._given_config,
                on_message=client.on_message,
                on_death=self._on_death,
                zygote=self._zygote,
                process=self._process,
            )
            self._process = None
            try:
                await link.start()
            except ShuteyeError as error:
                client.fail(error, status="failed")

    def _refuse_second_start(self) -> None:
        if self._link is not None or self._client.failure is not None:
            raise InvalidRequest("The engine was started before; restart() starts one that has ended.")

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
        """See `Engine.close`."""
        link, self._link = self._link, None
        self._launched = False
        if link is None or link.inherited:
            return
        closed = EngineDead("The engine was closed: restart() starts it again, or make another one.")
        self._client.fail(reason or closed, status="closed")
        if isinstance(link, ProcessLink):
            await link.close()
        else:
            await _in_thread(link.close)

    async def restart(self) -> None:
        """See `Engine.restart`."""
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
        client = EngineClient(self._given_config, self._post, on_auto_wake=self._on_auto_wake)
        client.begun = False
        return client

    def _on_auto_wake(self, outcome: WakeReport | ShuteyeError) -> None:
        self.on_auto_wake(outcome)  # whoever listens now

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
    def view(self) -> EngineView:
        """See `Engine.view`."""
        client, hang = self._client, self._link.hang if isinstance(self._link, ProcessLink) else None
        status = "hung" if client.status == "ready" and hang is not None else client.status
        return EngineView(client.config, status, client.failure, hang, client.state, client.stats)

    @property
    def model(self) -> ServedModel:
        """See `Engine.model`."""
        return self._client.model

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None if it shares this process or is not running."""
        return self._link.pid if isinstance(self._link, ProcessLink) else None

    # --- requests and calls ---------------------------------------------------------------------

    def stream(
        self, job: Job[OutputT], *, request_id: str | None = None, backlog: Backlog | None = None
    ) -> AsyncGenerator[OutputT, None]:
        """See `Engine.stream`."""
        return outputs_of(self._client, job, request_id=request_id, backlog=backlog)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """See `Engine.request_ids`."""
        return self._client.request_ids

    async def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        self._client.end(request_id)

    async def control(self, call: Call[R]) -> R:
        """See `Engine.control`."""
        if isinstance(call, UnloadCall):
            raise InvalidRequest("Only a served model can be unloaded and loaded again: close() this engine.")
        report = await asyncio.wrap_future(self._client.call(call))
        if isinstance(call, RpcCall):
            report = msgspec.to_builtins(report)  # as if the engine were in a process of its own
        return report

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> UpdateReport:
        """Write tensors by their checkpoint names; requests in flight are recomputed with the new weights.

        Raises:
            InvalidRequest: an unknown name or a wrong shape; the message says how many were written before it.
            TransitionConflict: the weights are not mapped.
        """
        if self._in_process:
            return await self._update_here(GuardedTensors(named_tensors))
        from shuteye.models.weight_updates import tensor_file  # torch: whoever has tensors has it

        file = tensor_file(named_tensors)
        try:
            answer = self._client.call(UpdateFromFileCall(file.path))
        except BaseException:
            file.close()
            raise
        answer.add_done_callback(lambda _answer: file.close())  # not before: the engine may still open the path
        return await asyncio.wrap_future(answer)

    async def _update_here(self, tensors: GuardedTensors) -> UpdateReport:
        try:
            return await self.control(UpdateCall(tensors))
        except ShuteyeError:
            if tensors.error is not None:  # the caller's own, as where tensors travel to another process
                raise tensors.error from None
            raise
        finally:
            tensors.stop()


async def _in_thread(work: Callable[[], None]) -> None:
    """`asyncio.to_thread`, which the end of the interpreter refuses."""
    done, loop = asyncio.Event(), asyncio.get_running_loop()

    def run() -> None:
        try:
            work()
        finally:
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="shuteye-close", daemon=True).start()
    await done.wait()


class GuardedTensors:
    """Pairs of name and tensor that a caller gives, read in the engine's thread, which nothing of theirs may end.

    Attributes:
        error: what iterating raised, if it is an `Exception`.
    """

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.error: Exception | None = None
        self._given = named_tensors
        self._stopped = False

    def stop(self) -> None:
        """Nobody waits any more: read nothing further."""
        self._stopped = True

    def _require_waited_for(self) -> None:
        if self._stopped:
            raise InvalidRequest("The update was given up by its caller.")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The pairs.

        Raises:
            InvalidRequest: what was given is something else, ended in an error, or is read no further.
        """
        try:
            for pair in self._given:
                self._require_waited_for()
                yield _checked(pair)
        except (ShuteyeError, GeneratorExit):
            raise
        except BaseException as error:
            self.error = error if isinstance(error, Exception) else None
            raise InvalidRequest(f"Reading the tensors ended in {type(error).__name__}: {error}.") from error


def _checked(pair: Any) -> tuple[str, Tensor]:
    match pair:
        case (str(name), tensor) if hasattr(tensor, "shape"):
            return name, tensor
    raise InvalidRequest(f"named_tensors must be pairs of a name and a tensor, got {type(pair).__name__}.")
