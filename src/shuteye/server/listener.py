"""The socket that a server's connections come in on."""

from __future__ import annotations

import errno
import os
import socket
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
