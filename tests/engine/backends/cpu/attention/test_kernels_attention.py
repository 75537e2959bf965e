from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.backends.dtypes import block_bytes
from manyhats.engine.backends.int8 import dequantized, quantized
from manyhats.engine.errors import ModelError
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.model.architecture import Architecture
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Sequence
from support.factories.architectures import make_architecture, make_attention
from support.harnesses.kernels import Operations, new_cache
from support.oracles.operations import ReferenceKernels
from support.oracles.transformers import dense_attention

ONE_THREAD, TWO_THREADS, REFERENCE = Operations(1), Operations(2), ReferenceKernels()
NUM_BLOCKS = 96
DTYPES = ["float32", "bfloat16", "int8"]
SHORT = st.lists(st.integers(1, 90), min_size=1, max_size=4)
LONG = st.lists(st.sampled_from([40, 255, 256, 257, 300, 512, 600]), min_size=1, max_size=2)
"""Around the ends of attention's parts, of 256 positions."""


@dataclass(frozen=True)
class Case:
    """Sequences of random queries, keys and values: ``rows[s]`` is [T, (H + 2·Hkv)·K]; ``cap`` is 0 for none."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    window: int | None
    dtype: str
    rows: tuple[Tensor, ...]
    tables: tuple[tuple[int, ...], ...]
    cap: float = 0.0
    sees_all: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def architecture(self) -> Architecture:
        attention = make_attention(
            self.num_heads, self.num_kv_heads, self.head_dim, rotary_dim=self.head_dim, scale=self.scale
        )
        return make_architecture(attention, num_layers=2, max_context_length=512)


@st.composite
def cases(
    draw: st.DrawFn,
    lengths: st.SearchStrategy[list[int]] = SHORT,
    windows: st.SearchStrategy[int | None] = st.none() | st.integers(1, 40),  # noqa: B008
) -> Case:
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 3, 4, 7]))
    head_dim = draw(st.sampled_from([16, 32, 64]))
    block_size = draw(st.sampled_from([16, 32]))
    chosen = draw(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    blocks = iter(torch.randperm(NUM_BLOCKS, generator=generator).tolist())
    width = (num_kv_heads * group + 2 * num_kv_heads) * head_dim
    return Case(
        num_kv_heads,
        group,
        head_dim,
        block_size,
        draw(windows),
        draw(st.sampled_from(DTYPES)),
        tuple(torch.randn(length, width, generator=generator) * 2 for length in chosen),
        tuple(tuple(next(blocks) for _ in range(-(-length // block_size))) for length in chosen),
        draw(st.sampled_from([0.0, 0.0, 3.0])),
    )


def batch_of(case: Case, parts: Seq[tuple[int, int, int]]) -> Batch:
    """A step that runs tokens [start, end) of sequence s for each (s, start, end)."""
    chunks = []
    for sequence, start, end in parts:
        count = case.rows[sequence].shape[0]
        owner = Sequence(id=str(sequence), token_ids=[0] * count, max_num_tokens=count)
        owner.block_table = list(case.tables[sequence])
        chunks.append(Chunk(owner, start, end - start))
    return Batch.of(step_plan(Schedule(tuple(chunks)), case.block_size))


def attend(
    case: Case, kernels: Any, cache: Any, parts: Seq[tuple[int, int, int]], layer: int = 1
) -> list[Tensor]:
    """Writes the parts' keys and values, then their attention, one [rows, H·K] a part."""
    batch = batch_of(case, parts)
    qkv = torch.cat([case.rows[sequence][start:end] for sequence, start, end in parts])
    still = torch.zeros(qkv.shape[0], case.head_dim // 2)
    kernels.rotate_and_store(qkv, still + 1, still, batch, cache, layer, case.num_heads)
    both = {"sees_all": True} if case.sees_all else {}
    out = kernels.attention(
        qkv, batch, cache, layer, case.num_heads, case.scale, case.window, case.cap or None, **both
    )
    return list(out.split([end - start for _, start, end in parts]))


def whole(case: Case, kernels: Any) -> list[Tensor]:
    """All sequences at once, each in one chunk."""
    cache = new_cache(kernels, case.architecture, NUM_BLOCKS, case.block_size, case.dtype)
    return attend(case, kernels, cache, [(s, 0, len(rows)) for s, rows in enumerate(case.rows)])


def stored(x: Tensor, dtype: str) -> Tensor:
    """Keys or values as a cache returns them."""
    return dequantized(*quantized(x)) if dtype == "int8" else x.to(getattr(torch, dtype)).float()


def exact(case: Case) -> list[Tensor]:
    """Float64 attention over keys and values as the cache rounds them."""
    heads, kv_heads = case.num_heads, case.num_kv_heads
    out = []
    for rows in case.rows:
        q, k, v = rows.view(len(rows), -1, case.head_dim).split([heads, kv_heads, kv_heads], dim=1)
        keys, values = stored(k, case.dtype), stored(v, case.dtype)
        mixed = dense_attention(q, keys, values, case.scale, case.window, case.cap, case.sees_all)
        out.append(mixed.reshape(len(rows), -1))
    return out


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_equals_dense_attention(case: Case) -> None:
    for actual, expected in zip(whole(case, TWO_THREADS), exact(case), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(case=cases(LONG, st.none() | st.sampled_from([1, 17, 200, 256, 300])))
def test_contexts_of_several_parts_equal_dense_attention(case: Case) -> None:
    for actual, expected in zip(whole(case, TWO_THREADS), exact(case), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(case=cases(LONG, st.none() | st.sampled_from([1, 17, 200, 256, 300])), data=st.data())
def test_contexts_of_several_parts_are_the_same_bits_decoded_or_chunked_by_any_number_of_threads(
    case: Case, data: st.DataObject
) -> None:
    expected = whole(case, TWO_THREADS)
    kernels = data.draw(st.sampled_from([ONE_THREAD, TWO_THREADS]))
    cache = new_cache(kernels, case.architecture, NUM_BLOCKS, case.block_size, case.dtype)
    cuts = [data.draw(st.integers(0, len(rows) - 1)) for rows in case.rows]
    if any(cuts):
        attend(case, kernels, cache, [(s, 0, cut) for s, cut in enumerate(cuts) if cut])
    # One row decodes beside the other sequence's chunk, then alone.
    ends = [len(rows) if s else cuts[s] + 1 for s, rows in enumerate(case.rows)]
    mixed = attend(case, kernels, cache, [(s, cuts[s], ends[s]) for s in range(len(cuts))])
    for sequence, out in enumerate(mixed):
        assert torch.equal(out, expected[sequence][cuts[sequence] : ends[sequence]])
    for row in range(ends[0], min(ends[0] + 4, len(case.rows[0]))):
        alone = attend(case, kernels, cache, [(0, row, row + 1)])
        assert torch.equal(alone[0], expected[0][row : row + 1])


@settings(max_examples=30, deadline=None)
@given(case=cases(SHORT | LONG, st.none() | st.sampled_from([1, 2, 17, 65, 200, 256, 300])))
def test_rows_that_see_both_ways_equal_dense_attention_and_are_the_same_bits_alone(case: Case) -> None:
    both = Case(**{**vars(case), "sees_all": True})
    found = whole(both, TWO_THREADS)
    for actual, expected in zip(found, exact(both), strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-5)
    for sequence, rows in enumerate(both.rows):
        cache = new_cache(ONE_THREAD, both.architecture, NUM_BLOCKS, both.block_size, both.dtype)
        (alone,) = attend(both, ONE_THREAD, cache, [(sequence, 0, len(rows))])
        assert torch.equal(alone, found[sequence])


@settings(max_examples=6, deadline=None)
@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    short = Case(**{**vars(case), "rows": tuple(rows[:20] for rows in case.rows)})
    for actual, expected in zip(whole(short, TWO_THREADS), whole(short, REFERENCE), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases(), data=st.data())
def test_a_row_is_the_same_bits_however_its_sequence_is_cut_and_whatever_runs_beside_it(
    case: Case, data: st.DataObject
) -> None:
    expected = whole(case, TWO_THREADS)
    kernels = data.draw(st.sampled_from([ONE_THREAD, TWO_THREADS]))
    cache = new_cache(kernels, case.architecture, NUM_BLOCKS, case.block_size, case.dtype)
    pending = []
    for sequence, rows in enumerate(case.rows):
        cuts = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=5).map(accumulate).map(list))
        ends = [0, *(cut for cut in cuts if cut < len(rows)), len(rows)]
        pending.append([(sequence, start, end) for start, end in pairwise(ends)])
    actual: list[list[Tensor]] = [[] for _ in case.rows]
    while any(pending):
        ready = [s for s, parts in enumerate(pending) if parts]
        chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, unique=True))
        parts = [pending[s].pop(0) for s in chosen]
        for sequence, out in zip(chosen, attend(case, kernels, cache, parts), strict=True):
            actual[sequence].append(out)
    for sequence, parts_out in enumerate(actual):
        assert torch.equal(torch.cat(parts_out), expected[sequence])


