"""Where the texts of a batch are in its stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhats.trainer.data.batch import TextBatch


@dataclass(frozen=True, slots=True, eq=False)
class TextPlaces:
    """The rows of B texts in a stream, in which virtual tokens may lie ahead of each text.

    Attributes:
        num_ahead: how many.
        first: [B] int64, each text's first row, which may be a virtual token's.
        tokens: [N] int64, the rows of the texts' own tokens.
    """

    num_ahead: int
    first: Tensor
    tokens: Tensor

    def last(self, batch: TextBatch, skipped_token_id: int | None) -> Tensor:
        """[B] int64, the row of each text's last token that is not ``skipped_token_id``; its first if all are."""
        ends = torch.tensor(batch.segments).cumsum(0) - 1
        starts = [0, *(ends[:-1] + 1).tolist()]
        if skipped_token_id is None:
            return self.tokens[ends]
        ids = batch.token_ids.tolist()
        found = (
            next((place for place in range(end, start - 1, -1) if ids[place] != skipped_token_id), start)
            for start, end in zip(starts, ends.tolist(), strict=True)
        )
        return self.tokens[list(found)]


def text_places(batch: TextBatch, num_ahead: int) -> TextPlaces:
    """The places of a batch's texts behind ``num_ahead`` virtual tokens each."""
    lengths = torch.tensor(batch.segments)
    first = lengths.cumsum(0) - lengths + num_ahead * torch.arange(len(lengths))
    ahead = num_ahead * torch.arange(1, len(lengths) + 1)
    tokens = torch.arange(int(lengths.sum())) + torch.repeat_interleave(ahead, lengths)
    return TextPlaces(num_ahead, first, tokens)
