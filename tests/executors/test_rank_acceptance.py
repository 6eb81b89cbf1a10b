"""What users of other engines have met when a model of several ranks slept and woke: ten cases, over HTTP.

Each names the reports that it is taken from. Cycles, the sixth, are in `test_rank_cycles.py`.
"""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from rank_arenas import arena_rss
from rank_table import ROWS
from safetensors.torch import load_file, save

from shuteye.tokenizer import Tokenizer

ALL = "TP 2 x PP 2"
PROMPTS = ("a river", "two rivers that meet", "3", "the sea", "once upon")
LONG = 200
AT_ONCE_S = 1.0

slow = pytest.mark.slow


@pytest.fixture
def served(serve_ranks):
    """Two stages of two ranks each; requests are refused while they sleep."""
    ranks = serve_ranks(ALL)
    yield ranks
    ranks.restore()


class Right:
    """What one rank gives, with the checkpoint's weights or with others."""

    def __init__(self, harness, checkpoint):
        self._harness = harness
        self._tokenizer = Tokenizer.from_directory(checkpoint)

    def __call__(self, prompt, max_tokens=12):
        from shuteye.tasks.generate.requests import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return self._tokenizer.decode(self._harness.generate(self._tokenizer.encode(prompt), params))

    def update(self, tensors):
        from shuteye.calls import UpdateCall

        self._harness.call(UpdateCall(tensors.items()))


@pytest.fixture
def right(harness, tiny_checkpoint):
    return Right(harness, tiny_checkpoint)


def assert_whole(stream, right):
    stream.wait()
    assert (stream.error, stream.finish_reason) == (None, "length")
    assert stream.text == right(stream.prompt, stream.max_tokens)


def says_when_it_died(served, rank, pid, *, cause):
    """GET /health names the rank and the cause within a second of its end."""
    died = served.wait_until_gone(pid)
    while (found := served.health())[0] == 200:
        assert time.monotonic() - died < AT_ONCE_S, "nobody has been told"
        time.sleep(0.005)
    assert time.monotonic() - died < AT_ONCE_S
    assert found[0] == 503
    assert f"rank {rank} was {cause}" in found[1]


# --- 1: vLLM #45520, #45552 -------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_1_a_sleep_under_five_streams_is_reported_when_all_ranks_have_released(served, right, level):
    """Would catch a 200 of the rank that was asked, while another one still computes or holds its memory."""
    streams = served.streams(PROMPTS, LONG)
    report = served.done(f"/sleep?level={level}&mode=keep")
    assert served.resident_bytes() == [0] * served.num_ranks
    assert report["held_requests"] == len(PROMPTS)
    assert [rank["rank"] for rank in report["ranks"]] == list(range(served.num_ranks))
    served.done("/wake_up")
    for stream in streams:
        assert_whole(stream, right)


def test_1_a_sleep_in_which_a_rank_dies_is_no_200(served, right):
    """Would catch an answer that was given before the last rank had said anything."""
    streams = served.streams(PROMPTS, LONG)
    served.plan_fault(1, "release slow")
    served.plan_fault(3, "release kill")
    status, message = served.refused("/sleep?level=1&mode=keep")
    assert status == 503
    assert "rank 3 was ended by SIGKILL" in message
    served.done("/wake_up")
    for stream in streams:
        assert_whole(stream, right)


# --- 2: vLLM #45612 ---------------------------------------------------------------------------------


def test_2_nobody_computes_before_the_slowest_rank_is_mapped(served, right):
    """Would catch a rank that waits in a sum for one that has nothing to add up yet."""
    served.done("/sleep?level=1")
    served.records()
    served.plan_fault(2, "restore slow")
    served.done("/wake_up")
    assert served.complete("a river") == right("a river")
    verbs = served.records()
    mapped = max(end for rank in verbs for verb, _, end, _ in rank if verb == "restore")
    entered = [begin for rank in verbs for verb, begin, _, _ in rank if verb in ("canary_agrees", "execute")]
    assert len(entered) > served.num_ranks
    assert min(entered) > mapped
    assert mapped - min(end for rank in verbs for verb, _, end, _ in rank if verb == "restore") > 1.5, "nobody was slow"


# --- 3: vLLM #44395 ---------------------------------------------------------------------------------


def test_3_a_request_with_the_weights_alone_is_refused(served, right):
    """Would catch a step without a KV cache."""
    served.done("/sleep?level=1")
    served.done("/wake_up?tags=weights")
    status, message = served.refused("/v1/completions", json=served.request("a river", 5))
    assert (status, "sleep" in message) == (503, True)
    served.done("/wake_up?tags=kv_cache")
    assert served.complete("a river") == right("a river")


