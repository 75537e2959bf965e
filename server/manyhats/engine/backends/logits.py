"""The logits of a forward on the host, and what is computed from them there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.choosing import Chooser, token_logprobs
from manyhats.engine.backends.wants import Array, Choices, Outcome, Targets, Token, TokenLogprob, Wants


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A ``Pending`` whose outcome is already there."""

    outcome: Outcome

    def result(self) -> Outcome:
        """The outcome."""
        return self.outcome


class HostLogits:
    """``Logits`` [M, V] float32 in host memory.

    Args:
        values: the logits.
        chooser: what chooses tokens and finds log-probabilities.
        wanted: hidden values to return, [H, E] float32; None for none.
    """

    def __init__(self, values: Tensor, chooser: Chooser, wanted: Tensor | None = None) -> None:
        self.values = values
        self._wanted = torch.empty(0, 0) if wanted is None else wanted
        self._chooser = chooser

    @torch.inference_mode()
    def finish(self, wants: Wants) -> Finished:
        """Compute everything at once."""
        return self._finish(wants)

    def _finish(self, wants: Wants) -> Finished:
        values = self.values.numpy()
        whole = values[wants.whole] if wants.whole.size else values[:0]
        bad = self._non_finite_rows()
        if bad:
            self.values[bad] = 0.0  # the kernels require finite ones
        return Finished(
            Outcome(
                tokens=self._chosen(wants.choices),
                targets=self._found(wants.targets),
                whole=whole,
                hidden=self._wanted.numpy().copy(),
                bad_rows=frozenset(bad),
            )
        )

    def _non_finite_rows(self) -> list[int]:
        return non_finite_rows(self.values)

    def _chosen(self, choices: Choices) -> list[Token]:
        if not choices.num_rows:
            return []
        logits = self._rows(choices.rows)
        if _is_plain_greedy(choices):
            token_ids = logits.numpy().argmax(axis=1)
        else:
            token_ids = self._chooser.choose(logits, choices).numpy()
        wanted = choices.num_logprobs >= 0
        if not wanted.any():
            return [Token(token_id) for token_id in token_ids.tolist()]
        asking = np.flatnonzero(wanted & (token_ids >= 0))
        found = self._found(Targets(choices.rows[asking], token_ids[asking], choices.num_logprobs[asking]))
        logprobs = dict(zip(asking.tolist(), found, strict=True))
        return [Token(token_id, logprobs.get(index)) for index, token_id in enumerate(token_ids.tolist())]

    def _found(self, targets: Targets) -> list[TokenLogprob]:
        """The log-probability of each target; those with the same ``num_top`` are computed together."""
        if not targets.ids.size:
            return []
        found: dict[int, TokenLogprob] = {}
        for num_top in np.unique(targets.num_top).tolist():
            places = np.flatnonzero(targets.num_top == num_top)
            rows, own = np.unique(targets.rows[places], return_inverse=True)
            each = token_logprobs(self._rows(rows), targets.ids[places], num_top, self._chooser, own)
            found.update(zip(places.tolist(), each, strict=True))
        return [found[place] for place in range(len(targets.ids))]

    def _rows(self, rows: Array) -> Tensor:
        """Some rows of the logits; not copied if they are contiguous."""
        if len(rows) == self.values.shape[0] == 1:
            return self.values
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all()):
            return self.values[first : last + 1]
        return self.values[torch.from_numpy(np.asarray(rows)).long()]


def non_finite_rows(logits: Tensor) -> list[int]:
    """Indices of the rows of [M, V] float32 that hold a NaN or an infinity.

    A row's sum is not finite if any of its values isn't, which costs one pass; rows whose sum isn't are then checked
    value by value, since large finite values can overflow too.
    """
    rows = logits.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        sums = rows.sum(axis=1)
    suspects = np.flatnonzero(~np.isfinite(sums)).tolist()
    return [row for row in suspects if not np.isfinite(rows[row]).all()]


def _is_plain_greedy(choices: Choices) -> bool:
    """Whether each row chooses the largest of its raw logits."""
    return bool((choices.temperature == 0).all() and not choices.edit_ids.size and not choices.masks.size)
