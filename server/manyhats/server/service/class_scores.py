"""Scores of classes: what a task makes of its head's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from manyhats.adapters.heads import ScoreActivation
from manyhats.adapters.reserved_labels import class_names, read_activation
from manyhats.server.service.text_threads import ENTRY_WEIGHT, paced

if TYPE_CHECKING:
    from manyhats.adapters.artifact import AdapterRecord
    from manyhats.engine.output import EncodeOutput


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One label's score, and the logit that it comes from."""

    label: str
    index: int
    score: float
    logit: float


@dataclass(frozen=True, slots=True)
class Scored:
    """The labels of one text, or of one token, best first."""

    classes: tuple[ClassScore, ...]


def num_scores(output: EncodeOutput, top_k: int) -> int:
    """How many scores an answer tells of all rows together."""
    num_labels = int(output.values[0].shape[1])
    return sum(map(len, output.values)) * min(top_k or num_labels, num_labels)


def scored_rows(
    adapter: AdapterRecord, logits: npt.NDArray[np.float32], raw_scores: bool, top_k: int
) -> tuple[Scored, ...]:
    """The labels of each row of logits, best first; of equal ones the first."""
    names = class_names(adapter.labels, logits.shape[1])
    values = logits.astype(np.float64)
    scores = values if raw_scores else activated(values, adapter)
    rows = zip(np.argsort(-values, axis=1, kind="stable"), scores, values, strict=True)
    return tuple(
        Scored(
            tuple(
                ClassScore(names[index], index, float(row_scores[index]), float(row[index]))
                for index in order[: top_k or None].tolist()
            )
        )
        for order, row_scores, row in paced(rows, lambda each: ENTRY_WEIGHT * len(each[0]))
    )


def activated(logits: npt.NDArray[np.float64], adapter: AdapterRecord) -> npt.NDArray[np.float64]:
    """What the task makes of its logits [rows, labels]."""
    own = ScoreActivation.NONE if logits.shape[1] == 1 else ScoreActivation.SOFTMAX
    activation = read_activation(adapter.labels) or own
    if activation is ScoreActivation.NONE:
        return logits
    if activation is ScoreActivation.SIGMOID:
        return sigmoid(logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``1 / (1 + exp(-x))``."""
    small = np.exp(-np.abs(x))  # never overflows
    values: npt.NDArray[np.float64] = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return values
