"""What carries out the decisions of the fleet's scheduler, with models that only count."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from counted_model import CountedModel

from shuteye.errors import ModelSleeping, QueueFull, ShuteyeError, SleepFailed, WakeFailed
from shuteye.fleet import events
from shuteye.fleet.model_spec import Depth, ModelSpec
from shuteye.fleet.phases import Phase
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings
from shuteye.frontend.fleet_driver import FleetDriver

MIB = 1 << 20


@asynccontextmanager
async def driving(sizes, budget, **settings):
    driver = FleetDriver(Scheduler(budget, FleetSettings(min_awake_s=0.0, batch_factor=0.0, **settings)))
    models = {name: CountedModel(nbytes) for name, nbytes in sizes.items()}
    for name, model in models.items():
        driver.add(ModelSpec(name=name, awake_bytes=model.nbytes, level_1_bytes=0, level_2_bytes=0), model)
    try:
        yield driver, models
    finally:
        driver.close()


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def take(driver, name, within_s=5.0):
    async with driver.place(name, within_s=within_s):
        return driver.status(name).phase


def test_a_request_wakes_its_model_and_makes_room_for_it():
    """Would catch a request that runs on a sleeping model, and two models awake where there is room for one."""

    async def scenario():
        async with driving({"a": 10 * MIB, "b": 10 * MIB}, 15 * MIB) as (driver, models):
            assert await take(driver, "a") is Phase.AWAKE
            assert await take(driver, "b") is Phase.AWAKE
            assert (models["a"].depth, models["b"].depth) == (Depth.LEVEL_1, Depth.AWAKE)
            assert driver.room().charged_bytes <= 15 * MIB

    asyncio.run(scenario())


def test_a_model_in_use_is_not_taken_away_and_who_waits_is_refused_in_time():
    """Would catch an eviction under a running request, and a request that waits for ever."""

    async def scenario():
        async with driving({"a": 10 * MIB, "b": 10 * MIB}, 15 * MIB) as (driver, models):
            async with driver.place("a", within_s=1.0):
                with pytest.raises((ModelSleeping, QueueFull)):
                    await take(driver, "b", within_s=0.02)
                waiting = asyncio.create_task(take(driver, "b"))
                await asyncio.sleep(0.01)
                assert models["a"].moves == [Depth.AWAKE]
            assert await waiting is Phase.AWAKE

    asyncio.run(scenario())


def test_a_client_that_goes_while_it_waits_or_runs_leaves_no_trace():
    """Would catch a model that is never idle again, because somebody who has gone is thought to use it."""

    async def scenario():
        async with driving({"a": 10 * MIB}, 15 * MIB) as (driver, models):
            models["a"].may_move.clear()
            held = asyncio.create_task(take(driver, "a"))
            await until(lambda: models["a"].moves)
            held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            models["a"].may_move.set()
            await until(lambda: driver.status("a").phase is Phase.AWAKE)
            assert (driver.status("a").running, driver.status("a").held) == (0, 0)

            async def run():
                async with driver.place("a", within_s=1.0):
                    await asyncio.sleep(60)

            running = asyncio.create_task(run())
            await until(lambda: driver.status("a").running == 1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert driver.status("a").running == 0

    asyncio.run(scenario())


def test_a_wake_that_fails_is_told_to_those_who_wait_and_can_be_tried_again():
    """Would catch a model that is thought to be on its way for ever, after an error, or after a bug of ours."""

    async def scenario():
        async with driving({"a": 10 * MIB}, 15 * MIB) as (driver, models):
            models["a"].errors = [ZeroDivisionError("a bug"), WakeFailed("no room")]
            with pytest.raises(WakeFailed, match="no room"):
                await take(driver, "a")
            with pytest.raises(ShuteyeError, match="bug of ours"):
                await take(driver, "a")
            assert await take(driver, "a") is Phase.AWAKE

    asyncio.run(scenario())


def test_idle_models_sleep_deeper_and_deeper_by_themselves():
    """Would catch a driver that forgets the time at which the scheduler wanted to be asked."""

    async def scenario():
        idle = {"sleep_idle_s": 0.02, "sleep_escalate_s": 0.02}
        async with driving({"a": 10 * MIB}, 15 * MIB, **idle) as (driver, models):
            await take(driver, "a")
            await until(lambda: driver.status("a").depth is Depth.UNLOADED)
            assert models["a"].moves == [Depth.AWAKE, Depth.LEVEL_1, Depth.LEVEL_2, Depth.UNLOADED]
            assert await take(driver, "a") is Phase.AWAKE

    asyncio.run(scenario())


def test_a_sleep_that_fails_leaves_a_model_that_serves():
    """Would catch a model that nobody can use, because it could not be put to sleep."""

    async def scenario():
        async with driving({"a": 10 * MIB}, 15 * MIB) as (driver, models):
            await take(driver, "a")
            models["a"].errors = [SleepFailed("no space")]
            driver.tell(events.SleepAsked("a"))
            await until(lambda: not driver.status("a").phase.in_transition)
            assert await take(driver, "a") is Phase.AWAKE

    asyncio.run(scenario())


def test_who_waits_at_the_end_is_refused():
    """Would catch a server that cannot stop while somebody waits for a model."""

    async def scenario():
        async with driving({"a": 10 * MIB}, 15 * MIB) as (driver, models):
            models["a"].may_move.clear()
            waiting = asyncio.create_task(take(driver, "a"))
            await until(lambda: models["a"].moves)
            driver.close()
            with pytest.raises(ModelSleeping):
                await waiting

    asyncio.run(scenario())
