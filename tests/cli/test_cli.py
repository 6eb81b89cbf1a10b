"""The command line: where values come from, how errors end it, and what the commands print."""

import json
import subprocess
import sys
import threading
import types
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from shuteye.cli import main as cli
from shuteye.cli.progress import ProgressBars
from shuteye.config import EngineConfig
from shuteye.outputs import EngineState, SleepReport, TagReport, TagState, WakeReport
from shuteye.server.config import ServerConfig

MIB = 1024**2


class TestServe:
    def test_defaults_are_those_of_the_configurations(self, served):
        """Catches a second set of defaults growing in the command line."""
        assert served() == (EngineConfig(), ServerConfig())

    def test_every_field_is_a_flag(self, served):
        """Catches a field that no flag can set, and a flag that sets another field."""
        for config in (EngineConfig, ServerConfig):
            for field in fields(config):
                value, text = other_value(config, field.name)
                flag = f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
                configs = served(*([flag] if text is None else [flag, text]))
                changed = next(one for one in configs if isinstance(one, config))
                assert getattr(changed, field.name) == value, field.name

    def test_every_field_has_a_variable_and_a_key_in_the_file(self, served, monkeypatch, tmp_path):
        """Catches a setting that only a flag can make, and a variable or key that sets another one."""
        file = tmp_path / "shuteye.toml"
        for config in (EngineConfig, ServerConfig):
            for field in fields(config):
                value, text = other_value(config, field.name)
                said = str(value).lower() if text is None else text
                with monkeypatch.context() as patched:
                    variable = (
                        "SHUTEYE_SERVER_DEV_MODE" if field.name == "dev_mode" else f"SHUTEYE_{field.name.upper()}"
                    )
                    patched.setenv(variable, said)
                    changed = next(one for one in served() if isinstance(one, config))
                assert getattr(changed, field.name) == value, variable
                literal = f'["{text}"]' if isinstance(value, tuple) else json.dumps(text if text else value)
                file.write_text(f"[serve]\n{field.name.replace('_', '-')} = {literal}\n")
                changed = next(one for one in served("--config", str(file)) if isinstance(one, config))
                assert getattr(changed, field.name) == value, f"{field.name} in the file"

    def test_the_other_name_of_a_flag(self, served):
        """Catches vLLM's name for the same thing being refused."""
        assert served("--shutdown-timeout", "7")[1].shutdown_grace_s == 7

    def test_sizes(self, served):
        """Catches units mistaken for each other."""
        cases = {
            "512MiB": 512 * MIB,
            "2GiB": 2 * 1024 * MIB,
            "1e9": 10**9,
            "64m": 64 * MIB,
            "1.5GB": 15 * 10**8,
            "77": 77,
        }
        for text, nbytes in cases.items():
            assert served("--kv-cache-memory", text)[0].kv_cache_memory == nbytes

    @pytest.mark.parametrize("text", ["", "MiB", "-1", "1 parsec", "1.5", "0x10", "nan"])
    def test_sizes_that_are_none(self, text, capsys, served):
        """Catches a typo becoming some other size."""
        assert cli.run(["serve", "--kv-cache-memory", text]) == 2
        assert "--kv-cache-memory" in capsys.readouterr().err

    def test_flag_beats_environment_beats_file(self, served, tmp_path, monkeypatch):
        """Catches a wrong order of precedence, and keys of the file that are not read."""
        file = tmp_path / "shuteye.toml"
        file.write_text(
            '[serve]\nmodel = "from-file"\nport = 1\nmax_num_seqs = 3\nkv-cache-memory = "2MiB"\n'
            'served_model_name = ["a", "b"]\nenable_sleep_mode = true\ncanary = false\n'
        )
        monkeypatch.setenv("SHUTEYE_PORT", "2")
        monkeypatch.setenv("SHUTEYE_HOST", "::1")
        monkeypatch.setenv("SHUTEYE_CONFIG", str(file))
        engine, server = served("--host", "localhost")
        assert (server.host, server.port) == ("localhost", 2)
        assert (engine.model, engine.max_num_seqs, engine.kv_cache_memory) == ("from-file", 3, 2 * MIB)
        assert server.served_model_name == ("a", "b")
        assert (engine.enable_sleep_mode, engine.canary) == (True, False)
        assert served("mine", "--config", str(file))[0].model == "mine"

    @pytest.mark.parametrize("name", ["SHUTEYE_SERVER_DEV_MODE", "VLLM_SERVER_DEV_MODE"])
    def test_development_mode_by_environment(self, name, served, monkeypatch):
        """Catches vLLM's variable not being honoured, and `0` read as true."""
        monkeypatch.setenv(name, "1")
        assert served()[1].dev_mode
        monkeypatch.setenv(name, "0")
        assert not served()[1].dev_mode

    def test_our_variable_beats_that_of_vllm(self, served, monkeypatch):
        """Catches a stray VLLM_ variable opening control routes that ours closed."""
        monkeypatch.setenv("SHUTEYE_SERVER_DEV_MODE", "0")
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
        assert not served()[1].dev_mode


