"""An engine in a thread of this process.

Knows nothing of requests; messages pass as they are, without copies.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from shuteye.config import EngineConfig
from shuteye.engine.loop import run_engine
from shuteye.engine.messages import FromEngine, Shutdown, ToEngine
from shuteye.errors import EngineDead, ShuteyeError
from shuteye.frontend.forks import tell_forks
from shuteye.frontend.loop_thread import ENGINE_THREAD


class ThreadLink:
    """Runs the engine loop in a thread; `on_message` and `on_death` are called from that thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[ShuteyeError], None],
    ) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._on_message = on_message
        self._on_death = on_death
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)
        self.inherited = False
        tell_forks(self)

    def start(self) -> None:
        """Start loading; Ready or Failed is the first message."""
        self._thread.start()

    def post(self, message: ToEngine) -> None:
        """Deliver a message to the engine."""
        self._inbox.put(message)

    def close(self) -> None:
        """Stop the engine after its current step and give back its memory."""
        if self.inherited:
            return
        self._inbox.put(Shutdown())
        self._thread.join()

    def leave_to_parent(self, reason: EngineDead) -> None:
        """See `forks.Inherited`."""
        self.inherited = True

    def _run(self) -> None:
        try:
            run_engine(self._config, self)
        except BaseException as error:
            self._on_death(EngineDead(f"The engine thread ended: {type(error).__name__}: {error}"))
            raise  # a bug of ours: threading prints it with its traceback

    # The engine's end (see `loop.Channel`).

    def receive(self, timeout_s: float | None) -> Sequence[ToEngine]:
        """Everything that has arrived; waits for the first message."""
        messages: list[ToEngine | None] = []
        try:
            messages.append(self._inbox.get(block=timeout_s != 0.0, timeout=timeout_s or None))
            while True:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            return [message for message in messages if message is not None]

    def send(self, message: FromEngine) -> None:
        """Hand a message to the callers' side."""
        self._on_message(message)

    def wake(self) -> None:
        """Nothing, as a message."""
        self._inbox.put(None)
