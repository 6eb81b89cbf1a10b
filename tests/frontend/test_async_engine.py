"""The asyncio engine, in a process of its own and in a thread: life, death, disconnects and races."""

import asyncio
import os
import random
import signal
import time

import pytest

from shuteye import AsyncEngine, EngineConfig, SamplingParams
from shuteye.calls import UpdateFromFileCall
from shuteye.errors import (
    EngineDead,
    EngineNotReady,
    InvalidRequest,
    ModelNotFound,
    ModelSleeping,
    QueueFull,
    TransitionConflict,
)
from shuteye.frontend.engine_client import EngineClient

PROMPT = list(range(3, 40))
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tiny_checkpoint, core_cache):
    return EngineConfig(
        model=str(tiny_checkpoint),
        dtype="float32",
        enable_sleep_mode=True,
        kv_cache_memory=1 << 20,
        max_model_len=256,
        num_threads=1,
        cache_dir=core_cache,
    )


class Shared:
    """One engine in a process of its own for many tests, on a loop that goes on between them."""

    def __init__(self, config):
        self.runner = asyncio.Runner()
        self.engine = AsyncEngine(config)
        self.run(self.engine.start())

    def run(self, scenario, limit_s=60):
        return self.runner.run(asyncio.wait_for(scenario, limit_s))

    def close(self):
        self.run(self.engine.close())
        self.runner.close()


@pytest.fixture(scope="module")
def shared_engine(config):
    shared = Shared(config)
    yield shared
    shared.close()


@pytest.fixture
def shared(shared_engine):
    """The shared engine; it has the image's weights again after each test."""
    yield shared_engine
    shared_engine.run(shared_engine.engine.reload_weights())


def variant(config, **changes):
    from dataclasses import replace

    return replace(config, **changes)


async def complete(engine, params=GREEDY, prompt=PROMPT):
    """The last output of one request."""
    last = None
    async for output in engine.generate(prompt, params):
        last = output
    return last


@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
def test_it_generates_sleeps_and_wakes(config, in_process):
    async def scenario():
        async with AsyncEngine(config, in_process=in_process) as engine:
            assert engine.status == "ready"
            assert engine.info.max_model_len == 256
            before = await complete(engine)
            assert before.finished
            assert len(before.outputs[0].token_ids) == 24
            report = await engine.sleep(1)
            assert report.freed_bytes > 0
            assert engine.is_sleeping, "the state must be there when the answer is"
            with pytest.raises(ModelSleeping):
                await complete(engine)
            wake = await engine.wake_up()
            assert wake.canary
            assert not engine.is_sleeping
            assert (await complete(engine)).outputs == before.outputs
        assert engine.status == "closed"
        with pytest.raises(EngineDead):
            await complete(engine)

    asyncio.run(scenario())


def test_weights_travel_between_processes(shared, tiny_checkpoint):
    async def scenario():
        import torch
        from safetensors import safe_open

        engine = shared.engine
        before = await complete(engine)
        await engine.sleep(2)
        await engine.wake_up(["weights"])
        missing = engine.state.missing
        assert missing
        with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        last = tensors.popitem()
        assert len((await engine.update_weights(tensors.items())).missing) == 1
        assert (await engine.update_weights([last])).missing == ()
        await engine.wake_up(["kv_cache"])
        assert (await complete(engine)).outputs == before.outputs
        with pytest.raises(InvalidRequest, match="shape"):
            await engine.update_weights([(last[0], torch.ones(3))])

    shared.run(scenario())


def test_a_dead_engine_process_is_noticed_at_once_and_can_be_restarted(shared):
    async def scenario():
        engine = shared.engine
        before = await complete(engine)
        stream = engine.generate(PROMPT, ENDLESS)
        await anext(stream)
        sleeping = asyncio.create_task(engine.sleep(1, mode="wait"))
        await asyncio.sleep(0)
        killed = time.monotonic()
        os.kill(engine.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match="SIGKILL"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead):
            await sleeping
        assert time.monotonic() - killed < 2.0
        assert engine.status == "dead"
        with pytest.raises(EngineDead):
            await complete(engine)
        await engine.restart()
        assert (await complete(engine)).outputs == before.outputs

    shared.run(scenario())


def test_a_live_engine_is_not_restarted(config):
    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            with pytest.raises(TransitionConflict):
                await engine.restart()

    asyncio.run(scenario())


