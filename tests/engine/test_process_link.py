"""An engine process's start and end, when they do not go as planned."""

import asyncio

import pytest

from shuteye import AsyncEngine, EngineConfig
from shuteye.errors import EngineDead


@pytest.fixture
def config(tiny_checkpoint, tmp_path):
    return EngineConfig(model=str(tiny_checkpoint), cache_dir=tmp_path, num_threads=1)


def test_a_process_that_cannot_be_started_is_told_and_closed(config, monkeypatch):
    """Would catch a foreign error, or a close() that trips over what was never there."""

    async def no_process(*_args, **_options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)

    async def scenario():
        engine = AsyncEngine(config)
        with pytest.raises(EngineDead, match="Resource"):
            await engine.start()
        assert engine.engine_pid is None
        await engine.close()
        assert engine.failure is not None

    asyncio.run(scenario())


def test_closing_while_the_process_starts_leaves_none_behind(config, monkeypatch):
    """Would catch a server, stopped at the wrong moment, that orphans an engine or fails to stop."""
    started = []
    create = asyncio.create_subprocess_exec

    async def slow(*args, **options):
        started.append(await create(*args, **options))
        await asyncio.sleep(0.1)
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)

    async def scenario():
        engine = AsyncEngine(config)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(EngineDead):
            await starting
        await asyncio.wait_for(started[0].wait(), 5)

    asyncio.run(scenario())
