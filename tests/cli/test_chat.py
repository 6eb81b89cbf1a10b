"""`shuteye chat` through a pseudo-terminal, and for one answer; the server is real, its engine a fake one."""

import io
import os
import re
import signal
import sys
from contextlib import contextmanager

import httpx2
import pytest
from fake_engine import FakeEngine
from live_server import LiveServer
from pseudo_terminal import terminal
from shuteye_server import shuteye, wait_for

from shuteye.cli import main as cli
from shuteye.client import Client
from shuteye.config import EngineConfig

SHUTEYE = (sys.executable, "-m", "shuteye")


@contextmanager
def serving(script, *, token_delay_s=0.0):
    config = EngineConfig(model="tiny", enable_sleep_mode=True, max_model_len=4096)
    engine = FakeEngine(config, script=[script], token_delay_s=token_delay_s)
    live = LiveServer(engine)
    live.thread.start()
    try:
        live.wait_ready()
        yield live.url, engine
    finally:
        live.stop()


def asked(engine):
    """The last prompt, as text."""
    return engine.tokenizer_.decode(list(engine.seen[-1][0]))


def test_a_conversation_survives_a_sleep_and_remembers():
    """Catches a sleep that ends the conversation, a model that is left asleep, and what was said being forgotten."""
    with serving("Good day.") as (url, engine), terminal(*SHUTEYE, "chat", "--url", url) as chat, Client(url) as client:
        assert f"tiny at {url}" in chat.expect(">>> ")
        chat.type("First question\n")
        assert "Good day." in chat.expect(">>> ")
        client.sleep(1)
        chat.type("Second question\n")
        shown = chat.expect(">>> ")
        assert "It was asleep; woken in" in shown
        assert "Good day." in shown
        assert not engine.is_sleeping
        prompt = asked(engine)
        for said in ("First question", "Good day.", "Second question"):
            assert said in prompt, "not all that was said is in the prompt"
        chat.type("/clear\nThird question\n")
        chat.expect("Good day.")
        assert "First question" not in asked(engine)
        chat.type("/sleep\n")
        chat.expect("given back")
        assert engine.is_sleeping
        chat.type("/bye\n")
        assert chat.end() == 0


def test_an_answer_ends_when_the_server_or_the_user_says_so():
    """Catches a partial answer passed off as whole, and Ctrl-C ending more than the answer."""
    with serving("x" * 400, token_delay_s=0.02) as (url, engine), terminal(*SHUTEYE, "chat", "--url", url) as chat:
        chat.expect(">>> ")
        chat.type("One\n")
        chat.expect("xxx")
        httpx2.post(f"{url}/sleep", params={"level": 1, "mode": "abort"}).raise_for_status()
        assert "the server ended it" in chat.expect(">>> ")
        chat.type("Two\n")
        chat.expect("woken in")
        chat.expect("xxx")
        os.kill(chat.process.pid, signal.SIGINT)
        chat.expect(">>> ")
        wait_for(lambda: not engine.running, "the end of the second answer at the server", 4)  # of 8 s
        chat.type("/nonsense\n")
        assert "/nonsense is no command" in chat.expect(">>> ")
        chat.type("\x04")
        assert chat.end() == 0


@pytest.fixture
def answered(monkeypatch, capsys):
    """Runs the command in this process, with `stdin` in place of a terminal: exit status, output, errors."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.run(arguments)
        return code, *capsys.readouterr()

    return run


def test_a_model_cannot_write_to_the_terminal_but_text(answered):
    """Catches escape sequences of a model's answer reaching the terminal, which obeys them."""
    with serving("a\x1b]0;title\x07b\x9bc\td\n") as (url, _engine):
        assert answered("chat", "tiny", "Go on", "--url", url) == (0, "a]0;titlebc\td\n\n", "")


def test_without_a_terminal_it_answers_once(answered):
    """Catches standard input being ignored, options that are not sent, and a cut answer that looks whole."""
    with serving("A long answer.") as (url, engine):
        code, out, err = answered("run", "tiny", "Sum up:", "--url", url, "--max-tokens", "4", stdin="the text\n")
    assert (code, out) == (0, "A lo\n")
    assert "it reached its longest length" in err
    assert "Sum up:\n\nthe text" in asked(engine)
    assert engine.seen[-1][1].max_tokens == 4


def test_what_cannot_be_answered_is_refused(answered):
    """Catches another model answering in place of the one that was named, and an empty question."""
    with serving("Hi") as (url, engine):
        for said, *arguments in (
            ("serves tiny, not 'other'", "other", "Hi"),
            ("There is nothing to answer", "tiny"),
            ("--max-tokens", "tiny", "Hi", "--max-tokens", "0"),
        ):
            code, out, err = answered("chat", *arguments, "--url", url)
            assert code != 0
            assert out == ""
            assert said in err
        assert not engine.seen


def test_a_model_that_nobody_serves_is_served_meanwhile(tiny_checkpoint, core_cache):
    """Catches a server, or its engine, that stays when the command has ended."""
    with terminal(
        *SHUTEYE,
        "chat",
        str(tiny_checkpoint),
        "--max-tokens",
        "4",
        SHUTEYE_CACHE_DIR=str(core_cache),
        SHUTEYE_DTYPE="float32",
    ) as chat:
        url = re.search(r"http://\S+?(?=;)", chat.expect(">>> ", seconds=60))[0]
        chat.type("Hello\n")
        chat.expect(">>> ", seconds=30)
        assert httpx2.get(f"{url}/v1/models").status_code == 401, "anyone may use it"
        chat.type("/sleep\n")
        chat.expect("given back")
        chat.type("Hello\n")
        chat.expect("woken in")
        chat.expect(">>> ")
        chat.type("/bye\n")
        assert chat.end() == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url)


def test_why_a_model_cannot_be_served_is_said(tmp_path):
    """Catches the reason staying in a log that nobody sees."""
    done = shuteye("chat", str(tmp_path / "none"), "Hi")
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr
    assert len(done.stderr.splitlines()) == 1
