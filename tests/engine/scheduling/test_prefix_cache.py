import dataclasses

import pytest

from manyhats.engine.scheduling.blocks import SharedPrefix
from manyhats.engine.scheduling.prefix_cache import extend_block_keys
from manyhats.engine.scheduling.scheduler import Scheduler
from manyhats.engine.scheduling.sequence import Sequence
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence


def run_alone(scheduler: Scheduler, engine: ToyEngine, sequence: Sequence) -> tuple[int, int]:
    """Prefix cache queries and hits of a sequence run to its end."""
    scheduler.add(sequence)
    queries = hits = 0
    while scheduler.has_work:
        schedule = engine.step()
        queries += schedule.prefix_cache_queries
        hits += schedule.prefix_cache_hits
    return queries, hits


def test_full_blocks_are_found_again_and_not_computed() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    assert run_alone(scheduler, engine, make_sequence("a", range(10))) == (10, 0)
    again = make_sequence("b", [*range(10), 99])
    assert run_alone(scheduler, engine, again) == (11, 8)
    assert again.num_cached_tokens == 8


def test_hits_never_cover_the_last_token() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    run_alone(scheduler, engine, make_sequence("a", range(8)))
    again = make_sequence("b", range(8))
    assert run_alone(scheduler, engine, again) == (8, 4)


def test_blocks_are_shared_while_their_first_owner_still_runs() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    first = make_sequence("a", range(10), 9)
    scheduler.add(first)
    engine.step()
    second = make_sequence("b", range(10), 9)
    scheduler.add(second)
    engine.step()
    assert first.block_table[:2] == second.block_table[:2]
    assert not set(first.block_table[2:]) & set(second.block_table[2:])
    engine.drain()


def test_blocks_are_found_only_once_all_their_tokens_are_computed() -> None:
    scheduler = make_scheduler(tokens=8)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("a", range(10)))
    scheduler.add(make_sequence("b", range(10)))
    engine.step()
    assert {(chunk.sequence.id, chunk.start) for chunk in engine.step().chunks} == {("a", 8), ("b", 8)}


def test_output_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    first = make_sequence("a", range(6), 7)
    run_alone(scheduler, engine, first)
    assert run_alone(scheduler, engine, make_sequence("b", [*first.token_ids, 5, 6]))[1] == 12


@pytest.mark.parametrize(
    "change", [{"cache_key": b"other"}, {"uses_prefix_cache": False}, {"logits_from": 0}]
)
def test_no_hits_for_another_key_nor_where_the_logits_are_needed(change: dict[str, object]) -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    run_alone(scheduler, engine, make_sequence("a", range(12)))
    other = dataclasses.replace(make_sequence("b", range(12)), **change)  # type: ignore[arg-type]
    assert run_alone(scheduler, engine, other)[1] == 0


def test_hits_end_where_logits_are_needed() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    run_alone(scheduler, engine, make_sequence("a", range(12)))
    assert run_alone(scheduler, engine, make_sequence("b", range(12), logits_from=7))[1] == 4
    assert run_alone(scheduler, engine, make_sequence("c", range(12), logits_from=8))[1] == 8


def test_a_sequence_without_the_cache_leaves_nothing_in_it() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    assert run_alone(scheduler, engine, make_sequence("a", range(12), uses_prefix_cache=False)) == (0, 0)
    assert scheduler.allocator.num_cached == 0


def test_keys_tell_histories_apart() -> None:
    def keys(tokens: list[int], cache_key: bytes = b"k") -> list[bytes]:
        sequence = make_sequence("a", tokens, cache_key=cache_key)
        extend_block_keys(sequence, 2, 2)
        return sequence.block_keys

    one = keys([1, 2, 3, 4])
    assert one == keys([1, 2, 3, 4])
    assert one[0] == keys([1, 2, 9, 9])[0]
    others = [keys([1, 2, 9, 9])[1], *keys([9, 9, 3, 4]), *keys([2, 1, 3, 4]), *keys([1, 2, 3, 4], b"l")]
    assert not set(one) & set(others)


def held_prefix(scheduler: Scheduler, engine: ToyEngine, num_tokens: int, *, first: int = 0) -> SharedPrefix:
    """The KV of tokens first, first + 1, …, held after their sequence is gone."""
    parent = make_sequence("parent", range(first, first + num_tokens), 2, uses_prefix_cache=False)
    scheduler.add(parent)
    while parent.num_computed_tokens < num_tokens:
        engine.step()
    prefix = scheduler.hold(parent, num_tokens)
    scheduler.finish(parent)
    return prefix


