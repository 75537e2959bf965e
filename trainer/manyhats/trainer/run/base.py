"""The base in memory, ready to train on: shared by all tasks of a process, and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyhats.engine.checkpoints.loader import LoadedModel, load_model
from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Matrix, NormWeight, Weights
from manyhats.engine.progress import Progress, no_progress
from manyhats.trainer.errors import BaseError
from manyhats.trainer.memory.peak import forget_peak
from manyhats.trainer.model.computation import Computation, resolve_computation
from manyhats.trainer.model.decoder import TrainingDecoder
from manyhats.trainer.settings.settings import ModelSettings


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBase:
    """A base, and the decoder that runs it under autograd.

    Attributes:
        digest: of the weights in memory, before any training.
    """

    model: LoadedModel
    decoder: TrainingDecoder
    computation: Computation
    digest: str

    def check_unchanged(self) -> str:
        """Check that the weights have not changed, and return their digest.

        Raises:
            BaseError: it has changed.
        """
        digest = weights_digest(self.model.weights)
        if digest != self.digest:
            raise BaseError(f"the base changed during training: {self.digest} is now {digest}")
        return digest


def load_base(
    settings: ModelSettings,
    model: LoadedModel | None = None,
    *,
    progress: Progress = no_progress,
    home: Path | None = None,
) -> TrainingBase:
    """Load the base and make its decoder; peak memory is measured from then on.

    Args:
        settings: which, and how it is computed.
        model: the base, if already in memory.
        progress: receives loading progress.
        home: where fetched models and their NF4 weights are kept; None for the default.

    Raises:
        ModelError: it cannot be loaded.
        SettingError: there is no such device.
    """
    computation = resolve_computation(settings)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    if model is None:
        model = load_model(
            settings.model,
            quantization=settings.quantization,
            dtype=computation.dtype,
            progress=progress,
            home=home,
        )
    digest = weights_digest(model.weights)
    forget_peak()
    decoder = TrainingDecoder(
        model,
        dtype=computation.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        device=computation.device,
    )
    return TrainingBase(model, decoder, computation, digest)


def num_parameters(weights: Weights) -> int:
    """The number of parameters in all matrices; a tied head counts once."""
    linears = (*weights.linears(), *weights.outer.values())
    return weights.embedding.numel() + sum(linear.out_features * linear.in_features for linear in linears)


def weights_digest(weights: Weights) -> str:
    """SHA-256 over the bytes of every tensor, in the order of the forward; about a second per gigabyte."""
    digest = hashlib.sha256()
    for tensor in _tensors(weights):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _tensors(weights: Weights) -> Iterator[Tensor]:
    yield weights.embedding
    for block in weights.sets:
        for linear in block.linears.values():
            yield from _matrix_tensors(linear.matrix)
            if linear.bias is not None:
                yield linear.bias
        yield from _norm_tensors(block.norms.values())
    if weights.final_norm is not None:
        yield from _norm_tensors([weights.final_norm])
    for linear in weights.outer.values():
        yield from _matrix_tensors(linear.matrix)
        if linear.bias is not None:
            yield linear.bias
    if weights.positions is not None:
        yield weights.positions
    if weights.token_types is not None:
        yield weights.token_types
    for norm in (weights.embedding_norm, weights.pooler_norm):
        if norm is not None:
            yield from _norm_tensors([norm])


def _norm_tensors(norms: Iterable[NormWeight]) -> Iterator[Tensor]:
    for norm in norms:
        yield norm.weight
        if norm.bias is not None:
            yield norm.bias


def _matrix_tensors(matrix: Matrix) -> Iterator[Tensor]:
    if not isinstance(matrix, Nf4Weight):
        yield matrix
        return
    yield from (matrix.packed, matrix.absmax, matrix.nested_absmax, matrix.code, matrix.nested_code)
    yield torch.tensor(matrix.offset, dtype=torch.float64)
