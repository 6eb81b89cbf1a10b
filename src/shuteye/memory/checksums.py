"""Checksums of bytes in memory and of ranges of a file.

Knows nothing of images.
"""

from __future__ import annotations

import os

import xxhash

_READ_BYTES = 4 << 20


def checksum_hex(data: bytes | bytearray | memoryview) -> str:
    """XXH3, 64 bits: finds damage, not malice. Source: https://xxhash.com."""
    return xxhash.xxh3_64_hexdigest(data)


def checksum_of_file(fd: int, offset: int, nbytes: int) -> str:
    """`checksum_hex` of a file's bytes [offset, offset + nbytes), read in pieces.

    Raises:
        OSError: reading failed or the file ended early.
    """
    hasher = xxhash.xxh3_64()
    end = offset + nbytes
    while offset < end:
        piece = os.pread(fd, min(_READ_BYTES, end - offset), offset)
        if not piece:
            raise OSError(f"the file ends at {offset:,} instead of {end:,}")
        hasher.update(piece)
        offset += len(piece)
    return hasher.hexdigest()
