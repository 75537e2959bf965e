"""Log-probabilities of tokens, their ranks, and the most likely tokens, on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_VALUES = 1 << 24
"""Of logits at a time, which bounds what sorting them takes."""


def logprobs_of(
    logits: Tensor, rows: Tensor, ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``log softmax(logits)[rows[i], ids[i]]``, and what ``TokenLogprob`` has besides.

    Args:
        logits: [M, V] float32.
        rows: [P] int64.
        ids: [P] int64 in [0, V).
        num_top: K, at most V.

    Returns:
        [P] float64, natural; [P] int64, 1 + how many tokens are strictly more likely; [P, K] int64, the most likely
        tokens, best first, ties by id; [P, K] float64, theirs.
    """
    parts = list(_parts(logits, rows, ids, num_top))
    first, second, third, fourth = (torch.cat(each) for each in zip(*parts, strict=True))
    return first, second, third, fourth


def _parts(
    logits: Tensor, rows: Tensor, ids: Tensor, num_top: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    size = max(1, _MAX_VALUES // logits.shape[1])
    for some, own in zip(rows.split(size), ids.split(size), strict=True):
        values = logits.index_select(0, some)
        wanted = values.gather(1, own.unsqueeze(1))
        largest = values.amax(dim=1, keepdim=True)
        total = largest.double() + torch.exp(values - largest).sum(1, keepdim=True, dtype=torch.float64).log()
        rank = (values > wanted).sum(dim=1) + 1
        if num_top:
            ordered, order = values.sort(dim=1, descending=True, stable=True)
            top, top_ids = ordered[:, :num_top], order[:, :num_top]
        else:
            top, top_ids = values[:, :0], ids.new_empty(len(some), 0)
        yield (wanted.double() - total).squeeze(1), rank, top_ids, top.double() - total
