"""Ranks as actors of a Ray cluster of one machine: one rank's tokens, asleep and awake as one, and every way to die.

Run with `make test-ray`, which has Ray in an environment of its own.
"""

import asyncio
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from ray_harness import is_alive, living_actors, opening, parent_of, ray_driver, until
from ray_nodes import start_head
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shuteye import AsyncEngine
from shuteye.calls import ReloadCall, RpcCall, SleepCall, UpdateCall, UpdateFromFileCall, WakeCall
from shuteye.errors import EngineFaulted, ImageFailure, InvalidRequest, ModelNotFound, ShuteyeError
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.testing import tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = (5, 300, 9, 11, 60)
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PORT = 6394
SOON_S = 2.0
"""Ray and the kernel tell of a death at once; on a busy machine that takes a moment."""
SILENT_S = 8.0
"""Heartbeats that stop are noticed after four seconds, and Ray has one to say why."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster to which this process is connected; its workers find their faults in `faults`."""
    faults = tmp_path_factory.mktemp("faults")
    with ray_driver(f"127.0.0.1:{PORT}") as connect, ExitStack() as stack:
        head = start_head(port=PORT, num_cpus=4, dashboard=True, FAULTS=str(faults))
        stack.callback(head.close)
        head.faults = faults
        head.wait_until_up()
        stack.enter_context(connect())
        yield head


@pytest.fixture(scope="module")
def open_on_ray(cluster, config):
    with opening(config, cluster.faults) as open_them:
        yield open_them


@pytest.fixture(scope="module")
def shared(open_on_ray):
    return open_on_ray("TP 2")


@pytest.fixture
def ranks(shared):
    yield shared
    shared.wake()
    if any("+" in source for source in shared.executor.call("weights_source")):
        shared.call(ReloadCall())


@pytest.fixture
def expected(harness):
    """What one rank gives."""
    return harness.generate(PROMPT)


# --- as one rank ------------------------------------------------------------------------------------


def test_ranks_give_what_one_gives_before_and_after_sleep(ranks, expected):
    """Would catch actors that do not find one another, and one that sleeps alone."""
    assert ranks.generate(PROMPT) == expected
    for level in (1, 2):
        assert ranks.call(SleepCall(level)).freed_bytes > 0
        ranks.call(WakeCall())
        assert ranks.generate(PROMPT) == expected


def test_actors_are_known_by_names_that_say_which_rank(ranks):
    """Would catch names that nobody can tell apart in a dashboard."""
    first, second = living_actors()
    engine, _, place = first.partition("-rank0-")
    assert place == "tp0of2.pp0of1"
    assert second == f"{engine}-rank1-tp1of2.pp0of1"


def test_updates_reach_ranks(ranks, harness, expected, tmp_path):
    state = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model", seed=7)).state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    harness.call(UpdateCall(tensors.items()))
    updated = harness.generate(PROMPT)
    ranks.call(SleepCall(2))
    ranks.call(WakeCall(tags=["weights"]))
    assert ranks.call(UpdateCall(tensors.items())).missing == ()
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == updated != expected
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(InvalidRequest, match="has shape"):
        ranks.call(UpdateFromFileCall(str(tmp_path / "wrong.safetensors")))
    assert ranks.generate(PROMPT) == updated


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_one_rank_cannot_do_fails_its_requests_alone(ranks, expected, rank):
    """Would catch the other one waiting in shared memory that this process does not hold."""
    ranks.plan_fault(rank, "execute error")
    began = time.monotonic()
    with pytest.raises(ShuteyeError, match=f"rank {rank}: .*Injected"):
        ranks.generate(PROMPT)
    assert time.monotonic() - began < 10
    assert ranks.generate(PROMPT) == expected


# --- a rank that dies -------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [False, True])
def test_a_rank_that_is_killed_is_named_with_its_signal(ranks, expected, asleep):
    """Would catch a death that is seen at the next call, and one that is said to be a lost connection."""
    if asleep:
        ranks.call(SleepCall(1))
    ranks.kill(1, signal.SIGABRT if asleep else signal.SIGKILL)
    says = f"rank 1 was ended by {'SIGABRT' if asleep else 'SIGKILL'}, on {ranks.machine(1)}"
    assert ranks.wait_for_fault(SOON_S) == says
    with pytest.raises(EngineFaulted):
        ranks.call(SleepCall(2))
    ranks.wake()
    assert ranks.generate(PROMPT) == expected
    assert [name for name in living_actors() if "rank1" in name and "-epoch" in name]


def test_an_actor_that_is_killed_takes_its_rank_with_it(ranks, expected):
    """Would catch a rank that goes on without anybody who could end it."""
    process, actor = ranks.pid(0), ranks.actor_pid(0)
    os.kill(actor, signal.SIGKILL)
    says = ranks.wait_for_fault(SOON_S)
    assert "rank 0 was ended with its actor, as Ray says: The actor is dead because its worker process has died" in says
    until(lambda: not is_alive(process), within_s=SOON_S)
    ranks.wake()
    assert ranks.generate(PROMPT) == expected


