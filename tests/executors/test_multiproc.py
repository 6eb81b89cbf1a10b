"""One model over several rank processes: what one rank gives, asleep and awake as one, also after ranks have died.

`test_rank_table.py` has every way to fail in every step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from shuteye.calls import ReloadCall, RpcCall, SleepCall, UpdateCall, UpdateFromFileCall, WakeCall
from shuteye.errors import (
    EngineFaulted,
    InvalidRequest,
    ShuteyeError,
    SleepFailed,
    TransitionConflict,
    VerificationFailed,
)
from shuteye.executors.frames import SIGNATURES
from shuteye.executors.rank_process import RankProcess
from shuteye.models import converter
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.testing import tiny_model
from shuteye.worker import VERBS

PROMPT = (5, 300, 9, 11, 60)
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SOON_S = 10.0
"""Far less than the deadline, by which waiting for it would show."""


@pytest.fixture(scope="module")
def shared(open_ranks):
    """Two ranks of one layer's halves; whoever takes them leaves them awake with the image's weights."""
    return open_ranks("TP 2")


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


def test_every_verb_has_a_type():
    """Would catch a verb that works in this process alone."""
    process = {"execute", "start", "join", "receive", "forget_received"}
    assert set(VERBS) - {"update_weights"} | process == set(SIGNATURES)


@pytest.mark.parametrize("layout", ["PP 2", "TP 2 x PP 2"])
def test_ranks_give_what_one_gives_before_and_after_sleep(layout, open_ranks, expected, tmp_path):
    """Would catch stages in the wrong order, a sampler in the wrong place, and a rank that sleeps alone."""
    ranks = open_ranks(layout)
    assert ranks.generate(PROMPT) == expected
    for level in (1, 2):
        assert ranks.call(SleepCall(level)).freed_bytes > 0
        assert ranks.core.state.level == level
        ranks.call(WakeCall())
        assert ranks.generate(PROMPT) == expected
    updated = changed_tensors(ranks, tmp_path / "new.safetensors")
    ranks.call(UpdateFromFileCall(str(updated)))
    assert ranks.generate(PROMPT) != expected
    ranks.call(ReloadCall())
    assert ranks.generate(PROMPT) == expected
    ranks.kill(ranks.executor.num_ranks - 1)
    ranks.wait_for_fault()
    ranks.wake()
    assert ranks.generate(PROMPT) == expected
    ranks.executor.close()


def test_the_images_of_all_ranks_are_made_once_before_any_is_started(open_ranks, tmp_path, monkeypatch):
    """Would catch a process that converts for each rank."""
    made, found = [], []
    make, spawn = converter.make_apart, RankProcess.spawn
    monkeypatch.setattr(converter, "make_apart", lambda order, told: made.append(order.cache_dir) or make(order, told))
    monkeypatch.setattr(
        RankProcess,
        "spawn",
        staticmethod(lambda command: found.append(len([*tmp_path.glob("images/*")])) or spawn(command)),
    )
    open_ranks("PP 2", cache_dir=tmp_path).executor.close()
    assert made.count(str(tmp_path)) == 1
    assert found == [2, 2]


def test_ten_cycles_change_nothing(ranks, expected):
    """Would catch memory, descriptors or regions that stay with every cycle."""
    assert ranks.generate(PROMPT) == expected
    seen = []
    for _ in range(10):
        slept = ranks.call(SleepCall(1))
        woken = ranks.call(WakeCall())
        assert ranks.generate(PROMPT) == expected
        assert woken.canary
        descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), ranks.pid(0), ranks.pid(1))]
        seen.append((descriptors, slept.residual_bytes))
    assert seen[2][0] == seen[-1][0]
    assert seen[-1][1] < seen[2][1] + (4 << 20)


def test_tags_wake_one_by_one(ranks, expected):
    ranks.call(SleepCall(2))
    report = ranks.call(WakeCall(tags=["weights"]))
    assert report.missing
    with pytest.raises(TransitionConflict, match="must be loaded"):
        ranks.call(WakeCall(tags=["kv_cache"]))
    ranks.call(SleepCall(2))
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == expected
    ranks.call(SleepCall(1, tags=["kv_cache"]))
    assert ranks.core.state.gate == "closed"
    ranks.call(WakeCall(tags=["kv_cache"]))
    assert ranks.generate(PROMPT) == expected


def test_facts_and_reports_are_of_all_ranks(ranks, harness):
    """Would catch bytes of rank 0 that are told as those of the model."""
    one, two = harness.core.info, ranks.core.info
    assert two.kv_bytes_per_token == one.kv_bytes_per_token
    assert two.num_blocks == one.num_blocks
    assert two.kv_cache_bytes == one.kv_cache_bytes
    assert len(ranks.call(RpcCall("facts"))) == 2
    weights, kv_cache = ranks.core.state.tags
    assert kv_cache.nbytes == one.kv_cache_bytes
    assert weights.nbytes == two.weights_bytes
    assert sum(facts.weights_bytes for facts in ranks.call(RpcCall("facts"))) == two.weights_bytes


# --- weights ----------------------------------------------------------------------------------------


def tensors_of(model):
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}


def changed_tensors(ranks, path):
    """A file of the model's tensors, none of which is as it was."""
    save_file({name: tensor.neg() for name, tensor in tensors_of(ranks.core.config.model).items()}, path)
    return path


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("other") / "model", seed=7)


