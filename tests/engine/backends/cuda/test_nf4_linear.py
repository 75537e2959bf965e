"""NF4 linears on CUDA, against their definition in float64 and against themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cuda.linears.dense import DenseLinear, dense_linear
from manyhats.engine.backends.cuda.linears.linear import LinearWorkspace, linear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear, nf4_dequantize, nf4_linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import ROW_BUCKETS, RowTiles
from support.gpu.compiling import faults_of
from support.gpu.interpreter import DEVICE
from support.gpu.linears import all_alike, definition, inputs, nf4_linears, poisoned, rounded

SPLIT = RowTiles(16, 64, 4, 1, is_split=True, gathers=False)
WALKED = RowTiles(16, 64, 4, 1, gathers=False)


def packed(sizes: list[int], columns: int, **kind: int) -> Nf4Linear:
    found = pack_linear("qkv", nf4_linears(sizes, columns, **kind), 90, torch.device(DEVICE))
    assert isinstance(found, Nf4Linear)
    return found


def product(
    x: Tensor,
    weights: Nf4Linear,
    tile: RowTiles,
    splits: int = 1,
    block_k: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    y = poisoned(x.shape[0], weights.out_features, dtype=dtype)
    parts = poisoned(splits * y.numel())
    nf4_linear(x, replace(weights, tiles=all_alike(tile, splits=splits, block_k=block_k)), y, parts)
    return y


SHAPES = {
    "sizes": st.lists(st.integers(1, 90), min_size=1, max_size=3),
    "blocks": st.integers(1, 5),
    "rows": st.integers(1, 20),
    "biased": st.integers(0, 7),
    "is_nested": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=12, deadline=None)
@given(**SHAPES, is_split=st.booleans(), in_ranges=st.booleans())
def test_equals_its_definition(
    sizes: list[int],
    blocks: int,
    rows: int,
    biased: int,
    is_nested: bool,
    seed: int,
    is_split: bool,
    in_ranges: bool,
) -> None:
    linears = nf4_linears(sizes, 64 * blocks, seed=seed, biased=biased, is_nested=is_nested)
    weights = pack_linear("qkv", linears, 90, torch.device(DEVICE))
    assert isinstance(weights, Nf4Linear)
    x = inputs(rows, 64 * blocks, seed=seed)
    y = product(x, weights, SPLIT if is_split else WALKED, blocks if in_ranges else 1)
    expected = definition(x, linears)
    assert (y.cpu() - expected).norm() <= 1e-6 * expected.norm()


@settings(max_examples=8, deadline=None)
@given(**SHAPES, data=st.data())
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_other_tiles(
    sizes: list[int], blocks: int, rows: int, biased: int, is_nested: bool, seed: int, data: st.DataObject
) -> None:
    linears = nf4_linears(sizes, 64 * blocks, seed=seed, biased=biased, is_nested=is_nested)
    weights = pack_linear("qkv", linears, 90, torch.device(DEVICE))
    assert isinstance(weights, Nf4Linear)
    splits = data.draw(st.sampled_from([each for each in range(1, blocks + 1) if blocks % each == 0]))
    x = inputs(rows, 64 * blocks, seed=seed)
    y = product(x, weights, SPLIT, splits)
    row = data.draw(st.integers(0, rows - 1))
    assert torch.equal(product(x[row : row + 1], weights, WALKED, splits)[0], y[row])
    other = RowTiles(data.draw(st.sampled_from([32, 64])), 128, 4, 1, gathers=data.draw(st.booleans()))
    assert torch.equal(product(x, weights, other, splits), y)


def test_ranges_are_sums_of_their_own() -> None:
    """So the number of ranges may not follow from the number of rows."""
    weights, x = packed([64], 512), inputs(16, 512, seed=1)
    assert not torch.equal(product(x, weights, WALKED, 4), product(x, weights, WALKED, 1))


@pytest.mark.parametrize(("block_k", "columns"), [(128, 384), (256, 768)])
def test_steps_of_several_blocks_are_the_same_sums(block_k: int, columns: int) -> None:
    """Each step's blocks share a group of absmaxes, though some rows begin in one and end in the next."""
    weights, x = packed([50], columns), inputs(3, columns, seed=1)
    assert torch.equal(product(x, weights, WALKED, block_k=block_k), product(x, weights, WALKED))


