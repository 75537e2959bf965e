import pytest
import torch

from manyhats.adapters.primitives import PromptEmbeddings
from manyhats.engine.errors import FieldInvalidError, QueueFullError
from manyhats.engine.scheduling.scheduler import Schedule, SchedulerConfig
from manyhats.engine.scheduling.sequence import Sequence, SequenceStatus
from manyhats.engine.scheduling.virtual_tokens import VirtualTokens
from support.harnesses.scheduling import ToyEngine, make_scheduler, make_sequence


def ids(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.id, chunk.start, chunk.num_tokens) for chunk in schedule.chunks]


def test_a_prompt_is_run_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(tokens=8)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("a", range(18)))
    steps = [engine.step() for _ in range(3)]
    assert [ids(step) for step in steps] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 2)]]
    assert not scheduler.has_work


def test_only_the_chunk_with_the_last_token_ends_the_tokens() -> None:
    scheduler = make_scheduler(tokens=8)
    scheduler.add(make_sequence("a", range(10)))
    first = scheduler.schedule()
    scheduler.commit(first)
    second = scheduler.schedule()
    assert [first.chunks[0].ends_tokens, second.chunks[0].ends_tokens] == [False, True]
    assert [first.chunks[0].is_decode, second.chunks[0].is_decode] == [False, False]


def test_decodes_come_first_then_prefills_then_waiting_ones() -> None:
    scheduler = make_scheduler(tokens=8)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("long", range(12), 4))
    engine.step()
    scheduler.add(make_sequence("short", [1], 4))
    assert ids(engine.step()) == [("short", 0, 1), ("long", 8, 4)]
    scheduler.add(make_sequence("late", range(20, 40), 4))
    assert ids(engine.step()) == [("long", 12, 1), ("short", 1, 1), ("late", 0, 6)]
    assert ids(engine.step()) == [("long", 13, 1), ("short", 2, 1), ("late", 6, 6)]


def test_waiting_goes_by_priority_then_arrival_then_order() -> None:
    scheduler = make_scheduler(sequences=1)
    engine = ToyEngine(scheduler)
    for name, priority, arrival in [
        ("c", 0, 2.0),
        ("d", 0, 2.0),
        ("b", 0, 1.0),
        ("a", 5, 9.0),
        ("e", -1, 0.0),
    ]:
        scheduler.add(make_sequence(name, [1], priority=priority, arrival=arrival))
    order = [engine.step().chunks[0].sequence.id for _ in range(5)]
    assert order == ["a", "b", "c", "d", "e"]


def test_decodes_never_starve_a_prefill() -> None:
    scheduler = make_scheduler(sequences=4, tokens=4)
    engine = ToyEngine(scheduler)
    for name in "abc":
        scheduler.add(make_sequence(name, [1], 30))
    engine.step()
    scheduler.add(make_sequence("p", range(10), 1))
    for _ in range(10):
        assert any(chunk.sequence.id == "p" for chunk in engine.step().chunks)


def test_the_engine_s_own_go_first_and_beyond_the_limits_of_requests() -> None:
    scheduler = make_scheduler(sequences=1, waiting=1)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("running", [1], 9))
    engine.step()
    scheduler.add(make_sequence("waiting", [2], priority=5))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence("refused", [3]))
    scheduler.add(make_sequence("own", [4, 5], 0, is_internal=True))
    assert ids(engine.step()) == [("running", 1, 1), ("own", 0, 2)]
    assert ids(engine.step()) == [("running", 2, 1)]
    assert scheduler.num_waiting == 1


def test_beside_decodes_the_engine_s_own_take_few_tokens_of_a_step_all_together() -> None:
    scheduler = make_scheduler(tokens=64)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("alone", range(40, 60), 0, is_internal=True))
    assert ids(engine.step()) == [("alone", 0, 20)]
    for name in "abcd":
        scheduler.add(make_sequence(name, [1], 30))
    engine.step()
    scheduler.add(make_sequence("x", range(9), 0, is_internal=True))
    scheduler.add(make_sequence("y", range(10, 15), 0, is_internal=True))
    scheduler.add(make_sequence("z", range(20, 40), 9))
    decodes = [(name, 1, 1) for name in "abcd"]
    # Three, and one for each two decodes; but each gets on by one.
    assert ids(engine.step()) == [*decodes, ("x", 0, 5), ("y", 0, 1), ("z", 0, 20)]
    assert ids(engine.step())[5:] == [("x", 5, 4), ("y", 1, 1)]
    assert ids(engine.step())[5:] == [("y", 2, 3)]


