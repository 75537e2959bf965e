from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from manyhats.trainer.errors import CheckpointError, SettingError
from manyhats.trainer.run.optimizer import AdapterOptimizer, OptimizerState
from manyhats.trainer.settings.settings import OptimizationSettings
from support.fakes.training import FakeAdapter


def set_gradients(adapter: FakeAdapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def values_of(adapter: FakeAdapter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_each_parameter_moves_at_its_own_rate() -> None:
    adapter = FakeAdapter()
    before = values_of(adapter)
    optimizer = AdapterOptimizer(adapter, OptimizationSettings(max_grad_norm=0), 0.01)
    set_gradients(adapter, 1)
    optimizer.clip()
    optimizer.step(0.5)
    # Adam's first step moves every value by the learning rate, whatever the gradient's size.
    for name, rate in (("a", 0.005), ("b", 0.02)):
        moved = adapter.parameters[name].detach() - before[name]
        signs = adapter.parameters[name].grad.sign()  # type: ignore[union-attr]
        torch.testing.assert_close(moved, -rate * signs, rtol=1e-4, atol=1e-7)


def test_steps_are_adamw_by_the_book() -> None:
    adapter = FakeAdapter()
    settings = OptimizationSettings(max_grad_norm=0, weight_decay=0.1, beta1=0.8, beta2=0.95)
    optimizer = AdapterOptimizer(adapter, settings, 0.01)
    value = adapter.parameters["a"].detach().double()
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step, factor in enumerate((0.25, 1.0, 0.5), start=1):
        set_gradients(adapter, step)
        grad = adapter.parameters["a"].grad.double()  # type: ignore[union-attr]
        rate = 0.01 * factor
        mean = 0.8 * mean + 0.2 * grad
        square = 0.95 * square + 0.05 * grad**2
        update = (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        value = value * (1 - rate * 0.1) - rate * update
        optimizer.step(factor)
    torch.testing.assert_close(adapter.parameters["a"].detach().double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bound", "is_clipped"), [(1.0, True), (1e6, False), (0.0, False)])
def test_gradients_are_scaled_together_and_the_norm_is_that_before(bound: float, is_clipped: bool) -> None:
    adapter = FakeAdapter()
    set_gradients(adapter, 3)
    grads = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters.values()])  # type: ignore[union-attr]
    norm = AdapterOptimizer(adapter, OptimizationSettings(max_grad_norm=bound), 0.01).clip()
    assert norm == pytest.approx(float(grads.norm()), rel=1e-6)
    clipped = torch.cat([parameter.grad.flatten() for parameter in adapter.parameters.values()])  # type: ignore[union-attr]
    expected = grads * (bound / norm) if is_clipped else grads
    torch.testing.assert_close(clipped, expected, rtol=1e-4, atol=1e-6)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    ends = []
    for is_interrupted in (False, True):
        adapter = FakeAdapter()
        settings = OptimizationSettings()
        optimizer = AdapterOptimizer(adapter, settings, 0.01)
        for step in range(6):
            if is_interrupted and step == 3:
                state, values = optimizer.state(), values_of(adapter)
                adapter = FakeAdapter(seed=9)
                for name, parameter in adapter.parameters.items():
                    parameter.data.copy_(values[name])
                optimizer = AdapterOptimizer(adapter, settings, 0.01)
                optimizer.restore(state)
            set_gradients(adapter, step)
            optimizer.clip()
            optimizer.step(1.0)
        ends.append(values_of(adapter))
    assert_same(*ends)


def test_state_of_another_adapter_is_refused_by_name() -> None:
    optimizer = AdapterOptimizer(FakeAdapter(), OptimizationSettings(), 0.01)
    with pytest.raises(CheckpointError, match=r"another adapter: other\.weight"):
        optimizer.restore(OptimizerState({"other.weight/exp_avg": torch.zeros(1)}, {}))


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_are_refused_on_the_cpu(kind: Literal["adamw_8bit", "paged_adamw_8bit"]) -> None:
    with pytest.raises(SettingError, match=f"optimizer: {kind} needs a CUDA device") as raised:
        AdapterOptimizer(FakeAdapter(), OptimizationSettings(optimizer=kind), 0.01)
    assert raised.value.setting == "optimizer"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_on_cuda_are_restored(kind: Literal["adamw_8bit", "paged_adamw_8bit"]) -> None:
    ends = []
    for is_interrupted in (False, True):
        adapter = FakeAdapter()
        # Bitsandbytes keeps small tensors' states in 32 bits.
        adapter.parameters = {
            "a": torch.nn.Parameter(torch.ones(64, 128, device="cuda")),
            "b": torch.nn.Parameter(torch.ones(4, device="cuda")),
        }
        settings = OptimizationSettings(optimizer=kind)
        optimizer = AdapterOptimizer(adapter, settings, 0.01)
        for step in range(6):
            if is_interrupted and step == 3:
                state = optimizer.state()
                optimizer = AdapterOptimizer(adapter, settings, 0.01)
                optimizer.restore(state)
            generator = torch.Generator().manual_seed(step)
            for parameter in adapter.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()
            optimizer.clip()
            optimizer.step(1.0)
        ends.append(values_of(adapter))
    assert_same(*ends)
