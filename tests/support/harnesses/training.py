"""The trainer's decoder on tiny bases: batches of random rows, losses, and gradients by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manyhats.adapters.artifact import AdapterArtifact
from manyhats.adapters.lowering.lowering import lower
from manyhats.adapters.primitives import LoweredAdapter
from manyhats.adapters.sites import BaseDescription
from manyhats.engine.checkpoints.loader import LoadedModel
from manyhats.trainer.data.batch import TokenizedRow, TrainingBatch, collate
from manyhats.trainer.model.decoder import TrainingDecoder
from support.factories.tiny_models import TINY_VOCAB_SIZE

LENGTHS = (37, 12, 25)
"""Of the rows of most batches."""


def make_decoder(
    model: LoadedModel, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> TrainingDecoder:
    return TrainingDecoder(
        model, dtype=dtype, gradient_checkpointing=checkpointing, device=torch.device("cpu")
    )


def make_rows(
    lengths: Sequence[int] = LENGTHS, *, seed: int = 0, num_shared: int = 0, vocab_size: int = TINY_VOCAB_SIZE
) -> list[TokenizedRow]:
    """Random rows, of which about two thirds of the tokens are learned, none of the ``num_shared`` first."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    beginning = ids[0][:num_shared]
    rows = []
    for own in ids:
        learned = torch.rand(len(own), generator=generator) < 2 / 3
        learned[: max(1, num_shared)] = False
        learned[-1] = True
        rows.append(TokenizedRow((*beginning, *own[num_shared:]), tuple(learned.tolist())))
    return rows


def make_batch(lengths: Sequence[int] = LENGTHS, **fields: Any) -> TrainingBatch:
    """Random rows, nothing shared."""
    return collate(make_rows(lengths, **fields), share_beginning=False)


def row_ids(batch: TrainingBatch) -> list[list[int]]:
    """The rows' tokens; nothing is shared."""
    return [part.tolist() for part in batch.token_ids.split(list(batch.segments))]


def summed_loss(model: Any, rows: Sequence[TokenizedRow]) -> Tensor:
    """Cross-entropies of the learned tokens by a transformers or PEFT model, each row by itself."""
    losses = []
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
        learned = torch.tensor(row.is_target)[1:]
        losses.append(functional.cross_entropy(logits[:-1][learned], ids[0, 1:][learned], reduction="sum"))
    return torch.stack(losses).sum()


def with_leaves(artifact: AdapterArtifact) -> tuple[AdapterArtifact, dict[str, Tensor]]:
    """The artifact with tensors that collect gradients."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in artifact.tensors.items()}
    return replace(artifact, tensors=leaves), leaves


def artifact_gradients(
    decoder: TrainingDecoder, artifact: AdapterArtifact, base: BaseDescription, batch: TrainingBatch
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient with respect to each tensor of an artifact's file."""
    artifact, leaves = with_leaves(artifact)
    loss = decoder.loss(batch, lower(artifact, base))
    loss.backward()
    return loss.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def parameter_gradients(
    decoder: TrainingDecoder,
    adapter: LoweredAdapter,
    parameters: Mapping[str, Tensor],
    batch: TrainingBatch,
    *,
    dropout: float = 0.0,
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient with respect to each parameter."""
    loss = decoder.loss(batch, adapter, dropout=dropout)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, gradients, strict=True))


def assert_gradients_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-4
) -> None:
    """Every tensor's gradient, relative to its largest value."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        assert size > 0, f"{name} has no gradient"
        error = float((actual[name] - gradient).abs().max())
        assert error <= tolerance * size, f"{name}: {error:g} of {size:g}"