# --- 4: vLLM #12981 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow), pytest.param(2, marks=slow), 3])
def test_4_a_rank_without_memory_leaves_all_asleep_and_a_retry_works(served, right, rank):
    """Would catch ranks that are awake beside one that is not."""
    served.done("/sleep?level=1")
    served.plan_fault(rank, "restore full")
    status, message = served.refused("/wake_up")
    assert status >= 500
    assert f"rank {rank}: Injected" in message
    assert served.state()["faulted"] is None
    assert served.resident_bytes() == [0] * served.num_ranks
    served.done("/wake_up")
    assert served.complete("a river") == right("a river")


# --- 5: vLLM #11996, #21728 -------------------------------------------------------------------------


def idle_deaths():
    for number, (doing, rank) in enumerate(itertools.product(("idle", "decoding", "asleep"), range(4))):
        yield pytest.param(doing, rank, marks=() if number in (1, 6, 8) else slow)


@pytest.mark.parametrize(("doing", "rank"), [*idle_deaths()])
def test_5_a_rank_that_is_killed_is_named_within_a_second(served, right, doing, rank):
    """Would catch a server that is healthy without one of its ranks, or says nothing of which."""
    streams = served.streams(PROMPTS, LONG) if doing == "decoding" else ()
    if doing == "asleep":
        served.done("/sleep?level=1")
    pid = served.pid(rank)
    served.kill(rank)
    says_when_it_died(served, rank, pid, cause="ended by SIGKILL")
    assert "rank" in served.refused("/v1/completions", json=served.request("a river", 5))[1]
    assert served.state()["ranks"][rank]["failure"] == "was ended by SIGKILL"
    served.done("/wake_up")
    for stream in streams:
        assert_whole(stream, right)
    assert served.complete("a river") == right("a river")


STEPS = {row.verb: row for row in ROWS if row.deed in ("sleep", "wake") and row.begin != "without a rank"}


def deaths_in_steps():
    for number, (verb, rank) in enumerate(itertools.product(STEPS, range(4))):
        yield pytest.param(verb, rank, marks=() if number in (5, 10, 27) else slow)


@pytest.mark.parametrize(("verb", "rank"), [*deaths_in_steps()])
def test_5_a_rank_that_is_killed_in_a_step_is_named_while_others_still_work(served, right, verb, rank):
    """Would catch a server that is healthy for as long as the slowest of the others takes."""
    row, other = STEPS[verb], (rank + 1) % served.num_ranks
    if row.begin == "asleep":
        served.done("/sleep?level=1")
    served.plan_fault(rank, *row.after, f"{verb} kill")
    served.plan_fault(other, *row.others, f"{verb} slow")
    pid, answers = served.pid(rank), []
    path = "/sleep?level=1" if row.deed == "sleep" else "/wake_up"
    call = threading.Thread(target=lambda: answers.append(served.refused(path)))
    call.start()
    says_when_it_died(served, rank, pid, cause="ended by SIGKILL")
    call.join()
    ((status, message),) = answers
    assert (status, f"rank {rank} was ended by SIGKILL" in message) == (503, True)
    served.done("/wake_up")
    assert served.complete("a river") == right("a river")


# --- 7 ----------------------------------------------------------------------------------------------


def test_7_freed_bytes_of_each_rank_are_what_the_kernel_saw_leave(served):
    """Would catch bytes of one rank that are told as those of all, or that never left."""
    served.records()
    served.done("/sleep?level=1")
    served.done("/wake_up")
    arenas = [rank[-1][3] for rank in served.records()]
    for prompt in PROMPTS:
        served.complete(prompt, 60)
    pids = [served.pid(rank) for rank in range(served.num_ranks)]
    before = [arena_rss(pid, of_rank) for pid, of_rank in zip(pids, arenas, strict=True)]
    report = served.done("/sleep?level=1")
    after = [arena_rss(pid, of_rank) for pid, of_rank in zip(pids, arenas, strict=True)]
    freed = [sum(tag["freed_bytes"] for tag in rank["tags"]) for rank in report["ranks"]]
    assert min(before) > 0
    assert after == [0] * served.num_ranks
    assert freed == before
    assert report["freed_bytes"] == sum(before)


# --- 8: verl #4876, SGLang #8203 --------------------------------------------------------------------


@pytest.fixture(scope="module")
def new_weights(tiny_checkpoint):
    (file,) = tiny_checkpoint.glob("*.safetensors")
    generator = torch.Generator().manual_seed(7)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        for name, tensor in load_file(file).items()
    }


def upload(served, tensors):
    return served.post("/update_weights", content=save(tensors), headers={"Content-Type": "application/octet-stream"})


