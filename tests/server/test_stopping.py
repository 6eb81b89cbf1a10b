"""A server that is told to stop while its clients stall: when it ends, how, and what it tells them."""

from __future__ import annotations

import contextlib
import re
import signal
import time

import httpx2
from fake_engine_server import wait_for
from stalling_clients import HALF_A_BODY, HALF_A_CONTROL_CALL, HALF_A_HEAD, WHOLE, Client, request

from shuteye.server import run

STREAM = request({"prompt": "abc" * 5000, "stream": True, "max_tokens": 90_000, "logprobs": 5})
LAST_ANSWERS_S = 0.3
HURRY = f"import shuteye.server.run as run; run.LAST_ANSWERS_S = {LAST_ANSWERS_S}"


def test_stalled_clients_delay_a_stop_no_longer_than_the_grace_period(serve):
    """A second grace after the first one, and a supervisor that kills; a status or traceback that looks like a bug."""
    server = serve("{'token_delay_s': 0.0001}", grace=0.5, dev_mode=True, before=HURRY)
    server.url_when_ready()
    with contextlib.ExitStack() as stack:
        open_clients = [
            stack.enter_context(Client(server.address(), sent))
            for sent in (HALF_A_HEAD, HALF_A_BODY, HALF_A_CONTROL_CALL, b"", WHOLE, STREAM)
        ]
        nothing_of_a_head, half_a_body, half_a_call, _silent, idle, stalled_reader = open_clients
        idle.begins()
        stalled_reader.begins()
        time.sleep(0.3)  # for the stream to fill what lies between
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0, server.log
        for client in (half_a_body, half_a_call):
            assert client.answer().startswith(b"HTTP/1.1 408 ")
        assert nothing_of_a_head.answer() == b""
    assert "Traceback" not in server.log
    assert "timeout graceful shutdown exceeded" not in server.log, "uvicorn had to cancel what we should have ended"
    assert not re.search(r'" 5\d\d', server.log)


def test_uvicorn_waits_for_what_is_left_of_the_grace(make_engine, live):
    """A timeout that begins anew when the grace is over."""
    server = live(make_engine(), shutdown_grace_s=100)
    server.server._grace_ends = time.monotonic() + 5
    server.stop()
    assert server.server.config.timeout_graceful_shutdown <= 5 + run.LAST_ANSWERS_S + run.UVICORN_LATER_S


def test_a_control_call_that_is_broken_off_is_no_bug(make_engine, live, caplog):
    """A 500 and a traceback for a client that went while it sent."""
    server = live(make_engine())
    with Client(server.listener.getsockname(), HALF_A_CONTROL_CALL):
        wait_for(lambda: server.server.server_state.tasks, "the request")
    wait_for(lambda: not server.server.server_state.tasks, "its end")
    assert "Traceback" not in caplog.text
    assert 'path="/sleep",status="499"' in httpx2.get(f"{server.url}/metrics").text
