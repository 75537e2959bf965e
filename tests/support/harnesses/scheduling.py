"""A stand-in for the engine: runs schedules on a KV cache of token histories and checks what it reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
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

    Args:
        scheduler: its own.
        is_ahead: whether a step is run before the one before it is committed, if it may be.

    Attributes:
        drafts: what every sequence that decodes proposes; each of three tokens comes often.
        in_flight: the schedule that is not committed.
        chosen: tokens of its sequences that these do not have yet.
    """

    def __init__(self, scheduler: Scheduler, *, is_ahead: bool = False) -> None:
        self.scheduler = scheduler
        self.is_ahead = is_ahead
        self.in_flight: Schedule | None = None
        self.chosen: dict[Sequence, list[int]] = {}
        size = scheduler.allocator.block_size
        self.kv: list[list[object]] = [[None] * size for _ in range(scheduler.allocator.num_blocks)]
        self.logits: dict[Sequence, Counter[int]] = {}
        self.drafts: Seq[int] = ()

    def step(self, during: Callable[[Schedule], None] | None = None) -> Schedule:
        """Schedule, run, sample, commit; sequences at their maximum are finished.

        One step ahead, the commit is that of the step before, with which the next one ends if nothing else is left.
        """
        scheduler = self.scheduler
        if self.in_flight is not None and scheduler.must_land:
            self.land()
        for sequence in scheduler._running:
            if sequence.is_decoding:
                room = min(scheduler.num_draftable, sequence.max_num_tokens - sequence.num_tokens - 1)
                scheduler.draft(sequence, self.drafts[:room])
        schedule = scheduler.schedule()
        tables = {chunk.sequence: list(chunk.sequence.block_table) for chunk in schedule.chunks}
        if during is not None:
            during(schedule)
        self._run(schedule, tables)
        said = {chunk.sequence: self._said(chunk) for chunk in schedule.chunks if self._chooses(chunk)}
        if self.is_ahead:
            if schedule.chunks:
                scheduler.count_on(schedule)
            self.land()
            self.in_flight, self.chosen = (schedule, said) if schedule.chunks else (None, {})
        else:
            self._commit(schedule, said)
        return schedule

    def land(self) -> None:
        """Commit what is in flight."""
        if self.in_flight is not None:
            schedule, chosen, self.in_flight, self.chosen = self.in_flight, self.chosen, None, {}
            self._commit(schedule, chosen)

    def _commit(self, schedule: Schedule, said: Mapping[Sequence, Seq[int]]) -> None:
        for sequence, token_ids in said.items():
            if sequence.status is SequenceStatus.RUNNING:
                self.scheduler.append_tokens(sequence, *token_ids)
        self.scheduler.commit(schedule)
        for chunk in schedule.chunks:
            if chunk.sequence.num_tokens == chunk.sequence.max_num_tokens:
                self._finish_if_done(chunk.sequence)

    def _chooses(self, chunk: Chunk) -> bool:
        sequence = chunk.sequence
        is_short = sequence.num_expected_tokens < sequence.max_num_tokens
        return chunk.ends_tokens and is_short and not sequence.is_finished

    def drain(self, max_steps: int = 5000) -> int:
        """Step until nothing is left; how many steps it took."""
        for count in range(max_steps):
            if not self.scheduler.has_work:
                self.land()
                return count
            was_in_flight = self.in_flight is not None
            assert self.step().chunks or was_in_flight, "work is left and nothing was scheduled"
        raise AssertionError(f"not done after {max_steps} steps")

    def _run(self, schedule: Schedule, tables: dict[Sequence, list[int]]) -> None:
        """Copy, write all, then read all: the order in which a batched forward may do it."""
        size = self.scheduler.allocator.block_size
        for fill in schedule.prefix_fills:
            sequence = next(s for s in schedule.started if s.virtual is fill.virtual)
            for position in range(fill.first_token, sequence.num_virtual_tokens):
                block = fill.block_ids[(position - fill.first_token) // size]
                self.kv[block][position % size] = self._history(sequence, position)
        for source, destination in schedule.block_copies:
            self.kv[destination] = list(self.kv[source])
        for chunk in schedule.chunks:
            for position in range(chunk.start, chunk.start + chunk.num_rows):
                block = tables[chunk.sequence][position // size]
                self.kv[block][position % size] = self._history(chunk.sequence, position, chunk.drafts)
        for chunk in schedule.chunks:
            self._check_reads(chunk.sequence, tables[chunk.sequence], chunk.end)
            self._count_logits(chunk.sequence, chunk.start, chunk.end)

    def _check_reads(self, sequence: Sequence, table: list[int], end: int) -> None:
        size = self.scheduler.allocator.block_size
        for position in range(end):
            found = self.kv[table[position // size]][position % size]
            assert found == self._history(sequence, position), (sequence.id, position, found)

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

    def _tokens(self, sequence: Sequence) -> tuple[int, ...]:
        """Those that the scheduler counts on, unknown ones too."""
        return (*sequence.token_ids, *self.chosen.get(sequence, ())[: sequence.num_unknown_tokens])

    def _history(
        self, sequence: Sequence, position: int, drafts: tuple[int, ...] = ()
    ) -> tuple[bytes, tuple[int, ...]]:
        return (sequence.cache_key, (*self._tokens(sequence), *drafts)[: position + 1])

    def _said(self, chunk: Chunk) -> list[int]:
        """What follows a sequence's tokens, and its drafts as far as they were right."""
        tokens = self._tokens(chunk.sequence)
        last, num_tokens = tokens[-1], len(tokens)
        said: list[int] = []
        for draft in (*chunk.drafts, None):
            last = (7 * num_tokens + last) % 3
            said.append(last)
            num_tokens += 1
            if last != draft:
                break
        return said