def test_long_prompts_and_scorings_take_few_tokens_of_a_step_beside_others() -> None:
    scheduler = make_scheduler(num_blocks=200, tokens=32, bulk=6)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("long", range(200), 3))
    assert ids(engine.step()) == [("long", 0, 32)], "alone it may have them all"
    for name in "abcd":
        scheduler.add(make_sequence(name, [1], 60))
    scheduler.add(make_sequence("scoring", range(300, 320), 0, is_bulk=True))
    starts = [(name, 0, 1) for name in "abcd"]
    # One that is done sooner goes first, but half of them are for the first in rank.
    assert ids(engine.step()) == [*starts, ("long", 32, 3), ("scoring", 0, 3)]
    assert ids(engine.step())[4:] == [("long", 35, 4), ("scoring", 3, 4)]
    scheduler.add(make_sequence("short", range(400, 420), 1))
    assert ids(engine.step())[4:] == [("short", 0, 20), ("long", 39, 4), ("scoring", 7, 4)]
    for name in ("x", "y"):
        scheduler.add(make_sequence(name, range(500, 532), 0))
    assert ids(engine.step())[4:] == [("x", 0, 22), ("long", 43, 3), ("scoring", 11, 3)], "which stay theirs"


def test_what_comes_after_a_long_prompt_or_a_scoring_has_its_turn_in_a_few_steps() -> None:
    scheduler = make_scheduler(num_blocks=900, sequences=4, tokens=32, bulk=6)
    engine = ToyEngine(scheduler)
    for index in range(6):
        prompt = [1000 * index + token for token in range(500)]
        scheduler.add(make_sequence(f"bulk {index}", prompt, 0, is_bulk=index % 2 == 0))
    engine.step()
    assert scheduler.num_running == 1, "the others could not begin, and leave their places"
    for index in range(20):
        scheduler.add(make_sequence(f"short {index}", [9000 + index], 1, arrival=float(index)))
        started = [name for name, start, _ in ids(engine.step()) if start == 0]
        assert started == [f"short {index}"]
    scheduler.add(make_sequence("less", range(10_000, 10_050), 0, is_bulk=True, arrival=99.0))
    steps = 0
    while any(chunk.sequence.id != "less" for chunk in engine.step().chunks[-1:]):
        steps += 1
        assert steps < 5
    assert engine.drain() < 120


def test_a_long_prompt_of_higher_priority_does_not_wait_for_the_one_that_runs() -> None:
    scheduler = make_scheduler(num_blocks=900, tokens=32, bulk=6)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("long", range(400), 0))
    engine.step()
    scheduler.add(make_sequence("vip", range(1000, 1400), 0, priority=1))
    scheduler.add(make_sequence("later", range(2000, 2400), 0))
    assert ids(engine.step()) == [("vip", 0, 16), ("long", 32, 16)]
    done: list[str] = []
    while scheduler.has_work:
        done += [c.sequence.id for c in engine.step().chunks if c.end == 400]
    assert done[-1] == "later"


def test_when_blocks_run_out_the_latest_of_the_lowest_priority_is_preempted_and_resumes() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    engine = ToyEngine(scheduler)
    first = make_sequence("first", range(4), 12, arrival=0.0)
    vip = make_sequence("vip", range(10, 14), 12, priority=1, arrival=2.0)
    last = make_sequence("last", range(20, 24), 12, arrival=1.0)
    for sequence in (first, last, vip):
        scheduler.add(sequence)
    preempted: list[Sequence] = []
    while scheduler.has_work:
        preempted += engine.step().preempted
    assert preempted
    assert preempted[0] is last
    assert vip not in preempted
    assert [s.num_output_tokens for s in (first, vip, last)] == [12, 12, 12]
    assert scheduler.allocator.num_used == 0


