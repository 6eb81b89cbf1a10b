"""How a server ends: asked to, interrupted with work in hand, or with its engine killed under it."""

import asyncio
import os
import signal
import time

import pytest
from http_helpers import ask, asking, in_flight
from shuteye_server import Served, children_of, engines_below, is_running, shuteye, stop_all, wait_for

LONG = 400
AT_ONCE_S = 3.0
"""A good deal more than it takes, and a good deal less than any timeout in the server."""


@pytest.fixture(scope="module")
def mortal_servers(launch):
    """Servers that their tests end, started together."""
    started = {
        "killed": launch("--dev-mode", "--engine-restart-delay-s", "60"),
        "hung, then slain": launch("--dev-mode", "--hang-timeout-s", "1"),
        "interrupted": launch("--dev-mode", "--shutdown-grace-s", "10"),
        "stuck": launch("--dev-mode", "--shutdown-grace-s", "1", policy="hold"),
        "forced": launch("--dev-mode", "--shutdown-grace-s", "30", policy="hold"),
    }
    try:
        yield {name: server.wait_until_ready() for name, server in started.items()}
    finally:
        stop_all(list(started.values()))


def press_ctrl_c(server):
    """As a terminal does it: every process of the group gets the signal."""
    os.kill(server.engine_pid, signal.SIGINT)
    server.tell(signal.SIGINT)


def quickly(call):
    """The result of `call`, which must not wait for any timeout."""
    began = time.monotonic()
    result = call()
    assert time.monotonic() - began < AT_ONCE_S
    return result


def test_an_engine_that_is_killed_is_noticed_at_once(mortal_servers, right):
    """Requests and probes that hang, or pretend that all is well, when the engine process has gone."""
    server = mortal_servers["killed"]
    assert server.complete("before") == right("before")

    async def scenario():
        async with asking(server) as client, in_flight(server, client, ["one", "two"], max_tokens=LONG) as ends:
            whole = asyncio.create_task(ask(client, server.request("whole", max_tokens=LONG)))
            sleep = asyncio.create_task(client.post("/sleep?mode=wait"))
            await asyncio.sleep(0.05)
            os.kill(server.engine_pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await ends(), await whole, await sleep
            assert time.monotonic() - killed < AT_ONCE_S
            return results

    streams, whole, sleep = asyncio.run(scenario())
    for prompt, outcome in zip(["one", "two"], streams, strict=True):
        assert outcome.error["type"] == "EngineDeadError"
        assert (outcome.finish_reason, outcome.ended) == (None, True)
        assert outcome.is_prefix_of(right(prompt, LONG))
    assert (whole.status, whole.error["type"]) == (503, "EngineDeadError")
    assert "SIGKILL" in whole.error["message"]
    assert (sleep.status_code, sleep.json()["error"]["type"]) == (503, "EngineDeadError")

    for path in ("/v1/completions", "/sleep", "/wake_up", "/resume", "/reload_weights"):
        body = server.request("after") if path == "/v1/completions" else {}
        status, kind, message = quickly(lambda path=path, body=body: server.refused(path, **body))
        assert (status, kind) == (503, "EngineDeadError")
        assert "SIGKILL" in message
    health = quickly(lambda: server.get("/health"))
    assert (health.status_code, health.json()["error"]["type"]) == (503, "EngineDeadError")
    ready = quickly(lambda: server.get("/ready"))
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": "dead"})
    assert quickly(lambda: server.get("/state")).json()["status"] == "dead"
    assert quickly(lambda: server.get("/metrics")).status_code == 200
    assert quickly(lambda: server.get("/v1/models")).status_code == 200

    server.tell(signal.SIGTERM)
    assert quickly(server.ended) == 0


def test_a_hung_engine_goes_on_or_is_restarted_by_command(mortal_servers, right):
    """A server that has to be restarted because its engine hangs; a state of before that comes back to life."""
    server = mortal_servers["hung, then slain"]
    pid = server.engine_pid
    assert shuteye("restart", "--url", server.url).returncode == 1
    server.done("/sleep")
    for goes_on in (True, False):
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: server.get("/health").status_code == 503, "the hang to be noticed", 60)
        assert server.get("/health").json()["status"] == "hung"
        for path in ("/v1/completions", "/wake_up"):
            body = server.request("x") if path == "/v1/completions" else {}
            assert server.refused(path, **body)[:2] == (503, "EngineHungError")
        if goes_on:
            os.kill(pid, signal.SIGCONT)
            wait_for(lambda: server.get("/health").status_code == 200, "the engine to go on", 60)
    done = shuteye("restart", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert "The engine is loaded again after" in done.stdout
    assert not is_running(pid)
    (server.engine_pid,) = engines_below(server.zygote_pid)
    state = server.get("/state").json()
    assert (state["is_sleeping"], {tag["residency"] for tag in state["state"]["tags"]}) == (False, {"resident"})
    assert server.complete("a prompt") == right("a prompt")
    assert server.done("/sleep")["changed"]
    assert server.done("/wake_up")["changed"]


def test_a_killed_zygote_takes_nothing_with_it_and_is_replaced(mortal_servers, right):
    """An engine, its requests and every later start that are lost with a process that does nothing for them."""
    server = mortal_servers["hung, then slain"]
    before = server.zygote_pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: [child for child in children_of(server.process.pid) if child != before], "another zygote", 60)
    assert server.complete("a prompt") == right("a prompt")
    assert "engines are forked from has ended" in server.log
    assert server.done("/unload")["changed"]
    assert not is_running(server.engine_pid)
    server.done("/wake_up")
    (server.zygote_pid,) = children_of(server.process.pid)
    (server.engine_pid,) = engines_below(server.zygote_pid)
    assert server.complete("a prompt") == right("a prompt")


