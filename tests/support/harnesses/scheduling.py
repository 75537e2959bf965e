"""A stand-in for the engine: runs schedules on a KV cache of token histories and checks what it reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from manyhats.adapters.reserved_labels import EQUAL, Entitlement
from manyhats.engine.scheduling.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.scheduling.schedule import Chunk, Schedule, SchedulerConfig
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Placement, Sequence, SequenceStatus
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens


def make_scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    sequences: int = 8,
    tokens: int = 16,
    waiting: int = 100,
    waiting_tokens: int = 100_000,
    bulk: int = 16,
    clock: Callable[[], float] = time.monotonic,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_sequences=sequences,
        max_num_batched_tokens=tokens,
        max_waiting=waiting,
        max_waiting_tokens=waiting_tokens,
        max_bulk_tokens=bulk,
    )
    return Scheduler(config, BlockAllocator(num_blocks, block_size), clock=clock)


def make_sequence(
    name: str,
    tokens: Seq[int],
    new: int = 1,
    *,
    cache_key: bytes = b"base",
    priority: int = 0,
    arrival: float = 0.0,
    logits_from: int | None = None,
    shared: SharedPrefix | None = None,
    virtual: VirtualTokens | None = None,
    uses_prefix_cache: bool = True,
    is_internal: bool = False,
    is_bulk: bool = False,
    placement: Placement | None = None,
    task: str = "",
    entitlement: Entitlement = EQUAL,
    deadline_s: float | None = None,
) -> Sequence:
    return Sequence(
        id=name,
        token_ids=list(tokens),
        max_num_tokens=len(tokens) + new,
        cache_key=cache_key,
        priority=priority,
        arrival=arrival,
        logits_from=logits_from,
        shared=shared,
        virtual=virtual,
        uses_prefix_cache=uses_prefix_cache,
        is_internal=is_internal,
        is_bulk=is_bulk,
        placement=placement,
        task=task,
        entitlement=entitlement,
        deadline_s=deadline_s,
    )


class ToyEngine:
    """Each KV entry is the history that made it, so a wrong, stale or foreign block shows at once.

    Attributes:
        drafts: what every sequence that decodes proposes; each of three tokens comes often.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        size = scheduler.allocator.block_size
        self.kv: list[list[object]] = [[None] * size for _ in range(scheduler.allocator.num_blocks)]
        self.logits: dict[Sequence, Counter[int]] = {}
        self.drafts: Seq[int] = ()

    def step(self, during: Callable[[Schedule], None] | None = None) -> Schedule:
        """Schedule, run, sample, commit; sequences at their maximum are finished."""
        scheduler = self.scheduler
        for sequence in scheduler._running:
            if sequence.is_decoding:
                room = min(scheduler.num_draftable, sequence.max_num_tokens - sequence.num_tokens - 1)
                scheduler.draft(sequence, self.drafts[:room])
        schedule = scheduler.schedule()
        tables = {chunk.sequence: list(chunk.sequence.block_table) for chunk in schedule.chunks}
        if during is not None:
            during(schedule)
        self._run(schedule, tables)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if sequence.is_finished or not chunk.ends_tokens:
                continue
            if sequence.num_tokens < sequence.max_num_tokens:
                scheduler.append_tokens(sequence, *_said(chunk))
        scheduler.commit(schedule)
        for chunk in schedule.chunks:
            if chunk.sequence.num_tokens == chunk.sequence.max_num_tokens:
                self._finish_if_done(chunk.sequence)
        return schedule

    def drain(self, max_steps: int = 5000) -> int:
        """Step until nothing is left; how many steps it took."""
        for count in range(max_steps):
            if not self.scheduler.has_work:
                return count
            assert self.step().chunks, "work is left and nothing was scheduled"
        raise AssertionError(f"not done after {max_steps} steps")

    def _run(self, schedule: Schedule, tables: dict[Sequence, list[int]]) -> None:
        """Copy, write all, then read all: the order in which a batched forward may do it."""
        size = self.scheduler.allocator.block_size
        for fill in schedule.prefix_fills:
            sequence = next(s for s in schedule.started if s.virtual is fill.virtual)
            for position in range(fill.first_token, sequence.num_virtual_tokens):
                block = fill.block_ids[(position - fill.first_token) // size]
                self.kv[block][position % size] = _history(sequence, position)
        for source, destination in schedule.block_copies:
            self.kv[destination] = list(self.kv[source])
        for chunk in schedule.chunks:
            for position in range(chunk.start, chunk.start + chunk.num_rows):
                block = tables[chunk.sequence][position // size]
                self.kv[block][position % size] = _history(chunk.sequence, position, chunk.drafts)
        for chunk in schedule.chunks:
            self._check_reads(chunk.sequence, tables[chunk.sequence], chunk.end)
            self._count_logits(chunk.sequence, chunk.start, chunk.end)

    def _check_reads(self, sequence: Sequence, table: list[int], end: int) -> None:
        size = self.scheduler.allocator.block_size
        for position in range(end):
            found = self.kv[table[position // size]][position % size]
            assert found == _history(sequence, position), (sequence.id, position, found)

    def _count_logits(self, sequence: Sequence, start: int, end: int) -> None:
        if sequence.logits_from is not None and not sequence.is_finished:
            counts = self.logits.setdefault(sequence, Counter())
            counts.update(range(max(start, sequence.logits_from), end))

    def _finish_if_done(self, sequence: Sequence) -> None:
        only_scores = sequence.max_num_tokens == sequence.num_prompt_tokens
        if only_scores and sequence.num_computed_tokens < sequence.num_tokens:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.scheduler.finish(sequence)


def _history(
    sequence: Sequence, position: int, drafts: tuple[int, ...] = ()
) -> tuple[bytes, tuple[int, ...]]:
    return (sequence.cache_key, (*sequence.token_ids, *drafts)[: position + 1])


def _said(chunk: Chunk) -> list[int]:
    """What follows a sequence's tokens, and its drafts as far as they were right."""
    last, num_tokens = chunk.sequence.token_ids[-1], chunk.sequence.num_tokens
    said: list[int] = []
    for draft in (*chunk.drafts, None):
        last = (7 * num_tokens + last) % 3
        said.append(last)
        num_tokens += 1
        if last != draft:
            break
    return said
