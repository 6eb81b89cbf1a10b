"""When an engine counts as hung, and when it does not."""

import pytest

from shuteye.engine.liveness import LOOK_S, HangWatch, Pulse


@pytest.fixture
def pulse():
    page = Pulse()
    yield page
    page.close()


class Looking:
    """Looks every `LOOK_S`, on a clock of its own."""

    def __init__(self, pulse):
        self.pulse = pulse
        self.watch = HangWatch(pulse, silence_limit_s=10, step_limit_s=100)
        self.now = 1000.0

    def look(self, seconds, *, beats=True):
        """What is found in the end."""
        found = None
        for _ in range(int(seconds / LOOK_S)):
            if beats:
                self.pulse.beat()
            self.now += LOOK_S
            found = self.watch.look(self.now)
        return found


def test_silence_is_a_hang_that_ends_with_the_next_beat(pulse):
    """Would catch a stopped process that looks healthy, or one that goes on and still looks hung."""
    looking = Looking(pulse)
    for state in (pulse.waiting, pulse.working, pulse.waiting):  # first of all it waits, and may do so for ever
        state()
        assert looking.look(5) is None
        assert looking.look(9, beats=False) is None
        assert "no sign of life for 10 seconds" in looking.look(3, beats=False)
        assert looking.look(LOOK_S) is None


def test_a_step_that_never_returns_is_a_hang(pulse):
    """Would catch a beating heart taken for a working engine; long steps and long idling taken for a hang."""
    looking = Looking(pulse)
    pulse.working()
    assert looking.look(90) is None
    assert "one step has taken more than 100 seconds" in looking.look(20)
    pulse.waiting()
    assert looking.look(500) is None
    for _ in range(10):
        pulse.working()
        assert looking.look(60) is None
        pulse.waiting()


def test_loading_is_no_hang(pulse):
    """Would catch a model that is converted for an hour, its interpreter busy, being given up."""
    looking = Looking(pulse)
    assert looking.look(3600) is None
    assert looking.look(3600, beats=False) is None


def test_time_in_which_nobody_looked_does_not_count(pulse):
    """Would catch every engine taken for hung after the machine was suspended."""
    looking = Looking(pulse)
    pulse.working()
    assert looking.look(5) is None
    looking.now += 100_000
    assert looking.look(LOOK_S, beats=False) is None


def test_a_process_of_its_own_beats():
    """Would catch a page that the two do not share."""
    import subprocess
    import sys
    import time

    pulse = Pulse()
    code = (
        "import time; from shuteye.engine.liveness import Pulse; "
        f"Pulse({pulse.fd}).beat_in_background(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=(pulse.fd,))
    try:
        deadline = time.monotonic() + 30
        while pulse.beats < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        pulse.close()