def test_an_update_of_whole_tensors_reaches_every_part(ranks, harness, expected, other_model):
    """Would catch a rank that writes the wrong rows, or keeps the old ones."""
    tensors = tensors_of(other_model)
    harness.call(UpdateCall(tensors.items()))
    updated = harness.generate(PROMPT)
    assert updated != expected
    report = ranks.call(UpdateCall(tensors.items()))
    assert report.updated == len(tensors)
    assert ranks.generate(PROMPT) == updated
    ranks.call(SleepCall(1))
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == updated


def test_blank_weights_are_filled_tensor_by_tensor(ranks, harness, other_model):
    """Would catch a layout in which ranks that have all theirs are taken for a disagreement."""
    tensors = tensors_of(other_model)
    harness.call(UpdateCall(tensors.items()))
    ranks.call(SleepCall(2))
    ranks.call(WakeCall(tags=["weights"]))
    for name, tensor in tensors.items():
        missing = ranks.call(UpdateCall([(name, tensor)])).missing
    assert missing == ()
    ranks.call(WakeCall())
    assert ranks.generate(PROMPT) == harness.generate(PROMPT)


@pytest.mark.parametrize("wrong", ["name", "shape"])
def test_a_wrong_update_changes_nothing_on_any_rank(ranks, expected, wrong, other_model):
    """Would catch ranks that have written what comes before it."""
    tensors = tensors_of(other_model)
    tensors["nobody.knows" if wrong == "name" else "model.norm.weight"] = torch.ones(3)
    with pytest.raises(InvalidRequest):
        ranks.call(UpdateCall(tensors.items()))
    assert ranks.generate(PROMPT) == expected
    assert ranks.core.state.faulted is None


def test_updates_that_die_with_a_rank_are_undone_on_all(ranks, expected, other_model):
    """Would catch a model of one rank's update and the other's image."""
    ranks.call(UpdateCall(tensors_of(other_model).items()))
    ranks.call(SleepCall(1))
    ranks.kill(0)
    ranks.wait_for_fault()
    assert ranks.wake().updates_lost
    assert ranks.generate(PROMPT) == expected
    assert "+" not in ranks.call(RpcCall("weights_source"))[0]
    ranks.call(UpdateCall(tensors_of(other_model).items()))  # counted alike by both
    assert len({*ranks.call(RpcCall("weights_source"))}) == 1


# --- a rank that errs -------------------------------------------------------------------------------


@pytest.fixture
def woken_by_requests(ranks, monkeypatch):
    """Ranks whose canary goes with the first step after a wake."""
    monkeypatch.setattr(ranks.core, "config", replace(ranks.core.config, on_sleeping_request="wake"))
    return ranks


@pytest.mark.parametrize("how", ["error", "late"])
def test_a_first_step_that_failed_is_proven_by_the_next(woken_by_requests, expected, how):
    """Would catch one rank that runs the canary, and another that has done so already."""
    ranks = woken_by_requests
    ranks.call(SleepCall(1))
    ranks.plan_fault(0, f"execute {how}")
    with pytest.raises(ShuteyeError, match="Injected"):
        ranks.generate(PROMPT)
    assert ranks.core.state.gate == "open"
    assert ranks.generate(PROMPT) == expected
    ranks.call(SleepCall(1))
    ranks.plan_fault(0, f"execute {how}", "execute unproven")
    with pytest.raises(ShuteyeError, match="Injected"):
        ranks.generate(PROMPT)
    with pytest.raises(VerificationFailed):
        ranks.generate(PROMPT)


