"""Where the blocks of a waiting sequence would come from, and how much of it would be computed already."""

from __future__ import annotations

from dataclasses import dataclass

from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.scheduling.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.scheduling.prefix_cache import find_hits
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus


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


def plan_admission(sequence: Sequence, shared: SharedPrefix | None, allocator: BlockAllocator) -> Admission:
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
