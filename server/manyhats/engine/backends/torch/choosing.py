"""How the torch backend chooses tokens: each row by itself, in float64, with whole sorts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from manyhats.engine.backends.choosing import Logprobs
from manyhats.engine.backends.wants import Choices

_LARGEST = 1e30


class TorchChooser:
    """``Chooser`` on the host."""

    def choose(self, logits: Tensor, choices: Choices) -> Tensor:
        """One token for each row."""
        tokens = [choose_row(row, choices, index) for index, row in enumerate(logits)]
        return torch.tensor(tokens, dtype=torch.int64)

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
        """Log-probabilities of targets, with ranks, and each row's most likely tokens."""
        return logprobs_of(logits, rows, targets, num_top)


def choose_row(logits: Tensor, choices: Choices, row: int) -> int:
    """The token of one row of logits [V]; −1 where none is allowed."""
    values = logits.double()
    for edit in range(int(choices.edit_start[row]), int(choices.edit_start[row + 1])):
        values[choices.edit_ids[edit]] = edited(logits, choices, row, edit)
    if choices.mask_rows[row] >= 0:
        mask = choices.masks[choices.mask_rows[row]]
        for token in range(len(values)):
            if not mask[token // 32] >> token % 32 & 1:
                values[token] = -torch.inf
    if values.max() == -torch.inf:
        return -1
    if choices.temperature[row] == 0:
        return int((values == values.max()).nonzero()[0])
    scaled = (values - values.max()) / float(choices.temperature[row])
    ids = passing(
        scaled,
        int(choices.top_k[row]),
        float(choices.top_p[row]),
        float(choices.min_p[row]),
        float(choices.typical_p[row]),
    )
    cumulative = torch.softmax(scaled[ids], 0).cumsum(0)
    return int(ids[min(int((cumulative <= float(choices.point[row])).sum()), len(ids) - 1)])


def edited(logits: Tensor, choices: Choices, row: int, edit: int) -> float:
    """The logit of one edit's token after bias and penalties, each rounded to float32."""
    value = np.float32(logits[choices.edit_ids[edit]]) + choices.edit_bias[edit]
    factor = float(choices.repetition_penalty[row])
    if choices.edit_seen[edit] and factor != 1.0:
        wide = float(value) / factor if value > 0 else float(value) * factor
        value = np.float32(min(max(wide, -_LARGEST), _LARGEST))
    count = float(choices.edit_counts[edit])
    penalty = (
        float(choices.presence_penalty[row]) * (count > 0) + float(choices.frequency_penalty[row]) * count
    )
    return float(value - np.float32(penalty))


def passing(x: Tensor, top_k: int, top_p: float, min_p: float, typical_p: float) -> Tensor:
    """The ids that pass the filters, ascending; x [V] are logits up to a constant, −∞ where a token may not come."""
    ids = torch.arange(x.shape[0])
    if 0 < top_k < len(ids):
        ids = ids[x[ids] >= x[ids].sort(descending=True).values[top_k - 1]]
    ids = ids[x[ids] > -torch.inf]
    if top_p < 1:
        ids = ids[shortest(-x[ids], torch.softmax(x[ids], 0), top_p)]
    if min_p > 0:
        p = torch.softmax(x[ids], 0)
        ids = ids[p >= min_p * p.max()]
    if typical_p < 1:
        p = torch.softmax(x[ids], 0)
        surprise = -torch.log_softmax(x[ids], 0)
        entropy = torch.xlogy(p, p).sum().neg()
        ids = ids[shortest((surprise - entropy).abs(), p, typical_p)]
    return ids


def shortest(key: Tensor, p: Tensor, mass: float) -> Tensor:
    """Places, ascending, of the shortest run in order of (key, place) whose probabilities reach ``mass``."""
    order = key.sort(stable=True).indices
    missing = p[order].cumsum(0) < mass
    return order[: int(missing.sum()) + 1].sort().values


def logprobs_of(logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Logprobs:
    """See ``Chooser.logprobs``."""
    values = logits.numpy()
    largest = values.max(axis=1)
    totals = [
        float(top) + math.log(float(np.exp(row - top).sum(dtype=np.float64)))
        for row, top in zip(values, largest, strict=True)
    ]
    pairs = [
        (values[row], float(values[row, target]), totals[row])
        for row, target in zip(rows, targets, strict=True)
    ]
    order = np.argsort(-values, axis=1, kind="stable")[:, :num_top].astype(np.int64)
    top = np.take_along_axis(values, order, axis=1).astype(np.float64) - np.reshape(totals, (-1, 1))
    return Logprobs(
        np.array([value - total for _, value, total in pairs], dtype=np.float64),
        np.array([np.count_nonzero(row > value) + 1 for row, value, _ in pairs], dtype=np.int64),
        order,
        top,
    )
