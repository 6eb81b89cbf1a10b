"""Leases: bytes lent to others, and what others' leases got wrong."""

import pytest
from fleet_harness import FleetHarness, admitted, only, refused, slept, spec, woken

from shuteye.errors import InvalidRequest, LeaseGone, ModelNotFound
from shuteye.fleet import events
from shuteye.fleet.actions import EndLease, GrantLease, Obstacle, Refusal, Refuse, RefuseLease, Sleep
from shuteye.fleet.model_spec import Depth, SleepOwner
from shuteye.fleet.settings import FleetSettings


@pytest.fixture
def fleet():
    """Three models of 10 bytes, all awake, on 30; `c` was used least, `a` most."""
    fleet = FleetHarness(30, spec("a"), spec("b"), spec("c"))
    for model in ("a", "a", "a", "b", "b", "c"):
        fleet.wake(model)
    return fleet


def test_a_claim_is_granted_once_its_bytes_are_free(fleet):
    """A grant of memory that is still on its way out, or one that does not say what it cost."""
    decided = fleet.claim(nbytes=15)
    assert decided == [Sleep("c", Depth.LEVEL_1, SleepOwner.LEASE), Sleep("b", Depth.LEVEL_1, SleepOwner.LEASE)]
    assert fleet.done("c", after=1.0) == []
    grant = only(fleet.done("b", 2, after=1.0), GrantLease)
    assert grant == GrantLease("lease", 15, 62.0, ("c", "b"), freed_bytes=18, restore_s=2.0)
    room = fleet.scheduler.room()
    assert (room.leased_bytes, room.claimed_bytes, room.charged_bytes) == (15, 0, 12)


def test_memory_that_is_free_is_granted_at_once():
    """A model put to sleep for bytes that nobody uses."""
    fleet = FleetHarness(30, spec("a"))
    fleet.wake("a")
    assert only(fleet.claim(nbytes=20), GrantLease).slept == ()


def test_two_claims_cannot_count_on_the_same_bytes(fleet):
    """Claims that over-commit, as neither subtracts what the other waits for."""
    assert slept(fleet.claim("one", 20)) == ["c", "b"]
    refusal = only(fleet.claim("two", 20), RefuseLease)
    assert refusal.available_bytes == 10
    assert Obstacle("one", "lease", 20) in refusal.in_the_way
    assert slept(fleet.claim("three", 10)) == ["a"], "what is left can be had"


def test_requests_do_not_take_what_sleeps_for_a_claim(fleet):
    """A wake that slips into room that a claim is still waiting for."""
    fleet.tell(events.ModelAdded(spec("new", 5)))
    fleet.claim(nbytes=15)
    held, decided = fleet.request("new")
    assert decided == []
    assert woken(fleet.done("c")) == []
    decided = fleet.done("b")
    assert only(decided, GrantLease)
    assert woken(decided) == ["new"], "5 are left"
    assert admitted(fleet.done("new")) == [held]


def test_what_stands_in_the_way_is_told(fleet):
    """A refusal that leaves its caller to guess."""
    fleet.tell(events.PinChanged("a", True))
    fleet.tell(events.PauseChanged("b", True))
    refusal = only(fleet.claim(nbytes=25), RefuseLease)
    assert not refusal.timed_out
    assert refusal.available_bytes == 10
    assert {(one.name, one.why) for one in refusal.in_the_way} == {("a", "pinned"), ("b", "paused")}


def test_a_claim_waits_for_what_is_active_and_gives_up_in_time(fleet):
    """A claim that is refused although a moment would do, one that waits for ever, or one that is not undone."""
    busy, _ = fleet.request("a")
    assert slept(fleet.claim(nbytes=30, within=10.0)) == []
    assert only(fleet.claim("small", nbytes=10), RefuseLease).in_the_way[0].why == "lease", "the first comes first"
    fleet.tick(after=2.0)
    assert slept(fleet.finish(busy)) == ["c", "b", "a"]
    fleet.done("c")
    fleet.done("b")
    decided = fleet.tick(after=8.0)
    refusal = only(decided, RefuseLease)
    assert (refusal.lease_id, refusal.timed_out) == ("lease", True)
    assert sorted(woken(decided)) == ["b", "c"], "undone"
    assert woken(fleet.done("a")) == ["a"]


