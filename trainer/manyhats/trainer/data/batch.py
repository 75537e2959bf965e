"""The input of one forward of the trainer: rows of several lengths, end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from manyhats.engine.text.tokenizer import ReadText


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
    def num_tokens(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """The number of learned tokens."""
        return sum(self.is_target)


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One row of the data of a task that reads texts.

    Attributes:
        texts: at least one; a query, its answer and other texts, if vectors are learned.
        targets: what the head's outputs should be: a class's index, a number, a 0 or 1 for each class, or for each
            token its class's index or ``IGNORED``. Empty if vectors are learned.
        num_targets: how many terms of the loss it has.
    """

    texts: tuple[ReadText, ...]
    targets: tuple[float, ...]
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(len(text.token_ids) for text in self.texts)


IGNORED = -100
"""The class of tokens that are not learned."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TextBatch:
    """Texts end to end: N tokens in all.

    A beginning that all texts share (a chat template's head) may appear once: it is then the first segment, which the
    others continue. What it computes is the same for all of them, and so are the gradients.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int64, of each token in its text, from 0; virtual tokens are not counted.
        segments: the length of each segment, in order; they add up to N.
        num_shared: the length of the first segment if all others continue it; 0 if not.
        num_row_tokens: tokens of all texts, a shared beginning counted for each; what speed is measured by.
        token_types: [N] int64; None if all are 0.
    """

    token_ids: Tensor
    positions: Tensor
    segments: Sequence[int]
    num_shared: int
    num_row_tokens: int
    token_types: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingBatch(TextBatch):
    """Rows of which M tokens are learned.

    Attributes:
        predictors: [M] int64, the places whose next token is learned; the last shared one appears once for each row
            whose first own token is learned.
        targets: [M] int64, those tokens.
    """

    predictors: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ReadBatch(TextBatch):
    """Rows of texts that are read.

    Attributes:
        num_texts: of each row.
        targets: float32, of all rows, one after the other.
    """

    num_texts: tuple[int, ...]
    targets: Tensor


TrainingRow = TokenizedRow | ReadRow


def batch_of(rows: Sequence[TrainingRow]) -> TrainingBatch | ReadBatch:
    """At least one row as a batch, all of one kind."""
    read = [row for row in rows if isinstance(row, ReadRow)]
    return collate_read(read) if read else collate([row for row in rows if isinstance(row, TokenizedRow)])


def collate_read(rows: Sequence[ReadRow]) -> ReadBatch:
    """At least one row as a batch; nothing is shared."""
    texts = [text for row in rows for text in row.texts]
    segments = tuple(len(text.token_ids) for text in texts)
    types = None
    if any(text.token_types for text in texts):
        all_types = (text.token_types or (0,) * len(text.token_ids) for text in texts)
        types = torch.tensor(list(chain.from_iterable(all_types)), dtype=torch.int64)
    return ReadBatch(
        token_ids=torch.tensor(
            list(chain.from_iterable(text.token_ids for text in texts)), dtype=torch.int64
        ),
        positions=torch.cat([torch.arange(length) for length in segments]),
        segments=segments,
        num_shared=0,
        num_row_tokens=sum(segments),
        token_types=types,
        num_texts=tuple(len(row.texts) for row in rows),
        targets=torch.tensor([target for row in rows for target in row.targets], dtype=torch.float32),
    )


def collate(rows: Sequence[TokenizedRow], *, share_beginning: bool = True) -> TrainingBatch:
    """At least one row as a batch.

    Args:
        rows: of any lengths.
        share_beginning: keep only one copy of the tokens that all rows begin with, as long as none of them is learned
            and each row keeps at least one token of its own. Several rows may then be predicted from the last of
            them: ``predictors`` has it once for each.
    """
    shared = shared_length(rows) if share_beginning and len(rows) > 1 else 0
    token_ids = list(rows[0].token_ids[:shared])
    positions = list(range(shared))
    segments = [shared] if shared else []
    predictors: list[int] = []
    targets: list[int] = []
    for row in rows:
        # Where the row's first token would be if its beginning were here too.
        origin = len(token_ids) - shared
        places = [place for place, is_target in enumerate(row.is_target) if is_target]
        predictors += [place - 1 if place <= shared else origin + place - 1 for place in places]
        targets += [row.token_ids[place] for place in places]
        token_ids += row.token_ids[shared:]
        positions += range(shared, len(row.token_ids))
        segments.append(len(row.token_ids) - shared)
    return TrainingBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        segments=tuple(segments),
        num_shared=shared,
        predictors=torch.tensor(predictors, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        num_row_tokens=sum(len(row.token_ids) for row in rows),
    )


def shared_length(rows: Sequence[TokenizedRow]) -> int:
    """How many leading tokens all rows share: none learned, and each row keeps one of its own."""
    first = rows[0].token_ids
    limit = min(_limit(row) for row in rows)
    for length in range(limit):
        if any(row.token_ids[length] != first[length] for row in rows):
            return length
    return limit


def _limit(row: TokenizedRow) -> int:
    first_target = row.is_target.index(True) if True in row.is_target else len(row.is_target)
    return min(first_target, len(row.token_ids) - 1)
