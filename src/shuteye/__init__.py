"""shuteye: an LLM engine whose models can be put to sleep and woken again, verified to be the same.

Public names are imported on first use, so that `import shuteye` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shuteye.config import EngineConfig
    from shuteye.errors import ShuteyeError
    from shuteye.frontend.async_engine import AsyncEngine
    from shuteye.frontend.llm import LLM
    from shuteye.tasks.generate.requests import SamplingParams, StructuredOutputsParams
    from shuteye.tasks.pool.requests import PoolingParams
    from shuteye.tasks.transcribe.requests import TranscribeParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "shuteye.frontend.llm",
    "AsyncEngine": "shuteye.frontend.async_engine",
    "EngineConfig": "shuteye.config",
    "SamplingParams": "shuteye.tasks.generate.requests",
    "StructuredOutputsParams": "shuteye.tasks.generate.requests",
    "PoolingParams": "shuteye.tasks.pool.requests",
    "TranscribeParams": "shuteye.tasks.transcribe.requests",
    "ShuteyeError": "shuteye.errors",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "EngineConfig",
    "PoolingParams",
    "SamplingParams",
    "ShuteyeError",
    "StructuredOutputsParams",
    "TranscribeParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shuteye' has no attribute {name!r}")
