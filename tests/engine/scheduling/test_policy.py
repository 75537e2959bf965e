"""The order in which sequences that wait are served."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.scheduling.policy import Queue
from manyhats.engine.scheduling.schedule import SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence
from support.harnesses.scheduling import make_sequence

SEQUENCES = st.lists(
    st.tuples(st.integers(-2, 2), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 40)),
    min_size=1,
    max_size=12,
)


def added(drawn: list[tuple[int, int, bool, bool, int]]) -> tuple[Queue, list[Sequence]]:
    queue, sequences = Queue(SchedulerConfig(), time.monotonic), []
    for index, (priority, arrival, is_internal, is_bulk, length) in enumerate(drawn):
        sequence = make_sequence(
            str(index),
            range(length),
            priority=priority,
            arrival=float(arrival),
            is_internal=is_internal,
            is_bulk=is_bulk,
        )
        queue.add(sequence)
        sequences.append(sequence)
    return queue, sequences


@given(SEQUENCES)
def test_internal_ones_go_first_then_priority_then_arrival_then_order_of_adding(
    drawn: list[tuple[int, int, bool, bool, int]],
) -> None:
    queue, sequences = added(drawn)
    expected = sorted(sequences, key=lambda each: (not each.is_internal, -each.priority, each.arrival))
    internal = [each for each in sequences if each.is_internal]
    expected[: len(internal)] = sorted(internal, key=lambda each: each.arrival)
    assert list(queue) == expected == sorted(sequences, key=queue.rank)
    assert queue.num_short == sum(not each.is_bulk for each in sequences)
    assert queue.counted.num_requests == len(sequences) - len(internal)


@given(SEQUENCES, st.data())
def test_preempted_ones_wait_ahead_of_their_priority_and_keep_their_rank(
    drawn: list[tuple[int, int, bool, bool, int]], data: st.DataObject
) -> None:
    queue, sequences = added(drawn)
    preempted = data.draw(st.sampled_from(sequences))
    rank, others = queue.rank(preempted), [each for each in queue if each is not preempted]
    queue.leave(preempted)
    assert list(queue) == others
    preempted.num_preemptions += 1
    queue.enter(preempted)
    assert queue.rank(preempted) == rank
    before = others[: list(queue).index(preempted)]
    assert before == [each for each in others if queue.rank(each)[0] < rank[0]]


def test_a_place_in_the_queue_is_no_longer_known_once_it_is_forgotten() -> None:
    queue, sequences = added([(0, 0, False, False, 3), (0, 0, False, True, 3)])
    for sequence in sequences:
        queue.leave(sequence)
        queue.forget(sequence)
    assert len(queue) == queue.counted.num_requests == queue.num_short == 0
    assert not queue._ranks
