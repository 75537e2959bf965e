"""Activations of every name, and the scaling of logits."""

from __future__ import annotations

from support.gpu.interpreter import DEVICE  # isort: skip

import pytest
import torch
from torch import Tensor

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.engine.backends.cuda.activations import activate, scale_logits
from manyhats.engine.model.architecture import FeedForward, Head
from manyhats.engine.model.forward import scaled_logits
from support.gpu.compiling import faults_of

VALUES = torch.cat(
    (
        torch.linspace(-25, 25, 700),
        torch.linspace(-0.5, 0.5, 300),
        torch.tensor([0.0, -0.0, 1e-6, -90.0, 90.0]),
    )
).view(3, -1)


def feed_forward(name: str, *, is_gated: bool) -> FeedForward:
    return FeedForward(1, name, is_gated)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found.double().cpu() - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_float64(name: str) -> None:
    out = poisoned(*VALUES.shape)
    activate(VALUES.to(DEVICE), feed_forward(name, is_gated=False), out)
    wanted = ACTIVATIONS[name](VALUES.double())
    assert_close(out, wanted)
    assert torch.allclose(out.double().cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_value_that_is_not_a_number_stays_so(name: str) -> None:
    x, out = torch.tensor([[1.0, torch.nan, 2.0]], device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    activate(x, feed_forward(name, is_gated=False), out)
    assert out.isnan().tolist() == [[False, True, False]]


def test_tanh_is_exact_to_a_few_bits_near_zero() -> None:
    x, out = torch.logspace(-12, 0, 200, device=DEVICE).view(1, -1), poisoned(1, 200)
    activate(x, feed_forward("tanh", is_gated=False), out)
    assert torch.allclose(out.double(), x.double().tanh(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_multiplies_the_other_half(dtype: torch.dtype) -> None:
    """Of rows wider than one program's share, in a matrix that is wider still."""
    wide = torch.randn(2, 2 * 1030 + 5, device=DEVICE).to(dtype)
    out, rounded = poisoned(2, 1030), poisoned(2, 1030, dtype=torch.bfloat16)
    x = wide[:, :2060]
    for y in (out, rounded):
        activate(x, feed_forward("silu", is_gated=True), y)
    gate, up = x.double().chunk(2, dim=1)
    assert_close(out, (ACTIVATIONS["silu"](gate) * up).cpu())
    assert torch.equal(rounded, out.bfloat16())


@pytest.mark.parametrize(
    "head",
    [
        Head(is_tied=True, size=1),
        Head(is_tied=True, size=1, divisor=13.0),
        Head(is_tied=True, size=1, softcap=30.0),
        Head(is_tied=True, size=1, divisor=0.125, softcap=30.0),
    ],
)
def test_logits_are_divided_and_capped(head: Head) -> None:
    logits = torch.randn(3, 1100, device=DEVICE) * 20
    wanted = scaled_logits(logits.double().cpu(), head)
    divided = logits / head.divisor
    scale_logits(logits, head)
    assert_close(logits, wanted)
    assert head.softcap is not None or torch.equal(logits, divided)


def test_activations_compile() -> None:
    assert faults_of("support.gpu.entries.activations") == []
