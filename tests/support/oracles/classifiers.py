"""transformers' models of a checkpoint by what tasks do with them, as PEFT adapts them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import TaskType

_AUTO = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
}


def load_model(directory: Path, kind: TaskType | None = None, num_labels: int = 0) -> Any:
    """The model of a checkpoint with the head of a kind of task, random but the same each time; None for no head."""
    transformers: Any = import_module("transformers")
    name = _AUTO.get(kind, "AutoModel") if kind else "AutoModel"
    labels = {"num_labels": num_labels} if num_labels else {}
    with torch.random.fork_rng():
        torch.manual_seed(num_labels)
        model = getattr(transformers, name).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", **labels
        )
    model.train(False)
    return model
