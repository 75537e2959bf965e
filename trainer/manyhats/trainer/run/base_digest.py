"""A digest of the base's weights as they are in memory: a training must leave it as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Matrix, ModelWeights


def weights_digest(weights: ModelWeights) -> str:
    """SHA-256 over the bytes of every tensor, in the order of the forward; about a second per gigabyte."""
    digest = hashlib.sha256()
    for tensor in _tensors(weights):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _tensors(weights: ModelWeights) -> Iterator[Tensor]:
    yield weights.embed_tokens
    for layer in weights.layers:
        for _, linear in layer.linears():
            yield from _matrix_tensors(linear.weight)
            if linear.bias is not None:
                yield linear.bias
        yield from layer.norms()
    yield weights.norm
    if weights.lm_head is not None:
        yield weights.lm_head


def _matrix_tensors(matrix: Matrix) -> Iterator[Tensor]:
    if not isinstance(matrix, Nf4Weight):
        yield matrix
        return
    yield from (matrix.packed, matrix.absmax, matrix.nested_absmax, matrix.code, matrix.nested_code)
    yield torch.tensor(matrix.offset, dtype=torch.float64)
