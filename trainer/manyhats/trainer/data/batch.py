"""The input of one forward of the trainer: rows of several lengths, end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One row of the data as tokens.

    Attributes:
        token_ids: [T].
        is_target: for each token, whether the model learns to predict it; never true for the first.
    """

    token_ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    @property
    def num_targets(self) -> int:
        """The number of learned tokens."""
        return sum(self.is_target)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatch:
    """Rows end to end: N tokens in all, M of them learned.

    A beginning that all rows share (a chat template's head) may appear once: it is then the first segment, which the
    others continue. What it computes is the same for all of them, and so are the gradients.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int64, of each token in its row, from 0; virtual tokens are not counted.
        segments: the length of each segment, in order; they add up to N.
        num_shared: the length of the first segment if all others continue it; 0 if not.
        predictors: [M] int64, the places whose next token is learned; the last shared one appears once for each row
            whose first own token is learned.
        targets: [M] int64, those tokens.
        num_row_tokens: tokens of all rows, a shared beginning counted for each; what speed is measured by.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Sequence[int]
    num_shared: int
    predictors: Tensor
    targets: Tensor
    num_row_tokens: int
