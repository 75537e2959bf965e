"""Gradients go through the server's own lowering, to every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from manyhats.adapters.primitives import Affine, LoweredAdapter, LowRank
from manyhats.trainer.data.batch import TokenizedRow, collate
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.settings.methods import AdapterSettings, LoraSettings
from support.factories.trainables import ALL_CASES, BOTTLENECK_CASES, PEFT_CASES, move, tiny_base
from support.oracles.peft import make_peft

pytestmark = pytest.mark.filterwarnings("ignore")


def tensors_of(primitive: Any) -> Iterator[Tensor]:
    if isinstance(primitive, Tensor):
        yield primitive
    elif isinstance(primitive, tuple):
        for each in primitive:
            yield from tensors_of(each)
    elif is_dataclass(primitive):
        for field in fields(primitive):
            yield from tensors_of(getattr(primitive, field.name))


def any_loss(lowered: LoweredAdapter) -> Tensor:
    """Some function of every number of the primitives."""
    generator = torch.Generator().manual_seed(5)
    terms = [
        (tensor.float() * torch.randn(tensor.shape, generator=generator)).sin().sum()
        for tensor in tensors_of(lowered)
    ]
    return torch.stack(terms).sum()


GRADIENT_CASES = [
    *((family, name) for family in ("qwen2", "phi3", "granite") for name in PEFT_CASES),
    *((family, name) for family in ("llama", "qwen3") for name in BOTTLENECK_CASES),
]


@pytest.mark.parametrize(("family", "name"), GRADIENT_CASES)
def test_gradients_reach_every_parameter(family: str, name: str) -> None:
    adapter = make_adapter(ALL_CASES[name], "task", tiny_base(family).model, seed=0)
    move(adapter)
    any_loss(adapter.lowered()).backward()
    for parameter_name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_the_loss_of_a_batch_reaches_every_parameter(case: AdapterSettings) -> None:
    model = tiny_base().model
    decoder = TrainingDecoder(
        model, dtype=torch.float32, gradient_checkpointing=False, device=torch.device("cpu")
    )
    rows = [TokenizedRow((5, 9, 33, 70, 2), (False, False, True, True, True)) for _ in range(2)]
    adapter = make_adapter(case, "task", model, seed=0)
    move(adapter)
    decoder.loss(collate(rows, share_beginning=False), adapter.lowered()).backward()
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_gradients_are_those_of_the_numbers(case: AdapterSettings) -> None:
    """A step along the gradient changes the loss as the gradient says; DoRA's lengths apart, which are constants."""
    adapter = make_adapter(case, "task", tiny_base().model, seed=0)
    move(adapter)
    parameters = {
        name: parameter
        for name, parameter in adapter.parameters.items()
        if not (isinstance(case, LoraSettings) and case.use_dora and "magnitude" not in name)
    }
    loss = any_loss(adapter.lowered())
    loss.backward()
    slope = sum(float((p.grad**2).sum()) for p in parameters.values() if p.grad is not None)
    step = 1e-3 / slope
    with torch.no_grad():
        for sign in (1, -2):
            for parameter in parameters.values():
                parameter += sign * step * parameter.grad
            if sign == 1:
                above = any_loss(adapter.lowered())
        below = any_loss(adapter.lowered())
    assert float(above - below) / 2e-3 == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_of_dora_are_peft_s(use_rslora: bool) -> None:
    """On a linear with a bias."""
    base = tiny_base("qwen2")
    case = LoraSettings(
        rank=3, alpha=5, use_dora=True, use_rslora=use_rslora, target_modules=("layers.0.self_attn.q_proj",)
    )
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        use_rslora=use_rslora,
        target_modules=["layers.0.self_attn.q_proj"],
        task_type="CAUSAL_LM",
    )
    peft = make_peft(base.dense, config)
    theirs = {
        name.replace(".default.weight", "").replace(".default", ""): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    adapter = make_adapter(case, "task", base.model, seed=0)
    for name, parameter in adapter.parameters.items():
        parameter.data.copy_(theirs[name if name in theirs else name.removesuffix(".weight")].data)
    generator = torch.Generator().manual_seed(2)
    x, weights = (torch.randn(9, 64, generator=generator) for _ in range(2))

    expected = peft.base_model.model.model.layers[0].self_attn.q_proj(x)
    (expected * weights).sum().backward()
    affine, update = adapter.lowered().deltas
    assert isinstance(affine, Affine)
    assert isinstance(update, LowRank)
    assert affine.scale is not None
    assert affine.offset is not None
    y = base.dense.model.layers[0].self_attn.q_proj(x).detach() * affine.scale + affine.offset
    y = y + update.scale * (x @ update.a.T) @ update.b.T
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    (y * weights).sum().backward()
    for name, parameter in adapter.parameters.items():
        reference = theirs[name if name in theirs else name.removesuffix(".weight")].grad
        torch.testing.assert_close(parameter.grad, reference, atol=1e-5, rtol=1e-4)


def test_the_base_s_weights_collect_no_gradients() -> None:
    base = tiny_base("qwen2")
    adapter = make_adapter(ALL_CASES["dora"], "task", base.model, seed=0)
    any_loss(adapter.lowered()).backward()
    assert base.model.weights.embedding.grad is None
    for linear in base.model.weights.linears():
        assert not getattr(linear.matrix, "requires_grad", False)
