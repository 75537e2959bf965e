from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from manyhats.engine.backends.cpu import simd
from manyhats.engine.backends.cpu.packing import interleave_nibbles

load, store, exp, decode_nf4 = simd.load, simd.store, simd.exp, simd.decode_nf4
store_apart, sum_lanes, max_lanes = simd.store_apart, simd.sum_lanes, simd.max_lanes


@njit
def exponential(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store(out, i, exp(load(x, i)))


@njit
def power_of_two(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store(out, i, simd.exp2(load(x, i)))


@njit
def error_function(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store(out, i, simd.erf(load(x, i)))


@njit
def copy(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store(out, i, load(x, i))


@njit
def copy_lane_by_lane(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store_apart(out, i, 1, load(x, i))


@njit
def over_lanes(x):  # type: ignore[no-untyped-def]
    value = load(x, 0)
    return sum_lanes(value), max_lanes(value)


def e_to_the(values: list[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float32)
    padded = np.zeros(-(-x.size // 8) * 8, dtype=np.float32)
    padded[: x.size] = x
    out = np.empty_like(padded)
    exponential(padded, out)
    return out[: x.size]


def to_bfloat16(values: np.ndarray, copier: Callable[..., Any] = copy) -> torch.Tensor:
    out = np.empty(values.size, dtype=np.uint16)
    copier(values, out)
    return torch.from_numpy(out).view(torch.bfloat16)


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-87.3, 88.0, 400_000), random.normal(size=200_000)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    error = np.abs(e_to_the(x).astype(np.float64) - exact) / ulp
    assert error.max() < 1.0


def test_exp_at_its_ends() -> None:
    assert e_to_the([0.0, -0.0]).tolist() == [1.0, 1.0]
    assert e_to_the([-np.inf, -88.0, -1e30]).tolist() == [0.0, 0.0, 0.0]
    assert np.isnan(e_to_the([np.nan, 1.0])).tolist() == [True, False]
    assert np.isfinite(e_to_the([np.inf, 1e30, 100.0])).all()


def test_exp2_of_what_is_not_positive_is_within_two_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-126, 0, 400_000), -np.geomspace(1e-30, 1, 8_000)]).astype(np.float32)
    out = np.empty_like(x)
    power_of_two(x, out)
    exact = np.exp2(x.astype(np.float64))
    assert np.abs(out - exact).max() <= 2**-22
    assert (np.abs(out - exact) / exact).max() <= 2**-22


def test_exp2_at_its_ends() -> None:
    x = np.array([0.0, -0.0, -1.0, -126.0, -126.1, -1e30, -np.inf, np.nan], dtype=np.float32)
    out = np.empty_like(x)
    power_of_two(x, out)
    assert np.array_equal(out, [1, 1, 0.5, 2.0**-126, 0, 0, 0, np.nan], equal_nan=True)


def test_erf_is_within_1_1_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-6, 6, 200_001), np.geomspace(1e-30, 1, 4001), [0.0] * 6]).astype(
        np.float32
    )
    y = np.empty_like(x)
    error_function(x, y)
    expected = torch.special.erf(torch.from_numpy(x).double()).numpy()
    error = np.abs(y - expected)
    assert error.max() < 7e-8
    assert (error / np.spacing(np.maximum(np.abs(expected), 1e-30).astype(np.float32))).max() < 1.2


def test_erf_at_its_ends() -> None:
    x = np.array([-np.inf, -1e30, -4.0, -0.0, 0.0, 4.0, np.inf, np.nan], dtype=np.float32)
    y = np.empty_like(x)
    error_function(x, y)
    assert y[:7].tolist() == [-1.0, -1.0, y[2], 0.0, 0.0, y[5], 1.0]
    assert y[5] == pytest.approx(1.0, abs=1e-7)
    assert np.isnan(y[7])


def test_exp_never_decreases() -> None:
    assert (np.diff(e_to_the(np.linspace(-90, 90, 100_001, dtype=np.float32))) >= 0).all()


@pytest.mark.parametrize("copier", [copy, copy_lane_by_lane])
def test_bfloat16_is_rounded_as_torch_rounds_it(copier: Callable[..., Any]) -> None:
    random = np.random.default_rng(1)
    any_bits = random.integers(0, 2**32, 400_000, dtype=np.uint32)
    halfway = (random.integers(0, 2**16, 80_000, dtype=np.uint32) << 16) | 0x8000
    ends = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32)
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000] + [0] * 3, np.uint32)
    values = np.concatenate([any_bits, halfway, ends, nans]).view(np.float32)
    actual, expected = to_bfloat16(values, copier), torch.from_numpy(values).bfloat16()
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_every_bfloat16_is_widened_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(2**16, dtype=np.float32)
    copy(bits, out)
    expected = torch.from_numpy(bits).view(torch.bfloat16).float()
    assert np.array_equal(out, expected.numpy(), equal_nan=True)


def test_lanes_are_summed_by_halves() -> None:
    x = np.array([1e8, 1.0, -1e8, 1.0, 3.0, -1.0, 2.0, 0.5], dtype=np.float32)
    total, largest = over_lanes(x)
    four = x[:4] + x[4:]
    two = four[:2] + four[2:]
    assert total == two[0] + two[1]
    assert largest == np.float32(1e8)


@pytest.mark.parametrize("with_avx2", [True, False])
def test_all_nf4_codes_are_decoded_in_order(with_avx2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_avx2:
        monkeypatch.setattr(simd, "has_feature", lambda name: False)

    @njit
    def decode(packed, out):  # type: ignore[no-untyped-def]
        for group in range(packed.size // 16):
            values = decode_nf4(packed, group * 16)
            for i in range(4):
                store(out, group * 32 + i * 8, values[i])

    codes = np.random.default_rng(2).permutation(np.arange(4096) % 16).astype(np.uint8)
    packed = torch.from_numpy(codes[0::2] << 4 | codes[1::2])
    out = np.empty(codes.size, dtype=np.float32)
    decode(interleave_nibbles(packed), out)
    assert np.array_equal(out, simd.NF4_VALUES[codes])
