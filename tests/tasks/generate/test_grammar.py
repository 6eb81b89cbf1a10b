"""Requests with a grammar on the core over a tiny real model: joined, masked, preempted, slept through, ended."""

import itertools
import json
import re
import sys
import threading
import time

import pytest

from shuteye.calls import SleepCall, WakeCall
from shuteye.errors import InternalError, InvalidRequest, ModelSleeping, QueueFull
from shuteye.tasks.generate.requests import SamplingParams, StructuredOutputsParams
from shuteye.tokenizer import Tokenizer

PROMPT = tuple(range(3, 40))
DIGITS = r"[0-9]{3}-[0-9]{4}"
LONG = "x[0-9]{40}y"


def structured(*, max_tokens=200, **wanted):
    return SamplingParams(
        temperature=1.0, max_tokens=max_tokens, seed=1, structured_outputs=StructuredOutputsParams(**wanted)
    )


@pytest.fixture
def text_of(tiny_checkpoint):
    """The text of token ids, without what ends it."""
    return Tokenizer.from_directory(tiny_checkpoint).decode


def settle(harness):
    """Let every grammar in the background be compiled, and let its request join."""
    deadline = time.monotonic() + 10
    while harness.core._scheduler._grammars.num_compiling:
        assert time.monotonic() < deadline
        harness.step()


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": DIGITS}, DIGITS),
        ({"choice": ["red", 'a"b\\c', "grün"]}, r'red|a"b\\c|grün'),
        ({"grammar": 'start: "a"+ "b"'}, "a{1,199}b"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"json": {"enum": [1, "two"]}}, r'1|"two"'),
        ({"json": '{"type": "boolean"}'}, "true|false"),
    ],
)
def test_random_weights_write_what_the_grammar_wants(harness, text_of, wanted, pattern):
    """A mask that is off by a token, applied to another row, or not at all: a random model then writes noise."""
    harness.add("plain", PROMPT)
    harness.add("r", PROMPT, structured(**wanted))
    harness.run()
    assert harness.ended["r"] == "stop", harness.ended["r"]
    assert re.fullmatch(pattern, text_of(harness.tokens["r"])), text_of(harness.tokens["r"])
    assert len(harness.tokens["plain"]) == 12


def test_any_json_object_is_one(harness, text_of):
    """`json_object` taken for any JSON value."""
    harness.add("r", PROMPT, structured(json_object=True, max_tokens=200))
    harness.run()
    if harness.ended["r"] == "stop":
        assert isinstance(json.loads(text_of(harness.tokens["r"])), dict)
    assert text_of(harness.tokens["r"]).startswith("{")


