"""Sleep for want of requests: when, how deep, on whose behalf, and what requests do about it."""

import pytest
from fleet_harness import FleetHarness, admitted, refused, slept, spec, woken

from shuteye.errors import InternalError, InvalidRequest, ModelNotFound, TransitionConflict
from shuteye.fleet import events
from shuteye.fleet.actions import Admit, Refusal, Sleep, Wake
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.phases import MOVES, Move, Phase
from shuteye.fleet.settings import FleetSettings
from shuteye.fleet.wake_rules import RULES

IDLE = FleetSettings(min_awake_s=0.0, sleep_idle_s=10.0, sleep_escalate_s=20.0)


@pytest.fixture
def fleet():
    """One model, awake and idle since 0."""
    fleet = FleetHarness(100, spec("a", level_1_bytes=4, level_2_bytes=2), settings=IDLE)
    fleet.wake("a")
    return fleet


def test_sleeps_deepen_step_by_step_down_to_no_process(fleet):
    """A model that keeps its process for ever, or goes to the bottom at once."""
    depths = []
    for after in (10.0, 20.0, 20.0):
        (sleep,) = fleet.tick(after=after)
        assert sleep.owner is SleepOwner.IDLE
        depths.append(sleep.depth)
        fleet.done("a")
    assert depths == [Depth.LEVEL_1, Depth.LEVEL_2, Depth.UNLOADED]
    assert fleet.scheduler.next_tick_at is None
    assert fleet.request("a")[1] == [Wake("a", Depth.UNLOADED)]


def test_a_stream_counts_until_its_last_byte(fleet):
    """A model that sleeps in the middle of a long answer."""
    running, _ = fleet.request("a", after=9.0)
    assert fleet.tick(after=100.0) == []
    fleet.finish(running)
    assert fleet.tick(after=9.9) == []
    assert slept(fleet.tick(after=0.1)) == ["a"]


@pytest.mark.parametrize(("keep", "sleeps_after"), [(0.0, 0.0), (3.0, 3.0), (None, 10.0), (-1.0, None)])
def test_keep_alive_is_ollamas(fleet, keep, sleeps_after):
    """A `keep_alive` of 0 that keeps, one below 0 that does not, or one that none given takes back."""
    running, _ = fleet.request("a", keep_alive_s=keep)
    decided = fleet.finish(running)
    if sleeps_after == 0.0:
        assert slept(decided) == ["a"]
        return
    assert fleet.status("a").idle_at == sleeps_after
    again, _ = fleet.request("a")
    fleet.finish(again)
    assert fleet.status("a").idle_at == sleeps_after, "holds until the model sleeps"


def test_keep_alive_ends_with_the_sleep(fleet):
    """One request's `keep_alive` that lasts for the life of the server."""
    fleet.tell(events.KeepAliveChanged("a", -1.0))
    assert fleet.status("a").idle_at is None
    decided = fleet.tell(events.KeepAliveChanged("a", 0.0))
    assert slept(decided) == ["a"]
    fleet.done("a")
    fleet.wake("a")
    assert fleet.status("a").idle_at == 10.0


def test_a_pinned_model_does_not_fall_asleep(fleet):
    """A pin that only helps against others."""
    fleet.tell(events.PinChanged("a", True))
    assert fleet.tick(after=1000.0) == []
    fleet.tell(events.PinChanged("a", False))
    assert fleet.tick(after=9.0) == []
    assert slept(fleet.tick(after=1.0)) == ["a"]


def test_prewarmed_models_wake_where_there_is_room_and_evict_nobody():
    """A start at which models put each other to sleep, or the less important ones come first."""
    fleet = FleetHarness(25)
    fleet.tell(events.ModelAdded(spec("busy")))
    fleet.wake("busy")
    assert woken(fleet.tell(events.ModelAdded(spec("one", prewarm=True)))) == ["one"]
    assert fleet.tell(events.ModelAdded(spec("two", prewarm=True))) == []
    assert fleet.tell(events.ModelAdded(spec("three", prewarm=True, priority=1))) == []
    assert woken(fleet.tell(events.BudgetChanged(30))) == ["three"]


