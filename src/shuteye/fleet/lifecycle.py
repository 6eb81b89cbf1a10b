"""What happens to models: added, changed and removed, transitions that end, operators' calls, and idleness."""

from __future__ import annotations

from shuteye.errors import InternalError, InvalidRequest, TransitionConflict
from shuteye.fleet import events
from shuteye.fleet.actions import Refusal
from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.fleet_state import FleetState
from shuteye.fleet.leases import Leases
from shuteye.fleet.model_spec import Depth, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.requests import Requests
from shuteye.fleet.timers import Due
from shuteye.fleet.waking import Waking


class Lifecycle:
    """The models of a fleet, from the first event about each to the last."""

    def __init__(self, fleet: FleetState, requests: Requests, waking: Waking, leases: Leases) -> None:
        self._fleet = fleet
        self._requests = requests
        self._waking = waking
        self._leases = leases

    # --- models ---------------------------------------------------------------------------------

    def add(self, event: events.ModelAdded) -> None:
        """There is one more model, or one again that was to go."""
        fleet, spec = self._fleet, event.spec
        known = fleet.entries.get(spec.name)
        if known is not None and not known.retiring:
            raise InvalidRequest(f"There is a model {spec.name!r} in the fleet.", param="model")
        if known is not None:
            known.retiring = False
            self._adopt(known, event)
            return
        entry = ModelEntry(spec, event.depth, event.resident_bytes, fleet.now)
        fleet.entries[spec.name] = entry
        fleet.ranking.revalue(entry, fleet.now)
        self._prepare(entry)

    def change(self, event: events.ModelChanged) -> None:
        """A model has other settings."""
        self._adopt(self._fleet.entry(event.spec.name), event)

    def _adopt(self, entry: ModelEntry, event: events.ModelAdded | events.ModelChanged) -> None:
        entry.spec, entry.pinned = event.spec, event.spec.pinned
        self._restart_idleness(entry)
        self._prepare(entry)

    def _prepare(self, entry: ModelEntry) -> None:
        """Set times of a model whose settings are new, and wish it awake if it is to be."""
        if entry.spec.prewarm and entry.phase is Phase.ASLEEP:
            self._waking.wish(entry)
        elif not entry.spec.prewarm and entry.lease_id is None:
            self._waking.wish_no_longer(entry)
        self._fleet.refresh(entry)
        self._time_escalation(entry)
        self._requests.review(entry)

    def remove(self, event: events.ModelRemoved) -> None:
        """A model is to go."""
        entry = self._fleet.entry(event.model)
        entry.retiring = True
        entry.asked_depth = None
        self._waking.wish_no_longer(entry)
        self._leases.let_go(entry)
        self._requests.refuse_all(entry, Refusal.REMOVED)
        self._fleet.touch(entry)
        self.retire(entry)

    def retire(self, entry: ModelEntry) -> None:
        """Unload a model that is to go, once nothing runs on it; then forget it."""
        if not entry.retiring or entry.running or entry.phase.in_transition:
            return
        if entry.depth is Depth.UNLOADED:
            self._fleet.forget(entry)
        else:
            self._fleet.sleep(entry, Depth.UNLOADED, SleepOwner.FLEET)

    def lose(self, event: events.ModelLost) -> None:
        """A model's process has ended by itself, and with it a transition under way."""
        entry = self._fleet.entry(event.model)
        waking = entry.phase is Phase.WAKING
        entry.lose()
        entry.asked_depth = None
        self._leases.let_go(entry)
        self._fleet.refresh(entry)
        if waking:
            self._requests.refuse_all(entry, Refusal.WAKE_FAILED, "Its process ended.")
        self._after(entry)

    # --- transitions ----------------------------------------------------------------------------

    def finish(self, event: events.TransitionFinished) -> None:
        """A wake or sleep is done."""
        entry = self._in_transition(event.model)
        if event.resident_bytes < 0 or not event.seconds >= 0:
            raise InternalError(f"{event} has a negative number.")
        before = entry.charged_bytes
        entry.arrive(event.resident_bytes, event.seconds, self._fleet.now)
        if entry.phase is Phase.AWAKE:
            self._fleet.ranking.revalue(entry, self._fleet.now)
            self._leases.let_go(entry)
        self._fleet.refresh(entry)
        if entry.phase is Phase.AWAKE:
            self._requests.admit_all(entry)
        else:
            self._leases.note_sleep(entry, before - entry.charged_bytes)
        self._after(entry)

    def fail(self, event: events.TransitionFailed) -> None:
        """A wake or sleep was rolled back."""
        entry = self._in_transition(event.model)
        waking = entry.phase is Phase.WAKING
        entry.go_back()
        entry.no_sleep_until = self._fleet.now + self._fleet.settings.retry_s
        entry.asked_depth = None
        self._leases.let_go(entry)
        self._fleet.refresh(entry)
        if waking:
            self._waking.wish_no_longer(entry)
            self._requests.refuse_all(entry, Refusal.WAKE_FAILED, event.error)
        elif entry.phase is Phase.AWAKE:
            self._requests.admit_all(entry)
        self._fleet.recheck_at(entry.no_sleep_until)
        self._after(entry)

    def _in_transition(self, model: str) -> ModelEntry:
        entry = self._fleet.entry(model)
        if not entry.phase.in_transition:
            raise InternalError(f"The model {model} is {entry.phase.value}: there is no transition that could end.")
        return entry

    def _after(self, entry: ModelEntry) -> None:
        """What follows from where a model has got to."""
        if entry.retiring:
            self.retire(entry)
            return
        if entry.asked_depth is not None:
            depth, entry.asked_depth = entry.asked_depth, None
            self._sleep_for_operator(entry, max(depth, entry.depth))
        self._time_escalation(entry)
        self._requests.review(entry)

    # --- operators ------------------------------------------------------------------------------

    def sleep_by_operator(self, event: events.SleepAsked) -> None:
        """An operator puts a model to sleep."""
        entry = self._fleet.entry(event.model)
        if event.depth is Depth.AWAKE:
            raise InvalidRequest(
                "The depth of a sleep is 1, 2 or 3; to wake a model there is WakeAsked.", param="level"
            )
        if event.depth < entry.depth or (entry.target is not Depth.AWAKE and event.depth < entry.target):
            raise TransitionConflict(
                f"{entry.name} sleeps more deeply than level {event.depth.value}; wake it up first."
            )
        self._waking.wish_no_longer(entry)
        if entry.phase.in_transition:
            self._sleep_after_transition(entry, event.depth)
        else:
            self._sleep_for_operator(entry, event.depth)
        self._requests.review(entry)

    def _sleep_after_transition(self, entry: ModelEntry, depth: Depth) -> None:
        if entry.target is not Depth.AWAKE:
            self._own(entry)
        if entry.target != depth:
            entry.asked_depth = depth

    def _sleep_for_operator(self, entry: ModelEntry, depth: Depth) -> None:
        self._own(entry)
        if entry.depth != depth:
            self._fleet.sleep(entry, depth, SleepOwner.OPERATOR)

    def _own(self, entry: ModelEntry) -> None:
        """From now on a model sleeps because an operator wants it."""
        self._leases.let_go(entry)
        entry.owner = SleepOwner.OPERATOR
        self._fleet.timers.cancel((Due.ESCALATE, entry.name))
        self._fleet.touch(entry)

    def wake_by_operator(self, event: events.WakeAsked) -> None:
        """An operator wakes a model."""
        self._requests.arrive_by_operator(event)

    def pin(self, event: events.PinChanged) -> None:
        """A model is pinned, or no longer."""
        entry = self._fleet.entry(event.model)
        entry.pinned = event.pinned
        self._restart_idleness(entry)
        self._fleet.refresh(entry)

    def pause(self, event: events.PauseChanged) -> None:
        """A pause begins or ends."""
        entry = self._fleet.entry(event.model)
        entry.paused, entry.refuses = event.paused, event.paused and event.refuses
        self._fleet.refresh(entry)
        self._requests.review(entry)

    def hold_weights(self, event: events.WeightSessionChanged) -> None:
        """Somebody begins or ends to write weights."""
        entry = self._fleet.entry(event.model)
        entry.weight_session = event.held
        self._fleet.refresh(entry)

    def update_weights(self, event: events.WeightsUpdated) -> None:
        """A model's weights are not its image's, or are again."""
        entry = self._fleet.entry(event.model)
        entry.weights_updated = event.updated
        self._fleet.refresh(entry)

    # --- measurements ---------------------------------------------------------------------------

    def measure(self, event: events.ResidentMeasured) -> None:
        """What a model takes has been measured again."""
        entry = self._fleet.entry(event.model)
        if event.resident_bytes < 0:
            raise InternalError(f"{event} has a negative number.")
        if not entry.phase.in_transition:
            entry.resident_bytes = event.resident_bytes
            if entry.phase is Phase.ASLEEP:
                entry.measured[entry.depth] = event.resident_bytes
            self._fleet.refresh(entry)

    # --- idleness -------------------------------------------------------------------------------

    def keep_alive(self, event: events.KeepAliveChanged) -> None:
        """How long a model stays awake without a request has changed."""
        entry = self._fleet.entry(event.model)
        entry.keep_alive_s = event.keep_alive_s
        self._restart_idleness(entry)
        self._fleet.touch(entry)

    def _restart_idleness(self, entry: ModelEntry) -> None:
        """Have a model's idle time begin now; set by the next `refresh` or `touch`."""
        self._fleet.timers.cancel((Due.IDLE, entry.name))

    def sleep_idle(self, model: str) -> None:
        """A model has been idle for as long as it may."""
        entry = self._fleet.entries[model]
        assert self._fleet.may_idle(entry), "its time was not cancelled"
        depth = entry.spec.sleep_idle_depth or self._fleet.settings.sleep_idle_depth
        self._fleet.sleep(entry, min(depth, entry.deepest), SleepOwner.IDLE)

    def _time_escalation(self, entry: ModelEntry) -> None:
        """Set when a model sleeps more deeply, if it is to."""
        key, spec_s = (Due.ESCALATE, entry.name), entry.spec.sleep_escalate_s
        seconds = self._fleet.settings.sleep_escalate_s if spec_s is None else spec_s
        if seconds < 0 or not self._may_deepen(entry):
            self._fleet.timers.cancel(key)
        elif self._fleet.timers.at(key) is None:
            self._fleet.timers.set(key, self._fleet.now + seconds)

    @staticmethod
    def _may_deepen(entry: ModelEntry) -> bool:
        own = entry.owner in (SleepOwner.IDLE, SleepOwner.FLEET)
        return entry.phase is Phase.ASLEEP and own and entry.depth < entry.deepest and not entry.is_protected

    def deepen(self, model: str) -> None:
        """A model has slept at one depth for as long as it should."""
        entry = self._fleet.entries[model]
        if self._may_deepen(entry) and not entry.held:
            self._fleet.sleep(entry, Depth(entry.depth + 1), entry.owner)
