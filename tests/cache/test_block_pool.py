"""Block pool: what would let two requests write one block, lose a block, or find content that is gone."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shuteye.cache.blocks import BlockPool


def test_reserved_block_is_never_handed_out():
    """The canary would overwrite a request's KV."""
    pool = BlockPool(4)
    assert sorted(pool.allocate() for _ in range(pool.num_free)) == [1, 2, 3]
    assert pool.num_usable == 3


def test_touched_blocks_are_reused_before_untouched_ones():
    """Memory would grow to the whole pool although few blocks are ever needed at once."""
    pool = BlockPool(10)
    for _ in range(20):
        pool.release([pool.allocate(), pool.allocate()])
    assert {pool.allocate(), pool.allocate()} == {1, 2}


def test_cached_blocks_are_evicted_last_and_least_recently_freed_first():
    """A hot system prompt would be evicted while cold or empty blocks are left."""
    pool = BlockPool(5)
    cold, hot, plain = pool.allocate(), pool.allocate(), pool.allocate()
    pool.register(cold, b"cold")
    pool.register(hot, b"hot")
    pool.release([cold])
    pool.release([hot])
    pool.release([plain])
    assert pool.allocate() == plain
    assert pool.allocate() == 4  # never used
    assert pool.find(b"cold") == cold
    assert pool.allocate() == cold
    assert pool.find(b"cold") is None
    assert pool.find(b"hot") == hot


def test_a_table_is_evicted_from_its_end():
    """Evicting the first block of a prefix makes the rest of the prefix unreachable."""
    pool = BlockPool(4)
    table = [pool.allocate() for _ in range(3)]
    for index, block_id in enumerate(table):
        pool.register(block_id, bytes([index]))
    pool.release(table)
    assert [pool.allocate() for _ in range(3)] == table[::-1]


def test_freed_block_with_a_digest_can_be_revived():
    """Prefix caching would only work between requests that run at the same time."""
    pool = BlockPool(2)
    block_id = pool.allocate()
    pool.register(block_id, b"a")
    pool.release([block_id])
    assert pool.is_free(block_id)
    pool.share(block_id)
    assert not pool.is_free(block_id)
    assert pool.num_free == 0


def test_second_block_with_the_same_content_does_not_steal_the_digest():
    """Evicting one of two equal blocks would make the other's digest point nowhere."""
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"a")
    pool.register(second, b"a")
    pool.release([second])
    assert pool.find(b"a") == first
    assert pool.allocate() == second
    assert pool.find(b"a") == first


@pytest.mark.parametrize("misuse", ["release", "share", "register", "allocate"])
def test_misuse_is_caught_where_it_happens(misuse):
    """A double free would surface much later as another request's garbage."""
    pool = BlockPool(2)
    block_id = pool.allocate()
    match misuse:
        case "release":
            pool.release([block_id])
            call = lambda: pool.release([block_id])  # noqa: E731
        case "share":
            call = lambda: pool.share(block_id)  # noqa: E731
        case "register":
            pool.release([block_id])
            call = lambda: pool.register(block_id, b"a")  # noqa: E731
        case _:
            call = pool.allocate
    with pytest.raises(AssertionError):
        call()


class PoolMachine(RuleBasedStateMachine):
    """Owners hold tables of blocks; a plain model remembers who owns what and what content each digest names."""

    @initialize(num_blocks=st.integers(2, 8))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what is in a block, as far as it may be found

    @precondition(lambda self: self.pool.num_free > 0)
    @rule(new_table=st.booleans())
    def allocate(self, new_table):
        owned = {block_id for table in self.tables for block_id in table}
        block_id = self.pool.allocate()
        assert block_id not in owned
        assert 0 < block_id < self.num_blocks
        evicted = self.content.pop(block_id, None)
        if evicted is not None:  # nothing without content may have been left
            assert all(other in self.content for other in range(1, self.num_blocks) if other not in owned | {block_id})
        if new_table or not self.tables:
            self.tables.append([])
        self.tables[-1].append(block_id)

    @rule(digest=st.sampled_from([b"a", b"b", b"c"]))
    def find_and_share(self, digest):
        expected = next((block_id for block_id, content in self.content.items() if content == digest), None)
        found = self.pool.find(digest)
        assert found == expected
        if found is not None:
            self.pool.share(found)
            self.tables.append([found])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data, digest):
        block_id = data.draw(st.sampled_from([block_id for table in self.tables for block_id in table]))
        if block_id not in self.content:
            self.pool.register(block_id, digest)
            if digest not in self.content.values():
                self.content[block_id] = digest

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @rule(block_id=st.integers(1, 7))
    def forget(self, block_id):
        self.pool.forget(block_id)
        self.content.pop(block_id, None)

    @rule()
    def forget_all(self):
        self.pool.forget_all()
        self.content.clear()

    @invariant()
    def counts_are_exact(self):
        owners = Counter(block_id for table in self.tables for block_id in table)
        assert all(self.pool.reference_count(block_id) == owners[block_id] for block_id in range(self.num_blocks))
        assert self.pool.num_free == self.num_blocks - 1 - len(owners)
        assert self.pool.num_digested == len(self.content)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
