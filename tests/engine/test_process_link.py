"""An engine process's start and end, when they do not go as planned."""

import asyncio
import functools

import pytest

from shuteye import AsyncEngine, EngineConfig
from shuteye.engine.messages import AddRequests
from shuteye.engine.process_link import ProcessLink
from shuteye.errors import EngineDead, InvalidRequest
from shuteye.request import GenerateRequest, SamplingParams, StructuredOutputsParams


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


@pytest.mark.parametrize(
    "params",
    [
        {"stop": ["\ud800"]},
        {"top_k": 2**64},
        {"structured_outputs": StructuredOutputsParams(regex="\ud800")},
        {"structured_outputs": StructuredOutputsParams(json=functools.reduce(lambda a, _: {"a": a}, range(5000), {}))},
    ],
)
def test_what_cannot_be_sent_refuses_its_request(config, params):
    """A value that no frame can carry: an error that is not ours, or that ends the engine on the other side."""
    link = ProcessLink(config, on_message=lambda _message: None, on_death=lambda _error: None)
    with pytest.raises(InvalidRequest):
        link.post(AddRequests((GenerateRequest("r", (1,), SamplingParams(**params)),)))
