"""Compositions against PEFT: its ``add_weighted_adapter``, several active adapters, and a prefix over LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.lowering.composition import AdapterPart, compose
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.lowering.reader import read_adapter
from manyhats.adapters.primitives import LoweredAdapter
from support.factories.adapters import ALL_LINEARS, make_lora
from support.factories.prefixes import make_prefix, make_prompt, tiny_base, tiny_model
from support.oracles.primitives import logits_with

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 60, 17, 8, 41]])
FAMILIES = ("llama", "mistral", "qwen2")


def read_lowered(directory: Path, family: str) -> LoweredAdapter:
    base = tiny_base(family)
    with open_source(str(directory), [directory]) as source:
        return lower(read_adapter(source, base, AdapterLimits()).artifact, base)


def composed_of(directories: Sequence[Path], weights: Sequence[float], family: str) -> LoweredAdapter:
    parts = [
        AdapterPart(directory.name, read_lowered(directory, family), weight)
        for directory, weight in zip(directories, weights, strict=True)
    ]
    return compose(parts, AdapterLimits())


@torch.no_grad()
def peft_logits(peft: Any) -> Tensor:
    peft.train(False)
    logits: Tensor = peft(input_ids=TOKENS).logits
    return logits[0, -TOKENS.shape[1] :]


def load_loras(directories: Sequence[Path], family: str) -> Any:
    """A PEFT model with each directory as an adapter ``0``, ``1``, …."""
    peft = PeftModel.from_pretrained(tiny_model(family), str(directories[0]), adapter_name="0")
    for index, directory in enumerate(directories[1:], start=1):
        peft.load_adapter(str(directory), adapter_name=str(index))
    return peft


@settings(max_examples=8, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    weights=st.lists(st.floats(-1.5, 1.5).filter(lambda w: abs(w) > 0.05), min_size=3, max_size=3),
    sites=st.lists(st.sets(st.sampled_from(ALL_LINEARS), min_size=1, max_size=4), min_size=3, max_size=3),
    alpha=st.integers(1, 8),
)
def test_loras_of_several_ranks_sum_as_peft_concatenates_them(
    family: str,
    ranks: list[int],
    weights: list[float],
    sites: list[set[str]],
    alpha: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root, base = tmp_path_factory.mktemp("loras"), tiny_base(family)
    directories = [
        make_lora(root / str(i), base, rank=rank, alpha=alpha + i, sites=sites[i], seed=i)
        for i, rank in enumerate(ranks)
    ]
    used = weights[: len(ranks)]
    peft = load_loras(directories, family)
    names = [str(i) for i in range(len(ranks))]
    peft.add_weighted_adapter(names, used, "sum", combination_type="cat")
    peft.set_adapter("sum")
    expected = peft_logits(peft)
    actual = logits_with(tiny_model(family), composed_of(directories, used, family), TOKENS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_loras_with_weight_1_are_peft_s_with_all_of_them_active(family: str, tmp_path: Path) -> None:
    base = tiny_base(family)
    directories = [
        make_lora(tmp_path / f"lora{i}", base, rank=2 + i, alpha=4, seed=i, use_rslora=i == 1)
        for i in range(3)
    ]
    peft = load_loras(directories, family)
    peft.base_model.set_adapter(["0", "1", "2"])
    expected = peft_logits(peft)
    actual = logits_with(tiny_model(family), composed_of(directories, (1, 1, 1), family), TOKENS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [make_prefix, make_prompt])
@pytest.mark.parametrize("num_virtual", [1, 6])
def test_virtual_tokens_over_lora_are_peft_s_with_both_active(
    family: str, make: Any, num_virtual: int, tmp_path: Path
) -> None:
    base = tiny_base(family)
    lora = make_lora(tmp_path / "lora", base, rank=3, alpha=4)
    virtual = make(tmp_path / "virtual", base, num_virtual_tokens=num_virtual)
    # The model itself now holds LoRA's layers, and virtual tokens are put over it.
    with_lora: Any = PeftModel.from_pretrained(tiny_model(family), str(lora)).base_model.model
    del with_lora.peft_config
    expected = peft_logits(PeftModel.from_pretrained(with_lora, str(virtual)))
    actual = logits_with(tiny_model(family), composed_of([virtual, lora], (1, 1), family), TOKENS)
    alone = logits_with(tiny_model(family), read_lowered(virtual, family), TOKENS)
    assert (actual - alone).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
