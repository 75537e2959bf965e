"""Attention in blocks: against float64, and the same bits however a context is computed."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cuda.attention.attend import Parts, PrefixGates, WorkOnDevice, attend
from manyhats.engine.backends.cuda.attention.work import Tiling, Work, work_of
from manyhats.engine.backends.plan import StepPlan, int32
from manyhats.engine.backends.torch.model import attended
from manyhats.engine.model.architecture import Attention
from support.gpu.compiling import faults_of

BLOCK = 8
NUM_BLOCKS = 64
BEYOND = {8: (0, 0, 1, 0, 1, 0, 1, -1), 4: (0, 0, 0, 0)}
"""Items, and merges, that would spoil the first row, and that nobody may read: they are beyond the count."""


def attention_of(heads: int, kv_heads: int, size: int, **others: object) -> Attention:
    return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=size**-0.5, **others)


def tiling_of(attention: Attention) -> Tiling:
    """Of short splits, so that short contexts have several."""
    return replace(Tiling.of(attention), tile=16, split=32)


@dataclass(frozen=True)
class Texts:
    """Sequences whose every position has a query, a key and a value; keys and values are in blocks of a cache."""

    queries: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    tables: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, attention: Attention, lengths: list[int], seed: int = 0) -> Texts:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
        order = iter(torch.randperm(NUM_BLOCKS, generator=generator).tolist())
        tables = tuple(tuple(next(order) for _ in range(-(-length // BLOCK))) for length in lengths)
        keys, values = (torch.full((NUM_BLOCKS * BLOCK, kv_heads, size), torch.nan).bfloat16() for _ in "kv")
        for table, length in zip(tables, lengths, strict=True):
            cells = torch.tensor([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(length)])
            keys[cells], values[cells] = random(length, kv_heads, size), random(length, kv_heads, size)
        shape = (NUM_BLOCKS, BLOCK, kv_heads, size)
        return cls(
            tuple(random(length, heads, size) for length in lengths),
            keys.view(shape).to(DEVICE),
            values.view(shape).to(DEVICE),
            tables,
        )

    def context(self, text: int) -> tuple[Tensor, Tensor]:
        """Its keys and values, float64."""
        blocks, length = torch.tensor(self.tables[text]), len(self.queries[text])
        keys, values = (
            part.cpu()[blocks].flatten(0, 1)[:length].double() for part in (self.keys, self.values)
        )
        return keys, values


Chunk = tuple[int, int, int]
"""Of a text, the rows from one to before another."""


def plan_of(texts: Texts, chunks: list[Chunk]) -> StepPlan:
    start = int32([0, *accumulate(end - first for _, first, end in chunks)])
    longest = max(map(len, texts.tables))
    tables = [
        (*texts.tables[text], *(NUM_BLOCKS - 1 for _ in range(longest - len(texts.tables[text]))))
        for text, _, _ in chunks
    ]
    rows, none = int(start[-1]), int32([])
    return StepPlan(
        token_ids=np.zeros(rows, np.int32),
        positions=np.zeros(rows, np.int32),
        cells=np.zeros(rows, np.int64),
        query_start=start,
        context_len=int32([end for _, _, end in chunks]),
        block_tables=int32(tables),
        row_slots=np.zeros(rows, np.int32),
        logit_rows=none,
    )


def on_device(work: Work) -> WorkOnDevice:
    """With room behind it, which is not empty."""

    def roomy(values: np.ndarray) -> Tensor:
        room = int32([BEYOND[values.shape[1]]] * 3)
        return torch.from_numpy(np.concatenate((values, room))).to(DEVICE)

    counts = [
        torch.tensor([len(part)], dtype=torch.int32, device=DEVICE) for part in (work.items, work.merges)
    ]
    return WorkOnDevice(roomy(work.items), counts[0], roomy(work.merges), counts[1])


def run(
    texts: Texts,
    attention: Attention,
    chunks: list[Chunk],
    *,
    tiling: Tiling | None = None,
    max_slots: int = 1 << 16,
    num_lanes: int = 2,
    gates: list[tuple[float, float]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Each chunk's rows, [rows, H, K]."""
    tiling = tiling or tiling_of(attention)
    plan = plan_of(texts, chunks)
    work = work_of(plan, attention, tiling, num_lanes, max_slots)
    heads, size = attention.num_heads, attention.head_dim
    wide = torch.full((plan.num_rows, heads + 2, size), torch.nan, device=DEVICE).bfloat16()
    wide[:, :heads] = torch.cat([texts.queries[text][first:end] for text, first, end in chunks]).to(DEVICE)
    poisoned = [(work.num_slots, heads, size), (work.num_slots, heads, 2), (plan.num_rows, heads, size)]
    totals, stats, out = (torch.full(shape, torch.nan, device=DEVICE) for shape in poisoned)
    out = out.to(dtype)
    start = torch.from_numpy(plan.query_start).to(DEVICE)
    attend(
        wide[:, :heads],
        texts.keys,
        texts.values,
        torch.from_numpy(plan.block_tables).to(DEVICE),
        on_device(work),
        Parts(totals, stats),
        out,
        attention,
        tiling,
        num_lanes,
        None if gates is None else PrefixGates(torch.tensor(gates, device=DEVICE), start),
    )
    return list(out.cpu().split([end - first for _, first, end in chunks]))


