"""The lines of a text file: decoded, numbered, bounded."""

from __future__ import annotations

import codecs
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

from manyhats.trainer.errors import DataError

MAX_LINE_BYTES = 64 * 1024 * 1024
"""The limit per line. A longer one is probably not a row but another kind of file, and would fill the memory."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading; anything but a regular file, or a refusal by the system, is a ``DataError``."""
    try:
        _check_regular(path)
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read: {error.strerror or error}") from error


def _check_regular(path: Path) -> None:
    """Refuse a pipe, which opening would wait for, and devices, which may be endless."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(str(path), None, "is not a regular file")


def text_lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, str]]:
    r"""Each line with its number from 1 and its end; lines end at ``\n``, and a byte order mark is dropped.

    Raises:
        DataError: the file cannot be read, or a line is too long or not UTF-8.
    """
    with opened(path) as file:
        for number in count(1):
            line = file.readline(max_line_bytes + 1)
            if not line:
                return
            if len(line) > max_line_bytes:
                raise DataError(str(path), number, f"the line is longer than {max_line_bytes} bytes")
            yield number, decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number)


def decoded(data: bytes, path: Path, line: int) -> str:
    """The text of UTF-8 bytes that begin on a line.

    Raises:
        DataError: they are not UTF-8; names the line and, from 1, the byte in it.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - before.rfind(b"\n")
        number = line + before.count(b"\n")
        raise DataError(
            str(path), number, f"is not UTF-8: byte {column} of the line is 0x{data[error.start]:02x}"
        ) from error
