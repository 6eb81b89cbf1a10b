"""Models that embed and score sleep and wake as the others do: the same numbers after every way, and none lost."""

import asyncio
import os
from array import array
from dataclasses import dataclass, field

import pytest
import torch
from core_harness import CoreHarness, fake_backend
from faults import TRANSITIONS, inject

from shuteye import LLM, AsyncEngine
from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.config import EngineConfig, default_cache_dir
from shuteye.engine.core import EngineCore
from shuteye.errors import InvalidRequest, ModelSleeping, PromptTooLong, RequestAborted, ShuteyeError, rebuild
from shuteye.executors.inproc import InprocExecutor
from shuteye.tasks.generate.requests import GenerateRequest
from shuteye.tasks.pool.requests import PooledDelta, PoolingParams, PoolInput, PoolRequest
from shuteye.testing import poison, tiny_encoder

TEXTS = ["a", "the quick brown fox", "jumps", "over the lazy dog"]
INPUTS = tuple(PoolInput(tuple(range(5, 5 + length))) for length in (3, 9, 4, 30))


@pytest.fixture(scope="session")
def encoder_checkpoint(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="session")
def scorer_checkpoint(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("scorer") / "model", task="score")


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("pool-cache")
    return {
        "dtype": "float32",
        "num_threads": 1,
        "verify_wake": "full",
        "cache_dir": cache_dir,
        "enable_sleep_mode": True,
    }


@dataclass
class PoolHarness(CoreHarness):
    """The same for requests that are embedded; a "generation" is the rows of `INPUTS`."""

    rows: dict[str, tuple[bytes, ...]] = field(default_factory=dict)

    def add(self, request_id, _prompt=None, _params=None):
        self.core.add(PoolRequest(request_id, INPUTS))

    def step(self):
        for delta in self.core.step():
            assert delta.request_id not in self.ended, "a request that had ended got more"
            if isinstance(delta, PooledDelta):
                self.rows[delta.request_id] = delta.rows
                self.ended[delta.request_id] = "stop"
            else:
                self.end(delta)

    def end(self, delta):
        self.ended[delta.request_id] = rebuild(delta.error.kind, delta.error.message) if delta.error else "abort"

    def generate(self, _prompt=None, _params=None):
        request_id = f"generate-{len(self.ended)}"
        self.add(request_id)
        self.run()
        ended = self.ended[request_id]
        if isinstance(ended, ShuteyeError):
            raise ended
        return self.rows[request_id]


@pytest.fixture
def make_pool_rig(encoder_checkpoint, options):
    harnesses = []

    def make(**changes):
        backend = fake_backend()
        config = EngineConfig(**{"model": str(encoder_checkpoint)} | options | changes)
        harnesses.append(PoolHarness(EngineCore(config, InprocExecutor(config, backend=backend)), backend))
        return harnesses[-1]

    yield make
    for harness in harnesses:
        harness.backend.clear()
        harness.core._executor.close()


@pytest.fixture
def harness(make_pool_rig):
    return make_pool_rig()


CYCLES = {
    "level 1": [SleepCall(1), WakeCall()],
    "level 2": [SleepCall(2), WakeCall()],
    "deeper": [SleepCall(1), SleepCall(2), WakeCall()],
    "weights first": [SleepCall(1), WakeCall(("weights",)), WakeCall(("kv_cache",))],
    "cache first": [SleepCall(1), WakeCall(("kv_cache",)), WakeCall(("weights",))],
    "only weights": [SleepCall(1, tags=("weights",)), WakeCall()],
    "only the cache that there is not": [SleepCall(1, tags=("kv_cache",)), WakeCall()],
    "blank, reloaded": [SleepCall(2), WakeCall(("weights",)), ReloadCall(), WakeCall()],
}


@pytest.mark.parametrize("name", CYCLES)
def test_the_same_rows_after_every_way_through_sleep(harness, name):
    """Memory is poisoned when it comes fresh: a tensor that was not restored shows."""
    expected = harness.generate()
    for call in CYCLES[name]:
        harness.call(call)
        if harness.core.state.gate == "closed":
            with pytest.raises(ModelSleeping):
                harness.generate()
    assert harness.generate() == expected
    assert [tag.tag for tag in harness.core.state.tags] == ["weights", "kv_cache"]


def test_weights_that_were_written_come_back_as_written(harness):
    original = {name: tensor.clone() for name, tensor in harness.tensors().items()}
    before = harness.generate()
    harness.call(UpdateCall(named_tensors=[(name, tensor * 1.25) for name, tensor in original.items()]))
    changed = harness.generate()
    assert changed != before
    for call in (SleepCall(1), WakeCall()):
        harness.call(call)
    assert harness.generate() == changed
    for call in (SleepCall(2), WakeCall(("weights",))):
        harness.call(call)
    assert set(harness.core.state.missing) == set(original)
    harness.call(UpdateCall(named_tensors=list(original.items())))
    harness.call(WakeCall(("kv_cache",)))
    assert harness.generate() == before


