"""Evaluation by labels: each item's prompt, and the labels as the continuations that the server's Score takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhats.engine.tokenizer import Tokenizer
from manyhats.trainer.data.dataset import Dataset
from manyhats.trainer.errors import SettingError

AUTO = ("auto",)
MAX_LABELS = 256


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """A prompt as the server tokenizes it, and the label that is right."""

    prompt_token_ids: tuple[int, ...]
    label: str


def find_labels(labels: Sequence[str], train: Dataset) -> tuple[str, ...]:
    """The labels that settings name; of ``("auto",)`` the distinct completions of the training rows, sorted.

    Raises:
        SettingError: a label comes twice or is empty, or there are too many.
        DataError: a training row is a plain text, or has a completion too many.
    """
    if tuple(labels) == AUTO:
        return _distinct_completions(train)
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError("labels", f"{twice[0]!r} comes twice")
    if len(labels) > MAX_LABELS:
        raise SettingError("labels", f"must be at most {MAX_LABELS}, not {len(labels)}")
    return tuple(labels)


def _distinct_completions(train: Dataset) -> tuple[str, ...]:
    found: set[str] = set()
    for index, completion in enumerate(train.completions):
        if not completion:
            raise train.error(index, "has no completion to be a label (labels: auto)")
        found.add(completion)
        if len(found) > MAX_LABELS:
            raise train.error(
                index,
                f"its completion is the {MAX_LABELS + 1}th distinct one; labels: auto takes {MAX_LABELS}",
            )
    return tuple(sorted(found))


def label_token_ids(labels: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each label's tokens after a prompt, as a completion's.

    Raises:
        SettingError: a label has no tokens, or two have the same.
    """
    known: dict[tuple[int, ...], str] = {}
    for label in labels:
        token_ids = tuple(tokenizer.encode(label, add_special_tokens=False))
        if not token_ids:
            raise SettingError("labels", f"{label!r} has no tokens")
        if token_ids in known:
            raise SettingError("labels", f"{known[token_ids]!r} and {label!r} have the same tokens")
        known[token_ids] = label
    return tuple(known)


def labelled_items(dataset: Dataset, labels: Sequence[str]) -> list[LabelledItem]:
    """The rows as items, in order. A truncated row's prompt is what was left of it.

    Raises:
        DataError: a row's completion is none of the labels; names file and line.
    """
    known = set(labels)
    for index, completion in enumerate(dataset.completions):
        if completion not in known:
            shown = completion if len(completion) <= 80 else f"{completion[:80]}…"
            raise dataset.error(index, f"its completion {shown!r} is none of the {len(known)} labels")
    return [
        LabelledItem(dataset.prompt_token_ids(index), completion)
        for index, completion in enumerate(dataset.completions)
    ]
