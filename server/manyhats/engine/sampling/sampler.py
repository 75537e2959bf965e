"""From rows' parameters to how they choose their tokens. The same arguments and logits give the same tokens.

A row's token depends only on that row's logits, parameters, seed and step, not on other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhats.engine.backends.wants import Array, Choices
from manyhats.engine.request import SamplingParams
from manyhats.engine.sampling.penalties import NO_EDITS, Edits, forbidding, joined

_SMALLEST_TEMPERATURE = 1e-30
"""In float32 a smaller one could be 0, which is greedy: ties would no longer be drawn at random."""

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRow:
    """What one row of logits is sampled with.

    Bias, penalties, forbidden ids, temperature, top_k, top_p, min_p, typical_p, in this order; then the token
    at which the cumulative probability, in order of ids, passes ``uniform(seed, step)``. At temperature 0 the
    largest logit, the smallest id among equals.

    Attributes:
        params: its ``seed`` is not read here, and its bias and penalties only in ``edits``.
        seed: resolved, in [0, 2^64).
        step: index of the output token; the random number is a function of (seed, step).
        edits: of bias and penalties.
        forbid: ids that may not come, e.g. EOS before ``min_new_tokens``.
        allowed: [⌈V / 32⌉] int32, ids that may come, bit by bit from the lowest; None for all.
        num_logprobs: None for no log-probabilities, 0 for the token's own, k for the k most likely too.
    """

    params: SamplingParams
    seed: int = 0
    step: int = 0
    edits: Edits = NO_EDITS
    forbid: tuple[int, ...] = ()
    allowed: npt.NDArray[np.int32] | None = None
    num_logprobs: int | None = None


def check_row(row: SamplingRow, vocab_size: int) -> None:
    """Check a row against the vocabulary: backends do not check indices.

    Raises:
        IndexError: an id is outside the vocabulary.
        ValueError: the mask does not fit this vocabulary.
    """
    num_words = -(-vocab_size // 32)
    if row.allowed is not None and row.allowed.shape != (num_words,):
        raise ValueError(f"a mask of shape {tuple(row.allowed.shape)} for a vocabulary of {vocab_size}")
    edits = _edits(row)
    if edits is NO_EDITS:
        return
    ids = edits.ids
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise IndexError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")


def fitted(mask: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.int32]:
    """A mask for a vocabulary: tokens that it says nothing of may not come."""
    num_words = -(-vocab_size // 32)
    if mask.shape[0] == num_words:
        return mask
    result = np.zeros(num_words, dtype=np.int32)
    common = min(num_words, mask.shape[0])
    result[:common] = mask[:common]
    return result


def choices_of(rows: Seq[SamplingRow], logit_rows: Seq[int], vocab_size: int) -> Choices:
    """How rows choose their tokens; each is checked.

    Args:
        rows: S of them.
        logit_rows: S indices, which rows of the step's logits they are.
        vocab_size: the largest of theirs.
    """
    masks = [fitted(row.allowed, vocab_size) for row in rows if row.allowed is not None]
    edits = [_edits(row) for row in rows]
    all_edits = joined(edits)
    edit_start = np.zeros(len(rows) + 1, dtype=np.int64)
    if all_edits is not NO_EDITS:
        np.cumsum([each.ids.size for each in edits], out=edit_start[1:])
    return Choices(
        rows=np.array(logit_rows, dtype=np.int32),
        **_parameters(_Same(row.params for row in rows), vocab_size),
        point=_array(
            np.float64, [0.0 if row.params.is_greedy else uniform(row.seed, row.step) for row in rows]
        ),
        num_logprobs=_array(np.int32, [-1 if r.num_logprobs is None else r.num_logprobs for r in rows]),
        edit_start=edit_start,
        edit_ids=all_edits.ids,
        edit_bias=all_edits.bias,
        edit_seen=all_edits.seen,
        edit_counts=all_edits.counts,
        mask_rows=_array(np.int64, _mask_rows(rows)),
        masks=np.stack(masks) if masks else np.empty((0, 0), np.int32),
    )


def _edits(row: SamplingRow) -> Edits:
    """The tokens of a row whose logits change; forbidden ones come last, so they win."""
    return joined((row.edits, forbidding(row.forbid))) if row.forbid else row.edits


class _Same:
    """Parameters that are equal only to themselves: rows that go on have theirs from step to step."""

    def __init__(self, params: Iterable[SamplingParams]) -> None:
        self.params = tuple(params)
        self._ids = tuple(map(id, self.params))  # of objects that live as long as this one

    def __hash__(self) -> int:
        return hash(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._ids == other._ids


@functools.lru_cache(maxsize=4)
def _parameters(same: _Same, vocab_size: int) -> Mapping[str, Array]:
    """The arrays of ``Choices`` that hold one number of each row's parameters, not to be written to."""
    params = same.params
    numbers = np.array(
        [
            (
                _temperature(each),
                min(each.top_k, vocab_size),
                each.top_p,
                each.min_p,
                each.typical_p,
                each.repetition_penalty,
                each.presence_penalty,
                each.frequency_penalty,
            )
            for each in params
        ],
        dtype=np.float64,
    ).reshape(len(params), 8)
    temperature, top_k, *others = np.ascontiguousarray(numbers.T)
    top_p, min_p, typical_p, repetition, presence, frequency = others
    return {
        "temperature": temperature.astype(np.float32),
        "top_k": top_k.astype(np.int64),
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }


def _array(dtype: npt.DTypeLike, values: Seq[float]) -> Array:
    return np.array(values, dtype=dtype)


def _temperature(params: SamplingParams) -> float:
    return 0.0 if params.is_greedy else max(params.temperature, _SMALLEST_TEMPERATURE)


def _mask_rows(rows: Seq[SamplingRow]) -> list[int]:
    """The index of each row's mask; -1 for none."""
    numbers = iter(range(len(rows)))
    return [-1 if row.allowed is None else next(numbers) for row in rows]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits for output token ``step`` of a row with this seed.

    SplitMix64, whose state after n draws is start + (n + 1)·γ, started at ``mix(seed + γ)`` so that neighbouring seeds
    are unrelated.

    Args:
        seed: in [0, 2^64).
        step: at least 0.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    start = _mix(seed + _GAMMA)
    return float((_mix(start + (step + 1) * _GAMMA) >> 11) * 2.0**-53)


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
