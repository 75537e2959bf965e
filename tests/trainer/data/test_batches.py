"""Batches hold every row once an epoch, depend on the step's index alone, and say what their rows say."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhats.trainer.data.batch import TokenizedRow, TrainingBatch, collate
from manyhats.trainer.data.dataset import TokenizedRows
from manyhats.trainer.data.sampler import BatchSampler, evaluation_batches
from manyhats.trainer.settings.settings import OptimizationSettings

Steps = list[list[list[TokenizedRow]]]


def rows_of_lengths(lengths: Sequence[int]) -> list[TokenizedRow]:
    """Rows that can be told apart by their first token."""
    return [
        TokenizedRow((index, *range(length - 1)), (False,) + (True,) * (length - 1))
        for index, length in enumerate(lengths)
    ]


def all_steps(sampler: BatchSampler) -> Steps:
    return [sampler.step(index) for index in range(sampler.num_steps)]


def row_ids(steps: Steps) -> list[int]:
    return [row.token_ids[0] for step in steps for batch in step for row in batch]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)
SETTINGS = st.builds(
    OptimizationSettings,
    batch_size=st.integers(1, 9),
    batch_tokens=st.none() | st.integers(2, 100),
    gradient_accumulation=st.integers(1, 4),
    epochs=st.sampled_from([1.0, 2.0, 3.0]),
    seed=st.integers(0, 2**31 - 1),
)


def steps_by_epoch(sampler: BatchSampler) -> list[Steps]:
    grouped = itertools.groupby(range(sampler.num_steps), sampler.epoch_of)
    return [[sampler.step(index) for index in indices] for _, indices in grouped]


@given(lengths=LENGTHS, settings=SETTINGS)
def test_passes_so_far_grow_evenly_within_an_epoch_and_are_whole_at_its_end(
    lengths: list[int], settings: OptimizationSettings
) -> None:
    sampler = BatchSampler(rows_of_lengths(lengths), settings, shuffle=True)
    expected = [
        epoch + step / len(steps)
        for epoch, steps in enumerate(steps_by_epoch(sampler))
        for step in range(1, len(steps) + 1)
    ]
    assert [sampler.epochs_after(index) for index in range(sampler.num_steps)] == pytest.approx(expected)


@given(lengths=LENGTHS, settings=SETTINGS, shuffle=st.booleans())
def test_every_row_comes_exactly_once_per_epoch(
    lengths: list[int], settings: OptimizationSettings, shuffle: bool
) -> None:
    sampler = BatchSampler(rows_of_lengths(lengths), settings, shuffle=shuffle)
    epochs = steps_by_epoch(sampler)
    assert len(epochs) == settings.epochs
    assert len(epochs[0]) == sampler.steps_per_epoch
    for steps in epochs:
        assert sorted(row_ids(steps)) == list(range(len(lengths)))
        if not shuffle:
            assert row_ids(steps) == list(range(len(lengths)))


@given(lengths=LENGTHS, settings=SETTINGS, shuffle=st.booleans())
def test_batches_keep_their_bounds_and_only_an_epochs_rest_is_smaller(
    lengths: list[int], settings: OptimizationSettings, shuffle: bool
) -> None:
    sampler = BatchSampler(rows_of_lengths(lengths), settings, shuffle=shuffle)
    for steps in steps_by_epoch(sampler):
        batches = [batch for step in steps for batch in step]
        assert all(len(step) == settings.gradient_accumulation for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= settings.gradient_accumulation
        if settings.batch_tokens is None:
            sizes = Counter(len(batch) for batch in batches)
            assert sizes[settings.batch_size] == len(lengths) // settings.batch_size
            assert len(batches) == math.ceil(len(lengths) / settings.batch_size)
        else:
            totals = [sum(len(row.token_ids) for row in batch) for batch in batches]
            assert all(
                total <= settings.batch_tokens or len(batch) == 1
                for total, batch in zip(totals, batches, strict=True)
            )


@given(lengths=LENGTHS, settings=SETTINGS, data=st.data())
def test_a_step_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(
    lengths: list[int], settings: OptimizationSettings, data: st.DataObject
) -> None:
    rows = rows_of_lengths(lengths)
    whole = all_steps(BatchSampler(rows, settings, shuffle=True))
    resumed = BatchSampler(rows, settings, shuffle=True)
    for index in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        assert resumed.step(index) == whole[index]


@given(lengths=LENGTHS, settings=SETTINGS)
def test_rows_in_arrays_give_the_same_batches_as_rows_in_a_list(
    lengths: list[int], settings: OptimizationSettings
) -> None:
    rows = rows_of_lengths(lengths)
    stored = TokenizedRows(
        np.array([each for row in rows for each in row.token_ids], dtype=np.int32),
        np.array([each for row in rows for each in row.is_target], dtype=np.bool_),
        np.cumsum([0, *lengths]),
    )
    assert all_steps(BatchSampler(stored, settings, shuffle=True)) == all_steps(
        BatchSampler(rows, settings, shuffle=True)
    )


@given(
    num_rows=st.integers(1, 60),
    epochs=st.fractions(Fraction(1, 100), 4, max_denominator=100),
    max_steps=st.none() | st.integers(1, 50),
    batch_size=st.integers(1, 9),
)
def test_a_fraction_of_an_epoch_has_so_many_of_its_steps(
    num_rows: int, epochs: Fraction, max_steps: int | None, batch_size: int
) -> None:
    settings = OptimizationSettings(epochs=float(epochs), max_steps=max_steps, batch_size=batch_size)
    sampler = BatchSampler(rows_of_lengths([2] * num_rows), settings, shuffle=True)
    per_epoch = math.ceil(num_rows / batch_size)
    num_steps = math.floor(epochs) * per_epoch + math.ceil(epochs % 1 * per_epoch)
    assert sampler.num_steps == min(num_steps, max_steps or num_steps)
    ends = [index for index in range(sampler.num_steps) if sampler.ends_epoch(index)]
    assert ends == sorted({*range(per_epoch - 1, sampler.num_steps, per_epoch), sampler.num_steps - 1})
    for index in (-1, sampler.num_steps):
        with pytest.raises(IndexError, match=f"step {index}"):
            sampler.step(index)


@pytest.mark.parametrize("epochs", [3 * 0.1 + 0.7, 30 * 0.1, 1e-12])
def test_rounding_makes_no_step_and_takes_none(epochs: float) -> None:
    settings = OptimizationSettings(epochs=epochs, batch_size=10)
    sampler = BatchSampler(rows_of_lengths([2] * 40), settings, shuffle=True)
    assert sampler.num_steps == max(round(epochs) * 4, 1)


def test_a_fraction_is_not_rounded_up_by_floating_point() -> None:
    sampler = BatchSampler(
        rows_of_lengths([2] * 100), OptimizationSettings(epochs=1.1, batch_size=10), shuffle=True
    )
    assert sampler.num_steps == 11
    assert [index for index in range(11) if sampler.ends_epoch(index)] == [9, 10]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = rows_of_lengths([5] * 64)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = BatchSampler(rows, OptimizationSettings(epochs=2, seed=seed), shuffle=True)
        return row_ids([sampler.step(epoch * 4 + index) for index in range(4)])

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(each) for each in orders}) == 4
    assert order(0, 1) == orders[1]


def test_orders_do_not_change_between_versions() -> None:
    """A resumed run needs the order of the run before; were this to change, its checkpoints would be worthless."""
    sampler = BatchSampler(
        rows_of_lengths([3, 9, 4, 8, 5, 7]), OptimizationSettings(batch_size=2), shuffle=True
    )
    assert row_ids(all_steps(sampler)) == [1, 0, 2, 3, 4, 5]


def test_rows_of_a_batch_are_of_like_length() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 200, 4000).tolist()

    def mean_spread(settings: OptimizationSettings, *, shuffle: bool) -> float:
        sampler = BatchSampler(rows_of_lengths(lengths), settings, shuffle=shuffle)
        batches = [[len(row.token_ids) for row in batch] for step in all_steps(sampler) for batch in step]
        return float(np.mean([max(batch) - min(batch) for batch in batches]))

    for settings in (OptimizationSettings(batch_size=16), OptimizationSettings(batch_tokens=1600)):
        assert mean_spread(settings, shuffle=True) < 0.12 * mean_spread(settings, shuffle=False)


def test_packed_batches_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 3000).tolist()
    sampler = BatchSampler(rows_of_lengths(lengths), OptimizationSettings(batch_tokens=512), shuffle=True)
    assert sampler.steps_per_epoch * 512 * 0.94 < sum(lengths)


def test_a_long_run_of_lengths_does_not_come_in_order() -> None:
    """Batches are shuffled: else the learning rate's schedule would meet long rows at one time and short at another."""
    lengths = np.random.default_rng(0).integers(2, 100, 4000)
    sampler = BatchSampler(rows_of_lengths(lengths.tolist()), OptimizationSettings(), shuffle=True)
    means = [np.mean([len(row.token_ids) for row in step[0]]) for step in all_steps(sampler)]
    neighbours = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(neighbours) < 0.2


