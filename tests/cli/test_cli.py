"""The command line: where values come from, how errors end it, and what the commands print."""

import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from shuteye.cli import main as cli
from shuteye.cli.progress_bars import ProgressBars
from shuteye.config import EngineConfig
from shuteye.memory.image import ImageIdentity
from shuteye.memory.image_store import ImageStore
from shuteye.memory.layout import TensorSpec
from shuteye.models.progress import Advanced, Failed, Finished, Started
from shuteye.server.config import ServerConfig
from shuteye.server.fleet_config import FleetConfig

MIB = 1024**2


class TestServe:
    def test_defaults_are_those_of_the_configurations(self, served):
        """Catches a second set of defaults growing in the command line."""
        assert served() == (EngineConfig(), ServerConfig(), FleetConfig())

    def test_every_field_is_a_flag(self, served):
        """Catches a field that no flag can set, and a flag that sets another field."""
        for config in (EngineConfig, ServerConfig, FleetConfig):
            for field in fields(config):
                value, text = other_value(config, field.name)
                flag = f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}"
                configs = served(*([flag] if text is None else [flag, text]))
                changed = next(one for one in configs if isinstance(one, config))
                assert getattr(changed, field.name) == value, field.name

    def test_every_field_has_a_variable_and_a_key_in_the_file(self, served, monkeypatch, tmp_path):
        """Catches a setting that only a flag can make, and a variable or key that sets another one."""
        file = tmp_path / "shuteye.toml"
        for config in (EngineConfig, ServerConfig, FleetConfig):
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
                literal = f'["{text}"]' if isinstance(value, tuple) else json.dumps(value, default=str)
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
    def test_invalid_sizes_are_refused(self, text, capsys, served):
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
        engine, server, _fleet = served("--host", "localhost")
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

    def test_the_key_of_vllms_variable_is_required(self, served, monkeypatch):
        """Catches a server that stands in for vLLM's, and is open to everyone where that was not."""
        monkeypatch.setenv("VLLM_API_KEY", "theirs")
        assert served()[1].api_key == "theirs"
        monkeypatch.setenv("SHUTEYE_API_KEY", "ours")
        assert served()[1].api_key == "ours"

    def test_our_variable_beats_that_of_vllm(self, served, monkeypatch):
        """Catches a stray VLLM_ variable opening control routes that ours closed."""
        monkeypatch.setenv("SHUTEYE_SERVER_DEV_MODE", "0")
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
        assert not served()[1].dev_mode


NUMBERS = {"max_model_len", "kv_cache_memory", "max_kv_cache_memory", "memory_budget", "num_threads"}
"""Fields that are None by default."""


