"""Finds how much of a token sequence the KV cache already holds, by a chain of block hashes.

Knows nothing of requests or tensors; who owns a block and which is evicted next is the pool's affair.

    tokens   [0 ........ matched * B) [...... computed) [....... known]
              found by match(),        computed by this  not yet
              shared with others       sequence itself   computed

A block is hashed only when full, and its digest covers every token before it and the root, which stands for weights
and memory, so equal digests mean equal K/V.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from shuteye.cache.block_pool import BlockPool

DIGEST_SIZE = 16


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block: 16 bytes of BLAKE2b over its parent's digest and its tokens as 64-bit integers."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_SIZE).digest()


class HashChain:
    """The digests of one sequence's full blocks, each computed once; the sequence may only grow.

    `root` stands before its first token: chains of different roots have no digest in common.
    """

    __slots__ = ("_block_size", "_digests", "root")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._digests: list[bytes] = []
        self.root = b""

    def restart(self, root: bytes) -> None:
        """Count from `root`; what was computed from another one is forgotten."""
        if root != self.root:
            self.root = root
            self._digests.clear()

    def digest(self, token_ids: Sequence[int], index: int) -> bytes:
        """The digest of block `index`, i.e. of tokens [0, (index + 1) * block_size), which must all be known."""
        while len(self._digests) <= index:
            start = len(self._digests) * self._block_size
            parent = self._digests[-1] if self._digests else self.root
            self._digests.append(block_digest(parent, token_ids[start : start + self._block_size]))
        return self._digests[index]


class PrefixCache:
    """Matches and registers full blocks of a pool; switched off, it finds and registers nothing."""

    def __init__(self, pool: BlockPool, *, block_size: int, enabled: bool = True) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def match(self, chain: HashChain, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The blocks that hold the longest known prefix, not yet shared: [0, len(result) * block_size).

        At most (len - 1) // block_size blocks, so that at least one token is left to compute: its logits are needed.
        """
        if not self._enabled:
            return ()
        found: list[int] = []
        for index in range((len(token_ids) - 1) // self._block_size):
            block_id = self._pool.find(chain.digest(token_ids, index))
            if block_id is None:
                break
            found.append(block_id)
        return tuple(found)

    def register(
        self, chain: HashChain, token_ids: Sequence[int], *, block_ids: Sequence[int], start: int, end: int
    ) -> None:
        """Register the blocks that computing tokens [start, end) fills: [start // B, end // B) of the block table."""
        if self._enabled:
            for index in self.filled(start, end):
                self._pool.register(block_ids[index], chain.digest(token_ids, index))

    def forget(self, *, block_ids: Sequence[int], start: int, end: int) -> None:
        """Take back what `register` of the same range did: those tokens were never computed."""
        for index in self.filled(start, end):
            self._pool.forget(block_ids[index])

    def filled(self, start: int, end: int) -> range:
        """Indices of the blocks that were not full at `start` tokens and are full at `end` tokens."""
        return range(start // self._block_size, end // self._block_size)
