"""A canary's numbers, kept beside the images: what one process computed is what every later one must compute again.

Whoever computes otherwise, by other kernels or on another instruction set, has a file of its own. A file that cannot be
read is as good as none, and where none can be written the record lasts as long as the process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shuteye.memory.cache_dir import records_of

if TYPE_CHECKING:
    from shuteye.tasks.canary import Numbers

logger = logging.getLogger(__name__)

CHECKSUM_BYTES = 4


class CanaryFile:
    """The record of the weights of one image, as one kind of process computes with them.

    Args:
        cache_dir: where images are; the record goes with its image (see `ImageStore.remove`).
        image_key: whose weights they are.
        computed_by: everything that may change the numbers beside the weights.
    """

    def __init__(self, cache_dir: Path, image_key: str, computed_by: str) -> None:
        name = hashlib.sha256(computed_by.encode()).hexdigest()[:16]
        self._path = records_of(cache_dir, image_key) / f"{name}.f32"

    def read(self) -> Numbers | None:
        """The numbers; None if they were not recorded, or the file is damaged."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        checksum, numbers = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        if checksum != _checksum(numbers) or len(numbers) % np.dtype(np.float32).itemsize:
            logger.warning("%s is damaged; the canary is recorded again.", self._path)
            return None
        return np.frombuffer(numbers, np.float32)

    def write(self, numbers: Numbers) -> None:
        """Keep them for those who come later; whoever is first there wins nothing, as all write the same."""
        content = numbers.astype(np.float32).tobytes()
        with suppress(OSError):  # a cache that is read only, or full
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd, unfinished = tempfile.mkstemp(prefix=".canary-", dir=self._path.parent)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(_checksum(content) + content)
                os.replace(unfinished, self._path)
            except OSError:
                os.unlink(unfinished)
                raise


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")
