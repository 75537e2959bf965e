"""From the name of a source to its rows, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from manyhats.trainer.data.csv_files import read_csv
from manyhats.trainer.data.json_files import read_json, read_json_lines
from manyhats.trainer.data.named_datasets import read_dataset
from manyhats.trainer.data.parquet_files import read_parquet
from manyhats.trainer.data.row import Row
from manyhats.trainer.errors import DataError

_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def read_rows(source: str, *, max_rows: int | None = None) -> Iterator[Row]:
    """The rows of a source one by one, in its order.

    Args:
        source: a file, by its extension JSON lines, JSON, CSV, TSV or Parquet; otherwise anything ``datasets`` loads.
        max_rows: how many rows to read at most; None for all.

    Raises:
        DataError: as soon as a wrong row is reached; names the file and the line. Also if there are no rows.
    """
    is_empty = True
    for row in islice(_all_rows(source), max_rows):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(source, None, "has no rows")


def _all_rows(source: str) -> Iterator[Row]:
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is not None and not path.is_dir():
        return reader(path)
    if path.is_file():
        raise DataError(source, None, f"has none of the supported extensions: {', '.join(_READERS)}")
    if path.exists() and not path.is_dir():
        raise DataError(source, None, "is not a regular file")
    return read_dataset(source)
