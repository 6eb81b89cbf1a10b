"""The HTTP server's configuration: where it listens, whom it lets in, what it limits, and how it stops.

Knows nothing of engines, nor where values come from: flags and environment are read in `cli/`.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from typing import Literal

from shuteye.errors import InvalidRequest
from shuteye.logs import LogFormat, LogLevel
from shuteye.server.parsing.parser import ReasoningParserName
from shuteye.server.parsing.tool_formats import ToolFormat
from shuteye.server.telemetry.names import MetricsPrefix
from shuteye.typed_fields import require_sendable, settle_types

ToolCallParser = Literal["auto"] | ToolFormat
OnAbort = Literal["partial", "error"]

_POSITIVE = (
    "max_body_bytes", "max_json_bytes", "max_request_sequences", "max_audio_s", "max_waiting_audio_s",
    "max_header_count", "max_header_bytes", "header_timeout_s", "body_timeout_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the HTTP server needs to know besides its engine.

    Attributes:
        port: 0 lets the system choose one.
        uds: a path; the server listens on a Unix domain socket there, and on no port.
        root_path: what a proxy puts before every path; requests are answered with and without it.
        api_key: required on inference routes when set, as `Authorization: Bearer`.
        admin_api_key: required on control routes when set; it opens inference routes too.
        dev_mode: control routes exist without an admin key.
        allowed_hosts: names by which control routes without a key may be called, besides localhost and addresses.
        served_model_name: names that requests may use; empty means the model string as given.
        allowed_origins: web pages of these origins may call; empty: only the server's own. `*` is every origin.
        allowed_methods, allowed_headers: what those pages may use.
        allow_credentials: whether those pages may send cookies and the like.
        max_body_bytes: larger request bodies are answered with 413.
        max_json_bytes: so are larger JSON bodies, as the event loop does nothing else while it parses them.
        max_request_sequences: prompts times n, inputs, or pairs, of one request; more are answered with 400.
        max_audio_s: longer audio is answered with 400.
        max_waiting_audio_s: of all audio requests that run or wait; more is answered with 503.
        max_header_count, max_header_bytes: more or larger request headers are answered with 431.
        header_timeout_s: how long the head of a request may take; its connection is closed then, with 408.
        body_timeout_s: how long nothing of a body may come; it is answered with 408 then.
        engine_restarts: how often a dead engine is restarted within ten minutes before the server ends.
        engine_restart_delay_s: before the first of these restarts; twice as long before every further one.
        shutdown_grace_s: how long running requests may go on after the first signal.
        on_abort: what requests get that a sleep, a pause or an operator ends: what there is of them, or a 503.
        strict_fields: a body's unknown field is answered with 400, instead of being left out.
        enable_force_include_usage: every chunk of a stream tells how many tokens it took so far, asked to or not.
        return_tokens_as_token_ids: log-probabilities name tokens by their ids, whether asked to or not.
        metrics_prefix: metrics are named `shuteye_…`, `vllm:…` or both.
        log_requests: a line for every request that was served, without its text.
        tool_call_parser: how the model writes tool calls; `auto` asks its chat template.
        reasoning_parser: how the model writes reasoning, if it does.
        otlp_traces_endpoint: where spans go, as OTLP over HTTP; None makes none.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    api_key: str | None = None
    admin_api_key: str | None = None
    dev_mode: bool = False
    allowed_hosts: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_body_bytes: int = 32 * 1024 * 1024
    max_json_bytes: int = 4 * 1024 * 1024
    max_request_sequences: int = 2048
    max_audio_s: float = 3600.0
    max_waiting_audio_s: float = 4 * 3600.0
    max_header_count: int = 128
    max_header_bytes: int = 64 * 1024
    header_timeout_s: float = 20.0
    body_timeout_s: float = 30.0
    engine_restarts: int = 3
    engine_restart_delay_s: float = 1.0
    shutdown_grace_s: float = 30.0
    on_abort: OnAbort = "partial"
    strict_fields: bool = False
    enable_force_include_usage: bool = False
    return_tokens_as_token_ids: bool = False
    metrics_prefix: MetricsPrefix = "shuteye"
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None
    tool_call_parser: ToolCallParser = "auto"
    reasoning_parser: ReasoningParserName = "none"

    def __post_init__(self) -> None:
        settle_types(self)
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port must be between 0 and 65535, got {self.port}.", param="port")
        if self.uds is not None and not self.uds:
            raise InvalidRequest("uds must be a path, got an empty text.", param="uds")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest(
                f"root_path must begin with / and not end with one, such as /llm, got {self.root_path!r}.",
                param="root_path",
            )
        for name, key in (("api_key", self.api_key), ("admin_api_key", self.admin_api_key)):
            if key is not None:
                require_sendable(name, key)
        if self.api_key is not None and self.api_key == self.admin_api_key:
            raise InvalidRequest(
                "admin_api_key equals api_key, but an inference key must never open a control route: choose another.",
                param="admin_api_key",
            )
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name} must be a positive number, got {getattr(self, name)}.", param=name)
        for name in ("shutdown_grace_s", "engine_restarts", "engine_restart_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name} must be 0 or more, got {getattr(self, name)}.", param=name)
        if not all(self.served_model_name):
            raise InvalidRequest("served_model_name must not hold an empty name.", param="served_model_name")
        self._check_addresses()

    def _check_addresses(self) -> None:
        if self.allow_credentials and "*" in self.allowed_origins:
            raise InvalidRequest(
                "allow_credentials with allowed_origins '*' would let any page act as its visitor: name the origins.",
                param="allow_credentials",
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise InvalidRequest(
                f"otlp_traces_endpoint must be an http:// or https:// address, got {endpoint!r}.",
                param="otlp_traces_endpoint",
            )

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        return self.uds is not None or _is_loopback_name(self.host.lower())

    @property
    def has_control_routes(self) -> bool:
        """True if there is anyone who may control the server; what needs sleep mode needs that, too."""
        return self.admin_api_key is not None or self.dev_mode

    def may_be_called(self, name: str) -> bool:
        """Whether control routes without a key answer when the server is called by `name`, in lower case.

        Never by a name that somebody else's name server could have given to this machine.
        """
        if _is_loopback_name(name) or name in (allowed.lower() for allowed in self.allowed_hosts):
            return True
        return not self.is_loopback and (_is_address(name) or name == self.host.lower())


def _is_loopback_name(name: str) -> bool:
    """True for names and addresses that mean this machine wherever they are resolved."""
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _is_address(name: str) -> bool:
    """True for an IP address: no name server can have made it mean this machine."""
    return _address(name) is not None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
