"""Natural log-probabilities of raw float32 logits, with ranks and the most likely tokens.

Everything is computed row by row: the numbers don't depend on what else is in the batch, and however many
rows there are, it takes no memory beside the logits but one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability.

    Attributes:
        logprob: natural.
        rank: 1 + how many tokens are strictly more likely.
        top: (token id, log-probability) of the most likely, best first, ties by id.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, targets: Tensor, num_top: int) -> list[TokenLogprob]:
    """The log-probability of each row's target: log softmax(logits)[i, targets[i]].

    Args:
        logits: [M, V] float32, raw: before bias, penalties, temperature and filters.
        targets: [M] integer ids in [0, V).
        num_top: how many of the most likely tokens to give, V at most.
    """
    rows = logits.detach().cpu().numpy()
    return [
        row_logprob(row, int(target), num_top) for row, target in zip(rows, targets.tolist(), strict=True)
    ]


def row_logprob(row: npt.NDArray[np.float32], target: int, num_top: int) -> TokenLogprob:
    """The same for one row, [V] float32."""
    return row_logprobs(row, (target,), num_top)[0]


def row_logprobs(row: npt.NDArray[np.float32], targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of several tokens that one row, [V] float32, may be followed by."""
    largest = row.max()
    log_total = float(largest) + math.log(float(np.exp(row - largest).sum(dtype=np.float64)))
    top = tuple((int(i), float(row[i]) - log_total) for i in _largest_ids(row, num_top))
    return [
        TokenLogprob(float(value) - log_total, int(np.count_nonzero(row > value)) + 1, top)
        for value in row[list(targets)]
    ]


def _largest_ids(row: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Ids of the ``count`` largest, best first, ties by id."""
    if count <= 0:
        return np.empty(0, np.intp)
    cut = max(row.size - count, 0)
    candidates = np.flatnonzero(row >= np.partition(row, cut)[cut])
    return candidates[np.argsort(-row[candidates], kind="stable")][:count]
