"""An engine process's start and end, when they do not go as planned."""

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import tempfile
from dataclasses import replace

import pytest
from descriptor_limits import none_left

from shuteye import AsyncEngine, EngineConfig, SamplingParams
from shuteye.engine.messages import AddRequests
from shuteye.engine.start import EngineStart
from shuteye.errors import DescriptorsExhausted, EngineDead, EngineHung, InvalidRequest, TransitionConflict
from shuteye.frontend.process_link import ProcessLink
from shuteye.frontend.zygote import Zygote
from shuteye.logs import LogSettings
from shuteye.tasks.generate.requests import GenerateRequest, StructuredOutputsParams
from shuteye.typed_frames import encode


@pytest.fixture
def config(tiny_checkpoint, core_cache):
    return EngineConfig(model=str(tiny_checkpoint), cache_dir=core_cache, num_threads=1)


def test_a_process_that_cannot_be_started_is_told_and_closed(config, monkeypatch):
    """Would catch a foreign error, or a close() that trips over what was never there."""

    def no_process(*_args, **_options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_process)

    async def scenario():
        engine = AsyncEngine(config)
        with pytest.raises(EngineDead, match="Resource"):
            await engine.start()
        assert engine.engine_pid is None
        await engine.close()
        assert engine.failure is not None

    asyncio.run(scenario())


def test_closing_while_the_engine_loads_leaves_none_behind(config):
    """Would catch a server, stopped at the wrong moment, that orphans an engine or fails to stop."""

    async def scenario():
        engine = AsyncEngine(config)
        await engine.launch()
        await until(lambda: engine.engine_pid is not None, "the engine to announce itself")
        pid = engine.engine_pid
        await engine.close()
        await until(lambda: not is_there(pid), "its end")
        never_there = AsyncEngine(config)
        await never_there.launch()
        await never_there.close()

    asyncio.run(scenario())


def test_a_process_that_runs_already_is_taken_once_and_another_at_a_restart(config):
    """Would catch a second process beside it, a config told twice, and a restart with what has ended."""
    zygote = Zygote()
    process = zygote.fork()

    async def scenario():
        async with AsyncEngine(config, zygote=zygote, process=process) as engine:
            assert engine.engine_pid == process.pid
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: engine.status == "dead", "the death to be noticed")
            await engine.restart()
            assert engine.engine_pid != process.pid

    process.tell(encode(EngineStart(config, LogSettings())))
    asyncio.run(scenario())
    process.close()
    zygote.close()


def is_there(pid):
    """Also if it has ended, and nobody was told yet."""
    return os.path.exists(f"/proc/{pid}")


async def until(condition, what):
    """Return once `condition()` holds; the limit is for a machine far slower than any."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


def test_the_sockets_directory_is_gone_once_both_have_met(config, temporary):
    """Would catch a directory that stays behind when the server is killed."""

    async def scenario():
        engine = AsyncEngine(config)
        starting = asyncio.create_task(engine.start())
        await until(lambda: list(temporary.iterdir()), "a directory")
        await until(lambda: not list(temporary.iterdir()), "its end")
        await starting
        assert [output async for output in engine.generate([5, 6], SamplingParams(max_tokens=2))][-1].finished
        await engine.close()

    asyncio.run(scenario())


def test_nowhere_to_put_the_socket_is_told_and_closed(config, temporary, monkeypatch):
    """Would catch a bare OSError, for a full disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))

    async def scenario():
        engine = AsyncEngine(config)
        with pytest.raises(EngineDead, match="could not be started"):
            await engine.start()
        await engine.close()

    asyncio.run(scenario())


def test_a_directory_whose_name_is_too_long_for_a_socket_is_not_used(config, tmp_path, monkeypatch):
    """Would catch an engine that cannot start because of where temporary files go."""
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def scenario():
        async with AsyncEngine(config) as engine:
            assert engine.status == "ready"

    asyncio.run(scenario())
    assert not list(long.iterdir())


HANGING = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


def test_a_stopped_engine_is_noticed_goes_on_and_can_be_restarted(config):
    """Would catch requests that wait for ever for an engine that is stopped, and one that cannot be ended."""

    async def scenario():
        async with AsyncEngine(replace(config, hang_timeout_s=1.0)) as engine:
            pid = engine.engine_pid
            stream = engine.generate([5, 6], HANGING)
            await anext(stream)
            with pytest.raises(TransitionConflict, match="alive"):
                await engine.restart()
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: engine.status == "hung", "the hang to be noticed")
            assert "no sign of life" in engine.hang
            with pytest.raises(EngineHung, match="no sign of life"):
                await anext(engine.generate([5, 6], HANGING))
            with pytest.raises(EngineHung):
                await engine.resume()
            await engine.abort("unknown")
            os.kill(pid, signal.SIGCONT)
            await until(lambda: engine.status == "ready", "the engine to go on")
            assert len([output async for output in stream][-1].outputs[0].token_ids) == 400

            os.kill(pid, signal.SIGSTOP)
            waiting = asyncio.create_task(anext(engine.generate([5, 6], HANGING)))
            await until(lambda: engine.status == "hung", "the second hang to be noticed")
            assert not waiting.done()
            restarting = asyncio.create_task(engine.restart())
            with pytest.raises(EngineDead, match="hung"):
                await waiting
            await restarting
            assert engine.engine_pid != pid
            await until(lambda: not is_there(pid), "the end of the one that hung")

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


def test_a_start_without_descriptors_says_so_and_can_be_tried_again(config):
    """Would catch `[Errno -1]`, and ZeroMQ's abort of the whole server."""

    async def scenario():
        engine = AsyncEngine(config)
        with none_left():
            for begin in (engine.start, engine.restart):
                with pytest.raises(
                    DescriptorsExhausted, match=r"could not be started: all file descriptors .* LimitNO"
                ):
                    await begin()
        await engine.restart()
        assert engine.status == "ready"
        await engine.close()

    asyncio.run(scenario())


def test_a_start_that_loses_its_descriptors_half_way_says_so(config, monkeypatch):
    """Would catch a foreign library's word for it, where connections came in meanwhile."""

    async def scenario():
        with contextlib.ExitStack() as stack:

            def no_process(*_args, **_options):
                stack.enter_context(none_left())
                raise OSError(-1, "Unknown error -1")

            monkeypatch.setattr(subprocess, "Popen", no_process)
            engine = AsyncEngine(config)
            with pytest.raises(DescriptorsExhausted, match="file descriptors"):
                await engine.start()
        await engine.close()

    asyncio.run(scenario())
