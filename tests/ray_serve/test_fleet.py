"""What replicas answered, as one: sums, failures that name replicas, and the state of all."""

import pytest

from shuteye.errors import EngineNotReady, InternalError, InvalidRequest, ReplicasFailed, TransitionConflict, info_of
from shuteye.ray.fleet import FleetReport, FleetState, Outcome
from shuteye.ray.wanted import AWAKE
from shuteye.state import SleepReport, TagReport, WakeReport


def report_of(*outcomes, verb="sleep"):
    return FleetReport(verb, AWAKE, outcomes)


def slept(name, freed=10, **more):
    tags = (TagReport("weights", "offloaded", "image", freed_bytes=freed),)
    return Outcome(name, SleepReport(True, 1, tags, freed, residual_bytes=3, seconds=freed / 10, **more))


def failed(name, error):
    return Outcome(name, error=info_of(error))


def test_sums_are_of_all_replicas_and_seconds_of_the_slowest():
    summed = report_of(slept("a", 10, aborted_requests=1), slept("b", 20, aborted_requests=2)).summed
    assert (summed.freed_bytes, summed.residual_bytes, summed.seconds, summed.aborted_requests) == (30, 6, 2.0, 3)
    assert [(tag.tag, tag.freed_bytes, tag.residency) for tag in summed.tags] == [("weights", 30, "offloaded")]


def test_a_replica_that_did_nothing_takes_nothing_from_the_sum():
    rested = Outcome("b", SleepReport(False, 1, residual_bytes=3))
    summed = report_of(slept("a"), rested).summed
    assert (summed.changed, summed.freed_bytes, summed.residual_bytes) == (True, 10, 6)


def test_what_was_verified_is_the_least_of_those_that_woke():
    full = Outcome("a", WakeReport(True, verified="full", canary=True, weights_source="x"))
    sample = Outcome("b", WakeReport(True, verified="sample", canary=True, weights_source="x"))
    at_rest = Outcome("c", WakeReport(False))
    summed = report_of(full, sample, at_rest, verb="wake_up").summed
    assert (summed.verified, summed.canary, summed.weights_source) == ("sample", True, "x")


def test_replicas_that_ended_differently_are_summed_all_the_same():
    woken = [
        Outcome(name, WakeReport(True, (TagReport("weights", residency, restored_bytes=5),)))
        for name, residency in (("a", "resident"), ("b", "blank"))
    ]
    (tag,) = report_of(*woken, verb="wake_up").summed.tags
    assert (tag.residency, tag.restored_bytes) == ("blank", 10)


def test_success_is_that_of_every_replica():
    assert report_of(slept("a"), slept("b")).failure is None


def test_a_failure_names_its_replica_and_counts_them():
    failure = report_of(slept("a"), failed("b", InternalError("no room"))).failure
    assert isinstance(failure, ReplicasFailed)
    assert "1 of 2 replicas failed to sleep: replica b: InternalError: no room" in failure.message
    assert "replica a" not in failure.message


def test_what_all_refuse_is_the_callers_mistake():
    refusal = TransitionConflict("asleep deeper", param="level")
    failure = report_of(failed("a", refusal), failed("b", refusal)).failure
    assert (type(failure), failure.message, failure.param) == (TransitionConflict, "asleep deeper", "level")


@pytest.mark.parametrize(
    "other", [slept("b"), failed("b", InvalidRequest("no")), failed("b", InternalError("bug"))], ids=str
)
def test_what_only_some_refuse_is_not(other):
    assert isinstance(report_of(failed("a", TransitionConflict("no")), other).failure, ReplicasFailed)


def test_nobody_is_no_success():
    """200 for a sleep that no replica has carried out."""
    assert isinstance(report_of().failure, EngineNotReady)


# --- states -------------------------------------------------------------------------------------


def state_of(*, sleeping=False, running=0, seconds=None):
    where = (
        {"residency": "offloaded", "resident_bytes": 0} if sleeping else {"residency": "resident", "resident_bytes": 8}
    )
    return {
        "status": "ready",
        "failure": None,
        "models": ["m"],
        "is_sleeping": sleeping,
        "is_paused": False,
        "ready": not sleeping,
        "state": {
            "gate": "closed" if sleeping else "open",
            "level": 1 if sleeping else None,
            "tags": [{"tag": "weights", "backing": "image", "nbytes": 8} | where],
            "ranks": [{"rank": 0}],
        },
        "waking": {
            "restore_bytes": 8 * sleeping,
            "tags": {},
            "backings": {},
            "last_wake_s": seconds,
            "expected_s": None,
        },
        "model": None,
        "stats": {"num_running": running},
    }


def test_the_state_of_all():
    state = FleetState(AWAKE, {"a": state_of(running=2, seconds=0.5), "b": state_of(sleeping=True, running=1)})
    answer = state.answer
    assert state.sleeping == ("b",)
    assert (answer["is_sleeping"], answer["ready"]) == (True, True)
    assert (answer["state"]["gate"], answer["state"]["level"]) == ("closed", 1)
    (tag,) = answer["state"]["tags"]
    assert (tag["residency"], tag["nbytes"], tag["resident_bytes"]) == ("offloaded", 16, 8)
    assert answer["stats"]["num_running"] == 3
    assert (answer["waking"]["restore_bytes"], answer["waking"]["last_wake_s"]) == (8, 0.5)
    assert set(answer["replicas"]) == {"a", "b"}
    assert len(answer["state"]["ranks"]) == 2


def test_the_state_of_a_replica_that_does_not_answer_is_told():
    answer = FleetState(AWAKE, {"a": state_of()}, (failed("b", InternalError("late")),)).answer
    assert [one.replica for one in answer["failed"]] == ["b"]


def test_the_state_of_none():
    assert FleetState(AWAKE, {}).answer == {"wanted": answer_wanted(), "replicas": {}, "failed": ()}


def answer_wanted():
    return {"asleep": (), "level": None, "dozing": False, "paused": None, "revision": 0}
