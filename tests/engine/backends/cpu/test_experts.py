"""The instructions of a mixture of experts against a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.experts import words_of_pairs, words_of_routes
from manyhats.engine.backends.cpu.int16 import instructions
from manyhats.engine.backends.cpu.kernels import CpuKernels
from manyhats.engine.backends.cpu.program import Program
from manyhats.engine.model.architecture import Experts
from manyhats.engine.model.forward import routed
from manyhats.engine.model.nf4 import quantize_nf4
from manyhats.engine.model.weights import Linear

D_IN, D_OUT = 64, 48
ROUTER_LOGITS, ROUTES, PAIRS, X, CONVERTED, PAIRED, OUTPUTS, TOTAL = range(8)


def run(kernels: CpuKernels, logits: Tensor, experts: Experts, x: Tensor, linears: list[Linear]) -> Tensor:
    """Each row's experts' linears of it, weighed: [N, d_in] → [N, d_out]."""
    num_rows, count = len(x), experts.num_per_row
    packed = [kernels.pack([linear]) for linear in linears]
    program, source, words = Program(), X, packed[0].converted_size or D_IN
    program.route(ROUTER_LOGITS, ROUTES, logits.shape[1], experts)
    num_used = program.pair(ROUTES, PAIRS, experts)
    if packed[0].converted_size:
        program.convert(X, CONVERTED, packed[0])
        source = CONVERTED
    program.spread(source, PAIRED, words, PAIRS, experts)
    program.expert_linear(PAIRED, OUTPUTS, packed, PAIRS, num_used)
    program.combine(OUTPUTS, TOTAL, D_OUT, ROUTES, experts)
    sizes = {
        ROUTES: words_of_routes(count),
        PAIRS: words_of_pairs(experts.num, count),
        CONVERTED: words,
        PAIRED: count * words,
        OUTPUTS: count * D_OUT,
        TOTAL: D_OUT,
    }
    buffers = [logits.clone(), *(torch.empty(0),) * 2, x.clone(), *(torch.empty(0),) * 4]
    for buffer, size in sizes.items():
        buffers[buffer] = torch.full((num_rows, size), torch.nan)
    frame = np.zeros(col.FRAME_SIZE, dtype=np.int64)
    frame[col.NUM_ROWS], frame[col.NUM_PAIRS] = num_rows, num_rows * count
    kernels.run(program.arrays(), frame, buffers, None, program.num_scratch_values)
    return buffers[TOTAL]


def reference(logits: Tensor, experts: Experts, x: Tensor, linears: list[Linear]) -> Tensor:
    """The same row by row, in float64."""
    total = torch.zeros(len(x), D_OUT, dtype=torch.float64)
    for row, (own, values) in enumerate(zip(logits.tolist(), x.double(), strict=True)):
        best = sorted(range(experts.num), key=lambda e: (-own[e], e))[: experts.num_per_row]
        powers = torch.tensor(own, dtype=torch.float64).softmax(0)
        among = sum(float(powers[e]) for e in best) if experts.renormalizes else 1.0
        for expert in sorted(best):
            matrix = linears[expert].matrix
            dense = matrix if isinstance(matrix, Tensor) else matrix.dequantize()
            total[row] += float(powers[expert]) / among * (dense.double() @ values)
    return total


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linears_of(num: int, kind: str) -> list[Linear]:
    matrices = [normal(seed, D_OUT, D_IN) / 8 for seed in range(num)]
    return [Linear(matrix if kind == "dense" else quantize_nf4(matrix)) for matrix in matrices]


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Experts, Tensor]:
    """A mixture, and logits of some rows, many of them equal."""
    num = draw(st.integers(1, 11))
    experts = Experts(num, draw(st.integers(1, num)), draw(st.booleans()))
    num_rows, seed = draw(st.integers(0, 40)), draw(st.integers(0, 2**16))
    logits = normal(seed, num_rows, num)
    return experts, logits if draw(st.booleans()) else logits.round()


@pytest.mark.parametrize("kind", ["dense", "nf4", "int16"])
def test_rows_get_the_weighted_sum_of_their_experts_and_the_same_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "has_instructions", lambda: True)
    kernels = {count: CpuKernels(count, is_exact=kind != "int16") for count in (1, 2, 3)}

    @settings(max_examples=40, deadline=None)
    @given(mixture=mixtures(), num_threads=st.sampled_from([2, 3]))
    def check(mixture: tuple[Experts, Tensor], num_threads: int) -> None:
        experts, logits = mixture
        x, linears = normal(5, len(logits), D_IN), linears_of(experts.num, kind)
        found = run(kernels[num_threads], logits, experts, x, linears)
        expected = reference(logits, experts, x, linears)
        tolerance = 0.02 if kind == "int16" else 1e-5
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
        for row in range(0, len(x), 7):
            alone = run(kernels[1], logits[row : row + 1], experts, x[row : row + 1], linears)
            assert torch.equal(alone[0], found[row])

    check()


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures())
def test_the_forward_in_torch_sends_rows_to_the_same_experts(mixture: tuple[Experts, Tensor]) -> None:
    experts, logits = mixture
    chosen, shares = routed(logits, experts)
    for own, of_row, weights in zip(logits.tolist(), chosen.tolist(), shares, strict=True):
        best = sorted(range(experts.num), key=lambda e: (-own[e], e))[: experts.num_per_row]
        assert of_row == sorted(best)
        powers = torch.tensor(own).softmax(0)[of_row]
        torch.testing.assert_close(weights, powers / powers.sum() if experts.renormalizes else powers)


def test_rows_that_are_not_finite_leave_the_others_as_they_are() -> None:
    kernels, experts = CpuKernels(2), Experts(5, 3, renormalizes=True)
    logits, x, linears = normal(1, 6, 5), normal(2, 6, D_IN), linears_of(5, "dense")
    expected = run(kernels, logits, experts, x, linears)
    for row, value in ((0, torch.nan), (2, torch.inf), (4, -torch.inf)):
        logits[row] = value
    found = run(kernels, logits, experts, x, linears)
    assert torch.equal(found[1::2], expected[1::2])
    assert not found[0::2].isfinite().any()