def test_a_preempted_sequence_keeps_its_output_and_goes_before_others_of_its_priority() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, tokens=64)
    engine = ToyEngine(scheduler)
    a = make_sequence("a", range(7), 9, arrival=1.0)
    b = make_sequence("b", range(20, 27), 9, arrival=2.0)
    scheduler.add(a)
    scheduler.add(b)
    while not (step := engine.step()).preempted:
        output = b.output_token_ids
    assert step.preempted == (b,)
    assert b.output_token_ids == output
    scheduler.add(make_sequence("early", range(40, 52), arrival=0.0))
    scheduler.add(make_sequence("vip", [1], arrival=9.0, priority=1))
    started: list[str] = []
    while scheduler.has_work:
        started += [c.sequence.id for c in engine.step().chunks if c.sequence.id not in started]
    assert [name for name in started if name != "a"] == ["vip", "b", "early"]
    assert b.output_token_ids[: len(output)] == output


def test_what_does_not_fit_yet_is_passed_by_what_does_but_not_for_ever() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, tokens=64)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("running", range(8), 12))
    engine.step()
    big = make_sequence("big", range(20, 40), 2)
    scheduler.add(big)
    num_small = 0
    started: set[str] = set()
    while big.num_computed_tokens == 0:
        scheduler.add(make_sequence(f"small {num_small}", [90 + num_small], 6, uses_prefix_cache=False))
        num_small += 1
        started.update(chunk.sequence.id for chunk in engine.step().chunks if chunk.start == 0)
        assert num_small < 100, "big starves"
    started.discard("big")
    assert 0 < len(started) <= 32
    assert num_small > len(started), "the last ones waited for big"
    engine.drain()
    assert big.num_output_tokens == 2


def test_what_does_not_fit_is_passed_by_those_behind_it_alone() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, tokens=64)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("running", range(8), 8))
    engine.step()
    for name, tokens in (("big", range(20, 40)), ("bigger", range(40, 62)), ("small", [1])):
        scheduler.add(make_sequence(name, tokens))
    assert ids(engine.step()) == [("running", 8, 1), ("small", 0, 1)]
    order: list[str] = []
    while scheduler.has_work:
        order += [c.sequence.id for c in engine.step().chunks if c.start == 0]
    assert order == ["big", "bigger"]


def test_one_sequence_alone_may_fill_the_whole_pool() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    engine = ToyEngine(scheduler)
    scheduler.add(make_sequence("a", range(5), 7))
    scheduler.add(make_sequence("b", range(5), 7))
    engine.drain()
    assert scheduler.allocator.num_used == 0


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    with pytest.raises(FieldInvalidError, match="13 tokens; the KV cache holds 12"):
        scheduler.add(make_sequence("a", range(5), 8))


def test_a_full_queue_refuses() -> None:
    scheduler = make_scheduler(waiting=2)
    scheduler.add(make_sequence("a", [1]))
    scheduler.add(make_sequence("b", [1]))
    with pytest.raises(QueueFullError) as caught:
        scheduler.add(make_sequence("c", [1]))
    assert caught.value.limit == 2
    assert scheduler.num_waiting == 2


def test_a_full_queue_says_when_it_will_be_done_at_the_rate_of_late() -> None:
    now_s = 100.0
    scheduler = make_scheduler(waiting=40, sequences=2, tokens=2, clock=lambda: now_s)
    engine = ToyEngine(scheduler)
    while now_s < 140:
        scheduler.add(make_sequence(str(now_s), [1], 0))
        engine.step()
        now_s += 0.25
    for index in range(36):
        scheduler.add(make_sequence(f"waits {index}", [1]))
    with pytest.raises(QueueFullError, match="36 requests are waiting; the places that are left") as caught:
        scheduler.add(make_sequence("refused", [1]))
    assert caught.value.retry_after_s == pytest.approx(36 / 4, rel=0.1)


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_num_sequences": 0}, "scheduler.max_num_sequences"),
        ({"max_waiting": 0}, "scheduler.max_waiting"),
        ({"max_num_sequences": 8, "max_num_batched_tokens": 7}, "scheduler.max_num_batched_tokens"),
    ],
)
def test_limits_that_could_starve_are_refused(limits: dict[str, int], field: str) -> None:
    with pytest.raises(FieldInvalidError) as caught:
        SchedulerConfig(**limits)
    assert caught.value.field == field


