"""Rows of CSV (``.csv``, and ``.tsv`` with tabs), whose first record names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyhats.trainer.data.lines import MAX_LINE_BYTES, text_lines
from manyhats.trainer.data.row import Row, check_columns
from manyhats.trainer.errors import DataError


def read_csv(path: Path) -> Iterator[Row]:
    """One row per record; an empty cell means no value, and blank lines are ignored.

    A row's line is where its record begins: quoted cells may contain line ends.

    Raises:
        DataError: no column is known, or a record is malformed or has too many or too few cells.
    """
    records = _records(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    for _, header in records:
        check_columns(str(path), header)
        for line, cells in records:
            if len(cells) != len(header):
                raise DataError(
                    str(path), line, f"has {len(cells)} cells; the header names {len(header)} columns"
                )
            fields = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            yield Row(fields, str(path), line)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the line it begins on."""
    reader = csv.reader((line for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            with _long_cells():
                cells = next(reader, None)
        except csv.Error as error:
            raise DataError(str(path), begin, f"is not CSV: {error}") from error
        if cells is None:
            return
        if cells:
            yield begin, cells


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's limit of 128 KiB is per process: raised only while a record is read."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
