"""A scheduler of models, driven by hand: events in, what it decided by name, and an account of its own.

The account knows nothing of how the scheduler counts: it is made of what was told and what was decided.
"""

from shuteye.fleet import events
from shuteye.fleet.actions import Admit, EndLease, GrantLease, Refuse, RefuseLease, Sleep, Wake
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings

SETTINGS = FleetSettings(min_awake_s=0.0, batch_wait_s=0.0)


def spec(name, nbytes=10, **others):
    """A model that leaves nothing behind at level 1, unless told otherwise."""
    return ModelSpec(name=name, awake_bytes=nbytes, **({"level_1_bytes": 0, "wake_s": 1.0} | others))


class FleetHarness:
    """A scheduler, a clock, and short words for events."""

    def __init__(self, budget, *specs, settings=SETTINGS):
        self.scheduler = Scheduler(budget, settings)
        self.now = 0.0
        self.count = 0
        for one in specs:
            self.tell(events.ModelAdded(one))

    def tell(self, event, *, after=0.0):
        """Everything that is decided over one event, some seconds after the last."""
        self.now += after
        return list(self.scheduler.handle(event, self.now))

    def tick(self, after=0.0):
        return self.tell(events.Tick(), after=after)

    def request(self, model, *, deadline=60.0, after=0.0, **others):
        """Ask for a model; returns the request's id and what was decided."""
        self.now += after
        self.count += 1
        request_id = f"{model}-{self.count}"
        return request_id, self.tell(events.RequestArrived(model, request_id, self.now + deadline, **others))

    def finish(self, request_id, **others):
        return self.tell(events.RequestFinished(request_id), **others)

    def done(self, model, resident=None, *, seconds=1.0, after=0.0):
        """End the transition of a model as planned, or with other bytes resident."""
        if resident is None:
            status = self.status(model)
            entry = self.scheduler._fleet.entries[model]
            resident = entry.spec.estimated_bytes(entry.target)
            assert status.phase.in_transition
        return self.tell(events.TransitionFinished(model, resident, seconds), after=after)

    def fail(self, model, **others):
        return self.tell(events.TransitionFailed(model, "Injected."), **others)

    def wake(self, model):
        """Have a model awake and idle, by a request that is over at once."""
        request_id, decided = self.request(model)
        while not admitted(decided):
            for victim in [one.model for one in decided if isinstance(one, Sleep)]:
                decided = self.done(victim)
            if any(isinstance(one, Wake) for one in decided):
                decided = self.done(model)
        self.finish(request_id)

    def claim(self, lease_id="lease", nbytes=10, *, within=10.0, ttl=60.0, **others):
        return self.tell(events.LeaseClaimed(lease_id, nbytes, within, ttl, **others))

    def status(self, model):
        return self.scheduler.model(model)

    def is_awake(self, model):
        return self.status(model).phase is Phase.AWAKE


def woken(decided):
    return [one.model for one in decided if isinstance(one, Wake)]


def slept(decided):
    return [one.model for one in decided if isinstance(one, Sleep)]


def admitted(decided):
    return [one.request_id for one in decided if isinstance(one, Admit)]


def refused(decided):
    """Why requests were refused, by id."""
    return {one.request_id: one.why for one in decided if isinstance(one, Refuse)}


def only(decided, kind):
    """The one action of a kind."""
    (found,) = [one for one in decided if isinstance(one, kind)]
    return found


