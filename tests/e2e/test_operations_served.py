"""What operators and trainers do to a real server: replace weights, restart its engine, look at it, put load on it."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save
from shuteye_server import Served, children_of, engines_below, shuteye, stop_all, wait_for

from shuteye.client import Client


@pytest.fixture(scope="module")
def new_weights(tiny_checkpoint):
    """Other values for every tensor of the checkpoint, and what they make of a prompt, as safetensors bytes."""
    (file,) = tiny_checkpoint.glob("*.safetensors")
    generator = torch.Generator().manual_seed(7)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        for name, tensor in load_file(file).items()
    }


def test_uploaded_weights_are_served_and_sleep_keeps_them(server, new_weights, right):
    """An update that is acknowledged and not there, that does not outlive a sleep, or that cannot be taken back."""
    with Client(server.url) as client:
        report = client.upload_weights(save(new_weights))
        assert (report.updated, report.missing) == (len(new_weights), ())
        updated = server.complete("a prompt")
        assert updated != right("a prompt")
        client.sleep(level=1)
        client.wake_up()
        assert server.complete("a prompt") == updated
        assert "+1" in client.collective_rpc("weights_source")[0]
        client.reload_weights()
    assert server.complete("a prompt") == right("a prompt")


def test_blank_weights_are_filled_by_an_upload(server, new_weights, right, tmp_path):
    """The loop of a trainer: level 2, train, wake the weights alone, write them all, wake the cache, serve."""
    (tmp_path / "a.safetensors").write_bytes(save(dict(list(new_weights.items())[:3])))
    (tmp_path / "b.safetensors").write_bytes(save(dict(list(new_weights.items())[3:])))
    with Client(server.url) as client:
        client.sleep(level=2)
        client.wake_up(["weights"])
        assert client.update_weights(str(tmp_path)).missing == ()
        client.wake_up(["kv_cache"])
        assert server.complete("a prompt") != right("a prompt")
        client.reload_weights()


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_bytes_that_are_no_safetensors_are_400(server, content, right):
    """An engine ended by what somebody sent."""
    response = server.http.post(
        "/update_weights", content=content, headers={"Content-Type": "application/octet-stream"}
    )
    assert (response.status_code, response.json()["error"]["type"]) == (400, "BadRequestError")
    assert server.complete("a prompt") == right("a prompt")


def test_paths_that_lead_nowhere_are_400(server, tmp_path):
    """A 500, and no word of what is wrong."""
    for path in ("/no/such/file.safetensors", str(tmp_path)):
        status, _kind, message = server.refused("/update_weights", path=path)
        assert (status, path in message) == (400, True)


def test_collective_rpc(server):
    """Results that cannot be written as JSON."""
    for method, args in (("facts", []), ("states", []), ("verify", ["full"]), ("missing", []), ("residual_bytes", [])):
        (result,) = server.done("/collective_rpc", method=method, args=args)["results"]
        assert result is not None
    assert server.refused("/collective_rpc", method="reset")[0] == 400


def test_a_killed_engine_is_restarted_by_itself_and_then_the_server_ends(tiny_checkpoint, image_cache, right):
    """Without sleep mode: a server that answers 503 for good, and whose supervisor never hears of it."""
    flags = ("--num-threads", "1", "--engine-restarts", "1", "--engine-restart-delay-s", "0.1")
    server = Served(tiny_checkpoint, *flags, cache_dir=image_cache).wait_until_ready()
    server.may_end_with = 1
    try:
        for _ in range(2):
            assert server.complete("a prompt") == right("a prompt")
            assert server.get("/health").json() == {"status": "ok"}
            (pid,) = engines_below(*children_of(server.process.pid))
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: server.process.poll() is not None or server.get("/health").status_code == 503, "its death")
            if server.process.poll() is None and server.metric("shuteye_transitions_total", transition="restart") == 0:
                wait_for(lambda: server.get("/ready").status_code == 200, "the restart", 60)
        assert server.ended() == 1
        assert "--engine-restarts" in server.log
    finally:
        stop_all([server])


def test_wakes_by_policy_are_counted(waking, right):
    """A model that is woken by requests, and never according to its metrics."""
    labels = {"transition": "wake_up", "outcome": "changed", "cause": "request"}
    before = waking.metric("shuteye_transitions_total", **labels)
    waking.done("/sleep")
    assert waking.complete("a prompt") == right("a prompt")
    assert waking.metric("shuteye_transitions_total", **labels) == before + 1
    assert waking.metric("shuteye_request_queue_time_seconds_count") >= 1
    waking.done("/sleep")
    assert waking.get("/state").json()["waking"]["expected_s"] > 0


def test_ps_of_several_servers(servers):
    """A fleet of which one sleeper looks awake, or one that is gone hides the others."""
    with Client(servers["reject"].url) as client:
        client.sleep()
    gone = "http://127.0.0.1:9"
    urls = [servers["reject"].url, servers["wake"].url, gone]
    done = shuteye("ps", *urls)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == urls
    assert "asleep at level 1" in lines[1]
    assert "awake, serving" in lines[2]
    assert "ServerUnreachable" in lines[3]
    found = json.loads(shuteye("ps", "--json", *urls[:2]).stdout)
    assert [one["is_sleeping"] for one in found] == [True, False]
    servers["reject"].restore()


def test_bench(server):
    """Figures of requests that failed, or of tokens that were not made."""
    small = ("--requests", 6, "--concurrency", 3, "--prompt-words", 8, "--max-tokens", 5, "--url", server.url)
    done = shuteye("bench", *small, "--sleep-wake", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["num_served"], found["errors"]) == (6, [])
    assert {one["num_output_tokens"] for one in found["requests"]} == {5}
    assert found["output_tokens_per_s"] == pytest.approx(30 / found["seconds"])
    assert len(found["cycles"]) == 2
    for cycle in found["cycles"]:
        assert cycle["freed_bytes"] > 0
        assert 0 < cycle["wake_s"] < cycle["first_token_s"]
    shown = shuteye("bench", *small, "--route", "chat")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "6 requests served, 3 at once" in shown.stdout