@given(lengths=LENGTHS, settings=SETTINGS)
def test_evaluation_takes_every_row_once_the_longest_first(
    lengths: list[int], settings: OptimizationSettings
) -> None:
    batches = list(evaluation_batches(rows_of_lengths(lengths), settings))
    rows = [row for batch in batches for row in batch]
    assert sorted(row.token_ids[0] for row in rows) == list(range(len(lengths)))
    assert [len(row.token_ids) for row in rows] == sorted(lengths, reverse=True)
    if settings.batch_tokens is None:
        assert {len(batch) for batch in batches[:-1]} <= {settings.batch_size}


@st.composite
def tokenized_rows(draw: st.DrawFn) -> TokenizedRow:
    length = draw(st.integers(2, 9))
    token_ids = tuple(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
    is_target = (False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1)))
    return TokenizedRow(token_ids, is_target)


@st.composite
def rows_with_a_shared_beginning(draw: st.DrawFn) -> list[TokenizedRow]:
    beginning = tuple(draw(st.lists(st.integers(0, 1), max_size=5)))
    rows = draw(st.lists(tokenized_rows(), min_size=1, max_size=5))
    return [
        TokenizedRow(beginning + row.token_ids, (False,) * len(beginning) + row.is_target) for row in rows
    ]


ROWS = st.lists(tokenized_rows(), min_size=1, max_size=5) | rows_with_a_shared_beginning()


