"""Several plans in flight: what they look like; that tokens are right, test_scheduler_random.py says."""

import pytest
from test_scheduler import lengths, make_scheduler, request, step

from shuteye.errors import ErrorInfo
from shuteye.tasks.generate import scheduler as scheduler_module
from shuteye.tasks.generate.plans import SampledToken, StepResult


@pytest.fixture(autouse=True)
def shares_of_four(monkeypatch):
    """Small numbers are easier to follow than those that are measured to be worth a step."""
    monkeypatch.setattr(scheduler_module, "MIN_STAGE_SEQUENCES", 4)


def decoding(count, **changes):
    """A scheduler whose requests, by their numbers, have a token each, and nothing in flight."""
    scheduler = make_scheduler(max_in_flight=2, max_num_seqs=32, **changes)
    for number in range(count):
        scheduler.add(request(str(number), [number], ignore_eos=True))
    step(scheduler)
    return scheduler


def land(scheduler, plan):
    tokens = tuple(SampledToken(chunk.request_id, 7) for chunk in plan.chunks if chunk.sample)
    return scheduler.update(plan, StepResult(tokens))


def test_a_batch_divides_itself_evenly_and_stays_so():
    """Would catch stages that wait for each other as one step is longer, and requests that never have a turn."""
    scheduler = decoding(9)
    flying = [scheduler.schedule(), scheduler.schedule()]
    assert [list(lengths(plan)) for plan in flying] == [[*"01234"], [*"5678"]]
    for _ in range(6):
        land(scheduler, flying.pop(0))
        flying.append(scheduler.schedule())
    assert sorted(map(len, map(lengths, flying))) == [4, 5]


def test_shares_become_even_again_when_requests_end():
    scheduler = decoding(16)
    flying = [scheduler.schedule(), scheduler.schedule()]
    scheduler.abort(map(str, range(8, 14)))
    for _ in range(4):
        land(scheduler, flying.pop(0))
        flying.append(scheduler.schedule())
    assert [len(lengths(plan)) for plan in flying] == [5, 5]


def test_a_small_batch_stays_together_and_comes_together_again():
    """Would catch weights that are read once for each of two sequences, step after step."""
    scheduler = decoding(3)
    old = scheduler.schedule()
    assert list(lengths(old)) == [*"012"]
    scheduler.add(request("3", [3], ignore_eos=True))
    new = scheduler.schedule()
    assert list(lengths(new)) == ["3"], "a new request does not wait"
    land(scheduler, old)
    assert scheduler.schedule() is None
    land(scheduler, new)
    assert list(lengths(scheduler.schedule())) == [*"0123"]


def test_chunks_of_a_prompt_follow_each_other_until_its_token_is_sampled():
    scheduler = make_scheduler(max_in_flight=3, max_num_batched_tokens=10)
    scheduler.add(request("a", range(25)))
    flying = [scheduler.schedule() for _ in range(3)]
    assert [(plan.chunks[0].start, plan.chunks[0].sample) for plan in flying] == [
        (0, False),
        (10, False),
        (20, True),
    ]
    land(scheduler, flying.pop(0))
    assert scheduler.schedule() is None


def test_a_prompt_within_the_budget_is_shared_out_to_stages_too():
    scheduler = make_scheduler(max_in_flight=2, max_num_batched_tokens=2048, max_model_len=2048, num_blocks=600)
    scheduler.add(request("a", range(600)))
    assert [lengths(scheduler.schedule()), lengths(scheduler.schedule())] == [{"a": 256}, {"a": 257}]


def test_the_older_one_waits_for_the_younger_ones_blocks_if_they_are_in_flight(monkeypatch):
    """Would catch the oldest request at the back of the queue, or blocks taken from a step that writes them."""
    monkeypatch.setattr(scheduler_module, "MIN_STAGE_SEQUENCES", 1)
    scheduler = make_scheduler(max_in_flight=2, num_blocks=5, enable_prefix_caching=False)  # of 4 tokens each
    for name in ("old", "young"):
        scheduler.add(request(name, range(3), ignore_eos=True))
    step(scheduler)
    old, young = scheduler.schedule(), scheduler.schedule()
    assert [lengths(old), lengths(young)] == [{"old": 1}, {"young": 1}]
    while scheduler._pool.num_free:
        scheduler._pool.allocate()
    land(scheduler, old)
    assert scheduler.schedule() is None, "its next token needs a block"
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)
    land(scheduler, young)
    assert lengths(scheduler.schedule()) == {"old": 1}
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_what_is_behind_a_step_that_failed_is_computed_and_admitted_again():
    scheduler = make_scheduler(max_in_flight=2, max_num_batched_tokens=8)
    scheduler.add(request("a", range(8)))
    first = scheduler.schedule()
    scheduler.add(request("b", range(6)))
    second = scheduler.schedule()
    assert [admission.request_id for admission in second.admissions] == ["b"]
    deltas = scheduler.fail_step(first, ErrorInfo("InternalError", "boom"))
    scheduler.drop_step(second)
    scheduler.readmit_all()
    assert [delta.request_id for delta in deltas] == ["a"]
    again = scheduler.schedule()
    assert again.chunks[0].token_ids == tuple(range(6)), "shared what was not computed"
    assert set(again.forget) == {"a", "b"}
    assert [admission.request_id for admission in again.admissions] == ["b"]


def test_an_id_used_again_is_another_request():
    """Would catch the token, or the failure, of a request that is gone."""
    scheduler = make_scheduler(max_in_flight=2)
    scheduler.add(request("a", [1, 2]))
    old = scheduler.schedule()
    scheduler.abort(["a"])
    scheduler.add(request("a", [3]))
    new = scheduler.schedule()
    assert land(scheduler, old) == []
    assert [delta.token_ids for delta in land(scheduler, new)] == [(7,)]
    scheduler.abort(["a"])
    scheduler.add(request("a", [1, 2]))
    old = scheduler.schedule()
    scheduler.abort(["a"])
    scheduler.add(request("a", [3]))
    assert scheduler.fail_step(old, ErrorInfo("InternalError", "boom")) == []
