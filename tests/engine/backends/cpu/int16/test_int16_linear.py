"""NF4 linears in 16-bit integers, against their definition, and against exact products."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu.int16.instructions import INPUT_STEPS
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CODE_STEPS, CpuLinear
from manyhats.engine.model.nf4 import BLOCK_SIZE, Nf4Weight, quantize_nf4, unpacked
from manyhats.engine.model.weights import Linear
from support.harnesses.linears import assert_rows_depend_on_themselves, assert_rows_keep_what_is_not_finite


def kernels(num_threads: int) -> CpuKernels:
    made = CpuKernels(num_threads, is_exact=False)
    made.uses_int16 = True
    return made


ONE_THREAD, TWO_THREADS = kernels(1), kernels(2)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_parts(sizes: Sequence[int], k: int, seed: int, biased: int = 0, nested: bool = True) -> list[Linear]:
    """NF4 linears of 16 · size outputs each; bit i of ``biased`` gives part i a bias."""
    parts = []
    for index, size in enumerate(sizes):
        weight = quantize_nf4((random(16 * size, k, seed=seed + index) * 0.1).bfloat16())
        if not nested:
            weight = Nf4Weight(
                weight.packed,
                weight.block_scales(),
                torch.empty(0),
                0.0,
                weight.code,
                torch.empty(0),
                weight.shape,
            )
        bias = random(16 * size, seed=seed + 10 + index) if biased >> index & 1 else None
        parts.append(Linear(weight, bias))
    return parts


def quantized(x: Tensor) -> Tensor:
    """Each block of 64 inputs as whole steps of its largest, in float64."""
    blocks = x.view(x.shape[0], x.shape[1] // BLOCK_SIZE, BLOCK_SIZE)
    steps = blocks.abs().amax(2, keepdim=True).clamp(min=1e-30) / INPUT_STEPS
    # The kernel rounds the product once, to an integer.
    return ((blocks.double() * (1 / steps).double()).round() * steps.double()).view(x.shape)


def definition(x: Tensor, parts: Sequence[Linear], *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """y, and the sum of its terms' sizes, in float64: inputs and NF4's values in steps unless exact; scales exact."""
    weights, biases = [], []
    for part in parts:
        assert isinstance(part.matrix, Nf4Weight)
        code = part.matrix.code.double()
        code = code if exact else (code * CODE_STEPS).round() / CODE_STEPS
        values = code[unpacked(part.matrix.packed, torch.arange(16.0)).long()].view(-1, BLOCK_SIZE)
        weights.append((values * part.matrix.block_scales().double()[:, None]).view(part.matrix.shape))
        biases.append(torch.zeros(part.out_features) if part.bias is None else part.bias)
    x, w, b = x.double() if exact else quantized(x), torch.cat(weights), torch.cat(biases).double()
    return x @ w.T + b, x.abs() @ w.abs().T + b.abs()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 37),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    multiple=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    biased=st.integers(0, 7),
    nested=st.booleans(),
)
def test_equals_its_definition(
    rows: int, sizes: list[int], multiple: int, seed: int, biased: int, nested: bool
) -> None:
    parts = make_parts(sizes, 64 * multiple, seed, biased, nested)
    x = random(rows, 64 * multiple, seed=seed + 1)
    packed = TWO_THREADS.pack(parts)
    assert packed.takes_int16
    y = TWO_THREADS.linear(x, packed)
    expected, size_of_terms = definition(x, parts)
    assert y.shape == expected.shape
    assert bool(((y - expected).abs() <= 2**-15 * size_of_terms + 1e-30).all())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 37),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_row_is_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    rows: int, sizes: list[int], seed: int, data: st.DataObject
) -> None:
    packed = TWO_THREADS.pack(make_parts(sizes, 192, seed, biased=5))
    x = random(rows, 192, seed=seed + 1)
    some = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    assert_rows_depend_on_themselves((ONE_THREAD, TWO_THREADS), packed, x, some)


def test_inputs_of_very_different_sizes_keep_thirteen_bits_in_their_blocks() -> None:
    """Against the exact product: what a few large inputs cost the others is a small part of what those add."""
    parts = make_parts([4], 512, seed=9)
    x = random(20, 512)
    x[:, 100] *= 1000
    x[3] *= 1e20
    x[4] *= 1e-20
    x[5, 64:128] = 0
    y = TWO_THREADS.linear(x, TWO_THREADS.pack(parts)).double()
    expected, _ = definition(x, parts, exact=True)
    error = (y - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 5e-4


def test_codes_are_decoded_each_with_the_scale_of_its_block() -> None:
    """Blocks of very different sizes, in one row and in one matrix, and one of zeros."""
    dense = random(32, 192, seed=3)
    dense[3] *= 1e4
    dense[5, :64] *= 1e-3
    dense[7, 64:128] = 0
    parts = [Linear(quantize_nf4(dense.bfloat16()), None)]
    decoded = TWO_THREADS.linear(torch.eye(192), TWO_THREADS.pack(parts)).T.double()
    weights, _ = definition(torch.eye(192), parts)
    largest_of_row = weights.abs().amax(0)[:, None]
    assert bool(((decoded - weights.T).abs() <= 2**-15 * largest_of_row).all())


def test_nothing_that_is_not_finite_reaches_another_row() -> None:
    packed = TWO_THREADS.pack(make_parts([5], 128, seed=7))
    x = random(13, 128)
    assert_rows_keep_what_is_not_finite(TWO_THREADS, packed, x, nan_row=2, inf_row=12)


@pytest.mark.parametrize("sizes", [[36, 12, 12], [36], [192]])
def test_nf4_takes_little_more_than_half_a_byte_per_parameter(sizes: list[int]) -> None:
    assert ONE_THREAD.pack(make_parts(sizes, 576, seed=8)).num_bytes <= 0.54 * 16 * sum(sizes) * 576


def test_linears_that_it_cannot_lay_out_are_run_exactly() -> None:
    odd = [Linear(quantize_nf4(random(24, 64).bfloat16()), None)]
    dense = [Linear(random(32, 64).bfloat16(), None)]
    for parts in (odd, dense, [*odd, *make_parts([1], 64, seed=1)]):
        packed = TWO_THREADS.pack(parts)
        assert isinstance(packed, CpuLinear)
        assert not packed.takes_int16
        x = random(3, 64)
        assert torch.equal(TWO_THREADS.linear(x, packed), CpuKernels(2).linear(x, packed))
