"""Picks sequences and token counts for the next step, and reclaims blocks when they run out.

Order: running decodes, running prefills, then waiting sequences in the ``Queue``'s order, by which tasks get their
shares; ``Step`` says who gets how many tokens. A running sequence's blocks cover all its tokens, so only decodes ever
need more; when none is left, the running sequence that ranks last gives up all its blocks and is recomputed later,
keeping its output. The one that ranks first is thus never preempted while others run, and so finishes.

Only running sequences are entitled to blocks. Prefixes kept for others to start from, such as virtual tokens, are
reclaimed if there is no room otherwise: waiting sequences keep nothing, and the first in the queue can always start
once nothing runs. One that does not fit yet is overtaken by later ones that do, but not forever.

Nor do waiting sequences have a slot: an adapter's ``placement`` gives one to each that starts. Where sequences run on
all slots, later ones on those adapters overtake the one that waits, but not forever either; sequences that need no slot
are not held up by it.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import islice

from manyhats.adapters.finish_rate import FinishRate
from manyhats.engine.errors import QueueFullError, QueueTooSlowError
from manyhats.engine.scheduling.admission import Admissions, check_addable
from manyhats.engine.scheduling.blocks import BlockAllocator, SharedPrefix
from manyhats.engine.scheduling.bulk_pace import BulkPace
from manyhats.engine.scheduling.drafts import add_drafts
from manyhats.engine.scheduling.held_prefixes import HeldPrefixes
from manyhats.engine.scheduling.in_flight import Flight, InFlight
from manyhats.engine.scheduling.pace import Pace
from manyhats.engine.scheduling.policy import Queue
from manyhats.engine.scheduling.prefix_cache import register_full_blocks
from manyhats.engine.scheduling.schedule import Chunk, Schedule, SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.step import Step
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens

__all__ = ["Chunk", "Schedule", "Scheduler", "SchedulerConfig"]

_MAX_PASSED = 32
"""How many later sequences may overtake one that waits for blocks; then nothing after it starts before it.

As many may take a slot before one that waits for it; then nothing after it gets one."""
_MAX_BLOCKED = 16
"""How many sequences may be tried without fitting in one step; trying each takes time."""
_MAX_LOOKED_AT = 128
"""How many that wait are looked at in one step, whatever keeps them from starting; what comes after them waits."""
_MAX_CROWDING = 64
"""A step begins no more prompts of tasks beyond their shares once these have so many tokens in it.

