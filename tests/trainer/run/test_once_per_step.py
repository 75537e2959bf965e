from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyhats.adapters.primitives import Affine, KVPrefix, LoweredAdapter, LowRank
from manyhats.adapters.sites import Site
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.run.gradients import LoweredOnce
from manyhats.trainer.settings.methods import (
    AdapterSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PTuningSettings,
)
from support.factories.trainables import move, tiny_base


def test_a_tensor_that_occurs_twice_gets_the_gradients_of_both_places() -> None:
    shared = torch.tensor([[1.0, 2.0]], requires_grad=True)
    made = shared * 3
    lowered = LoweredAdapter(
        "",
        (
            LowRank(Site(0, "q_proj"), made, torch.ones(2, 1), 1.0),
            LowRank(Site(1, "q_proj"), made, torch.ones(2, 1), 1.0),
        ),
    )
    once = LoweredOnce(lowered)
    first, second = once.adapter.deltas
    assert isinstance(first, LowRank)
    assert isinstance(second, LowRank)
    (first.a.sum() + 10 * second.a.sum()).backward()
    assert shared.grad is None, "nothing reaches the parameters before"
    once.backward()
    assert shared.grad is not None
    assert torch.equal(shared.grad, torch.tensor([[33.0, 33.0]]))


def test_constants_stay_as_they_are_and_what_no_batch_used_gets_nothing() -> None:
    scale = torch.ones(2)
    used = torch.ones(2, requires_grad=True)
    keys = torch.ones(1, 1, 1, 2, requires_grad=True)
    lowered = LoweredAdapter(
        "digest", (Affine(Site(0, "k_proj"), scale, used),), KVPrefix(keys, torch.zeros(1, 1, 1, 2), 0)
    )
    once = LoweredOnce(lowered)
    (delta,) = once.adapter.deltas
    assert isinstance(delta, Affine)
    assert delta.scale is scale
    assert once.adapter.digest == "digest"
    assert isinstance(once.adapter.prefix, KVPrefix)
    assert delta.offset is not None
    delta.offset.sum().backward()
    once.backward()
    assert torch.equal(used.grad, torch.ones(2))  # type: ignore[arg-type]
    assert keys.grad is None


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(rank=3, use_dora=True),
        Ia3Settings(),
        BottleneckSettings(),
        PrefixSettings(num_virtual_tokens=3, projection_size=5),
        PTuningSettings(num_virtual_tokens=3, encoder_size=5),
    ],
    ids=lambda settings: settings.method.value,
)
def test_gradients_are_those_of_the_lowered_adapter_itself(settings: AdapterSettings) -> None:
    def loss(lowered: LoweredAdapter) -> Tensor:
        tensors = [
            getattr(each, name)
            for each in (*lowered.deltas, lowered.prefix)
            for name in ("a", "b", "scale", "down", "up", "keys", "values", "embeddings")
            if isinstance(getattr(each, name, None), Tensor)
        ]
        assert tensors
        return torch.stack([tensor.sin().sum() for tensor in tensors]).sum()

    grads = []
    for is_once in (False, True):
        adapter = make_adapter(settings, "task", tiny_base("llama", "nf4").model, seed=0)
        move(adapter)
        if is_once:
            once = LoweredOnce(adapter.lowered())
            for _ in range(2):
                (loss(once.adapter) / 2).backward()
            once.backward()
        else:
            loss(adapter.lowered()).backward()
        grads.append({name: parameter.grad for name, parameter in adapter.parameters.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-6, atol=1e-7)
