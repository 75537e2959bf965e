from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu import wide
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.errors import ModelError
from manyhats.engine.model.nf4 import Nf4Weight, quantize_nf4
from manyhats.engine.model.weights import Linear, Matrix
from support.harnesses.linears import assert_rows_depend_on_themselves, assert_rows_keep_what_is_not_finite
from support.oracles.operations import ReferenceKernels

KINDS = ("nf4", "bfloat16", "float32")
ONE_THREAD, TWO_THREADS = CpuKernels(1), CpuKernels(2)


def make_parts(kind: str, sizes: list[int], k: int, seed: int, biased: int = 0) -> list[Linear]:
    """Linears over ``k`` inputs; bit i of ``biased`` gives part i a bias."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index, size in enumerate(sizes):
        dense = torch.randn(size, k, generator=generator) * 0.1
        weight: Matrix = dense.bfloat16() if kind != "float32" else dense
        if kind == "nf4":
            weight = quantize_nf4(dense.bfloat16())
        bias = torch.randn(size, generator=generator) if biased >> index & 1 else None
        parts.append(Linear(weight, bias.bfloat16() if bias is not None and kind == "bfloat16" else bias))
    return parts


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 37),
    sizes=st.lists(st.integers(1, 75), min_size=1, max_size=3),
    multiple=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    biased=st.integers(0, 7),
)
def test_equals_the_reference(
    kind: str, rows: int, sizes: list[int], multiple: int, seed: int, biased: int
) -> None:
    k = multiple * (64 if kind == "nf4" else 16)
    parts = make_parts(kind, sizes, k, seed, biased)
    x = random(rows, k, seed=seed + 1)
    packed, oracle = TWO_THREADS.pack(parts), ReferenceKernels().pack(parts)
    assert packed.out_features == oracle.out_features == sum(sizes)
    y = TWO_THREADS.linear(x, packed)
    exact = x.double() @ oracle.weight.double().T + oracle.bias.double()
    bound = x.double().abs() @ oracle.weight.double().abs().T + oracle.bias.double().abs()
    assert y.shape == exact.shape
    assert bool(((y - exact).abs() <= 1e-6 * bound + 1e-30).all())
    if rows:
        torch.testing.assert_close(y, ReferenceKernels().linear(x, oracle), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 21),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_row_is_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    kind: str, rows: int, sizes: list[int], seed: int, data: st.DataObject
) -> None:
    packed = TWO_THREADS.pack(make_parts(kind, sizes, 192, seed, biased=5))
    x = random(rows, 192, seed=seed + 1)
    some = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    assert_rows_depend_on_themselves((ONE_THREAD, TWO_THREADS), packed, x, some)


@pytest.mark.parametrize("shape", [(5, 64), (130, 192), (300, 128)])
def test_nf4_weights_are_decoded_to_the_very_bits_of_bitsandbytes(shape: tuple[int, int]) -> None:
    parts = make_parts("nf4", [shape[0], 7], shape[1], seed=3)
    packed = TWO_THREADS.pack(parts)
    one_at_a_time = torch.eye(shape[1])
    decoded = TWO_THREADS.linear(one_at_a_time, packed).T
    weights = [part.matrix.dequantize() for part in parts if isinstance(part.matrix, Nf4Weight)]
    assert torch.equal(decoded, torch.cat(weights))


def test_nf4_keeps_each_part_s_own_second_level_statistics() -> None:
    """Parts whose blocks don't fill a group of 256, of very different sizes."""
    small, large = make_parts("nf4", [3, 3], 64, seed=4)
    loud = Linear(quantize_nf4(random(90, 64, seed=5).bfloat16() * 100), None)
    parts = [small, loud, large]
    decoded = ONE_THREAD.linear(torch.eye(64), ONE_THREAD.pack(parts)).T
    assert torch.equal(decoded, ReferenceKernels().pack(parts).weight)


def test_a_wide_linear_takes_several_panels() -> None:
    parts = make_parts("bfloat16", [50], 8192, seed=6)
    weight = parts[0].matrix
    assert isinstance(weight, Tensor)
    packed = TWO_THREADS.pack(parts)
    assert isinstance(packed, CpuLinear)
    assert packed.panel_rows < 50
    x = random(5, 8192)
    torch.testing.assert_close(TWO_THREADS.linear(x, packed), x @ weight.float().T, atol=1e-3, rtol=1e-4)


def test_nothing_that_is_not_finite_reaches_another_row() -> None:
    packed = TWO_THREADS.pack(make_parts("nf4", [40], 128, seed=7))
    x = random(9, 128)
    assert_rows_keep_what_is_not_finite(TWO_THREADS, packed, x, nan_row=2, inf_row=7)


def test_nf4_takes_little_more_than_half_a_byte_per_parameter() -> None:
    parts = make_parts("nf4", [576, 192, 192], 576, seed=8)
    assert ONE_THREAD.pack(parts).num_bytes <= 0.54 * 960 * 576


def test_a_dense_head_is_read_in_place() -> None:
    """One that is tied must not take the embedding's memory twice."""
    weight = random(32, 64).bfloat16()
    packed, _ = ONE_THREAD.pack_head(Linear(weight, None))
    x = random(3, 64)
    before = ONE_THREAD.linear(x, packed)
    weight.mul_(2)
    assert torch.equal(ONE_THREAD.linear(x, packed), 2 * before)


def test_widths_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(ModelError, match="multiple of 16"):
        ONE_THREAD.pack(make_parts("float32", [4], 56, 0))


EIGHT_LANES = """
from manyhats.engine.backends.cpu import simd

simd.has_feature = lambda name, known=simd.has_feature: name != "avx512f" and known(name)
from manyhats.engine.backends.cpu import wide

assert wide.LANES == 8
import test_kernels_linear as tests

for kind in tests.KINDS:
    packed = tests.TWO_THREADS.pack(tests.make_parts(kind, [5, 70], 192, 0, biased=1))
    oracle = tests.ReferenceKernels().pack(tests.make_parts(kind, [5, 70], 192, 0, biased=1))
    x = tests.random(9, 192)
    y = tests.TWO_THREADS.linear(x, packed)
    tests.torch.testing.assert_close(y, tests.ReferenceKernels().linear(x, oracle), atol=1e-4, rtol=1e-4)
    for row in range(9):
        assert tests.torch.equal(y[row : row + 1], tests.TWO_THREADS.linear(x[row : row + 1], packed)), (kind, row)
"""


@pytest.mark.slow  # compiles all kernels anew
@pytest.mark.skipif(wide.LANES == 8, reason="this processor has eight lanes, and all tests run with them")
def test_a_processor_without_avx512_gets_the_same_products(tmp_path: Path) -> None:
    # Another process, with kernels of its own: Numba would find those of this processor otherwise.
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[3]))),
    }
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_LANES], env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
