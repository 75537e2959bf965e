"""How the torch backend finds log-probabilities: row by row in NumPy, with whole sorts."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from manyhats.engine.backends.choosing import Logprobs


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
