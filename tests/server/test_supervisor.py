"""Restarts of an engine that died: how often, how late, and what then."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine

from shuteye.config import EngineConfig
from shuteye.errors import DescriptorsExhausted, ImageFailure
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.control import supervisor as module
from shuteye.server.control.supervisor import Supervisor


class Harness:
    """A supervised engine, and the delays before each restart, which take no time."""

    def __init__(self, monkeypatch, **config):
        self.engine = FakeEngine(EngineConfig(model="tiny"))
        self.context = create_app(self.engine, ServerConfig(**config)).state.contexts.default
        self.context.loading.done = True
        self.delays = []
        self.now = 1000.0
        self.supervisor = Supervisor(self.context)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=self._sleep))

    async def _sleep(self, seconds):
        if seconds != module.LOOK_S:
            self.delays.append(seconds)
        await asyncio.sleep(0)

    async def __aenter__(self):
        await self.engine.start()
        self.task = asyncio.create_task(self.supervisor.watch())
        return self

    async def __aexit__(self, *_error):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def die(self):
        """Die, and wait for what follows."""
        await self.engine.die()
        for _ in range(50):
            await asyncio.sleep(0)


def test_restarts_back_off_and_stop_at_the_limit(monkeypatch, caplog):
    """A dead engine that stays dead; one restarted for ever; a server that stays without an engine."""

    async def scenario():
        async with Harness(monkeypatch, engine_restarts=3, engine_restart_delay_s=2.0) as harness:
            for count in (1, 2, 3):
                await harness.die()
                assert (harness.engine.status, harness.engine.restarts) == ("ready", count)
            assert harness.delays == [2.0, 4.0, 8.0]
            await harness.die()
            assert (harness.engine.status, harness.engine.restarts) == ("dead", 3)
            assert harness.supervisor.gave_up
            assert harness.task.done()

    asyncio.run(scenario())
    assert "--engine-restarts" in caplog.text
    assert "signal 9" in caplog.text


def test_restarts_of_long_ago_are_forgotten(monkeypatch):
    """A server ended by the fourth death within a year; a delay that only ever grows."""

    async def scenario():
        async with Harness(monkeypatch, engine_restarts=1) as harness:
            for count in (1, 2, 3):
                await harness.die()
                assert harness.engine.restarts == count
                harness.now += module.WINDOW_S
            assert harness.delays == [1.0, 1.0, 1.0]
            assert not harness.supervisor.gave_up

    asyncio.run(scenario())


def test_a_limit_of_0_never_restarts(monkeypatch):
    """A setting that means something else than it says."""

    async def scenario():
        async with Harness(monkeypatch, engine_restarts=0) as harness:
            await harness.die()
            assert (harness.engine.restarts, harness.supervisor.gave_up) == (0, True)

    asyncio.run(scenario())


def test_a_restart_that_fails_counts(monkeypatch, caplog):
    """A model that cannot be loaded any more, tried for ever or once."""

    async def scenario():
        async with Harness(monkeypatch, engine_restarts=3) as harness:
            harness.engine.start_error = ImageFailure("the image is damaged")
            await harness.die()
            assert (harness.engine.restarts, harness.supervisor.gave_up) == (3, True)

    asyncio.run(scenario())
    assert caplog.text.count("could not be restarted: the image is damaged") == 3


def test_a_start_without_descriptors_does_not_count(monkeypatch, caplog):
    """A server that ends, and drops everyone, because too many are connected to it."""

    async def scenario():
        async with Harness(monkeypatch, engine_restarts=2) as harness:
            harness.engine.start_error = DescriptorsExhausted("all file descriptors are in use")
            await harness.engine.die()
            while len(harness.delays) < 8:
                await asyncio.sleep(0)
            assert harness.delays[:8] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
            assert not harness.supervisor.gave_up
            harness.engine.start_error = None
            while harness.engine.status != "ready":
                await asyncio.sleep(0)
            harness.delays.clear()
            await harness.die()
            assert harness.delays == [2.0]

    asyncio.run(scenario())
    assert "all file descriptors are in use Restart 1 of 2 follows in 8 s." in caplog.text


@pytest.mark.parametrize("how", ["stopping", "loading", "hung"])
def test_an_engine_that_stops_loads_or_hangs_is_not_restarted(monkeypatch, how):
    """A restart of an engine that is being stopped, that never was there, or that somebody looks at in a debugger."""

    async def scenario():
        async with Harness(monkeypatch) as harness:
            harness.context.stopping.begun = how == "stopping"
            harness.context.loading.done = how != "loading"
            if how == "hung":
                harness.engine.status, harness.engine.hang = "hung", "no sign of life"
                await asyncio.sleep(0.01)
            else:
                await harness.die()
            assert (harness.engine.restarts, harness.supervisor.gave_up) == (0, False)

    asyncio.run(scenario())


def test_an_engine_restarted_by_hand_is_not_restarted_again(monkeypatch):
    """Two engines, or a restart of the engine that somebody has just restarted."""

    async def scenario():
        async with Harness(monkeypatch) as harness:
            by_hand = harness._sleep

            async def meanwhile(seconds):
                if seconds == 1.0:
                    await harness.engine.restart()
                await by_hand(seconds)

            monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=meanwhile))
            await harness.die()
            assert (harness.engine.restarts, harness.engine.status) == (1, "ready")

    asyncio.run(scenario())
