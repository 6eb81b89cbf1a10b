"""Whatever happens in whatever order, the scheduler keeps its promises: hypothesis looks for one that breaks them."""

import hypothesis.strategies as st
from fleet_harness import Account
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shuteye.errors import LeaseGone, TransitionConflict
from shuteye.fleet import events
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings

NAMES = ("a", "b", "c", "d", "e", "f")
DEPTHS = (Depth.LEVEL_1, Depth.LEVEL_2, Depth.UNLOADED)
FLEET = FleetSettings(
    max_held=6,
    min_awake_s=2.0,
    sleep_idle_s=20.0,
    sleep_escalate_s=15.0,
    batch_wait_s=3.0,
    fairness_s=1e9,
    half_life_s=60.0,
)


class FleetMachine(RuleBasedStateMachine):
    """Six models at most, of which two to four fit."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(24, FLEET)
        self.account = Account(24, FLEET)
        self.now = 0.0
        self.count = 0

    def tell(self, event):
        try:
            decided = self.scheduler.handle(event, self.now)
        except (LeaseGone, TransitionConflict):
            decided = self.scheduler.handle(events.Tick(), self.now)
            self.account.carry_out(decided, self.now)
            return False
        self.account.carry_out(decided, self.now)
        while (at := self.scheduler.next_tick_at) is not None and at <= self.now:
            self.account.carry_out(self.scheduler.handle(events.Tick(), self.now), self.now)
        lost = self.account.lost_wakes()
        assert not lost, f"nobody wakes {lost}, for which there is room"
        return True

    @initialize(sizes=st.lists(st.integers(1, 12), min_size=3, max_size=6), data=st.data())
    def begin(self, sizes, data):
        for name, nbytes in zip(NAMES, sizes, strict=False):
            one = ModelSpec(
                name=name,
                awake_bytes=nbytes,
                growth_bytes=data.draw(st.integers(0, 4)),
                level_1_bytes=data.draw(st.none() | st.integers(0, min(2, nbytes))),
                level_2_bytes=data.draw(st.none() | st.integers(0, min(1, nbytes))),
                priority=data.draw(st.integers(0, 1)),
                on_sleeping_request=data.draw(st.sampled_from([None, "reject", "hold", "wake"])),
            )
            self.account.add(one)
            self.tell(events.ModelAdded(one))

    # --- requests -------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        seconds=st.sampled_from([0.0, 1.0, 5.0, 60.0]),
        keep=st.sampled_from([None, None, 0.0, 5.0, -1.0]),
    )
    def request(self, data, seconds, keep):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        self.count += 1
        request_id = f"r{self.count}"
        self.account.held[request_id] = (model, self.now + seconds if seconds else self.now + 1e-9)
        self.tell(events.RequestArrived(model, request_id, self.account.held[request_id][1], keep))

    @precondition(lambda self: self.account.running)
    @rule(data=st.data())
    def finish(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.account.running)))
        del self.account.running[request_id]
        self.tell(events.RequestFinished(request_id))

    @precondition(lambda self: self.account.held)
    @rule(data=st.data())
    def client_goes(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.account.held)))
        self.account.held.pop(request_id)
        self.account.answered.add(request_id)
        self.tell(events.RequestFinished(request_id))

    # --- transitions ----------------------------------------------------------------------------

    def moving(self):
        return sorted(filter(self.account.in_transition, self.account.specs))

    @precondition(lambda self: self.moving())
    @rule(data=st.data(), part=st.sampled_from([1.0, 1.0, 0.5]), seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def arrives(self, data, part, seconds):
        model = data.draw(st.sampled_from(self.moving()))
        expected = self.account.size(model, self.account.targets[model])
        if self.account.targets[model] is Depth.AWAKE:
            expected -= self.account.specs[model].growth_bytes
        nbytes = int(expected * part)
        self.account.arrive(model, nbytes, self.now)
        self.tell(events.TransitionFinished(model, nbytes, seconds))

    @precondition(lambda self: self.moving())
    @rule(data=st.data())
    def fails(self, data):
        model = data.draw(st.sampled_from(self.moving()))
        self.account.go_back(model)
        self.tell(events.TransitionFailed(model))

    @rule(data=st.data())
    def dies(self, data):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        self.account.depths[model] = self.account.targets[model] = Depth.UNLOADED
        self.account.owners[model] = SleepOwner.FLEET
        self.account.paused.discard(model)
        self.account.writing.discard(model)
        self.tell(events.ModelLost(model))

    # --- time -----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0, 10.0]))
    def time_passes(self, seconds):
        until = self.now + seconds
        while (at := self.scheduler.next_tick_at) is not None and at <= until:
            self.now = max(self.now, at)
            self.tell(events.Tick())
        self.now = until
        self.tell(events.Tick())

    # --- operators ------------------------------------------------------------------------------

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        (self.account.pinned.add if pinned else self.account.pinned.discard)(model)
        self.tell(events.PinChanged(model, pinned))

    @rule(data=st.data(), paused=st.booleans(), refuses=st.booleans())
    def pause(self, data, paused, refuses):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        (self.account.paused.add if paused else self.account.paused.discard)(model)
        self.tell(events.PauseChanged(model, paused, refuses))

    @rule(data=st.data(), held=st.booleans())
    def write_weights(self, data, held):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        (self.account.writing.add if held else self.account.writing.discard)(model)
        self.tell(events.WeightSessionChanged(model, held))

    @rule(data=st.data(), depth=st.sampled_from(DEPTHS))
    def operator_sleeps(self, data, depth):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        before = self.account.owners[model]
        if self.account.targets[model] is not Depth.AWAKE:
            self.account.owners[model] = SleepOwner.OPERATOR
        if not self.tell(events.SleepAsked(model, depth)):
            self.account.owners[model] = before

    @rule(data=st.data())
    def operator_wakes(self, data):
        model = data.draw(st.sampled_from(sorted(self.account.specs)))
        self.count += 1
        request_id = f"w{self.count}"
        self.account.held[request_id] = (model, self.now + 5.0)
        if self.account.depths[model] is not Depth.AWAKE:
            self.account.owners[model] = SleepOwner.FLEET
        self.account.by_operator.add(request_id)
        self.tell(events.WakeAsked(model, request_id, self.now + 5.0))

    # --- bytes ----------------------------------------------------------------------------------

    @rule(budget=st.integers(8, 30))
    def budget_changes(self, budget):
        self.account.budget = budget
        self.tell(events.BudgetChanged(budget))

    @rule(
        nbytes=st.integers(1, 20),
        within=st.sampled_from([0.5, 5.0]),
        ttl=st.sampled_from([1.0, 8.0, 40.0]),
        restore=st.booleans(),
    )
    def claim(self, nbytes, within, ttl, restore):
        self.count += 1
        lease_id = f"l{self.count}"
        self.account.claims[lease_id] = (nbytes, ttl)
        self.tell(events.LeaseClaimed(lease_id, nbytes, within, ttl, restore=restore))

    @precondition(lambda self: self.account.leases)
    @rule(data=st.data(), ttl=st.sampled_from([1.0, 30.0]))
    def renew(self, data, ttl):
        lease_id = data.draw(st.sampled_from(sorted(self.account.leases)))
        nbytes, _ = self.account.leases[lease_id]
        self.account.leases[lease_id] = (nbytes, self.now + ttl)
        assert self.tell(events.LeaseRenewed(lease_id, ttl))

    @precondition(lambda self: self.account.leases or self.account.claims)
    @rule(data=st.data())
    def release(self, data):
        lease_id = data.draw(st.sampled_from(sorted({**self.account.leases, **self.account.claims})))
        self.tell(events.LeaseReleased(lease_id))

    def teardown(self):
        """Everything ends: every request has been answered, by its deadline at the latest."""
        self.now += 1000.0
        self.tell(events.Tick())
        assert not self.account.held, f"{sorted(self.account.held)} were never answered"
        assert not self.account.leases


FleetMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class TestScheduler(FleetMachine.TestCase):
    """The budget exceeded, something busy or pinned evicted, a request answered twice or late, a wake forgotten."""
