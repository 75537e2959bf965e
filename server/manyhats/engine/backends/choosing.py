"""Operations on logits in host memory: choosing tokens, and finding natural log-probabilities with ranks."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.engine.backends.wants import Choices, TokenLogprob, check_ids

Ids = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Log-probabilities of P tokens in M rows of logits, given as P pairs of row and token.

    Attributes:
        logprobs: [P] float64, natural.
        ranks: [P] int64, 1 + how many tokens of the row are strictly more likely.
        top_ids: [M, K] int64, the most likely tokens of each row, best first, ties by id.
        top_logprobs: [M, K] float64, those of ``top_ids``.
    """

    logprobs: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.int64]
    top_ids: npt.NDArray[np.int64]
    top_logprobs: npt.NDArray[np.float64]


class Chooser(Protocol):
    """Operations on logits in host memory."""

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row of logits [S, V], the rows of ``choices``: → [S] int64, −1 where none is allowed.

        Edits and masks first, then temperature, top_k, top_p, min_p and typical_p, each on what the ones before left,
        renormalized; then the draw.
        """
        ...

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """``log softmax(logits)[rows[i], targets[i]]`` in float64, with ranks, and each row's most likely tokens.

        Args:
            logits: [M, V] float32, finite.
            rows: [P] int64.
            targets: [P] int64 in [0, V).
            num_top: K, at most V.
        """
        ...


def token_logprobs(
    logits: Tensor, targets: Ids, num_top: int, chooser: Chooser, rows: Ids | None = None
) -> list[TokenLogprob]:
    """The log-probability of each target: ``log softmax(logits)[rows[i], targets[i]]``.

    The numbers of a row don't depend on what else is in the batch.

    Args:
        logits: [M, V] float32, raw and finite: before bias, penalties, temperature and filters.
        targets: [P] ids in [0, V).
        num_top: how many of the most likely tokens to return, at most V.
        chooser: does the computation.
        rows: [P] the row of each target; None for one target per row.

    Raises:
        IndexError: a target is not a token.
        ValueError: there is not one target per row.
    """
    own = np.arange(logits.shape[0]) if rows is None else rows
    if len(own) != len(targets):
        raise ValueError(f"{len(targets)} tokens for {len(own)} rows")
    check_ids(targets, logits.shape[1])
    found = chooser.logprobs(
        logits,
        torch.from_numpy(np.asarray(own, dtype=np.int64)),
        torch.from_numpy(np.asarray(targets, dtype=np.int64)),
        min(num_top, logits.shape[1]),
    )
    tops = [
        (_array("q", ids), _array("d", values))
        for ids, values in zip(found.top_ids, found.top_logprobs, strict=True)
    ]
    return [
        TokenLogprob(logprob, rank, *tops[row])
        for logprob, rank, row in zip(
            found.logprobs.tolist(), found.ranks.tolist(), own.tolist(), strict=True
        )
    ]


def _array(code: str, values: npt.NDArray[Any]) -> array[Any]:
    return array(code, values.tobytes())
