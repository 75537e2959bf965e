"""PEFT's models of artifacts with heads: their outputs, losses and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.nn import functional

from manyhats.adapters.formats.peft.prompt_config import PROMPT_EMBEDDINGS
from manyhats.adapters.heads import TaskKind
from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import ReadRow
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.methods.parametrized import ParametrizedAdapter
from support.factories.trainables import save
from support.oracles.classifiers import load_model

KINDS = {
    TaskKind.CLASSIFY: TaskType.SEQ_CLS,
    TaskKind.CLASSIFY_TOKENS: TaskType.TOKEN_CLS,
    TaskKind.EMBED: TaskType.FEATURE_EXTRACTION,
}


def load_peft(
    base: Path,
    adapter: ParametrizedAdapter,
    task: HeadTask,
    directory: Path,
    *,
    is_trainable: bool = False,
) -> Any:
    """PEFT's model of the artifact on the checkpoint of a base."""
    reference = copy.deepcopy(load_model(base, KINDS[task.kind], task.num_outputs))
    saved = str(save(adapter, directory))
    if is_trainable and "num_virtual_tokens" in adapter.config:
        model: Any = _trainable_prompt(reference, saved)
    else:
        model = PeftModel.from_pretrained(reference, saved, is_trainable=is_trainable)
    model.train(False)
    return model


def _trainable_prompt(reference: Any, saved: str) -> Any:
    """PEFT loads a prompt to train on into a model that it has made for one only."""
    config = PeftConfig.from_pretrained(saved)
    config.inference_mode = False
    model = get_peft_model(reference, config)
    set_peft_model_state_dict(model, load_peft_weights(saved))
    return model


def peft_outputs(model: Any, task: HeadTask, text: ReadText) -> Tensor:
    """[1, outputs] of a text, [T, outputs] of its tokens, or its vector [1, E]."""
    output = model(input_ids=torch.tensor([text.token_ids]))
    if task.kind is TaskKind.EMBED:
        rows: Tensor = output.last_hidden_state[0, -len(text.token_ids) :]
        return rows.mean(0, keepdim=True)
    logits: Tensor = output.logits
    return logits if logits.dim() == 2 else logits[0, -len(text.token_ids) :]


def peft_loss(model: Any, task: HeadTask, rows: list[ReadRow]) -> Tensor:
    """The mean loss as transformers computes it, or of vectors by its definition."""
    outputs = [peft_outputs(model, task, text) for row in rows for text in row.texts]
    if task.loss is Loss.CONTRASTIVE:
        vectors = functional.normalize(torch.cat(outputs), dim=1)
        scores = vectors[::2] @ vectors[1::2].T / task.temperature
        return nn.CrossEntropyLoss()(scores, torch.arange(len(scores)))
    targets = torch.tensor([target for row in rows for target in row.targets])
    logits = torch.cat(outputs)
    if task.loss is Loss.CROSS_ENTROPY:
        return nn.CrossEntropyLoss()(logits, targets.long())
    if task.loss is Loss.BINARY_CROSS_ENTROPY:
        return nn.BCEWithLogitsLoss()(logits, targets.view(logits.shape))
    return nn.MSELoss()(logits.squeeze(), targets)


def peft_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss with respect to what is trained, by the names that files have."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        _saved_name(name): gradient
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }


def _saved_name(name: str) -> str:
    if name.startswith("prompt_encoder."):
        return PROMPT_EMBEDDINGS
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
