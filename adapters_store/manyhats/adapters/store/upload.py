"""An upload: files that arrive piece by piece, in any order, and are verified before they are used."""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from manyhats.adapters.disk.digest import digest_of_hashes
from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.disk.scratch import ScratchDirectory
from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    DigestMismatchError,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.artifact_files import FILES, max_bytes_of
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, UploadFile

_WEIGHTS = (peft_format.WEIGHTS_FILE, adapterhub_format.WEIGHTS_FILE)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 4 * 1024 * 1024
# How many pieces with gaps between them one file may have at a time; bounds memory.
_MAX_PIECES = 4096


Publish = Callable[[SourceDirectory, Probe | None, Prepare | None], Registered]
"""What the store does with an upload's files once they are verified."""


def check_files(files: Sequence[UploadFile], limits: AdapterLimits) -> None:
    """Check what is announced before a byte is accepted: one config, one file of tensors, text files, and all sizes.

    Raises:
        ArgumentInvalidError: ``subject`` is the field, such as ``files[1].name``.
        AdapterInvalidError, AdapterUnsafeError, AdapterUnsupportedError: as for a directory of these files.
        AdapterTooLargeError: over a limit.
    """
    if len(files) > len(FILES):
        raise ArgumentInvalidError("files", f"has {len(files)} entries; an adapter has at most {len(FILES)}")
    for index, file in enumerate(files):
        _check_file(f"files[{index}]", file)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise ArgumentInvalidError("files", "name a file twice")
    peft_format.check_names(names)
    if all(name in names for name in _WEIGHTS):
        raise AdapterUnsupportedError(
            _WEIGHTS[1], f"would not be used alongside {_WEIGHTS[0]}; send one of them"
        )
    for file in files:
        limit = max_bytes_of(file.name, limits)
        if file.size_bytes > limit:
            raise AdapterTooLargeError(file.name, f"has {file.size_bytes} bytes; the limit is {limit}")
    if (total := sum(file.size_bytes for file in files)) > limits.max_size_bytes:
        raise AdapterTooLargeError("files", f"have {total} bytes; the limit is {limits.max_size_bytes}")


def announced_digest(files: Sequence[UploadFile]) -> str:
    """The artifact's digest if the files arrive as announced."""
    return digest_of_hashes({file.name: (file.sha256, file.size_bytes) for file in files})


class UploadSession:
    """One upload. Thread-safe: its calls wait for each other; ``abort`` ends it at any time.

    Args:
        files: checked by ``check_files``.
        directory: an empty one, which the session owns from now on.
        publish: called once with a directory of the files, when all are verified.
    """

    def __init__(self, files: Sequence[UploadFile], directory: ScratchDirectory, publish: Publish) -> None:
        self._directory = directory
        self._publish = publish
        self._lock = threading.Lock()
        self._is_open = True
        self._files: list[_IncomingFile] = []
        try:
            for file in files:
                self._files.append(_IncomingFile(file, directory.create(file.name)))
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def write(self, file_index: int, offset: int, data: bytes) -> None:
        """Accept bytes of a file, from ``offset`` on.

        Raises:
            ArgumentInvalidError: there is no such file, or the bytes are outside it or were sent before.
            StoreError: they cannot be written.
        """
        with self._lock:
            self._require_open()
            if not 0 <= file_index < len(self._files):
                raise ArgumentInvalidError(
                    "chunk.file_index", f"is {file_index}, but the header announced {len(self._files)} files"
                )
            self._files[file_index].write(offset, data)

    def finish(self, *, probe: Probe | None = None, prepare: Prepare | None = None) -> Registered:
        """Verify every file, then validate and publish them as ``register`` does. The session ends, either way.

        Raises:
            ArgumentInvalidError: bytes are missing.
            DigestMismatchError: a file is not the one announced; ``subject`` is its name.
            AdapterError: as ``AdapterStore.register``.
        """
        with self._lock:
            self._require_open()
            try:
                for file in self._files:
                    file.verify()
                return self._publish(SourceDirectory(self._directory.descriptor), probe, prepare)
            finally:
                self._end()

    def abort(self) -> None:
        """Remove what has arrived; does nothing after the end."""
        with self._lock:
            self._end()

    def _require_open(self) -> None:
        if not self._is_open:
            raise ArgumentInvalidError("chunk", "comes after the upload's end")

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            for file in self._files:
                file.close()
            self._directory.close()


class _IncomingFile:
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

    def verify(self) -> None:
        """Raise unless every byte has arrived and matches what was announced."""
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


def _check_file(field: str, file: UploadFile) -> None:
    if file.name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise AdapterUnsafeError(file.name, "may be a pickle, which can run code when it is read")
    if file.name not in FILES:
        raise ArgumentInvalidError(
            f"{field}.name",
            f"an upload has {peft_format.CONFIG_FILE} and {_WEIGHTS[0]} or {_WEIGHTS[1]}, and of text files "
            + ", ".join(MAX_BYTES),
        )
    if file.size_bytes < 1:
        raise AdapterInvalidError(file.name, "is empty")
    if _SHA256.fullmatch(file.sha256) is None:
        raise ArgumentInvalidError(f"{field}.sha256", "has 64 hexadecimal digits")


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
