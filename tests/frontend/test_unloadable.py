"""An engine without a process: unloaded, asked, loaded again."""

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from shuteye import AsyncEngine, EngineConfig, SamplingParams
from shuteye.calls import UnloadCall
from shuteye.errors import ModelSleeping, QueueFull, RequestAborted, SleepModeDisabled, TransitionConflict, WakeFailed
from shuteye.frontend.unloadable import UnloadableEngine
from shuteye.frontend.zygote import Zygote

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=300)


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def config(tiny_checkpoint, core_cache):
    return EngineConfig(
        model=str(tiny_checkpoint), cache_dir=core_cache, num_threads=1, enable_sleep_mode=True, kv_cache_memory=1 << 20
    )


@asynccontextmanager
async def serving(config, zygote):
    engine = UnloadableEngine(config, lambda config: AsyncEngine(config, zygote=zygote))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def tokens(engine, prompt=(5, 6, 7), params=GREEDY, request_id=None):
    async for output in engine.generate(list(prompt), params, request_id=request_id):
        last = output
    return last.outputs[0].token_ids


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def test_it_ends_its_process_and_serves_the_same_from_another_one(config, zygote):
    """Would catch a process that stays, an account of it that lies, and a model that is another one afterwards."""

    async def scenario():
        async with serving(config, zygote) as engine:
            before, info, limits = await tokens(engine), engine.info, engine.config
            pid = engine.engine_pid
            report = await engine.unload()
            assert (report.changed, report.level, report.residual_bytes) == (True, 2, 0)
            assert report.freed_bytes > info.weights_bytes
            await until(lambda: not os.path.exists(f"/proc/{pid}"))
            assert (engine.status, engine.is_sleeping, engine.engine_pid) == ("unloaded", True, None)
            assert engine.tokenizer.decode([5])
            assert (await engine.unload()).changed is False
            woken = await engine.wake_up()
            assert (woken.changed, engine.status, engine.is_sleeping) == (True, "ready", False)
            assert (engine.info, engine.config) == (info, limits)
            assert engine.engine_pid not in (None, pid)
            assert await tokens(engine) == before
            assert (await engine.wake_up()).changed is False

    asyncio.run(scenario())


def test_what_an_unloaded_model_cannot_do_is_refused(config, zygote):
    """Would catch a call that waits for ever for a process that is not there, or that wakes half a model."""

    async def scenario():
        async with serving(config, zygote) as engine:
            await engine.unload()
            for call in (engine.pause(), engine.sleep(level=1), engine.wake_up(tags=["weights"]), engine.restart()):
                with pytest.raises(TransitionConflict, match="unloaded"):
                    await call
            assert (await engine.sleep(level=2)).changed is False
            with pytest.raises(ModelSleeping):
                await tokens(engine)

    asyncio.run(scenario())


def test_a_request_loads_the_model_if_the_policy_says_so(config, zygote):
    """Would catch a request that is lost, and one process for each of those that come together."""

    async def scenario():
        async with serving(replace(config, on_sleeping_request="wake"), zygote) as engine:
            woken = []
            engine.on_auto_wake = woken.append
            before = await tokens(engine)
            await engine.unload()
            assert await asyncio.gather(*[tokens(engine) for _ in range(4)]) == [before] * 4
            assert [report.changed for report in woken] == [True]
            await engine.sleep()
            assert await tokens(engine) == before
            assert [report.changed for report in woken] == [True, True]

    asyncio.run(scenario())


def test_held_requests_wait_for_somebody_to_load_the_model(config, zygote):
    """Would catch held requests that nobody bounds, that outlive their deadline, or that cannot be ended."""

    async def scenario():
        held = replace(config, on_sleeping_request="hold", hold_queue_size=2, hold_timeout_s=30.0)
        async with serving(held, zygote) as engine:
            before = await tokens(engine)
            await engine.unload()
            waiting = [asyncio.create_task(tokens(engine, request_id=name)) for name in ("a", "b")]
            await until(lambda: set(engine.request_ids) == {"a", "b"})
            with pytest.raises(QueueFull, match="2 requests"):
                await tokens(engine)
            await engine.abort("a")
            with pytest.raises(RequestAborted):
                await waiting[0]
            await engine.wake_up()
            assert await waiting[1] == before

        async with serving(replace(held, hold_timeout_s=0.05), zygote) as engine:
            await engine.unload()
            with pytest.raises(ModelSleeping):
                await tokens(engine)

    asyncio.run(scenario())


def test_requests_in_flight_end_as_asked_and_later_ones_wait_for_the_end_of_it(config, zygote):
    """Would catch a request that reaches a process about to end, and is lost with it."""

    async def scenario():
        async with serving(replace(config, on_sleeping_request="wake"), zygote) as engine:
            running = asyncio.create_task(tokens(engine, params=LONG))
            await until(lambda: engine.request_ids)
            unloading = asyncio.create_task(engine.unload(mode="wait"))
            await asyncio.sleep(0)
            late = asyncio.create_task(tokens(engine))
            assert (await unloading).changed
            assert len(await running) == LONG.max_tokens
            assert len(await late) == GREEDY.max_tokens

    asyncio.run(scenario())


def test_a_load_that_fails_leaves_it_unloaded_and_can_be_tried_again(config, zygote):
    """Would catch a model that is lost for good because its first load went wrong."""

    async def scenario():
        failing = []

        def open_engine(config):
            return AsyncEngine(replace(config, model="/nowhere") if failing else config, zygote=zygote)

        engine = UnloadableEngine(config, open_engine)
        await engine.start()
        before = await tokens(engine)
        await engine.unload()
        failing.append(True)
        with pytest.raises(WakeFailed, match="/nowhere"):
            await engine.wake_up()
        assert engine.status == "unloaded"
        failing.clear()
        await engine.wake_up()
        assert await tokens(engine) == before
        await engine.close()

    asyncio.run(scenario())


def test_closing_while_it_loads_ends_both(config, zygote):
    """Would catch a server that cannot stop, or leaves a process, while a model is on its way."""

    async def scenario():
        async with serving(config, zygote) as engine:
            await engine.unload()
            loading = asyncio.create_task(engine.wake_up())
            await asyncio.sleep(0.01)
        with pytest.raises((asyncio.CancelledError, Exception)):
            await loading

    asyncio.run(scenario())


def test_it_is_refused_where_sleep_mode_is_off(config, zygote):
    """Would catch a model that anyone can take away, though nobody asked for that to be possible."""

    async def scenario():
        async with serving(replace(config, enable_sleep_mode=False), zygote) as engine:
            with pytest.raises(SleepModeDisabled):
                await engine.control(UnloadCall())
            assert await tokens(engine)

    asyncio.run(scenario())
