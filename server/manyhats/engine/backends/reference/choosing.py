"""How the reference backend chooses tokens: each row by itself, in float64, with whole sorts."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhats.engine.backends.choices import Choices


def choose_row(logits: Tensor, choices: Choices, row: int) -> int:
    """The token of one row of logits [V]; −1 where none is allowed."""
    values = logits.double()
    for edit in range(int(choices.edit_start[row]), int(choices.edit_start[row + 1])):
        values[choices.edit_ids[edit]] = choices.edit_values[edit].double()
    if choices.mask_rows[row] >= 0:
        values[~choices.masks[choices.mask_rows[row]]] = -torch.inf
    if values.max() == -torch.inf:
        return -1
    if choices.temperature[row] == 0:
        return int((values == values.max()).nonzero()[0])
    scaled = (values - values.max()) / choices.temperature[row].double()
    ids = passing(
        scaled,
        int(choices.top_k[row]),
        float(choices.top_p[row]),
        float(choices.min_p[row]),
        float(choices.typical_p[row]),
    )
    cumulative = torch.softmax(scaled[ids], 0).cumsum(0)
    return int(ids[min(int((cumulative <= choices.point[row]).sum()), len(ids) - 1)])


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
