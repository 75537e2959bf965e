"""Tokenized rows in memory: five bytes per token, and what evaluation needs to know about each row."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

from manyhats.trainer.data.batch import TokenizedRow
from manyhats.trainer.data.contents import PromptForm
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError


class TokenizedRows(Sequence[TokenizedRow]):
    """Rows end to end in arrays; a row is created on access.

    Args:
        token_ids: [T] int32, of all rows.
        is_target: [T] bool.
        bounds: [R + 1] int64; row r has the tokens from ``bounds[r]`` to ``bounds[r + 1]``.
    """

    def __init__(
        self, token_ids: NDArray[np.int32], is_target: NDArray[np.bool_], bounds: NDArray[np.int64]
    ) -> None:
        self._token_ids = token_ids
        self._is_target = is_target
        self._bounds = bounds
        self.lengths: NDArray[np.int64] = np.diff(bounds)
        self.num_tokens = len(token_ids)
        self.num_targets = int(is_target.sum())

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedRow]: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | list[TokenizedRow]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        begin, end = self._span(index)
        return TokenizedRow(
            token_ids=tuple(self._token_ids[begin:end].tolist()),
            is_target=tuple(self._is_target[begin:end].tolist()),
        )

    def beginning(self, index: int, length: int) -> tuple[int, ...]:
        """A row's first tokens, as many as requested."""
        begin, _ = self._span(index)
        return tuple(self._token_ids[begin : begin + length].tolist())

    def _span(self, index: int) -> tuple[int, int]:
        row = range(len(self))[index]
        return int(self._bounds[row]), int(self._bounds[row + 1])


@dataclass(frozen=True, slots=True)
class LabelTokens:
    """A label after a row's prompt.

    Attributes:
        num_taken: how many of the prompt's last tokens change when the label follows; mostly none.
        num_given: how many of ``token_ids`` still belong to the prompt: the row's completion took them; mostly none.
        token_ids: what follows the rest of the prompt, including the label's end.
    """

    num_taken: int
    num_given: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCounts:
    """What happened to a source's rows, apart from their content.

    Attributes:
        skipped: rows left out as too long.
        truncated: rows cut to the allowed length.
        beginnings: texts and prompts that already had the tokenizer's beginning (BOS), so that none was added.
        ends: completions, turns and texts that already had an end, so that none was added.
        ignored: field that nothing reads → how many rows have it.
    """

    skipped: int = 0
    truncated: int = 0
    beginnings: int = 0
    ends: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)


def sentences(counts: DataCounts) -> list[str]:
    """What happened to rows, for people; empty if nothing did."""
    told = [
        (counts.skipped, "left out as too long"),
        (counts.truncated, "truncated as too long"),
        (counts.beginnings, "already had the beginning token, so it was not added again"),
        (counts.ends, "already had an end, so it was not added again"),
        *(
            (number, f"had the field {name}, which nothing reads: ignored")
            for name, number in counts.ignored.items()
        ),
    ]
    return [f"{counted(number, 'row')} {what}" for number, what in told if number]


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """The rows of one source as tokens.

    Attributes:
        rows: R of them, at least one.
        source: what they were read from, for errors.
        lines: [R] each row's line there.
        prompt_lengths: [R] tokens before the row's last completion; 0 for a plain text.
        completions: each row's last completion as text, without the end; empty for a plain text.
        labels: [R] what each label is after the row's prompt; empty if there are none.
        counts: what happened to the source's rows.
        form: of all rows' prompts; None if they are made in several ways, or of more than one text.
    """

    rows: TokenizedRows
    source: str
    lines: Sequence[int]
    prompt_lengths: Sequence[int]
    completions: Sequence[str]
    labels: Sequence[tuple[LabelTokens, ...]]
    counts: DataCounts
    form: PromptForm | None = None

    def prompt_token_ids(self, index: int) -> tuple[int, ...]:
        """The tokens before the row's last completion."""
        return self.rows.beginning(index, self.prompt_lengths[index])

    def error(self, index: int, message: str) -> DataError:
        """What is wrong with a row."""
        return DataError(self.source, self.lines[index], message)


