"""Logits and parameters → token ids. The same arguments give the same tokens.

A row's token depends on that row's logits, parameters, seed and step alone, not on the rows beside it nor on
their number.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.choices import Choices
from manyhats.engine.kernels.interface import Kernels
from manyhats.engine.logprobs import TokenLogprob, row_logprob, token_logprobs
from manyhats.engine.penalties import Ids, LogitChanges, Values
from manyhats.engine.request import SamplingParams
from manyhats.engine.uniform import uniform

__all__ = ["Sampled", "SamplingRow", "TokenLogprob", "non_finite_rows", "sample", "token_logprobs"]

_SMALLEST_TEMPERATURE = 1e-30
"""In float32 a smaller one could be 0, which is greedy: ties would no longer be drawn."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRow:
    """What one row of logits is sampled with.

    Attributes:
        params: its ``seed`` is not read here, and its bias and penalties in ``changes`` alone.
        seed: resolved, in [0, 2^64).
        step: index of the output token; the random number is a function of (seed, step).
        changes: bias and penalties; None without any.
        forbid: ids that may not come, e.g. EOS before ``min_new_tokens``.
        allowed: bool [V], ids that may come; None is all.
        num_logprobs: None wants no log-probability, 0 the token's own, k also the k most likely.
    """

    params: SamplingParams
    seed: int = 0
    step: int = 0
    changes: LogitChanges | None = None
    forbid: tuple[int, ...] = ()
    allowed: Tensor | None = None
    num_logprobs: int | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether its token is the most likely one of the raw logits."""
        return self.params.is_greedy and self.changes is None and not self.forbid and self.allowed is None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probability from the raw logits where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample(logits: Tensor, rows: Seq[SamplingRow], kernels: Kernels[Any, Any]) -> Sampled:
    """Choose one token per row.

    Bias, penalties, forbidden ids, temperature, top_k, top_p, min_p, typical_p, in this order; then the token
    at which the cumulative probability, in order of ids, passes ``uniform(seed, step)``. At temperature 0 the
    largest logit, the smallest id among equals.

    Args:
        logits: [M, V] float32, finite.
        rows: M of them.
        kernels: what chooses.

    Raises:
        ValueError: not M rows, or a row that allows no token.
        IndexError: an id outside the vocabulary.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
    if all(row.is_plain_greedy for row in rows):
        token_ids: list[int] = logits.numpy().argmax(axis=1).tolist()
    else:
        token_ids = kernels.choose(logits, _choices(logits, rows)).tolist()
    if -1 in token_ids:
        raise ValueError("no token is allowed to come next")
    logprobs = [
        None
        if row.num_logprobs is None
        else row_logprob(logits[index].numpy(), token_ids[index], row.num_logprobs)
        for index, row in enumerate(rows)
    ]
    return Sampled(token_ids, logprobs)


def non_finite_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of [M, V] float32 that hold a NaN or an infinity.

    A row's sum is not finite if any of its values isn't, which costs one pass; the rows whose sum isn't are
    then looked at closely, since large finite values can overflow as well.
    """
    suspects = torch.nonzero(~torch.isfinite(logits.sum(dim=1))).flatten().tolist()
    return [row for row in suspects if not bool(torch.isfinite(logits[row]).all())]


def _choices(logits: Tensor, rows: Seq[SamplingRow]) -> Choices:
    params = [row.params for row in rows]
    edits = [_edits(logits, index, row) for index, row in enumerate(rows)]
    masks = [row.allowed for row in rows if row.allowed is not None]
    return Choices(
        temperature=torch.tensor([_temperature(p) for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        typical_p=torch.tensor([p.typical_p for p in params], dtype=torch.float64),
        point=torch.tensor(
            [0.0 if row.params.is_greedy else uniform(row.seed, row.step) for row in rows],
            dtype=torch.float64,
        ),
        edit_start=torch.tensor([0, *np.cumsum([ids.size for ids, _ in edits])], dtype=torch.int64),
        edit_ids=torch.from_numpy(np.concatenate([_NO_IDS, *(ids for ids, _ in edits)])),
        edit_values=torch.from_numpy(np.concatenate([_NO_VALUES, *(values for _, values in edits)])),
        mask_rows=torch.tensor(_mask_rows(rows), dtype=torch.int64),
        masks=torch.stack(masks) if masks else torch.empty((0, logits.shape[1]), dtype=torch.bool),
    )


_NO_IDS: Ids = np.empty(0, np.int64)
_NO_VALUES: Values = np.empty(0, np.float32)


def _edits(logits: Tensor, index: int, row: SamplingRow) -> tuple[Ids, Values]:
    """The tokens of a row whose logits change, and to what; forbidden ones come last, and so win."""
    ids, values = _NO_IDS, _NO_VALUES
    if row.changes is not None:
        ids, values = row.changes.applied(logits[index].numpy())
    if row.forbid:
        if max(row.forbid) >= logits.shape[1]:
            raise IndexError(f"token id {max(row.forbid)} is outside the vocabulary of {logits.shape[1]}")
        ids = np.concatenate([ids, np.array(row.forbid, np.int64)])
        values = np.concatenate([values, np.full(len(row.forbid), -np.inf, np.float32)])
    return ids, values


def _temperature(params: SamplingParams) -> float:
    return 0.0 if params.is_greedy else max(params.temperature, _SMALLEST_TEMPERATURE)


def _mask_rows(rows: Seq[SamplingRow]) -> list[int]:
    """Which of the masks each row has; -1 for none."""
    numbers = iter(range(len(rows)))
    return [-1 if row.allowed is None else next(numbers) for row in rows]