# --- owners and policies ------------------------------------------------------------------------


def put_to_sleep(fleet, owner):
    match owner:
        case SleepOwner.IDLE:
            fleet.tick(after=10.0)
        case SleepOwner.FLEET:
            fleet.tell(events.BudgetChanged(5))
        case SleepOwner.LEASE:
            fleet.claim(nbytes=95, ttl=1000.0)
        case SleepOwner.OPERATOR:
            fleet.tell(events.SleepAsked("a"))
    assert fleet.status("a").owner is owner
    fleet.done("a")
    fleet.tell(events.BudgetChanged(200))


@pytest.mark.parametrize("owner", SleepOwner)
@pytest.mark.parametrize("policy", [None, "reject", "hold", "wake"])
def test_requests_do_what_the_table_says(owner, policy):
    """A request that wakes what an operator put to sleep, or does not wake what the fleet did."""
    one = spec("a", level_1_bytes=4, on_sleeping_request=policy)
    fleet = FleetHarness(100, one, settings=FleetSettings(min_awake_s=0.0, sleep_idle_s=10.0))
    fleet.wake("a")
    put_to_sleep(fleet, owner)
    _, decided = fleet.request("a", deadline=2000.0)
    does = "wake" if woken(decided) else "reject" if refused(decided) else "hold"
    assert does == RULES[owner, policy]
    if owner in (SleepOwner.IDLE, SleepOwner.FLEET):
        assert does == "wake"


def test_an_operators_wake_serves_those_who_are_held():
    """Requests held for an operator's wake that are forgotten when it comes, or a wake answered before it is done."""
    fleet = FleetHarness(100, spec("a", on_sleeping_request="hold"))
    fleet.wake("a")
    fleet.tell(events.SleepAsked("a"))
    fleet.done("a")
    held, decided = fleet.request("a")
    assert decided == []
    decided = fleet.tell(events.WakeAsked("a", "operator", fleet.now + 10.0))
    assert decided == [Wake("a", Depth.LEVEL_1)]
    decided = fleet.done("a", after=2.0)
    assert decided == [Admit(held, "a", 2.0), Admit("operator", "a", 2.0)]
    assert fleet.status("a").running == 1, "the operator's wake is over"


def test_a_wake_for_which_there_is_no_room_is_refused():
    """An operator whose wake hangs, or exceeds the budget."""
    fleet = FleetHarness(10, spec("a"), spec("b"))
    fleet.request("b")
    fleet.done("b")
    assert fleet.tell(events.WakeAsked("a", "operator", 5.0)) == []
    assert refused(fleet.tick(after=5.0)) == {"operator": Refusal.DEADLINE}


def test_an_operators_sleep_does_not_wait_for_requests(fleet):
    """A `/sleep?mode=abort` that the scheduler refuses because of the requests that it is to end."""
    fleet.request("a")
    assert fleet.tell(events.SleepAsked("a", Depth.LEVEL_2)) == [Sleep("a", Depth.LEVEL_2, SleepOwner.OPERATOR)]


def test_an_operators_sleep_during_a_transition_comes_after_it(fleet):
    """A sleep that is lost because the model was on its way somewhere."""
    fleet.tick(after=10.0)
    assert fleet.tell(events.SleepAsked("a", Depth.LEVEL_2)) == []
    assert fleet.done("a") == [Sleep("a", Depth.LEVEL_2, SleepOwner.OPERATOR)]
    fleet.done("a")
    late, decided = fleet.request("a")
    assert refused(decided) == {late: Refusal.SLEEPING}
    assert fleet.tick(after=1000.0) == [], "and it is not made deeper by itself"


def test_a_shallower_sleep_is_a_conflict_and_changes_nothing(fleet):
    """A model that is told to be at level 1 while it is at 2, answered with success."""
    fleet.tell(events.SleepAsked("a", Depth.LEVEL_2))
    fleet.done("a")
    with pytest.raises(TransitionConflict, match="sleeps more deeply than level 1"):
        fleet.tell(events.SleepAsked("a", Depth.LEVEL_1))
    assert fleet.status("a").depth is Depth.LEVEL_2
    with pytest.raises(InvalidRequest):
        fleet.tell(events.SleepAsked("a", Depth.AWAKE))