def exact(
    texts: Texts, attention: Attention, chunk: Chunk, gates: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The same in float64, a row at a time; the gates are of what comes before the chunk."""
    text, first, end = chunk
    keys, values = (part[:end].clone() for part in texts.context(text))
    keys[:first] *= gates[0]
    values[:first] *= gates[1]
    rows = []
    for position in range(first, end):
        seen = attention.seen(position, end)
        part = slice(seen.start, seen.stop)
        rows.append(attended(texts.queries[text][position].double(), keys[part], values[part], attention))
    return torch.stack(rows)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Rounding weights to bfloat16 errs by 2⁻⁸ / √3 at most, in the mean of squares."""
    assert (found.double() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 16), (4, 2, 24), (17, 1, 80)])
def test_attention_is_that_of_float64(
    heads: int, kv_heads: int, size: int, window: int | None, softcap: float | None
) -> None:
    """A long decode and a short one, a whole prompt, and a chunk."""
    attention = attention_of(heads, kv_heads, size, window=window, softcap=softcap)
    texts = Texts.of(attention, [39, 2, 3, 21])
    chunks = [(0, 38, 39), (1, 1, 2), (2, 0, 3), (3, 19, 21)]
    found = torch.cat(run(texts, attention, chunks)).double()
    wanted = torch.cat([exact(texts, attention, chunk) for chunk in chunks])
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("window", [None, 1, 9])
def test_encoders_see_what_follows(window: int | None) -> None:
    attention = attention_of(2, 2, 16, window=window, sees_all=True)
    texts = Texts.of(attention, [20])
    (found,) = run(texts, attention, [(0, 0, 20)])
    assert_close(found, exact(texts, attention, (0, 0, 20)))


def test_query_heads_that_do_not_fit_one_tile_take_several() -> None:
    attention = attention_of(35, 1, 16)
    texts = Texts.of(attention, [20])
    (found,) = run(texts, attention, [(0, 17, 20)])
    assert_close(found, exact(texts, attention, (0, 17, 20)))


def test_the_tiling_of_models_computes_the_same() -> None:
    """Splits of 256 positions, in tiles of 64."""
    attention = attention_of(2, 1, 64)
    tiling = Tiling.of(attention)
    assert (tiling.tile, tiling.split) == (64, 256)
    texts = Texts.of(attention, [290])
    (found,) = run(texts, attention, [(0, 287, 290)], tiling=tiling)
    assert_close(found, exact(texts, attention, (0, 287, 290)))


def test_results_are_rounded_to_what_the_next_linear_reads() -> None:
    attention = attention_of(2, 1, 16)
    texts = Texts.of(attention, [40])
    (exactly,) = run(texts, attention, [(0, 30, 40)])
    for max_slots in (0, 1 << 16):
        (rounded,) = run(texts, attention, [(0, 30, 40)], dtype=torch.bfloat16, max_slots=max_slots)
        assert torch.equal(rounded, exactly.bfloat16())


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from(
        [
            attention_of(2, 1, 16),
            attention_of(3, 1, 24, window=37),
            attention_of(5, 1, 16, softcap=2.0, window=9),
        ]
    ),
    st.lists(st.integers(1, 39), max_size=2, unique=True),
    st.integers(0, 2**16),
)
def test_a_row_has_the_same_bits_in_decode_in_prefill_and_in_any_chunk(
    attention: Attention, cuts: list[int], seed: int
) -> None:
    texts = Texts.of(attention, [40, 20], seed)
    (whole,) = run(texts, attention, [(0, 0, 40)], max_slots=0)
    ends = [*sorted(cuts), 40]
    chunked = [
        run(texts, attention, [(1, 19, 20), (0, first, end)])[1]
        for first, end in zip([0, *ends], ends, strict=False)
    ]
    assert torch.equal(torch.cat(chunked), whole)
    (last,) = run(texts, attention, [(0, 39, 40)])
    assert torch.equal(last[0], whole[-1])


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("sees_all", [False, True])
def test_splits_apart_have_the_bits_of_splits_in_a_row(window: int | None, sees_all: bool) -> None:
    attention = attention_of(2, 1, 16, window=window, sees_all=sees_all)
    texts = Texts.of(attention, [70, 33])
    chunks = [(0, 60, 70), (1, 30, 33)]
    apart = run(texts, attention, chunks)
    in_a_row = run(texts, attention, chunks, max_slots=0)
    assert work_of(plan_of(texts, chunks), attention, tiling_of(attention), 2, 1 << 16).num_slots > 0
    assert torch.equal(torch.cat(apart), torch.cat(in_a_row))


def test_a_larger_tile_of_rows_changes_no_bits() -> None:
    attention = attention_of(2, 1, 16)
    texts = Texts.of(attention, [50])
    small = tiling_of(attention)
    (found,) = run(texts, attention, [(0, 30, 50)])
    (other,) = run(texts, attention, [(0, 30, 50)], tiling=replace(small, size=32))
    assert torch.equal(found, other)


def test_gates_multiply_the_keys_and_values_of_a_prefix() -> None:
    """Of the first text; the second has none, and the bits of a step without gates."""
    attention = attention_of(2, 1, 16, sees_all=True)
    texts = Texts.of(attention, [24, 20])
    chunks: list[Chunk] = [(0, 7, 24), (1, 4, 20)]
    gated, other = run(texts, attention, chunks, gates=[(0.25, 0.5), (1.0, 1.0)])
    assert_close(gated, exact(texts, attention, chunks[0], (0.25, 0.5)))
    assert torch.equal(other, run(texts, attention, chunks)[1])


def test_attention_compiles() -> None:
    assert faults_of("support.gpu.entries.attention") == []
