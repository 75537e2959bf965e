"""An untrained adapter on the base, whichever library's: what training moves, what it computes, how it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from examples.bottleneck import SequentialBottlenecks
from examples.packing import PackedBatch
from examples.peft_adapters import Deltas, Prefix, Prompt, PrunedDeltas, delta_config, prompt_config
from examples.settings import (
    AdaLoraSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    VeraSettings,
)
from examples.tasks.task import ExampleTask


class Trainable(Protocol):
    """An adapter around a frozen causal language model of transformers."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What is trained."""
        ...

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The last hidden states of a batch's tokens, [T, D]."""
        ...

    def penalty(self) -> Tensor:
        """What the method adds to the loss; a scalar."""
        ...

    def after_step(self, step: int) -> None:
        """What the method does after an optimizer step, while the gradients are there; ``step`` counts from 1."""
        ...

    def save(self, directory: Path) -> None:
        """Write the artifact as its library does: matrices in bfloat16, vectors in float32."""
        ...


def attach(model: Any, task: ExampleTask, *, num_steps: int, over: Path | None) -> Trainable:
    """Put a task's untrained adapter on a model, which it freezes.

    Args:
        model: the base, as transformers' causal language model.
        task: says which adapter.
        num_steps: that it will be trained for.
        over: a trained LoRA that acts on everything the adapter sees.
    """
    torch.manual_seed(task.training.seed)
    if over is not None:
        # Merged it computes the same in float32; the artifact stays a part of its own.
        model = PeftModel.from_pretrained(model, str(over)).merge_and_unload()
    model.requires_grad_(False)
    match task.adapter:
        case BottleneckSettings() as settings:
            return SequentialBottlenecks(model, settings, name=task.name)
        case AdaLoraSettings() as settings:
            return PrunedDeltas(model, delta_config(settings, num_steps))
        case LoraSettings() | VeraSettings() | Ia3Settings() as settings:
            return Deltas(model, delta_config(settings, num_steps))
        case PrefixSettings() as settings:
            return Prefix(model, prompt_config(settings))
        case settings:
            return Prompt(model, prompt_config(settings))
