"""The operations that some families need besides the common ones, against the reference and float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from manyhats.engine.backends.cpu import simd
from manyhats.engine.backends.cpu.backend import CpuBackend
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.errors import ModelError
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Sequence
from support.factories.architectures import make_architecture, make_attention
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.kernels import Operations, new_cache
from support.oracles.operations import ReferenceKernels

ONE_THREAD, TWO_THREADS, REFERENCE = Operations(1), Operations(2), ReferenceKernels()
load, store, tanh = simd.load, simd.store, simd.tanh


@njit
def hyperbolic_tangent(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, 8):
        store(out, i, tanh(load(x, i)))


def tanh_of(values: list[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float32)
    padded = np.zeros(-(-x.size // 8) * 8, dtype=np.float32)
    padded[: x.size] = x
    out = np.empty_like(padded)
    hyperbolic_tangent(padded, out)
    return out[: x.size]


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_tanh_is_within_two_units_in_the_last_place() -> None:
    numbers = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(-12, 12, 400_000),
            numbers.normal(size=200_000),
            10.0 ** numbers.uniform(-30, 1, 100_000),
        ]
    ).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error = np.abs(tanh_of(x).astype(np.float64) - exact) / ulp
    assert error.max() < 2.0


def test_tanh_at_its_ends_and_its_symmetry() -> None:
    assert tanh_of([0.0, np.inf, -np.inf, 100.0, -1e30]).tolist() == [0.0, 1.0, -1.0, 1.0, -1.0]
    assert np.isnan(tanh_of([np.nan, 1.0])).tolist() == [True, False]
    x = np.linspace(0, 10, 4001, dtype=np.float32)
    assert (tanh_of(-x) == -tanh_of(x)).all()
    assert (np.abs(tanh_of(10 * x)) <= 1).all()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), size=st.integers(8, 70), seed=st.integers(0, 99), limit=st.floats(0.5, 60))
def test_softcap_equals_float64_and_each_row_alone(rows: int, size: int, seed: int, limit: float) -> None:
    x = random(seed, rows, size, scale=20)
    together, slow = x.clone(), x.clone()
    TWO_THREADS.softcap(together, limit)
    REFERENCE.softcap(slow, limit)
    expected = limit * torch.tanh(x.double() / limit)
    torch.testing.assert_close(together.double(), expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(slow.double(), expected, atol=0, rtol=1e-6)
    for row in range(rows):
        alone = x[row : row + 1].clone()
        ONE_THREAD.softcap(alone, limit)
        assert torch.equal(alone[0], together[row])


def test_softcap_of_rows_shorter_than_a_vector_is_refused() -> None:
    with pytest.raises(ModelError, match="at least 8 values, not 7"):
        ONE_THREAD.softcap(torch.zeros(2, 7), 1.0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    size=st.sampled_from([16, 48, 64]),
    seed=st.integers(0, 99),
    scale=st.floats(0.1, 30),
)
def test_gelu_equals_float64_and_each_row_alone(rows: int, size: int, seed: int, scale: float) -> None:
    x = random(seed, rows, 2 * size, scale=scale)
    together = TWO_THREADS.gelu_tanh_mul(x)
    gate, up = x.double().chunk(2, dim=1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(together.double(), expected, atol=1e-6, rtol=2e-6)
    torch.testing.assert_close(REFERENCE.gelu_tanh_mul(x).double(), expected, atol=2e-5, rtol=2e-5)
    for row in range(rows):
        assert torch.equal(ONE_THREAD.gelu_tanh_mul(x[row : row + 1].contiguous())[0], together[row])


def test_gelu_of_extreme_values() -> None:
    gate = torch.tensor([[0.0, -0.0, 1e4, -1e4, 1e20, -1e20, 50.0, -50.0]]).repeat(1, 2)
    y = TWO_THREADS.gelu_tanh_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(y, gate.clamp(min=0))


@pytest.mark.parametrize("whole", [False, True])
def test_norms_of_queries_and_keys_leave_values_alone(whole: bool) -> None:
    heads, kv_heads, dim = 6, 2, 16
    sizes = (heads * dim, kv_heads * dim) if whole else (dim, dim)
    q_weight, k_weight = random(1, sizes[0]), random(2, sizes[1])
    qkv = random(3, 7, (heads + 2 * kv_heads) * dim, scale=3)
    results = []
    for kernels in (TWO_THREADS, REFERENCE):
        mine = qkv.clone()
        kernels.norm_queries_and_keys(mine, q_weight, k_weight, 1e-6, heads * dim, kv_heads * dim)
        results.append(mine)
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[0][:, 8 * dim :], qkv[:, 8 * dim :])
    first = qkv[0, : sizes[0]]
    torch.testing.assert_close(
        results[0][0, : sizes[0]], torch.nn.functional.rms_norm(first, (sizes[0],), q_weight, 1e-6)
    )
    for row in range(7):
        alone = qkv[row : row + 1].clone()
        ONE_THREAD.norm_queries_and_keys(alone, q_weight, k_weight, 1e-6, heads * dim, kv_heads * dim)
        assert torch.equal(alone[0], results[0][row])


ARCHITECTURE = make_architecture(make_attention(4, 2, 16, scale=0.3))


def batch_of(sequence: Sequence, start: int, count: int) -> Batch:
    return Batch.of(step_plan(Schedule((Chunk(sequence, start, count),)), 16))


def attend(kernels: Any, qkv: Tensor, cuts: list[int], window: int | None, cap: float | None) -> Tensor:
    """Attention of one sequence's rows, run in the chunks that ``cuts`` begin and end."""
    cache = new_cache(kernels, ARCHITECTURE, 4, 16, "float32")
    sequence = Sequence(id="0", token_ids=[0] * len(qkv), max_num_tokens=len(qkv))
    sequence.block_table = [2, 0, 3]
    parts = []
    for start, stop in pairwise(cuts):
        rows, batch = qkv[start:stop].clone(), batch_of(sequence, start, stop - start)
        nothing = torch.empty(stop - start, 0)
        kernels.rotate_and_store(rows, nothing, nothing, batch, cache, 0, 4)
        assert torch.equal(rows, qkv[start:stop])
        parts.append(kernels.attention(rows, batch, cache, 0, 4, 0.3, window, cap))
    return torch.cat(parts)