def test_a_paused_model_that_sleeps_is_not_woken_for_nothing(fleet):
    """A wake for requests that then wait behind a pause all the same."""
    fleet.tell(events.SleepAsked("a"))
    fleet.done("a")
    fleet.tell(events.WakeAsked("a", "x", 50.0))
    fleet.done("a")
    fleet.tick(after=10.0)
    fleet.done("a")
    fleet.tell(events.PauseChanged("a", True))
    held, decided = fleet.request("a")
    assert decided == []
    assert refused(fleet.tell(events.PauseChanged("a", True, refuses=True))) == {held: Refusal.PAUSED}
    held, decided = fleet.request("a")
    assert refused(decided) == {held: Refusal.PAUSED}
    fleet.tell(events.PauseChanged("a", False))
    assert woken(fleet.request("a")[1]) == ["a"]


# --- what cannot have happened ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (events.RequestFinished("unknown"), InternalError),
        (events.TransitionFinished("a", 1, 1.0), InternalError),
        (events.TransitionFailed("a"), InternalError),
        (events.RequestArrived("unknown", "r", 5.0), ModelNotFound),
        (events.ModelRemoved("unknown"), ModelNotFound),
        (events.SleepAsked("unknown"), ModelNotFound),
        (events.ResidentMeasured("a", -1), InternalError),
        (events.BudgetChanged(-1), InvalidRequest),
    ],
)
def test_an_illegal_event_raises_and_changes_nothing(fleet, event, error):
    """A driver's mistake that is taken for the truth."""
    before = fleet.scheduler.models(), fleet.scheduler.room()
    with pytest.raises(error):
        fleet.tell(event)
    assert (fleet.scheduler.models(), fleet.scheduler.room()) == before


def test_a_request_id_is_used_once_at_a_time(fleet):
    """Two requests of one id, of which one is never answered."""
    fleet.tell(events.RequestArrived("a", "same", 5.0))
    with pytest.raises(InvalidRequest, match="'same' under way"):
        fleet.tell(events.RequestArrived("a", "same", 5.0))
    fleet.finish("same")
    assert admitted(fleet.tell(events.RequestArrived("a", "same", 5.0))) == ["same"]


def test_time_does_not_go_back(fleet):
    """Clocks that are mixed up."""
    fleet.tick(after=5.0)
    fleet.now -= 1.0
    with pytest.raises(InternalError, match="went back"):
        fleet.tick()


def test_every_move_has_one_meaning():
    """A phase that cannot be left, or a transition that cannot end."""
    for phase in Phase:
        ends = {move for (start, move) in MOVES if start is phase}
        assert Move.LOSE in ends
        assert ({Move.FINISH, Move.FAIL} <= ends) == phase.in_transition


@pytest.mark.parametrize(
    "fields",
    [
        {"awake_bytes": 0},
        {"growth_bytes": -1},
        {"level_1_bytes": -1},
        {"wake_s": float("nan")},
        {"name": ""},
        {"sleep_idle_depth": Depth.AWAKE},
        {"on_sleeping_request": "maybe"},
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(fields):
    """A typing error in a file of models that is found only when memory runs out."""
    with pytest.raises(InvalidRequest) as raised:
        ModelSpec(**({"name": "a", "awake_bytes": 1} | fields))
    assert raised.value.param == next(iter(fields))


@pytest.mark.parametrize(
    "fields", [{"max_held": 0}, {"min_awake_s": -1.0}, {"half_life_s": 0.0}, {"evict_depth": Depth.AWAKE}]
)
def test_settings_that_cannot_be_are_refused_by_name(fields):
    """A setting that turns into a loop or a division by zero."""
    with pytest.raises(InvalidRequest) as raised:
        FleetSettings(**fields)
    assert raised.value.param == next(iter(fields))
