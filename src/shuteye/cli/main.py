"""The `shuteye` command: its subcommands, where their values come from, and how errors end it.

Each subcommand is imported only when it is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError

from shuteye import __version__
from shuteye.cli import serve
from shuteye.cli.terminal import show_error, show_warning
from shuteye.cli.values import TIMEOUT_VARIABLE, URL_VARIABLE, Settings, unread_variables
from shuteye.errors import AuthenticationFailed, InvalidRequest, PermissionRefused, ShuteyeError
from shuteye.server.serve_order import ServeOrder

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
KEYS = {
    "api_key": "The key is given with --api-key or SHUTEYE_API_KEY.",
    None: "The key is given with --admin-api-key or SHUTEYE_ADMIN_API_KEY.",
}
"""By the `param` of the error."""


app = App(
    name="shuteye",
    help="An LLM engine and OpenAI-compatible server whose models can sleep and wake, verified to be the same.",
    version=__version__,
    help_epilogue="Begin with: shuteye serve",
)
_COMMANDS = {
    "serve": (
        "Load a model and serve it over an OpenAI-compatible API.",
        "shuteye serve smollm2-135m --enable-sleep-mode --dev-mode",
    ),
    "chat": ("Talk to a model in the terminal; also called run.", "shuteye chat smollm2-135m"),
    "pull": ("Fetch a model and build its weight image.", "shuteye pull smollm2-135m"),
    "sleep": ("Put a served model to sleep.", "shuteye sleep --level 1 --mode wait"),
    "unload": ("End a served model's engine process.", "shuteye unload --mode wait"),
    "wake": ("Wake a served model.", "shuteye wake --url http://127.0.0.1:8000"),
    "pause": ("Stop a served model's requests, keeping its memory.", "shuteye pause --mode keep"),
    "resume": ("Let a paused model's requests run again.", "shuteye resume"),
    "reload": ("Load a served model's weights again.", "shuteye reload"),
    "update": ("Write new weights into a served model.", "shuteye update step-100.safetensors"),
    "restart": ("Restart a server's dead or hung engine.", "shuteye restart"),
    "stop": ("Stop a server once what runs has finished.", "shuteye stop"),
    "ps": (
        "Show whether served models sleep, and where their memory is.",
        "shuteye ps http://127.0.0.1:8000 http://127.0.0.1:8001",
    ),
    "bench": ("Put load on a running server, and time it.", "shuteye bench --requests 16 --concurrency 4"),
}
"""What each command is for, and an example of it."""

_CONTROLS = ("sleep", "unload", "wake", "pause", "resume", "reload", "update", "restart", "stop")
_MODULES = dict.fromkeys(_CONTROLS, "control") | {"pull": "images"}
"""Where the function of a command is, if not in a module of its own name."""

_ALIASES = {"chat": "run"}

for _name, (_help, _example) in _COMMANDS.items():
    _module = _MODULES.get(_name, _name)
    app.command(
        f"shuteye.cli.{_module}:{_name}",
        name=_name,
        alias=_ALIASES.get(_name),
        help=_help,
        help_epilogue=f"Example: {_example}",
    )
app.register_install_completion_command(help="Install completion of commands and flags for your shell.")
app.command("shuteye.cli.images:app", name="images", help="List, remove and verify weight images.")
app.command("shuteye.cli.fleet:app", name="fleet", help="Try the scheduler of many models without serving any.")


def run(arguments: Sequence[str] | None = None, *, serving: Callable[[ServeOrder], int] = serve.serve_here) -> int:
    """Run one command line and return its exit status: 0, 1 for a failure, 2 for a wrong call.

    Args:
        serving: what `shuteye serve` does, once it is known what to serve; returns the exit status.
    """
    app.config = settings = Settings()
    for line in unread_variables(os.environ, known_variables()):
        show_warning(line)
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments and arguments[0] == "serve":
            arguments = ["serve", *serve.last_of_each(arguments[1:])]
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        result = serving(result) if isinstance(result, ServeOrder) else result
    except CycloptsError as error:
        show_error(f"{_with_source(error)} See --help.")
        return MISUSED
    except InvalidRequest as error:
        show_error(settings.explained(error.message, error.param))
        return MISUSED if type(error) is InvalidRequest else FAILED
    except (AuthenticationFailed, PermissionRefused) as error:
        show_error(f"{error.message} {KEYS.get(error.param, KEYS[None])}")
        return FAILED
    except ShuteyeError as error:
        show_error(error.message)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _with_source(error: CycloptsError) -> str:
    """What is wrong, and in which file, if it is in one."""
    message, token = str(error), getattr(error, "token", None)
    if token is None or token.source in ("", "cli", "env") or token.source in message:
        return message
    return f"{token.source}: {message}"


def known_variables() -> frozenset[str]:
    """Every environment variable that some command reads."""
    return frozenset({*serve.variables(), URL_VARIABLE, TIMEOUT_VARIABLE})


def main() -> None:
    """The console script."""
    sys.exit(run())
