"""What a command line asks to be served, and how: told to whoever carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.config import EngineConfig
from shuteye.server.config import ServerConfig
from shuteye.server.fleet_config import FleetConfig


@dataclass(frozen=True, slots=True)
class ServeOrder:
    """Models, the default one first, and what holds for all of them."""

    engines: tuple[EngineConfig, ...]
    server: ServerConfig
    fleet: FleetConfig

    @property
    def is_fleet(self) -> bool:
        """Whether somebody has to see to which model is awake when."""
        return len(self.engines) > 1 or self.fleet.is_asked_for