@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
def test_a_failure_to_load_is_told(config, in_process, tmp_path):
    async def scenario():
        engine = AsyncEngine(variant(config, model=str(tmp_path / "nothing")), in_process=in_process)
        with pytest.raises(ModelNotFound):
            await engine.start()
        assert engine.status == "failed"
        with pytest.raises(ModelNotFound):
            await complete(engine)
        await engine.close()

    asyncio.run(scenario())


def test_nothing_is_served_before_it_is_loaded(config):
    async def scenario():
        engine = AsyncEngine(config, in_process=True)
        with pytest.raises(EngineNotReady):
            await complete(engine)
        await engine.close()

    asyncio.run(scenario())


def test_leaving_a_stream_frees_what_it_held(config):
    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            stream = engine.generate(PROMPT, ENDLESS)
            await anext(stream)
            await stream.aclose()
            await complete(engine)
            assert engine.stats.num_running == 0
            assert engine.stats.num_free_blocks == engine.stats.num_blocks

    asyncio.run(scenario())


def test_token_ids_outside_of_the_vocabulary_are_refused(config):
    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            for bad in ([10**6], [-1]):
                with pytest.raises(InvalidRequest, match="vocabulary"):
                    await complete(engine, prompt=bad)

    asyncio.run(scenario())


ALLOWED = {
    # policy: what may become of a request besides being served; abort comes only from mode=abort
    "reject": (ModelSleeping,),
    "hold": (QueueFull,),
    "wake": (QueueFull,),
}


@pytest.mark.parametrize("policy", ["reject", "hold", "wake"])
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_requests_racing_sleeps_are_served_refused_aborted_or_held(config, policy, mode):
    """Would catch a request that hangs, crashes, vanishes or gets a wrong token, whenever the sleep falls."""

    async def scenario():
        chooser = random.Random(f"{policy}{mode}")
        async with AsyncEngine(variant(config, on_sleeping_request=policy), in_process=True) as engine:
            expected = (await complete(engine)).outputs[0].token_ids
            done = asyncio.Event()

            async def one_request():
                await asyncio.sleep(chooser.random() * 0.02)
                try:
                    output = (await complete(engine)).outputs[0]
                except ALLOWED[policy]:
                    return
                if output.finish_reason == "abort":
                    assert mode == "abort"
                    assert output.token_ids == expected[: len(output.token_ids)]
                else:
                    assert output.token_ids == expected

            async def user():
                while not done.is_set():
                    await one_request()
                assert (await complete(engine)).outputs[0].token_ids == expected

            async def sleeper():
                for number in range(12):
                    await asyncio.sleep(chooser.random() * 0.05)
                    await engine.sleep(1 + number % 2, mode=mode)
                    await asyncio.sleep(chooser.random() * 0.01)
                    await engine.wake_up()
                done.set()

            users = [user() for _ in range(6)]
            await asyncio.wait_for(asyncio.gather(sleeper(), *users), timeout=100)
            assert engine.stats.num_running == engine.stats.num_waiting == 0

    asyncio.run(scenario())


def test_an_abort_from_elsewhere_ends_the_stream(config):
    """Would catch an iterator that waits for ever because someone else aborted its request."""

    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            stream = engine.generate(PROMPT, ENDLESS, request_id="r")
            await anext(stream)
            await engine.abort("r")
            last = [output async for output in stream][-1]
            assert last.outputs[0].finish_reason == "abort"
            assert engine.stats.num_running == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_values_that_cannot_travel_are_refused_and_the_engine_lives(shared):
    """Would catch one caller's typo that ends the engine process of all."""

    async def scenario():
        engine = shared.engine
        for bad in (SamplingParams(seed=2**70), SamplingParams(stop_token_ids=[2**70])):
            with pytest.raises(InvalidRequest):
                await complete(engine, bad)
        for level in ("1", 2**70):
            with pytest.raises(InvalidRequest):
                await engine.sleep(level)
        with pytest.raises(InvalidRequest, match="timeout"):
            await engine.sleep(1, mode="wait", timeout_s=float("nan"))
        assert (await complete(engine)).finished

    shared.run(scenario(), 20)


def test_tensors_that_share_memory_travel(shared, tiny_checkpoint):
    """Would catch tied weights, or slices of a fused one, that the file format refuses."""

    async def scenario():
        import torch
        from safetensors import safe_open

        engine = shared.engine
        with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as file:
            norm = file.get_tensor("model.norm.weight")
        layer = "model.layers.0.input_layernorm.weight"
        both = torch.cat([norm, norm[1:]])
        report = await engine.update_weights([("model.norm.weight", norm), (layer, norm)])
        assert report.updated == 2
        overlapping = [("model.norm.weight", both[: len(norm)]), (layer, both[len(norm) - 1 :])]
        assert (await engine.update_weights(overlapping)).updated == 2

    shared.run(scenario())


