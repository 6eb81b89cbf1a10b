"""Requests with a grammar on the core over a tiny real model: joined, masked, preempted, slept through, ended."""

import json
import re
import sys
import time

import pytest

from shuteye.engine.messages import SleepCall, WakeCall
from shuteye.errors import InvalidRequest, ModelSleeping
from shuteye.request import SamplingParams, StructuredOutputsParams
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


def settle(rig):
    """Let every grammar in the background be compiled, and let its request join."""
    deadline = time.monotonic() + 10
    while rig.core._scheduler._grammars.num_compiling:
        assert time.monotonic() < deadline
        rig.step()


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
def test_random_weights_write_what_the_grammar_wants(rig, text_of, wanted, pattern):
    """A mask that is off by a token, applied to another row, or not at all: a random model then writes noise."""
    rig.add("plain", PROMPT)
    rig.add("r", PROMPT, structured(**wanted))
    rig.run()
    assert rig.ended["r"] == "stop", rig.ended["r"]
    assert re.fullmatch(pattern, text_of(rig.tokens["r"])), text_of(rig.tokens["r"])
    assert len(rig.tokens["plain"]) == 12


def test_any_json_object_is_one(rig, text_of):
    """`json_object` taken for any JSON value."""
    rig.add("r", PROMPT, structured(json_object=True, max_tokens=200))
    rig.run()
    if rig.ended["r"] == "stop":
        assert isinstance(json.loads(text_of(rig.tokens["r"])), dict)
    assert text_of(rig.tokens["r"]).startswith("{")


def test_whitespace_can_be_refused(rig, text_of):
    """`disable_any_whitespace` ignored."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3}
    rig.add("r", PROMPT, structured(json=schema, disable_any_whitespace=True))
    rig.run()
    assert re.fullmatch(r"\[(true|false)(,(true|false)){2}\]", text_of(rig.tokens["r"]))


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
def test_a_wrong_grammar_is_the_callers_error_and_names_the_field(rig, wanted):
    """A 500, or an engine that dies of a bad expression; a request that waits for ever."""
    rig.add("r", PROMPT, structured(**wanted, param="guided_x"))
    rig.add("plain", PROMPT)
    rig.run()
    assert isinstance(rig.ended["r"], InvalidRequest)
    assert "guided_x" in rig.ended["r"].message
    assert rig.ended["plain"] == "length"


def test_a_grammar_outlives_preemption_and_a_deep_sleep(make_rig, text_of):
    """Grammar state lost, or advanced twice, when a request is computed anew."""
    undisturbed = make_rig()
    undisturbed.add("r", PROMPT, structured(regex=LONG))
    undisturbed.run()
    rig = make_rig()
    rig.add("r", PROMPT, structured(regex=LONG))
    settle(rig)
    for level in (1, 2):
        for _ in range(6):
            rig.step()
        assert rig.call(SleepCall(level, mode="keep")).held_requests == 1
        rig.call(WakeCall())
    assert 0 < len(rig.tokens["r"]) < 40, "the sleeps were not in its midst"
    rig.run()
    assert re.fullmatch(LONG, text_of(rig.tokens["r"]))
    assert rig.tokens["r"] == undisturbed.tokens["r"]


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_sleep_loses_no_request_whose_grammar_is_being_compiled(rig, text_of, mode):
    """A request that is in neither queue while its grammar is compiled: forgotten by a sleep, or run while asleep."""
    rig.add("r", PROMPT, structured(regex=DIGITS))
    rig.call(SleepCall(1, mode=mode, timeout_s=20))
    assert rig.core.state.is_sleeping
    rig.call(WakeCall())
    rig.run()
    if mode == "abort":
        assert rig.ended["r"] in ("abort", "stop")
    else:
        assert rig.ended["r"] == "stop"
        assert re.fullmatch(DIGITS, text_of(rig.tokens["r"]))


def test_asleep_a_request_is_refused_before_anything_is_compiled(rig):
    """llguidance loaded, and memory taken, only to refuse."""
    rig.call(SleepCall(1))
    rig.add("r", PROMPT, structured(regex=DIGITS))
    rig.step()
    assert isinstance(rig.ended["r"], ModelSleeping)
    assert rig.core._scheduler._grammars._compiler is None


def test_state_is_freed_when_requests_end_and_compiled_grammars_when_asleep(rig):
    """A leak of one matcher per request; a tokenizer that stays in memory over a sleep."""
    grammars = rig.core._scheduler._grammars
    rig.add("stopped", PROMPT, structured(regex=DIGITS))
    rig.add("cut", PROMPT, structured(regex=LONG, max_tokens=3))
    rig.add("aborted", PROMPT, structured(regex=LONG))
    settle(rig)
    rig.step()
    rig.core.abort(["aborted"])
    rig.run()
    assert rig.ended == {"stopped": "stop", "cut": "length", "aborted": "abort"}
    assert grammars.is_idle
    assert grammars._compiler is not None
    rig.call(SleepCall(1))
    assert grammars._compiler is None
    rig.call(WakeCall())
    assert len(rig.generate(PROMPT, structured(regex=DIGITS))) == 9


def test_an_abort_reaches_a_request_that_is_being_compiled(rig):
    """An abort lost between the queues: the request would run for nobody."""
    rig.add("r", PROMPT, structured(regex=LONG))
    rig.core.abort(["r"])
    rig.run()
    assert rig.ended["r"] == "abort"


def test_the_grammar_wins_over_rules_that_leave_no_token(rig, text_of):
    """min_tokens, ignore_eos or a bias that forbid what the grammar demands: noise, or no end."""
    wanted = StructuredOutputsParams(choice=["ab"])
    ab = ord("a"), ord("b")
    params = SamplingParams(
        max_tokens=50, min_tokens=10, ignore_eos=True, structured_outputs=wanted, bad_token_ids=tuple((t,) for t in ab)
    )
    rig.add("r", PROMPT, params)
    rig.run()
    assert (text_of(rig.tokens["r"]), rig.ended["r"], len(rig.tokens["r"])) == ("ab", "stop", 3)


def test_what_comes_before_the_starting_token_is_free(rig, text_of):
    """Reasoning constrained by the grammar of the answer."""
    comma = Tokenizer.from_directory(rig.core.info.tokenizer_dir).encode(",")[0]
    wanted = StructuredOutputsParams(choice=["yes", "no"], starts_after=comma)
    params = SamplingParams(max_tokens=200, seed=3, structured_outputs=wanted, logit_bias={comma: 4.0})
    thought, _, answer = text_of(rig.generate(PROMPT, params)).partition(",")
    assert thought
    assert answer in ("yes", "no")


def test_engines_that_need_no_grammar_never_load_the_library(rig):
    """Start-up time and memory spent for nothing. (Where other tests have loaded it already, only the tokenizer's.)"""
    if "llguidance" not in sys.modules:
        rig.generate(PROMPT)
        assert "llguidance" not in sys.modules
    assert rig.core._scheduler._grammars._compiler is None


def test_structure_is_one_thing():
    """Two demands, of which one would be dropped silently."""
    with pytest.raises(InvalidRequest, match="json and regex"):
        StructuredOutputsParams(json={}, regex="a")
    with pytest.raises(InvalidRequest, match="none"):
        StructuredOutputsParams()
    with pytest.raises(InvalidRequest, match="choices"):
        StructuredOutputsParams(choice=[])