def test_the_canary_sees_what_no_checksum_does(make_pool_rig):
    """Would catch a wake that is called good with memory that is not: here checksums are off."""
    harness = make_pool_rig(verify_wake="off")
    harness.call(SleepCall(1))
    genuine = harness.worker.residency.restore

    def spoiled(plan):
        reports = genuine(plan)
        for tensor in harness.tensors().values():
            poison(tensor)
        return reports

    harness.worker.residency.restore = spoiled
    with pytest.raises(ShuteyeError, match="canary"):
        harness.call(WakeCall())
    harness.worker.residency.restore = genuine
    assert harness.core.state.is_sleeping


@pytest.mark.parametrize(
    "name", ["sleep 1", "sleep 2", "wake from 1", "wake from 2", "wake the rest from 1", "reload awake"]
)
def test_a_fault_at_every_step(harness, name):
    """The enumeration of test_faults.py, for a model without a KV cache."""
    setup, call = TRANSITIONS[name]
    expected = {"image": harness.generate()}
    for step in range(200):
        if sum(inject(harness, setup, call, False, expected, step, when) for when in ("before", "after")) == 0:
            break
    assert step >= 1


def test_a_kept_request_is_computed_after_the_wake(make_pool_rig):
    """A request of several steps, some of them done, over a sleep with mode=keep."""
    harness = make_pool_rig(max_num_batched_tokens=30)
    expected = harness.generate()
    harness.add("kept")
    harness.step()
    assert "kept" not in harness.ended
    report = harness.call(SleepCall(1, mode="keep"))
    assert (report.held_requests, report.aborted_requests) == (1, 0)
    harness.call(WakeCall())
    harness.run()
    assert harness.rows["kept"] == expected


def test_weights_written_between_two_steps_of_a_request_do_not_mix(make_pool_rig):
    harness = make_pool_rig(max_num_batched_tokens=30)
    harness.add("under way")
    harness.step()
    harness.call(UpdateCall(named_tensors=[(name, tensor * 1.25) for name, tensor in harness.tensors().items()]))
    harness.run()
    assert harness.rows["under way"] == harness.generate()


def test_requests_with_different_parameters_share_a_step(harness):
    """Would catch rows given to another input, or finished as another request wanted it."""
    params = {"plain": PoolingParams(), "raw": PoolingParams(use_activation=False)}
    lengths = {"plain": (9, 11), "raw": (10, 12)}  # interleaved when sorted by length
    for name, wishes in params.items():
        inputs = tuple(PoolInput(tuple(range(5, 5 + length))) for length in lengths[name])
        harness.core.add(PoolRequest(name, inputs, wishes))
    harness.step()
    assert harness.rows.keys() == params.keys()
    for name, wishes in params.items():
        for length, row in zip(lengths[name], harness.rows[name], strict=True):
            alone = f"{name} {length}"
            harness.core.add(PoolRequest(alone, (PoolInput(tuple(range(5, 5 + length))),), wishes))
            harness.run()
            assert array("f", row).tolist() == pytest.approx(array("f", harness.rows[alone][0]).tolist(), abs=1e-5)


def test_a_request_of_another_kind_is_refused(harness):
    harness.core.add(GenerateRequest("g", (1, 2)))
    harness.step()
    assert isinstance(harness.ended["g"], InvalidRequest)


def test_a_kv_cache_cannot_be_asked_for(make_pool_rig):
    with pytest.raises(InvalidRequest, match="no KV cache"):
        make_pool_rig(kv_cache_memory=1 << 20)


# --- LLM ------------------------------------------------------------------------------------------


def test_llm_embeds_and_scores_by_cosine(encoder_checkpoint, options):
    with LLM(str(encoder_checkpoint), **options) as llm:
        outputs = llm.embed(TEXTS)
        vectors = torch.tensor([output.outputs.embedding for output in outputs])
        assert vectors.shape == (len(TEXTS), 64)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))
        by_ids = llm.embed([output.prompt_token_ids for output in outputs])
        torch.testing.assert_close(torch.tensor([each.outputs.embedding for each in by_ids]), vectors)
        scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[1:])]
        assert scores == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-6)
        assert len(llm.score(TEXTS, TEXTS)) == len(TEXTS)
        with pytest.raises(InvalidRequest, match="2 queries for 3 documents"):
            llm.score(TEXTS[:2], TEXTS[:3])
        with pytest.raises(PromptTooLong, match="truncate_prompt_tokens"):
            llm.embed("x" * 500)
        (cut,) = llm.embed("x" * 500, PoolingParams(truncate_prompt_tokens=-1))
        assert len(cut.prompt_token_ids) == llm.info.max_model_len
        assert cut.prompt_token_ids[-1] == outputs[0].prompt_token_ids[-1]  # the special token at the end stays
        with pytest.raises(InvalidRequest, match="'generate'"):
            llm.generate("x")
        for params in ({"dimensions": 3}, {}, 5):
            with pytest.raises(InvalidRequest, match="pooling_params must be a PoolingParams"):
                llm.embed("x", params)
            with pytest.raises(InvalidRequest, match="pooling_params must be a PoolingParams"):
                llm.score("x", "y", params)