@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_decoding_token_by_token_alone_is_the_same_bits(case: Case) -> None:
    expected = whole(case, TWO_THREADS)
    rows = case.rows[-1][:40]
    cache = new_cache(TWO_THREADS, case.architecture, NUM_BLOCKS, case.block_size, case.dtype)
    last = len(case.rows) - 1
    out = [attend(case, TWO_THREADS, cache, [(last, i, i + 1)])[0] for i in range(len(rows))]
    assert torch.equal(torch.cat(out), expected[last][: len(rows)])


@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_what_an_earlier_sequence_left_in_a_block_is_never_seen(case: Case) -> None:
    cache = new_cache(TWO_THREADS, case.architecture, NUM_BLOCKS, case.block_size, case.dtype)
    spoiled = Case(**{**vars(case), "rows": tuple(torch.full_like(rows, torch.nan) for rows in case.rows)})
    everywhere = [(s, 0, len(rows)) for s, rows in enumerate(case.rows)]
    attend(spoiled, TWO_THREADS, cache, everywhere)
    expected = whole(case, TWO_THREADS)
    first = [(s, 0, (len(rows) + 1) // 2) for s, rows in enumerate(case.rows)]
    for (sequence, _, end), out in zip(first, attend(case, TWO_THREADS, cache, first), strict=True):
        assert torch.equal(out, expected[sequence][:end])


@pytest.mark.parametrize("kernels", [TWO_THREADS, REFERENCE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_block_reads_like_its_source_in_every_layer(kernels: Any, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(20, 4 * 16, generator=generator),)
    case = Case(1, 2, 16, 16, None, dtype, rows, ((3, 5),))
    cache = new_cache(kernels, case.architecture, NUM_BLOCKS, 16, dtype)
    expected = [attend(case, kernels, cache, [(0, 0, 20)], layer) for layer in (0, 1)]
    cache.copy_blocks([(3, 7), (5, 2)])
    moved = Case(1, 2, 16, 16, None, dtype, rows, ((7, 2),))
    for layer in (0, 1):
        out = attend(moved, kernels, cache, [(0, 19, 20)], layer)
        assert torch.equal(out[0], expected[layer][0][19:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_spoils_no_other_sequence(dtype: str, value: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = tuple(torch.randn(30, 4 * 16, generator=generator) for _ in range(3))
    tables = ((0, 1), (2, 3), (4, 5))
    good = whole(Case(1, 2, 16, 16, None, dtype, rows, tables), TWO_THREADS)
    spoiled = rows[1].clone()
    spoiled[4] = value
    bad = whole(Case(1, 2, 16, 16, None, dtype, (rows[0], spoiled, rows[2]), tables), TWO_THREADS)
    assert torch.equal(bad[0], good[0])
    assert torch.equal(bad[2], good[2])
    assert bad[1][4:].isnan().all()


@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 16), (16, 24)])
def test_sizes_that_the_kernels_cannot_run_are_refused(block_size: int, head_dim: int) -> None:
    case = Case(1, 1, head_dim, block_size, None, "float32", (), ())
    with pytest.raises(ModelError, match="multiples of 16"):
        CpuBackend(2).new_cache(case.architecture, block_size, "float32", 1 << 20)


def heads(*shape: int) -> Tensor:
    """Random heads of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 16, generator=generator) * torch.logspace(-20, 6, shape[0]).view(-1, 1, 1)
    x[0] = 0.0
    x[1] *= 1e-25  # numbers so small that their scale has few bits, or none
    return x


def test_int8_is_the_nearest_multiple_of_a_scale() -> None:
    x = heads(40, 2)
    values, scales = quantized(x)
    assert values.abs().amax() == 127
    assert torch.equal(scales, x.abs().amax(-1) / 127)
    error = (dequantized(values, scales) - x)[2:].abs()
    assert (error <= 0.5001 * scales[2:].unsqueeze(-1)).all()
    assert torch.equal(quantized(-x)[0], -values)


def test_rows_are_stored_as_int8_like_tensors_that_are_written() -> None:
    x = heads(40, 4)  # two query heads, one of keys, one of values
    case = Case(1, 2, 16, 16, None, "int8", (x.reshape(40, -1),), ((4, 2, 7),))
    cache, written = (new_cache(TWO_THREADS, case.architecture, NUM_BLOCKS, 16, "int8") for _ in range(2))
    for layer in (0, 1):
        attend(case, TWO_THREADS, cache, [(0, 0, 40)], layer)
    both = x.expand(2, 40, 4, 16)
    written.write([4, 2, 7], both[:, :, 2:3], both[:, :, 3:])
    for name in ("_keys", "_values", "_scales"):
        assert np.array_equal(getattr(cache, name), getattr(written, name)), name
    assert cache.num_bytes == NUM_BLOCKS * block_bytes(case.architecture, 16, "int8")
    assert cache._keys.any()
    assert cache._values.any()