def test_tensors_travel_in_a_file_without_a_name(shared, tiny_checkpoint, monkeypatch):
    """Would catch shared memory that is never given back because the server was killed during an update."""
    links = []
    call = EngineClient.call

    def watched(frontend, message):
        if isinstance(message, UpdateFromFileCall):
            links.append(os.stat(message.path).st_nlink)
        return call(frontend, message)

    monkeypatch.setattr(EngineClient, "call", watched)

    async def scenario():
        from safetensors import safe_open

        engine = shared.engine
        with safe_open(tiny_checkpoint / "model.safetensors", framework="pt") as file:
            norm = file.get_tensor("model.norm.weight")
        open_before = len(os.listdir("/proc/self/fd"))
        assert (await engine.update_weights([("model.norm.weight", norm)])).updated == 1
        update = asyncio.create_task(engine.update_weights([("model.norm.weight", norm)]))
        await asyncio.sleep(0)
        update.cancel()  # the engine opens the file all the same
        assert (await complete(engine)).finished
        assert len(os.listdir("/proc/self/fd")) == open_before

    shared.run(scenario())
    assert links == [0, 0]


def test_an_engine_is_started_once(config):
    """Would catch a second engine that nobody closes."""

    async def scenario():
        engine = AsyncEngine(config, in_process=True)
        async with engine:
            with pytest.raises(InvalidRequest, match="restart"):
                await engine.start()
        with pytest.raises(InvalidRequest, match="restart"):
            await engine.start()

    asyncio.run(scenario())


def test_entering_twice_leaves_the_running_engine_alone(config):
    """Would catch an engine that is closed, with every request in flight, over somebody's second `async with`."""

    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            with pytest.raises(InvalidRequest, match="started before"):
                await engine.__aenter__()
            assert [output async for output in engine.generate([5, 6], SamplingParams(max_tokens=2))][-1].finished

    asyncio.run(scenario())


def test_two_who_restart_at_once_start_one_engine(shared):
    """Would catch an engine that nobody owns, started by the second of them, or a conflict told as a bad value."""

    async def scenario():
        engine = shared.engine
        os.kill(engine.engine_pid, signal.SIGKILL)
        while engine.failure is None:
            await asyncio.sleep(0.01)
        outcomes = await asyncio.gather(engine.restart(), engine.restart(), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), TransitionConflict]
        assert (await complete(engine)).finished

    shared.run(scenario(), 30)


async def first_of(outputs):
    return await anext(outputs)


VERBS = {
    "generate": lambda engine: first_of(engine.generate(PROMPT, GREEDY)),
    "transcribe": lambda engine: first_of(engine.transcribe(b"\0" * 4)),
    "embed": lambda engine: engine.embed(["a"]),
    "classify": lambda engine: engine.classify(["a"]),
    "score": lambda engine: engine.score("a", "b"),
    "sleep": lambda engine: engine.sleep(),
    "wake_up": lambda engine: engine.wake_up(),
    "pause": lambda engine: engine.pause(),
    "update_weights": lambda engine: engine.update_weights([]),
    "collective_rpc": lambda engine: engine.collective_rpc("facts"),
}


def test_every_verb_says_that_the_engine_was_not_started(config):
    """Would catch `still loading; try again soon`, to a caller who then waits for ever, and a hint at a route."""

    async def scenario():
        engine = AsyncEngine(config)
        for verb in VERBS.values():
            with pytest.raises(EngineNotReady, match=r"not started: await start\(\)") as early:
                await verb(engine)
            assert "/ready" not in early.value.message
        await engine.close()
        with pytest.raises(EngineNotReady, match="not started"):
            _ = engine.info

    asyncio.run(scenario())


def test_every_verb_says_that_the_engine_was_closed(config):
    """Would catch an error that does not say what to do, or another one of each verb."""

    async def scenario():
        async with AsyncEngine(config, in_process=True) as engine:
            pass
        for verb in VERBS.values():
            with pytest.raises(EngineDead, match=r"was closed: restart\(\) starts it again"):
                await verb(engine)

    asyncio.run(scenario())