def test_a_held_prefix_starts_others_and_its_tail_is_copied() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 9)
    assert scheduler.allocator.num_used == 3
    for i in range(3):
        tokens = [*range(10), 50 + i]
        child = make_sequence(f"c{i}", tokens, 3, shared=prefix, logits_from=9, uses_prefix_cache=False)
        scheduler.add(child)
    step = engine.step()
    assert [(c.start, c.num_tokens) for c in step.chunks] == [(9, 2)] * 3
    assert [source for source, _ in step.block_copies] == [prefix.block_ids[2]] * 3
    assert step.prefix_cache_queries == 0
    scheduler.release(prefix)
    scheduler.release(prefix)
    engine.drain()
    assert (scheduler.allocator.num_used, scheduler.allocator.num_cached) == (0, 0)


def test_a_prefix_of_full_blocks_is_not_copied() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 8)
    scheduler.add(make_sequence("child", range(9), shared=prefix))
    assert engine.step().block_copies == ()


def test_blocks_after_a_prefix_are_found_in_the_cache_and_spare_the_copy() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 6)
    assert run_alone(scheduler, engine, make_sequence("a", range(14), shared=prefix)) == (8, 0)
    again = make_sequence("b", range(14), shared=prefix)
    scheduler.add(again)
    step = engine.step()
    assert (step.prefix_cache_queries, step.prefix_cache_hits, step.block_copies) == (8, 6, ())
    assert again.num_cached_tokens == 6


def test_a_preempted_sequence_uses_its_prefix_again() -> None:
    scheduler = make_scheduler(num_blocks=6)
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 6)
    children = [make_sequence(f"c{i}", [*range(6), 50 + i], 9, arrival=i, shared=prefix) for i in range(2)]
    for child in children:
        scheduler.add(child)
    engine.drain()
    assert children[1].num_preemptions > 0
    assert [child.num_output_tokens for child in children] == [9, 9]
    assert scheduler.allocator.num_used == 2


def test_held_prefixes_are_taken_back_rather_than_deadlock() -> None:
    scheduler = make_scheduler(num_blocks=6)
    engine = ToyEngine(scheduler)
    prefixes = [held_prefix(scheduler, engine, 8, first=100 * i) for i in range(3)]
    assert scheduler.allocator.num_available == 0
    children = [
        make_sequence(f"c{i}", range(100 * i, 100 * i + 9), 8, arrival=i, shared=prefixes[i])
        for i in range(3)
    ]
    for child in children:
        scheduler.add(child)
    engine.drain()
    assert [child.num_output_tokens for child in children] == [8, 8, 8]
    for prefix in prefixes:
        scheduler.release(prefix)
    assert scheduler.allocator.num_used == 0


def test_a_held_prefix_stays_while_something_else_can_run() -> None:
    scheduler = make_scheduler(num_blocks=6)
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 8)
    scheduler.add(make_sequence("small", [90], 7))
    engine.step()
    big = make_sequence("big", range(50, 60), 12)
    scheduler.add(big)
    engine.step()
    assert prefix in scheduler._prefixes
    assert big.num_computed_tokens == 0
    engine.drain()
    assert prefix not in scheduler._prefixes
    assert big.num_output_tokens == 12


def test_a_prefix_released_during_the_step_that_copies_from_it_stays_until_its_end() -> None:
    scheduler = make_scheduler()
    engine = ToyEngine(scheduler)
    prefix = held_prefix(scheduler, engine, 5)
    scheduler.add(make_sequence("child", [*range(5), 9], 2, shared=prefix, uses_prefix_cache=False))

    def release(_: object) -> None:
        scheduler.release(prefix)
        assert scheduler.allocator.num_refs(prefix.block_ids[1]) == 1

    assert engine.step(during=release).block_copies
    engine.drain()
    assert scheduler.allocator.num_used == 0


def test_only_computed_tokens_of_a_running_sequence_can_be_held() -> None:
    scheduler = make_scheduler(tokens=8)
    sequence = make_sequence("a", range(10))
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="0 tokens computed"):
        scheduler.hold(sequence, 1)
    ToyEngine(scheduler).step()
    with pytest.raises(ValueError, match="8 tokens computed"):
        scheduler.hold(sequence, 9)
    scheduler.finish(sequence)
    with pytest.raises(ValueError, match="tokens computed"):
        scheduler.hold(sequence, 4)


@pytest.mark.parametrize(
    ("prefix", "logits_from", "message"),
    [
        (SharedPrefix((0,), 3), None, "leaves none to run"),
        (SharedPrefix((0, 1), 2), None, "2 blocks for 2 tokens"),
        (SharedPrefix((0,), 2), 1, "no logits at position 1"),
    ],
)
def test_a_prefix_must_leave_what_is_asked_for(
    prefix: SharedPrefix, logits_from: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler().add(make_sequence("a", range(3), shared=prefix, logits_from=logits_from))
