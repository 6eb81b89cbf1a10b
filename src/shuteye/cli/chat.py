"""`shuteye chat`: a conversation in the terminal, with a model that is served already or that this command serves.

Wakes the model when it sleeps. Without a terminal at its input it answers once and ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from shuteye.cli.own_server import OwnServer
from shuteye.cli.quantities import format_seconds, format_size
from shuteye.cli.remote import Remote
from shuteye.cli.terminal import show, show_error
from shuteye.cli.values import INTEGER
from shuteye.client import DEFAULT_URL
from shuteye.client.conversation import Conversation, Piece, served_names
from shuteye.errors import InvalidRequest, ModelNotFound, ModelSleeping, ServerUnreachable, ShuteyeError

HELP = """\
/bye            leave; so does Ctrl-D
/clear          forget what was said
/sleep          give the model's memory back until your next question
/help           this
\"\"\"             begins a text of several lines, and ends it
Ctrl-C          ends an answer"""
MAX_WAKES = 3
"""Of one question: more than one only if the model is put to sleep again before it answers."""

_UNSHOWN = dict.fromkeys(code for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t")
"""Control characters: a model must not be able to write escape sequences to a terminal."""


def chat(
    model: Annotated[
        str | None,
        Parameter(help="What to talk to. It is served here if the server does not serve it; by default the server's."),
    ] = None,
    prompt: Annotated[
        tuple[str, ...], Parameter(help="Answer this and end, instead of a conversation.", negative="")
    ] = (),
    /,
    *,
    system: Annotated[str | None, Parameter(help="The system's message, which comes before all others.")] = None,
    max_tokens: Annotated[
        int | None, INTEGER, Parameter(help="Longest answer, in tokens.", validator=Number(gte=1))
    ] = None,
    temperature: Annotated[
        float | None, Parameter(help="0 always takes the likeliest token.", validator=Number(gte=0))
    ] = None,
    seed: Annotated[int | None, INTEGER, Parameter(help="The same answers again for the same seed.")] = None,
    api_key: Annotated[str | None, Parameter(help="The server's key for inference.", env_var="SHUTEYE_API_KEY")] = None,
    remote: Remote | None = None,
) -> int:
    """Talk to a model in the terminal; one that sleeps is woken, one that nobody serves is served meanwhile.

    What comes on standard input, if it is no terminal, is part of the prompt. Settings of a model that is served here
    come from the environment, as for `shuteye serve`: SHUTEYE_QUANTIZATION, SHUTEYE_KV_CACHE_MEMORY, …
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    asked = " ".join(prompt)
    if not sys.stdin.isatty():
        asked = "\n\n".join(part for part in (asked, sys.stdin.read().strip()) if part)
        if not asked:
            raise InvalidRequest("There is nothing to answer: give a prompt, as an argument or on standard input.")
    with (
        _served(model, remote or Remote(), api_key) as place,
        Conversation(
            place.remote.url,
            place.model,
            system=system,
            api_key=place.api_key,
            options=options,
            timeout_s=place.remote.timeout_s,
        ) as conversation,
    ):
        talk = _Talk(conversation, place.remote)
        if asked:
            talk.answer(asked)
        else:
            talk.go_on()
    return 0


# --- where the model is -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """A server, the model's name there, and the key for asking it."""

    remote: Remote
    model: str
    api_key: str | None


@contextmanager
def _served(model: str | None, remote: Remote, api_key: str | None) -> Iterator[_Place]:
    """Where `model` is served; if nowhere, and no other address was given than the default, here and now."""
    key = api_key or remote.admin_api_key
    may_serve = model is not None and remote.url == DEFAULT_URL
    try:
        names = served_names(remote.url, api_key=key, timeout_s=remote.timeout_s)
    except ServerUnreachable as error:
        if not may_serve:
            hint = " Or name a model, and it is served here." if model is None else ""
            raise ServerUnreachable(error.message + hint) from error
        names = ()
    if model is None or model in names:
        yield _Place(remote, model or names[0], key)
    elif may_serve:
        with _serving(model) as server:
            yield _Place(replace(remote, url=server.url, admin_api_key=server.admin_api_key), model, server.api_key)
    else:
        raise ModelNotFound(f"{remote.url} serves {', '.join(names)}, not {model!r}.", param="model")