def seen_at(batch: TrainingBatch, place: int) -> tuple[int, ...]:
    """Slow: the tokens that a place's row has up to it."""
    token_ids = batch.token_ids.tolist()
    begin = 0
    for length in batch.segments:
        if place < begin + length:
            break
        begin += length
    head = token_ids[: batch.num_shared] if begin else []
    return (*head, *token_ids[begin : place + 1])


def learned_alone(row: TokenizedRow) -> list[tuple[tuple[int, ...], int]]:
    return [
        (row.token_ids[:place], row.token_ids[place])
        for place in range(len(row.token_ids))
        if row.is_target[place]
    ]


@given(rows=ROWS, share_beginning=st.booleans())
def test_a_batch_learns_what_its_rows_learn_alone(rows: list[TokenizedRow], share_beginning: bool) -> None:
    batch = collate(rows, share_beginning=share_beginning)
    found = [
        (seen_at(batch, place), target)
        for place, target in zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert found == [pair for row in rows for pair in learned_alone(row)]
    for place, position in enumerate(batch.positions.tolist()):
        assert position == len(seen_at(batch, place)) - 1


@given(rows=ROWS)
def test_a_batch_is_end_to_end_and_holds_a_shared_beginning_once(rows: list[TokenizedRow]) -> None:
    batch = collate(rows)
    num_tokens = sum(len(row.token_ids) for row in rows)
    assert sum(batch.segments) == len(batch.token_ids) == len(batch.positions)
    assert batch.num_row_tokens == num_tokens
    assert len(batch.token_ids) == num_tokens - batch.num_shared * (len(rows) - 1)
    assert all(length >= 1 for length in batch.segments)
    assert len(batch.segments) == len(rows) + (batch.num_shared > 0)
    assert batch.num_shared == longest_shared(rows)
    assert {batch.token_ids.dtype, batch.positions.dtype, batch.predictors.dtype, batch.targets.dtype} == {
        torch.int64
    }


def longest_shared(rows: Sequence[TokenizedRow]) -> int:
    """Slow: the largest length that is allowed."""
    if len(rows) == 1:
        return 0
    return max(
        length
        for length in range(min(len(row.token_ids) for row in rows))
        if len({row.token_ids[:length] for row in rows}) == 1
        and not any(any(row.is_target[:length]) for row in rows)
    )


def test_rows_with_one_prompt_share_it_whole_and_are_predicted_from_its_last_token() -> None:
    rows = [TokenizedRow((7, 8, answer, 2), (False, False, True, True)) for answer in (3, 4, 3)]
    batch = collate(rows)
    assert (batch.num_shared, tuple(batch.segments)) == (2, (2, 2, 2, 2))
    assert batch.token_ids.tolist() == [7, 8, 3, 2, 4, 2, 3, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 3, 2, 3]
    assert batch.predictors.tolist() == [1, 2, 1, 4, 1, 6]
    assert batch.targets.tolist() == [3, 2, 4, 2, 3, 2]
    apart = collate(rows, share_beginning=False)
    assert (apart.num_shared, tuple(apart.segments), apart.num_row_tokens) == (0, (4, 4, 4), 12)
