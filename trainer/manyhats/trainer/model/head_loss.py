"""The loss of a task that reads texts: what its head makes of their hidden states, and how far that is off."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters import equations
from manyhats.adapters.activations import ACTIVATIONS
from manyhats.adapters.heads import Pooling, TaskHead
from manyhats.adapters.primitives import LayerNorm, LoweredAdapter
from manyhats.trainer.data.batch import IGNORED, ReadBatch
from manyhats.trainer.data.head_task import HeadTask, Loss
from manyhats.trainer.model.decoder import TrainingDecoder


class HeadLoss:
    """The loss of adapters whose task reads texts.

    Args:
        decoder: the base.
        task: what is learned.
    """

    def __init__(self, decoder: TrainingDecoder, task: HeadTask) -> None:
        self._decoder = decoder
        self._task = task

    def loss(self, batch: ReadBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The sum of the batch's terms, a float32 scalar.

        Args:
            batch: of rows.
            adapter: with its head; None for the base alone, if vectors are learned.
            dropout: of the input of low-rank deltas.
        """
        outputs = self.outputs(batch, adapter, dropout=dropout)
        if self._task.loss is Loss.CONTRASTIVE:
            return contrastive_loss(outputs, _text_keys(batch), batch.num_texts, self._task.temperature)
        targets = batch.targets.to(outputs.device)
        match self._task.loss:
            case Loss.CROSS_ENTROPY:
                return functional.cross_entropy(
                    outputs, targets.long(), reduction="sum", ignore_index=IGNORED
                )
            case Loss.BINARY_CROSS_ENTROPY:
                return functional.binary_cross_entropy_with_logits(
                    outputs, targets.view(outputs.shape), reduction="sum"
                )
            case _:
                return functional.mse_loss(outputs.squeeze(1), targets, reduction="sum")

    def outputs(self, batch: ReadBatch, adapter: LoweredAdapter | None, *, dropout: float = 0.0) -> Tensor:
        """The head's outputs of each text, or of each token, [B or N, outputs]; for vectors these, [B, E]."""
        head = None if adapter is None else adapter.head
        pooling = self._task.pooling or (Pooling.ALL if head is None else head.pooling)
        x = self._decoder.pooled(
            batch,
            adapter,
            pooling,
            skipped_token_id=None if head is None else head.skipped_token_id,
            dropout=dropout,
        )
        return x if head is None else applied(head, x)


def applied(head: TaskHead, x: Tensor) -> Tensor:
    """``norm(activation(x Wᵀ + b))`` of each layer in turn: [B, E] → [B, outputs]."""
    for layer in head.layers:
        bias = None if layer.bias is None else layer.bias.to(x.device)
        x = functional.linear(x, layer.weight.to(x.device), bias)
        if layer.activation is not None:
            x = ACTIVATIONS[layer.activation](x)
        if layer.norm is not None:
            x = equations.layer_norm(x, _on(x.device, layer.norm))
    return x


def _on(device: torch.device, norm: LayerNorm) -> LayerNorm:
    return LayerNorm(norm.weight.to(device), norm.bias.to(device), norm.eps)


def contrastive_loss(
    vectors: Tensor, keys: list[tuple[int, ...]], num_texts: tuple[int, ...], temperature: float
) -> Tensor:
    """The sum over queries of ``−log softmax(q · d / τ)`` at the query's answer, over all texts of the batch.

    Vectors have length 1. A text that is another query's, but equal to the query's own answer, is none of the others.

    Args:
        vectors: [X, E], of each row its query's, its answer's, and those of others.
        keys: [X], equal for equal texts.
        num_texts: of each row.
        temperature: τ.

    Source: van den Oord et al. 2018 (arXiv:1807.03748), section 2.3; Gao et al. 2021 (arXiv:2104.08821).
    """
    vectors = functional.normalize(vectors, dim=1)
    starts = [sum(num_texts[:row]) for row in range(len(num_texts))]
    queries = set(starts)
    documents = [text for text in range(len(keys)) if text not in queries]
    place_of = {text: place for place, text in enumerate(documents)}
    answers = [place_of[start + 1] for start in starts]
    scores = vectors[starts] @ vectors[documents].T / temperature
    document_keys = [keys[text] for text in documents]
    same = [
        [key == document_keys[answer] and place != answer for place, key in enumerate(document_keys)]
        for answer in answers
    ]
    scores = scores.masked_fill(torch.tensor(same, device=scores.device), float("-inf"))
    return functional.cross_entropy(scores, torch.tensor(answers, device=scores.device), reduction="sum")


def _text_keys(batch: ReadBatch) -> list[tuple[int, ...]]:
    return [tuple(text.tolist()) for text in batch.token_ids.split(list(batch.segments))]
