"""How a waiting sequence starts: where its blocks come from, and how much of it is computed already."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.scheduling.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.scheduling.held_prefixes import HeldPrefixes
from manyhats.engine.scheduling.prefix_cache import find_hits, max_hit_tokens
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.step import Step
from manyhats.engine.scheduling.virtual_tokens import PrefixFill


@dataclass(frozen=True, slots=True)
class Admission:
    """How a sequence would start.

    Attributes:
        borrowed: blocks of its shared prefix and the prefix cache, the first of its table.
        num_borrowed_used: those of them that are held already, and so cost nothing.
        num_computed: tokens whose KV it would start with.
        num_hit_tokens: those of them that the prefix cache saves, not counting virtual tokens.
        copy_from: partly filled block of the shared prefix, to be copied to its first own block.
        fill_from: the first of the virtual tokens whose stored keys and values are to be copied to its own blocks.
    """

    borrowed: tuple[int, ...]
    num_borrowed_used: int
    num_computed: int
    num_hit_tokens: int
    copy_from: int | None
    fill_from: int | None


class Admissions:
    """Finds blocks for sequences that are to start, and assigns them. Belongs to the scheduler."""

    def __init__(self, config: SchedulerConfig, allocator: BlockAllocator, prefixes: HeldPrefixes) -> None:
        self._config = config
        self._allocator = allocator
        self._prefixes = prefixes

    def awaits_virtual(self, sequence: Sequence, running: Seq[Sequence]) -> bool:
        """Whether a running sequence is computing the virtual tokens that this one also begins with."""
        virtual = sequence.virtual
        if virtual is None or virtual.held is not None or virtual.embeddings is None:
            return False
        return any(
            other.virtual is virtual and other.num_computed_tokens < virtual.num_tokens for other in running
        )

    def has_tokens(self, sequence: Sequence, step: Step, *, are_others_waiting: bool) -> bool:
        """Whether the step has tokens for a waiting sequence; a bulk one may be short by what is already computed."""
        if sequence.is_whole:
            return step.has_whole_room(sequence)
        if not self._config.is_bulk(sequence, sequence.num_tokens):
            return step.room > 0
        plan = _plan(sequence, self._prefixes.of(sequence), self._allocator)
        num_left = sequence.num_tokens - plan.num_computed
        if not self._config.is_bulk(sequence, num_left):
            return True
        return step.has_bulk_room(sequence, num_left, are_others_waiting=are_others_waiting)

    def find(self, sequence: Sequence, step: Step, running: Seq[Sequence]) -> Admission | None:
        """How to start it, or None if there are too few blocks for all its tokens.

        While others run, one block stays free for each that still grows, or it would soon be preempted. Alone, it may
        take the blocks of every prefix too: nothing else holds any, and it fits at full length (``check_addable``).
        Beside a step in flight no prefix makes room: its blocks would not be free yet.
        """
        allocator = self._allocator
        num_growing = sum(
            len(other.block_table) < allocator.num_blocks_for(other.max_num_tokens) for other in running
        )
        while True:
            prefix = self._prefixes.of(sequence)
            plan = _plan(sequence, prefix, allocator)
            needed = allocator.num_blocks_for(len(sequence.token_ids)) - plan.num_borrowed_used
            lacking = needed + num_growing - allocator.num_available
            if lacking <= 0:
                return plan
            spared = step.prefixes if prefix is None else {*step.prefixes, prefix}
            if step.is_ahead:
                step.lacks_room |= not running or self._prefixes.can_make_room(lacking, spared)
                return None
            if self._prefixes.make_room(lacking, spared):
                continue  # the prefix cache may have lost what the plan relies on
            if running or not self._prefixes.take_one(prefix):
                return None

    def start(self, sequence: Sequence, admission: Admission, step: Step) -> None:
        """Give a sequence its blocks, and the step what puts KV into them."""
        allocator = self._allocator
        for block_id in admission.borrowed:
            allocator.ref(block_id)
        num_own = allocator.num_blocks_for(len(sequence.token_ids)) - len(admission.borrowed)
        own = allocator.allocate(num_own)
        sequence.block_table = [*admission.borrowed, *own]
        prefix, virtual = self._prefixes.of(sequence), sequence.virtual
        if prefix is not None:
            self._prefixes.touch(prefix)
            step.prefixes.add(prefix)
        if admission.copy_from is not None:
            step.block_copies.append((admission.copy_from, own[0]))
        if admission.fill_from is not None and virtual is not None:
            filled = tuple(own[: allocator.num_blocks_for(virtual.num_tokens) - len(admission.borrowed)])
            step.prefix_fills.append(PrefixFill(virtual, admission.fill_from, filled))
        sequence.num_registered_blocks = len(admission.borrowed)
        sequence.num_computed_tokens = admission.num_computed
        sequence.num_charged = max(sequence.num_charged, admission.num_computed)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = admission.num_hit_tokens
            step.num_hits += admission.num_hit_tokens
            if max_hit_tokens(sequence) > 0:
                num_given = max(sequence.num_virtual_tokens, 0 if prefix is None else prefix.num_tokens)
                step.num_queries += sequence.num_prompt_tokens - num_given
        sequence.is_long = self._config.is_bulk(sequence, sequence.num_left)
        self._prefixes.hold_virtual(sequence)
        if virtual is not None and virtual.held is not None:
            step.prefixes.add(virtual.held)


def _plan(sequence: Sequence, shared: SharedPrefix | None, allocator: BlockAllocator) -> Admission:
    """Look up what exists: ``shared``'s full blocks, then the prefix cache's. Takes no references.

    The partly filled last block of ``shared`` is copied, since the sequence will write to it, unless the cache has that
    block with the sequence's own tokens in it. Stored virtual tokens that are in neither come from storage.
    """
    num_shared = shared.num_tokens if shared is not None else 0
    num_virtual = sequence.num_virtual_tokens
    num_full = num_shared // allocator.block_size
    hits = find_hits(sequence, num_full, allocator)
    borrowed, copy_from = tuple(hits), None
    if shared is not None:
        borrowed = (*shared.block_ids[:num_full], *hits)
        if num_shared % allocator.block_size != 0 and not hits:
            copy_from = shared.block_ids[num_full]
    num_computed = max(num_shared, len(borrowed) * allocator.block_size)
    fill_from = None
    if sequence.virtual is not None and sequence.virtual.embeddings is None and num_computed < num_virtual:
        fill_from, num_computed = num_computed, num_virtual
    return Admission(
        borrowed=borrowed,
        num_borrowed_used=sum(allocator.num_refs(block_id) > 0 for block_id in borrowed),
        num_computed=num_computed,
        num_hit_tokens=max(0, num_computed - max(num_shared, num_virtual)),
        copy_from=copy_from,
        fill_from=fill_from,
    )


def check_addable(sequence: Sequence, allocator: BlockAllocator) -> None:
    """Check that a new sequence can be run as specified.

    Raises:
        FieldInvalidError: it could never run to ``max_num_tokens`` in this pool.
        ValueError: it contradicts itself, or was added before.
    """
    name, num_tokens, shared = f"sequence {sequence.id}", len(sequence.token_ids), sequence.shared
    num_shared = 0 if shared is None else shared.num_tokens
    num_given = max(num_shared, sequence.num_virtual_tokens)
    if sequence.status is not SequenceStatus.NEW:
        raise ValueError(f"{name} was added before")
    if not 1 <= num_tokens <= sequence.max_num_tokens:
        raise ValueError(f"{name} has {num_tokens} tokens, at least 1 and at most {sequence.max_num_tokens}")
    if shared is not None and len(shared.block_ids) != allocator.num_blocks_for(num_shared):
        raise ValueError(f"{name} shares {len(shared.block_ids)} blocks for {num_shared} tokens")
    if num_given >= num_tokens:
        raise ValueError(f"{name} is given {num_given} tokens, which leaves none to run")
    if sequence.logits_from is not None and not num_given <= sequence.logits_from < num_tokens:
        raise ValueError(f"{name} has no logits at position {sequence.logits_from}")
    capacity = allocator.num_blocks * allocator.block_size
    if sequence.max_num_tokens > capacity:
        raise FieldInvalidError(
            "stopping.max_new_tokens",
            f"prompt and output may take {sequence.max_num_tokens} tokens; the KV cache holds {capacity}",
        )
