"""Changes to one row of logits before temperature: bias and penalties of the few tokens that have any."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from manyhats.engine.request import SamplingParams

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

_LARGEST = 1e30
"""Penalties stay within this magnitude, so that differences of logits remain finite in float32."""


def changes_logits(params: SamplingParams) -> bool:
    """Whether bias or penalties are requested."""
    return (
        bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


class LogitChanges:
    """The tokens that one request's bias and penalties touch, updated token by token.

    So a step's cost follows the number of these tokens, not the length of the context.

    Args:
        params: whose bias and penalties are applied.
        prompt_token_ids: for the repetition penalty.
        output_token_ids: for all penalties; ``append`` adds to them.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
    ) -> None:
        self._params = params
        self._places: dict[int, int] = {}
        self._num = 0
        self._ids = np.empty(64, np.int64)
        self._biases = np.empty(64, np.float32)
        self._is_seen = np.empty(64, np.bool_)
        self._counts = np.empty(64, np.float64)
        for token_id, bias in params.logit_bias.items():
            place = self._place(token_id)
            self._biases[place] = bias
        if params.repetition_penalty != 1.0:
            for token_id in prompt_token_ids:
                place = self._place(token_id)
                self._is_seen[place] = True
        for token_id in output_token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Record an output token."""
        place = self._place(token_id)
        self._is_seen[place] = True
        self._counts[place] += 1

    def applied(self, logits: Values) -> tuple[Ids, Values]:
        """The tokens that change, and their logits after bias, repetition, presence and frequency penalties.

        repetition: l / r where l > 0, else l · r, once for each token of prompt or output (arXiv:1909.05858 as
        transformers and vLLM do it); presence: l - p for each token of the output; frequency: l - f · count.

        Args:
            logits: [V] float32, raw.

        Raises:
            IndexError: a token is outside the vocabulary.
        """
        params, n = self._params, self._num
        ids, counts = self._ids[:n], self._counts[:n]
        values: Values = logits[ids] + self._biases[:n]
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            with np.errstate(over="ignore"):
                wide = values.astype(np.float64)
                wide = np.clip(np.where(wide > 0, wide / factor, wide * factor), -_LARGEST, _LARGEST)
            values = np.where(self._is_seen[:n], wide.astype(np.float32), values)
        if params.presence_penalty or params.frequency_penalty:
            values -= (params.presence_penalty * (counts > 0) + params.frequency_penalty * counts).astype(
                np.float32
            )
        return ids, values

    def _place(self, token_id: int) -> int:
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._num
            if place == self._ids.size:
                self._grow()
            self._ids[place], self._biases[place] = token_id, 0.0
            self._is_seen[place], self._counts[place] = False, 0.0
            self._num += 1
        return place

    def _grow(self) -> None:
        size = 2 * self._ids.size
        self._ids, self._biases = np.resize(self._ids, size), np.resize(self._biases, size)
        self._is_seen, self._counts = np.resize(self._is_seen, size), np.resize(self._counts, size)
