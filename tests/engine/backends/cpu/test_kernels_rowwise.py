from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.engine.backends.cpu.batch import Batch
from manyhats.engine.loop.plan import step_plan
from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.weights import NormWeight
from manyhats.engine.scheduling.schedule import Chunk, Schedule
from manyhats.engine.scheduling.sequence import Sequence
from support.factories.architectures import make_architecture, make_attention
from support.harnesses.kernels import Operations, new_cache
from support.oracles.operations import ReferenceKernels

ONE_THREAD, TWO_THREADS, REFERENCE = Operations(1), Operations(2), ReferenceKernels()
GENERATOR = torch.Generator().manual_seed(0)
sizes = st.integers(1, 20).map(lambda n: 16 * n)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 20), size=sizes, seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1.0, 1e6])
)
def test_norms_equal_the_reference(rows: int, size: int, seed: int, scale: float) -> None:
    x, delta, weight = random(seed, rows, size) * scale, random(seed + 1, rows, size), random(seed + 2, size)
    torch.testing.assert_close(TWO_THREADS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    residual, expected_residual = x.clone(), x.clone()
    actual = TWO_THREADS.add_rms_norm(residual, delta, weight, 1e-5)
    torch.testing.assert_close(actual, REFERENCE.add_rms_norm(expected_residual, delta, weight, 1e-5))
    assert torch.equal(residual, expected_residual)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 20), size=sizes, seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 1e6])
)
def test_layer_norms_equal_torch_s(rows: int, size: int, seed: int, scale: float) -> None:
    x, weight, bias = random(seed, rows, size) * scale + scale, random(seed + 1, size), random(seed + 2, size)
    for own in (bias, None):
        weights = NormWeight(weight, own)
        expected = torch.nn.functional.layer_norm(x.double(), (size,), weight.double(), _double(own), 1e-5)
        for kernels in (ONE_THREAD, TWO_THREADS):
            actual = kernels.norm(x, Norm(1e-5, kind="layer"), weights)
            torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
@pytest.mark.parametrize("is_gated", [True, False])
def test_activations_equal_torch_s(name: str, is_gated: bool) -> None:
    x = torch.linspace(-20, 20, 4 * 2 * 4096).view(4, -1)[:, torch.randperm(8192, generator=GENERATOR)]
    actual = TWO_THREADS.activate(name, x.contiguous(), is_gated)
    values = x.double()
    if is_gated:
        gate, up = values.chunk(2, dim=1)
        expected = ACTIVATIONS[name](gate) * up
    else:
        expected = ACTIVATIONS[name](values)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-6)
    for row in range(4):
        assert torch.equal(ONE_THREAD.activate(name, x[row : row + 1].contiguous(), is_gated)[0], actual[row])


def test_an_activation_keeps_what_is_not_a_number_where_it_is() -> None:
    x = random(0, 3, 64)
    x[1, 7] = torch.nan
    for name in ("silu", "gelu_pytorch_tanh", "gelu", "relu"):
        bad = TWO_THREADS.activate(name, x, is_gated=False).isnan()
        assert bad.nonzero().tolist() == [[1, 7]]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 20), size=sizes, seed=st.integers(0, 2**16), scale=st.sampled_from([0.01, 1.0, 30.0])
)
def test_silu_mul_equals_the_reference(rows: int, size: int, seed: int, scale: float) -> None:
    gate_up = random(seed, rows, 2 * size) * scale
    torch.testing.assert_close(
        TWO_THREADS.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), atol=1e-6, rtol=2e-6
    )


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), size=sizes, seed=st.integers(0, 2**16))
def test_a_row_is_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    rows: int, size: int, seed: int
) -> None:
    x, delta, weight = random(seed, rows, size), random(seed + 1, rows, size), random(seed + 2, size)
    gate_up = torch.cat((x, delta), dim=1)

    def results(kernels: Any, part: slice) -> tuple[Tensor, ...]:
        residual = x[part].clone()
        mixed = kernels.add_rms_norm(residual, delta[part].contiguous(), weight, 1e-6)
        return (
            kernels.rms_norm(x[part].contiguous(), weight, 1e-6),
            mixed,
            residual,
            kernels.silu_mul(gate_up[part].contiguous()),
        )

    whole = results(TWO_THREADS, slice(None))
    for row in range(rows):
        for kernels in (ONE_THREAD, TWO_THREADS):
            for alone, together in zip(results(kernels, slice(row, row + 1)), whole, strict=True):
                assert torch.equal(alone[0], together[row])


def test_silu_of_very_large_and_very_small_gates() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30]]).repeat(1, 2)
    y = TWO_THREADS.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    assert y[0, :2].abs().max() < 1e-6
    assert y[0, 3:5].tolist() == [0.0, 0.0]
    assert torch.equal(y[0, 5:8], gate[0, 5:8])
    assert torch.equal(y[0, :8], y[0, 8:])


def test_nothing_that_is_not_finite_reaches_another_row() -> None:
    x, weight = random(0, 6, 64), random(1, 64)
    expected = TWO_THREADS.rms_norm(x, weight, 1e-5)
    bad = x.clone()
    bad[3, 10] = torch.nan
    actual = TWO_THREADS.rms_norm(bad, weight, 1e-5)
    assert torch.equal(actual[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])
    assert actual[3].isnan().all()
    gated = TWO_THREADS.silu_mul(torch.cat((bad, x), dim=1))
    assert gated.isnan().sum() == 1


def batch_of(lengths: list[int]) -> Batch:
    chunks, block = [], 0
    for index, length in enumerate(lengths):
        sequence = Sequence(id=str(index), token_ids=[0] * length, max_num_tokens=length)
        sequence.block_table = list(range(block, block - (-length // 16)))
        block += -(-length // 16)
        chunks.append(Chunk(sequence, 0, length))
    return Batch.of(step_plan(Schedule(tuple(chunks)), 16))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2), ("int8", 5e-2)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 64), (48, 32), (96, 24), (16, 2)])
def test_rotation_equals_the_reference_and_each_row_alone(
    dtype: str, tolerance: float, head_dim: int, rotary_dim: int
) -> None:
    attention = make_attention(3, 1, head_dim, rotary_dim=rotary_dim)
    assert attention.rope is not None
    batch = batch_of([5, 20])
    qkv = random(0, 25, 5 * head_dim)
    angles = batch.positions.unsqueeze(1) * torch.tensor(attention.rope.inv_freq)
    cos, sin = angles.cos().float(), angles.sin().float()
    rotated, attended = [], []
    backends: list[Any] = [TWO_THREADS, ONE_THREAD, REFERENCE]
    for kernels in backends:
        cache = new_cache(kernels, make_architecture(attention), 4, 16, dtype)
        mine = qkv.clone()
        kernels.rotate_and_store(mine, cos, sin, batch, cache, 0, 3)
        rotated.append(mine[:, : 3 * head_dim])
        attended.append(kernels.attention(mine, batch, cache, 0, 3, 0.2, None))
    assert torch.equal(rotated[0], rotated[1])
    assert torch.equal(attended[0], attended[1])
    torch.testing.assert_close(rotated[0], rotated[2], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(attended[0], attended[2], atol=tolerance, rtol=1e-4)
    assert torch.equal(
        rotated[0].view(25, 3, head_dim)[..., rotary_dim:], qkv.view(25, 5, head_dim)[:, :3, rotary_dim:]
    )
