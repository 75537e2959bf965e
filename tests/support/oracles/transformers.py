"""Slow, obvious oracles: transformers' and float64 forms of what the engine computes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.engine.model.nf4 import Nf4Weight


def load_transformers(directory: Path) -> nn.Module:
    """What transformers makes of a checkpoint: float32, eager attention."""
    transformers: Any = import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.train(False)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def dequantize_into(model: nn.Module, loaded: LoadedModel) -> None:
    """Give a transformers model the weights that an NF4 model stands for."""
    for index, weights in enumerate(loaded.weights.blocks):
        for name, linear in weights.linears.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weight = linear.matrix
            target = model.get_parameter(f"model.layers.{index}.{block}.{name}.weight")
            target.copy_(weight.dequantize() if isinstance(weight, Nf4Weight) else weight)


@torch.no_grad()
def full_logits(model: nn.Module, token_ids: Seq[int]) -> Tensor:
    """Logits at every position, [T, V], by one forward over the whole text."""
    logits: Tensor = model(input_ids=torch.tensor([list(token_ids)])).logits[0]
    return logits


def next_logprobs(logits: Tensor, token_ids: Seq[int]) -> Tensor:
    """Of each token after the first, given those before it: logits [T, V] → [T − 1]."""
    targets = torch.tensor(list(token_ids)[1:]).unsqueeze(1)
    return logits[:-1].double().log_softmax(-1).gather(1, targets).squeeze(1)


def continuation_logprob(model: nn.Module, prompt: Seq[int], continuation: Seq[int]) -> float:
    """Sum of the log-probabilities of a continuation's tokens, by one full forward."""
    token_ids = [*prompt, *continuation]
    return float(next_logprobs(full_logits(model, token_ids), token_ids)[len(prompt) - 1 :].sum())


def greedy(model: nn.Module, prompt: Seq[int], num_tokens: int) -> list[int]:
    """Greedy continuation by a full forward at each step; nothing ends it early."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(full_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    cap: float = 0.0,
    sees_all: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale) v in float64 over one whole sequence.

    Args:
        q: [T, H, K].
        k: [T, Hkv, K]; head h of q reads head h // (H / Hkv).
        v: the same shape.
        scale: of the scores.
        window: positions that a row sees, itself included; None for all before it.
        cap: c in ``c · tanh(score / c)``; 0 for none.
        sees_all: whether a row sees as many behind it, too.

    Returns:
        [T, H, K] float64.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    row, column = torch.meshgrid(torch.arange(len(q)), torch.arange(len(q)), indexing="ij")
    distance = (row - column).abs() if sees_all else row - column
    hidden = (distance < 0) | (distance >= (len(q) if window is None else window))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
