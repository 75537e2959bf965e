"""Any sequence of arrivals, cancellations, held prefixes and steps, against what must always hold."""

import math
from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manyhats.adapters.primitives import KVPrefix, PromptEmbeddings
from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.scheduler import Schedule
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence

BLOCK_SIZE = 3
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
VIRTUAL = st.integers(1, 12)
KEYS = st.sampled_from([b"base", b"adapter"])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(7, 11),
        sequences=st.integers(1, 4),
        spare=st.integers(0, 8),
        bulk=st.integers(1, 4),
        stored=VIRTUAL,
        soft=VIRTUAL,
        other=VIRTUAL,
        is_ahead=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        sequences: int,
        spare: int,
        bulk: int,
        stored: int,
        soft: int,
        other: int,
        is_ahead: bool,
    ) -> None:
        self.scheduler = make_scheduler(
            num_blocks, BLOCK_SIZE, sequences=sequences, tokens=sequences + spare, waiting=50, bulk=bulk
        )
        self.engine = ToyEngine(self.scheduler, is_ahead=is_ahead)
        self.live: list[Sequence] = []
        self.prefixes: list[tuple[SharedPrefix, list[int], bytes]] = []
        self.asked_logits: dict[Sequence, int] = {}
        self.num_added = 0
        self.tasks = [
            (b"stored", virtual_tokens(stored)),
            (b"soft", virtual_tokens(soft, embeddings=True)),
            (b"other", virtual_tokens(other, embeddings=True)),
        ]

    def _add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.num_added += 1
        self.live.append(sequence)
        if sequence.logits_from is not None:
            self.asked_logits[sequence] = sequence.logits_from

    def _cancel(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.asked_logits.pop(sequence, None)

    @precondition(lambda self: self.num_added < 40)
    @rule(
        tokens=TOKENS,
        new=st.integers(0, 7),
        key=KEYS,
        priority=st.integers(0, 1),
        arrival=st.integers(0, 3),
        uses_prefix_cache=st.booleans(),
        is_internal=st.booleans(),
        is_bulk=st.booleans(),
        data=st.data(),
    )
    def arrive(
        self,
        tokens: list[int],
        new: int,
        key: bytes,
        priority: int,
        arrival: int,
        uses_prefix_cache: bool,
        is_internal: bool,
        is_bulk: bool,
        data: st.DataObject,
    ) -> None:
        logits_from = data.draw(st.none() | st.integers(0, len(tokens) - 1))
        self._add(
            make_sequence(
                str(self.num_added),
                tokens,
                0 if is_internal or is_bulk else new,
                cache_key=key,
                priority=priority,
                arrival=float(arrival),
                logits_from=logits_from,
                uses_prefix_cache=uses_prefix_cache,
                is_internal=is_internal,
                is_bulk=is_bulk and not is_internal,
            )
        )

    @precondition(lambda self: self.prefixes and self.num_added < 40)
    @rule(tail=st.lists(st.integers(0, 2), min_size=1, max_size=4), new=st.integers(0, 3), data=st.data())
    def arrive_with_a_prefix(self, tail: list[int], new: int, data: st.DataObject) -> None:
        prefix, tokens, key = data.draw(st.sampled_from(self.prefixes))
        logits_from = data.draw(st.sampled_from([None, prefix.num_tokens]))
        self._add(
            make_sequence(
                str(self.num_added),
                [*tokens, *tail][: 7 * BLOCK_SIZE - new],
                new,
                cache_key=key,
                shared=prefix,
                logits_from=logits_from,
            )
        )

    @precondition(lambda self: self.num_added < 40)
    @rule(
        task=st.integers(0, 2),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        new=st.integers(0, 4),
        priority=st.integers(0, 1),
        scores=st.booleans(),
    )
    def arrive_on_a_task(self, task: int, tail: list[int], new: int, priority: int, scores: bool) -> None:
        key, virtual = self.tasks[task]
        self._add(
            make_sequence(
                str(self.num_added),
                [0] * virtual.num_tokens + tail,
                new,
                cache_key=key,
                priority=priority,
                virtual=virtual,
                logits_from=virtual.num_tokens if scores else None,
            )
        )

    @rule(task=st.integers(0, 2))
    def forget(self, task: int) -> None:
        if not any(sequence.virtual is self.tasks[task][1] for sequence in self.live):
            self.scheduler.forget(self.tasks[task][1])

    @rule(data=st.data(), cancels=st.booleans(), drafts=st.lists(st.integers(0, 2), max_size=5))
    def step(self, data: st.DataObject, cancels: bool, drafts: list[int]) -> None:
        if self.engine.in_flight and self.scheduler.must_land:
            self.engine.land()
            self.live = [sequence for sequence in self.live if not sequence.is_finished]
        before = {s: (s.status, s.num_preemptions) for s in self.live}

        def during(schedule: Schedule) -> None:
            assert schedule.chunks or self.engine.in_flight or not self.live, "nothing was scheduled"
            self._check_schedule(schedule, before)
            if cancels and self.live:
                self._cancel(data.draw(st.sampled_from(self.live)))
            if cancels and self.prefixes:
                self.scheduler.release(self.prefixes.pop(0)[0])

        self.engine.drafts = drafts
        self.engine.step(during)
        self.live = [sequence for sequence in self.live if not sequence.is_finished]

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self._cancel(sequence)
        self.live.remove(sequence)

    @rule(data=st.data())
    @precondition(lambda self: any(0 < s.num_computed_tokens <= 15 for s in self.live))
    def hold(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([s for s in self.live if 0 < s.num_computed_tokens <= 15]))
        num_tokens = data.draw(st.integers(1, sequence.num_computed_tokens))
        prefix = self.scheduler.hold(sequence, num_tokens)
        self.prefixes.append((prefix, sequence.token_ids[:num_tokens], sequence.cache_key))

    @rule(data=st.data())
    @precondition(lambda self: self.prefixes)
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.prefixes) - 1))
        self.scheduler.release(self.prefixes.pop(index)[0])

    def _check_schedule(self, schedule: Schedule, before: dict[Sequence, tuple[SequenceStatus, int]]) -> None:
        config = self.scheduler.config
        sequences = [chunk.sequence for chunk in schedule.chunks]
        running = [s for s in self.live if s.status is SequenceStatus.RUNNING]
        waiting = [s for s in self.live if s.status is SequenceStatus.WAITING]
        assert len(set(sequences)) == len(sequences)
        assert schedule.num_tokens <= config.max_num_batched_tokens
        assert len(running) == self.scheduler.num_running
        assert sum(not s.is_internal for s in running) <= config.max_num_sequences
        assert not (self.engine.in_flight and schedule.preempted)
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_reached_tokens
            assert 1 <= chunk.num_tokens <= sequence.num_expected_tokens - chunk.start
            num_cells = len(sequence.block_table) * BLOCK_SIZE
            assert num_cells >= sequence.num_expected_tokens + len(chunk.drafts)
            assert not chunk.drafts or (chunk.is_decode and chunk.ends_tokens)
        assert not schedule.num_drafts or schedule.num_tokens <= config.max_draft_rows
        decoding = [s for s in running if s.num_left == 1 and not s.is_internal and not s.is_bulk]
        going_on = [s for s in decoding if before[s][0] is SequenceStatus.RUNNING]
        assert set(going_on) == set(sequences[: len(going_on)])
        own = [chunk.num_tokens for chunk in schedule.chunks if chunk.sequence.is_internal]
        assert not going_on or sum(own) <= 3 + len(going_on) // 2 + len(own)
        bulk = [chunk.num_tokens for chunk in schedule.chunks if self._is_bulk(chunk.sequence)]
        most = config.max_bulk_tokens + len(going_on) // 2
        assert len(bulk) == len(sequences) or sum(bulk) <= most, "others are in the step"
        first = next((s for s in self.scheduler._running if s.num_left > 0 and self._is_bulk(s)), None)
        assert first is None or first in sequences or before[first][0] is SequenceStatus.WAITING
        self._check_fairness(sequences, waiting, before, schedule)

    def _is_bulk(self, sequence: Sequence) -> bool:
        """Of those that run, and have not been going on as decodes."""
        is_long = sequence.is_long and sequence.num_left > 1
        return sequence.is_bulk or is_long

    def _check_fairness(
        self,
        sequences: list[Sequence],
        waiting: list[Sequence],
        before: dict[Sequence, tuple[SequenceStatus, int]],
        schedule: Schedule,
    ) -> None:
        def queue_rank(sequence: Sequence) -> tuple[float, bool, float, int]:
            preempted_before = before[sequence][1] > 0
            return (-priority(sequence), not preempted_before, sequence.arrival, int(sequence.id))

        started = [s for s in sequences if before[s][0] is SequenceStatus.WAITING]
        left = [s for s in waiting if before[s][0] is SequenceStatus.WAITING]
        for sequence in left:
            config = self.scheduler.config
            is_long = sequence.num_left > config.max_num_batched_tokens
            has_many_rows = sequence.num_scored > config.max_bulk_tokens
            if awaits_virtual(sequence, self.live) or sequence.is_bulk or is_long or has_many_rows:
                continue  # it waits for something else than blocks, too
            short = [other for other in started if not self._is_bulk(other)]
            is_passed = any(queue_rank(other) > queue_rank(sequence) for other in short)
            assert not is_passed or 1 <= sequence.num_passed <= 32
        kept = [s for s in sequences if s not in started]
        worst = max(((-priority(s), s.arrival, int(s.id)) for s in kept), default=(-math.inf, 0.0, 0))
        assert all((-priority(s), s.arrival, int(s.id)) > worst for s in schedule.preempted)
        is_running = SequenceStatus.RUNNING
        prefills = [s for s in self.live if s.status is is_running and before[s][0] is is_running]
        prefills = [s for s in prefills if s.num_left > 1 and not self._is_bulk(s)]
        assert not prefills or set(prefills) & set(sequences)

    @invariant()
    def ranks_are_of_unfinished_sequences_alone(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler._queue._ranks.keys() == {s for s in self.live if not s.is_finished}

    @invariant()
    def references_equal_holders(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.allocator
        held = Counter(block for s in self.live for block in s.block_table)
        for prefix in self.scheduler._prefixes:
            held.update(prefix.block_ids)
        for flight in self.scheduler._in_flight._flights:
            held.update(flight.blocks)
        assert [pool.num_refs(block) for block in range(pool.num_blocks)] == [
            held[block] for block in range(pool.num_blocks)
        ]
        assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks

    @invariant()
    def blocks_in_two_tables_are_full_and_equal(self) -> None:
        owners: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in getattr(self, "live", []):
            for index, block in enumerate(sequence.block_table):
                owners.setdefault(block, []).append((sequence, (index + 1) * BLOCK_SIZE))
        for sharers in owners.values():
            if len(sharers) > 1:
                assert all(end <= sequence.num_computed_tokens for sequence, end in sharers)
                assert len({(s.cache_key, tuple(s.token_ids[:end])) for s, end in sharers}) == 1

    @invariant()
    def nobody_holds_more_blocks_than_for_its_tokens(self) -> None:
        for sequence in getattr(self, "live", []):
            assert len(sequence.block_table) <= -(-sequence.num_expected_tokens // BLOCK_SIZE)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.engine.drain()
        for prefix, _, _ in self.prefixes:
            self.scheduler.release(prefix)
        for _, virtual in self.tasks:
            self.scheduler.forget(virtual)
            assert virtual.held is None
        assert self.scheduler.allocator.num_used == 0
        for sequence, first in self.asked_logits.items():
            asked = range(first, sequence.num_prompt_tokens)
            assert all(self.engine.logits[sequence][position] == 1 for position in asked)
            assert sequence.num_tokens == sequence.max_num_tokens


def virtual_tokens(count: int, *, embeddings: bool = False) -> VirtualTokens:
    """Their numbers do not count here: the toy engine's KV are histories."""
    if embeddings:
        return VirtualTokens(PromptEmbeddings(torch.zeros(count, 1)))
    zeros = torch.zeros(1, count, 1, 1)
    return VirtualTokens(KVPrefix(zeros, zeros, 0))


def awaits_virtual(sequence: Sequence, live: list[Sequence]) -> bool:
    """Whether a running sequence is computing what this one begins with."""
    virtual = sequence.virtual
    if virtual is None or virtual.embeddings is None or virtual.held is not None:
        return False
    running = [s for s in live if s.status is SequenceStatus.RUNNING and s.virtual is virtual]
    return any(other.num_computed_tokens < virtual.num_tokens for other in running)


def priority(sequence: Sequence) -> float:
    return math.inf if sequence.is_internal else sequence.priority


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
