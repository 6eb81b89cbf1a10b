"""What users of other servers with many models complain of, each as a test."""

import pytest
from fleet_harness import SETTINGS, FleetHarness, admitted, only, refused, slept, spec, woken
from msgspec.structs import replace as changed

from shuteye.errors import InvalidRequest
from shuteye.fleet import events
from shuteye.fleet.actions import Refusal, Refuse, Sleep
from shuteye.fleet.machine import ModelProfile
from shuteye.fleet.model_spec import Depth, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings
from shuteye.fleet.simulation import simulate
from shuteye.fleet.trace import Arrival


def test_bytes_are_counted_and_not_models():
    """Eviction by number, blind to bytes, so that the second of two large models fails to load (llama.cpp#25326)."""
    fleet = FleetHarness(100, spec("large", 90), spec("also-large", 80), spec("small", 5))
    fleet.wake("large")
    assert woken(fleet.request("small")[1]) == ["small"], "both fit"
    fleet.done("small")
    decided = fleet.request("also-large")[1]
    assert slept(decided) == ["large"]
    assert woken(decided) == [], "a wake before its room is free"
    assert woken(fleet.done("large")) == ["also-large"]


def test_what_kv_caches_may_grow_by_is_reserved():
    """A model woken into memory that another's KV cache was promised."""
    fleet = FleetHarness(100, spec("grows", 30, growth_bytes=40), spec("other", 31))
    first, _ = fleet.request("grows")
    fleet.done("grows", 30)
    held, decided = fleet.request("other")
    assert woken(decided) == []
    assert slept(decided) == []
    fleet.tell(events.ResidentMeasured("grows", 65))
    assert fleet.scheduler.room().charged_bytes == 70, "growth that was reserved is counted again as it happens"
    assert slept(fleet.finish(first)) == ["grows"]
    assert woken(fleet.done("grows")) == ["other"]
    assert admitted(fleet.done("other")) == [held]


def test_if_all_are_pinned_the_request_is_refused_and_the_limit_kept():
    """A limit that is exceeded because nothing may be evicted, or a request that hangs (llama.cpp#18373)."""
    fleet = FleetHarness(20, spec("a", pinned=True), spec("b", pinned=True), spec("c"))
    fleet.wake("a")
    fleet.wake("b")
    refusal = only(fleet.request("c")[1], Refuse)
    assert refusal.why is Refusal.NO_ROOM
    assert "10 bytes" in refusal.detail
    assert fleet.scheduler.room().charged_bytes == 20


def test_idle_time_is_each_models_own():
    """One idle time for all (llama.cpp#18189)."""
    fleet = FleetHarness(
        50, spec("short", sleep_idle_s=5.0), spec("never", sleep_idle_s=-1.0), settings=FleetSettings(sleep_idle_s=30.0)
    )
    fleet.wake("short")
    fleet.wake("never")
    assert fleet.status("short").idle_at == 5.0
    assert fleet.status("never").idle_at is None
    (sleep,) = fleet.tick(after=5.0)
    assert sleep == Sleep("short", Depth.LEVEL_1, SleepOwner.IDLE)


@pytest.mark.parametrize("kind", ["active", "held", "waking", "falling asleep"])
def test_what_is_in_use_or_in_transition_is_not_evicted(kind):
    """LRU that kills a model in the middle of an answer, or while it loads (llama.cpp#23640, #25528)."""
    fleet = FleetHarness(10, spec("busy"), spec("other"))
    request_id, _ = fleet.request("busy")
    if kind in ("active", "falling asleep"):
        fleet.done("busy")
    if kind == "falling asleep":
        fleet.finish(request_id)
        fleet.tell(events.SleepAsked("busy"))
    if kind == "held":
        fleet.tell(events.ModelLost("busy"))
        request_id, decided = fleet.request("busy")
        assert woken(decided) == ["busy"]
    assert fleet.request("other")[1] == []
    assert fleet.status("busy").phase is {"active": Phase.AWAKE, "falling asleep": Phase.FALLING_ASLEEP}.get(
        kind, Phase.WAKING
    )


def test_a_model_that_has_just_loaded_serves_the_request_that_loaded_it():
    """A queued model that evicts another in the instant between its load and its request (llama.cpp#28698)."""
    fleet = FleetHarness(10, spec("a"), spec("b"))
    first, _ = fleet.request("a")
    fleet.request("b")
    assert admitted(fleet.done("a")) == [first]
    assert slept(fleet.tick(after=1.0)) == []
    assert slept(fleet.finish(first)) == ["a"]


