"""Prefix cache: what would serve one prompt from the K/V of another, or miss what is there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuteye.cache.blocks import DIGEST_SIZE, BlockPool, HashChain, PrefixCache, block_digest

BLOCK = 4


class Store:
    """A pool and its prefix cache, holding whole prompts as a scheduler would."""

    def __init__(self, num_blocks=64, *, enabled=True):
        self.pool = BlockPool(num_blocks)
        self.prefix = PrefixCache(self.pool, block_size=BLOCK, enabled=enabled)

    def match(self, tokens):
        return self.prefix.match(HashChain(BLOCK), tokens)

    def compute(self, tokens):
        """Take what matches, allocate and register the rest; the block table."""
        chain = HashChain(BLOCK)
        table = list(self.prefix.match(chain, tokens))
        for block_id in table:
            self.pool.share(block_id)
        start = len(table) * BLOCK
        while len(table) * BLOCK < len(tokens):
            table.append(self.pool.allocate())
        self.prefix.register(chain, tokens, block_ids=table, start=start, end=len(tokens))
        return table


def test_at_least_one_token_is_left_to_compute():
    """A fully cached prompt would leave no logits to sample from."""
    store = Store()
    table = store.compute(list(range(8)))
    assert store.match(list(range(8))) == tuple(table[:1])
    assert store.match(list(range(9))) == tuple(table[:2])
    assert store.match([0]) == ()


def test_same_block_after_another_beginning_is_no_match():
    """K/V depends on all tokens before; matching blocks by their own tokens alone gives wrong output."""
    store = Store()
    store.compute([1, 1, 1, 1, 7, 7, 7, 7, 0])
    assert store.match([2, 2, 2, 2, 7, 7, 7, 7, 0]) == ()
    assert len(store.match([1, 1, 1, 1, 7, 7, 7, 7, 0])) == 2


def test_block_boundaries_cannot_be_confused():
    """Digests over ambiguous bytes would collide for different tokens."""
    root = block_digest(b"", [1, 2])
    assert len(root) == DIGEST_SIZE
    assert len({root, block_digest(b"", [2, 1]), block_digest(b"", [1, 2, 0]), block_digest(root, [1, 2])}) == 4
    assert block_digest(b"", [1, 0]) != block_digest(b"", [1 << 32, 0])


def test_partly_filled_block_is_not_registered():
    """Another request would attend to slots that were never written."""
    store = Store()
    store.compute([1, 2, 3, 4, 5, 6])
    assert store.pool.num_digested == 1


@pytest.mark.parametrize(
    ("start", "end", "indices"), [(0, 3, []), (0, 4, [0]), (3, 4, [0]), (4, 7, []), (4, 8, [1]), (2, 12, [0, 1, 2])]
)
def test_filled_blocks_are_those_completed_in_the_half_open_range(start, end, indices):
    """Off by one, a block would be registered before its last token is computed, or never."""
    assert list(Store().prefix.filled(start, end)) == indices


def test_forget_takes_back_exactly_one_range():
    """After a failed step, blocks that were not computed would be found."""
    store = Store()
    tokens = list(range(12))
    table = store.compute(tokens)
    store.prefix.forget(block_ids=table, start=4, end=12)
    assert store.match([*tokens, 0]) == tuple(table[:1])


def test_switched_off_it_finds_nothing():
    """`enable_prefix_caching=False` would be ignored."""
    store = Store(enabled=False)
    store.compute(list(range(8)))
    assert store.match(list(range(9))) == ()
    assert store.pool.num_digested == 0


def test_chain_hashes_each_block_once(monkeypatch):
    """A request waiting for room would hash its whole prompt again at every step."""
    calls = []
    monkeypatch.setattr("shuteye.cache.blocks.block_digest", lambda *args: calls.append(args) or block_digest(*args))
    chain, tokens = HashChain(BLOCK), list(range(40))
    first = [chain.digest(tokens, index) for index in range(10)]
    assert [chain.digest(tokens, index) for index in reversed(range(10))] == first[::-1]
    assert len(calls) == 10


@given(prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), max_size=12), release=st.booleans())
@settings(max_examples=200, deadline=None)
def test_match_is_the_longest_stored_prefix(prompts, release):
    """Against a model that stores whole prefixes: no false hit, no missed hit, also for freed blocks."""
    store, stored = Store(num_blocks=200), set()
    for tokens in prompts:
        longest = 0
        while (longest + 1) * BLOCK < len(tokens) and tuple(tokens[: (longest + 1) * BLOCK]) in stored:
            longest += 1
        assert len(store.match(tokens)) == longest
        table = store.compute(tokens)
        assert len(set(table)) == len(table)
        stored |= {tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)}
        if release:
            store.pool.release(table)
