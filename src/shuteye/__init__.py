"""shuteye: an LLM engine whose models can be put to sleep and woken again, proven to be the same.

Public names are imported on first use, so that `import shuteye` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shuteye.config import EngineConfig
    from shuteye.engine.async_engine import AsyncEngine
    from shuteye.engine.llm import LLM
    from shuteye.errors import ShuteyeError
    from shuteye.request import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "shuteye.engine.llm",
    "AsyncEngine": "shuteye.engine.async_engine",
    "EngineConfig": "shuteye.config",
    "SamplingParams": "shuteye.request",
    "ShuteyeError": "shuteye.errors",
}

__all__ = ["LLM", "AsyncEngine", "EngineConfig", "SamplingParams", "ShuteyeError", "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shuteye' has no attribute {name!r}")
