"""`shuteye serve`: its command line is read by a child, while this process and the zygote import what they need.

    this process   ── Zygote ── fork ── imports the server ────────────── reads the pipe ── serves
    the child             │      └─ reads the command line ── tells both ── ends
    the zygote            └─ imports what computes ── fork
    the engine's                                       └─ reads its channel ── loads the model

What reading a command line takes, of time and of memory, a server then does not have.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import sys
import termios
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from shuteye.frontend.zygote import Zygote
from shuteye.processes import die_with_parent, raise_limit

if TYPE_CHECKING:
    from shuteye.frontend.engine_process import EngineProcess
    from shuteye.server.serve_order import ServeOrder


def serve() -> int:
    """Do what `sys.argv` says; the process's exit code. To be called while there is one thread."""
    gc.disable()  # until what is imported is; the zygote and the child have their own
    raise_limit()  # the engine's process inherits it
    with contextlib.ExitStack() as opened:
        zygote, process = _started(opened)
        child = _Child(process, opened)
        with _handling(child.stop, signal.SIGINT, signal.SIGTERM):
            with _handling(child.look, signal.SIGCHLD):
                child.look()  # it may have ended already
                from shuteye.server import launch

                launch.import_server()
            told, code = child.ended()
        return launch.serve(_order(told), zygote, process) if told else code


def _started(opened: contextlib.ExitStack) -> tuple[Zygote | None, EngineProcess | None]:
    """The zygote and the engine's process; None if they cannot be had now: the engine tries again, and says why."""
    try:
        zygote = Zygote()
        opened.callback(zygote.close)
        process = zygote.fork()
    except OSError:
        return None, None
    opened.callback(process.close)
    return zygote, process


def _order(told: bytes) -> ServeOrder:
    from shuteye.server.serve_order import ServeOrder
    from shuteye.typed_frames import Decoder

    return Decoder[ServeOrder](ServeOrder).decode(told)


@contextlib.contextmanager
def _handling(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals; afterwards they are handled as before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class _Child:
    """The child that reads the command line, seen from the process that it is forked from.

    Args:
        process: told by it, too.
        opened: closed where this process ends before it serves.
    """

    def __init__(self, process: EngineProcess | None, opened: contextlib.ExitStack) -> None:
        self._opened = opened
        fds = os.pipe()
        self._reading = os.fdopen(fds[0], "rb")
        opened.callback(self._reading.close)
        parent, self._pid = os.getpid(), os.fork()
        if self._pid == 0:
            die_with_parent(parent)
            _end(_read_command_line(os.fdopen(fds[1], "wb"), process))
        os.close(fds[1])

    def ended(self) -> tuple[bytes, int]:
        """What it has told, nothing if there is nothing to serve, and its exit code; waits for its end."""
        told = self._reading.read()
        return told, os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """A signal has come that ends all of them."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # its end says nothing from here on
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._end_parent(0)

    def look(self, *_signal: Any) -> None:
        """If it has ended and told nothing there is nothing to serve. Not to be called once `ended` is."""
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if ended and not _has_bytes(self._reading):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # what else ends from here on says nothing of it
            self._end_parent(self.ended()[1])

    def _end_parent(self, code: int) -> NoReturn:
        self._opened.close()
        os._exit(code)


def _has_bytes(pipe: BinaryIO) -> bool:
    """Whether something has been written that can be read."""
    return fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) != bytes(4)


def _read_command_line(writing: BinaryIO, process: EngineProcess | None) -> int:
    """In the child: tell both processes what to serve, unless the command line asks for something else, or is wrong."""
    try:
        from shuteye.cli import main

        return main.run(serving=lambda order: _tell(order, writing, process))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (nothing above us here is the child's)
        traceback.print_exc()
        return 1
    finally:
        writing.close()


def _tell(order: ServeOrder, writing: BinaryIO, process: EngineProcess | None) -> int:
    from shuteye.engine.start import EngineStart
    from shuteye.logs import LogSettings
    from shuteye.typed_frames import encode

    if process is not None and not order.is_fleet:
        logs = LogSettings(order.server.log_format, order.server.log_level)
        process.tell(encode(EngineStart(order.engines[0], logs)))
    writing.write(encode(order))
    return 0


def _end(code: int) -> NoReturn:
    """End without what the parent has registered for its own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
