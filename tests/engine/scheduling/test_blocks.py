import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhats.engine.scheduling.blocks import BlockAllocator


def test_a_new_pool_is_all_free() -> None:
    pool = BlockAllocator(4, 16)
    assert (pool.num_free, pool.num_cached, pool.num_used, pool.num_available) == (4, 0, 0, 4)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="pool"):
        BlockAllocator(num_blocks, block_size)


def test_blocks_for_tokens_rounds_up() -> None:
    pool = BlockAllocator(4, 16)
    assert [pool.num_blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_asking_for_more_than_there_is_takes_nothing() -> None:
    pool = BlockAllocator(2, 16)
    with pytest.raises(ValueError, match="3 blocks"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_registered_block_stays_findable_until_it_is_reused() -> None:
    pool = BlockAllocator(2, 16)
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    pool.free([block])
    assert (pool.find(b"key"), pool.num_cached, pool.num_used) == (block, 1, 0)
    pool.allocate(2)
    assert pool.find(b"key") is None


def test_free_blocks_go_before_cached_ones_and_the_longest_unused_first() -> None:
    pool = BlockAllocator(3, 16)
    old, young, plain = pool.allocate(3)
    pool.register(old, b"old")
    pool.register(young, b"young")
    pool.free([old])
    pool.free([young])
    pool.free([plain])
    assert pool.allocate(1) == [plain]
    assert pool.allocate(1) == [old]
    assert (pool.find(b"old"), pool.find(b"young")) == (None, young)


def test_the_end_of_a_freed_prefix_is_reused_before_its_beginning() -> None:
    pool = BlockAllocator(3, 16)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.register(block, bytes([block]))
    pool.free(blocks)
    assert pool.allocate(3) == blocks[::-1]


def test_the_first_block_registered_under_a_key_stays_the_one() -> None:
    pool = BlockAllocator(2, 16)
    first, second = pool.allocate(2)
    pool.register(first, b"key")
    pool.register(second, b"key")
    assert pool.find(b"key") == first
    pool.free([second])
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_misuse_is_an_error() -> None:
    pool = BlockAllocator(2, 16)
    (block,) = pool.allocate(1)
    pool.register(block, b"key")
    with pytest.raises(ValueError, match="registered"):
        pool.register(block, b"other")
    pool.free([block])
    with pytest.raises(ValueError, match="not in use"):
        pool.free([block])
    with pytest.raises(ValueError, match="registered"):
        pool.register(block, b"key")
    with pytest.raises(ValueError, match="free"):
        pool.ref(1 - block)


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a list of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockAllocator(6, 4)
        self.held: list[int] = []
        self.keys: dict[bytes, int] = {}

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_available:
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & set(self.held)
        self.held += blocks
        self.keys = {key: block for key, block in self.keys.items() if block not in blocks}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.pool.free([block])
        self.held.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.integers(0, 9))
    def register(self, data: st.DataObject, key: int) -> None:
        block, name = data.draw(st.sampled_from(self.held)), bytes([key])
        if block in self.keys.values():
            return
        self.pool.register(block, name)
        self.keys.setdefault(name, block)

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = self.pool.find(data.draw(st.sampled_from(sorted(self.keys))))
        assert block is not None
        self.pool.ref(block)
        self.held.append(block)

    @invariant()
    def counts_agree(self) -> None:
        pool = self.pool
        assert [pool.num_refs(b) for b in range(6)] == [self.held.count(b) for b in range(6)]
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
        assert pool.num_used == len(set(self.held))
        assert pool.num_cached == len(set(self.keys.values()) - set(self.held))
        assert all(pool.find(key) == block for key, block in self.keys.items())


TestAllocatorMachine = AllocatorMachine.TestCase
