"""Changes to one row of logits before temperature: bias, penalties, tokens that may not come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from manyhats.engine.request import SamplingParams

Row = npt.NDArray[np.float32]

_LARGEST = 1e30
"""Penalties stay within this magnitude, so that differences of logits remain finite in float32."""


def changes_logits(params: SamplingParams) -> bool:
    """Whether bias or penalties are asked for."""
    return (
        bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def penalized(
    logits: Row, params: SamplingParams, prompt_token_ids: Seq[int], output_token_ids: Seq[int]
) -> Row:
    """Bias, then repetition, then presence and frequency penalties, on a copy.

    repetition: l / r where l > 0, else l · r, once for each token of prompt or output (arXiv:1909.05858 as
    transformers and vLLM do it); presence: l - p for each token of the output; frequency: l - f · count.

    Args:
        logits: [V] float32, raw.
        params: whose bias and penalties are applied.
        prompt_token_ids: in [0, V).
        output_token_ids: in [0, V).

    Raises:
        IndexError: an id is outside the vocabulary.
    """
    row = logits.copy()
    if params.logit_bias:
        row[_ids(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
    if params.repetition_penalty != 1.0:
        ids = _ids({*prompt_token_ids, *output_token_ids})
        values = row[ids].astype(np.float64)
        factor = params.repetition_penalty
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / factor, values * factor)
        row[ids] = np.clip(values, -_LARGEST, _LARGEST)
    if (params.presence_penalty or params.frequency_penalty) and output_token_ids:
        counts = Counter(output_token_ids)
        times = np.fromiter(counts.values(), np.float64)
        row[_ids(counts)] -= (params.presence_penalty + params.frequency_penalty * times).astype(np.float32)
    return row


def restricted(logits: Row, forbid: Seq[int], allowed: npt.NDArray[np.bool_] | None) -> Row:
    """A copy with -inf where a token may not come.

    Args:
        logits: [V] float32.
        forbid: ids in [0, V).
        allowed: [V], or None for all.

    Raises:
        ValueError: no token is left.
        IndexError: an id is outside the vocabulary.
    """
    row = logits.copy() if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
    row[_ids(forbid)] = -np.inf
    if row.max() == -np.inf:
        raise ValueError("no token is allowed to come next")
    return row


def _ids(ids: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.fromiter(ids, np.int64)
