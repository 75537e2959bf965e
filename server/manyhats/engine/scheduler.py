"""Picks sequences and token counts for the next step, and takes blocks back when they run out.

Order: running decodes, running prefills, then waiting sequences by (priority, arrival), preempted ones first
within their priority. A running sequence's blocks cover all its tokens, so only decodes ever ask for more;
when none is left, the running sequence that ranks last gives all of its blocks back and is computed again
later, its output kept. The one that ranks first is thus never preempted while others run, and so finishes.

The engine's own sequences (``is_internal``) are few and short, and threads wait for them: they go ahead of every
request, and neither ``max_waiting`` nor ``max_num_sequences`` holds for them. In turn a step in which others decode
takes few of their tokens, so that it grows by half at most.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from manyhats.engine.admission import Admission, check_addable, plan_admission
from manyhats.engine.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.errors import QueueFullError
from manyhats.engine.prefix_cache import max_hit_tokens, register_full_blocks
from manyhats.engine.schedule import Chunk, Schedule, SchedulerConfig
from manyhats.engine.sequence import Sequence, SequenceStatus

__all__ = ["Chunk", "Schedule", "Scheduler", "SchedulerConfig"]

_RETRY_AFTER_S = 1.0
_INTERNAL_PRIORITY = 2**31
"""Above every request's."""
_INTERNAL_TOKENS = 3
"""As many make a step of one decode a quarter longer; each two further decodes allow for one more."""


@dataclass(slots=True)
class _Step:
    """A schedule in the making: what is left of the step's tokens, and of those for internal sequences."""

    budget: int
    internal_budget: int
    chunks: list[Chunk] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_queries: int = 0
    num_hits: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
        self.budget -= num_tokens

    def add_prefill(self, sequence: Sequence) -> None:
        num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, self.budget)
        if sequence.is_internal:
            num_tokens = min(num_tokens, max(1, self.internal_budget))
            self.internal_budget -= num_tokens
        self.add(sequence, num_tokens)

    def freeze(self) -> Schedule:
        return Schedule(
            tuple(self.chunks),
            tuple(self.block_copies),
            tuple(self.preempted),
            self.num_queries,
            self.num_hits,
        )


