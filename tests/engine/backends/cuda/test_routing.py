"""Which row goes to which expert, as the torch backend sends them, and what goes to one side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.gpu.interpreter import DEVICE  # isort: skip

from manyhats.engine.backends.cuda.experts.routing import (
    SortedPairs,
    choose_experts,
    combine,
    route,
    sort_pairs,
)
from manyhats.engine.model.architecture import Experts
from manyhats.engine.model.forward import routed
from support.gpu.adapters import Served, normal
from support.gpu.linears import poisoned
from support.gpu.no_sync import no_sync

INF, NAN = float("inf"), float("nan")


def chosen_by(parts: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    num_rows = parts.shape[1]
    chosen = torch.full((num_rows, experts.num_per_row), -1, dtype=torch.int32, device=DEVICE)
    shares = poisoned(num_rows, experts.num_per_row)
    with no_sync():
        choose_experts(parts, experts, chosen, shares)
    return chosen, shares


@pytest.mark.parametrize("renormalizes", [False, True])
@pytest.mark.parametrize(("num", "per_row"), [(5, 2), (8, 8), (40, 6)])
def test_rows_go_where_the_torch_backend_sends_them(num: int, per_row: int, renormalizes: bool) -> None:
    experts = Experts(num, per_row, renormalizes)
    parts = normal(num, 2, 7, num)
    chosen, shares = chosen_by(parts, experts)
    right, weights = routed(parts[0] + parts[1], experts)
    assert torch.equal(chosen.long(), right)
    torch.testing.assert_close(shares, weights, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_of_equal_logits_the_first_ones_are_chosen() -> None:
    experts = Experts(6, 3, renormalizes=True)
    logits = torch.tensor(
        [
            [1.0] * 6,
            [0.0, 2.0, 1.0, 2.0, 2.0, 2.0],
            [-0.0, 0.0, -0.0, 0.0, -1.0, -0.0],
            [-INF, -INF, 1.0, -INF, -INF, -INF],
            [INF, 1.0, 0.0, 1.0, 1.0, 1.0],
        ],
        device=DEVICE,
    )
    chosen, _ = chosen_by(logits[None], experts)
    assert torch.equal(chosen.long(), routed(logits, experts)[0])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_whatever_the_logits_are_different_experts_are_chosen() -> None:
    logits = torch.tensor([[NAN] * 5, [1.0, NAN, 2.0, -NAN, INF], [-INF] * 5], device=DEVICE)
    chosen, shares = chosen_by(logits[None], Experts(5, 3, renormalizes=False))
    for row in chosen.tolist():
        assert row == sorted(set(row))
        assert len(row) == 3
        assert set(row) <= set(range(5))
    assert shares.isnan().all()


@pytest.mark.parametrize(("num_rows", "size", "num"), [(1, 40, 3), (19, 72, 33), (3, 1100, 8)])
def test_the_routers_logits_are_not_rounded(num_rows: int, size: int, num: int) -> None:
    x, weight = normal(1, num_rows, size).bfloat16(), normal(2, num, size)
    room = poisoned(4 * num_rows * num)
    with no_sync():
        parts = route(x, weight, room)
    right = x.double() @ weight.double().T
    assert float((parts.double().sum(0) - right).norm() / right.norm()) < 1e-6
    alone = route(x[-1:], weight, poisoned(4 * num))
    assert torch.equal(alone[:, 0], parts[:, -1])


def in_order(experts: np.ndarray, num: int, size: int) -> tuple[list[int], list[list[int]]]:
    """Pairs by expert, and their tiles."""
    order = np.argsort(experts, kind="stable").tolist()
    tiles, first = [], 0
    for expert in range(num):
        count = int((experts == expert).sum())
        tiles += [[expert, first + at, min(size, count - at)] for at in range(0, count, size)]
        first += count
    return order, tiles


def room_for(num_pairs: int, num: int, size: int) -> SortedPairs:
    room = SortedPairs.room(num_pairs, num, size, torch.device(DEVICE))
    for each in (room.pairs, room.tiles, room.num_tiles):
        each.fill_(-1)
    return room


@settings(max_examples=8, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    num=st.sampled_from([3, 8, 20]),
    per_row=st.integers(1, 3),
    size=st.sampled_from([2, 16]),
    seed=st.integers(0, 99),
)
def test_pairs_are_sorted_and_cut_by_expert(
    num_rows: int, num: int, per_row: int, size: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    chosen = np.stack([np.sort(random.permutation(num)[:per_row]) for _ in range(num_rows)])
    with no_sync():
        on_device = torch.from_numpy(chosen.astype(np.int32)).to(DEVICE)
        found = sort_pairs(on_device, num, size, room_for(num_rows * per_row, num, size))
    order, tiles = in_order(chosen.flatten(), num, size)
    assert found.pairs.tolist() == order
    assert found.num_tiles.tolist() == [len(tiles)]
    assert found.tiles[: len(tiles)].tolist() == tiles
    assert len(tiles) <= found.max_tiles


def test_more_pairs_than_are_counted_at_a_time_are_sorted() -> None:
    random = np.random.default_rng(1)
    chosen = np.stack([np.sort(random.permutation(3)[:2]) for _ in range(700)])
    found = sort_pairs(torch.from_numpy(chosen.astype(np.int32)).to(DEVICE), 3, 16, room_for(1400, 3, 16))
    order, tiles = in_order(chosen.flatten(), 3, 16)
    assert found.pairs.tolist() == order
    assert found.tiles[: len(tiles)].tolist() == tiles


def test_pairs_of_rows_with_an_adapter_are_sorted_alone() -> None:
    """By place: rows of the first adapter come first."""
    step = Served([[], []]).step([2, 0, 1, 2, 0, 1], slack=3)
    chosen = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3], [0, 1], [1, 3]], dtype=torch.int32, device=DEVICE)
    with no_sync():
        found = sort_pairs(chosen, 4, 16, room_for(2 * step.max_rows, 4, 16), step)
    own = chosen[[2, 5, 0, 3]].flatten().cpu().numpy()
    order, tiles = in_order(own, 4, 16)
    assert found.pairs[: len(order)].tolist() == order
    assert found.tiles[: int(found.num_tiles)].tolist() == tiles


def test_what_experts_give_is_summed_in_their_order() -> None:
    y, shares, out = normal(1, 3 * 4, 1100), normal(2, 3, 4), poisoned(3, 1100)
    with no_sync():
        combine(y, shares, out)
    total = torch.zeros_like(out)
    for i in range(4):
        total = total + y.view(3, 4, -1)[:, i] * shares[:, i : i + 1]
    assert torch.equal(out, total)