@pytest.mark.parametrize("moment", ["waiting", "running", "during the step", "preempted"])
def test_finishing_frees_everything_whenever_it_happens(moment: str) -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    engine = ToyEngine(scheduler)
    other = make_sequence("other", range(7), 9)
    sequence = make_sequence("a", range(20, 27), 9, arrival=1.0, uses_prefix_cache=False)
    scheduler.add(other)
    scheduler.add(sequence)
    if moment == "running":
        engine.step()
    if moment == "preempted":
        while not engine.step().preempted:
            pass
    if moment == "during the step":
        engine.step(during=lambda _: scheduler.finish(sequence))
    else:
        scheduler.finish(sequence)
    scheduler.finish(sequence)
    assert sequence.is_finished
    assert sequence.block_table == []
    assert scheduler.allocator.num_used == len(other.block_table)
    engine.drain()
    assert other.num_output_tokens == 9


def test_what_is_cleared_holds_nothing_and_all_starts_anew() -> None:
    scheduler = make_scheduler(waiting=2, sequences=2)
    virtual = VirtualTokens(PromptEmbeddings(torch.zeros(6, 1)))
    engine = ToyEngine(scheduler)
    for _ in range(2):
        sequences = [
            make_sequence("task", [0] * 6 + [1], 9, cache_key=b"task", virtual=virtual),
            make_sequence("paused", range(9), 9),
            make_sequence("runs", range(10), 9),
            make_sequence("waits", range(11), 9),
        ]
        for sequence in sequences[:2]:
            scheduler.add(sequence)
        engine.step()
        assert virtual.held is not None
        prefix = scheduler.hold(sequences[1], 5)
        scheduler.pause(sequences[1])
        for sequence in sequences[2:]:
            scheduler.add(sequence)
        scheduler.schedule()
        scheduler.finish(sequences[0])
        scheduler.clear()
        assert all(sequence.is_finished for sequence in sequences)
        assert virtual.held is None
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_paused) == (0, 0, 0)
        assert scheduler.allocator.num_free == 64
        for sequence in sequences:
            scheduler.finish(sequence)
        scheduler.release(prefix)
        assert scheduler.allocator.num_free == 64
    scheduler.add(make_sequence("later", range(20), 3))
    assert engine.drain() > 0


def test_dropping_a_job_takes_its_sequences_and_prefixes_and_no_others() -> None:
    scheduler = make_scheduler(sequences=2)
    engine = ToyEngine(scheduler)
    runs, pauses, other = (make_sequence(name, range(9), 9) for name in ("job", "job", "other"))
    scheduler.add(runs)
    scheduler.add(pauses)
    engine.step()
    scheduler.hold(runs, 5)
    scheduler.pause(pauses)
    scheduler.add(other)
    scheduler.add(make_sequence("job", range(9), 9, arrival=1.0))
    engine.step()
    assert scheduler.num_waiting == 1
    assert scheduler.drop("job") == 3
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_paused) == (1, 0, 0)
    engine.drain()
    assert scheduler.allocator.num_used == 0
    assert scheduler.drop("job") == 0


def test_blocks_freed_during_a_step_come_back_at_its_end() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", range(8), uses_prefix_cache=False)
    scheduler.add(sequence)
    schedule = scheduler.schedule()
    scheduler.finish(sequence)
    assert scheduler.allocator.num_used == 2
    scheduler.commit(schedule)
    assert scheduler.allocator.num_used == 0
    assert sequence.num_computed_tokens == 0


def test_a_step_must_be_committed_before_the_next() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", range(3)))
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="not committed"):
        scheduler.schedule()


def test_committing_before_or_after_the_token_is_appended_is_the_same() -> None:
    tables = []
    for append_first in (True, False):
        scheduler = make_scheduler()
        sequence = make_sequence("a", range(8), 2)
        scheduler.add(sequence)
        schedule = scheduler.schedule()
        if append_first:
            scheduler.append_tokens(sequence, 5)
        scheduler.commit(schedule)
        if not append_first:
            scheduler.append_tokens(sequence, 5)
        assert ids(scheduler.schedule()) == [("a", 8, 1)]
        tables.append(sequence.block_table)
    assert tables[0] == tables[1]


def test_a_running_sequence_that_awaits_a_token_is_not_run() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", range(3), 2))
    scheduler.commit(scheduler.schedule())
    assert scheduler.schedule().chunks == ()
    assert scheduler.has_work


