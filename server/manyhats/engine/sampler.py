"""Logits and parameters → token ids. Pure: the same arguments give the same tokens.

A row's token depends on that row's logits, parameters, seed and step alone, not on the rows beside it nor on
their number: rows that draw are computed one by one in NumPy, on one thread, each over its own [V] numbers.
Rows that only take the most likely token are done together, by one argmax.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhats.engine.filters import filtered
from manyhats.engine.logprobs import TokenLogprob, row_logprob, token_logprobs
from manyhats.engine.penalties import changes_logits, penalized, restricted
from manyhats.engine.request import SamplingParams
from manyhats.engine.uniform import uniform

__all__ = ["Sampled", "SamplingRow", "TokenLogprob", "non_finite_rows", "sample", "token_logprobs"]

_SMALLEST_TEMPERATURE = np.float32(1e-30)
_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRow:
    """What one row of logits is sampled with.

    Attributes:
        params: its ``seed`` is not read here.
        seed: resolved, in [0, 2^64).
        step: index of the output token; the random number is a function of (seed, step).
        prompt_token_ids: for the repetition penalty; ids in [0, V), as all ids here.
        output_token_ids: for all penalties.
        forbid: ids that may not come, e.g. EOS before ``min_new_tokens``.
        allowed: bool [V], ids that may come; None is all.
        num_logprobs: None wants no log-probability, 0 the token's own, k also the k most likely.
    """

    params: SamplingParams
    seed: int = 0
    step: int = 0
    prompt_token_ids: Seq[int] = ()
    output_token_ids: Seq[int] = ()
    forbid: tuple[int, ...] = ()
    allowed: Tensor | None = None
    num_logprobs: int | None = None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether its token is the most likely one of the raw logits."""
        return (
            self.params.is_greedy
            and not self.forbid
            and self.allowed is None
            and not changes_logits(self.params)
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log-probability from the raw logits where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample(logits: Tensor, rows: Seq[SamplingRow]) -> Sampled:
    """Choose one token per row.

    Bias, penalties, forbidden ids, temperature, top_k, top_p, min_p, typical_p, in this order; then the token
    at which the cumulative probability, in order of ids, passes ``uniform(seed, step)``. At temperature 0 the
    largest logit, the smallest id among equals.

    Args:
        logits: [M, V] float32, finite.
        rows: M of them.

    Raises:
        ValueError: not M rows, or a row that allows no token.
        IndexError: an id outside the vocabulary.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
    values: npt.NDArray[np.float32] = logits.detach().cpu().numpy()
    is_plain = [row.is_plain_greedy for row in rows]
    if all(is_plain):
        token_ids: list[int] = values.argmax(axis=1).tolist() if rows else []
    else:
        token_ids = [
            int(value.argmax()) if plain else _sample_row(value, row)
            for value, row, plain in zip(values, rows, is_plain, strict=True)
        ]
    logprobs = [
        None if row.num_logprobs is None else row_logprob(value, token_id, row.num_logprobs)
        for value, row, token_id in zip(values, rows, token_ids, strict=True)
    ]
    return Sampled(token_ids, logprobs)


def non_finite_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of [M, V] float32 that hold a NaN or an infinity.

    A row's sum is not finite if any of its values isn't, which costs one pass; the rows whose sum isn't are
    then looked at closely, since large finite values can overflow as well.
    """
    suspects = torch.nonzero(~torch.isfinite(logits.sum(dim=1))).flatten().tolist()
    return [row for row in suspects if not bool(torch.isfinite(logits[row]).all())]


def _sample_row(logits: npt.NDArray[np.float32], row: SamplingRow) -> int:
    if changes_logits(row.params):
        logits = penalized(logits, row.params, row.prompt_token_ids, row.output_token_ids)
    if row.forbid or row.allowed is not None:
        allowed = None if row.allowed is None else row.allowed.cpu().numpy()
        logits = restricted(logits, row.forbid, allowed)
    if row.params.is_greedy:
        return int(logits.argmax())
    temperature = max(np.float32(row.params.temperature), _SMALLEST_TEMPERATURE)
    with np.errstate(over="ignore"):  # to -inf, which is a weight of 0
        scaled = (logits - logits.max()) / temperature
    ids, weights = filtered(scaled, row.params)
    chosen = _draw(weights, uniform(row.seed, row.step))
    return chosen if ids is None else int(ids[chosen])


def _draw(weights: npt.NDArray[np.float32], point: float) -> int:
    """The first index whose cumulative weight is over ``point`` of the total; never one of weight 0.

    The block of tokens in which that happens is found by the blocks' sums, the token by float64 sums within
    it: several times faster than cumulating a whole vocabulary.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    held = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    block, target = _first_over(held, point * held[-1])
    inside = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    before = held[block - 1] if block else 0.0
    return int(starts[block]) + _first_over(inside, target - before)[0]


def _first_over(held: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """The first index with held > target, and the target, which rounding may have put at the last of held."""
    target = min(target, float(np.nextafter(held[-1], 0.0)))
    return int(np.searchsorted(held, target, side="right")), target
