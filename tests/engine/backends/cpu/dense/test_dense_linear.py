"""Dense linears whose outputs are the lanes, against exact products of the inputs as they are rounded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.dense import instructions
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.packing import CpuLinear
from manyhats.engine.model.weights import Linear
from support.harnesses.linears import assert_rows_depend_on_themselves, assert_rows_keep_what_is_not_finite

KINDS = {"float32": col.FLOAT32_GROUPS, "widened": col.BFLOAT16_GROUPS, "pairs": col.BFLOAT16_PAIRS}
UNIT = {"float32": 1e-6, "widened": 1e-6, "pairs": 2e-6}


def kernels(num_threads: int, kind: str) -> CpuKernels:
    made = CpuKernels(num_threads)
    made.uses_pairs = kind == "pairs"
    return made


ONE_THREAD, TWO_THREADS = ({kind: kernels(num_threads, kind) for kind in KINDS} for num_threads in (1, 2))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_parts(kind: str, sizes: Sequence[int], k: int, seed: int, biased: int = 0) -> list[Linear]:
    """Linears of 16 · size outputs each; bit i of ``biased`` gives part i a bias."""
    parts = []
    for index, size in enumerate(sizes):
        weight = random(16 * size, k, seed=seed + index) * 0.1
        bias = random(16 * size, seed=seed + 10 + index) if biased >> index & 1 else None
        parts.append(Linear(weight if kind == "float32" else weight.bfloat16(), bias))
    return parts


def definition(kind: str, x: Tensor, parts: Sequence[Linear]) -> tuple[Tensor, Tensor]:
    """y, and the sum of its terms' sizes, in float64."""
    x = (x.bfloat16() if kind == "pairs" else x).double()
    weights = [part.matrix.double() for part in parts if isinstance(part.matrix, Tensor)]
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
    w, b = torch.cat(weights), torch.cat(biases).double()
    return x @ w.T + b, x.abs() @ w.abs().T + b.abs()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 37),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    multiple=st.integers(1, 9),
    seed=st.integers(0, 2**16),
    biased=st.integers(0, 7),
)
def test_equals_its_definition(
    kind: str, rows: int, sizes: list[int], multiple: int, seed: int, biased: int
) -> None:
    parts = make_parts(kind, sizes, 16 * multiple, seed, biased)
    x = random(rows, 16 * multiple, seed=seed + 5)
    packed = TWO_THREADS[kind].pack(parts)
    assert packed.kind == KINDS[kind]
    assert (packed.in_features, packed.out_features) == (16 * multiple, 16 * sum(sizes))
    y = TWO_THREADS[kind].linear(x, packed)
    exact, size = definition(kind, x, parts)
    assert y.shape == exact.shape
    assert bool(((y - exact).abs() <= UNIT[kind] * size + 1e-30).all())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 21),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_row_is_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    kind: str, rows: int, sizes: list[int], seed: int, data: st.DataObject
) -> None:
    packed = TWO_THREADS[kind].pack(make_parts(kind, sizes, 192, seed, biased=5))
    x = random(rows, 192, seed=seed + 1)
    some = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    assert_rows_depend_on_themselves((ONE_THREAD[kind], TWO_THREADS[kind]), packed, x, some)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_not_finite_reaches_another_row(kind: str) -> None:
    packed = TWO_THREADS[kind].pack(make_parts(kind, [5], 128, seed=7))
    assert_rows_keep_what_is_not_finite(TWO_THREADS[kind], packed, random(9, 128), nan_row=2, inf_row=7)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_the_memory_of_its_weights(kind: str) -> None:
    parts = make_parts(kind, [36, 12, 12], 576, seed=8)
    assert ONE_THREAD[kind].pack(parts).num_bytes == (4 if kind == "float32" else 2) * 960 * 576


def test_pairs_are_near_the_product_in_float32() -> None:
    x, parts = random(40, 1536), make_parts("pairs", [24], 1536, seed=3)
    exact, _ = definition("widened", x, parts)
    near = TWO_THREADS["pairs"].linear(x, TWO_THREADS["pairs"].pack(parts)).double()
    assert bool((torch.cosine_similarity(near, exact) > 0.9999).all())


@pytest.mark.parametrize(
    "parts",
    [
        [Linear(random(40, 64), None)],
        [*make_parts("float32", [1], 64, 0), *make_parts("pairs", [1], 64, 0)],
    ],
    ids=["outputs that do not fill the lanes", "two dtypes"],
)
def test_others_run_as_before(parts: list[Linear]) -> None:
    packed, x = TWO_THREADS["pairs"].pack(parts), random(9, 64)
    assert isinstance(packed, CpuLinear)
    assert packed.kind == col.FLOAT32
    exact, _ = definition("float32", x, parts)
    torch.testing.assert_close(TWO_THREADS["pairs"].linear(x, packed), exact.float())


OTHER_PROCESSORS = """
import sys
from manyhats.engine.backends.cpu import simd

simd.has_feature = lambda name, known=simd.has_feature: known(name) and not name.startswith(sys.argv[1])
import test_dense_linear as tests

assert not tests.instructions.has_pairs()
for kind in tests.KINDS:
    parts, x = tests.make_parts(kind, [2, 5], 192, 0, biased=1), tests.random(9, 192)
    packed = tests.TWO_THREADS[kind].pack(parts)
    y = tests.TWO_THREADS[kind].linear(x, packed)
    exact, size = tests.definition(kind, x, parts)
    assert bool(((y - exact).abs() <= tests.UNIT[kind] * size).all()), kind
    tests.assert_rows_depend_on_themselves([tests.TWO_THREADS[kind]], packed, x, [3, 1])
"""


@pytest.mark.slow  # compiles all kernels anew; test_instructions.py runs those of the default model
@pytest.mark.skipif(not instructions.has_pairs(), reason="all tests run without the instructions here")
@pytest.mark.parametrize("hidden", ["avx512bf16", "avx512"])
def test_a_processor_without_the_instructions_gets_the_same_products(tmp_path: Path, hidden: str) -> None:
    # Another process, with kernels of its own: Numba would find those of this processor otherwise.
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((*sys.path, str(Path(__file__).parent))),
    }
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSORS, hidden],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