def test_whitespace_can_be_refused(harness, text_of):
    """`disable_any_whitespace` ignored."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    harness.add("r", PROMPT, structured(json=schema, disable_any_whitespace=True))
    harness.run()
    assert re.fullmatch(r"\[(true|false)(,(true|false)){2}\]", text_of(harness.tokens["r"]))


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "(a"},
        {"grammar": "start: nothing_known"},
        {"json": {"type": "objekt"}},
        {"json": {"propertyNames": {"pattern": "a"}}},
        {"json": "{"},
        {"json": "[1]"},
    ],
)
def test_a_wrong_grammar_is_the_callers_error_and_names_the_field(harness, wanted):
    """A 500, or an engine that dies of a bad expression; a request that waits for ever."""
    harness.add("r", PROMPT, structured(**wanted, param="guided_x"))
    harness.add("plain", PROMPT)
    harness.run()
    assert isinstance(harness.ended["r"], InvalidRequest)
    assert "guided_x" in harness.ended["r"].message
    assert harness.ended["plain"] == "length"


def test_a_grammar_outlives_preemption_and_a_deep_sleep(make_harness, text_of):
    """Grammar state lost, or advanced twice, when a request is computed anew."""
    undisturbed = make_harness()
    undisturbed.add("r", PROMPT, structured(regex=LONG))
    undisturbed.run()
    harness = make_harness()
    harness.add("r", PROMPT, structured(regex=LONG))
    settle(harness)
    for level in (1, 2):
        for _ in range(6):
            harness.step()
        assert harness.call(SleepCall(level, mode="keep")).held_requests == 1
        harness.call(WakeCall())
    assert 0 < len(harness.tokens["r"]) < 40, "the sleeps were not in its midst"
    harness.run()
    assert re.fullmatch(LONG, text_of(harness.tokens["r"]))
    assert harness.tokens["r"] == undisturbed.tokens["r"]


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_sleep_loses_no_request_whose_grammar_is_being_compiled(harness, text_of, mode):
    """A request that is in neither queue while its grammar is compiled: forgotten by a sleep, or run while asleep."""
    harness.add("r", PROMPT, structured(regex=DIGITS))
    harness.call(SleepCall(1, mode=mode, timeout_s=20))
    assert harness.core.state.is_sleeping
    harness.call(WakeCall())
    harness.run()
    if mode == "abort":
        assert harness.ended["r"] in ("abort", "stop")
    else:
        assert harness.ended["r"] == "stop"
        assert re.fullmatch(DIGITS, text_of(harness.tokens["r"]))


def test_asleep_a_request_is_refused_before_anything_is_compiled(harness):
    """llguidance loaded, and memory taken, only to refuse."""
    harness.call(SleepCall(1))
    harness.add("r", PROMPT, structured(regex=DIGITS))
    harness.step()
    assert isinstance(harness.ended["r"], ModelSleeping)
    assert harness.core._scheduler._grammars._compiler is None


def test_state_is_freed_when_requests_end_and_compiled_grammars_when_asleep(harness):
    """A leak of one matcher per request; a tokenizer that stays in memory over a sleep."""
    grammars = harness.core._scheduler._grammars
    harness.add("stopped", PROMPT, structured(regex=DIGITS))
    harness.add("cut", PROMPT, structured(regex=LONG, max_tokens=3))
    harness.add("aborted", PROMPT, structured(regex=LONG))
    settle(harness)
    harness.step()
    harness.core.abort(["aborted"])
    harness.run()
    assert harness.ended == {"stopped": "stop", "cut": "length", "aborted": "abort"}
    assert grammars.is_idle
    assert grammars._compiler is not None
    harness.call(SleepCall(1))
    assert grammars._compiler is None
    harness.call(WakeCall())
    assert len(harness.generate(PROMPT, structured(regex=DIGITS))) == 9


def test_an_abort_reaches_a_request_that_is_being_compiled(harness):
    """An abort lost between the queues: the request would run for nobody."""
    harness.add("r", PROMPT, structured(regex=LONG))
    harness.core.abort(["r"])
    harness.run()
    assert harness.ended["r"] == "abort"


def test_the_grammar_wins_over_rules_that_leave_no_token(harness, text_of):
    """min_tokens, ignore_eos or a bias that forbid what the grammar demands: noise, or no end."""
    wanted = StructuredOutputsParams(choice=["ab"])
    ab = ord("a"), ord("b")
    params = SamplingParams(
        max_tokens=50, min_tokens=10, ignore_eos=True, structured_outputs=wanted, bad_token_ids=tuple((t,) for t in ab)
    )
    harness.add("r", PROMPT, params)
    harness.run()
    assert (text_of(harness.tokens["r"]), harness.ended["r"], len(harness.tokens["r"])) == ("ab", "stop", 3)


def test_what_comes_before_the_starting_token_is_free(harness, text_of):
    """Reasoning constrained by the grammar of the answer."""
    comma = Tokenizer.from_directory(harness.core.info.tokenizer_dir).encode(",")[0]
    wanted = StructuredOutputsParams(choice=["yes", "no"], starts_after=comma)
    params = SamplingParams(max_tokens=200, seed=3, structured_outputs=wanted, logit_bias={comma: 4.0})
    thought, _, answer = text_of(harness.generate(PROMPT, params)).partition(",")
    assert thought
    assert answer in ("yes", "no")


def test_engines_that_need_no_grammar_never_load_the_library(harness):
    """Start-up time and memory spent for nothing. (Where other tests have loaded it already, only the tokenizer's.)"""
    if "llguidance" not in sys.modules:
        harness.generate(PROMPT)
        assert "llguidance" not in sys.modules
    assert harness.core._scheduler._grammars._compiler is None


def test_exactly_one_kind_of_structure_is_accepted():
    """Two demands, of which one would be dropped silently."""
    with pytest.raises(InvalidRequest, match="json and regex"):
        StructuredOutputsParams(json={}, regex="a")
    with pytest.raises(InvalidRequest, match="none"):
        StructuredOutputsParams()
    with pytest.raises(InvalidRequest, match="choices"):
        StructuredOutputsParams(choice=[])


SURROGATE = "\ud800"


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": "[" * 100_000},
        {"json": '{"not":' * 900 + "{}" + "}" * 900},
        {"regex": SURROGATE},
        {"regex": "(" * 60_000},
        {"grammar": f'start: "{SURROGATE}"'},
        {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
        {"choice": [SURROGATE]},
        {"json": {"const": SURROGATE}},
        {"json": {"maximum": float("inf")}},
        {"json": {"maximum": 10**400}},
        {"json": '{"type": "object"}', "whitespace_pattern": SURROGATE},
    ],
)
def test_a_strange_grammar_ends_its_own_request_alone(harness, wanted):
    """One request's text, nested too deeply, ending the engine for everybody."""
    harness.add("plain", PROMPT)
    harness.add("r", PROMPT, structured(**wanted))
    harness.run()
    assert isinstance(harness.ended["r"], InvalidRequest), harness.ended["r"]
    assert harness.ended["plain"] == "length"
    assert harness.core._scheduler._grammars.is_idle


def test_a_long_chain_of_rules_does_not_overflow_the_stack(harness):
    """A schema whose definitions each refer to the next: the compiler recurses, and the process would die."""
    names = [f"d{index}" for index in range(1000)]
    chain = {one: {"properties": {"x": {"$ref": f"#/$defs/{next_one}"}}} for one, next_one in itertools.pairwise(names)}
    schema = {"$defs": {**chain, names[-1]: {"type": "string"}}, "$ref": "#/$defs/d0"}
    harness.add("r", PROMPT, structured(json=json.dumps(schema), max_tokens=1))
    harness.run()
    assert harness.ended["r"] == "length", harness.ended["r"]


def test_a_grammar_larger_than_the_limit_is_refused_before_it_is_compiled(make_harness):
    """Compilers kept busy for minutes by a few large schemas."""
    harness = make_harness(max_grammar_bytes=1000)
    for name, wanted in {
        "json": {"json": {"enum": ["x" * 1000]}},
        "regex": {"regex": "x" * 1001},
        "choice": {"choice": ["x"] * 1001},
        "space": {"json": "{}", "whitespace_pattern": " " * 1000},
    }.items():
        harness.add(name, PROMPT, structured(**wanted))
        assert harness.core._scheduler._grammars.num_compiling == 0
    harness.run()
    assert all("1,000 bytes" in ended.message for ended in harness.ended.values()), harness.ended


class SlowCompiler:
    """Stands in for the one that compiles: every grammar takes until `go` is set."""

    def __init__(self, harness):
        grammars = harness.core._scheduler._grammars
        self.compiler = grammars._new_compiler()
        self.begun = []
        self.go = threading.Event()
        grammars._compiler = self

    def matcher(self, wanted):
        self.begun.append(wanted.regex)
        assert self.go.wait(20)
        return self.compiler.matcher(wanted)

    def drop(self):
        self.compiler.drop()


def test_a_cancelled_grammar_is_not_compiled(harness):
    """A caller who gave up still keeping those behind it waiting."""
    slow = SlowCompiler(harness)
    for name in "abc":
        harness.add(name, PROMPT, structured(regex=name))
    while not slow.begun:
        time.sleep(0.001)
    harness.core.abort(["a", "b"])
    slow.go.set()
    harness.run()
    assert slow.begun == ["a", "c"]
    assert (harness.ended["b"], harness.ended["c"]) == ("abort", "stop")


def test_a_grammar_that_takes_too_long_is_given_up(make_harness):
    """One that never comes to an end, and requests that wait for it for ever."""
    harness = make_harness(grammar_timeout_s=0.05)
    slow = SlowCompiler(harness)
    harness.add("first", PROMPT, structured(regex="a"))
    while not slow.begun:
        time.sleep(0.001)
    harness.add("second", PROMPT, structured(regex="b"))
    deadline = time.monotonic() + 20
    while len(harness.ended) < 2:
        assert time.monotonic() < deadline
        harness.step()
    assert isinstance(harness.ended["first"], InvalidRequest)
    assert isinstance(harness.ended["second"], QueueFull)
    assert harness.core._scheduler._grammars.is_idle
    slow.go.set()
    harness.add("third", PROMPT, structured(regex="c"))
    harness.run()
    assert harness.ended["third"] == "stop"


class Broken:
    """A matcher with a bug."""

    def compute_bitmask(self):
        raise ZeroDivisionError("a bug")

    consume_token = compute_bitmask


@pytest.mark.parametrize("started", [True, False])
def test_a_bug_in_following_a_grammar_ends_that_request_alone(harness, started):
    """A surprise from the library ending the step, and with it the engine."""
    harness.add("plain", PROMPT)
    harness.add("r", PROMPT, structured(regex="[0-9]+"))
    settle(harness)
    following = harness.core._scheduler._grammars._following["r"]
    following.matcher, following.started = Broken(), started
    following.wanted = StructuredOutputsParams(regex="x", starts_after=None if started else 0)
    if not started:
        following.matcher.is_error = following.matcher.compute_bitmask
    harness.run()
    assert harness.ended["plain"] == "length"
    assert isinstance(harness.ended["r"], InternalError)
    assert harness.core._scheduler._grammars.is_idle
