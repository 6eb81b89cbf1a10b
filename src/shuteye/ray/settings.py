"""What an application on Ray Serve is made of, and how it is read from the `args` of a Serve config. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.ray.control import CALL_TIMEOUT_S
from shuteye.server.config import ServerConfig

NOT_HERE = {
    "host": "Ray Serve listens: set its http_options",
    "port": "Ray Serve listens: set its http_options",
    "engine_restarts": "Ray Serve replaces a replica whose engine died: set health_check_period_s of the deployment",
    "engine_restart_delay_s": "Ray Serve replaces a replica whose engine died",
    "shutdown_grace_s": "set graceful_shutdown_timeout_s of the deployment",
    "header_timeout_s": "Ray Serve's proxy reads the headers",
}
"""Flags of `shuteye serve` that would do nothing, and what does instead."""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What every replica is started with.

    Attributes:
        idle_sleep_s: a replica without requests for so long goes to sleep until the next one; None: never.
        idle_sleep_level: at which it then sleeps.
        call_timeout_s: a replica that has not carried a control call out for so long has failed it.

    Raises:
        InvalidRequest: a value is out of range, or idle replicas could not sleep or would never wake.
    """

    engine: EngineConfig
    server: ServerConfig = field(default_factory=ServerConfig)
    idle_sleep_s: float | None = None
    idle_sleep_level: Literal[1, 2] = 1
    call_timeout_s: float = CALL_TIMEOUT_S

    def __post_init__(self) -> None:
        for name in ("idle_sleep_s", "call_timeout_s"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise InvalidRequest(f"{name} must be a positive number of seconds, got {value!r}.", param=name)
        if self.idle_sleep_level not in (1, 2):
            raise InvalidRequest(
                f"idle_sleep_level must be 1 or 2, got {self.idle_sleep_level!r}.", param="idle_sleep_level"
            )
        if self.idle_sleep_s is not None:
            self._require_sleep_and_wake()

    def _require_sleep_and_wake(self) -> None:
        if not self.engine.enable_sleep_mode:
            raise InvalidRequest("idle_sleep_s needs enable_sleep_mode.", param="idle_sleep_s")
        if self.engine.on_sleeping_request != "wake":
            raise InvalidRequest(
                f"idle_sleep_s needs on_sleeping_request 'wake', got {self.engine.on_sleeping_request!r}: an idle "
                "replica would sleep, and no request would wake it.",
                param="idle_sleep_s",
            )

    @property
    def max_ongoing_requests(self) -> int:
        """Of one replica, for Ray Serve: as many as its engine lets run and wait, so that the engine refuses."""
        return self.engine.max_num_seqs + self.engine.max_waiting_requests


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def settings_of(args: Mapping[str, Any]) -> ReplicaSettings:
    """The settings that flat `args` describe: fields of EngineConfig, ServerConfig and ReplicaSettings by their names.

    Sleep mode is on unless `args` turn it off.

    Raises:
        InvalidRequest: a name is unknown, or does nothing on Ray Serve; or a value is of another type or out of range.
    """
    _refuse_unknown(args)
    engine = EngineConfig(**{"enable_sleep_mode": True} | _of(EngineConfig, args))
    server = ServerConfig(**_of(ServerConfig, args))
    return ReplicaSettings(engine, server, **_own(args))


def _of(kind: type[EngineConfig] | type[ServerConfig], args: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: args[one.name] for one in fields(kind) if one.name in args}


def _own(args: Mapping[str, Any]) -> dict[str, Any]:
    names = [one.name for one in fields(ReplicaSettings) if one.name not in ("engine", "server")]
    return {name: args[name] for name in names if name in args}


def _refuse_unknown(args: Mapping[str, Any]) -> None:
    for name, instead in NOT_HERE.items():
        if name in args:
            raise InvalidRequest(f"{name} does nothing on Ray Serve: {instead}.", param=name)
    known = {one.name for kind in (EngineConfig, ServerConfig, ReplicaSettings) for one in fields(kind)}
    unknown = sorted(set(args) - known | (set(args) & {"engine", "server"}))
    if unknown:
        raise InvalidRequest(
            f"args have {', '.join(map(repr, unknown))}, which is no flag of shuteye serve and no setting of replicas "
            "(idle_sleep_s, idle_sleep_level, call_timeout_s). Numbers of replicas and resources are Ray Serve's own: "
            "num_replicas and ray_actor_options of the deployment 'Engine'.",
            param=unknown[0],
        )