@contextmanager
def _serving(model: str) -> Iterator[OwnServer]:
    with ExitStack() as stack:
        with Console(stderr=True, highlight=False).status(f"Loading {model} …") as status:
            show_line = lambda line: status.update(f"Loading {model} … {line}")  # noqa: E731
            server = stack.enter_context(OwnServer(model, told=show_line))
        yield server


# --- the conversation ---------------------------------------------------------------------------


class _Talk:
    """What is said, shown as it comes."""

    def __init__(self, conversation: Conversation, remote: Remote) -> None:
        self._conversation = conversation
        self._remote = remote
        self._commands: dict[str, Callable[[], object]] = {
            "/clear": conversation.clear,
            "/sleep": self._sleep,
            "/help": lambda: show(HELP),
            "/?": lambda: show(HELP),
        }

    def go_on(self) -> None:
        """Answer until the user leaves. An error is shown, and the conversation goes on."""
        import readline  # noqa: F401 (gives `input` its editing and history)

        show(f"{self._conversation.model} at {self._remote.url}; /help lists commands, /bye leaves.")
        while True:
            try:
                text = _read_text()
            except EOFError:
                show("")
                return
            except KeyboardInterrupt:
                show("\nCtrl-D or /bye leaves.")
                continue
            if text in ("/bye", "/exit", "/quit"):
                return
            try:
                self._take(text)
            except ShuteyeError as error:
                show_error(error.message)
            except KeyboardInterrupt:
                show("")

    def _take(self, text: str) -> None:
        if text in self._commands:
            self._commands[text]()
        elif text.startswith("/") and " " not in text:
            show_error(f"{text} is no command; /help lists them.")
        elif text:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Show the model's answer, waking the model first if it sleeps.

        Raises:
            ShuteyeError: there is no answer, or only its beginning was shown.
        """
        for _ in range(MAX_WAKES):
            try:
                with closing(self._conversation.ask(text)) as pieces:
                    self._show_answer(pieces)
            except ModelSleeping:
                self._wake()
            else:
                return
        raise ModelSleeping(f"The model was put to sleep {MAX_WAKES} times before it could answer.")

    def _show_answer(self, pieces: Iterator[Piece]) -> None:
        kind, styled = "content", sys.stdout.isatty()
        try:
            for piece in pieces:
                if styled and piece.kind != kind:
                    sys.stdout.write("\033[2m" if piece.kind == "reasoning" else "\033[0m\n")
                kind = piece.kind
                if piece.kind == "content" or styled:
                    sys.stdout.write(piece.text.translate(_UNSHOWN))
                    sys.stdout.flush()
        finally:
            if kind == "reasoning" and styled:
                sys.stdout.write("\033[0m")
        sys.stdout.write("\n")
        ending = _ENDINGS.get(self._conversation.finish_reason)
        if ending is not None:
            show_error(ending)

    def _wake(self) -> None:
        began = time.perf_counter()
        with self._remote.connect() as client:
            report = client.wake_up()
        Console(stderr=True, highlight=False).print(
            f"It was asleep; woken in {format_seconds(time.perf_counter() - began)}, "
            f"{format_size(report.restored_bytes)} brought back.",
            style="dim",
        )

    def _sleep(self) -> None:
        with self._remote.connect() as client:
            report = client.sleep(1)
        show(f"Asleep: {format_size(report.freed_bytes)} given back. Your next question wakes it.")


_ENDINGS = {
    "length": "The answer was cut here: it reached its longest length.",
    "abort": "The answer was cut here: the server ended it, as a sleep or a pause does. Ask again, or say: go on.",
    None: "The answer was cut here: the server's stream ended too early.",
}
"""What to say of an answer that is not whole, by its `finish_reason`."""


def _read_text() -> str:
    '''A line, or what stands between two `"""`; without white space at its ends.'''
    text = input(">>> ").strip()
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while '"""' not in text:
        text += "\n" + input("... ")
    return text.partition('"""')[0].strip()
