"""Norms of rows, and of sums."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import pytest
import torch
from torch import Tensor

from manyhats.engine.backends.cuda.norms import add_norm, norm
from manyhats.engine.model.architecture import Norm
from manyhats.engine.model.weights import NormWeight
from support.gpu.compiling import faults_of

KINDS = pytest.mark.parametrize(
    "spec", [Norm(1e-5), Norm(1e-2, kind="layer"), Norm(1e-5, kind="layer", has_bias=True)]
)
SIZES = pytest.mark.parametrize("size", [48, 64])


def weight_of(spec: Norm, size: int) -> NormWeight:
    weight = torch.randn(size, device=DEVICE)
    return NormWeight(weight, torch.randn(size, device=DEVICE) if spec.has_bias else None)


def exact(x: Tensor, spec: Norm, weight: NormWeight) -> Tensor:
    """In float64."""
    x = x.double()
    if spec.kind == "layer":
        x = x - x.mean(1, keepdim=True)
    y = x / torch.sqrt(x.square().mean(1, keepdim=True) + spec.eps) * weight.weight.double()
    return y if weight.bias is None else y + weight.bias.double()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found.double() - wanted).norm() <= 2e-6 * wanted.norm()


@KINDS
@SIZES
def test_norms_are_those_of_float64(spec: Norm, size: int) -> None:
    x, weight = torch.randn(5, size, device=DEVICE) * 3 + 1, weight_of(spec, size)
    out = poisoned(5, size)
    norm(x, spec, weight, out)
    assert_close(out, exact(x, spec, weight))


@KINDS
@SIZES
def test_a_sum_is_kept_and_normed(spec: Norm, size: int) -> None:
    stream, delta = torch.randn(3, size, device=DEVICE), torch.randn(3, size, device=DEVICE)
    weight, out, total = weight_of(spec, size), poisoned(3, size), stream + delta * 0.5
    add_norm(stream, delta, 0.5, spec, weight, out)
    assert torch.equal(stream, total)
    assert_close(out, exact(total, spec, weight))


@KINDS
def test_a_stream_that_is_normed_itself_keeps_the_norm_alone(spec: Norm) -> None:
    stream, delta = torch.randn(3, 24, device=DEVICE), torch.randn(3, 24, device=DEVICE)
    weight, total = weight_of(spec, 24), stream + delta
    add_norm(stream, delta, 1.0, spec, weight, stream)
    assert_close(stream, exact(total, spec, weight))


def test_results_are_rounded_to_what_the_next_linear_reads() -> None:
    spec, x = Norm(1e-5), torch.randn(4, 40, device=DEVICE)
    weight, exactly, rounded = weight_of(spec, 40), poisoned(4, 40), poisoned(4, 40, dtype=torch.bfloat16)
    norm(x, spec, weight, exactly)
    norm(x, spec, weight, rounded)
    assert torch.equal(rounded, exactly.bfloat16())


def test_rows_may_be_apart_and_in_bfloat16() -> None:
    """As parts of a wider matrix; what lies between is left alone."""
    spec, wide = Norm(1e-5), torch.randn(4, 50, device=DEVICE).bfloat16()
    weight, before, out = weight_of(spec, 20), wide.clone(), poisoned(4, 50)
    norm(wide[:, 7:27], spec, weight, out[:, 20:40])
    assert_close(out[:, 20:40], exact(wide[:, 7:27], spec, weight))
    assert torch.equal(wide, before)
    assert out[:, :20].isnan().all()
    assert out[:, 40:].isnan().all()


def test_a_row_has_the_same_bits_alone() -> None:
    spec, x, delta = (
        Norm(1e-5, kind="layer"),
        torch.randn(6, 33, device=DEVICE),
        torch.randn(6, 33, device=DEVICE),
    )
    weight, out, alone = weight_of(spec, 33), poisoned(6, 33), poisoned(1, 33)
    own = x[4:5].clone()
    add_norm(x, delta, 1.0, spec, weight, out)
    add_norm(own, delta[4:5], 1.0, spec, weight, alone)
    assert torch.equal(alone[0], out[4])


def test_a_row_that_is_not_finite_stays_so() -> None:
    x, spec = torch.ones(2, 8, device=DEVICE), Norm(1e-5)
    x[1, 3] = torch.nan
    out = poisoned(2, 8)
    norm(x, spec, weight_of(spec, 8), out)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_norms_compile() -> None:
    assert faults_of("support.gpu.entries.norms") == []
