"""A model's linears as CUDA's kernels read them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.linears.dense import DenseLinear
from manyhats.engine.backends.cuda.linears.linear import LinearWorkspace, linear
from manyhats.engine.backends.cuda.linears.nf4 import Nf4Linear
from manyhats.engine.backends.cuda.linears.packing import pack_linear, repacked
from manyhats.engine.errors import ModelError
from manyhats.engine.model.weights import Linear
from support.gpu.interpreter import DEVICE
from support.gpu.linears import definition, inputs, nf4_linears, poisoned, random, random_nf4

DEVICE_OF_TESTS = torch.device(DEVICE)


def product(x: Tensor, linears: list[Linear], *, flattens: bool = False) -> Tensor:
    weights = pack_linear("qkv", linears, 90, DEVICE_OF_TESTS, flattens=flattens)
    y = poisoned(x.shape[0], weights.out_features)
    linear(x, weights, y, LinearWorkspace.of([weights], x.shape[0], DEVICE_OF_TESTS))
    return y


def test_a_byte_has_codes_half_a_block_apart() -> None:
    codes = torch.randint(0, 16, (3, 2, 64), dtype=torch.uint8)
    pairs = codes.view(-1, 2)
    found = repacked((pairs[:, 0] << 4) | pairs[:, 1], 128).view(3, 2, 32)
    assert torch.equal(found >> 4, codes[:, :, :32])
    assert torch.equal(found & 15, codes[:, :, 32:])


def test_nf4_takes_as_much_memory_as_its_codes_and_statistics() -> None:
    weights = pack_linear("up", nf4_linears([256], 512), 90, DEVICE_OF_TESTS)
    # A byte for two weights, one for each block, four for 256 blocks; eight for a row.
    assert weights.num_bytes == 256 * 256 + 256 * 8 + 4 * 8 + 8 * 256


def test_plain_absmaxes_and_those_beside_them_stay_float32() -> None:
    """Of checkpoints without double quantization, and of rows taken out of a matrix, as of experts stacked in one."""
    linears = [*nf4_linears([70], 192), *nf4_linears([30], 192, seed=7, is_nested=False)]
    weights = pack_linear("qkv", linears, 90, DEVICE_OF_TESTS)
    assert isinstance(weights, Nf4Linear)
    assert weights.nested is None
    x = inputs(3, 192, seed=1)
    expected = definition(x, linears)
    assert (product(x, linears).cpu() - expected).norm() <= 1e-6 * expected.norm()


def test_linears_whose_absmaxes_have_different_tables_keep_them_apart() -> None:
    linears = [Linear(random_nf4(40, 128, seed=tables, tables=tables)) for tables in range(2)]
    x = inputs(3, 128, seed=1)
    expected = definition(x, linears)
    assert (product(x, linears).cpu() - expected).norm() <= 1e-6 * expected.norm()


def test_flattened_absmaxes_are_the_same_values() -> None:
    linears, x = nf4_linears([70, 20], 192, biased=2), inputs(3, 192, seed=1)
    assert torch.equal(product(x, linears, flattens=True), product(x, linears))


def test_some_rows_of_a_matrix_are_its_own() -> None:
    """A matrix that files keep in one piece: its parts share its groups of absmaxes, or have plain ones."""
    whole = random_nf4(200, 192, seed=0)
    parts = [Linear(whole.select(range(*ends))) for ends in ((0, 70), (70, 100), (100, 200))]
    x = inputs(3, 192, seed=1)
    assert torch.equal(product(x, parts), product(x, [Linear(whole)]))


def test_dense_linears_beside_nf4_make_both_dense() -> None:
    dense = Linear(random(30, 128, seed=5), random(30, seed=6))
    linears = [*nf4_linears([40], 128), dense]
    weights = pack_linear("qkv", linears, 90, DEVICE_OF_TESTS)
    assert isinstance(weights, DenseLinear)
    x = inputs(3, 128, seed=1)
    assert torch.equal(product(x, linears)[:, :40], product(x, linears[:1]))
    expected = definition(x, linears)
    assert (product(x, linears).cpu() - expected).norm() <= 1e-6 * expected.norm()


def test_a_head_that_is_the_embedding_shares_its_memory() -> None:
    embedding = random(50, 64, seed=0).bfloat16().to(DEVICE)
    weights = pack_linear("lm_head", [Linear(embedding)], 90, DEVICE_OF_TESTS)
    assert isinstance(weights, DenseLinear)
    assert weights.weight.data_ptr() == embedding.data_ptr()


def test_linears_that_do_not_go_together_are_refused_by_name() -> None:
    first, second = nf4_linears([10, 10], 64)
    assert not isinstance(second.matrix, Tensor)
    other = Linear(replace(second.matrix, code=random(16, seed=9)))
    with pytest.raises(ModelError, match=r"layer 3, qkv: .* different tables of NF4 codes"):
        pack_linear("layer 3, qkv", [first, other], 90, DEVICE_OF_TESTS)
    with pytest.raises(ModelError, match=r"layer 3, qkv: .* \[64, 128\] inputs"):
        pack_linear("layer 3, qkv", [first, *nf4_linears([10], 128)], 90, DEVICE_OF_TESTS)


def test_a_workspace_has_room_for_the_largest_product() -> None:
    up, head = (
        pack_linear("up", nf4_linears([70], 1024), 90, DEVICE_OF_TESTS),
        pack_linear("lm_head", [Linear(random(90, 64, seed=0))], 90, DEVICE_OF_TESTS),
    )
    assert up.tiles.splits == 2
    sizes = {
        rows: tuple(part.numel() for part in (workspace.parts, workspace.weights))
        for rows in (8, 511, 512)
        for workspace in [LinearWorkspace.of([up, head], rows, DEVICE_OF_TESTS)]
    }
    # Split up to 128 rows; decoded first from 512.
    assert sizes == {8: (2 * 8 * 70, 0), 511: (2 * 128 * 70, 0), 512: (2 * 128 * 70, 70 * 1024)}
