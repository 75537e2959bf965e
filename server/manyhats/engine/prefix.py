"""Virtual tokens: their keys and values are put into blocks once, and every request of the task starts from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.blocks import SharedPrefix
from manyhats.engine.errors import FieldInvalidError
from manyhats.engine.internal_jobs import InternalJob
from manyhats.engine.jobs import Output, SampledToken
from manyhats.engine.kernels.interface import KVCache
from manyhats.engine.scheduler import Scheduler
from manyhats.engine.sequence import Sequence

PLACEHOLDER_ID = 0
"""Stands in a sequence's token ids for a virtual token; it is never looked up."""


@dataclass(frozen=True, slots=True, eq=False)
class ResidentPrefix:
    """The virtual tokens of a loaded adapter.

    Attributes:
        shared: their blocks; the adapter's residency owns a reference on each.
        position_offset: real token t has position ``num_virtual_tokens + t + position_offset``.
    """

    shared: SharedPrefix
    position_offset: int

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.shared.num_tokens


OnPrefix = Callable[[ResidentPrefix], None]
"""Told on the engine's thread of a prefix that is in place."""


class KVPrefixJob(InternalJob[ResidentPrefix]):
    """Copies stored keys and values into blocks of their own, as soon as there are enough."""

    def __init__(self, job_id: str, prefix: KVPrefix, cache: KVCache, on_done: OnPrefix) -> None:
        super().__init__(job_id, on_done)
        self._prefix = prefix
        self._cache = cache

    def start(self, scheduler: Scheduler) -> None:
        """Checks that the pool could ever hold it."""
        check_capacity(self._prefix.num_virtual_tokens, scheduler)

    def tick(self, scheduler: Scheduler, now_s: float) -> Output | None:
        """Takes blocks and fills them, once there are enough."""
        allocator = scheduler.allocator
        num_tokens = self._prefix.num_virtual_tokens
        num_blocks = allocator.num_blocks_for(num_tokens)
        if allocator.num_available < num_blocks:
            return None
        blocks = allocator.allocate(num_blocks)
        self._cache.write(blocks, self._prefix.keys, self._prefix.values)
        self._finish(ResidentPrefix(scheduler.adopt(blocks, num_tokens), self._prefix.position_offset))
        return None

    def abort(self, scheduler: Scheduler) -> None:
        """It holds nothing before it is done."""


class PromptPrefixJob(InternalJob[ResidentPrefix]):
    """Runs the embeddings of virtual tokens once, with the adapter's own deltas, and keeps their blocks."""

    def __init__(self, job_id: str, prompt: PromptEmbeddings, slot: int, on_done: OnPrefix) -> None:
        super().__init__(job_id, on_done)
        num_tokens = prompt.num_virtual_tokens
        self._sequence = Sequence(
            id=job_id,
            token_ids=[PLACEHOLDER_ID] * num_tokens,
            max_num_tokens=num_tokens,
            slot=slot,
            embeddings=prompt.embeddings.to(torch.float32),
            uses_prefix_cache=False,
            is_internal=True,
        )

    def start(self, scheduler: Scheduler) -> None:
        """Queues the virtual tokens."""
        check_capacity(self._sequence.num_tokens, scheduler)
        scheduler.add(self._sequence)

    def commit(
        self, sequence: Sequence, sampled: SampledToken | None, scheduler: Scheduler, now_s: float
    ) -> Output | None:
        """All virtual tokens have run: their blocks stay."""
        shared = scheduler.hold(sequence, sequence.num_tokens, recomputable=False)
        scheduler.finish(sequence)
        self._finish(ResidentPrefix(shared, 0))
        return None

    def abort(self, scheduler: Scheduler) -> None:
        """Frees the sequence's blocks."""
        scheduler.finish(self._sequence)


def check_capacity(num_tokens: int, scheduler: Scheduler) -> None:
    """See that the pool can hold so many virtual tokens and a block beside them.

    Raises:
        FieldInvalidError: it cannot.
    """
    allocator = scheduler.allocator
    if allocator.num_blocks_for(num_tokens) >= allocator.num_blocks:
        raise FieldInvalidError(
            "num_virtual_tokens",
            f"are {num_tokens}; the KV cache holds {allocator.num_blocks * allocator.block_size} tokens in all",
        )