def test_an_active_model_in_the_way_is_named(fleet):
    """A timeout that does not say who was busy."""
    fleet.request("a")
    fleet.claim(nbytes=30, within=1.0)
    refusal = only(fleet.tick(after=1.0), RefuseLease)
    assert Obstacle("a", "active", 10) in refusal.in_the_way
    assert refusal.available_bytes == 20


def test_only_who_may_is_put_to_sleep(fleet):
    """A lease that takes the one model its holder needs, or one of higher priority."""
    assert slept(fleet.claim("one", 10, may_sleep=("b",))) == ["b"]
    refusal = only(fleet.claim("two", 10, may_sleep=()), RefuseLease)
    assert {one.why for one in refusal.in_the_way if one.name in "ac"} == {"not allowed"}
    fleet.tell(events.ModelChanged(spec("c", priority=3)))
    assert slept(fleet.claim("three", 10, priority=2)) == ["a"]


def test_a_dry_run_changes_nothing(fleet):
    """An estimate that puts models to sleep."""
    before = fleet.scheduler.models(), fleet.scheduler.room()
    grant = only(fleet.claim(nbytes=15, dry_run=True), GrantLease)
    assert (grant.dry_run, grant.slept, grant.freed_bytes, grant.restore_s) == (True, ("c", "b"), 20, 2.0)
    assert only(fleet.claim(nbytes=31, dry_run=True), RefuseLease).dry_run
    assert (fleet.scheduler.models(), fleet.scheduler.room()) == before
    assert fleet.scheduler.leases() == ()


def test_release_wakes_what_was_put_to_sleep(fleet):
    """Models that stay asleep after the lease that they slept for."""
    fleet.claim(nbytes=10)
    fleet.done("c")
    decided = fleet.tell(events.LeaseReleased("lease"))
    assert only(decided, EndLease) == EndLease("lease", expired=False, restoring=("c",))
    assert woken(decided) == ["c"]


def test_without_restore_they_are_left_to_requests(fleet):
    """A restore nobody wanted, or sleepers that no request wakes any more."""
    fleet.claim(nbytes=10, restore=False)
    fleet.done("c")
    assert woken(fleet.tell(events.LeaseReleased("lease"))) == []
    assert woken(fleet.request("c")[1]) == ["c"]


def test_a_lease_that_is_over_is_not_brought_back(fleet):
    """Renewing that resurrects what has expired, be it in this instant (taOS#1992)."""
    fleet.claim(nbytes=10, ttl=5.0)
    fleet.done("c")
    fleet.tell(events.LeaseRenewed("lease", 5.0), after=4.0)
    assert fleet.tick(after=4.9) == []
    with pytest.raises(LeaseGone, match="no lease 'lease' any more"):
        fleet.tell(events.LeaseRenewed("lease", 5.0), after=0.1)
    assert fleet.scheduler.next_tick_at == fleet.now, "what has come of it is to be fetched at once"
    decided = fleet.tick()
    assert only(decided, EndLease).expired
    assert woken(decided) == ["c"]
    with pytest.raises(LeaseGone):
        fleet.tell(events.LeaseReleased("lease"))


def test_a_lease_of_a_dead_holder_ends(fleet):
    """Memory that is lent for ever, as nobody gave it back."""
    fleet.claim(nbytes=10, ttl=5.0)
    fleet.done("c")
    assert fleet.scheduler.next_tick_at == 5.0
    assert only(fleet.tick(after=5.0), EndLease).expired
    assert fleet.scheduler.room().leased_bytes == 0


def test_an_expired_lease_is_free_for_the_next_claim_though_no_tick_came(fleet):
    """A claim refused for a lease that is over."""
    fleet.claim("one", 30, ttl=5.0, restore=False)
    for model in "abc":
        fleet.done(model)
    decided = fleet.claim("two", 30) if fleet.tick(after=4.0) == [] else None
    assert only(decided, RefuseLease)
    fleet.now += 1.0
    decided = fleet.claim("three", 30)
    assert [type(one) for one in decided] == [EndLease, GrantLease]


def test_a_request_during_a_lease_waits_or_is_told_when(fleet):
    """A client that is left hanging, or told to come back while the lease still holds."""
    fleet.claim(nbytes=10, ttl=20.0)
    fleet.done("c")
    late, decided = fleet.request("c", deadline=5.0)
    assert refused(decided) == {late: Refusal.LEASED}
    assert only(decided, Refuse).retry_after_s == 20.0
    held, decided = fleet.request("c", deadline=30.0)
    assert decided == []
    assert woken(fleet.tick(after=20.0)) == ["c"]
    assert admitted(fleet.done("c")) == [held]