def other_value(config, name):  # noqa: PLR0911
    """A value unlike the default, and its text (None for a switch)."""
    special = {
        "dtype": "float32",
        "on_sleeping_request": "hold",
        "default_sleep_mode": "keep",
        "verify_wake": "full",
        "distributed_executor_backend": "mp",
        "memory_backend": "fake",
        "kernels": "torch",
        "log_level": "error",
        "log_format": "json",
        "tool_call_parser": "mistral",
        "reasoning_parser": "qwen3",
        "otlp_traces_endpoint": "http://x",
    }
    default = getattr(config(), name)
    if name in special:
        return special[name], special[name]
    if isinstance(default, bool):
        return not default, None
    if isinstance(default, tuple):
        return ("x",), "x"
    if isinstance(default, Path):
        return Path("/x"), "/x"
    if isinstance(default, float):
        return 1.5, "1.5"
    if isinstance(default, int) or name in {"max_model_len", "kv_cache_memory", "num_threads"}:
        return 3, "3"
    return "x", "x"


def one_line(text):
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["serve", "--port", "99999"], 2, "port must be between"),
        (["serve", "--port", "x"], 2, "--port"),
        (["serve", "--frob"], 2, "--frob"),
        (["serve", "--dtype", "int3"], 2, "float32"),
        (["slep"], 2, "slep"),
        (["sleep", "--level", "3"], 2, "--level"),
        (["images", "rm"], 2, "--all"),
        (["sleep", "--url", "http://127.0.0.1:1"], 1, "Is the server running there?"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, status, says, capsys):
    """Catches tracebacks, panels, and a failure that looks like success to a script."""
    assert cli.run(arguments) == status
    captured = capsys.readouterr()
    assert says in captured.err
    assert one_line(captured.err)
    assert captured.out == ""


