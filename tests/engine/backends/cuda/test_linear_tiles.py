"""How products of linears are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhats.engine.backends.cuda.linears.tiles import (
    MEASURED,
    ROW_BUCKETS,
    LinearTiles,
    RowTiles,
    bucket_of,
    default_splits,
    tiles_for,
)

EIGHT_BILLION = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TILES = {bucket: RowTiles(16, 64, 4, 1) for bucket in ROW_BUCKETS}


@given(sm=st.sampled_from([80, 86, 89, 90, 120]), outputs=st.integers(1, 2**18), blocks=st.integers(1, 512))
def test_all_of_k_is_cut_into_equal_ranges_whatever_the_gpu(sm: int, outputs: int, blocks: int) -> None:
    tiles = tiles_for(sm, outputs, 64 * blocks)
    assert tiles.num_steps(64 * blocks) * tiles.splits * tiles.block_k == 64 * blocks
    assert (tiles.block_k, tiles.splits) == (64, default_splits(outputs, 64 * blocks))


def test_ranges_make_work_for_a_large_gpu_but_are_not_short() -> None:
    found = {name: default_splits(*shape) for name, shape in EIGHT_BILLION.items()}
    assert found == {"qkv": 4, "o": 4, "gate_up": 1, "down": 4}
    assert default_splits(128256, 4096) == 1
    assert default_splits(576, 1536) == 3
    assert default_splits(576, 576) == 1


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 16), (16, 16), (17, 32), (64, 64), (129, 256), (256, 256), (9999, 256)]
)
def test_the_bucket_of_a_number_of_rows_has_room_for_it(rows: int, bucket: int) -> None:
    assert bucket_of(rows) == bucket


def test_what_was_measured_goes_before_the_rule() -> None:
    measured = {(90, 4096, 4096): LinearTiles(128, 2, TILES, TILES)}
    assert tiles_for(90, 4096, 4096, measured).block_k == 128
    assert tiles_for(89, 4096, 4096, measured).block_k == 64
    assert tiles_for(90, 4096, 8192, measured).block_k == 64


def test_what_was_measured_fits_its_shape() -> None:
    for sm, outputs, inputs in MEASURED:
        tiles_for(sm, outputs, inputs)
    for block_k, splits in ((64, 3), (128, 3), (256, 1)):
        with pytest.raises(ValueError, match="320 inputs"):
            tiles_for(90, 64, 320, {(90, 64, 320): LinearTiles(block_k, splits, TILES, TILES)})


def test_tiles_that_kernels_cannot_have_are_refused() -> None:
    for rows, weights in ((8, 64), (48, 64), (16, 32)):
        with pytest.raises(ValueError, match="a power of two"):
            RowTiles(rows, weights, 4, 3)
    with pytest.raises(ValueError, match="steps of 96"):
        LinearTiles(96, 1, TILES, TILES)
    with pytest.raises(ValueError, match="tiles for each"):
        LinearTiles(64, 1, TILES, {16: TILES[16]})
    with pytest.raises(ValueError, match="the last ones not split"):
        LinearTiles(64, 1, TILES, {**TILES, 256: RowTiles(16, 64, 4, 3, is_split=True)})


def test_every_bucket_s_sums_are_kept_in_no_more_rows_than_it_has() -> None:
    tiles = tiles_for(90, 4096, 4096)
    assert [tiles.num_partial_rows(rows) for rows in (1, 100, 128, 129, 4096)] == [1, 100, 128, 128, 128]
    assert tiles_for(90, 28672, 4096).num_partial_rows(4096) == 0