def test_a_rank_that_dies_in_a_step_is_a_fault_and_its_requests_are_kept(ranks, expected):
    """Would catch the other rank waiting for it until a deadline, as nobody here can write into their memory."""
    ranks.plan_fault(1, "execute kill")
    ranks.add("kept", PROMPT)
    ranks.wait_for_fault(SOON_S + 1)
    assert "rank 1 was ended by SIGKILL" in ranks.core.state.faulted
    ranks.wake()
    ranks.run()
    assert ranks.tokens["kept"] == expected


def test_a_rank_that_is_stopped_is_noticed(ranks, expected):
    """Would catch a stopped machine that is waited for."""
    ranks.call(SleepCall(1))
    ranks.kill(0, signal.SIGSTOP)
    assert "rank 0 has lost its connection to the engine" in ranks.wait_for_fault(SILENT_S)
    ranks.wake()
    assert ranks.generate(PROMPT) == expected


def test_a_rank_that_is_late_is_killed(ranks, expected, monkeypatch):
    monkeypatch.setattr(ranks.executor, "_config", replace(ranks.executor._config, rank_timeout_s=1.0))
    ranks.plan_fault(1, "release stop")
    process = ranks.pid(1)
    with pytest.raises(EngineFaulted, match="rank 1 was killed, as it did not answer release within 1 s, on "):
        ranks.call(SleepCall(1))
    until(lambda: not is_alive(process))
    monkeypatch.undo()
    ranks.wake()
    assert ranks.generate(PROMPT) == expected


def test_all_that_dies_comes_back(ranks, expected):
    """Would catch a rank that waits two minutes for another, of whose death it was not there to hear."""
    for rank in (0, 1):
        ranks.kill(rank)
    ranks.wait_for_fault(SOON_S)
    began = time.monotonic()
    ranks.wake()
    assert time.monotonic() - began < 60
    assert ranks.generate(PROMPT) == expected
    assert len({*ranks.call(RpcCall("weights_source"))}) == 1


# --- others ------------------------------------------------------------------------------------------


def test_too_few_cpus_are_counted(open_on_ray, shared):
    """Would catch an engine that waits for room for ever."""
    with pytest.raises(InvalidRequest, match=r"2 ranks .* free in the Ray cluster: \d of 4 on "):
        open_on_ray("TP 2", num_threads=3)
    with pytest.raises(InvalidRequest, match="each rank on a machine of its own"):
        open_on_ray("TP 2", ray_placement="spread")


def test_a_machine_that_cannot_be_used_is_named(cluster, config, open_on_ray, shared, tmp_path):
    """Would catch an engine that says only that an actor has died."""
    (tmp_path / "file").touch()
    with pytest.raises(ImageFailure, match=rf"on {shared.machine(0)}: Writing to .*/file/cache/.* failed"):
        open_on_ray("PP 2", cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(ModelNotFound, match=rf"on {shared.machine(0)}: "):
        open_on_ray("PP 2", model=str(tmp_path / "nowhere"), offline=True)


def test_stages_on_one_machine_then_nobody_when_the_engine_ends(open_on_ray, expected):
    """Would catch a pipeline that needs a network, actors that stay, and CPUs that are not given back."""
    import ray

    stages = open_on_ray("PP 2")
    assert stages.generate(PROMPT) == expected
    processes = [stages.pid(rank) for rank in (0, 1)]
    stages.executor.close()
    until(lambda: not any(map(is_alive, processes)))
    until(lambda: all("pp0of2" not in name and "pp1of2" not in name for name in living_actors()))
    until(lambda: ray.available_resources().get("CPU", 0) >= 2)


def test_an_engine_process_that_is_killed_leaves_nobody(config, cluster, shared):
    """Would catch actors without an engine, and an engine process that learns of deaths with its next message."""

    async def scenario():
        async with AsyncEngine(config("PP 2", distributed_executor_backend="ray")) as engine:
            ranks = [row.pid for row in engine.view.state.ranks]
            actors = list(map(parent_of, ranks))
            os.kill(ranks[0], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: engine.view.state.faulted is not None, SOON_S)
            assert "rank 0 was ended by SIGKILL" in engine.view.state.faulted
            await engine.wake_up()
            assert engine.view.state.gate == "open"
            ranks = [row.pid for row in engine.view.state.ranks]
            actors = list(map(parent_of, ranks))
            os.kill(engine._link.pid, signal.SIGKILL)
            await asyncio.to_thread(until, lambda: not any(map(is_alive, (*ranks, *actors))))

    asyncio.run(scenario())
    until(lambda: len(living_actors()) == 2)  # of the other engine
