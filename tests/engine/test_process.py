"""The engine process's own start; that it dies with its server: tests/test_parent.py."""

import signal
import subprocess
import sys

import pytest

LOAD = """
import time
from shuteye.engine.process import _stop_loading_on_sigterm
from shuteye.engine.pulse import Pulse
pulse = Pulse()
_stop_loading_on_sigterm(pulse)
{state}
try:
    print("loading", flush=True)
    input()
finally:
    print("swept", flush=True)
"""


@pytest.mark.parametrize("state", ["", "pulse.waiting()", "pulse.working()"], ids=["loading", "waiting", "working"])
def test_sigterm_ends_loading_in_order_and_nothing_else(state):
    """Would catch a half-written image of gigabytes that stays, and a signal to all that ends an engine in service."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD.format(state=state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    if state:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
    assert process.communicate("\n" if state else None, timeout=60)[0] == "swept\n"
    assert process.returncode == 0