def test_a_model_that_slept_before_is_told_of_the_lease_too(fleet):
    """Requests for models without room because of a lease, refused as if they could never fit."""
    fleet.tell(events.ModelAdded(spec("d")))
    fleet.claim(nbytes=30, ttl=20.0)
    for model in "cba":
        fleet.done(model)
    late, decided = fleet.request("d", deadline=5.0)
    assert refused(decided) == {late: Refusal.LEASED}
    assert only(decided, Refuse).retry_after_s == 20.0
    assert fleet.request("d", deadline=30.0)[1] == []


def test_what_a_holder_uses_is_not_missing_twice(fleet):
    """Free memory that shows the lease's use already, and the lease subtracted from it again (taOS#3026)."""
    fleet.claim(nbytes=10)
    fleet.done("c")
    fleet.tell(events.LeaseUsed("lease", 10))
    fleet.tell(events.AvailableMeasured(0))  # 20 by models, 10 by the holder
    assert fleet.scheduler.room().budget_bytes == 30
    assert fleet.tick() == []


def test_what_a_holder_has_not_used_yet_is_not_lent_again(fleet):
    """The opposite mistake: memory that a lease may still take, given to a model (taOS#3030)."""
    fleet.claim(nbytes=10)
    fleet.done("c")
    fleet.tell(events.LeaseUsed("lease", 4))
    fleet.tell(events.AvailableMeasured(6))
    assert fleet.scheduler.room().budget_bytes == 30
    fleet.tell(events.ModelAdded(spec("d", 6)))
    busy = [fleet.request(model)[0] for model in "ab"]
    assert woken(fleet.request("d")[1]) == []
    assert busy


def test_an_operator_takes_over_what_sleeps_for_a_lease(fleet):
    """A release that wakes a model which an operator has put to sleep meanwhile, or that wakes one twice."""
    fleet.claim(nbytes=20)
    fleet.done("c")
    fleet.done("b")
    fleet.tell(events.SleepAsked("c"))
    decided = fleet.tell(events.LeaseReleased("lease"))
    assert only(decided, EndLease).restoring == ("b",)
    assert woken(decided) == ["b"]


def test_a_claim_withdrawn_is_undone(fleet):
    """A caller that goes before it got its bytes, and leaves models asleep for nobody."""
    fleet.claim(nbytes=20)
    decided = fleet.tell(events.LeaseReleased("lease"))
    assert sorted(only(decided, EndLease).restoring) == ["b", "c"]
    assert fleet.scheduler.room().claimed_bytes == 0
    assert woken(fleet.done("c")) == ["c"]


def test_a_model_that_will_not_sleep_is_replaced_by_another(fleet):
    """A claim that waits for its end though another model could sleep."""
    assert slept(fleet.claim(nbytes=10)) == ["c"]
    assert slept(fleet.fail("c")) == ["b"]
    assert only(fleet.done("b"), GrantLease).slept == ("b",)


def test_models_that_have_just_woken_are_left_alone():
    """A lease that undoes a wake on the spot."""
    fleet = FleetHarness(10, spec("a"), settings=FleetSettings(min_awake_s=3.0))
    fleet.wake("a")
    assert slept(fleet.claim(nbytes=10, within=10.0)) == []
    assert slept(fleet.tick(after=3.0)) == ["a"]


@pytest.mark.parametrize(
    ("others", "param"),
    [
        ({"nbytes": 0}, "bytes"),
        ({"within": -1.0}, "within_s"),
        ({"ttl": 0.0}, "ttl_s"),
        ({"ttl": float("inf")}, "ttl_s"),
    ],
)
def test_claims_out_of_range_are_refused(fleet, others, param):
    """A lease without end, or of nothing."""
    with pytest.raises(InvalidRequest) as raised:
        fleet.claim(**others)
    assert raised.value.param == param


def test_claims_name_models_that_there_are(fleet):
    """A list with a typing error, so that nobody may be put to sleep."""
    with pytest.raises(ModelNotFound):
        fleet.claim(may_sleep=("x",))
    fleet.claim()
    with pytest.raises(InvalidRequest, match="There is a lease"):
        fleet.claim()
