"""How the HTTP server is to listen, whom it lets in, and how it stops.

Knows nothing of engines; where values come from is the command line's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shuteye.errors import InvalidRequest

LogLevel = Literal["debug", "info", "warning", "error"]

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the HTTP server needs to know besides its engine.

    Attributes:
        port: 0 lets the system choose one.
        api_key: required on inference routes when set, as `Authorization: Bearer`.
        admin_api_key: required on control routes when set; it opens inference routes too.
        dev_mode: control routes exist without an admin key.
        served_model_name: names that requests may use; empty means the model string as given.
        max_body_bytes: larger request bodies are answered with 413.
        shutdown_grace_s: how long running requests may go on after the first signal.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_api_key: str | None = None
    dev_mode: bool = False
    served_model_name: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 1024 * 1024
    shutdown_grace_s: float = 30.0
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port must be between 0 and 65535, got {self.port}.", param="port")
        for name, key in (("api_key", self.api_key), ("admin_api_key", self.admin_api_key)):
            if key is not None and not key.strip():
                raise InvalidRequest(f"{name} must not be empty; leave it out to use no key.", param=name)
        if self.api_key is not None and self.api_key == self.admin_api_key:
            raise InvalidRequest(
                "admin_api_key equals api_key, but an inference key must never open a control route: choose another.",
                param="admin_api_key",
            )
        if self.max_body_bytes <= 0:
            raise InvalidRequest(f"max_body_bytes must be positive, got {self.max_body_bytes}.", param="max_body_bytes")
        if self.shutdown_grace_s < 0:
            raise InvalidRequest(
                f"shutdown_grace_s must not be negative, got {self.shutdown_grace_s}.", param="shutdown_grace_s"
            )
        if not all(self.served_model_name):
            raise InvalidRequest("served_model_name must not hold an empty name.", param="served_model_name")

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        return self.host in LOOPBACK_HOSTS or self.host.startswith("127.")
