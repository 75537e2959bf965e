"""KV that outlives the sequences that computed it, for others to start from; all of it can be reclaimed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq

from manyhats.engine.scheduling.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.scheduling.sequence import Sequence
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


class HeldPrefixes:
    """Holds a reference on each block of its prefixes. Belongs to the scheduler.

    Args:
        allocator: of the blocks.
        free: drops references, at once or when the steps in flight are committed.
    """

    def __init__(self, allocator: BlockAllocator, free: Callable[[Seq[int]], None]) -> None:
        self._allocator = allocator
        self._free = free
        self._held: dict[SharedPrefix, VirtualTokens | None] = {}  # the least recently used first

    def __contains__(self, prefix: SharedPrefix) -> bool:
        return prefix in self._held

    def __iter__(self) -> Iterator[SharedPrefix]:
        return iter(self._held)

    def hold(
        self,
        block_ids: Seq[int],
        num_tokens: int,
        virtual: VirtualTokens | None = None,
        job_id: str = "",
    ) -> SharedPrefix:
        """Keep the first blocks of a sequence, which have this many tokens: virtual ones, or a job's own."""
        blocks = tuple(block_ids[: self._allocator.num_blocks_for(num_tokens)])
        for block_id in blocks:
            self._allocator.ref(block_id)
        prefix = SharedPrefix(blocks, num_tokens, job_id)
        self._held[prefix] = virtual
        if virtual is not None:
            virtual.held = prefix
        return prefix

    def of(self, sequence: Sequence) -> SharedPrefix | None:
        """The held prefix that a sequence can start from."""
        if sequence.shared is not None and sequence.shared in self._held:
            return sequence.shared
        return None if sequence.virtual is None else sequence.virtual.held

    def hold_virtual(self, sequence: Sequence) -> None:
        """Keep virtual tokens that a sequence has installed, for others of its task."""
        virtual = sequence.virtual
        if virtual is None or virtual.held is not None or not sequence.uses_prefix_cache:
            return
        if sequence.num_computed_tokens >= virtual.num_tokens:
            self.hold(sequence.block_table, virtual.num_tokens, virtual)

    def touch(self, prefix: SharedPrefix) -> None:
        """A sequence starts from it: it becomes the most recently used."""
        self._held[prefix] = self._held.pop(prefix)

    def release(self, prefix: SharedPrefix) -> None:
        """Release one; does nothing if it is no longer held."""
        if prefix in self._held:
            virtual = self._held.pop(prefix)
            if virtual is not None:
                virtual.held = None
            self._free(prefix.block_ids)

    def clear(self) -> None:
        """Forget all of them; their blocks are forgotten elsewhere."""
        for virtual in self._held.values():
            if virtual is not None:
                virtual.held = None
        self._held.clear()

    def make_room(self, num_blocks: int, spared: Collection[SharedPrefix]) -> bool:
        """Release virtual tokens that no running sequence uses, until this many blocks are free.

        The least recently used go first, ``spared`` never. If all of them would not be enough, they stay.
        """
        chosen = self._chosen_for_room(num_blocks, spared)
        for prefix in chosen or ():
            self.release(prefix)
        return chosen is not None

    def can_make_room(self, num_blocks: int, spared: Collection[SharedPrefix]) -> bool:
        """Whether ``make_room`` would."""
        return self._chosen_for_room(num_blocks, spared) is not None

    def _chosen_for_room(
        self, num_blocks: int, spared: Collection[SharedPrefix]
    ) -> list[SharedPrefix] | None:
        num_refs = self._allocator.num_refs
        chosen: list[SharedPrefix] = []
        num_freed = 0
        for prefix, virtual in self._held.items():
            if num_freed >= num_blocks:
                break
            if virtual is not None and prefix not in spared and num_refs(prefix.block_ids[0]) == 1:
                chosen.append(prefix)
                num_freed += sum(num_refs(block_id) == 1 for block_id in prefix.block_ids)
        return chosen if num_freed >= num_blocks else None

    def take_one(self, last: SharedPrefix | None) -> bool:
        """Release any one, ``last`` only if there is no other; returns whether there was one."""
        victim = next((prefix for prefix in self._held if prefix is not last), last)
        if victim is None or victim not in self._held:
            return False
        self.release(victim)
        return True