def test_llm_scores_pairs_with_a_cross_encoder(scorer_checkpoint, options):
    with LLM(str(scorer_checkpoint), **options) as llm:
        found = llm.score("a", TEXTS)
        assert all(0 < output.outputs.score < 1 for output in found)
        assert found[2].outputs.score == pytest.approx(llm.score("a", TEXTS[2])[0].outputs.score, abs=1e-6)
        assert llm.score(TEXTS[2], "a")[0].outputs.score != pytest.approx(found[2].outputs.score, abs=1e-4)
        raw = llm.score("a", TEXTS, PoolingParams(use_activation=False))
        expected = torch.sigmoid(torch.tensor([output.outputs.score for output in raw])).tolist()
        assert [output.outputs.score for output in found] == pytest.approx(expected, abs=1e-6)
        llm.sleep(level=2)
        with pytest.raises(ModelSleeping):
            llm.score("a", TEXTS)
        llm.wake_up()
        assert [each.outputs for each in llm.score("a", TEXTS)] == [each.outputs for each in found]


# --- AsyncEngine ----------------------------------------------------------------------------------


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.mark.parametrize("policy", ["reject", "hold", "wake"])
def test_requests_while_asleep_follow_the_policy(encoder_checkpoint, options, policy):
    async def main():
        config = EngineConfig(str(encoder_checkpoint), on_sleeping_request=policy, **options)
        async with AsyncEngine(config, in_process=True) as engine:
            expected = await engine.embed(TEXTS)
            await engine.sleep()
            asked = asyncio.create_task(engine.embed(TEXTS))
            if policy == "reject":
                with pytest.raises(ModelSleeping):
                    await asked
                return
            if policy == "hold":
                await asyncio.sleep(0.05)
                assert not asked.done()
                await engine.wake_up()
            assert [each.outputs for each in await asked] == [each.outputs for each in expected]
            assert not engine.is_sleeping

    run(main())


@pytest.mark.parametrize(("verb", "error"), [("sleep", ModelSleeping), ("pause", RequestAborted)])
def test_an_aborted_request_is_told_why(encoder_checkpoint, options, verb, error):
    """Would catch a caller that waits for ever, or is given half of its rows."""

    async def main():
        config = EngineConfig(str(encoder_checkpoint), max_num_batched_tokens=16, max_num_seqs=1, **options)
        async with AsyncEngine(config, in_process=True) as engine:
            asked = asyncio.create_task(engine.embed(["some words"] * 300))
            while engine.stats.num_running == 0:
                await asyncio.sleep(0)
            await getattr(engine, verb)(mode="abort")
            with pytest.raises(error):
                await asked

    run(main())


def test_a_request_nobody_waits_for_is_aborted(encoder_checkpoint, options):
    async def main():
        config = EngineConfig(str(encoder_checkpoint), max_num_batched_tokens=16, max_num_seqs=1, **options)
        async with AsyncEngine(config, in_process=True) as engine:
            asked = asyncio.create_task(engine.embed(["some words"] * 300))
            while engine.stats.num_running == 0:
                await asyncio.sleep(0)
            asked.cancel()
            while engine.stats.num_running:
                await asyncio.sleep(0.001)
            assert engine.stats.num_prompt_tokens_total < 300 * 12
            assert len(await engine.embed("still there")) == 1

    run(main())


@pytest.mark.slow
def test_it_works_in_a_process_of_its_own(encoder_checkpoint, options):
    """Would catch a request or a row that does not survive the wire."""

    async def main():
        async with AsyncEngine(EngineConfig(str(encoder_checkpoint), **options)) as engine:
            first = await engine.embed(TEXTS)
            await engine.sleep()
            await engine.wake_up()
            assert [each.outputs for each in await engine.embed(TEXTS)] == [each.outputs for each in first]
            with pytest.raises(InvalidRequest, match="outside"):
                await engine.embed([[1, 999]])

    with LLM(str(encoder_checkpoint), **options) as llm:
        expected = [array("f", each.outputs.data) for each in llm.embed(TEXTS)]
    assert len(expected) == len(TEXTS)
    run(main())


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.model
def test_minilm_gives_its_memory_back(minilm):
    """98% of the weights' memory, by the kernel's account, and the same embeddings afterwards."""
    with LLM(str(minilm.path), enable_sleep_mode=True, num_threads=1, cache_dir=default_cache_dir()) as llm:
        expected = [each.outputs for each in llm.embed(TEXTS)]
        assert resident_file_bytes() > 0.9 * llm.info.weights_bytes
        for level in (1, 2):
            report = llm.sleep(level=level)
            assert report.freed_bytes >= 0.98 * llm.info.weights_bytes > 80 << 20
            assert resident_file_bytes() < 0.02 * llm.info.weights_bytes
            llm.wake_up()
            assert [each.outputs for each in llm.embed(TEXTS)] == expected


def resident_file_bytes():
    """Resident bytes of this process that are mapped from weight images, as /proc says."""
    total, inside = 0, False
    with open(f"/proc/{os.getpid()}/smaps") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
                inside = "/images/minilm" in line or "/images/model-" in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total
