"""Rows of texts that are read, in memory: five bytes per token, and four per target."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from manyhats.engine.text.tokenizer import ReadText
from manyhats.trainer.data.batch import ReadRow
from manyhats.trainer.data.dataset import DataCounts
from manyhats.trainer.errors import DataError


class ReadRows(Sequence[ReadRow]):
    """Rows end to end in arrays; a row is created on access.

    Args:
        token_ids: [T] int32, of all texts.
        token_types: [T] uint8.
        text_bounds: [X + 1] int64; text x has the tokens from ``text_bounds[x]`` to ``text_bounds[x + 1]``.
        row_bounds: [R + 1] int64; row r has the texts from ``row_bounds[r]`` to ``row_bounds[r + 1]``.
        targets: [Y] float32, of all rows.
        target_bounds: [R + 1] int64, likewise.
        terms: [R] int64, each row's terms of the loss.
    """

    def __init__(
        self,
        *,
        token_ids: NDArray[np.int32],
        token_types: NDArray[np.uint8],
        text_bounds: NDArray[np.int64],
        row_bounds: NDArray[np.int64],
        targets: NDArray[np.float32],
        target_bounds: NDArray[np.int64],
        terms: NDArray[np.int64],
    ) -> None:
        self._token_ids = token_ids
        self._token_types = token_types
        self._text_bounds = text_bounds
        self._row_bounds = row_bounds
        self._targets = targets
        self._target_bounds = target_bounds
        self._terms = terms
        self.lengths: NDArray[np.int64] = np.diff(text_bounds[row_bounds])
        self.num_tokens = len(token_ids)
        self.num_targets = int(terms.sum())

    def __len__(self) -> int:
        return len(self._terms)

    @overload
    def __getitem__(self, index: int) -> ReadRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReadRow]: ...
    def __getitem__(self, index: int | slice) -> ReadRow | list[ReadRow]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        targets = self._targets[self._target_bounds[row] : self._target_bounds[row + 1]]
        texts = range(int(self._row_bounds[row]), int(self._row_bounds[row + 1]))
        return ReadRow(
            tuple(self._text(text) for text in texts), tuple(targets.tolist()), int(self._terms[row])
        )

    def _text(self, text: int) -> ReadText:
        tokens = slice(int(self._text_bounds[text]), int(self._text_bounds[text + 1]))
        types = self._token_types[tokens]
        return ReadText(tuple(self._token_ids[tokens].tolist()), tuple(types.tolist()) if types.any() else ())


@dataclass(frozen=True, slots=True, eq=False)
class ReadDataset:
    """The rows of one source, whose texts are read.

    Attributes:
        rows: R of them, at least one.
        source: what they were read from, for errors.
        lines: [R] each row's line there.
        tags: [R] the class of each word, for tasks that tell those; empty for others.
        words: [R] for each word, the token that stands for it; −1 if none does.
        counts: what happened to the source's rows.
    """

    rows: ReadRows
    source: str
    lines: Sequence[int]
    counts: DataCounts
    tags: Sequence[tuple[int, ...]] = ()
    words: Sequence[tuple[int, ...]] = ()

    def error(self, index: int, message: str) -> DataError:
        """What is wrong with a row."""
        return DataError(self.source, self.lines[index], message)


class ReadTexts:
    """Gathers the tokens of rows, whose targets are known once all have been read."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._token_types = bytearray()
        self._text_bounds = array("q", [0])
        self._row_bounds = array("q", [0])

    def __len__(self) -> int:
        return len(self._row_bounds) - 1

    def add(self, texts: Sequence[ReadText]) -> None:
        """The texts of one row."""
        for text in texts:
            self._token_ids.extend(text.token_ids)
            self._token_types += bytes(text.token_types or len(text.token_ids))
            self._text_bounds.append(len(self._token_ids))
        self._row_bounds.append(len(self._text_bounds) - 1)

    def with_targets(self, targets: Iterable[Sequence[float]], terms: Iterable[int]) -> ReadRows:
        """The rows so far with their targets, and their terms of the loss; not used afterwards."""
        values, bounds = array("f"), array("q", [0])
        for each in targets:
            values.extend(each)
            bounds.append(len(values))
        return ReadRows(
            token_ids=np.frombuffer(self._token_ids, dtype=np.int32),
            token_types=np.frombuffer(self._token_types, dtype=np.uint8),
            text_bounds=np.frombuffer(self._text_bounds, dtype=np.int64),
            row_bounds=np.frombuffer(self._row_bounds, dtype=np.int64),
            targets=np.frombuffer(values, dtype=np.float32),
            target_bounds=np.frombuffer(bounds, dtype=np.int64),
            terms=np.array(list(terms), dtype=np.int64),
        )
