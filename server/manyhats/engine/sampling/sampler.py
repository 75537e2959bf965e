"""Logits and parameters → token ids. The same arguments give the same tokens.

A row's token depends only on that row's logits, parameters, seed and step, not on the rows beside it or their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.backend import Kernels
from manyhats.engine.backends.choices import Choices
from manyhats.engine.backends.logprobs import TokenLogprob, token_logprobs
from manyhats.engine.errors import NoTokenAllowedError
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import Ids, LogitChanges, Values
from manyhats.engine.sampling.uniform import uniform

__all__ = ["Sampled", "SamplingRow", "TokenLogprob", "non_finite_rows", "sample", "token_logprobs"]

_SMALLEST_TEMPERATURE = 1e-30
"""In float32 a smaller one could be 0, which is greedy: ties would no longer be drawn at random."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRow:
    """What one row of logits is sampled with.

    Attributes:
        params: its ``seed`` is not read here, and its bias and penalties only in ``changes``.
        seed: resolved, in [0, 2^64).
        step: index of the output token; the random number is a function of (seed, step).
        changes: bias and penalties; None without any.
        forbid: ids that may not come next, e.g. EOS before ``min_new_tokens``.
        allowed: bool [V], ids that may come next; None means all.
        num_logprobs: None for no log-probability, 0 for the token's own, k for the k most likely too.
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
    """One token per row, and its log-probability from the raw logits if requested.

    Attributes:
        token_ids: −1 for a row that failed.
        logprobs: None where none was requested.
        failures: the rows that failed, and why; they do not affect the other rows.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    failures: Mapping[int, Exception] = field(default_factory=dict)


def sample(logits: Tensor, rows: Seq[SamplingRow], kernels: Kernels[Any, Any]) -> Sampled:
    """Choose one token per row.

    Bias, penalties, forbidden ids, temperature, top_k, top_p, min_p, typical_p, in this order; then the token
    at which the cumulative probability, in order of ids, passes ``uniform(seed, step)``. At temperature 0 the
    largest logit, the smallest id among equals.

    Args:
        logits: [M, V] float32, finite.
        rows: M of them.
        kernels: the backend that chooses.

    A row fails on its own: with ``NoTokenAllowedError`` if nothing is left to choose from, with ``IndexError`` if an id
    is outside the vocabulary, or with whatever else it raises.

    Raises:
        ValueError: not M rows.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
    chosen: list[int | Exception]
    if all(row.is_plain_greedy for row in rows):
        chosen = logits.numpy().argmax(axis=1).tolist()
    else:
        chosen = _choose(logits, rows, kernels)
    logprobs: list[TokenLogprob | None] = [None] * len(rows)
    asking = [
        index
        for index, row in enumerate(rows)
        if row.num_logprobs is not None and isinstance(chosen[index], int)
    ]
    for index, logprob in zip(asking, _logprobs(logits, asking, rows, chosen, kernels), strict=True):
        if isinstance(logprob, Exception):
            chosen[index] = logprob
        else:
            logprobs[index] = logprob
    return Sampled(
        [token if isinstance(token, int) else -1 for token in chosen],
        logprobs,
        {index: token for index, token in enumerate(chosen) if isinstance(token, Exception)},
    )


def _choose(logits: Tensor, rows: Seq[SamplingRow], kernels: Kernels[Any, Any]) -> list[int | Exception]:
    """Each row's token, or why it has none."""
    try:
        token_ids = kernels.choose(logits, _choices(logits, rows)).tolist()
    except Exception as error:  # noqa: BLE001 whatever it is, it must end its own row alone
        if len(rows) == 1:
            return [error]
        return [_choose(logits[i : i + 1], [row], kernels)[0] for i, row in enumerate(rows)]
    return [NoTokenAllowedError() if token_id < 0 else token_id for token_id in token_ids]


def _logprobs(
    logits: Tensor,
    asking: Seq[int],
    rows: Seq[SamplingRow],
    chosen: Seq[int | Exception],
    kernels: Kernels[Any, Any],
) -> list[TokenLogprob | Exception]:
    """The requested log-probability of each token, or why it has none."""
    if not asking:
        return []
    nums = [rows[index].num_logprobs or 0 for index in asking]
    targets = [token for index in asking if isinstance(token := chosen[index], int)]
    try:
        own = logits if len(asking) == logits.shape[0] else logits[list(asking)]
        found = token_logprobs(own, targets, max(nums), kernels)
        return [
            replace(each, top_ids=each.top_ids[:num], top_logprobs=each.top_logprobs[:num])
            for each, num in zip(found, nums, strict=True)
        ]
    except Exception as error:  # noqa: BLE001 whatever it is, it must end its own row alone
        if len(asking) == 1:
            return [error]
        return [_logprobs(logits, [index], rows, chosen, kernels)[0] for index in asking]


def non_finite_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of [M, V] float32 that hold a NaN or an infinity.

    A row's sum is not finite if any of its values isn't, which takes one pass to check; only rows whose sum isn't
    finite are then examined closely, since large finite values can overflow as well.
    """
    suspects = torch.nonzero(~torch.isfinite(logits.sum(dim=1))).flatten().tolist()
    return [row for row in suspects if not bool(torch.isfinite(logits[row]).all())]


def _choices(logits: Tensor, rows: Seq[SamplingRow]) -> Choices:
    params = [row.params for row in rows]
    edits = [_edits(logits, index, row) for index, row in enumerate(rows)]
    masks = [row.allowed for row in rows if row.allowed is not None]
    return Choices(
        temperature=torch.tensor([_temperature(p) for p in params], dtype=torch.float32),
        top_k=torch.tensor([min(p.top_k, logits.shape[1]) for p in params], dtype=torch.int64),
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
    """The tokens of a row whose logits change, and their new values; forbidden ones come last, and so win.

    Raises:
        IndexError: one is not a token.
        ValueError: the mask is not one of this vocabulary.
    """
    size = logits.shape[1]
    if row.allowed is not None and row.allowed.shape != (size,):
        raise ValueError(f"a mask of shape {tuple(row.allowed.shape)} for a vocabulary of {size}")
    ids, values = _NO_IDS, _NO_VALUES
    if row.changes is not None:
        ids, values = row.changes.applied(logits[index].numpy())
    if row.forbid:
        ids = np.concatenate([ids, np.array(row.forbid, np.int64)])
        values = np.concatenate([values, np.full(len(row.forbid), -np.inf, np.float32)])
    outside = ids[(ids < 0) | (ids >= size)]  # the kernels check no index
    if outside.size:
        raise IndexError(f"token id {outside[0]} is outside the vocabulary of {size}")
    return ids, values


def _temperature(params: SamplingParams) -> float:
    return 0.0 if params.is_greedy else max(params.temperature, _SMALLEST_TEMPERATURE)


def _mask_rows(rows: Seq[SamplingRow]) -> list[int]:
    """The index of each row's mask; -1 for none."""
    numbers = iter(range(len(rows)))
    return [-1 if row.allowed is None else next(numbers) for row in rows]