def test_requests_in_flight_are_kept_over_a_sleep(ranks, harness):
    """Would catch a stage that sleeps with a step under way, or a rank that resumes in another order."""
    prompts = {f"stream-{number}": (number, *PROMPT, 40 + number) for number in range(3, 8)}
    expected = {name: harness.generate(prompt, LONG) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        ranks.add(name, prompt, LONG)
    for level in (1, 2):
        for _ in range(9):
            ranks.step()
        report = ranks.call(SleepCall(level, mode="keep"))
        assert report.held_requests == len(prompts)
        ranks.call(WakeCall())
    ranks.run()
    assert {name: ranks.tokens[name] for name in prompts} == expected


@pytest.mark.parametrize(
    ("fault", "ends", "faulted"),
    [
        ("save error", "length", False),
        ("save kill", "length", True),
        ("release late", "abort", False),
        ("release kill", "abort", True),
    ],
)
def test_requests_that_a_sleep_is_to_abort_end_once_it_cannot_fail_any_more(ranks, harness, fault, ends, faulted):
    """Would catch requests that were aborted for a sleep that never came, and those that nobody ends."""
    name = f"to be aborted: {fault}"
    expected = harness.generate(PROMPT, LONG)
    ranks.add(name, PROMPT, LONG)
    for _ in range(9):
        ranks.step()
    ranks.plan_fault(1, fault)
    with contextlib.suppress(SleepFailed, EngineFaulted):
        ranks.call(SleepCall(1, mode="abort"))
    assert bool(ranks.core.state.faulted) == faulted
    assert (name in ranks.ended) == (ends == "abort")
    ranks.wake()
    ranks.run()
    assert ranks.ended[name] == ends
    assert ranks.tokens[name] == expected[: len(ranks.tokens[name])]


# --- a rank that dies -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "number", "says"), [(0, signal.SIGKILL, "SIGKILL"), (1, signal.SIGABRT, "SIGABRT")])
def test_a_rank_that_dies_idle_is_noticed_and_named(ranks, expected, rank, number, says):
    ranks.kill(rank, number)
    assert ranks.wait_for_fault() == f"rank {rank} was ended by {says}"
    with pytest.raises(EngineFaulted):
        ranks.call(SleepCall(1))
    assert ranks.executor.failures()
    ranks.wake()
    assert not ranks.executor.failures()
    assert ranks.generate(PROMPT) == expected


def test_asking_a_rank_that_has_just_died_does_not_wait(ranks):
    """Would catch an engine that hangs between a death and its notice, as ZeroMQ waits for somebody to send to."""
    process = ranks.executor._processes[1]
    ranks.kill(1)
    process.reap()
    time.sleep(0.2)  # ZeroMQ has seen that the other end is gone
    process.post(b"anybody?")
    ranks.wait_for_fault()


def test_all_ranks_that_die_asleep_come_back(ranks, expected):
    """Would catch keys and values of before, found in memory that counts its epochs anew."""
    assert ranks.generate(PROMPT) == expected
    ranks.call(SleepCall(1))
    for rank in (0, 1):
        ranks.kill(rank)
    ranks.wait_for_fault()
    ranks.wake()
    assert ranks.generate(PROMPT) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_requests_survive_a_rank_that_dies_between_steps(ranks, harness, rank):
    """Would catch requests that are lost, or that go on with a sampler that has forgotten what they had."""
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=30, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4
    )
    expected = harness.generate(PROMPT, params)
    name = f"survivor-{rank}"
    ranks.add(name, PROMPT, params)
    for _ in range(9):
        ranks.step()
    ranks.kill(rank)
    ranks.wait_for_fault()
    assert name not in ranks.ended
    ranks.wake()
    ranks.run()
    assert ranks.tokens[name] == expected


def test_requests_are_kept_only_so_long(ranks, monkeypatch):
    monkeypatch.setattr(time, "monotonic", functools.partial(_later, time.monotonic, skip := [0.0]))
    ranks.add("impatient", PROMPT, LONG)
    ranks.step()
    ranks.kill(1)
    ranks.wait_for_fault()
    ranks.step()
    skip[0] = 61.0
    ranks.step()
    assert isinstance(ranks.ended["impatient"], EngineFaulted)


def _later(clock, skip):
    return clock() + skip[0]
