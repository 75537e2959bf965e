"""A digest of the base's weights as they are in memory: training must not change it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from manyhats.engine.model.nf4 import Nf4Weight
from manyhats.engine.model.weights import Matrix, Weights


def weights_digest(weights: Weights) -> str:
    """SHA-256 over the bytes of every tensor, in the order of the forward; about a second per gigabyte."""
    digest = hashlib.sha256()
    for tensor in _tensors(weights):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _tensors(weights: Weights) -> Iterator[Tensor]:
    yield weights.embedding
    for block in weights.blocks:
        for linear in block.linears.values():
            yield from _matrix_tensors(linear.matrix)
            if linear.bias is not None:
                yield linear.bias
        yield from (norm.weight for norm in block.norms.values())
    yield weights.final_norm.weight
    for linear in weights.outer.values():
        yield from _matrix_tensors(linear.matrix)


def _matrix_tensors(matrix: Matrix) -> Iterator[Tensor]:
    if not isinstance(matrix, Nf4Weight):
        yield matrix
        return
    yield from (matrix.packed, matrix.absmax, matrix.nested_absmax, matrix.code, matrix.nested_code)
    yield torch.tensor(matrix.offset, dtype=torch.float64)
