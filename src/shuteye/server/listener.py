"""The socket that a server's connections come in on."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import cast

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig

BACKLOG = 2048
_ADVICE = {
    errno.EADDRINUSE: ("port", "Stop what listens there, or choose another."),
    errno.EADDRNOTAVAIL: ("host", "It is not an address of this machine; 0.0.0.0 stands for all of them."),
    errno.EACCES: ("port", "Ports below 1024 are for privileged users; choose a higher one, or give the capability."),
}
"""errno → the field to change, and how."""


def open_listener(config: ServerConfig) -> socket.socket:
    """A socket that listens where the config says.

    Raises:
        InvalidRequest: it cannot; `param` names the field to change, as far as the system tells.
    """
    return _on_port(config) if config.uds is None else _on_path(config.uds)


def close_listener(listener: socket.socket, config: ServerConfig) -> None:
    """Listen no more; the name of a Unix domain socket goes with it."""
    listener.close()
    if config.uds is not None:
        Path(config.uds).unlink(missing_ok=True)


def _on_path(path: str) -> socket.socket:
    """A Unix domain socket; one that was left by a server that was killed makes room."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left(path):
            Path(path).unlink()
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"Cannot listen on {path}: {error.strerror or error}. Choose another path, of at most 107 bytes, in a "
            "directory that exists.",
            param="uds",
        ) from error
    return listener


def _is_left(path: str) -> bool:
    """Whether there is a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _on_port(config: ServerConfig) -> socket.socket:
    where = f"Cannot listen on {config.host}:{config.port}"
    try:
        address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, ValueError) as error:  # ValueError: not a name, such as one with an empty label
        reason = (isinstance(error, OSError) and error.strerror) or error
        advice = "The host is neither an address nor a name that can be looked up."
        raise InvalidRequest(f"{where}: {reason}. {advice}", param="host") from error
    try:
        return socket.create_server(cast(tuple[str, int], address[4][:2]), family=address[0], backlog=BACKLOG)
    except OSError as error:
        field, advice = _ADVICE.get(error.errno or 0, ("host", "Choose another --host or --port."))
        raise InvalidRequest(f"{where}: {os.strerror(error.errno or 0)}. {advice}", param=field) from error
