"""Linears in bfloat16 on CUDA, against their definition in float64 and against themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cuda.linears.dense import DenseLinear, dense_linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear
from manyhats.engine.backends.cuda.linears.tiles import RowTiles
from manyhats.engine.model.weights import Linear
from support.gpu.compiling import faults_of
from support.gpu.interpreter import DEVICE
from support.gpu.linears import all_alike, definition, inputs, poisoned, random

SPLIT, WALKED = RowTiles(16, 64, 4, 1, is_split=True), RowTiles(16, 64, 4, 1)


def product(
    x: Tensor, weights: DenseLinear, tile: RowTiles, splits: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    y = poisoned(x.shape[0], weights.out_features, dtype=dtype)
    dense_linear(x, replace(weights, tiles=all_alike(tile, splits=splits)), y, poisoned(splits * y.numel()))
    return y


def random_linear(rows: int, columns: int, *, seed: int, has_bias: bool) -> tuple[Linear, DenseLinear]:
    bias = random(rows, seed=seed + 1) if has_bias else None
    of_model = Linear(random(rows, columns, seed=seed).bfloat16(), bias)
    weights = pack_linear("lm_head", [of_model], 90, torch.device(DEVICE))
    assert isinstance(weights, DenseLinear)
    return of_model, weights


@settings(max_examples=12, deadline=None)
@given(
    outputs=st.integers(1, 150),
    columns=st.integers(1, 300),
    rows=st.integers(1, 20),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_equals_its_definition_with_the_same_bits_alone_and_in_other_tiles(
    outputs: int, columns: int, rows: int, has_bias: bool, seed: int, data: st.DataObject
) -> None:
    of_model, weights = random_linear(outputs, columns, seed=seed, has_bias=has_bias)
    x = inputs(rows, columns, seed=seed)
    steps = -(-columns // 64)
    splits = data.draw(st.sampled_from([each for each in range(1, steps + 1) if steps % each == 0]))
    y = product(x, weights, SPLIT, splits)
    expected = definition(x, [of_model])
    assert (y.cpu() - expected).norm() <= 1e-6 * expected.norm()
    row = data.draw(st.integers(0, rows - 1))
    assert torch.equal(product(x[row : row + 1], weights, WALKED, splits)[0], y[row])
    assert torch.equal(product(x, weights, RowTiles(32, 128, 4, 1), splits), y)


def test_a_bfloat16_result_is_the_float32_one_rounded() -> None:
    _, weights = random_linear(70, 128, seed=0, has_bias=True)
    x = inputs(3, 128, seed=1)
    for tile in (SPLIT, WALKED):
        y = product(x, weights, tile, 2)
        assert torch.equal(product(x, weights, tile, 2, dtype=torch.bfloat16), y.bfloat16())


def test_inputs_beside_a_row_do_not_enter() -> None:
    """With 100 inputs the last step reads past them."""
    _, weights = random_linear(70, 100, seed=0, has_bias=False)
    x = poisoned(3, 128, dtype=torch.bfloat16)
    x[:, :100] = inputs(3, 100, seed=1)
    assert torch.equal(product(x[:, :100], weights, WALKED), product(inputs(3, 100, seed=1), weights, WALKED))


def test_dense_linear_compiles() -> None:
    assert faults_of("support.gpu.entries.dense_linear") == []