class DatasetBuilder:
    """Gathers tokenized rows; equal completions are kept once."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._is_target = bytearray()
        self._bounds = array("q", [0])
        self._lines = array("q")
        self._prompt_lengths = array("i")
        self._completions: list[str] = []
        self._known_completions: dict[str, str] = {}
        self._labels: list[tuple[LabelTokens, ...]] = []
        self._forms: set[PromptForm | None] = set()
        self._known_labels: dict[tuple[LabelTokens, ...], tuple[LabelTokens, ...]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def add(
        self,
        token_ids: Sequence[int],
        is_target: bytes,
        *,
        prompt_length: int,
        completion: str,
        line: int,
        labels: tuple[LabelTokens, ...] = (),
        form: PromptForm | None = None,
    ) -> None:
        """One row; see ``Dataset``."""
        self._token_ids.extend(token_ids)
        self._is_target += is_target
        self._bounds.append(len(self._token_ids))
        self._lines.append(line)
        self._prompt_lengths.append(prompt_length)
        self._completions.append(self._known_completions.setdefault(completion, completion))
        self._forms.add(form)
        if labels:
            self._labels.append(self._known_labels.setdefault(labels, labels))

    def build(self, source: str, counts: DataCounts) -> Dataset:
        """The rows so far; the builder is not used afterwards."""
        rows = TokenizedRows(
            token_ids=np.frombuffer(self._token_ids, dtype=np.int32),
            is_target=np.frombuffer(self._is_target, dtype=np.bool_),
            bounds=np.frombuffer(self._bounds, dtype=np.int64),
        )
        return Dataset(
            rows,
            source,
            self._lines,
            self._prompt_lengths,
            tuple(self._completions),
            self._labels,
            counts,
            self._forms.pop() if len(self._forms) == 1 else None,
        )


@dataclass(frozen=True, slots=True)
class RowTokens:
    """A row's tokens.

    Attributes:
        targets: spans of what is learned, in order, none empty.
        prompt_length: where the last completion begins; 0 for a text, which is all completion.
        completion: the last one's text; empty for a text.
        labels: alternatives to it.
        form: of its prompt; None if that is made of more than one text.
    """

    token_ids: Sequence[int]
    targets: Sequence[tuple[int, int]]
    prompt_length: int
    completion: str
    labels: tuple[LabelTokens, ...] = ()
    form: PromptForm | None = None

    def is_target(self) -> bytes:
        """One byte per token, 0 or 1."""
        marks = bytearray(len(self.token_ids))
        for begin, end in self.targets:
            marks[begin:end] = b"\x01" * (end - begin)
        return bytes(marks)


def fitted(row: Row, tokens: RowTokens, overlong: str, max_length: int) -> RowTokens | None:
    """The row within the length; None if it is left out.

    Args:
        row: the one the tokens come from.
        tokens: of any length.
        overlong: see ``DataSettings``.
        max_length: in tokens, at least 2.

    Raises:
        DataError: it is longer, and ``overlong`` makes that an error.
    """
    length = len(tokens.token_ids)
    if length <= max_length:
        return tokens
    if overlong == "error":
        raise row.error(
            f"has {length} tokens; the limit is {max_length} (`max_length`): set `overlong` to skip or truncate"
        )
    if overlong == "skip":
        return None
    if not tokens.prompt_length:
        return RowTokens(tokens.token_ids[:max_length], [(1, max_length)], 0, "")
    return _without_beginning(tokens, length - max_length)


def _without_beginning(tokens: RowTokens, num_cut: int) -> RowTokens | None:
    """The row without its first tokens; None if nothing is left before the last completion."""
    left = tokens.prompt_length - num_cut
    if left < 1 or any(left - label.num_taken < 1 for label in tokens.labels):
        return None
    # The first remaining token has nothing before it to be predicted from.
    spans = [(max(begin - num_cut, 1), end - num_cut) for begin, end in tokens.targets]
    return RowTokens(
        token_ids=tokens.token_ids[num_cut:],
        targets=[(begin, end) for begin, end in spans if begin < end],
        prompt_length=left,
        completion=tokens.completion,
        labels=tokens.labels,
    )
