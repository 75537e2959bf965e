"""Evaluation by labels: each item's prompt, and the labels as continuations, as for the server's Score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from manyhats.engine.text.prompt_text import Continuation, ScoreTokens, score_tokens
from manyhats.trainer.data.dataset import Dataset, LabelTokens
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import SettingError

AUTO = ("auto",)
MAX_LABELS = 256


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """A prompt as the server tokenizes it, the labels after it, and the right one.

    Attributes:
        labels: each label's tokens and its end, in the labels' order; the end is part of a label, so that a label
            differs from one it is a prefix of.
    """

    prompt_token_ids: tuple[int, ...]
    labels: tuple[LabelTokens, ...]
    label: str

    @property
    def score_tokens(self) -> ScoreTokens:
        """The prompt and the labels, to be scored together."""
        length = len(self.prompt_token_ids)
        together = score_tokens(
            self.prompt_token_ids,
            [Continuation(length - each.num_taken, each.token_ids) for each in self.labels],
        )
        return replace(
            together,
            num_given=tuple(
                number + each.num_given for number, each in zip(together.num_given, self.labels, strict=True)
            ),
        )

    @property
    def num_tokens(self) -> int:
        """The tokens of the prompt with the longest label."""
        return max(len(self.prompt_token_ids) - each.num_taken + len(each.token_ids) for each in self.labels)


def find_labels(labels: Sequence[str], train: Dataset) -> tuple[str, ...]:
    """The labels in the settings; for ``("auto",)`` the distinct completions of the training rows, sorted.

    Raises:
        SettingError: a label appears twice or is empty, or there are too many.
        DataError: a training row is a plain text, or there are too many distinct completions.
    """
    if tuple(labels) == AUTO:
        return _distinct_completions(train)
    check_distinct(labels)
    return tuple(labels)


def check_distinct(labels: Sequence[str]) -> None:
    """Check labels that are given.

    Raises:
        SettingError: one appears twice, or there are too many.
    """
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise SettingError("labels", f"{twice[0]!r} appears twice")
    if len(labels) > MAX_LABELS:
        raise SettingError("labels", f"must be at most {MAX_LABELS}, not {len(labels)}")


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


def check_label(row: Row, completion: str, labels: Sequence[str]) -> None:
    """Check without a tokenizer that a completion, whose text may include an end, can be one of the labels.

    Raises:
        DataError: it is not one.
    """
    if labels and tuple(labels) != AUTO and not completion.startswith(tuple(labels)):
        raise row.error(none_of_labels(completion, len(set(labels))))


def none_of_labels(completion: str, num_labels: int) -> str:
    """What is wrong with a completion that is not a label."""
    shown = completion if len(completion) <= 80 else f"{completion[:80]}…"
    return (
        f"its completion {shown!r} is not one of the {num_labels} labels"
        if num_labels > 1
        else (f"its completion {shown!r} is not the one label")
    )


def labelled_items(dataset: Dataset, labels: Sequence[str]) -> list[LabelledItem]:
    """The rows as items, in order. A truncated row's prompt is what was left of it.

    Raises:
        DataError: a row's completion is not one of the labels; names file and line.
    """
    known = set(labels)
    for index, completion in enumerate(dataset.completions):
        if completion not in known:
            raise dataset.error(index, none_of_labels(completion, len(known)))
    return [
        LabelledItem(dataset.prompt_token_ids(index), dataset.labels[index], completion)
        for index, completion in enumerate(dataset.completions)
    ]