def test_a_model_is_not_evicted_before_it_has_been_awake_for_a_while():
    """Models that put each other to sleep as soon as they wake."""
    fleet = FleetHarness(10, spec("a"), spec("b"), settings=FleetSettings(min_awake_s=5.0, batch_factor=0.0))
    fleet.wake("a")
    assert fleet.request("b")[1] == []
    assert slept(fleet.tick(after=4.9)) == []
    assert fleet.scheduler.next_tick_at == 5.0
    assert slept(fleet.tick(after=0.1)) == ["a"]


def test_one_eviction_that_does_is_better_than_three():
    """Three small models that sleep one after the other where one large one had sufficed (omlx#3306)."""
    fleet = FleetHarness(82, spec("s1", 14), spec("s2", 14), spec("s3", 14), spec("large", 40), spec("new", 40))
    for model in ("s1", "s2", "s3", "large", "large", "large"):  # by byte the large one is worth more
        fleet.wake(model)
    assert slept(fleet.request("new")[1]) == ["large"]


def test_none_is_evicted_that_is_not_needed_in_the_end():
    """A small model put to sleep on the way to one that frees enough alone."""
    fleet = FleetHarness(100, spec("s1", 10), spec("large", 90), spec("new", 80))
    fleet.wake("s1")
    for _ in range(20):  # so that it is worth more by byte, and comes second
        fleet.wake("large")
    assert slept(fleet.request("new")[1]) == ["large"]


def test_what_is_used_often_stays_and_what_is_rare_goes():
    """A rare model that displaces a busy one, which has to be loaded again at once (d-inference#789)."""
    fleet = FleetHarness(20, spec("busy"), spec("rare"), spec("other"))
    for _ in range(20):
        fleet.wake("busy")
    fleet.wake("rare")  # used last: LRU would evict the busy one
    assert slept(fleet.request("other")[1]) == ["rare"]


def test_what_is_dear_to_wake_stays_and_what_is_cheap_goes():
    """A choice that is blind to what a wake was measured to take."""
    fleet = FleetHarness(20, spec("dear"), spec("cheap"), spec("other"))
    for model, seconds in (("dear", 30.0), ("cheap", 0.1)):
        request_id, _ = fleet.request(model)
        fleet.done(model, seconds=seconds)
        fleet.finish(request_id)
    for model, seconds in (
        ("dear", 30.0),
        ("cheap", 0.1),
    ):  # from level 1, which is how deep the next eviction would be
        fleet.tell(events.SleepAsked(model))
        fleet.done(model)
        fleet.tell(events.WakeAsked(model, f"operator-{model}", fleet.now + 60.0))
        fleet.done(model, seconds=seconds)
        fleet.wake(model)
    assert slept(fleet.request("other")[1]) == ["cheap"]


def test_rare_models_used_by_turns_are_not_swapped_at_every_request():
    """Two models that do not fit beside a busy one, loaded again for each request of a client that uses both."""
    profiles = [ModelProfile(name=name, awake_bytes=10, sleep_s=0.1) for name in ("busy", "a", "b")]
    turns = [Arrival(3.0 * step, "ab"[step % 2], 10) for step in range(100)]
    busy = [Arrival(0.1 * step, "busy", 1) for step in range(3000)]
    trace = sorted(turns + busy, key=lambda arrival: arrival.at)

    def loads(**settings):
        scheduler = Scheduler(20, FleetSettings(**settings))
        return simulate("", [scheduler], profiles, trace, budget_bytes=20).loads_by_model

    assert loads(batch_factor=0.0)["a"] + loads(batch_factor=0.0)["b"] >= 90
    assert loads()["a"] + loads()["b"] <= 16, "300 s, and a swap and its undoing take 2 s: once in 24 s"


def test_the_first_swap_is_not_held_up():
    """A single request for a model that others are awake beside, kept waiting for a batch that never comes."""
    fleet = FleetHarness(20, spec("busy"), spec("a"), spec("b"), settings=FleetSettings(min_awake_s=0.0))
    fleet.wake("a")
    for _ in range(100):
        fleet.wake("busy")
    assert fleet.request("b")[1] == [], "a has just woken"
    fleet.tick(after=2.0)
    assert slept(fleet.tick(after=22.0)) == ["a"]
    fleet.done("a")
    fleet.done("b")
    fleet.tick(after=24.0)
    fleet.finish("b-102")
    assert slept(fleet.request("a")[1]) == ["b"], "b has not"