class Scheduler:
    """Owns every sequence between ``add`` and ``finish``, and the blocks they hold.

    One turn is ``schedule``, run, then ``append_token`` and ``commit`` in either order. Blocks that are let
    go between ``schedule`` and ``commit`` come free at ``commit``, since the step may still write to them.
    Not thread-safe; it belongs to the engine thread.
    """

    def __init__(self, config: SchedulerConfig, allocator: BlockAllocator) -> None:
        self.config = config
        self.allocator = allocator
        self._waiting: list[Sequence] = []  # sorted by _waiting_rank
        self._running: list[Sequence] = []  # sorted by rank
        self._prefixes: dict[SharedPrefix, None] = {}  # held, the oldest first
        self._num_added = 0
        self._in_flight: Schedule | None = None
        self._freed_in_flight: list[int] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a first step, or were preempted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            QueueFullError: ``max_waiting`` sequences wait, and it is not internal.
            FieldInvalidError: it could never run to ``max_num_tokens`` in this pool.
            ValueError: it contradicts itself, or was added before.
        """
        if len(self._waiting) >= self.config.max_waiting and not sequence.is_internal:
            raise QueueFullError(self.config.max_waiting, _RETRY_AFTER_S)
        check_addable(sequence, self.allocator)
        priority = _INTERNAL_PRIORITY if sequence.is_internal else sequence.priority
        sequence.rank = (-priority, sequence.arrival, self._num_added)
        self._num_added += 1
        self._enqueue(sequence)

    def schedule(self) -> Schedule:
        """Decide the next step.

        It has no chunks when no sequence can run: there is none, every running one awaits a token or
        ``finish``, or pinned prefixes leave too few blocks for the first in the queue even alone.

        Raises:
            RuntimeError: the last schedule with chunks was not committed.
        """
        if self._in_flight is not None:
            raise RuntimeError("the last schedule was not committed")
        step = _Step(self.config.max_num_batched_tokens, self.config.max_num_batched_tokens)
        self._cover_tokens(step)
        self._continue_running(step)
        self._admit_waiting(step)
        schedule = step.freeze()
        if schedule.chunks:
            self._in_flight = schedule
        return schedule

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Add an output token.

        Raises:
            ValueError: it has ``max_num_tokens`` already, or isn't running.
        """
        if sequence.status is not SequenceStatus.RUNNING:
            raise ValueError(f"sequence {sequence.id} is {sequence.status.value}")
        if len(sequence.token_ids) >= sequence.max_num_tokens:
            raise ValueError(f"sequence {sequence.id} has {sequence.max_num_tokens} tokens, its maximum")
        sequence.token_ids.append(token_id)

    def commit(self, schedule: Schedule) -> None:
        """Account for a step that has run; sequences finished meanwhile are passed over."""
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            end = chunk.start + chunk.num_tokens
            sequence.num_computed_tokens = end
            if sequence.logits_from is not None:
                sequence.logits_from = max(sequence.logits_from, end)
            register_full_blocks(sequence, self.allocator)
        if schedule is self._in_flight:
            self._in_flight = None
            self.allocator.free(self._freed_in_flight)
            self._freed_in_flight.clear()

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go, whatever its state; its full blocks stay in the prefix cache. Safe to repeat."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._free(sequence.block_table)
            sequence.block_table = []
        elif sequence.status is SequenceStatus.WAITING:
            del self._waiting[bisect_left(self._waiting, _waiting_rank(sequence), key=_waiting_rank)]
        sequence.status = SequenceStatus.FINISHED

    def hold(self, sequence: Sequence, num_tokens: int, *, recomputable: bool = True) -> SharedPrefix:
        """Keep the KV of a running sequence's first tokens for others to start from, beyond its finish.

        Args:
            sequence: it runs, and has computed (and committed) them.
            num_tokens: at least 1.
            recomputable: the scheduler may take the blocks back when nothing else can run; sequences that
                name the prefix then compute its tokens themselves.

        Raises:
            ValueError: fewer are computed.
        """
        if not 1 <= num_tokens <= sequence.num_computed_tokens or not sequence.block_table:
            raise ValueError(f"sequence {sequence.id} has {sequence.num_computed_tokens} tokens computed")
        blocks = sequence.block_table[: self.allocator.num_blocks_for(num_tokens)]
        for block_id in blocks:
            self.allocator.ref(block_id)
        prefix = SharedPrefix(tuple(blocks), num_tokens, recomputable)
        self._prefixes[prefix] = None
        return prefix

    def adopt(self, block_ids: list[int], num_tokens: int) -> SharedPrefix:
        """Keep blocks that the caller took from the allocator and filled, for others to start from."""
        prefix = SharedPrefix(tuple(block_ids), num_tokens)
        self._prefixes[prefix] = None
        return prefix

    def release(self, prefix: SharedPrefix) -> None:
        """Give a held prefix back. Safe to repeat, and after the scheduler has taken it back.

        Unless it is recomputable, no unfinished sequence may name it.
        """
        if prefix in self._prefixes:
            del self._prefixes[prefix]
            self._free(prefix.block_ids)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        insort(self._waiting, sequence, key=_waiting_rank)

    def _free(self, block_ids: list[int] | tuple[int, ...]) -> None:
        if self._in_flight is None:
            self.allocator.free(block_ids)
        else:
            self._freed_in_flight.extend(block_ids)

    def _cover_tokens(self, step: _Step) -> None:
        """Give every running sequence blocks for all its tokens, the first in rank first."""
        block_size = self.allocator.block_size
        for sequence in tuple(self._running):
            missing = -(-len(sequence.token_ids) // block_size) - len(sequence.block_table)
            if missing <= 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            while self.allocator.num_available < missing and sequence.status is SequenceStatus.RUNNING:
                if len(self._running) > 1 or not self._take_back_prefix(sequence.shared):
                    self._preempt(self._running[-1], step)
            if sequence.status is SequenceStatus.RUNNING:
                sequence.block_table.extend(self.allocator.allocate(missing))

    def _continue_running(self, step: _Step) -> None:
        prefills: list[Sequence] = []
        for sequence in self._running:
            num_left = len(sequence.token_ids) - sequence.num_computed_tokens
            if num_left == 1 and not sequence.is_internal:
                step.add(sequence, 1)
            elif num_left > 0:
                prefills.append(sequence)
        if step.chunks:
            step.internal_budget = _INTERNAL_TOKENS + len(step.chunks) // 2
        for sequence in prefills:
            if step.budget > 0:
                step.add_prefill(sequence)

    def _admit_waiting(self, step: _Step) -> None:
        while self._waiting and step.budget > 0:
            sequence = self._waiting[0]
            if len(self._running) >= self.config.max_num_sequences and not sequence.is_internal:
                return
            admission = self._affordable_admission(sequence)
            if admission is None:
                return
            del self._waiting[0]
            self._admit(sequence, admission, step)
            step.add_prefill(sequence)

    def _affordable_admission(self, sequence: Sequence) -> Admission | None:
        """How to start it, or None if there are too few blocks for all its tokens.

        While others run, one block stays free for each that still grows, or it would soon be preempted.
        Alone, it gets the blocks of recomputable prefixes too; with those gone, it must fit at full length,
        or it would start over without end.
        """
        allocator = self.allocator
        while True:
            plan = plan_admission(sequence, self._live_prefix(sequence), allocator)
            needed = allocator.num_blocks_for(len(sequence.token_ids)) - plan.num_borrowed_used
            if self._running:
                fits = needed + self._num_growing() <= allocator.num_available
                return plan if fits else None
            if needed <= allocator.num_available:
                break
            if not self._take_back_prefix(sequence.shared):
                return None
        if any(prefix.recomputable for prefix in self._prefixes):
            return plan
        most = allocator.num_blocks_for(sequence.max_num_tokens) - plan.num_borrowed_used
        return plan if most <= allocator.num_available else None

    def _admit(self, sequence: Sequence, admission: Admission, step: _Step) -> None:
        allocator = self.allocator
        for block_id in admission.borrowed:
            allocator.ref(block_id)
        num_own = allocator.num_blocks_for(len(sequence.token_ids)) - len(admission.borrowed)
        own = allocator.allocate(num_own)
        if admission.copy_from is not None:
            step.block_copies.append((admission.copy_from, own[0]))
        sequence.block_table = [*admission.borrowed, *own]
        sequence.num_registered_blocks = len(admission.borrowed)
        sequence.num_computed_tokens = admission.num_computed
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = admission.num_hit_tokens
            step.num_hits += admission.num_hit_tokens
            if max_hit_tokens(sequence) > 0:
                num_shared = admission.num_computed - admission.num_hit_tokens
                step.num_queries += sequence.num_prompt_tokens - num_shared
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=_rank)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        self._running.remove(sequence)
        self.allocator.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.num_preemptions += 1
        step.preempted.append(sequence)
        self._enqueue(sequence)

    def _live_prefix(self, sequence: Sequence) -> SharedPrefix | None:
        prefix = sequence.shared
        if prefix is None or not prefix.recomputable or prefix in self._prefixes:
            return prefix
        return sequence.fallback

    def _take_back_prefix(self, own: SharedPrefix | None) -> bool:
        """Take the oldest recomputable prefix's blocks, ``own`` last; whether there was one."""
        candidates = [prefix for prefix in self._prefixes if prefix.recomputable]
        if not candidates:
            return False
        victim = next((prefix for prefix in candidates if prefix is not own), candidates[0])
        self.release(victim)
        return True

    def _num_growing(self) -> int:
        """Running sequences that may still ask for a block."""
        allocator = self.allocator
        return sum(
            len(sequence.block_table) < allocator.num_blocks_for(sequence.max_num_tokens)
            for sequence in self._running
        )


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank


def _waiting_rank(sequence: Sequence) -> tuple[int, bool, float, int]:
    priority, arrival, order = sequence.rank
    return (priority, sequence.num_preemptions == 0, arrival, order)