@pytest.mark.parametrize("layout", [pytest.param("TP 2", marks=slow), pytest.param("PP 2", marks=slow), ALL])
def test_8_whole_tensors_fill_every_part_and_wrong_ones_change_nothing(serve_ranks, right, new_weights, layout):
    """Would catch ranks that have written what comes before the tensor that is refused, or another part than theirs."""
    served = serve_ranks(layout)
    served.done("/sleep?level=2")
    missing = served.done("/wake_up?tags=weights")["missing"]
    wrong_shape = new_weights | {"model.norm.weight": torch.ones(3)}
    for wrong in (new_weights | {"nobody.knows": torch.ones(3)}, wrong_shape):
        assert upload(served, wrong).status_code == 400
        assert served.state()["missing"] == missing
        assert "+" not in "".join(served.done("/collective_rpc", json={"method": "weights_source"})["results"])
    assert upload(served, new_weights).json()["missing"] == []
    served.done("/wake_up?tags=kv_cache")
    right.update(new_weights)
    assert served.complete("a river") == right("a river")
    assert upload(served, wrong_shape).status_code == 400
    assert served.complete("a river") == right("a river")
    served.restore()


# --- 9 ----------------------------------------------------------------------------------------------

PAIRS = (
    # where it begins, two calls at once, and for each order the outcomes (status, changed) with the level at the end
    (None, "/sleep?level=1", "/sleep?level=2", {((200, True), (200, True), 2), ((409, None), (200, True), 2)}),
    (None, "/sleep?level=1", "/wake_up", {((200, True), (200, True), None), ((200, True), (200, False), 1)}),
    (1, "/wake_up", "/wake_up", {((200, True), (200, False), None), ((200, False), (200, True), None)}),
    (1, "/sleep?level=2", "/wake_up", {((200, True), (200, True), None), ((200, True), (200, True), 2)}),
    (1, "/sleep?level=1", "/wake_up", {((200, False), (200, True), None), ((200, True), (200, True), 1)}),
)


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=slow)])
@pytest.mark.parametrize(("begin", "first", "second", "serial"), PAIRS)
def test_9_two_clients_at_once_get_what_one_after_the_other_would(served, right, begin, first, second, serial, times):
    """Would catch two transitions that are under way together."""
    for _ in range(times):
        if begin is not None:
            served.done(f"/sleep?level={begin}")
        outcomes = at_once(served, first, second)
        level = served.state()["level"]
        assert (*outcomes, level) in serial
        assert served.resident_bytes() == [0] * served.num_ranks or level is None
        served.done("/wake_up")
    assert served.complete("a river") == right("a river")


def at_once(served, *paths):
    """What two clients get who begin together: status, and whether anything changed."""
    outcomes, together = [None] * len(paths), threading.Barrier(len(paths))

    def ask(number):
        together.wait()
        response = served.post(paths[number])
        outcomes[number] = response.status_code, response.json().get("changed")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# --- 10: rtp-llm #1151 ------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [(0, 1), pytest.param((0, 2), marks=slow), pytest.param((1, 3), marks=slow)])
def test_10_a_fault_with_half_of_the_ranks_asleep_is_recovered(served, right, asleep):
    """Would catch a wake that takes one rank's word for all, or leaves the others as they were."""
    streams = served.streams(PROMPTS, LONG)
    awake = [rank for rank in range(served.num_ranks) if rank not in asleep]
    for rank in awake:
        served.plan_fault(rank, "release error", "finish_release error", "finish_release error")
    status, message = served.refused("/sleep?level=1&mode=keep")
    assert status == 503
    assert f"rank {awake[0]}" in message
    assert f"rank {awake[1]}" in message
    weights = [
        states[0]["residency"] for states in served.done("/collective_rpc", json={"method": "states"})["results"]
    ]
    assert [weights[rank] for rank in asleep] == ["offloaded"] * 2
    assert [weights[rank] for rank in awake] == ["resident"] * 2
    report = served.done("/wake_up")
    assert report["verified"] == "full"
    assert not report["updates_lost"]
    for stream in streams:
        assert_whole(stream, right)


# --- 3 again, with the other policy: the last, as it takes ranks of its own --------------------------


@pytest.mark.parametrize("layout", ["TP 2", pytest.param(ALL, marks=slow)])
def test_3_a_request_with_the_weights_alone_is_held(serve_ranks, right, layout):
    """Would catch a request that runs on weights alone, or is lost."""
    served = serve_ranks(layout, on_sleeping_request="hold")
    served.done("/sleep?level=1")
    served.done("/wake_up?tags=weights")
    answers = []
    asking = threading.Thread(target=lambda: answers.append(served.complete("a river")))
    asking.start()
    asking.join(0.3)
    assert answers == []
    served.done("/wake_up?tags=kv_cache")
    asking.join(10)
    assert answers == [right("a river")]
