"""Restarts an engine that died, later and later, and gives up after a number of times so that the server ends.

A start that fails for lack of file descriptors says nothing against the engine: it is retried and never counts.
An engine that hangs is left alone: it may go on, and only people know why it was stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time

from shuteye.errors import DescriptorsExhausted, ShuteyeError
from shuteye.server.context import ServerContext

logger = logging.getLogger(__name__)

LOOK_S = 0.1
WINDOW_S = 600.0
"""Restarts longer ago than this are forgotten."""
MAX_DELAY_S = 60.0


class Supervisor:
    """Watches the engine of one server, once it was loaded, until the server stops."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._restarts: list[float] = []  # monotonic seconds
        self._num_without_descriptors = 0  # starts, since the last one that had enough
        self._gave_up = False

    @property
    def gave_up(self) -> bool:
        """True if the engine is dead and has been restarted as often as it may be."""
        return self._gave_up

    async def watch(self) -> None:
        """Restart the engine whenever it is dead; returns when it gives up."""
        while not self._gave_up:
            await asyncio.sleep(LOOK_S)
            if self._is_needed:
                await self._restart_or_give_up()

    @property
    def _is_needed(self) -> bool:
        """True for an engine that was loaded and is no more; a restart that somebody else began is left alone."""
        context = self._context
        return context.loading.done and not context.stopping.begun and context.engine.status in {"dead", "failed"}

    async def _restart_or_give_up(self) -> None:
        config, engine = self._context.config, self._context.engine
        now = time.monotonic()
        self._restarts = [begun for begun in self._restarts if now - begun < WINDOW_S]
        count, most = len(self._restarts), config.engine_restarts
        why = engine.failure.message if engine.failure is not None else engine.status
        if count >= most:
            logger.error(
                "%s It was restarted %d times within %.0f minutes, and may be %d times (--engine-restarts): the server "
                "ends.",
                why,
                count,
                WINDOW_S / 60,
                most,
            )
            self._gave_up = True
            return
        delay_s = min(config.engine_restart_delay_s * 2 ** min(count + self._num_without_descriptors, 16), MAX_DELAY_S)
        logger.warning("%s Restart %d of %d follows in %g s.", why, count + 1, most, delay_s)
        await asyncio.sleep(delay_s)
        if self._is_needed:
            self._restarts.append(time.monotonic())
            await self._restart()

    async def _restart(self) -> None:
        context = self._context
        try:
            await context.metrics.transition("restart", context.engine.restart())
        except DescriptorsExhausted:
            self._num_without_descriptors += 1
            self._restarts.pop()  # the next look says why, and tries again
        except ShuteyeError as error:
            self._num_without_descriptors = 0
            if context.engine.failure is None:
                logger.info("The engine was restarted by somebody else meanwhile.")
            elif not context.stopping.begun:
                logger.error("The engine could not be restarted: %s", error.message)  # noqa: TRY400
        else:
            self._num_without_descriptors = 0
            logger.warning("The engine is loaded again; the model is awake.")
