"""The callers' side by itself: what would leave a caller waiting for ever, or give it another request's tokens."""

import threading
import time

import pytest

from shuteye.calls import ResumeCall
from shuteye.config import EngineConfig
from shuteye.engine.messages import AbortRequests, PlainReply, Ready, Stepped
from shuteye.errors import EngineDead, InternalError, InvalidRequest, UnsupportedModel
from shuteye.frontend.engine_client import EngineClient
from shuteye.model_info import ModelInfo
from shuteye.state import SchedulerStats
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.testing import write_tiny_tokenizer

GONE = EngineDead("gone")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """What an engine over a byte tokenizer says once it is loaded."""
    path = tmp_path_factory.mktemp("frontend-tokenizer")
    write_tiny_tokenizer(path)
    return ready_with(path)


def ready_with(tokenizer_dir):
    info = ModelInfo(
        model="tiny",
        architecture="Tiny",
        task="generate",
        tokenizer_dir=str(tokenizer_dir),
        image_dir="",
        dtype="float32",
        vocab_size=200,
        max_model_len=64,
        block_size=16,
        num_blocks=4,
        eos_token_ids=(2,),
        weights_bytes=0,
        kv_cache_bytes=0,
        kv_bytes_per_token=0,
    )
    return Ready(info, EngineConfig())


class Harness:
    """A frontend whose engine is the test."""

    def __init__(self, ready):
        self.sent = []
        self.delivered = []
        self.frontend = EngineClient(EngineConfig(), self.send)
        self.frontend.on_message(ready)

    def send(self, message):
        self.sent.append(message)

    def submit(self, request_id="r", deliver=None):
        """The engine-side id of a new request."""
        job = GenerationJob([5, 6], SamplingParams())
        self.frontend.submit(job, request_id=request_id, deliver=deliver or self.delivered.append)
        return self.sent[-1].requests[0].request_id

    def step(self, *deltas):
        self.frontend.on_message(Stepped(deltas, SchedulerStats()))


@pytest.fixture
def harness(ready):
    return Harness(ready)


@pytest.mark.parametrize("ask", ["call", "submit"])
def test_every_call_fails_when_the_engine_dies_meanwhile(harness, ask):
    """Would catch a request registered after everyone who waits was told: nobody would ever answer it."""
    outcome = []

    def user():
        try:
            outcome.append(harness.frontend.call(ResumeCall()) if ask == "call" else harness.submit())
        except EngineDead as error:
            outcome.append(error)

    thread = threading.Thread(target=user)
    with harness.frontend._lock:
        thread.start()
        time.sleep(0.05)  # it has come as far as the lock
        harness.frontend.fail(GONE, status="dead")
    thread.join()
    assert outcome == [GONE]


def test_an_answer_that_comes_after_the_end_is_ignored(harness):
    """Would catch a close() that blows up the engine's thread because of a call in flight."""
    future = harness.frontend.call(ResumeCall())
    harness.frontend.fail(GONE, status="closed")
    harness.frontend.on_message(PlainReply(harness.sent[-1].call_id))
    assert future.exception() is GONE


def test_an_engine_closed_while_loading_does_not_become_ready(ready):
    frontend = EngineClient(EngineConfig(), lambda _message: None)
    frontend.fail(GONE, status="closed")
    frontend.on_message(ready)
    assert frontend.status == "closed"


def test_a_tokenizer_that_cannot_be_read_is_a_failure_to_load(tmp_path):
    """Would catch a start() that waits for ever."""
    frontend = EngineClient(EngineConfig(), lambda _message: None)
    frontend.on_message(ready_with(tmp_path))
    assert frontend.status == "failed"
    assert isinstance(frontend.ready.exception(timeout=0), UnsupportedModel)


def test_a_reused_id_gets_nothing_of_the_request_that_had_it(harness):
    """Would catch tokens, or the end, of an aborted request delivered to the next one of the same name."""
    old = harness.submit()
    harness.frontend.abort("r", deliver=harness.delivered.append)
    new = harness.submit()
    harness.step(RequestDelta(old, (7,)), RequestDelta(old, finish_reason="abort"), RequestDelta(new, (9,)))
    assert [output.outputs[0].token_ids for output in harness.delivered] == [(9,)]
    assert harness.delivered[0].request_id == "r"
    assert not harness.delivered[0].finished


