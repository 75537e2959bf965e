"""KV cache blocks: who holds which, which are free, and which still hold a prefix that can be found again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Blocks whose KV is already computed and serves as the first tokens of other sequences.

    Their holder owns one reference on each block until it releases them. Compared by identity.

    Attributes:
        block_ids: in order; the last may be partly filled.
        num_tokens: how many tokens they hold.
        job_id: of the job that releases them; empty for virtual tokens.
    """

    block_ids: tuple[int, ...]
    num_tokens: int
    job_id: str = ""


class BlockAllocator:
    """Hands out, reference-counts, shares and frees the blocks of one KV cache.

    A block is in exactly one state: *used* (someone holds a reference), *cached* (nobody does, but its contents can be
    found under a key) or *free*. Cached blocks are handed out only when no free one is left, the longest unused first.
    Not thread-safe; it belongs to the engine thread.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Make a pool of ``num_blocks`` free blocks of ``block_size`` tokens each.

        Raises:
            ValueError: either is less than 1.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Make every block free, whoever holds it."""
        num_blocks = self.num_blocks
        self._num_refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._keys: list[bytes | None] = [None] * num_blocks
        self._roots = [b""] * num_blocks  # of those with a key
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose contents can still be found."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that someone holds."""
        return self.num_blocks - self.num_available

    def num_refs(self, block_id: int) -> int:
        """How many references this block has."""
        return self._num_refs[block_id]

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks ``num_tokens`` tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks with one reference each; their old contents can no longer be found.

        Raises:
            ValueError: fewer are available; check ``num_available`` first.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks were asked for, {self.num_available} are available")
        return [self._take_one() for _ in range(count)]

    def ref(self, block_id: int) -> None:
        """Add a reference to a used or cached block.

        Raises:
            ValueError: the block is free, so it has no contents to share.
        """
        if self._num_refs[block_id] == 0:
            if block_id not in self._cached:
                raise ValueError(f"block {block_id} is free")
            del self._cached[block_id]
        self._num_refs[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference from each block, last to first.

        Backwards, because the end of a prefix is less useful than its beginning, and is thus reused earlier.

        Raises:
            ValueError: nobody holds one of them.
        """
        for block_id in reversed(tuple(block_ids)):
            if self._num_refs[block_id] == 0:
                raise ValueError(f"block {block_id} is not in use")
            self._num_refs[block_id] -= 1
            if self._num_refs[block_id] > 0:
                continue
            if self._keys[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def register(self, block_id: int, key: bytes, root: bytes = b"") -> None:
        """Make a used, full block findable under ``key``; a block registered under it earlier stays.

        Args:
            block_id: the block.
            key: of its contents.
            root: what ``forget`` knows it by, with others.

        Raises:
            ValueError: nobody holds the block, or it has another key.
        """
        if self._num_refs[block_id] == 0 or self._keys[block_id] not in (None, key):
            raise ValueError(f"block {block_id} can't be registered")
        if self._block_of.setdefault(key, block_id) == block_id:
            self._keys[block_id], self._roots[block_id] = key, root

    def forget(self, root: bytes) -> None:
        """Make every block of a root unfindable; cached ones become free."""
        for block_id, key in enumerate(self._keys):
            if key is None or self._roots[block_id] != root:
                continue
            self._keys[block_id] = None
            del self._block_of[key]
            if block_id in self._cached:
                del self._cached[block_id]
                self._free.append(block_id)

    def find(self, key: bytes) -> int | None:
        """The block registered under ``key``, used or cached; it takes no reference."""
        return self._block_of.get(key)

    def _take_one(self) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            key = self._keys[block_id]
            if key is not None:
                del self._block_of[key]
                self._keys[block_id] = None
        self._num_refs[block_id] = 1
        return block_id
