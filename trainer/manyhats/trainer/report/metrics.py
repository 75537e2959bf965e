"""How good answers are: accuracy, F1, and the places of right texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manyhats.adapters.tags import OUTSIDE, are_tags, tagged_entities
from manyhats.trainer.data.head_tokens import NOTHING

Metrics = dict[str, float]
"""By name: ``accuracy``, ``f1``, ``mrr`` or ``pearson``."""


def of_classes(predicted: NDArray[np.int64], right: NDArray[np.int64]) -> Metrics:
    """The share of right classes, and the mean F1 of the classes that occur."""
    return {"accuracy": float((predicted == right).mean()), "f1": macro_f1(predicted, right)}


def of_class_sets(predicted: NDArray[np.bool_], right: NDArray[np.bool_]) -> Metrics:
    """Of sets of classes, [rows, classes]: the share of rows with all of them right, and the mean F1 of the classes."""
    scores = [
        _f1(
            int((own & wanted).sum()),
            int((own & ~wanted).sum()),
            int((~own & wanted).sum()),
        )
        for own, wanted in zip(predicted.T, right.T, strict=True)
        if own.any() or wanted.any()
    ]
    return {
        "accuracy": float((predicted == right).all(axis=1).mean()),
        "f1": sum(scores) / len(scores) if scores else 0.0,
    }


def of_numbers(predicted: NDArray[np.float64], right: NDArray[np.float64]) -> Metrics:
    """Pearson's correlation, where both vary."""
    if len(right) < 2 or not (predicted.std() and right.std()):
        return {}
    return {"pearson": float(np.corrcoef(predicted, right)[0, 1])}


def of_tags(
    predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]], names: Sequence[str]
) -> Metrics:
    """Of the classes of words: the share that is right; and the F1 of entities, or of classes that make none.

    Args:
        predicted: of each row's words; ``NOTHING`` for a word that has none.
        right: likewise.
        names: of the classes; B-X and I-X make entities.
    """
    pairs = [
        (own, wanted) for row in zip(predicted, right, strict=True) for own, wanted in zip(*row, strict=True)
    ]
    accuracy = sum(own == wanted for own, wanted in pairs) / len(pairs)
    if not are_tags(names):
        return {"accuracy": accuracy, "f1": macro_f1(*(np.array(each) for each in zip(*pairs, strict=True)))}
    found, wanted = (
        {
            (row, entity)
            for row, tags in enumerate(rows)
            for entity in tagged_entities([OUTSIDE if tag == NOTHING else names[tag] for tag in tags])
        }
        for rows in (predicted, right)
    )
    hits = len(found & wanted)
    return {"accuracy": accuracy, "f1": _f1(hits, len(found) - hits, len(wanted) - hits)}


def of_ranks(ranks: Sequence[int]) -> Metrics:
    """Of the places of right answers, from 1: the share that is first, and the mean of 1 / place."""
    return {
        "accuracy": sum(rank == 1 for rank in ranks) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
    }


def macro_f1(predicted: NDArray[np.int64], right: NDArray[np.int64]) -> float:
    """The mean F1 of the classes that are predicted or right somewhere."""
    hits = Counter(right[predicted == right].tolist())
    found, wanted = Counter(predicted.tolist()), Counter(right.tolist())
    classes = {*found, *wanted} - {NOTHING}
    scores = [_f1(hits[each], found[each] - hits[each], wanted[each] - hits[each]) for each in classes]
    return sum(scores) / len(scores)


def _f1(hits: int, wrong: int, missed: int) -> float:
    """``2 hits / (2 hits + wrong + missed)``; 1 if there is nothing to find and nothing was found."""
    total = 2 * hits + wrong + missed
    return 2 * hits / total if total else 1.0