def test_a_late_abort_does_not_end_the_next_request_with_that_id(harness):
    """Would catch an iterator, closed after its last output, that aborts whoever reused its id."""
    first, second = [], []
    harness.step(RequestDelta(harness.submit(deliver=first.append), (7,), finish_reason="length"))
    again = harness.submit(deliver=second.append)
    harness.frontend.abort("r", deliver=first.append)
    harness.step(RequestDelta(again, (9,), finish_reason="length"))
    assert [output.outputs[0].token_ids for output in second] == [(9,)]


def test_aborting_a_request_ends_its_stream(harness):
    """Would catch an abort by a third party that leaves the caller waiting for ever."""
    engine_id = harness.submit()
    harness.step(RequestDelta(engine_id, (7,)))
    harness.frontend.end("r")
    harness.frontend.end("unknown")
    assert harness.sent[-1] == AbortRequests((engine_id,))
    harness.step(RequestDelta(engine_id, finish_reason="abort"))
    assert harness.delivered[-1].outputs[0].finish_reason == "abort"
    assert harness.delivered[-1].outputs[0].token_ids == (7,)


def test_what_could_not_be_sent_leaves_nothing_behind(harness, monkeypatch):
    """Would catch an id that stays in use, or a call nobody will answer."""

    def refuse(_message):
        raise InvalidRequest("cannot travel")

    with monkeypatch.context() as patch:
        patch.setattr(harness.frontend, "_send", refuse)
        with pytest.raises(InvalidRequest, match="travel"):
            harness.submit()
        with pytest.raises(InvalidRequest, match="travel"):
            harness.frontend.call(ResumeCall())
    assert not harness.frontend._calls
    assert harness.submit()


def test_a_bug_in_taking_a_message_leaves_nobody_waiting(harness, monkeypatch):
    """Would catch requests that wait for ever because the listener ended in an error of ours."""

    def broken(_deltas):
        raise ZeroDivisionError("a bug")

    engine_id = harness.submit()
    monkeypatch.setattr(harness.frontend._outputs, "process", broken)
    with pytest.raises(ZeroDivisionError):
        harness.step(RequestDelta(engine_id, (7,)))
    assert isinstance(harness.delivered[-1], EngineDead)
    assert harness.frontend.status == "dead"


@pytest.mark.parametrize("where", ["following", "sending"])
def test_a_surprise_while_submitting_leaves_nothing_registered(ready, monkeypatch, where):
    """Requests that nobody waits for, kept for as long as the server runs."""
    harness = Harness(ready)
    outputs = harness.frontend._outputs

    def surprising(*_args, **_options):
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    if where == "following":
        monkeypatch.setattr(outputs, "_new_detokenizer", surprising)
    else:
        monkeypatch.setattr(harness.frontend, "_send", surprising)
    with pytest.raises(InvalidRequest):
        harness.submit()
    assert not harness.frontend._deliver
    assert not outputs.has_unfinished
    assert not outputs._completions
    monkeypatch.undo()
    harness.submit()


def test_a_surprise_while_sending_a_call_leaves_none_registered(ready, monkeypatch):
    """A future that is never kept."""
    harness = Harness(ready)

    def surprising(_message):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(harness.frontend, "_send", surprising)
    with pytest.raises(InvalidRequest):
        harness.frontend.call(ResumeCall())
    assert not harness.frontend._calls


def test_a_surprise_in_one_requests_text_ends_that_request_alone(ready, monkeypatch):
    """A bug in one detokenizer taken for the end of the engine."""
    harness = Harness(ready)
    strange, plain = [], []
    bad, good = harness.submit("strange", strange.append), harness.submit("plain", plain.append)
    request, completion = harness.frontend._outputs._completions[bad]
    assert request.request_id == "strange"

    def surprising(_token_id):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(completion.detokenizer, "feed", surprising)
    harness.step(RequestDelta(bad, token_ids=(5,)), RequestDelta(good, token_ids=(6,), finish_reason="length"))
    assert isinstance(strange[0], InternalError)
    assert plain[0].finished
    assert AbortRequests((bad,)) in harness.sent
    assert not harness.frontend._deliver
    assert not harness.frontend._outputs._completions
