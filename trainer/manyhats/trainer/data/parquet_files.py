"""Rows of a Parquet file, a batch of records in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyhats.trainer.data.lines import opened
from manyhats.trainer.data.packages import import_for
from manyhats.trainer.data.row import Row, check_columns
from manyhats.trainer.errors import DataError

_BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[Row]:
    """One row per record; its line is the record's number from 1.

    Raises:
        DataError: the file cannot be read, is not Parquet, or has no known column.
    """
    parquet = import_for(str(path), "pyarrow.parquet")
    arrow_error = import_for(str(path), "pyarrow").ArrowException
    num_read = 0
    with opened(path) as data:
        try:
            with parquet.ParquetFile(data) as file:
                check_columns(str(path), file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                    for fields in _records(path, batch, num_read):
                        num_read += 1
                        yield Row(fields, str(path), num_read)
        except (arrow_error, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own, for damaged pages, have no errno
            after = f" after row {num_read}" if num_read else ""
            raise DataError(str(path), None, f"is not readable Parquet{after}: {error}") from error


def _records(path: Path, batch: Any, num_before: int) -> list[dict[str, object]]:
    """The batch's records; Arrow does not ensure that its strings are UTF-8."""
    try:
        records: list[dict[str, object]] = batch.to_pylist()
    except UnicodeDecodeError as error:
        line = num_before + _first_undecodable(batch) + 1
        raise DataError(str(path), line, f"a string is not UTF-8: {error.reason}") from error
    return records


def _first_undecodable(batch: Any) -> int:
    for index in range(len(batch)):
        try:
            batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            return index
    raise AssertionError("each record decodes alone, but all together do not")
