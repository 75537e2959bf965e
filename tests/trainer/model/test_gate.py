from __future__ import annotations

import pytest
import torch

from manyhats.adapters.activations import ACTIVATIONS
from manyhats.trainer.model.maths import gated


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_gates_as_autograd_has_it_and_leaves_its_input(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(9, 2 * 37, generator=generator) * 3).requires_grad_()
    before = gate_up.detach().clone()
    grad = torch.randn(9, 37, generator=generator)
    product = gated(gate_up, name)
    product.backward(grad)
    gate, up = before.clone().requires_grad_().chunk(2, dim=1)
    expected = ACTIVATIONS[name](gate) * up
    torch.testing.assert_close(product, expected)
    d_gate, d_up = torch.autograd.grad(expected, (gate, up), grad)
    torch.testing.assert_close(gate_up.grad, torch.cat((d_gate, d_up), dim=1))
    assert torch.equal(gate_up, before)