def test_small_models_do_not_starve_a_large_one():
    """A stream of requests for small models that takes each byte as it becomes free."""
    fleet = FleetHarness(
        10, spec("large", 10), spec("s1", 5), spec("s2", 5), settings=FleetSettings(min_awake_s=0.0, fairness_s=5.0)
    )
    one, _ = fleet.request("s1")
    fleet.done("s1")
    fleet.request("large")
    two, decided = fleet.request("s2", after=1.0)
    assert woken(decided) == ["s2"], "who fits may pass, for a while"
    fleet.done("s2")
    fleet.finish(two)
    fleet.tell(events.SleepAsked("s2"))
    fleet.tick(after=6.0)
    fleet.done("s2")
    fleet.tell(events.WakeAsked("s2", "operator", fleet.now + 30.0))
    assert fleet.status("s2").phase is Phase.ASLEEP, "passed one that has waited for longer than it has to"
    assert slept(fleet.finish(one)) == ["s1"]
    assert woken(fleet.done("s1")) == ["large"]


def test_probes_of_any_kind_neither_wake_nor_keep_awake():
    """A keep-alive by dummy requests, or a status that resets the idle time (lemonade#3483)."""
    fleet = FleetHarness(10, spec("a", sleep_idle_s=5.0))
    fleet.wake("a")
    fleet.now = 4.0
    fleet.scheduler.models()
    fleet.tell(events.ResidentMeasured("a", 10))
    fleet.tick()
    assert slept(fleet.tick(after=1.0)) == ["a"]


def test_there_is_one_copy_of_a_model():
    """A second copy loaded while the first is on its way out or in (LM Studio#634)."""
    fleet = FleetHarness(100, spec("a", sleep_idle_s=5.0))
    fleet.wake("a")
    assert slept(fleet.tick(after=5.0)) == ["a"]
    one, decided = fleet.request("a")
    assert decided == []
    two, decided = fleet.request("a")
    assert decided == []
    assert woken(fleet.done("a")) == ["a"]
    assert admitted(fleet.done("a")) == [one, two]
    with pytest.raises(InvalidRequest, match="There is a model 'a'"):
        fleet.tell(events.ModelAdded(spec("a")))


def test_unloaded_models_stay_listed_as_what_they_are():
    """Models that vanish from the list when unloaded (letta#3493), or all shown as loaded (llama-swap#871)."""
    fleet = FleetHarness(100, spec("a"), spec("b"))
    fleet.wake("a")
    assert [(one.model, one.depth) for one in fleet.scheduler.models()] == [("a", Depth.AWAKE), ("b", Depth.UNLOADED)]


def test_a_pause_and_a_writer_of_weights_keep_a_model():
    """A model whose weights are being written, or that is paused, put to sleep beneath whoever does so."""
    fleet = FleetHarness(10, spec("a", sleep_idle_s=1.0), spec("b"))
    fleet.wake("a")
    for begin, end in (
        (events.PauseChanged("a", True), events.PauseChanged("a", False)),
        (events.WeightSessionChanged("a", True), events.WeightSessionChanged("a", False)),
    ):
        fleet.tell(begin)
        assert fleet.tick(after=100.0) == []
        held, decided = fleet.request("b", deadline=1.0)
        assert refused(decided) == {held: Refusal.NO_ROOM}
        fleet.tell(end)
    assert slept(fleet.tick(after=1.0)) == ["a"]


def test_written_weights_are_not_lost_to_a_deeper_sleep():
    """Updated weights forgotten because the fleet went on to level 2, or ended the process."""
    fleet = FleetHarness(10, spec("a", 10, level_1_bytes=4, sleep_idle_s=1.0, sleep_escalate_s=1.0), spec("b", 8))
    fleet.wake("a")
    fleet.tell(events.WeightsUpdated("a", True))
    assert fleet.tick(after=1.0) == [Sleep("a", Depth.LEVEL_1, SleepOwner.IDLE)]
    fleet.done("a")
    assert fleet.tick(after=10.0) == []
    held, decided = fleet.request("b")
    assert refused(decided) == {held: Refusal.NO_ROOM}
    fleet.tell(events.WeightsUpdated("a", False))
    assert fleet.request("b")[1] == [Sleep("a", Depth.UNLOADED, SleepOwner.IDLE)], "now that nothing is lost"


def test_what_a_sleep_leaves_is_not_taken_for_nothing_before_it_was_measured():
    """Unknown residuals counted as zero: the next wake exceeds the budget."""
    fleet = FleetHarness(20, spec("a", level_1_bytes=None), spec("b", 15))
    fleet.wake("a")
    assert fleet.request("b")[1] == [Sleep("a", Depth.UNLOADED, SleepOwner.FLEET)], "level 1 may free nothing"
    fleet = FleetHarness(20, spec("a", level_1_bytes=None), spec("b", 17))
    fleet.wake("a")
    fleet.tell(events.SleepAsked("a", Depth.LEVEL_1))
    fleet.done("a", 4)
    held, decided = fleet.request("b")
    assert refused(decided) == {held: Refusal.NO_ROOM}, "4 were measured, and what an operator did is left alone"


