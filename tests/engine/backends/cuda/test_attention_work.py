"""The list of a step's attention, as a function of the plan's numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from manyhats.engine.backends.cuda.attention.work import Tiling, Work, work_of
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.model.architecture import Attention

Rows = list[tuple[int, int]]
"""Of each sequence: its rows, and the cells before them."""


def attention_of(group: int, window: int | None = None, sees_all: bool = False) -> Attention:
    return Attention(
        num_heads=group, num_kv_heads=1, head_dim=16, scale=1.0, window=window, sees_all=sees_all
    )


def tiling_of(attention: Attention) -> Tiling:
    """Of short splits, so that short contexts have several."""
    return replace(Tiling.of(attention), tile=16, split=32)


def plan_of(sequences: Rows) -> StepPlan:
    start = int32([0, *accumulate(rows for rows, _ in sequences)])
    per_row, none = np.zeros(start[-1], np.int32), int32([])
    return StepPlan(
        token_ids=per_row,
        positions=per_row,
        cells=per_row.astype(np.int64),
        query_start=start,
        context_len=int32([rows + before for rows, before in sequences]),
        block_tables=np.zeros((len(sequences), 1), np.int32),
        row_slots=per_row,
        logit_rows=none,
    )


def work_for(sequences: Rows, attention: Attention, num_lanes: int, max_slots: int) -> Work:
    return work_of(plan_of(sequences), attention, tiling_of(attention), num_lanes, max_slots)


A_STEP = (
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=5),
    st.builds(
        attention_of, st.sampled_from([1, 3, 16, 20, 71]), st.none() | st.integers(1, 100), st.booleans()
    ),
    st.integers(1, 40),
    st.integers(0, 200),
)


@given(*A_STEP)
@example([(40, 20)], attention_of(1, 5, True), 1, 0)
def test_each_row_goes_once_and_in_order_through_the_splits_that_it_sees(
    sequences: Rows, attention: Attention, num_lanes: int, max_slots: int
) -> None:
    plan, tiling = plan_of(sequences), tiling_of(attention)
    splits: dict[int, list[int]] = {row: [] for row in range(plan.num_rows)}
    work = work_for(sequences, attention, num_lanes, max_slots)
    for sequence, row, count, position, length, first, end, _ in work.items.tolist():
        assert count <= tiling.num_rows
        assert length == plan.context_len[sequence]
        assert row + length - position == plan.query_start[sequence + 1]
        for inner in range(count):
            splits[row + inner] += range(first, end)
    for sequence, (rows, before) in enumerate(sequences):
        for index in range(rows):
            seen = attention.seen(before + index, before + rows)
            found = splits[int(plan.query_start[sequence]) + index]
            assert found == list(range(min(found), max(found) + 1))
            assert found[0] * tiling.split <= seen.start
            assert seen.stop <= (found[-1] + 1) * tiling.split


@given(*A_STEP)
def test_splits_that_are_apart_have_slots_of_their_own_and_are_merged_in_order(
    sequences: Rows, attention: Attention, num_lanes: int, max_slots: int
) -> None:
    work = work_for(sequences, attention, num_lanes, max_slots)
    assert work.num_slots <= max_slots
    assert len(work.items) <= plan_of(sequences).num_rows + work.num_slots
    slots: dict[int, dict[int, int]] = {}
    for _, row, count, _, _, first, end, slot in work.items.tolist():
        assert slot < 0 or end == first + 1
        for inner in range(count if slot >= 0 else 0):
            slots.setdefault(row + inner, {})[first] = slot + inner
    used = [slot for of_row in slots.values() for slot in of_row.values()]
    assert sorted(used) == list(range(work.num_slots))
    merged = {row: [slot + i * step for i in range(count)] for row, slot, step, count in work.merges.tolist()}
    assert merged == {row: [of_row[split] for split in sorted(of_row)] for row, of_row in slots.items()}


def test_no_item_passes_splits_that_none_of_its_rows_sees() -> None:
    (item,) = work_for([(4, 200)], attention_of(4, window=40), num_lanes=1, max_slots=0).items.tolist()
    assert item == [0, 0, 4, 200, 204, 5, 7, -1]


def test_long_items_come_first() -> None:
    work = work_for([(1, 9), (1, 119), (1, 49)], attention_of(1), num_lanes=1, max_slots=0)
    assert work.items[:, 0].tolist() == [1, 2, 0]


def test_a_lone_context_is_divided_and_many_are_not() -> None:
    alone = work_for([(1, 119)], attention_of(1), num_lanes=8, max_slots=64)
    many = work_for([(1, 119)] * 64, attention_of(1), num_lanes=8, max_slots=64)
    assert (len(alone.items), alone.num_slots) == (4, 4)
    assert (len(many.items), many.num_slots) == (64, 0)


def test_the_longest_contexts_get_the_room_there_is() -> None:
    work = work_for([(1, 60), (1, 250)], attention_of(1), num_lanes=64, max_slots=9)
    assert work.merges[:, 0].tolist() == [1]
    assert work.num_slots == 8
