"""The `shuteye` command: its subcommands, where their values come from, and how errors end it.

Knows nothing of what a subcommand does; each is imported only when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, ArgumentCollection, CycloptsError
from cyclopts.config import Toml

from shuteye import __version__
from shuteye.cli.terminal import show_error
from shuteye.errors import InvalidRequest, ShuteyeError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def _config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill what flags and environment left unset from the TOML file of `--config`, if there is one."""
    for argument in arguments:
        if "--config" in argument.names and argument.tokens:
            path = Path(argument.tokens[-1].value)
            if not path.is_file():
                raise CycloptsError(msg=f"--config {path} is not a file.")
            Toml(path)(app, commands, arguments)


app = App(
    name="shuteye",
    help="An LLM engine and OpenAI-compatible server whose models can sleep, and prove that they woke the same.",
    version=__version__,
    config=_config_file,
)
app.command("shuteye.cli.serve:serve", name="serve", help="Load a model and serve it over an OpenAI-compatible API.")
app.command("shuteye.cli.pull:pull", name="pull", help="Fetch a model and build its weight image.")
app.command("shuteye.cli.sleep:sleep", name="sleep", help="Put a served model to sleep.")
app.command("shuteye.cli.wake:wake", name="wake", help="Wake a served model.")
app.command("shuteye.cli.restart:restart", name="restart", help="Start a server's dead or hung engine anew.")
app.command("shuteye.cli.ps:ps", name="ps", help="Show whether served models sleep, and where their memory is.")
app.command("shuteye.cli.bench:bench", name="bench", help="Put load on a running server, and time it.")
app.command("shuteye.cli.images:app", name="images", help="List, remove and verify weight images.")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0, 1 for a failure, 2 for a wrong call."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        show_error(f"{error} See --help.")
        return MISUSED
    except InvalidRequest as error:
        show_error(error.message)
        return MISUSED if type(error) is InvalidRequest else FAILED
    except ShuteyeError as error:
        show_error(error.message)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run())
