"""How rows are divided into tiles, and these grouped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.torch.batched.attention import AttentionPlan, grouped, tiles_of
from manyhats.engine.backends.torch.cache import TorchKVCache
from manyhats.engine.backends.torch.model import attended
from manyhats.engine.model.architecture import Attention
from support.factories.architectures import make_architecture

BLOCK = 4
ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3)


def plan_of(sizes: list[tuple[int, int]]) -> StepPlan:
    """Sequences of which so many cells were there before, and so many rows are in the step."""
    lengths = [before + rows for before, rows in sizes]
    counts = [-(-length // BLOCK) for length in lengths]
    tables = np.zeros((len(sizes), max(counts)), np.int32)
    first = 0
    for index, count in enumerate(counts):
        tables[index, :count] = np.arange(first, first + count)[::-1]
        first += count
    starts = np.cumsum([0, *(rows for _, rows in sizes)])
    num_rows = int(starts[-1])
    cells = [
        tables[index, position // BLOCK] * BLOCK + position % BLOCK
        for index, (before, rows) in enumerate(sizes)
        for position in range(before, before + rows)
    ]
    return StepPlan(
        token_ids=np.zeros(num_rows, np.int32),
        positions=np.zeros(num_rows, np.int32),
        cells=np.array(cells, np.int64),
        query_start=int32(starts),
        context_len=int32(lengths),
        block_tables=tables,
        row_slots=np.zeros(num_rows, np.int32),
        logit_rows=int32([]),
    )


kinds = st.builds(
    lambda window, softcap, sees_all: replace(ATTENTION, window=window, softcap=softcap, sees_all=sees_all),
    st.none() | st.integers(1, 40),
    st.sampled_from([None, 2.0]),
    st.booleans(),
)
sizes_of_sequences = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 4) | st.integers(1, 300)), min_size=1, max_size=6
)


@given(sizes=sizes_of_sequences, attention=kinds)
def test_every_row_is_in_one_tile_which_has_all_that_it_sees(
    sizes: list[tuple[int, int]], attention: Attention
) -> None:
    plan = plan_of(sizes)
    tiles = [tile for group in grouped(tiles_of(plan, attention), attention) for tile in group]
    rows = sorted(row for tile in tiles for row in range(tile.row, tile.row + tile.count))
    assert rows == list(range(plan.num_rows))
    for tile in tiles:
        length = int(plan.context_len[tile.sequence])
        for offset in range(tile.count):
            seen = attention.seen(tile.position + offset, length)
            assert tile.start <= seen.start
            assert seen.stop <= tile.end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(sizes=sizes_of_sequences, attention=kinds, seed=st.integers(0, 99))
def test_each_row_gets_what_it_gets_by_itself_whatever_lies_in_others_cells(
    dtype: torch.dtype, sizes: list[tuple[int, int]], attention: Attention, seed: int
) -> None:
    plan = plan_of(sizes)
    architecture = make_architecture(attention)
    num_blocks = int(plan.block_tables.max()) + 2
    cache = TorchKVCache(architecture, num_blocks, BLOCK, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape, generator=generator))
    used = cache.keys.new_zeros(num_blocks * BLOCK, dtype=torch.bool)
    contexts = [
        cache.cells_of(torch.from_numpy(table), int(length))
        for table, length in zip(plan.block_tables, plan.context_len, strict=True)
    ]
    used[torch.cat(contexts)] = True
    cache.keys[:, ~used] = torch.nan
    cache.values[:, ~used] = torch.nan
    queries = torch.randn(plan.num_rows, 4, 8, generator=generator).to(dtype)
    tables = torch.from_numpy(plan.block_tables).long()
    made = AttentionPlan(plan, tables, cache, attention, dtype)
    found = made.attend(0, queries, cache, attention, {}, {})
    for sequence, cells in enumerate(contexts):
        first, last = plan.query_start[sequence : sequence + 2].tolist()
        for row in range(first, last):
            seen = attention.seen(len(cells) - (last - row), len(cells))
            own = cells[seen.start : seen.stop]
            expected = attended(queries[row].float(), *cache.read(0, own), attention)
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(found[row].float(), expected, atol=tolerance, rtol=tolerance)
