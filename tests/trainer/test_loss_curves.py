"""Fifty steps of AdamW beside PEFT: same beginning, data and order, same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor

from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.trainer.data.batch import TokenizedRow, collate
from manyhats.trainer.methods.adapter import TrainableAdapter
from manyhats.trainer.methods.making import make_adapter
from manyhats.trainer.settings.methods import AdapterSettings, LoraSettings, PrefixSettings, PromptSettings
from support.factories.tiny_models import make_checkpoint
from support.harnesses.engine import load_tiny
from support.harnesses.training import make_decoder, make_rows, summed_loss
from support.oracles.peft import make_peft
from support.oracles.transformers import load_transformers

# PEFT reads names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 50
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[AdapterSettings, Any, float]] = {
    "lora": (
        LoraSettings(rank=4, alpha=8),
        LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"),
        5e-3,
    ),
    "prefix": (
        PrefixSettings(num_virtual_tokens=5, projection_size=0),
        PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        2e-2,
    ),
    "projected prefix": (
        PrefixSettings(num_virtual_tokens=5, projection_size=16),
        PrefixTuningConfig(
            num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
        ),
        1e-2,
    ),
    "prompt": (
        PromptSettings(num_virtual_tokens=5),
        PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        2e-2,
    ),
}
"""By name: our settings, PEFT's, and the learning rate."""


def batches() -> list[list[TokenizedRow]]:
    """Three batches of rows of two lengths, over and over."""
    return [make_rows((18, 11, 18), seed=step % 3) for step in range(STEPS)]


def matched_parameters(adapter: TrainableAdapter, peft: Any) -> list[tuple[Tensor, Tensor]]:
    """Each of our parameters with the one of PEFT that has its place."""
    theirs = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    flat = "embedding.weight" if PROMPT_EMBEDDINGS in adapter.parameters else ""
    pairs = []
    for name, own in adapter.parameters.items():
        other = name if name in theirs else f"prompt_encoder.{flat or name}"
        pairs.append((own, theirs.pop(other)))
    assert not theirs
    return pairs


def losses(loss: Any, parameters: list[Tensor], learning_rate: float) -> list[float]:
    """The mean loss of each step's targets."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    curve = []
    for rows in batches():
        mean = loss(rows) / sum(row.num_targets for row in rows)
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(mean.item())
    return curve


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve_is_peft_s(tmp_path: Path, case: str) -> None:
    settings, config, learning_rate = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "model", "llama", seed=8)
    model = load_tiny(checkpoint)
    peft = make_peft(load_transformers(checkpoint), config, size=0.02)
    adapter = make_adapter(settings, "task", model, seed=0)
    pairs = matched_parameters(adapter, peft)
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
    decoder = make_decoder(model, checkpointing=True)
    found = losses(
        lambda rows: decoder.loss(collate(rows), adapter.lowered()), [own for own, _ in pairs], learning_rate
    )
    expected = losses(lambda rows: summed_loss(peft, rows), [other for _, other in pairs], learning_rate)
    assert expected[-1] < 0.9 * expected[0], "nothing was learned"
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-3
