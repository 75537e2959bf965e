"""Data frames, of pandas or Polars: columns become prompts, and answers become columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias, TypeVar, cast

from manyhats.client.encoding_results import ClassifyResult, Embeddings
from manyhats.client.errors import ManyhatsError
from manyhats.client.fields import invalid
from manyhats.client.requests import OnError
from manyhats.client.results import Generation, ScoreResult

Frame = TypeVar("Frame")
R = TypeVar("R")
Kind: TypeAlias = Literal["text", "integer", "number", "vector"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column to be: its values, None where there is none, and what they are."""

    kind: Kind
    values: Sequence[Any]


def column_of(frame: Any, name: str, path: str) -> list[Any]:
    """The values of a column, which errors name by the argument ``path``.

    Raises:
        InvalidRequestError: this is no data frame, or it does not have one such column.
    """
    _library_of(frame)
    names = list(frame.columns)
    if names.count(name) != 1:
        raise invalid(path, f"the frame must have one column {name!r}; it has {', '.join(map(str, names))}")
    return list(frame[name].to_list())


def with_answers(
    frame: Frame, into: str, answers: Sequence[Generation | ManyhatsError], on_error: OnError
) -> Frame:
    """A copy with the answers' texts in the column ``into``, and what else is known of each."""
    found = _without_errors(answers)
    columns = {
        into: Column("text", [each and each.text for each in found]),
        "finish_reason": Column("text", [each and each.finish_reason.value for each in found]),
        "generated_tokens": Column("integer", [each and each.usage.generated_tokens for each in found]),
        "version": Column(
            "integer", [each.adapter.version if each and each.adapter else None for each in found]
        ),
    }
    return _with_columns(frame, columns | _errors(answers, on_error))


def labels_of(labels: Iterable[str]) -> list[str]:
    """Checks labels to score, which become columns.

    Raises:
        InvalidRequestError: there are none, or their columns would have one name.
    """
    texts = [labels] if isinstance(labels, str) else list(labels)
    names = ["label", "probability", *(text.strip() for text in texts)]
    if len(texts) < 2 or len(set(names)) < len(names):
        raise invalid("labels", "must be two texts or more, that differ, also from 'label' and 'probability'")
    return texts


def with_scores(
    frame: Frame, labels: Sequence[str], scores: Sequence[ScoreResult | ManyhatsError], on_error: OnError
) -> Frame:
    """A copy with each label's probability, and which is the likeliest."""
    rows: list[list[float] | None] = [
        softmax([score.logprob for score in each.scores]) if each else None
        for each in _without_errors(scores)
    ]
    names = [label.strip() for label in labels]
    columns = {
        "label": Column("text", [row and names[row.index(max(row))] for row in rows]),
        "probability": Column("number", [row and max(row) for row in rows]),
    }
    for index, name in enumerate(names):
        columns[name] = Column("number", [row and row[index] for row in rows])
    return _with_columns(frame, columns | _errors(scores, on_error))


def with_classes(frame: Frame, found: Sequence[ClassifyResult | ManyhatsError], on_error: OnError) -> Frame:
    """A copy with each class's score, and which is the best."""
    texts = [each and each.results[0] for each in _without_errors(found)]
    rows = [{each.label: each.score for each in text.classes} if text else {} for text in texts]
    indices = {each.label: each.index for text in texts if text for each in text.classes}
    columns = {
        "label": Column("text", [text and text.label for text in texts]),
        "score": Column("number", [text and text.score for text in texts]),
    }
    for label in sorted(indices, key=indices.__getitem__):
        columns[label] = Column("number", [row.get(label) for row in rows])
    return _with_columns(frame, columns | _errors(found, on_error))


def with_vectors(
    frame: Frame, into: str, found: Sequence[Embeddings | ManyhatsError], on_error: OnError
) -> Frame:
    """A copy with each text's vector in the column ``into``, as lists of numbers."""
    vectors = [each and each.values[0] for each in _without_errors(found)]
    return _with_columns(frame, {into: Column("vector", vectors)} | _errors(found, on_error))


def softmax(logprobs: Sequence[float]) -> list[float]:
    """How likely each is, if it is one of them."""
    highest = max(logprobs)
    weights = [math.exp(each - highest) for each in logprobs]
    return [each / sum(weights) for each in weights]


def _without_errors(answers: Sequence[R | ManyhatsError]) -> list[R | None]:
    return [None if isinstance(each, ManyhatsError) else each for each in answers]


def _errors(answers: Sequence[object], on_error: OnError) -> dict[str, Column]:
    """The column of errors, which there is if they do not end the call."""
    if on_error == "raise":
        return {}
    texts = [each.message if isinstance(each, ManyhatsError) else None for each in answers]
    return {"error": Column("text", texts)}


def _library_of(frame: object) -> str:
    """Whose frame it is.

    Raises:
        InvalidRequestError: it is none.
    """
    for kind in type(frame).__mro__:
        library = kind.__module__.partition(".")[0]
        if kind.__name__ == "DataFrame" and library in ("pandas", "polars"):
            return library
    raise invalid("frame", f"must be a DataFrame of pandas or Polars, not {type(frame).__name__}")


def _with_columns(frame: Frame, columns: Mapping[str, Column]) -> Frame:
    """A copy with further columns, or others in the place of those that have their names."""
    library = _library_of(frame)
    module, given = import_module(library), cast(Any, frame)
    if library == "polars":
        types = {
            "text": module.String,
            "integer": module.Int64,
            "number": module.Float64,
            "vector": module.List(module.Float32),
        }
        made = [
            module.Series(name, column.values, dtype=types[column.kind]) for name, column in columns.items()
        ]
        return cast(Frame, given.with_columns(made))
    dtypes = {"text": None, "integer": "Int64", "number": "float64", "vector": "object"}
    series = {
        name: module.Series(list(column.values), index=given.index, dtype=dtypes[column.kind])
        for name, column in columns.items()
    }
    return cast(Frame, given.assign(**series))
