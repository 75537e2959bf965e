"""Dense linears in the layout that ``dense.tile`` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhats.engine.backends.cpu import columns as col
from manyhats.engine.backends.cpu.packing import DEPTH, GROUP_ROWS, CpuLinear, dense_linear, joined_bias
from manyhats.engine.model.weights import Linear


def takes_groups(parts: Sequence[Linear]) -> bool:
    """Whether ``pack_groups`` can lay these linears out: they are dense, alike, and of fitting sizes."""
    fit = all(part.out_features % GROUP_ROWS == 0 and part.in_features % DEPTH == 0 for part in parts)
    matrices = [part.matrix for part in parts]
    dtypes = {matrix.dtype for matrix in matrices if isinstance(matrix, Tensor)}
    are_dense = all(isinstance(matrix, Tensor) for matrix in matrices)
    return fit and are_dense and len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}


def pack_groups(parts: Sequence[Linear], *, are_pairs: bool) -> CpuLinear:
    """Lays out dense linears over the same input.

    Args:
        parts: see ``takes_groups``.
        are_pairs: whether the inputs of bfloat16 weights are rounded to bfloat16.
    """
    matrices = [part.matrix for part in parts if isinstance(part.matrix, Tensor)]
    kind = col.FLOAT32_GROUPS
    if matrices[0].dtype == torch.bfloat16:
        kind = col.BFLOAT16_PAIRS if are_pairs else col.BFLOAT16_GROUPS
    words = [_in_groups(matrix) for matrix in matrices]
    # In torch's memory, which begins with a cache line: a vector then never lies in two of them.
    weights = (words[0] if len(words) == 1 else torch.cat(words)).view(-1).numpy()
    sizes = parts[0].in_features, sum(part.out_features for part in parts)
    return dense_linear(kind, sizes, weights, joined_bias(parts))


def _in_groups(matrix: Tensor) -> Tensor:
    """A matrix as [groups, words, 16] int32: a word is a float32 value, or a pair of bfloat16 values of one row."""
    per_word = 4 // matrix.element_size()
    inputs = matrix.reshape(-1, GROUP_ROWS, matrix.shape[1] // per_word, per_word)
    return inputs.transpose(1, 2).contiguous().view(torch.int32)
