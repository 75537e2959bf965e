"""Names of full blocks by content, so that a sequence finds the blocks another has computed.

key_0 = H(H(cache_key) ‖ tokens of block 0), key_i = H(key_(i-1) ‖ tokens of block i), H = BLAKE2b-256. A key therefore
identifies every token up to the block's end and everything that ``cache_key`` names (base, adapter, position offset,
salt). Only digests are compared.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.sequence import Sequence

_DIGEST_SIZE = 32


def extend_block_keys(sequence: Sequence, num_blocks: int, block_size: int) -> None:
    """Compute the sequence's first ``num_blocks`` keys; all their tokens must be there."""
    keys, tokens = sequence.block_keys, sequence.token_ids
    for index in range(len(keys), num_blocks):
        parent = keys[index - 1] if index else blake2b(sequence.cache_key, digest_size=_DIGEST_SIZE).digest()
        block = array("q", tokens[index * block_size : (index + 1) * block_size])
        keys.append(blake2b(parent + block.tobytes(), digest_size=_DIGEST_SIZE).digest())


def max_hit_tokens(sequence: Sequence) -> int:
    """How many tokens cached blocks may cover: never the last one, nor any whose logits are still needed."""
    if not sequence.uses_prefix_cache:
        return 0
    limit = len(sequence.token_ids) - 1
    return limit if sequence.logits_from is None else min(limit, sequence.logits_from)


def find_hits(sequence: Sequence, first_block: int, allocator: BlockAllocator) -> list[int]:
    """The longest run of cached blocks from block ``first_block`` of the sequence on; takes no references."""
    last_block = max_hit_tokens(sequence) // allocator.block_size
    hits: list[int] = []
    if last_block <= first_block:
        return hits
    extend_block_keys(sequence, last_block, allocator.block_size)
    for key in sequence.block_keys[first_block:last_block]:
        block_id = allocator.find(key)
        if block_id is None:
            break
        hits.append(block_id)
    return hits


def register_full_blocks(sequence: Sequence, allocator: BlockAllocator) -> None:
    """Make the sequence's computed full blocks findable; those it took from elsewhere already are."""
    num_full = sequence.num_computed_tokens // allocator.block_size
    if not sequence.uses_prefix_cache or num_full <= sequence.num_registered_blocks:
        return
    extend_block_keys(sequence, num_full, allocator.block_size)
    for index in range(sequence.num_registered_blocks, num_full):
        allocator.register(sequence.block_table[index], sequence.block_keys[index], sequence.cache_key)
    sequence.num_registered_blocks = num_full
