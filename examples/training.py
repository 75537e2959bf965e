"""LoRA training of one example task with PEFT, on the base as it is served: NF4, dequantized to float32."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from examples.packing import PackedBatch, TokenizedItem, pack, tokenize
from examples.tasks.task import ExampleTask, train_items
from manyhats.engine.model.directories import default_home
from manyhats.engine.model.fetch import locate_model
from manyhats.engine.model.loader import LoadedModel, load_model
from manyhats.engine.model.nf4 import Nf4Weight

BASE_ALIAS = "smollm2-135m-instruct"
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """One pass of AdamW with a linear schedule; the loss is the mean over the answers' tokens."""

    batch_size: int = 8
    num_epochs: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    max_gradient_norm: float = 1.0
    seed: int = 0


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


def add_adapter(base: LoadedModel, task: ExampleTask, seed: int) -> PeftModel:
    """A fresh float32 transformers model with the base's dequantized weights and the task's untrained LoRA."""
    directory = locate_model(BASE_ALIAS, default_home()).directory
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    modules = dict(model.named_modules())
    for path, site in base.description.modules.items():
        linear = dict(base.weights.layers[site.layer].linears()).get(site.name) if site.layer >= 0 else None
        if linear is not None and isinstance(linear.weight, Nf4Weight):
            modules[path].weight.data.copy_(linear.weight.dequantize())
    torch.manual_seed(seed)
    config = LoraConfig(
        r=task.lora.rank,
        lora_alpha=task.lora.alpha,
        target_modules=list(task.lora.target_modules),
        use_rslora=task.lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(
    model: PeftModel, base: LoadedModel, task: ExampleTask, settings: TrainingSettings
) -> TrainingResult:
    """Train the adapter in place."""
    end_of_turn = min(base.generation.eos_token_ids)
    items = [tokenize(item, base.tokenizer, end_of_turn) for item in train_items(task)]
    num_steps = settings.num_epochs * -(-len(items) // settings.batch_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / settings.warmup_steps, (num_steps - step) / num_steps),
    )
    model.train()
    began_s = time.monotonic()
    losses: list[float] = []
    num_tokens = 0
    for step, batch in enumerate(_batches(items, settings), start=1):
        loss = _answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_gradient_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        num_tokens += batch.token_ids.numel()
        if step % 10 == 0 or step == num_steps:
            rate = num_tokens / (time.monotonic() - began_s)
            print(
                f"{task.name}: step {step}/{num_steps}, loss {_recent(losses):.4f}, {rate:.0f} tokens/s",
                flush=True,
            )
    return TrainingResult(num_steps, num_tokens, _recent(losses), time.monotonic() - began_s)


def save(model: PeftModel, directory: Path) -> None:
    """Save as PEFT does, in bfloat16, naming the base by its hub id; the model keeps the rounded values."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME
    # PEFT keeps a set, whose order differs from run to run.
    config.target_modules = sorted(config.target_modules)
    # Embeddings are not trained; asking PEFT to look whether they were would look for the base on the hub.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    # The library that writes safetensors lets nobody else read them.
    for path in directory.iterdir():
        path.chmod(0o644)
    for parameter in parameters:
        parameter.data = parameter.data.float()


def _batches(items: Sequence[TokenizedItem], settings: TrainingSettings) -> Iterator[PackedBatch]:
    rng = random.Random(settings.seed)
    for _ in range(settings.num_epochs):
        order = rng.sample(items, len(items))
        for begin in range(0, len(order), settings.batch_size):
            yield pack(order[begin : begin + settings.batch_size])


def _answer_loss(model: PeftModel, batch: PackedBatch) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; the output head runs on their rows only."""
    causal_lm: Any = model.get_base_model()
    hidden = causal_lm.model(
        input_ids=batch.token_ids,
        position_ids=batch.positions,
        attention_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
    logits = causal_lm.lm_head(hidden[0, batch.predictors])
    return torch.nn.functional.cross_entropy(logits, batch.targets)


def _recent(losses: Sequence[float]) -> float:
    last = losses[-10:]
    return sum(last) / len(last)
