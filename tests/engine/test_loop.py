"""The loop around a core: what it sends, and when."""

import pytest

from shuteye.calls import SleepCall
from shuteye.config import EngineConfig
from shuteye.engine.loop import run_engine
from shuteye.engine.messages import AddRequests, Control, Ready, Shutdown, SleepReply, StateChanged, Stepped
from shuteye.tasks.generate.requests import GenerateRequest


class Script:
    """A channel whose caller says what it has to say line by line, and then shuts the engine down."""

    def __init__(self, *lines):
        self.lines = [*lines, [Shutdown()]]
        self.sent = []

    def receive(self, timeout_s):
        return [] if timeout_s == 0.0 else self.lines.pop(0)

    def send(self, message):
        self.sent.append(message)

    def wake(self):
        raise AssertionError("no rank of these has died")


@pytest.fixture
def config(tiny_checkpoint, core_cache):
    return EngineConfig(
        model=str(tiny_checkpoint),
        dtype="float32",
        enable_sleep_mode=True,
        on_sleeping_request="hold",
        kv_cache_memory=1 << 20,
        max_model_len=256,
        num_threads=1,
        cache_dir=core_cache,
    )


def test_the_state_is_there_before_the_engine_is_ready(config):
    """Would catch a /ready that says 'closed', or an is_sleeping that guesses, just after start()."""
    channel = Script()
    run_engine(config, channel)
    kinds = [type(message) for message in channel.sent]
    assert kinds.index(StateChanged) < kinds.index(Ready)
    assert channel.sent[kinds.index(StateChanged)].state.gate == "open"


def test_an_idle_engine_tells_how_large_its_cache_is(config):
    """Would catch metrics of a cache without blocks until the first request."""
    channel = Script()
    run_engine(config, channel)
    stats = [message.stats for message in channel.sent if isinstance(message, Stepped)]
    assert stats[0].num_free_blocks == stats[0].num_blocks > 0


def test_held_requests_are_counted_at_once(config):
    """Would catch metrics that learn of held requests only when something else runs."""
    request = GenerateRequest("a", (3, 4, 5))
    channel = Script([Control(1, SleepCall())], [AddRequests((request,))])
    run_engine(config, channel)
    assert [message.stats.num_waiting for message in channel.sent if isinstance(message, Stepped)][-1] == 1


def test_nothing_is_begun_after_a_shutdown(config):
    """Would catch a close() that waits for a sleep, wake or reload that nobody will hear of."""
    channel = Script([Control(1, SleepCall()), Shutdown()])
    run_engine(config, channel)
    assert not any(isinstance(message, SleepReply) for message in channel.sent)
