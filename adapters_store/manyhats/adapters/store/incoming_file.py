"""One file of an upload: which of its bytes have arrived, and their hash."""

from __future__ import annotations

import bisect
import hashlib
import os

from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import AdapterTooLargeError, ArgumentInvalidError, DigestMismatchError
from manyhats.adapters.registration import UploadFile

_READ_BYTES = 4 * 1024 * 1024
# How many pieces with gaps between them one file may have at a time; bounds memory.
_MAX_PIECES = 4096


class IncomingFile:
    """An incoming file: which bytes have arrived, and the hash of those that came in order."""

    def __init__(self, announced: UploadFile, descriptor: int) -> None:
        self._announced = announced
        self._descriptor = descriptor
        # Begins and ends of what has arrived: disjoint, in order and not adjacent.
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._hash = hashlib.sha256()
        self._num_hashed = 0

    def write(self, offset: int, data: bytes) -> None:
        """Write a piece; see ``UploadSession.write``."""
        end = offset + len(data)
        self._check_bounds(offset, end)
        self._take(offset, end)
        with store_errors():
            _write_all(self._descriptor, data, offset)
        if offset == self._num_hashed:  # hashed while in memory; what comes out of order is read again
            self._hash.update(data)
            self._num_hashed = end

    def verify(self) -> UploadFile:
        """The file, every byte of which has arrived and matches what was announced.

        Raises:
            ArgumentInvalidError: bytes are missing.
            DigestMismatchError: they are others.
        """
        name, size = self._announced.name, self._announced.size_bytes
        if (self._begins, self._ends) != ([0], [size]):
            arrived = sum(self._ends) - sum(self._begins)
            raise ArgumentInvalidError("chunk", f"'{name}' is incomplete: {arrived} of {size} bytes arrived")
        with store_errors():
            while self._num_hashed < size:
                piece = os.pread(self._descriptor, _READ_BYTES, self._num_hashed)
                if not piece:
                    break  # the hash decides
                self._hash.update(piece)
                self._num_hashed += len(piece)
        if (sha256 := self._hash.hexdigest()) != self._announced.sha256:
            raise DigestMismatchError(name, f"does not have the announced SHA-256 but {sha256}")
        return self._announced

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def _check_bounds(self, offset: int, end: int) -> None:
        if offset < 0 or end > self._announced.size_bytes:
            raise ArgumentInvalidError(
                "chunk.offset",
                f"bytes {offset} to {end} are outside '{self._announced.name}', which was announced with "
                f"{self._announced.size_bytes} bytes",
            )
        if offset == end:
            raise ArgumentInvalidError("chunk.data", "is empty")

    def _take(self, begin: int, end: int) -> None:
        """Record a piece, merged with those it touches."""
        index = bisect.bisect_left(self._ends, begin)  # the first piece that ends at or after ``begin``
        stop = bisect.bisect_right(self._begins, end)  # after the last that begins at or before ``end``
        touched = range(index, stop)
        if any(self._begins[i] < end and begin < self._ends[i] for i in touched):
            raise ArgumentInvalidError(
                "chunk.offset",
                f"bytes {begin} to {end} of '{self._announced.name}' overlap those sent before",
            )
        if not touched and len(self._begins) >= _MAX_PIECES:
            raise ArgumentInvalidError(
                "chunk.offset",
                f"'{self._announced.name}' has over {_MAX_PIECES} pieces with gaps between them",
            )
        self._begins[index:stop] = [min([begin, *self._begins[index:stop]])]
        self._ends[index:stop] = [max([end, *self._ends[index:stop]])]


class GrowingFile:
    """A file that was not announced, and whose bytes come in order; it has at most ``max_bytes``."""

    def __init__(self, name: str, max_bytes: int, descriptor: int) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._size_bytes = 0

    def write(self, offset: int, data: bytes) -> None:
        """Append a piece; see ``UploadSession.write``."""
        if offset != self._size_bytes:
            raise ArgumentInvalidError(
                "chunk.offset", f"must be {self._size_bytes}, where '{self._name}' ends"
            )
        if offset + len(data) > self._max_bytes:
            raise AdapterTooLargeError(self._name, f"is too large; the limit is {self._max_bytes} bytes")
        with store_errors():
            _write_all(self._descriptor, data, offset)
        self._hash.update(data)
        self._size_bytes += len(data)

    def verify(self) -> UploadFile:
        """What it has come to."""
        return UploadFile(self._name, self._size_bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
