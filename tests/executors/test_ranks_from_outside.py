"""Ranks as callers see them: through `LLM`, through an engine process, and when that is killed."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from shuteye_server import Served, is_running, wait_for

from shuteye import LLM, AsyncEngine, EngineConfig, SamplingParams
from shuteye.errors import EngineFaulted, ShuteyeError, UnsupportedModel
from shuteye.executors.local_ranks import LocalLauncher
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import RankPlace
from shuteye.testing import tiny_encoder, tiny_speech_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PATIENCE_S = 30


@pytest.fixture
def options(tiny_checkpoint, core_cache):
    obtain_image(
        Order(str(tiny_checkpoint), str(core_cache), dtype="float32", place=RankPlace(0, 2, 1)), no_progress
    ).close()
    return {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "enable_sleep_mode": True,
        "kv_cache_memory": 1 << 20,
        "max_model_len": 256,
        "num_threads": 1,
        "cache_dir": core_cache,
    }


def ranks_of(engine_pid):
    """Ids of the rank processes that a process has started, by rank: they were started in this order."""
    return children_of(engine_pid, "shuteye.executors.rank")


def children_of(pid, module):
    """Ids of the processes of a module that a process has started, the oldest first."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
        except (OSError, StopIteration):
            continue
        if f"{module}\0".encode() in command and int(parent.split()[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


def wait_until(condition, within_s=PATIENCE_S):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_rank_may_have_a_process_of_its_own(options):
    with LLM(**options) as one:
        expected = one.generate(["hello"], GREEDY)[0].outputs[0].token_ids
    with LLM(**options, distributed_executor_backend="mp") as llm:
        assert llm.generate(["hello"], GREEDY)[0].outputs[0].token_ids == expected
        llm.sleep(level=2)
        llm.wake_up()
        assert llm.generate(["hello"], GREEDY)[0].outputs[0].token_ids == expected


def test_an_image_that_is_being_made_goes_with_its_engine(options, tmp_path):
    """Would catch half an image that stays behind when a server is told to stop while its ranks' are made."""

    async def scenario():
        engine = AsyncEngine(EngineConfig(**options | {"cache_dir": tmp_path}, tensor_parallel_size=2))
        starting = asyncio.create_task(engine.start())

        def converters():
            return children_of(engine._link.pid, "shuteye.models.converter") if engine._link is not None else []

        await asyncio.to_thread(wait_until, converters)
        (converter,) = converters()
        await engine.close()
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{converter}/exe").exists())
        assert [*tmp_path.glob("images/.*")] == []

    asyncio.run(scenario())


def test_an_llm_over_two_ranks(options):
    """Would catch a thread that sleeps in its queue while a rank dies, and processes that outlive their engine."""
    with LLM(**options) as one:
        expected = one.generate(["hello"], GREEDY)[0].outputs[0].token_ids
    with LLM(**options, tensor_parallel_size=2) as llm:
        assert llm.generate(["hello"], GREEDY)[0].outputs[0].token_ids == expected
        llm.sleep(level=1)
        ranks = ranks_of(os.getpid())
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        wait_until(lambda: llm.view.state.faulted, within_s=1.0)
        assert llm.view.state.faulted == "rank 1 was ended by SIGKILL"
        with pytest.raises(EngineFaulted):
            llm.sleep(level=2)
        llm.wake_up()
        assert llm.generate(["hello"], GREEDY)[0].outputs[0].token_ids == expected
    assert ranks_of(os.getpid()) == []


def test_an_engine_process_over_two_ranks(options):
    """Would catch an engine that learns of a dead rank only with its next message, or that leaves ranks behind."""

    async def scenario():
        config = EngineConfig(**options, tensor_parallel_size=2)
        async with AsyncEngine(config) as engine:
            pid = engine._link.pid
            first, second = ranks_of(pid)
            os.kill(first, signal.SIGKILL)
            deadline = time.monotonic() + 1.0
            while engine.view.state.faulted is None:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert engine.view.state.faulted == "rank 0 was ended by SIGKILL"
            await engine.wake_up()
            assert engine.view.state.gate == "open"
            ranks = ranks_of(pid)
            assert second in ranks
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(wait_until, lambda: not any(Path(f"/proc/{rank}/exe").exists() for rank in ranks))
            with pytest.raises(ShuteyeError):
                await engine.wake_up()

    asyncio.run(scenario())


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["TP", "PP"])
@pytest.mark.parametrize("make", [tiny_encoder, tiny_speech_model])
def test_models_that_embed_or_transcribe_are_refused_before_any_rank_starts(
    make, sizes, options, tmp_path, monkeypatch
):
    """Would catch processes that are started to find out, and copies that nobody asked for."""
    monkeypatch.setattr(LocalLauncher, "start", None)
    which = {tiny_encoder: "Models that embed, score or classify are", tiny_speech_model: "Whisper models are"}[make]
    with pytest.raises(UnsupportedModel, match=f"{which} served by one rank only") as refusal:
        LLM(**options | {"model": str(make(tmp_path / "model"))}, **sizes)
    assert refusal.value.param in sizes


@pytest.mark.slow
def test_a_server_over_four_ranks(options):
    """Would catch a server process that learns nothing of its engine's ranks, or leaves them behind."""
    flags = ("--dev-mode", "--enable-sleep-mode", "--num-threads", "1", "--dtype", "float32")
    layout = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
    server = Served(options["model"], *flags, *layout, cache_dir=options["cache_dir"]).wait_until_ready()
    try:
        expected = server.complete("a river")
        for rank in range(4):
            server.done("/sleep" if rank % 2 else "/sleep?level=2")
            pid = server.get("/state").json()["state"]["ranks"][rank]["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: server.get("/health").status_code == 503, "its death", seconds=1.0)
            assert f"rank {rank} was ended by SIGKILL" in server.get("/health").text
            server.done("/wake_up")
            assert server.complete("a river") == expected
        ranks = ranks_of(server.engine_pid)
        assert len(ranks) == 4
    finally:
        server.stop()
    wait_until(lambda: not any(is_running(rank) for rank in ranks))
