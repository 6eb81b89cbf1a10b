"""Settings in a file and in the environment: nothing that was written there is ignored in silence."""

import importlib
import inspect

import pytest
from cyclopts import App

from shuteye.cli import main as cli
from shuteye.cli.values import unread_variables


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[serve]\nprot = 1\n", "unknown key 'prot' in [serve]; the nearest is 'port'"),
        ("[serve]\nno-canary = true\n", "the nearest is 'canary'"),
        ('[serve]\nconfig = "x"\n', "unknown key 'config' in [serve]"),
        ("[serve]\nport = 1\n[srve]\nhost = 'x'\n", "unknown table [srve]; the one that is read is [serve]"),
        ("[server]\nport = 1\n", "unknown table [server]"),
        ("port = 1\n", "sets 'port' outside of a table; put it below a line [serve]"),
        ("prot = 1\n", "unknown key 'prot' outside of a table"),
        ("", "has no table [serve]"),
        ("serve = 1\n", "serve in"),
        ("[serve\n", "cannot be read as TOML: Expected ']'"),
        ("[serve]\nmax-num-seqs = 1\nmax_num_seqs = 2\n", "which are the same key"),
        ('[serve]\nport = "x"\n', 'port in [serve] must be an integer, got "x"'),
        ("[serve]\nport = 8713.7\n", "port in [serve] must be an integer, got 8713.7"),
        ("[serve]\nport = 8713.0\n", "port in [serve] must be an integer, got 8713.0"),
        ("[serve]\nport = true\n", "port in [serve] must be an integer, got true"),
        ("[serve]\nmodel = 7\n", "model in [serve] must be a text, got 7"),
        ('[serve]\nmodel = ["a", "b"]\n', 'model in [serve] must be a text, got ["a", "b"]'),
        ("[serve]\nrevision = 7\n", "revision in [serve] must be a text, got 7"),
        ("[serve]\ncache-dir = false\n", "cache-dir in [serve] must be a text, got false"),
        ("[serve]\nmax_model_len = 1979-05-27\n", "max_model_len in [serve] must be an integer, got"),
        ('[serve]\ncanary = "no"\n', 'canary in [serve] must be true or false, got "no"'),
        ("[serve]\ncanary = 0\n", "canary in [serve] must be true or false, got 0"),
        ('[serve]\nhold-timeout-s = "60"\n', 'hold-timeout-s in [serve] must be a finite number, got "60"'),
        ("[serve]\nhold-timeout-s = inf\n", "hold-timeout-s in [serve] must be a finite number, got Infinity"),
        ("[serve]\nserved-model-name = [1, 2]\n", "served-model-name in [serve] must be a text or a list of texts"),
        ("[serve]\nkv-cache-memory = [1]\n", "kv-cache-memory in [serve] must be a number of bytes, or a text"),
        ("[serve]\nkv-cache-memory = 1.5\n", "whole number"),
        ("[serve.dtype]\nx = 1\n", "dtype in [serve] must be one of 'auto', 'bfloat16', 'float16', 'float32'"),
        ("[serve]\nport = 99999\n", "port in "),
        ('[serve]\nkv-cache-memory = "3 parsec"\n', "is not a size"),
        ('[serve]\ndtype = "int3"\n', "float32"),
        ("[serve.port]\nx = 1\n", "port"),
    ],
)
def test_a_file_with_anything_wrong_is_refused(content, says, tmp_path, capsys, served):
    """Catches a misspelt key or table being ignored, a traceback, and an error that does not name the file."""
    file = tmp_path / "shuteye.toml"
    file.write_text(content)
    assert cli.run(["serve", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert str(file) in said
    assert said.count("\n") == 1


def test_a_key_of_another_type_is_not_shown(tmp_path, capsys, served):
    """Catches a secret of digits, written without its quotes, in the log."""
    file = tmp_path / "shuteye.toml"
    file.write_text("[serve]\nadmin-api-key = 123456\n")
    assert cli.run(["serve", "--config", str(file)]) == 2
    assert "admin-api-key in [serve] must be a text, got an int" in (said := capsys.readouterr().err)
    assert "123456" not in said


@pytest.mark.parametrize("text", ["8713.7", "8713.0", "1e3", "", "x", "True", "nan"])
@pytest.mark.parametrize("source", ["--port", "SHUTEYE_PORT"])
def test_what_is_no_integer_is_not_rounded(source, text, monkeypatch, capsys, served):
    """Catches a server on a port, or with a limit, that nobody wrote."""
    monkeypatch.setenv("SHUTEYE_PORT", text if source == "SHUTEYE_PORT" else "1")
    assert cli.run(["serve", "--port", text] if source == "--port" else ["serve"]) == 2
    said = capsys.readouterr().err
    assert source in said
    assert "integer" in said


@pytest.mark.parametrize("command", [["bench", "--requests", "1.5"], ["sleep", "--level", "1.4"]])
def test_no_flag_is_rounded(command, capsys):
    """Catches a command that does something else than it was told."""
    assert cli.run([*command, "--url", "http://127.0.0.1:1"]) == 2
    assert command[2] in capsys.readouterr().err


def test_values_of_the_right_type_are_taken(tmp_path, served):
    """Catches a refusal of what the guide shows: sizes in three forms, a number without a fraction, one name."""
    file = tmp_path / "shuteye.toml"
    for size in ('"1MiB"', "1048576", "1048576.0"):
        file.write_text(
            f'[serve]\nkv-cache-memory = {size}\nhold-timeout-s = 5\nserved-model-name = "one"\nport = 0x1F\n'
            'dtype = "float32"\ncanary = false\n'
        )
        engine, server, _fleet = served("--config", str(file))
        assert (engine.kv_cache_memory, engine.hold_timeout_s, engine.dtype, engine.canary) == (
            1 << 20,
            5,
            "float32",
            False,
        )
        assert (server.served_model_name, server.port) == (("one",), 31)


def test_a_file_that_is_no_text_is_refused(tmp_path, capsys, served):
    """Catches a traceback about an encoding."""
    file = tmp_path / "shuteye.toml"
    file.write_bytes(b"\xff")
    assert cli.run(["serve", "--config", str(file)]) == 2
    assert f"{file} cannot be read as TOML" in capsys.readouterr().err


def test_a_missing_file_is_refused(capsys, served):
    """Catches a mistyped path being ignored."""
    assert cli.run(["serve", "--config", "/no/such.toml"]) == 2
    assert "/no/such.toml is not a file" in capsys.readouterr().err


def test_a_bad_value_is_reported_where_it_was_given(tmp_path, monkeypatch, capsys, served):
    """Catches an error that leaves the reader to guess which of flag, variable and file to mend."""
    file = tmp_path / "shuteye.toml"
    file.write_text("[serve]\nport = 70000\n")
    cli.run(["serve", "--port", "70001"])
    monkeypatch.setenv("SHUTEYE_PORT", "70002")
    cli.run(["serve"])
    monkeypatch.delenv("SHUTEYE_PORT")
    cli.run(["serve", "--config", str(file)])
    flag, variable, key = capsys.readouterr().err.splitlines()
    assert flag.startswith("shuteye: --port: port must be between")
    assert variable.startswith("shuteye: SHUTEYE_PORT: port must be between")
    assert key.startswith(f"shuteye: port in {file}: port must be between")


def test_a_misspelt_variable_is_warned_of(monkeypatch, capsys, served):
    """Catches a server that listens elsewhere, or without its key, because a variable was misspelt."""
    monkeypatch.setenv("SHUTEYE_ADMIN_API_KY", "secret")
    monkeypatch.setenv("SHUTEYE_PORT", "5")
    assert served()[1].admin_api_key is None
    captured = capsys.readouterr()
    assert "SHUTEYE_ADMIN_API_KY" in captured.err
    assert "the nearest is 'SHUTEYE_ADMIN_API_KEY'" in captured.err
    assert "secret" not in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_variables_of_others_are_left_alone():
    """Catches a warning at every test run, and one for a variable that is not ours."""
    assert unread_variables(["SHUTEYE_TEST_LIBRARY", "SHUTEYE_PORT", "PATH"], frozenset({"SHUTEYE_PORT"})) == []


def test_every_variable_of_every_command_is_known():
    """Catches a warning about a variable that a command does read."""
    read = set()
    homes = {name: name for name in ("serve", "ps", "bench", "images")} | {"pull": "images"}
    homes |= dict.fromkeys(("sleep", "wake", "pause", "resume", "restart", "stop"), "control")
    for name, module in homes.items():
        loaded = importlib.import_module(f"shuteye.cli.{module}")
        commands = (
            [loaded.app[each].default_command for each in ("ls", "rm", "verify")]
            if name == "images"
            else [getattr(loaded, name)]
        )
        for command in commands:
            assert inspect.signature(command)
            collection = App(default_command=command).assemble_argument_collection(parse_docstring=False)
            read |= {name for argument in collection for name in argument.parameter.env_var or ()}
    assert {name for name in read if name.startswith("SHUTEYE_")} <= cli.known_variables()
    assert "SHUTEYE_URL" in read
