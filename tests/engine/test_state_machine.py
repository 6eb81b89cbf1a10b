"""Random sequences of calls and requests against a model of the transition table."""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shuteye.calls import PauseCall, ReloadCall, ResumeCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import ModelPaused, ModelSleeping, ShuteyeError, TransitionConflict
from shuteye.state import TAGS
from shuteye.tasks.generate.requests import SamplingParams

PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (9, 20), (4, 40))]
TAG_CHOICES = st.sampled_from([None, ("weights",), ("kv_cache",), TAGS])
MODES = st.sampled_from(["abort", "wait", "keep"])
LENGTH = 16


class Truth:
    """One engine core for all examples, and what its model says with the image's weights and with updated ones."""

    def __init__(self, harness):
        self.harness = harness
        self.seen = Counter()  # (call, whether it was legal)
        self.params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
        self.image = {name: tensor.clone() for name, tensor in harness.tensors().items()}
        self.updated_tensors = self.image | {"model.norm.weight": -self.image["model.norm.weight"]}
        self.expected = {False: self.answers()}
        harness.call(UpdateCall(named_tensors=list(self.updated_tensors.items())))
        self.expected[True] = self.answers()
        assert self.expected[True] != self.expected[False]

    def answers(self):
        return [self.harness.generate(prompt, self.params) for prompt in PROMPTS]

    def begin(self):
        """Awake, open, idle, with the image's weights, whatever the last example left behind."""
        self.harness.call(PauseCall("abort"))
        self.harness.call(SleepCall(2))
        self.harness.call(WakeCall())
        self.harness.call(ResumeCall())
        self.harness.run()
        self.harness.tokens.clear()
        self.harness.ended.clear()


