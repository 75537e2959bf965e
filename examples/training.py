"""Training of one example task on the base as it is served: NF4, dequantized to float32."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from examples.packing import PackedBatch, TokenizedItem, pack, tokenize
from examples.peft_adapters import BASE_ALIAS
from examples.settings import TrainingSettings
from examples.tasks.task import ExampleTask, train_items
from examples.trainable import Trainable, attach
from manyhats.engine.model.directories import default_home
from manyhats.engine.model.fetch import locate_model
from manyhats.engine.model.loader import LoadedModel, load_model
from manyhats.engine.model.nf4 import Nf4Weight


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run did; the loss is the mean of the last ten steps."""

    num_steps: int
    num_tokens: int
    last_loss: float
    duration_s: float


def load_base() -> LoadedModel:
    """The default model as it is served, in NF4; fetched if need be."""
    return load_model(BASE_ALIAS, quantization="nf4", dtype=torch.float32)


def dense_model(base: LoadedModel) -> Any:
    """A fresh float32 transformers model with the base's dequantized weights."""
    directory = locate_model(BASE_ALIAS, default_home()).directory
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    modules = dict(model.named_modules())
    for path, site in base.description.modules.items():
        linear = dict(base.weights.layers[site.layer].linears()).get(site.name) if site.layer >= 0 else None
        if linear is not None and isinstance(linear.weight, Nf4Weight):
            modules[path].weight.data.copy_(linear.weight.dequantize())
    return model


def train(base: LoadedModel, task: ExampleTask, directory: Path, *, over: Path | None) -> TrainingResult:
    """Train a task's adapter and write it.

    Args:
        base: in NF4.
        task: its data, its adapter and how it is trained.
        directory: what is written.
        over: the trained LoRA that it is trained on top of.
    """
    end_of_turn = min(base.generation.eos_token_ids)
    items = [tokenize(item, base.tokenizer, end_of_turn) for item in train_items(task)]
    settings = task.training
    num_steps = settings.num_epochs * -(-len(items) // settings.batch_size)
    model = dense_model(base)
    adapter = attach(model, task, num_steps=num_steps, over=over)
    losses, num_tokens = [], 0
    began_s = time.monotonic()
    optimizer = _Optimizer(adapter.parameters, settings, num_steps)
    for step, batch in enumerate(_batches(items, settings), start=1):
        loss = _answer_loss(model, adapter, batch)
        optimizer.step(loss + adapter.penalty())
        adapter.after_step(step)
        losses.append(loss.item())
        num_tokens += batch.token_ids.numel()
        if step % 10 == 0 or step == num_steps:
            rate = num_tokens / (time.monotonic() - began_s)
            print(
                f"{task.name}: step {step}/{num_steps}, loss {_recent(losses):.4f}, {rate:.0f} tokens/s",
                flush=True,
            )
    adapter.save(directory)
    return TrainingResult(num_steps, num_tokens, _recent(losses), time.monotonic() - began_s)


class _Optimizer:
    """AdamW whose rate rises over the warm-up and then falls to nothing, with bounded gradients."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: TrainingSettings, num_steps: int
    ) -> None:
        self._parameters = parameters
        self._max_norm = settings.max_gradient_norm
        self._optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / settings.warmup_steps, (num_steps - step) / num_steps),
        )

    def step(self, loss: Tensor) -> None:
        """Move the parameters; their gradients stay until the next one."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._schedule.step()


def _batches(items: Sequence[TokenizedItem], settings: TrainingSettings) -> Iterator[PackedBatch]:
    rng = random.Random(settings.seed)
    for _ in range(settings.num_epochs):
        order = rng.sample(items, len(items))
        for begin in range(0, len(order), settings.batch_size):
            yield pack(order[begin : begin + settings.batch_size])


def _answer_loss(model: Any, adapter: Trainable, batch: PackedBatch) -> Tensor:
    """Mean cross-entropy of the answers' tokens; the output head runs on their rows only."""
    logits = model.lm_head(adapter.hidden(batch)[batch.predictors])
    return torch.nn.functional.cross_entropy(logits, batch.targets)


def _recent(losses: Sequence[float]) -> float:
    last = losses[-10:]
    return sum(last) / len(last)
