"""KV blocks by number: which are free, who shares them, and how much of a token sequence they hold already.

Knows nothing of requests or tensors.

    tokens   [0 ........ matched * B) [...... computed) [....... known]
              found by match(),        computed by this  not yet
              shared with others       sequence itself   computed

A block is hashed only when full, and its digest covers every token before it and the root, which stands for weights
and memory, so equal digests mean equal K/V.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from shuteye.state import RESERVED_BLOCKS


class BlockPool:
    """Reference-counted blocks [RESERVED_BLOCKS, num_blocks), with an LRU of freed blocks that keep their digest.

    Invariants:
        - A block is in the free list exactly when its reference count is 0.
        - `_block_of` and `_digest_of` are inverse: a digest names one block, a block has at most one digest.
        - A free block with a digest is still a hit (`find`, then `share`) until `allocate` evicts it.
        - The free list is ordered by what to give away first: freed blocks without a digest (their memory is already
          touched), never-used blocks, then digested ones from least to most recently freed. Every operation is O(1).

    Args:
        num_blocks: blocks of the KV cache, the reserved one included.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(RESERVED_BLOCKS, num_blocks))
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return max(0, self._num_blocks - RESERVED_BLOCKS)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns, digested or not."""
        return len(self._free)

    @property
    def num_digested(self) -> int:
        """Blocks that a lookup can find."""
        return len(self._block_of)

    def reference_count(self, block_id: int) -> int:
        """How many owners the block has."""
        return self._references[block_id]

    def is_free(self, block_id: int) -> bool:
        """True if nobody owns the block; sharing it then costs one free block."""
        return block_id in self._free

    def allocate(self) -> int:
        """A block with one owner and no digest; the content of whatever was evicted for it is forgotten.

        The caller makes sure that `num_free` is positive.
        """
        assert self._free, "allocate() from an empty pool: the scheduler must check num_free first"
        block_id, _ = self._free.popitem(last=False)
        self.forget(block_id)
        self._references[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add an owner to a block that a lookup found, reviving it if it was free."""
        assert block_id in self._digest_of, f"share() of block {block_id}, which is known by no digest"
        if self._references[block_id] == 0:
            del self._free[block_id]
        self._references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take one owner from each block of a table, given in table order.

        The table is freed from its end, so that a chain's later blocks are evicted before those they build on.
        """
        for block_id in reversed(tuple(block_ids)):
            assert self._references[block_id] > 0, f"release() of block {block_id}, which nobody owns"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._digest_of:
                    self._free.move_to_end(block_id, last=False)

    def find(self, digest: bytes) -> int | None:
        """The block holding this content, free or not; it must be shared before the next `allocate`."""
        return self._block_of.get(digest)

    def register(self, block_id: int, digest: bytes) -> None:
        """Make an owned block findable. If another block already holds the content, this one stays anonymous."""
        assert self._references[block_id] > 0, f"register() of block {block_id}, which nobody owns"
        assert block_id not in self._digest_of, f"register() of block {block_id}, which has a digest already"
        if digest not in self._block_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def forget(self, block_id: int) -> None:
        """Make a block unfindable; whoever owns it keeps it."""
        digest = self._digest_of.pop(block_id, None)
        if digest is not None:
            del self._block_of[digest]

    def forget_all(self) -> None:
        """Make every block unfindable: what they hold is no longer what their digests say."""
        self._digest_of.clear()
        self._block_of.clear()


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