def other_value(config, name):  # noqa: PLR0911
    """A value unlike the default, and its text (None for a switch)."""
    special = {
        "chat_template": "{{ messages }}",
        "sleep_idle_level": "unloaded",
        "dtype": "float32",
        "quantization": "q8_0",
        "kv_cache_dtype": "int8",
        "metrics_prefix": "both",
        "on_sleeping_request": "hold",
        "default_sleep_mode": "keep",
        "verify_wake": "full",
        "distributed_executor_backend": "mp",
        "ray_placement": "spread",
        "memory_backend": "fake",
        "kernels": "torch",
        "log_level": "error",
        "log_format": "json",
        "tool_call_parser": "mistral",
        "reasoning_parser": "qwen3",
        "otlp_traces_endpoint": "http://x",
        "on_abort": "error",
        "root_path": "/llm",
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
    if isinstance(default, float) or name in {"sleep_idle_seconds", "sleep_escalate_seconds"}:
        return 1.5, "1.5"
    if isinstance(default, int) or name in NUMBERS:
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
        (["sleep", "--url", "127.0.0.1:1"], 2, "is not an address like http://"),
        (["sleep", "--url", "http://127.0.0.1:port"], 2, "is not an address like http://"),
        (["sleep", "--tags", "weights,kvcache"], 2, "'kvcache' is not a tag; there are weights and kv_cache"),
        (["wake", "--tags", ","], 2, "--tags"),
        (["wake", "--timeout-s", "nan"], 2, "--timeout-s"),
        (["wake", "--timeout-s", "0"], 2, "--timeout-s"),
        (["bench", "--requests", "-1"], 2, "--requests"),
        (["bench", "--concurrency", "0"], 2, "--concurrency"),
        (["bench", "--sleep-wake", "-1"], 2, "--sleep-wake"),
        (["bench", "--max-tokens", "0"], 2, "--max-tokens"),
        (["bench", "--requests", "0"], 2, "--requests: There is nothing to measure"),
        (["bench", "--api-key", "a\nb"], 2, "--api-key: api_key begins or ends"),
        (["bench", "--admin-api-key", "a\n"], 2, "--admin-api-key: admin_api_key begins or ends"),
        (["sleep", "--admin-api-key", "a\n"], 2, "--admin-api-key: admin_api_key begins or ends"),
        (["bench", "--url", "x"], 2, "is not an address like http://"),
        (["serve", "--hold-timeout-s", "nan"], 2, "--hold-timeout-s"),
        (["serve", "--shutdown-grace-s", "inf"], 2, "--shutdown-grace-s"),
        (["serve", "--max-audio-s", "nan"], 2, "--max-audio-s"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, status, says, capsys):
    """Catches tracebacks, panels, and a failure that looks like success to a script."""
    assert cli.run(arguments) == status
    captured = capsys.readouterr()
    assert says in captured.err
    assert one_line(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    "command",
    [
        *("serve", "pull", "sleep", "wake", "pause", "resume", "restart", "stop", "ps", "bench"),
        *("images", "images ls", "images rm", "images verify"),
    ],
)
def test_the_help_of_every_command_has_an_example_that_works(command, capsys):
    """Catches help that leaves a newcomer to guess, and an example with a flag that is gone."""
    assert cli.run([*command.split(), "--help"]) == 0
    example = capsys.readouterr().out.partition("Example: ")[2]
    name, *arguments = shlex.split(example)
    assert (name, " ".join(arguments[: len(command.split())])) == ("shuteye", command)
    cli.app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_pull_offline_fetches_nothing(tmp_path, capsys):
    """Catches a machine without a network that waits for one, and a flag that only `serve` has."""
    assert cli.run(["pull", "--offline", "no-such-owner/no-such-model", "--cache-dir", str(tmp_path)]) == 1
    assert "cannot be fetched in offline mode" in capsys.readouterr().err


def test_server_process_is_free_of_torch():
    """Catches an import that makes the API process, which holds no model, carry torch through every sleep."""
    code = (
        "import sys, shuteye.server.run, shuteye.frontend.process_link; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


# --- images and progress ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["rm", "--all"]])
def test_images_of_an_empty_cache(tmp_path, capsys, command):
    """Catches a first use that fails, or says nothing, because nothing is there yet; and a misspelt directory."""
    assert cli.run(["images", *command, "--cache-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No images in {tmp_path}.\n"
    assert cli.run(["images", *command, "--cache-dir", str(tmp_path / "absent")]) == 0
    assert capsys.readouterr().out == f"No images: {tmp_path / 'absent'} does not exist.\n"


@pytest.mark.parametrize("command", [["ls"], ["ls", "--orphans"], ["verify"], ["rm", "--all"], ["rm", "x"]])
def test_a_cache_directory_that_is_a_file_is_refused(tmp_path, capsys, command):
    """Catches `No images` of a path that can hold none."""
    (tmp_path / "file").write_text("x")
    assert cli.run(["images", *command, "--cache-dir", str(tmp_path / "file")]) == 2
    assert f"--cache-dir: {tmp_path / 'file'} is not a directory" in capsys.readouterr().err


def test_images_that_cannot_be_listed_are_an_error(tmp_path, capsys):
    """Catches a failure that looks like an empty cache."""
    (tmp_path / "images").write_text("x")
    assert cli.run(["images", "ls", "--cache-dir", str(tmp_path)]) == 1
    assert "cannot be listed: [Errno 20] Not a directory" in capsys.readouterr().err


@pytest.fixture
def two_images(tmp_path, monkeypatch):
    """A cache with two images, of which the first is in use by this process; their keys."""
    store = ImageStore(tmp_path)

    def build(writer):
        writer.begin([TensorSpec("a", (4,), "float32")])
        writer.put("a", bytes(16))

    used, free = (store.open_or_build(ImageIdentity(name, "1", "float32"), build) for name in ("used", "free"))
    free.close()
    monkeypatch.setattr("shuteye.memory.image_store.holders", lambda _path: (7, 8))
    yield used.path.name, free.path.name
    used.close()


def test_of_all_images_those_in_use_are_left_and_named(two_images, tmp_path, capsys):
    """Catches `rm --all` that leaves gigabytes without a word."""
    used, free = two_images
    assert cli.run(["images", "rm", "--all", "--cache-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"Left {used}: in use by processes 7, 8."
    assert out[1].startswith(f"Removed {free}: ")
    assert cli.run(["images", "ls", "--cache-dir", str(tmp_path)]) == 0
    assert "in use by processes 7, 8" in capsys.readouterr().out


def test_an_image_of_an_older_version_is_listed_in_one_line(two_images, tmp_path, capsys):
    """Catches an upgrade after which every image is shown as broken, in lines of 300 characters."""
    index = tmp_path / "images" / two_images[1] / "index.json"
    index.chmod(0o644)
    index.write_bytes(index.read_bytes().replace(b'"format":2', b'"format":1'))
    assert cli.run(["images", "ls", "--cache-dir", str(tmp_path)]) == 0
    _, line, _, hint = capsys.readouterr().out.splitlines()
    assert line.endswith("cannot be used: another version of shuteye made it (format 1, this one reads 2)")
    assert "rebuilt when its model is next loaded" in hint


def test_one_image_that_cannot_be_removed_does_not_keep_the_others(two_images, tmp_path, capsys):
    """Catches the rest of a command line being forgotten after the first error, and a failure with status 0."""
    assert cli.run(["images", "rm", "used", "free", "abc", "--cache-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("Removed free: ")
    assert "in use by processes 7, 8. Stop the server" in captured.err
    assert "'abc' matches none of" in captured.err


def test_what_killed_processes_left_is_listed_and_removed(tmp_path, capsys):
    """Catches megabytes on disk that no command shows."""

    def images(*arguments):
        status = cli.run(["images", *arguments, "--cache-dir", str(tmp_path)])
        return status, capsys.readouterr().out

    left = tmp_path / "images" / ".model-bfloat16-0123.abcd"
    left.mkdir(parents=True)
    (left / "weights.rank0.bin").write_bytes(bytes(3 * MIB))
    assert images("ls")[1].startswith(f"No images in {tmp_path}.\nKilled processes left 3.0 MiB: ")
    assert images("ls", "--json")[1] == "[]\n"
    assert str(left) in images("ls", "--orphans")[1]
    (shown,) = json.loads(images("ls", "--orphans", "--json")[1])
    assert (shown["path"], shown["nbytes"]) == (str(left), 3 * MIB)
    assert images("rm", "--orphans") == (0, f"Removed {left}: 3.0 MiB.\n")
    assert not left.exists()
    assert images("ls", "--orphans")[1] == "Killed processes left nothing.\n"
    assert images("rm", "--orphans", "--all")[0] == 2


def test_a_step_that_failed_is_not_shown_as_done(tmp_path):
    """Catches a full bar for a download that came to nothing."""
    file = (tmp_path / "out").open("w+")
    with file, ProgressBars(Console(file=file, force_terminal=True, width=200)) as bars:
        bars(Started("Fetching"))
        bars(Failed("nobody there"))
        bars(Started("Fetching", 3 * MIB))
        bars(Advanced(MIB))
        bars(Failed("broke off"))
        assert [task.description for task in bars._bars.tasks] == [
            "Fetching: failed, nobody there",
            "Fetching: failed, broke off",
        ]
        assert bars._bars.tasks[1].completed == MIB


def test_progress_of_known_and_unknown_length(tmp_path):
    """Catches a bar that ends short, or divides by an unknown total."""
    file = (tmp_path / "out").open("w+")
    with file, ProgressBars(Console(file=file, force_terminal=True, width=120)) as bars:
        bars(Started("Fetching", 3 * MIB))
        bars(Advanced(MIB))
        bars(Advanced(2 * MIB))
        bars(Finished())
        bars(Started("Reading"))
        bars(Advanced(5))
        bars(Finished())
        bars(Started("Nothing"))
        bars(Finished())
        assert bars._bars.finished
        assert [task.completed for task in bars._bars.tasks] == [3 * MIB, 5, 1]
