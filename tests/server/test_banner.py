"""What a server says on a terminal once its model is loaded."""

from __future__ import annotations

import os
import shlex
import signal
import sys

import pytest
from fake_engine_server import SERVE
from fake_model import byte_tokenizer
from pseudo_terminal import terminal

from shuteye.server.banner import banner

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("route", "options"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"tokenizer_": byte_tokenizer(chat_template=None)}),
        ("/v1/embeddings", {"task": "embed"}),
        ("/score", {"task": "score"}),
    ],
)
def test_the_command_works_as_it_is(make_engine, client_of, route, options):
    """Catches a newcomer's first request being refused: a wrong route, model or quoting, or no key."""
    client = client_of(make_engine(**options), api_key="it's secret", served_model_name=("the model's",))
    context = client.app.state.contexts.default
    context.listening.url = URL
    label, _, command = banner(context, 1.0).splitlines()[-1].strip().partition(" ")
    assert label == "try"
    words = shlex.split(command.replace("$SHUTEYE_API_KEY", "it's secret"))
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer it's secret"}
    assert words[:2] == ["curl", URL + route]
    assert [words[index + 1] for index, word in enumerate(words) if word == "-H"] == [
        f"{name}: {headers[name]}" for name in reversed(headers)
    ]
    response = client.post(route, content=flags["-d"], headers=headers)
    assert response.status_code == 200, response.text


def test_a_terminal_gets_the_banner():
    """Catches a banner that nobody prints, and uvicorn's lines around it."""
    source = SERVE.format(options="{}", before="", sleep_mode=False, config={"port": 0})
    with terminal(sys.executable, "-c", source, PYTHONPATH=os.pathsep.join(sys.path)) as server:
        shown = server.expect('"max_tokens": 64}')
        assert "tiny is ready on http://127.0.0.1:" in shown
        assert "uvicorn" not in shown
        assert "Started server process" not in shown
        server.process.send_signal(signal.SIGINT)
        server.expect("closed")
        assert server.end() == 0
