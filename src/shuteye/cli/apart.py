"""`shuteye serve`: its command line is read by a child, while this process imports what serves.

What reading it takes, of time and of memory, a server then does not have.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

from shuteye.processes import die_with_parent

if TYPE_CHECKING:
    from shuteye.config import EngineConfig
    from shuteye.server.config import ServerConfig


def serve() -> int:
    """Do what `sys.argv` says; the process's exit code. To be called while there is one thread."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which engines do not use, and which spin at first
    fds = os.pipe()
    reading, writing = os.fdopen(fds[0], "rb"), os.fdopen(fds[1], "wb")
    parent, child = os.getpid(), os.fork()
    if child == 0:
        reading.close()
        die_with_parent(parent)
        _end(_read_command_line(writing))
    handlers = _end_together_with(child)
    writing.close()
    from shuteye.config import EngineConfig
    from shuteye.executors.wire import Decoder
    from shuteye.server import launch
    from shuteye.server.config import ServerConfig

    with reading:
        told = reading.read()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not told:
        return code
    configs: Decoder[tuple[EngineConfig, ServerConfig]] = Decoder(tuple[EngineConfig, ServerConfig])
    return launch.serve(*configs.decode(told))


def _end_together_with(child: int) -> dict[int, Any]:
    """Let a signal end both; the handlers as they were."""

    def end(_number: int, _frame: FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    return {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}


def _read_command_line(writing: BinaryIO) -> int:
    """In the child: write both configurations, unless the command line asks for something else, or is wrong."""
    try:
        from shuteye.cli import main
        from shuteye.cli import serve as command
        from shuteye.executors.wire import encode

        def tell(engine: EngineConfig, server: ServerConfig) -> int:
            writing.write(encode((engine, server)))
            return 0

        command.run_server = tell
        return main.run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (nothing above us here is the child's)
        traceback.print_exc()
        return 1
    finally:
        writing.close()


def _end(code: int) -> None:
    """End without what the parent has registered for its own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