def test_a_bfloat16_result_is_the_float32_one_rounded() -> None:
    weights, x = packed([70], 128, biased=1), inputs(3, 128, seed=1)
    for tile in (SPLIT, WALKED):
        y = product(x, weights, tile, 2)
        assert torch.equal(product(x, weights, tile, 2, dtype=torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("tile", [SPLIT, WALKED])
def test_only_the_result_is_written(tile: RowTiles) -> None:
    weights, x = packed([30, 40], 128), inputs(3, 128, seed=1)
    around, parts = poisoned(5, 90), poisoned(2 * 3 * 70 + 8)
    nf4_linear(x, replace(weights, tiles=all_alike(tile, splits=2)), around[1:4, 10:80], parts)
    assert torch.equal(around[1:4, 10:80], product(x, weights, tile, 2))
    assert int(around.isnan().sum()) == around.numel() - 3 * 70
    assert bool(parts[2 * 3 * 70 :].isnan().all())


def test_a_row_that_is_not_finite_stays_alone() -> None:
    weights, x = packed([70], 128), inputs(4, 128, seed=1)
    y = product(x, weights, WALKED)
    x[2, 5] = float("nan")
    found = product(x, weights, WALKED)
    assert torch.equal(found[[0, 1, 3]], y[[0, 1, 3]])
    assert bool(found[2].isnan().all())


def test_no_rows_are_no_work() -> None:
    weights = packed([70], 128)
    assert product(inputs(0, 128, seed=1), weights, WALKED).shape == (0, 70)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    blocks=st.integers(1, 4),
    is_nested=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dequantized_weights_are_the_model_s_to_the_bit(
    sizes: list[int], blocks: int, is_nested: bool, seed: int
) -> None:
    linears = nf4_linears(sizes, 64 * blocks, seed=seed, is_nested=is_nested)
    weights = pack_linear("qkv", linears, 90, torch.device(DEVICE))
    assert isinstance(weights, Nf4Linear)
    found = poisoned(sum(sizes), 64 * blocks, dtype=torch.bfloat16)
    nf4_dequantize(weights, found)
    assert torch.equal(found.cpu(), torch.cat([rounded(each) for each in linears]))


@pytest.mark.parametrize("splits", [1, 2])
def test_a_dense_product_of_dequantized_weights_has_the_same_bits(splits: int) -> None:
    weights, x = packed([70, 30], 256, biased=1), inputs(5, 256, seed=1)
    dense = poisoned(100, 256, dtype=torch.bfloat16)
    nf4_dequantize(weights, dense)
    tile = RowTiles(16, 128, 4, 1)
    y = poisoned(5, 100)
    dense_linear(x, DenseLinear(dense, weights.bias, all_alike(tile, splits=splits)), y, poisoned(0))
    assert torch.equal(y, product(x, weights, SPLIT, splits))


def test_many_rows_have_the_bits_of_few() -> None:
    """In every bucket, and where weights are decoded first."""
    weights = packed([20], 1024, biased=1)
    assert weights.tiles.splits == 2
    weights = replace(weights, tiles=replace(weights.tiles, decoded_rows=300))
    needed = LinearWorkspace.of([weights], 300, torch.device(DEVICE))
    workspace = LinearWorkspace(
        poisoned(needed.parts.numel()), poisoned(needed.weights.numel(), dtype=torch.bfloat16)
    )
    x, found = inputs(300, 1024, seed=1), {}
    for rows in (*ROW_BUCKETS, 300):
        found[rows] = poisoned(rows, 20)
        linear(x[:rows], weights, found[rows], workspace)
        assert bool(workspace.weights.isnan().all()) == (rows < 300)
    assert all(torch.equal(y, found[300][:rows]) for rows, y in found.items())


def test_nf4_linear_compiles() -> None:
    assert faults_of("support.gpu.entries.nf4_linear") == []
