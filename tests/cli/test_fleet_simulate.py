"""`shuteye fleet simulate`: where its trace and models come from, and what it prints."""

import json

import pytest

from shuteye.cli import main as cli

TRACE = "time,model,tokens\n0,a,10\n10,b,10\n20,c,10\n30,a,10\n"
MODELS = """
[a]
awake-bytes = "8MiB"
growth-bytes = "1MiB"
residual-bytes = ["2MiB", "1MiB", 0]
wake-s = [0.1, 0.2, 0.5]

[b]
awake_bytes = 4194304
pinned = true
"""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def run(*arguments):
    return cli.run(["fleet", "simulate", *map(str, arguments)])


def test_a_trace_is_compared_by_all_rules(trace, capsys):
    """A policy that is left out, or a number under the wrong heading."""
    assert run(trace, "--budget", "20MiB", "--model-bytes", "10MiB") == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "4 requests for 3 models in 30 s on 20.0 MiB"
    assert [row.split()[0] for row in rows] == [
        "shuteye",
        "lru",
        "lfu",
        "ollama",
        "llama.cpp",
        "llama.cpp-before-26572",
    ]
    assert header.split()[:3] == ["POLICY", "LOADS", "EVICTED"]
    assert rows[1].split()[:3] == ["lru", "4", "2"]


def test_models_are_as_their_file_says(trace, tmp_path, capsys):
    """A size that is read as a text, or a key of the file that does nothing."""
    models = tmp_path / "models.toml"
    models.write_text(MODELS)
    assert (
        run(trace, "--models", models, "--budget", "15MiB", "--model-bytes", "1MiB", "--policy", "shuteye", "--json")
        == 0
    )
    (report,) = json.loads(capsys.readouterr().out)
    assert report["peak_bytes"] == 14 * 2**20, "a with its growth, b and c"
    assert (report["requests"], report["refused"], report["loads"]) == (4, 0, 3)
    assert report["waits_s"]["max"] == 1.0


@pytest.mark.parametrize("name", ["zipf", "bursts", "diurnal", "skew"])
def test_traces_are_made_up_by_name(name, capsys):
    """A name in the help that is not known."""
    assert run(name, "--requests", 200, "--policy", "shuteye", "--policy", "lru", "--machines", 2, "--json") == 0
    ours, lru = json.loads(capsys.readouterr().out)
    assert (ours["policy"], lru["policy"]) == ("shuteye", "lru")
    assert ours["requests"] == 200
    assert ours["active_evictions"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-file"], "cannot be read"),
        (["skew", "--policy", "best"], "--policy must be one of"),
        (["skew", "--num-models", "7"], "skew has five models"),
        (["skew", "--models", "no-such-file"], "cannot be read as TOML"),
        (["skew", "--requests", "0"], "--requests"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(arguments, says, capsys):
    """A traceback, or a simulation of something else."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a = 1\n", "must be a table"),
        ("[a]\n", "awake_bytes"),
        ('[a]\nawake-bytes = "many"\n', "not a size"),
        ("[a]\nawake-bytes = 1\nspeed = 3\n", "speed"),
        ("[a]\nawake-bytes = 1\nwake-s = -1\n", "at least 0"),
    ],
)
def test_a_file_of_models_with_a_mistake_is_refused_by_name(trace, tmp_path, capsys, text, says):
    """A model that is simulated with defaults because of a typing error."""
    models = tmp_path / "models.toml"
    models.write_text(text)
    assert run(trace, "--models", models) == 2
    assert says in capsys.readouterr().err