What others then ask waits for a step that has been kept short."""
_CAUTION = 1.5
"""How many times the expected time must be left on arrival: rates are those of the best window."""
_CAUTION_AT_START = 2.0
"""How many times that of an answer when it begins, since answers differ in length."""
_MARGIN = 1.25
"""How many times that of its own longest answer, if that is less."""


class Scheduler:
    """Owns every sequence between ``add`` and ``finish``, and the blocks they hold.

    One turn is ``schedule``, run, then ``append_tokens`` and ``commit`` in either order. Blocks and slots released
    between ``schedule`` and ``commit`` become free at ``commit``, since the step may still use them.

    A step may be scheduled one ahead: once ``count_on`` says that the one before it is launched, unless ``must_land``.
    A sequence that then stops running loses what is in flight of it. Steps are committed in their order.

    Not thread-safe; it belongs to the engine thread.

    Args:
        config: limits.
        allocator: of the blocks.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        allocator: BlockAllocator,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.allocator = allocator
        self._clock = clock
        self._queue = Queue(config, clock)
        self._pace = Pace(clock)
        self._bulk_pace = BulkPace()
        self._running: list[Sequence] = []  # sorted by rank
        self._paused: set[Sequence] = set()
        self._in_flight = InFlight(allocator, clock)
        self._prefixes = HeldPrefixes(allocator, self._in_flight.free)
        self._admissions = Admissions(config, allocator, self._prefixes)
        self._has_put_off = False
        self._lacks_room = False
        self._awaits_copy = False  # the last schedule left out a sequence whose adapter is not there yet

    @property
    def rate(self) -> FinishRate:
        """How many requests' sequences end."""
        return self._pace.rate

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a first step, or were preempted."""
        return len(self._queue)

    @property
    def num_paused(self) -> int:
        """Sequences that wait for ``resume``."""
        return len(self._paused)

    @property
    def is_held_back(self) -> bool:
        """Whether some wait and none runs, since each is of a task at one of its limits, or for an adapter's copy."""
        is_waiting = not self._running and len(self._queue) > 0
        return is_waiting and (self._awaits_copy or next(iter(self._queue), None) is None)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished and not paused."""
        return bool(self._running or self._queue)

    def check_queue(
        self,
        task: str = "",
        num_elsewhere: int = 0,
        num_tokens: int = 0,
        deadline_s: float | None = None,
    ) -> None:
        """Check that one more may wait; callable from any thread.

        Args:
            task: that it is of.
            num_elsewhere: requests that wait elsewhere before they are added.
            num_tokens: of its prompt.
            deadline_s: when it must be answered.

        Raises:
            QueueFullError: ``max_waiting`` are waiting, or so many that the places left are for other tasks; or so of
                tokens.
            QueueTooSlowError: it would hardly be answered by its deadline.
        """
        waiting = self._queue.counted
        num_ahead = waiting.num_requests + num_elsewhere
        if not self._queue.has_place(task, num_elsewhere):
            raise QueueFullError(self.config.max_waiting, self.rate.wait_s(num_ahead), num_ahead)
        if not self._queue.has_room(task, num_tokens):
            limit, unit = self.config.max_waiting_tokens, "tokens of prompts"
            raise QueueFullError(limit, self.rate.wait_s(num_ahead), waiting.num_tokens, unit)
        if deadline_s is not None:
            self._check_deadline(task, deadline_s)

    def _check_deadline(self, task: str, deadline_s: float) -> None:
        """Refuse what is likely to be given up half-way, so that what is begun is answered.

        What is late already is not refused for others' sake; it ends by its deadline.
        """
        num_ahead, left_s = self._queue.num_ahead(task), deadline_s - self._clock()
        needed_s = _CAUTION * (self._pace.answer_s(len(self._running), num_ahead) or 0.0)
        if needed_s > left_s > 0:
            limit, wait_s = self.config.max_waiting, self.rate.wait_s(num_ahead)
            raise QueueTooSlowError(limit, wait_s, num_ahead, needed_s, left_s)

    def _is_hopeless(self, sequence: Sequence, num_computed: int) -> bool:
        """Whether one that would start now could hardly meet its deadline, and would only take others' time."""
        if sequence.deadline_s is None:
            return False
        if not self._pace.can_meet(sequence.deadline_s, sequence.num_tokens - num_computed):
            return True
        longest_s = self._pace.step_s * (sequence.max_num_tokens - sequence.num_prompt_tokens)
        usual_s = self._pace.answer_s(len(self._running)) or 0.0
        needed_s = min(_CAUTION_AT_START * usual_s, _MARGIN * longest_s)
        return sequence.num_preemptions == 0 and self._clock() + needed_s > sequence.deadline_s

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            QueueFullError: as ``check_queue``; never if it is internal, a continuation, or has
                waited.
            FieldInvalidError: it could never run to ``max_num_tokens`` in this pool.
            ValueError: it contradicts itself, or was added before.
        """
        if sequence.is_counted and not sequence.has_waited:
            self.check_queue(sequence.task, num_tokens=sequence.num_tokens)
        check_addable(sequence, self.allocator)
        self._queue.add(sequence)

    def schedule(self) -> Schedule:
        """Decide the next step.

        It has no chunks if no sequence can run: there is none, or every running one awaits a token or ``finish``.

        Raises:
            RuntimeError: the last schedule with chunks was neither committed nor counted on, or must be committed.
        """
        if not self._in_flight.may_begin:
            raise RuntimeError("the last schedule was not committed")
        limits = self.config
        step = Step(
            limits.max_num_batched_tokens,
            limits.max_bulk_tokens,
            self._queue.rank,
            self._bulk_pace.limit,
            is_ahead=bool(self._in_flight),
        )
        self._awaits_copy = False
        self._cover_tokens(step)
        step.go_on(self._running)
        self._admit_waiting(step)
        # Not two steps in a row: nobody's tokens wait for long.
        self._has_put_off = not self._has_put_off and step.put_off(self._queue.exceeds_share)
        step.run_bulk()
        add_drafts(step, self.allocator, self.config.max_draft_rows)
        self._lacks_room = step.lacks_room
        schedule = step.freeze()
        if schedule.chunks:
            self._in_flight.begin(schedule)
        return schedule

    def count_on(self, schedule: Schedule) -> None:
        """Count a launched step as run, so that the next may be scheduled before it is committed.

        Raises:
            ValueError: it is not in flight.
        """
        flight = self._in_flight.of(schedule)
        if flight is None:
            raise ValueError("the schedule is not in flight")
        flight.count_on()

    @property
    def must_land(self) -> bool:
        """Whether the step in flight must be committed before another is scheduled.

        Something depends on its tokens, or its end may give blocks that are needed now: no sequence is preempted while
        it is in flight.
        """
        if not self._in_flight:
            return False
        if self._lacks_room or self._in_flight.has_drafts:
            return True
        num_missing = 0
        for sequence in self._running:
            if sequence.needs_tokens and sequence.num_unknown_tokens:
                return True
            num_missing += max(0, self._num_missing(sequence))
        return num_missing > self.allocator.num_available

    @property
    def num_draftable(self) -> int:
        """The most tokens that the next step would run as drafts."""
        return max(0, self.config.max_draft_rows - len(self._running))

    def draft(self, sequence: Sequence, token_ids: Seq[int]) -> None:
        """Propose what may follow a running sequence's last token; the next step runs as much of it as has room.

        Raises:
            ValueError: it is not decoding, or with one more token it would exceed ``max_num_tokens``.
        """
        if token_ids and not sequence.is_decoding:
            raise ValueError(f"sequence {sequence.id} is not decoding")
        if token_ids and sequence.num_tokens + len(token_ids) >= sequence.max_num_tokens:
            raise ValueError(f"sequence {sequence.id} has no room for {len(token_ids)} drafts")
        sequence.drafts = tuple(token_ids)

    def append_tokens(self, sequence: Sequence, *token_ids: int) -> None:
        """Add output tokens; all but the last are drafts that the step has run, and so are computed already.

        Raises:
            ValueError: it would have more than ``max_num_tokens``, or isn't running.
        """
        if sequence.status is not SequenceStatus.RUNNING:
            raise ValueError(f"sequence {sequence.id} is {sequence.status.value}")
        if len(sequence.token_ids) + len(token_ids) > sequence.max_num_tokens:
            raise ValueError(
                f"sequence {sequence.id} may not exceed {sequence.max_num_tokens} tokens, its maximum"
            )
        sequence.token_ids.extend(token_ids)
        sequence.num_unknown_tokens = max(0, sequence.num_unknown_tokens - len(token_ids))
        if len(token_ids) > 1:
            sequence.num_computed_tokens += len(token_ids) - 1
            register_full_blocks(sequence, self.allocator)
        # What only drafts needed that did not come.
        surplus = sequence.block_table[self.allocator.num_blocks_for(len(sequence.token_ids)) :]
        if surplus:
            del sequence.block_table[-len(surplus) :]
            self._in_flight.free(surplus)

    def commit(self, schedule: Schedule) -> None:
        """Account for a step that has run; sequences that have since finished are ignored."""
        flight = self._in_flight.of(schedule)
        if flight is not None and flight is self._in_flight.oldest:
            self._note_pace(flight)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            sequence.num_computed_tokens += chunk.num_tokens
            if flight is not None and flight.is_counted_on:
                sequence.num_launched_tokens -= chunk.num_tokens
            self._queue.charge(sequence, chunk.start, chunk.end)
            self._prefixes.hold_virtual(sequence)
            if sequence.logits_from is not None:
                sequence.logits_from = max(sequence.logits_from, chunk.end)
            register_full_blocks(sequence, self.allocator)
        if flight is not None:
            self._in_flight.land(flight)

    def undo(self, schedule: Schedule) -> None:
        """Give up the newest step, whose results do not count: sequences that began in it wait again.

        Others go on from where they were before it.
        """
        flight = self._in_flight.of(schedule)
        if flight is not None:
            flight.count_no_more_on()
        for fill in schedule.prefix_fills:
            self.forget(fill.virtual)  # nothing has been written there
        for sequence in schedule.started:
            if sequence.status is SequenceStatus.RUNNING:
                self._give_back(sequence)
                self._queue.enter(sequence)
        if flight is not None:
            self._in_flight.land(flight)

    def _note_pace(self, flight: Flight) -> None:
        """Learn from a step how long bulk tokens take, if there is nothing else in it but decodes."""
        schedule, seconds = flight.schedule, self._in_flight.seconds(flight)
        self._pace.ran(schedule.num_tokens, seconds)
        num_decodes = sum(chunk.is_decode and not chunk.sequence.is_bulk for chunk in schedule.chunks)
        num_bulk = sum(chunk.num_tokens for chunk in schedule.chunks if chunk.is_bulk)
        if num_decodes + num_bulk == schedule.num_tokens:
            self._bulk_pace.note(num_decodes, num_bulk, seconds)

    def finish(self, sequence: Sequence, *, is_answered: bool = True) -> None:
        """Let a sequence go, whatever its state; its full blocks stay in the prefix cache. Safe to repeat.

        Args:
            sequence: that is over.
            is_answered: whether it was not given up before its end.
        """
        if sequence.is_counted and sequence.status in (SequenceStatus.RUNNING, SequenceStatus.PAUSED):
            # What gave up waiting says nothing of how fast others are served.
            self._pace.ended(len(self._running), self._queue.waiting_since_s, is_answered=is_answered)
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._queue.leave(sequence)
        self._queue.forget(sequence)
        self._paused.discard(sequence)
        sequence.status = SequenceStatus.FINISHED

    def drop(self, job_id: str) -> int:
        """Finish and release whatever a job failed to; returns how many sequences that were."""
        left = [sequence for sequence in self._unfinished() if sequence.id == job_id]
        for sequence in left:
            self.finish(sequence, is_answered=False)
        for prefix in [prefix for prefix in self._prefixes if prefix.job_id == job_id]:
            self.release(prefix)
        return len(left)

    def clear(self) -> None:
        """Start over, whatever has gone wrong: no sequence, slot, prefix or block remains held or cached."""
        for sequence in self._unfinished():
            if sequence.status is SequenceStatus.RUNNING and sequence.placement is not None:
                sequence.placement.leave()
            sequence.status = SequenceStatus.FINISHED
            sequence.block_table = []
        self._queue.clear()
        self._running.clear()
        self._paused.clear()
        self._prefixes.clear()
        self._in_flight.clear()
        self._lacks_room = False
        self._awaits_copy = False
        self.allocator.clear()

    def pause(self, sequence: Sequence) -> None:
        """Leave a sequence out until ``resume``; it then holds no blocks, but the prefix cache keeps full ones."""
        if sequence.status is SequenceStatus.RUNNING:
            self._give_back(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._queue.leave(sequence)
        else:
            return
        sequence.status = SequenceStatus.PAUSED
        self._paused.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a paused sequence take its turn again, before those that have not begun."""
        if sequence.status is SequenceStatus.PAUSED:
            self._paused.remove(sequence)
            self._queue.enter(sequence)

    def hold(self, sequence: Sequence, num_tokens: int) -> SharedPrefix:
        """Keep the KV of a running sequence's first tokens for others to start from, beyond its finish.

        The scheduler may reclaim the blocks when nothing else can run; sequences that name the prefix then compute its
        tokens themselves.

        Args:
            sequence: is running, and has computed (and committed) them.
            num_tokens: at least 1.

        Raises:
            ValueError: fewer are computed.
        """
        if not 1 <= num_tokens <= sequence.num_computed_tokens or not sequence.block_table:
            raise ValueError(f"sequence {sequence.id} has {sequence.num_computed_tokens} tokens computed")
        return self._prefixes.hold(sequence.block_table, num_tokens, job_id=sequence.id)

    def release(self, prefix: SharedPrefix) -> None:
        """Release a held prefix. Safe to repeat, and after the scheduler has reclaimed it."""
        self._prefixes.release(prefix)

    def forget(self, virtual: VirtualTokens) -> None:
        """Release the blocks of virtual tokens, if there are any."""
        if virtual.held is not None:
            self._prefixes.release(virtual.held)

    def distrust(self, job_id: str) -> None:
        """Keep nothing computed with what a job's unfinished sequences ran on: their results are not numbers.

        Everything cached under their keys is forgotten, so that what comes later computes it afresh. Sequences that run
        on the same go on, but leave nothing behind.
        """
        bad = [sequence for sequence in self._unfinished() if sequence.id == job_id]
        cache_keys = {sequence.cache_key for sequence in bad}
        for cache_key in cache_keys:
            self.allocator.forget(cache_key)
        virtual = {sequence.virtual for sequence in bad if sequence.virtual is not None}
        for each in virtual:
            self.forget(each)
        for sequence in self._running:
            if sequence.cache_key in cache_keys or sequence.virtual in virtual:
                sequence.uses_prefix_cache = False

    def _unfinished(self) -> tuple[Sequence, ...]:
        return (*self._running, *self._queue.waiting(), *self._paused)

    def _num_missing(self, sequence: Sequence) -> int:
        """Blocks that a running sequence needs for its tokens; below 0 if it has more, and 0 in most steps."""
        return -(-sequence.num_expected_tokens // self.allocator.block_size) - len(sequence.block_table)

    def _cover_tokens(self, step: Step) -> None:
        """Give every running sequence blocks for all its tokens, the first in rank first."""
        for sequence in tuple(self._running):
            missing = self._num_missing(sequence)
            if missing <= 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            while (lacking := missing - self.allocator.num_available) > 0:
                if step.is_ahead:
                    raise RuntimeError("the step in flight must be committed first")
                if self._prefixes.make_room(lacking, step.prefixes):
                    break
                if len(self._running) == 1 and self._prefixes.take_one(self._prefixes.of(sequence)):
                    continue
                last = self._running[-1]
                self._preempt(last, step)
                if last is sequence:
                    break
            if sequence.status is SequenceStatus.RUNNING:
                sequence.block_table.extend(self.allocator.allocate(missing))

    def _admit_waiting(self, step: Step) -> None:
        blocked: list[Sequence] = []
        num_bulk_left = 0
        num_short_left = self._queue.num_short  # not considered yet
        are_others_waiting = num_short_left > 0
        num_crowding = 0
        for sequence in islice(self._queue, _MAX_LOOKED_AT):
            no_more_bulk = num_bulk_left >= _MAX_BLOCKED
            if step.budget <= 0 or self._is_full(sequence) or (no_more_bulk and num_short_left == 0):
                return
            is_bulk = self.config.is_bulk(sequence, sequence.num_tokens)
            num_short_left -= not is_bulk
            crowds = self._queue.exceeds_share(sequence)
            if (
                (is_bulk and no_more_bulk)
                or (crowds and num_crowding >= _MAX_CROWDING)
                or self._admissions.awaits_virtual(sequence, self._running)
                or self._awaits_slot(sequence, step)
            ):
                continue
            if not self._admissions.has_tokens(sequence, step, are_others_waiting=are_others_waiting):
                num_bulk_left += is_bulk
                continue
            admission = self._admissions.find(sequence, step, self._running)
            if admission is None:
                blocked.append(sequence)
                if sequence.num_passed >= _MAX_PASSED or len(blocked) >= _MAX_BLOCKED:
                    return
                continue
            if self._is_hopeless(sequence, admission.num_computed):
                step.hopeless.append(sequence)
                continue
            if not self._take_turn(sequence):
                continue
            for passed in (*blocked, *(step.without_slot if sequence.placement is not None else ())):
                passed.num_passed += 1
            sequence.num_passed = 0
            self._admissions.start(sequence, admission, step)
            step.started.append(sequence)
            num_crowding += sequence.num_left if crowds else 0
            step.start(sequence)

    def _is_full(self, sequence: Sequence) -> bool:
        return len(self._running) >= self.config.max_num_sequences and not sequence.is_internal

    def _awaits_slot(self, sequence: Sequence, step: Step) -> bool:
        """Whether there is no slot for a waiting sequence that needs one, or one before it is to have the next."""
        if sequence.placement is None or (not step.are_slots_reserved and sequence.placement.can_place()):
            return False
        self._awaits_copy |= sequence.placement.is_coming()
        step.without_slot.append(sequence)
        step.are_slots_reserved |= sequence.num_passed >= _MAX_PASSED
        return True

    def _take_turn(self, sequence: Sequence) -> bool:
        """Move a sequence from those that wait to those that run, unless its slot is still to come, or just gone."""
        if sequence.placement is not None:
            slot = sequence.placement.place()
            if slot is None:
                self._awaits_copy |= sequence.placement.is_coming()
                return False
            sequence.slot = slot
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=self._queue.rank)
        self._queue.leave(sequence)
        self._queue.started(sequence)
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._give_back(sequence)
        step.preempted.append(sequence)
        self._queue.enter(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """A running sequence's blocks and slot go to others; it will be recomputed."""
        self._stop(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.drafts = ()
        sequence.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._queue.stopped(sequence)
        if sequence.placement is not None:
            self._in_flight.leave(sequence.placement)
        self._in_flight.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_launched_tokens = sequence.num_unknown_tokens = 0
