"""Which decodes of a step also run drafts, and how many: only as many as hardly make it longer."""

from __future__ import annotations

from dataclasses import replace

from manyhats.engine.scheduling.blocks import BlockAllocator
from manyhats.engine.scheduling.step import Step


def add_drafts(step: Step, allocator: BlockAllocator, max_rows: int) -> None:
    """Let decodes run their sequences' drafts, by turns one more each, while the step has few rows.

    Where some of its sequences have no drafts, and so nothing to gain, the step grows to half as many rows only. No
    draft takes a block from anybody: where none is free, there is none.

    Args:
        step: all its chunks are known.
        allocator: gives the blocks for drafts.
        max_rows: of a step with drafts.
    """
    drafting = [
        index for index, chunk in enumerate(step.chunks) if chunk.sequence.drafts and chunk.ends_tokens
    ]
    if not drafting:
        return
    num_rows = sum(chunk.num_tokens for chunk in step.chunks)
    limit = max_rows if len(drafting) == len(step.chunks) else max_rows // 2
    wanted = [len(step.chunks[index].sequence.drafts) for index in drafting]
    for index, count in zip(drafting, _dealt(wanted, min(limit - num_rows, step.budget)), strict=True):
        _add(step, index, count, allocator)


def _dealt(wanted: list[int], room: int) -> list[int]:
    """How many of ``room`` each gets, by turns, but no more than it wants."""
    dealt = [0] * len(wanted)
    while room > 0 and dealt != wanted:
        for index, most in enumerate(wanted):
            if room > 0 and dealt[index] < most:
                dealt[index] += 1
                room -= 1
    return dealt


def _add(step: Step, index: int, count: int, allocator: BlockAllocator) -> None:
    """Give a chunk up to ``count`` drafts, and blocks for them."""
    chunk = step.chunks[index]
    sequence, table = chunk.sequence, chunk.sequence.block_table
    num_cells = (len(table) + allocator.num_available) * allocator.block_size
    count = min(count, num_cells - sequence.num_tokens)
    drafts, sequence.drafts = sequence.drafts[:count], ()
    table.extend(
        allocator.allocate(max(0, allocator.num_blocks_for(sequence.num_tokens + count) - len(table)))
    )
    step.chunks[index] = replace(chunk, drafts=drafts)
    step.budget -= count