class Machine(RuleBasedStateMachine):
    """The model: residencies, pause and level-0 flags, and which weights are true."""

    truth = None  # set by the test

    @initialize()
    def start(self):
        self.harness, self.params = self.truth.harness, self.truth.params
        self.truth.begin()
        self.weights, self.kv = "resident", "resident"
        self.updated = False  # whether the true weights are the updated ones
        self.paused = self.refusing = self.dozing = False
        self.held = {}  # request id → prompt index, for requests still on their way
        self.count = 0

    # --- the model of the table -----------------------------------------------------------------

    @property
    def awake(self):
        return self.weights == self.kv == "resident"

    @property
    def open(self):
        return self.awake and not self.paused and not self.dozing

    def outcome(self, call):
        """Run a call: True if it was served, False on a conflict."""
        legal = True
        try:
            self.harness.call(call)
        except TransitionConflict:
            legal = False
        self.truth.seen[type(call).__name__, legal] += 1
        return legal

    def settle(self, mode):
        """What a drain did to the requests on their way."""
        if mode == "abort":
            for request_id in self.held:
                assert self.harness.ended.pop(request_id) == "abort"
            self.held.clear()

    # --- calls ----------------------------------------------------------------------------------

    @rule(level=st.sampled_from([1, 2]), mode=MODES)
    def sleep_wholly(self, level, mode):
        self.sleep(level, None, mode)

    @rule()
    def wake_piecemeal_from_level_2(self):
        if self.weights in ("resident", "discarded"):
            self.sleep(2, None, "keep")
            self.wake(("weights",))
            self.wake(("kv_cache",))

    @rule()
    def wake_wholly(self):
        self.wake(None)

    @rule(level=st.sampled_from([0, 1, 2]), tags=TAG_CHOICES, mode=MODES)
    def sleep(self, level, tags, mode):
        chosen = TAGS if tags is None or level == 0 else tags
        if level == 0:
            legal, changes = self.awake, self.awake and not self.dozing
        else:
            target = "offloaded" if level == 1 else "discarded"
            legal = not ("weights" in chosen and level == 1 and self.weights in ("discarded", "blank"))
            changes = legal and (
                ("weights" in chosen and self.weights != target) or ("kv_cache" in chosen and self.kv == "resident")
            )
        assert self.outcome(SleepCall(level, tags=tags, mode=mode)) == legal
        if legal:
            self.settle(mode)
        if not changes:
            return
        if level == 0:
            self.dozing = True
            return
        if "weights" in chosen:
            self.weights = target
            self.updated = self.updated and level == 1
        if "kv_cache" in chosen:
            self.kv = "discarded"

    @rule(tags=TAG_CHOICES)
    def wake(self, tags):
        chosen = TAGS if tags is None else tags
        full = (self.weights == "resident" or "weights" in chosen) and (self.kv == "resident" or "kv_cache" in chosen)
        weights = self.weights
        if "weights" in chosen:
            table = {"offloaded": "resident", "discarded": "resident" if full else "blank", "blank": "blank"}
            weights = table.get(weights, weights)
        wants_kv = "kv_cache" in chosen and self.kv != "resident"
        legal = not (self.weights == "blank" and "weights" in chosen and full) and not (
            wants_kv and weights in ("blank", "discarded")
        )
        was_awake, changes = self.awake, weights != self.weights or wants_kv
        assert self.outcome(WakeCall(tags)) == legal
        if legal:
            self.weights = weights
            self.kv = "resident" if wants_kv else self.kv
            if changes or was_awake:
                self.dozing = False

    @rule(mode=MODES)
    def pause(self, mode):
        self.harness.call(PauseCall(mode))
        self.settle(mode)
        self.paused, self.refusing = True, mode != "keep"

    @rule()
    def resume(self):
        legal = self.awake
        assert self.outcome(ResumeCall()) == legal
        if legal:
            self.paused = self.refusing = self.dozing = False

    @rule(new=st.booleans())
    def update(self, new):
        tensors = self.truth.updated_tensors if new else self.truth.image
        legal = self.weights in ("resident", "blank")
        assert self.outcome(UpdateCall(named_tensors=list(tensors.items()))) == legal
        if legal:
            self.forget_held()
            self.weights, self.updated = "resident", new

    @rule()
    def reload(self):
        legal = self.weights in ("resident", "blank")
        assert self.outcome(ReloadCall()) == legal
        if legal:
            self.forget_held()
            self.weights, self.updated = "resident", False

    def forget_held(self):
        """New weights: what is on its way may mix tokens of both; it must still end, with its full length."""
        self.held = dict.fromkeys(self.held)

    # --- requests -------------------------------------------------------------------------------

    @rule(index=st.integers(0, len(PROMPTS) - 1), steps=st.integers(0, 6))
    def request(self, index, steps):
        self.count += 1
        request_id = f"request-{self.count}"
        self.harness.add(request_id, PROMPTS[index], self.params)
        for _ in range(steps):
            self.harness.step()
        if self.awake and not self.refusing:
            self.held[request_id] = index
        else:
            self.harness.step()
            assert isinstance(self.harness.ended.pop(request_id), ModelPaused if self.awake else ModelSleeping)

    @invariant()
    def the_engine_agrees_with_the_model(self):
        if not hasattr(self, "harness"):
            return
        state = self.harness.core.state
        assert {tag.tag: tag.residency for tag in state.tags} == {"weights": self.weights, "kv_cache": self.kv}
        assert (state.gate == "open") == self.open
        assert state.is_sleeping == (not self.awake)
        assert (state.paused, state.refusing) == (self.paused or self.dozing, self.refusing)
        assert state.faulted is None
        assert bool(state.missing) == (self.weights == "blank")
        for tag in state.tags:
            if tag.residency not in ("resident", "blank"):
                assert tag.resident_bytes == 0
        if self.open:
            self.harness.run()
        self.check_ended()

    def check_ended(self):
        for request_id in list(self.held):
            ended = self.harness.ended.get(request_id)
            if ended is None:
                assert not self.open, "a request was lost"
                continue
            index = self.held.pop(request_id)
            assert not isinstance(ended, ShuteyeError), ended
            if ended == "length":
                assert len(self.harness.tokens[request_id]) == LENGTH
            if ended == "length" and index is not None:
                expected = [self.truth.expected[updated][index] for updated in (False, True)]
                assert self.harness.tokens[request_id] in expected
                if request_id == f"request-{self.count}":
                    assert self.harness.tokens[request_id] == self.truth.expected[self.updated][index]


def test_random_sequences_follow_the_table(harness):
    """Would catch any order of calls and requests after which the engine does something the table does not say."""
    Machine.truth = Truth(harness)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    often = ["SleepCall", "WakeCall", "UpdateCall", "ReloadCall", "ResumeCall"]
    assert all(Machine.truth.seen[name, legal] >= 3 for name in often for legal in (True, False)), Machine.truth.seen
