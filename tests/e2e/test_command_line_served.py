"""The `shuteye` command as a user types it: against a running server, and on the images that it serves from."""

import json
import os

import pytest
from shuteye_server import SLEEPING_BODY, shuteye

from shuteye.cli import main as cli


@pytest.fixture
def in_process(capsys, monkeypatch):
    """Runs a command line in this process, which has imported all of it; returns its status, and what it printed."""

    def run(*arguments, **environment):
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("SHUTEYE_", "VLLM_"))]:
                patch.delenv(name)
            for name, value in ({"COLUMNS": "200"} | environment).items():
                patch.setenv(name, value)
            capsys.readouterr()
            status = cli.run([*map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def command(server, in_process):
    """Runs a command against the server, in this process."""
    return lambda *arguments: in_process(*arguments, SHUTEYE_URL=server.url)


@pytest.fixture
def typed(server):
    """Runs a command against the server, as a shell does."""

    def run(*arguments):
        ended = shuteye(*arguments, SHUTEYE_URL=server.url)
        assert "Traceback" not in ended.stderr
        return ended.returncode, ended.stdout + ended.stderr

    return run


def test_sleep_ps_wake(server, command, typed, right):
    """Commands that say one thing and do another."""
    assert_says(typed("ps"), 0, server.url, "awake, serving", "Nothing to wake")
    assert_says(typed("sleep", "--mode", "keep"), 0, "Asleep at level 1", "given back", "weights", "kv_cache")
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    assert_says(command("ps"), 0, "asleep at level 1", "weights are brought back", "image")
    assert_says(command("sleep"), 0, "Nothing to do: already asleep at level 1")
    status, printed = command("ps", "--json")
    assert (status, json.loads(printed)["state"]["level"]) == (0, 1)
    assert_says(typed("wake"), 0, "Woken in", "the canary gave the same logits")
    assert_says(command("wake"), 0, "Nothing to do: already awake")
    assert server.complete("woken") == right("woken")


def test_level_2_and_tags(server, command):
    """Flags that do not reach the server; conflicts that exit with success."""
    status, printed = command("sleep", "--level", "2", "--json")
    assert (status, json.loads(printed)["level"]) == (0, 2)
    assert_says(command("sleep", "--level", "1"), 1, "Cannot sleep at level 1")
    assert_says(command("wake", "--tags", "weights"), 0, "Not serving yet")
    assert_says(command("ps"), 0, "weights wait to be written")
    assert_says(command("wake", "--tags", "kv_cache"), 1, "must be loaded before the KV cache can wake")
    assert server.post("/v1/completions", model=server.model, prompt="x").content == SLEEPING_BODY
    assert_says(command("sleep", "--level", "3"), 2)
    assert_says(command("wake", "--tags", "layers"), 2)


def test_the_admin_key(holding, in_process):
    """A key that is not sent, or not needed."""
    where = {"SHUTEYE_URL": holding.url}
    refused, _printed = in_process("sleep", **where)
    assert (refused, holding.get("/is_sleeping").json()) == (1, {"is_sleeping": False})
    assert in_process("sleep", "--admin-api-key", holding.api_key, **where)[0] == 1
    assert in_process("sleep", "--admin-api-key", holding.admin_key, **where)[0] == 0
    assert holding.get("/is_sleeping").json() == {"is_sleeping": True}
    assert shuteye("wake", SHUTEYE_ADMIN_API_KEY=holding.admin_key, **where).returncode == 0
    assert holding.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.fixture
def images(in_process):
    """Runs `shuteye images …` in this process."""
    return lambda *arguments, cache_dir: in_process("images", *arguments, "--cache-dir", cache_dir)


@pytest.mark.slow
def test_images(tiny_checkpoint, tmp_path, images):
    """A pull that makes no image, a verify that reads nothing, an rm that leaves something."""
    pulled = shuteye("pull", tiny_checkpoint, SHUTEYE_CACHE_DIR=str(tmp_path))
    assert pulled.returncode == 0, pulled.stderr
    (image,) = json.loads(images("ls", "--json", cache_dir=tmp_path)[1])
    assert image["key"] in pulled.stdout
    assert_says(images("verify", cache_dir=tmp_path), 0, image["key"], "agree with their checksums")
    damage(max((tmp_path / "images" / image["key"]).iterdir(), key=lambda path: path.stat().st_size))
    verified = shuteye("images", "verify", SHUTEYE_CACHE_DIR=str(tmp_path))
    assert_says((verified.returncode, verified.stdout), 1, "DAMAGED")
    assert_says(images("rm", image["key"], cache_dir=tmp_path), 0, f"Removed {image['key']}")
    assert not list((tmp_path / "images").iterdir())
    assert_says(images("ls", cache_dir=tmp_path), 0, "No images")


def damage(path):
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)  # a finished image is sealed
    path.write_bytes(content)


def test_an_image_in_use_stays(server, image_cache, images):
    """An image that is removed under a server that needs it to wake."""
    (image,) = json.loads(images("ls", "--json", cache_dir=image_cache)[1])
    assert image["in_use"]
    server.done("/sleep")
    assert_says(images("rm", image["key"], cache_dir=image_cache), 1, "in use")
    server.done("/wake_up")
    server.complete("still there")


def assert_says(ended, status, *words):
    assert ended[0] == status, ended[1]
    for word in words:
        assert word in ended[1]
