"""Inputs to embed are batched by similar length, and no request waits for ever, mixes weights or loses its order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.errors import ErrorInfo, InvalidRequest, PromptTooLong
from shuteye.model_info import PoolingInfo
from shuteye.tasks.pool.plans import PoolResult
from shuteye.tasks.pool.requests import PoolingParams, PoolInput, PoolRequest
from shuteye.tasks.pool.scheduler import MAX_PADDING, PoolScheduler

BUDGET, MOST, CONTEXT = 64, 8, 100


def new_scheduler(**pooling):
    return PoolScheduler(
        max_num_seqs=MOST,
        max_num_batched_tokens=BUDGET,
        max_model_len=CONTEXT,
        pooling=PoolingInfo(**{"size": 4} | pooling),
    )


def request(name, lengths, **params):
    inputs = tuple(PoolInput((index + 1,) * length) for index, length in enumerate(lengths))
    return PoolRequest(name, inputs, PoolingParams(**params))


def row(item):
    return f"{item.input.token_ids}".encode()


def run(scheduler, plan):
    return scheduler.update(plan, PoolResult(tuple(row(item) for item in plan.items)))


def finish(scheduler):
    """All deltas until nothing is left, and the plans that it took."""
    deltas, plans = [], []
    while (plan := scheduler.schedule()) is not None:
        plans.append(plan)
        deltas += run(scheduler, plan)
    return deltas, plans


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12), min_size=1, max_size=6))
def test_every_row_arrives_once_in_order_within_the_budget(batches):
    scheduler = new_scheduler()
    requests = {f"r{index}": request(f"r{index}", lengths) for index, lengths in enumerate(batches)}
    for each in requests.values():
        scheduler.add(each)
    deltas, plans = finish(scheduler)
    assert sorted(delta.request_id for delta in deltas) == sorted(requests)
    for delta in deltas:
        assert delta.rows == tuple(f"{each.token_ids}".encode() for each in requests[delta.request_id].inputs)
    for plan in plans:
        lengths = [len(item.input.token_ids) for item in plan.items]
        positions = max(lengths) * len(lengths)
        assert len(lengths) == 1 or (positions <= BUDGET and len(lengths) <= MOST)
        assert positions - sum(lengths) <= MAX_PADDING * positions
    assert not scheduler.has_unfinished
    assert scheduler.stats().num_prompt_tokens_total == sum(map(sum, batches))


def test_requests_share_steps():
    """Would catch inputs computed one by one."""
    scheduler = new_scheduler()
    for name in "abcd":
        scheduler.add(request(name, [5, 5]))
    deltas, plans = finish(scheduler)
    assert [len(plan.items) for plan in plans] == [MOST]
    assert [delta.request_id for delta in deltas] == list("abcd")


def test_the_oldest_request_goes_first_however_different_its_length():
    scheduler = new_scheduler()
    scheduler.add(request("long", [CONTEXT]))
    scheduler.add(request("short", [2] * 20))
    assert [len(item.input.token_ids) for item in scheduler.schedule().items] == [CONTEXT]


def test_aborted_requests_get_nothing_of_a_step_under_way():
    scheduler = new_scheduler()
    scheduler.add(request("a", [5]))
    scheduler.add(request("b", [5]))
    plan = scheduler.schedule()
    ended = scheduler.abort(["a", "unknown"])
    assert [(delta.request_id, delta.finish_reason) for delta in ended] == [("a", "abort")]
    assert [delta.request_id for delta in run(scheduler, plan)] == ["b"]
    scheduler.add(request("c", [5]))
    assert [delta.request_id for delta in scheduler.abort_all()] == ["c"]
    assert scheduler.schedule() is None


def test_preempted_requests_are_recomputed_from_their_first_input():
    """Would catch a request answered with rows of two versions of the weights."""
    scheduler = new_scheduler()
    scheduler.add(request("a", [40, 40]))
    assert run(scheduler, scheduler.schedule()) == []
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)
    assert scheduler.preempt_all() == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    deltas, plans = finish(scheduler)
    assert (len(deltas), len(plans)) == (1, 2)


def test_what_a_step_yields_for_preempted_requests_is_ignored():
    scheduler = new_scheduler()
    scheduler.add(request("a", [40]))
    plan = scheduler.schedule()
    assert scheduler.preempt_all() == 1
    assert run(scheduler, plan) == []
    assert [delta.request_id for delta in finish(scheduler)[0]] == ["a"]


def test_a_failed_step_ends_the_requests_it_was_for():
    scheduler = new_scheduler()
    scheduler.add(request("a", [40, 40]))
    scheduler.add(request("b", [3]))
    error = ErrorInfo("InternalError", "no")
    deltas = scheduler.fail_step(scheduler.schedule(), error)
    assert [(delta.request_id, delta.error) for delta in deltas] == [("a", error)]
    assert [delta.request_id for delta in finish(scheduler)[0]] == ["b"]


@pytest.mark.parametrize(
    ("refused", "error", "says"),
    [
        (request("r", []), InvalidRequest, "input must not be empty"),
        (request("r", [3, 0]), InvalidRequest, "Input 1 must not be empty"),
        (request("r", [3, CONTEXT + 1]), PromptTooLong, "input 1 has 101 tokens"),
        (request("r", [3], dimensions=3), InvalidRequest, "dimensions must be 2, 4, got 3"),
        (request("used", [3]), InvalidRequest, "in use"),
    ],
)
def test_what_can_never_be_computed_is_refused(refused, error, says):
    scheduler = new_scheduler(dimensions=(2,))
    scheduler.add(request("used", [3], dimensions=2))
    with pytest.raises(error, match=says):
        scheduler.add(refused)


def test_any_dimension_may_be_allowed():
    scheduler = new_scheduler(dimensions=None)
    scheduler.check(request("r", [3], dimensions=1))
    with pytest.raises(InvalidRequest, match="1 to 4"):
        scheduler.check(request("r", [3], dimensions=5))