def test_help_is_fast_to_reach_and_free_of_torch():
    """Catches an import that makes every `shuteye --help` wait for torch."""
    code = (
        "import sys; from shuteye.cli.main import run; run(['serve', '--help']); "
        "assert not {'torch', 'transformers', 'fastapi', 'shuteye.client'} & set(sys.modules), sorted(sys.modules)"
    )
    assert (
        "--enable-sleep-mode"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def test_python_dash_m():
    """Catches `python -m shuteye` not being the command, and an exit status lost on the way."""
    done = subprocess.run([sys.executable, "-m", "shuteye", "serve", "--port", "-1"], capture_output=True, text=True)
    assert (done.returncode, "port must be" in done.stderr) == (2, True)
    done = subprocess.run([sys.executable, "-m", "shuteye", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __import__("shuteye").__version__)


# --- commands that talk to a server -------------------------------------------------------------

ASLEEP = EngineState(
    gate="closed",
    level=1,
    tags=(
        TagState("weights", "offloaded", "image", 256 * MIB, 3 * MIB),
        TagState("kv_cache", "discarded", None, 64 * MIB, 0),
    ),
)
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


@pytest.fixture
def server():
    """A real HTTP server with canned answers by path; `asked` records what came."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            asked.append((self.command, self.path, self.headers.get("Authorization")))
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
    yield types.SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", answers=answers, asked=asked)
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
    server.answers["/wake_up"] = (200, answer(WAKE_REPORT))
    assert cli.run(["wake"]) == 0
    out = capsys.readouterr().out
    assert "Woken in 20.0 ms: 256.0 MiB brought back from image." in out
    assert "Checksums of 16.0 MiB agree (sample); the canary gave the same logits." in out
    assert server.asked == [("POST", "/wake_up", "Bearer secret")]
    server.answers["/wake_up"] = (200, answer(WakeReport(changed=True, missing=("lm_head", "norm"))))
    assert cli.run(["wake", "--tags", "weights"]) == 0
    out = capsys.readouterr().out
    assert "Not serving yet: 2 tensors must be written first, lm_head among them." in out
    assert "Checksums were not compared; no canary ran." in out


def test_calls_that_change_nothing_say_so(server, capsys):
    """Catches a no-op reported as a sleep of zero bytes."""
    server.answers |= {
        "/sleep": (200, answer(SleepReport(changed=False, level=1))),
        "/wake_up": (200, answer(WakeReport(changed=False))),
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
    ps(server, state=ASLEEP, waking={"last_wake_s": 0.05})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{server.url}  shuteye 9.9  m  asleep at level 1"
    assert lines[2].split() == ["weights", "offloaded", "3.0", "MiB", "256.0", "MiB", "image"]
    assert lines[3].split() == ["kv_cache", "discarded", "0", "B", "64.0", "MiB", "–"]
    assert lines[4] == (
        "Waking: weights are brought back, 256.0 MiB from image; "
        "kv_cache is mapped empty (64.0 MiB, taking memory only as it fills). The last wake took 50.0 ms."
    )


AWAKE_TAGS = (TagState("weights", "resident", "image", MIB, MIB), TagState("kv_cache", "resident", None, MIB, 0))


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
    assert out.splitlines()[-1] == ("Nothing to wake." if state.tags else out.splitlines()[0])


def test_ps_as_json(server, capsys):
    """Catches a field that only the table has."""
    ps(server, "--json", state=ASLEEP)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["version"], shown["ready"], shown["state"]["level"]) == ("9.9", False, 1)


# --- images and progress ------------------------------------------------------------------------


def test_images_of_an_empty_cache(tmp_path, capsys):
    """Catches a first use that fails because nothing is there yet."""
    assert cli.run(["images", "ls", "--cache-dir", str(tmp_path)]) == 0
    assert cli.run(["images", "verify", "--cache-dir", str(tmp_path)]) == 0
    assert cli.run(["images", "rm", "--all", "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "No images.\n"
    assert cli.run(["images", "rm", "abc", "--cache-dir", str(tmp_path)]) == 1
    assert "abc" in capsys.readouterr().err


def test_progress_of_known_and_unknown_length(tmp_path):
    """Catches a bar that ends short, or divides by an unknown total."""
    file = (tmp_path / "out").open("w+")
    with file, ProgressBars(Console(file=file, force_terminal=True, width=120)) as bars:
        bars.start("Fetching", 3 * MIB)
        bars.advance(MIB)
        bars.advance(2 * MIB)
        bars.finish()
        bars.start("Reading", None)
        bars.advance(5)
        bars.finish()
        bars.start("Nothing", None)
        bars.finish()
        assert bars._bars.finished
        assert [task.completed for task in bars._bars.tasks] == [3 * MIB, 5, 1]
