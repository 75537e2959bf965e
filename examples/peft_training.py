"""Training of one example task with PEFT, on the rows and the batches of the trainer.

It is for methods that ``manyhats train`` does not have, and for a prompt over another task's LoRA: what PEFT trains is
served too.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.data import write_data
from examples.peft_adapters import BASE_ALIAS, PeftAdapter, attach
from examples.settings import PeftSettings
from examples.tasks.task import ExampleTask
from examples.training import TrainingResult, recent
from manyhats.engine.checkpoints.fetch import locate_model
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.home import default_home
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.trainer.data.batch import collate
from manyhats.trainer.data.sampler import BatchSampler
from manyhats.trainer.data.task_data import read_task_data
from manyhats.trainer.run.optimizer import learning_rate_factor
from manyhats.trainer.settings.settings import DataSettings, OptimizationSettings


def train_with_peft(
    base: LoadedModel, task: ExampleTask, adapter: PeftSettings, directory: Path, *, over: Path | None
) -> TrainingResult:
    """Train a task's adapter in float32 and write it as PEFT does, matrices in bfloat16.

    Args:
        base: in NF4; it is dequantized.
        task: its data, and how it is trained.
        adapter: what is trained.
        directory: what is written.
        over: the trained LoRA that it is trained on top of.
    """
    with TemporaryDirectory(prefix="manyhats-examples-") as scratch:
        data, _ = write_data(task, Path(scratch))
        rows = read_task_data(DataSettings(train=str(data), chat=True), base, 0).train.rows
    sampler = BatchSampler(rows, task.training, shuffle=True)
    torch.manual_seed(task.training.seed)
    trained = attach(_dense_model(base), adapter, num_steps=sampler.num_steps, over=over)
    optimizer = _Optimizer(trained, task.training, sampler.num_steps)
    losses, num_tokens, began_s = [], 0, time.monotonic()
    for index in range(sampler.num_steps):
        # The examples accumulate no gradients: a step is one batch.
        batch = collate(sampler.step(index)[0])
        loss = trained.loss(batch)
        optimizer.step(loss + trained.penalty())
        trained.after_step(index + 1)
        losses.append(loss.item())
        num_tokens += batch.num_row_tokens
        if (index + 1) % 10 == 0 or index + 1 == sampler.num_steps:
            print(f"{task.name}: step {index + 1}/{sampler.num_steps}, loss {losses[-1]:.4f}", flush=True)
    trained.save(directory)
    return TrainingResult("PEFT", len(losses), num_tokens, recent(losses), time.monotonic() - began_s)


def _dense_model(base: LoadedModel) -> Any:
    """A fresh float32 transformers model with the base's dequantized weights."""
    directory = locate_model(BASE_ALIAS, default_home()).directory
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    modules = dict(model.named_modules())
    for path, (part, *_) in base.description.modules.items():
        site = part.site
        linear = base.weights.blocks[site.layer].linears.get(site.name) if site.layer >= 0 else None
        if linear is not None and isinstance(linear.matrix, Nf4Weight):
            modules[path].weight.data.copy_(linear.matrix.dequantize())
    return model


class _Optimizer:
    """AdamW by the trainer's schedule, with bounded gradients."""

    def __init__(self, adapter: PeftAdapter, settings: OptimizationSettings, num_steps: int) -> None:
        assert settings.learning_rate is not None
        self._parameters = adapter.parameters
        self._max_norm = settings.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(settings, step, num_steps)
        )

    def step(self, loss: torch.Tensor) -> None:
        """Move the parameters; their gradients stay until the next one."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._schedule.step()
