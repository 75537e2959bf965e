"""Natural log-probabilities of raw float32 logits, with ranks and the most likely tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """What P tokens have for log-probabilities in M rows of logits, P pairs of row and token.

    Attributes:
        logprobs: [P] float64, natural.
        ranks: [P] int64, 1 + how many tokens of the row are strictly more likely.
        top_ids: [M, K] int64, the most likely tokens of each row, best first, ties by id.
        top_logprobs: [M, K] float64, theirs.
    """

    logprobs: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float64]


class LogprobKernels(Protocol):
    """The part of ``Kernels`` that this needs."""

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """See ``Kernels``."""
        ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability.

    The most likely tokens are arrays of numbers, which for thousands of rows take a tenth of what tuples do.

    Attributes:
        logprob: natural.
        rank: 1 + how many tokens are strictly more likely.
        top_ids: of the most likely, best first, ties by id.
        top_logprobs: theirs.
    """

    logprob: float
    rank: int
    top_ids: array[int] = field(default_factory=lambda: array("q"))
    top_logprobs: array[float] = field(default_factory=lambda: array("d"))

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """(token id, log-probability) of the most likely."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


def token_logprobs(
    logits: Tensor,
    targets: Sequence[int],
    num_top: int,
    kernels: LogprobKernels,
    rows: Sequence[int] | None = None,
) -> list[TokenLogprob]:
    """The log-probability of each target: log softmax(logits)[rows[i], targets[i]].

    The numbers of a row don't depend on what else is in the batch.

    Args:
        logits: [M, V] float32, raw and finite: before bias, penalties, temperature and filters.
        targets: ids in [0, V).
        num_top: how many of the most likely tokens to give; V at most are given.
        kernels: what computes.
        rows: the row of each target; None is one target for each row.

    Raises:
        IndexError: a target is no token.
        ValueError: not one target for each row.
    """
    own = range(logits.shape[0]) if rows is None else rows
    if len(own) != len(targets):
        raise ValueError(f"{len(targets)} tokens for {len(own)} rows")
    if any(not 0 <= target < logits.shape[1] for target in targets):  # the kernels check no index
        raise IndexError(f"a token id is outside the vocabulary of {logits.shape[1]}")
    found = kernels.logprobs(
        logits,
        torch.tensor(own, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        min(num_top, logits.shape[1]),
    )
    tops = [
        (_array("q", ids), _array("d", values))
        for ids, values in zip(found.top_ids, found.top_logprobs, strict=True)
    ]
    return [
        TokenLogprob(logprob, rank, *tops[row])
        for logprob, rank, row in zip(found.logprobs.tolist(), found.ranks.tolist(), own, strict=True)
    ]


def _array(code: str, values: npt.NDArray[Any]) -> array[Any]:
    return array(code, values.tobytes())
