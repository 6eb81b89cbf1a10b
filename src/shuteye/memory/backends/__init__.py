"""Which memory backend a configuration means.

Knows nothing of how any of them works.
"""

from __future__ import annotations

from shuteye.config import MemoryBackendName
from shuteye.errors import InvalidRequest
from shuteye.memory.backends.base import MemoryBackend
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.backends.linux import LinuxBackend


def open_backend(name: MemoryBackendName) -> MemoryBackend:
    """The backend called `name`; `auto` is the host's memory.

    Raises:
        InvalidRequest: the backend is unknown, or not built yet.
    """
    if name in ("auto", "linux"):
        return LinuxBackend()
    if name == "fake":
        return FakeBackend()
    if name == "cuda":
        raise InvalidRequest("memory_backend 'cuda' is not built yet: use 'auto' or 'linux'.", param="memory_backend")
    raise InvalidRequest(f"memory_backend must be auto, linux, fake or cuda, got {name!r}.", param="memory_backend")