def test_logits_that_were_computed_are_not_needed_again_after_preemption() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    engine = ToyEngine(scheduler)
    first = make_sequence("first", range(6), 10, logits_from=0, uses_prefix_cache=False)
    second = make_sequence("second", range(20, 26), 10, arrival=1.0, logits_from=2)
    scheduler.add(first)
    scheduler.add(second)
    engine.drain()
    assert second.num_preemptions > 0
    assert {p: engine.logits[second][p] for p in range(2, 6)} == dict.fromkeys(range(2, 6), 1)
    assert {p: engine.logits[first][p] for p in range(6)} == dict.fromkeys(range(6), 1)


def test_misuse_is_an_error() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", range(3), 0)
    with pytest.raises(ValueError, match="is new"):
        scheduler.append_tokens(sequence, 1)
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="added before"):
        scheduler.add(sequence)
    scheduler.commit(scheduler.schedule())
    with pytest.raises(ValueError, match="its maximum"):
        scheduler.append_tokens(sequence, 1)
    for wrong in (make_sequence("b", []), make_sequence("c", [1], logits_from=1)):
        with pytest.raises(ValueError, match="has"):
            scheduler.add(wrong)
    assert wrong.status is SequenceStatus.NEW


def test_only_what_may_come_next_can_be_drafted() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("a", range(3), 4)
    scheduler.add(sequence)
    scheduler.draft(sequence, [])
    with pytest.raises(ValueError, match="is not decoding"):
        scheduler.draft(sequence, [1])
    scheduler.commit(scheduler.schedule())
    scheduler.append_tokens(sequence, 1)
    with pytest.raises(ValueError, match="no room for 3 drafts"):
        scheduler.draft(sequence, [1, 1, 1])
    scheduler.draft(sequence, [5, 6])
    schedule = scheduler.schedule()
    assert [chunk.drafts for chunk in schedule.chunks] == [(5, 6)]
    scheduler.commit(schedule)
    scheduler.append_tokens(sequence, 5, 7)
    assert (sequence.num_computed_tokens, sequence.num_left) == (5, 1)
    assert scheduler.schedule().num_drafts == 0, "drafts are for one step"


def test_a_negative_number_of_rows_is_refused() -> None:
    with pytest.raises(FieldInvalidError, match=r"scheduler\.max_draft_rows: must be 0 or more"):
        SchedulerConfig(max_draft_rows=-1)


def scored_rows(schedule: Schedule) -> int:
    """Rows of prompts whose logits are asked for."""
    return sum(
        max(
            min(chunk.end, chunk.sequence.num_prompt_tokens) - max(chunk.start, chunk.sequence.logits_from), 0
        )
        for chunk in schedule.chunks
        if chunk.sequence.logits_from is not None
    )


@pytest.mark.parametrize("bulk", [4, 8, 16])
@pytest.mark.parametrize("length", [20, 33, 48, 60])
def test_beside_decodes_few_rows_of_a_short_prompt_are_scored_in_a_step(bulk: int, length: int) -> None:
    scheduler = make_scheduler(256, tokens=64, sequences=32, bulk=bulk)
    engine = ToyEngine(scheduler)
    decoding = [make_sequence(f"decodes {i}", [i, 1, 2], new=60) for i in range(3)]
    for sequence in decoding:
        scheduler.add(sequence)
    engine.step()
    scoring = [make_sequence(f"{i}", range(i, i + length), new=i, logits_from=i) for i in range(3)]
    for sequence in scoring:
        scheduler.add(sequence)
    rows: list[int] = []
    while any(sequence.num_output_tokens < sequence.max_num_tokens - length for sequence in scoring):
        schedule = engine.step(during=lambda schedule: rows.append(scored_rows(schedule)))
        still = [sequence for sequence in decoding if not sequence.is_finished]
        assert {chunk.sequence for chunk in schedule.chunks} >= set(still) or not still
        assert rows[-1] <= bulk + len(schedule.chunks) // 2 + len(scoring) or not still
    engine.drain()
    for sequence in scoring:
        first = int(sequence.id)
        assert [engine.logits[sequence][position] for position in range(first, length)] == [1] * (
            length - first
        )


def test_alone_as_many_rows_are_scored_as_a_step_has() -> None:
    scheduler = make_scheduler(tokens=64, bulk=4)
    scheduler.add(make_sequence("scores", range(60), new=0, logits_from=0))
    assert scored_rows(scheduler.schedule()) == 60
