"""The tokens of a row whose logits are changed by bias and penalties, before temperature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from manyhats.engine.request import SamplingParams


class Edits(NamedTuple):
    """Tokens whose logits change; ``Choices`` says how.

    Attributes:
        ids: [E] int64.
        bias: [E] float32; -∞ for one that may not come.
        seen: [E] bool, whether it is in prompt or output; prompt tokens only count with a repetition penalty.
        counts: [E] float64, how often it is in the output.
    """

    ids: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float32]
    seen: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.float64]


def forbidding(token_ids: Iterable[int]) -> Edits:
    """Edits after which these tokens cannot come."""
    ids = np.array(tuple(token_ids), np.int64)
    return Edits(
        ids, np.full(ids.size, -np.inf, np.float32), np.zeros(ids.size, np.bool_), np.zeros(ids.size)
    )


def joined(edits: Iterable[Edits]) -> Edits:
    """Sets one after the other, not copied if it is but one; ``NO_EDITS`` if it is none."""
    found = [each for each in edits if each is not NO_EDITS]
    if len(found) <= 1:
        return found[0] if found else NO_EDITS
    return Edits(*map(np.concatenate, zip(*found, strict=True)))


NO_EDITS = forbidding(())
"""No changes."""


def changes_logits(params: SamplingParams) -> bool:
    """Whether bias or penalties are requested."""
    return bool(params.logit_bias) or depends_on_output(params)


def depends_on_output(params: SamplingParams) -> bool:
    """Whether the changes depend on the tokens that came before, as those of penalties do."""
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


class LogitChanges:
    """The tokens that one request's bias and penalties touch, updated token by token.

    So a step's cost follows the number of these tokens, not the length of the context. ``Choices`` says how they
    change a logit.

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

    @property
    def edits(self) -> Edits:
        """The changes as views; the next ``append`` may change them."""
        n = self._num
        return Edits(self._ids[:n], self._biases[:n], self._is_seen[:n], self._counts[:n])

    def edits_after(self, token_ids: Sequence[int]) -> Edits:
        """What the changes would be after these further output tokens, as copies; exactly as ``append`` makes them."""
        new_ids = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self._places]
        new_places = {token_id: self._num + index for index, token_id in enumerate(new_ids)}
        n = len(new_ids)
        new = Edits(np.array(new_ids, np.int64), np.zeros(n, np.float32), np.zeros(n, np.bool_), np.zeros(n))
        edits = joined((self.edits, new))
        for token_id in token_ids:
            place = new_places[token_id] if token_id in new_places else self._places[token_id]
            edits.seen[place] = True
            edits.counts[place] += 1
        return edits

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
