"""What the log says of settings that do less, or more, than they may look like."""

from __future__ import annotations

import pytest

from shuteye.config import EngineConfig
from shuteye.errors import EngineDead, InvalidRequest
from shuteye.server.app import log_notices, with_flag
from shuteye.server.config import ServerConfig

KEY = {"admin_api_key": "sk-admin"}


@pytest.mark.parametrize(
    ("engine", "server", "said"),
    [
        ({}, {}, []),
        ({"enable_sleep_mode": True}, KEY, []),
        ({"enable_sleep_mode": True}, {}, ["--enable-sleep-mode without --admin-api-key"]),
        ({"enable_sleep_mode": True}, {"api_key": "sk"}, ["--enable-sleep-mode without --admin-api-key"]),
        ({}, KEY, ["only those that need no sleep mode"]),
        ({"dtype": "float16"}, {}, ["--dtype float16: weights and what is computed are bfloat16"]),
        ({"enable_sleep_mode": True}, {"dev_mode": True}, ["Development mode"]),
        ({}, {"dev_mode": True, "host": "0.0.0.0"}, ["Development mode", "DANGER"]),
        ({"memory_backend": "fake"}, {}, ["--memory-backend fake is a stand-in for tests"]),
    ],
)
def test_notices(engine, server, said, caplog):
    """A server that cannot be put to sleep, or serves from a test's memory, without a word; or a word too much."""
    log_notices(EngineConfig(**engine), ServerConfig(**server))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line


def test_the_log_of_a_server_has_them(serve):
    """Notices that nobody calls; more than one line of one thing."""
    server = serve()
    server.url_when_ready()
    assert server.log.count("nobody can put this model to sleep") == 1


def test_errors_begin_with_their_flag():
    """An operator who looks for the name of a field among the flags; a flag that there is none of."""
    assert with_flag(InvalidRequest("no.", param="memory_backend")) == "--memory-backend: no."
    assert with_flag(InvalidRequest("no.", param="prompt")) == "no."
    assert with_flag(EngineDead("gone.")) == "gone."