def test_a_request_whose_wake_fails_is_told_so_at_once():
    """Clients that wait for their deadline though the wake has failed."""
    fleet = FleetHarness(10, spec("a"))
    held, _ = fleet.request("a")
    refusal = only(fleet.fail("a"), Refuse)
    assert (refusal.request_id, refusal.why) == (held, Refusal.WAKE_FAILED)
    assert "Injected." in refusal.detail
    assert woken(fleet.request("a")[1]) == ["a"], "and the next one tries again"


def test_a_sleep_that_fails_is_not_tried_in_a_loop():
    """A victim whose sleep fails, chosen again in the same instant for ever; others are."""
    fleet = FleetHarness(20, spec("a"), spec("b"), spec("c"))
    for model in ("b", "b", "a"):
        fleet.wake(model)
    assert slept(fleet.request("c")[1]) == ["a"]
    assert slept(fleet.fail("a")) == ["b"]
    assert slept(fleet.fail("b")) == []
    assert slept(fleet.tick(after=SETTINGS.retry_s)) == ["a"]


def test_the_queue_is_bounded_and_deadlines_are_kept():
    """Requests that pile up without limit, or are answered after their client has gone."""
    fleet = FleetHarness(10, spec("a"), spec("b"), settings=FleetSettings(max_held=2, batch_factor=0.0))
    fleet.request("a")
    fleet.done("a")
    one, _ = fleet.request("b", deadline=5.0)
    two, _ = fleet.request("b", deadline=9.0)
    three, decided = fleet.request("b")
    assert refused(decided) == {three: Refusal.QUEUE_FULL}
    assert only(decided, Refuse).retry_after_s >= 1.0
    assert refused(fleet.tick(after=5.0)) == {one: Refusal.DEADLINE}
    fleet.finish(two)
    assert fleet.scheduler.room().held_requests == 0


def test_a_wake_that_comes_after_the_deadline_does_not_admit():
    """A request admitted late because the tick that should have refused it came late, too."""
    fleet = FleetHarness(10, spec("a"))
    held, _ = fleet.request("a", deadline=5.0)
    assert refused(fleet.done("a", after=6.0)) == {held: Refusal.DEADLINE}


def test_pressure_from_outside_makes_sleepers_though_they_have_just_woken():
    """The kernel's OOM killer coming first, as every model was protected by its youth."""
    fleet = FleetHarness(20, spec("a"), spec("b"), settings=FleetSettings(min_awake_s=60.0))
    fleet.wake("a")
    busy, _ = fleet.request("b")
    fleet.done("b")
    assert slept(fleet.tell(events.BudgetChanged(5))) == ["a"]
    fleet.done("a")
    assert slept(fleet.finish(busy)) == ["b"], "and the busy one as soon as it may"


def test_what_the_machine_has_left_limits_what_may_wake():
    """Models woken on a budget that others have eaten into; and a machine that nobody can measure taken to be full."""
    fleet = FleetHarness(100, spec("a", 40), spec("b", 40))
    fleet.wake("a")
    fleet.tell(events.AvailableMeasured(30))
    assert fleet.scheduler.room().budget_bytes == 70
    busy, _ = fleet.request("a")
    assert woken(fleet.request("b")[1]) == []
    assert woken(fleet.tell(events.AvailableMeasured(None))) == ["b"]
    fleet.finish(busy)


def test_a_dead_model_takes_nothing_and_the_next_request_brings_it_back():
    """A killed engine that is still counted, or that needs an operator."""
    fleet = FleetHarness(10, spec("a"), spec("b"))
    running, _ = fleet.request("a")
    fleet.done("a")
    assert fleet.tell(events.ModelLost("a")) == []
    assert fleet.scheduler.room().charged_bytes == 0
    fleet.finish(running)
    assert woken(fleet.request("a")[1]) == ["a"]


def test_models_come_and_go_while_others_serve():
    """A reload that cuts off requests, forgets bytes, or serves what is no longer there."""
    fleet = FleetHarness(20, spec("a"), spec("b"))
    running, _ = fleet.request("a")
    fleet.done("a")
    assert fleet.tell(events.ModelRemoved("a")) == []
    late, decided = fleet.request("a")
    assert refused(decided) == {late: Refusal.REMOVED}
    assert slept(fleet.finish(running)) == ["a"]
    fleet.done("a")
    assert [one.model for one in fleet.scheduler.models()] == ["b"]
    assert fleet.scheduler.room().charged_bytes == 0
    fleet.tell(events.ModelAdded(spec("a", 20)))
    fleet.tell(events.ModelChanged(changed(spec("b"), pinned=True)))
    assert fleet.status("b").pinned
