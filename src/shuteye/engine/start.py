"""What an engine process is told once, before it loads: what to serve, and how to log."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.config import EngineConfig
from shuteye.logs import LogSettings


@dataclass(frozen=True, slots=True)
class EngineStart:
    """One frame on the process's stdin, which is closed after it; nothing there at all means that it is not needed."""

    config: EngineConfig
    logs: LogSettings
