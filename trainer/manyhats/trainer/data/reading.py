"""From the name of a source to its rows, whatever the format."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from manyhats.trainer.data.json_files import read_json, read_json_lines
from manyhats.trainer.data.lines import MAX_LINE_BYTES, opened, text_lines
from manyhats.trainer.data.row import Row, check_columns
from manyhats.trainer.errors import DataError

_BATCH_ROWS = 1024

DEFAULT_SPLIT = "train"
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<name>{_PART}(?:/{_PART})?)(?:/(?P<config>{_PART}))?")


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


def read_csv(path: Path) -> Iterator[Row]:
    """One row per record; an empty cell means no value, and blank lines are ignored.

    A row's line is where its record begins: quoted cells may contain line ends.

    Raises:
        DataError: no column is known, or a record is malformed or has too many or too few cells.
    """
    records = _csv_records(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    for _, header in records:
        check_columns(str(path), header)
        for line, cells in records:
            if len(cells) != len(header):
                raise DataError(
                    str(path), line, f"has {len(cells)} cells; the header names {len(header)} columns"
                )
            fields = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            yield Row(fields, str(path), line)


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
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
                    for fields in _batch_records(path, batch, num_read):
                        num_read += 1
                        yield Row(fields, str(path), num_read)
        except (arrow_error, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; Arrow's own, for damaged pages, have no errno
            after = f" after row {num_read}" if num_read else ""
            raise DataError(str(path), None, f"is not readable Parquet{after}: {error}") from error


def _batch_records(path: Path, batch: Any, num_before: int) -> list[dict[str, object]]:
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


def import_for(source: str, module: str) -> Any:
    """Import a module that reading a source needs.

    Raises:
        DataError: it is not installed; says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            source, None, f"reading it needs the package {package}: pip install {package}"
        ) from error


@dataclass(frozen=True, slots=True)
class DatasetName:
    """``NAME[/CONFIG][:SPLIT]``.

    Attributes:
        name: ``org/name`` or ``name`` on the hub, or an existing directory.
        config: None takes the only one, or the default.
        split: also a slice such as ``train[:10%]``.
    """

    name: str
    config: str | None
    split: str


def parse_dataset_name(source: str) -> DatasetName:
    """Parse a name. A directory is a name; one that declares configurations may be followed by one of them.

    Raises:
        DataError: it is neither a directory nor a possible name on the hub.
    """
    path, _, split = source.partition(":")
    head, _, tail = path.rpartition("/")
    split = split or DEFAULT_SPLIT
    if path and Path(path).is_dir():
        return DatasetName(path, None, split)
    if head and _declares_configs(Path(head)):
        return DatasetName(head, tail, split)
    match = _HUB_NAME.fullmatch(path)
    if match is None:
        raise DataError(source, None, "is neither a file, a directory nor the name of a data set")
    return DatasetName(match["name"], match["config"], split)


def _declares_configs(directory: Path) -> bool:
    """Whether it is a data set whose card names configurations; if not, what follows it is a mistyped path."""
    card = directory / "README.md"
    return card.is_file() and b"config_name:" in card.read_bytes()


def read_dataset(source: str) -> Iterator[Row]:
    """One row per record of a split; its line is the record's number from 1.

    Raises:
        DataError: ``datasets`` is not installed or cannot load this, or no column is known.
    """
    name = parse_dataset_name(source)
    datasets = import_for(source, "datasets")
    try:
        table = _load(datasets, name)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "is a directory, and " if Path(name.name).is_dir() else ""
        raise DataError(source, None, f"{what}the datasets package cannot load it: {error}") from error
    check_columns(source, table.column_names)
    for line, fields in enumerate(table, start=1):
        yield Row(fields, source, line)


def _load(datasets: Any, name: DatasetName) -> Any:
    """The split as a table; a directory that ``save_to_disk`` wrote is opened as such."""
    directory = Path(name.name)
    if (directory / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(directory))[name.split]
    if (directory / "state.json").is_file():
        return datasets.load_from_disk(str(directory))
    return datasets.load_dataset(name.name, name.config, split=name.split)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