def capped_attention(qkv: Tensor, window: int | None, cap: float | None) -> Tensor:
    """The same in float64, without blocks."""
    heads = qkv.double().view(len(qkv), 8, 16)
    q, k, v = heads[:, :4], heads[:, 4:6].repeat_interleave(2, 1), heads[:, 6:].repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    ahead = torch.arange(len(qkv)).unsqueeze(1) - torch.arange(len(qkv))
    hidden = (ahead < 0) | (ahead >= (window or len(qkv)))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(len(qkv), -1)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("cap", [None, 2.0, 50.0])
def test_capped_attention_equals_float64_however_it_is_cut(cap: float | None, window: int | None) -> None:
    qkv = random(4, 40, 8 * 16, scale=1.5)
    expected = capped_attention(qkv, window, cap)
    whole = attend(TWO_THREADS, qkv, [0, 40], window, cap)
    torch.testing.assert_close(whole.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, attend(ONE_THREAD, qkv, [0, 1, 14, 15, 33, 39, 40], window, cap))
    slow = attend(REFERENCE, qkv, [0, 20, 40], window, cap)
    torch.testing.assert_close(slow.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_cap_that_bites_changes_the_result() -> None:
    qkv = random(5, 20, 8 * 16, scale=1.5)
    free, capped = (attend(ONE_THREAD, qkv, [0, 20], None, cap) for cap in (None, 1.0))
    assert (free - capped).abs().max() > 0.1


def test_an_activation_without_a_kernel_is_refused_by_name(tmp_path: Path) -> None:
    model = load_tiny(make_checkpoint(tmp_path / "tiny", "llama"))
    blocks = [
        replace(block, feed_forward=replace(block.feed_forward, activation="relu6"))
        for block in model.architecture.blocks
    ]
    with pytest.raises(ModelError, match="activation 'relu6'; they know gelu, gelu_pytorch_tanh, relu, silu"):
        CpuBackend(1).prepare(replace(model.architecture, blocks=tuple(blocks)), model.weights)