def test_a_killed_server_leaves_nothing(mortal_servers):
    """An engine that outlives its server, a socket's directory or shared memory that stays, for want of a last word."""
    server = mortal_servers["hung, then slain"]
    server.kill()
    wait_for(lambda: not is_running(server.engine_pid), "the engine's end")


MOMENTS = {
    "at once": lambda _server: True,
    "importing": lambda server: time.monotonic() > server.started + 0.3,
    "listening": lambda server: "Listening" in server.log,
    "starting the engine": lambda server: children_of(server.process.pid),
    "converting": lambda server: "Reading" in server.log,
}


@pytest.mark.parametrize("when", MOMENTS)
def test_sigterm_at_any_moment_of_the_start_ends_it_in_order(tiny_checkpoint, tmp_path, when):
    """A traceback, an engine without a server, a file left, or a supervisor told of a failure, if stopped too early."""
    server = Served(tiny_checkpoint, "--num-threads", "1", cache_dir=tmp_path)
    try:
        wait_for(lambda: MOMENTS[when](server) or server.process.poll() is not None, when, 60)
        children = children_of(server.process.pid)
        server.tell(signal.SIGTERM)
        code = server.ended()
        assert code == 0 or (code == -signal.SIGTERM and when == "at once"), server.log  # Python itself was starting
        assert not any(map(is_running, children))
        assert "failed to load" not in server.log
        assert not list(tmp_path.glob("images/.*")), "a half-written image is left"
        server.may_end_with = code
    finally:
        server.stop()


def test_ctrl_c_lets_streams_finish(mortal_servers, right):
    """Answers cut short although there was time, an exit status of failure, or an engine left behind."""
    server = mortal_servers["interrupted"]

    async def scenario():
        async with asking(server) as client, in_flight(server, client, ["one", "two"], max_tokens=LONG) as ends:
            press_ctrl_c(server)
            return await ends()

    for prompt, outcome in zip(["one", "two"], asyncio.run(scenario()), strict=True):
        assert (outcome.error, outcome.finish_reason) == (None, "length")
        assert outcome.text == right(prompt, LONG)
    assert server.ended(within_s=10) == 0
    assert not is_running(server.engine_pid)


def test_ctrl_c_does_not_wait_for_ever(mortal_servers):
    """A server that cannot be stopped because a stream sleeps and a request is held."""
    server = mortal_servers["stuck"]

    async def scenario():
        async with asking(server) as client, in_flight(server, client, ["one"], max_tokens=LONG) as ends:
            await client.post("/sleep?mode=keep")
            held = asyncio.create_task(ask(client, server.request("held")))
            await asyncio.sleep(0.2)
            press_ctrl_c(server)
            return await ends(), await held

    began = time.monotonic()
    (stream,), held = asyncio.run(scenario())
    assert time.monotonic() - began < 6
    assert (stream.error["type"], stream.finish_reason, stream.ended) == ("ServerStoppingError", None, True)
    assert (held.status, held.error["type"]) == (503, "ServerStoppingError")
    assert server.ended(within_s=8) == 0
    assert not is_running(server.engine_pid)


def test_a_second_ctrl_c_does_not_wait(mortal_servers):
    """An engine, files or a traceback left behind, for whoever is impatient."""
    server = mortal_servers["forced"]

    async def scenario():
        async with asking(server) as client, in_flight(server, client, ["one"], max_tokens=LONG) as ends:
            await client.post("/sleep?mode=keep")
            press_ctrl_c(server)
            await asyncio.to_thread(wait_for, lambda: "SIGINT" in server.log, "the first signal")
            press_ctrl_c(server)
            return await ends()

    (stream,) = asyncio.run(scenario())
    assert (stream.error["type"], stream.finish_reason, stream.ended) == ("ServerStoppingError", None, True)
    assert server.ended(within_s=8) == 130
    assert not is_running(server.engine_pid)


def test_it_can_be_stopped_while_it_loads(launch):
    """A server that must be killed because its model is not there yet."""
    server = launch("--dev-mode")
    try:
        wait_for(lambda: "startup complete" in server.log, "listening")
        server.tell(signal.SIGTERM)
        assert server.ended(within_s=15) == 0
    finally:
        server.stop()


def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path):
    """A server that stays up without a model, or a traceback where one line would do."""
    (tmp_path / "config.json").write_text("{}")
    ended = shuteye("serve", tmp_path, "--port", "0", "--cache-dir", tmp_path / "cache")
    assert ended.returncode == 1
    assert "failed to load" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