class Account:
    """What a machine would hold, by what was decided and told; raises where a promise is broken.

    Attributes:
        taken: bytes of models by larger ends, with growth, and of granted leases.
    """

    def __init__(self, budget, settings):
        self.budget, self.settings = budget, settings
        self.specs, self.depths, self.targets, self.measured = {}, {}, {}, {}
        self.running, self.held, self.answered = {}, {}, set()
        self.owners, self.awake_since, self.no_sleep_until = {}, {}, {}
        self.pinned, self.paused, self.writing = set(), set(), set()
        self.leases, self.claims = {}, {}
        self.by_operator = set()
        self.was_taken = 0

    def add(self, one):
        self.specs[one.name] = one
        self.depths[one.name] = self.targets[one.name] = Depth.UNLOADED
        self.owners[one.name] = SleepOwner.FLEET
        if one.pinned:
            self.pinned.add(one.name)

    def size(self, model, depth):
        nbytes = None
        for above in range(depth + 1):  # what was not measured is as estimated, but no more than one depth above
            estimate = self.specs[model].estimated_bytes(Depth(above))
            most = estimate if nbytes is None else min(estimate, nbytes)
            nbytes = self.measured.get((model, above), most)
        return nbytes + (self.specs[model].growth_bytes if depth is Depth.AWAKE else 0)

    @property
    def taken(self):
        models = sum(max(self.size(one, self.depths[one]), self.size(one, self.targets[one])) for one in self.specs)
        return models + sum(nbytes for nbytes, _ in self.leases.values())

    def running_on(self, model):
        return [one for one, name in self.running.items() if name == model]

    def held_on(self, model):
        return [one for one, (name, _) in self.held.items() if name == model]

    def in_transition(self, model):
        return self.depths[model] is not self.targets[model]

    # --- what was decided -----------------------------------------------------------------------

    def carry_out(self, decided, now):
        for one in decided:
            match one:
                case Wake():
                    self._wake(one)
                case Sleep():
                    self._sleep(one, now)
                case Admit():
                    self._admit(one, now)
                case Refuse():
                    self._answer(one.request_id)
                case GrantLease(dry_run=False):
                    nbytes, ttl = self.claims.pop(one.lease_id)
                    assert one.nbytes == nbytes
                    self.leases[one.lease_id] = (nbytes, now + ttl)
                case RefuseLease(dry_run=False):
                    self.claims.pop(one.lease_id)
                case EndLease():
                    assert (self.leases.pop(one.lease_id, None) or self.claims.pop(one.lease_id, None)) is not None
        taken = self.taken
        assert taken <= max(self.budget, self.was_taken), f"{taken} of {self.budget} are taken"
        self.was_taken = taken
        late = [one for one, (_, deadline) in self.held.items() if deadline <= now]
        assert not late, f"{late} still wait after their deadline"
        assert not [one for one, (_, ends) in self.leases.items() if ends <= now], "a lease outlives its end"

    def _wake(self, action):
        assert not self.in_transition(action.model)
        assert self.depths[action.model] is action.depth is not Depth.AWAKE
        self.targets[action.model] = Depth.AWAKE

    def _sleep(self, action, now):
        model = action.model
        assert not self.in_transition(model), f"{model} sleeps in the middle of a transition"
        assert action.depth > self.depths[model]
        if action.owner is not SleepOwner.OPERATOR:
            assert not self.running_on(model), f"{model} sleeps while requests run"
            assert not self.held_on(model), f"{model} sleeps while requests wait for it"
            assert model not in self.pinned | self.paused | self.writing, f"{model} is protected"
            if self.depths[model] is Depth.AWAKE and action.owner is SleepOwner.FLEET and self.was_taken <= self.budget:
                assert now >= self.awake_since[model] + self.settings.min_awake_s, f"{model} has just woken"
        if self.depths[model] is Depth.AWAKE:
            self.owners[model] = action.owner
        self.targets[model] = action.depth

    def _admit(self, action, now):
        assert self.depths[action.model] is self.targets[action.model] is Depth.AWAKE, "admitted to a model that sleeps"
        model, deadline = self._answer(action.request_id)
        assert model == action.model
        assert now <= deadline
        if action.request_id not in self.by_operator:
            self.running[action.request_id] = model

    def _answer(self, request_id):
        assert request_id not in self.answered, f"{request_id} is answered twice"
        self.answered.add(request_id)
        return self.held.pop(request_id)

    # --- what was told --------------------------------------------------------------------------

    def arrive(self, model, nbytes, now):
        """The transition of a model has ended, with so many bytes resident."""
        self.depths[model] = self.targets[model]
        self.measured[model, self.depths[model]] = nbytes
        if self.depths[model] is Depth.AWAKE:
            self.awake_since[model] = now

    def go_back(self, model):
        self.targets[model] = self.depths[model]

    def lost_wakes(self):
        """Models that would fit beside all others, that requests wait for, and that nobody wakes."""
        if self.claims or any(map(self.in_transition, self.specs)):
            return []
        free = self.budget - self.taken
        return [
            model
            for model in self.specs
            if self.held_on(model)
            and self.owners[model] in (SleepOwner.IDLE, SleepOwner.FLEET)
            and model not in self.paused
            and self.size(model, Depth.AWAKE) - self.size(model, self.depths[model]) <= free
        ]
