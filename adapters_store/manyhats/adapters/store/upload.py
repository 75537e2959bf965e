"""An upload: files that arrive piece by piece, in any order, and are verified before they are used."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from manyhats.adapters.disk.digest import digest_of_hashes
from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.disk.scratch import ScratchDirectory
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.artifact_files import FILES, max_bytes_of
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, UploadFile
from manyhats.adapters.store.incoming_file import GrowingFile, IncomingFile

_WEIGHTS = (peft_format.WEIGHTS_FILE, adapterhub_format.WEIGHTS_FILE)
_SHA256 = re.compile(r"[0-9a-f]{64}")

Publish = Callable[[SourceDirectory, Sequence[UploadFile], Probe | None, Prepare | None], Registered]
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
        files: those announced, checked by ``check_files``.
        directory: an empty one, which the session owns from now on.
        publish: called once with a directory of the files, when all are verified.
        limits: of files that are not announced; None refuses them.
    """

    def __init__(
        self,
        files: Sequence[UploadFile],
        directory: ScratchDirectory,
        publish: Publish,
        limits: AdapterLimits | None = None,
    ) -> None:
        self._directory = directory
        self._publish = publish
        self._limits = limits
        self._lock = threading.Lock()
        self._is_open = True
        self._files: list[IncomingFile | GrowingFile] = []
        self._names: list[str] = []
        try:
            for file in files:
                self._files.append(IncomingFile(file, directory.create(file.name)))
                self._names.append(file.name)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def open_file(self, name: str) -> None:
        """Begin a file that was not announced: the next index. Its bytes must come in order.

        Raises:
            ArgumentInvalidError, AdapterUnsafeError: an adapter has no such file, or it has begun before.
            StoreError: it cannot be made.
        """
        with self._lock:
            self._require_open()
            _check_name("files", name)
            if self._limits is None or name in self._names:
                problem = "was not announced" if self._limits is None else "comes twice"
                raise ArgumentInvalidError("files", f"'{name}' {problem}")
            max_bytes = max_bytes_of(name, self._limits)
            self._files.append(GrowingFile(name, max_bytes, self._directory.create(name)))
            self._names.append(name)

    def write(self, file_index: int, offset: int, data: bytes) -> None:
        """Accept bytes of a file, from ``offset`` on.

        Raises:
            ArgumentInvalidError: there is no such file, or the bytes are outside it or were sent before.
            AdapterTooLargeError: a file that was not announced becomes too large.
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
                files = [file.verify() for file in self._files]
                return self._publish(SourceDirectory(self._directory.descriptor), files, probe, prepare)
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


def _check_name(field: str, name: str) -> None:
    if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise AdapterUnsafeError(name, "may be a pickle, which can run code when it is read")
    if name not in FILES:
        raise ArgumentInvalidError(
            field,
            f"an upload has {peft_format.CONFIG_FILE} and {_WEIGHTS[0]} or {_WEIGHTS[1]}, and of other files "
            + ", ".join((*adapterhub_format.HEAD_FILES, *MAX_BYTES)),
        )


def _check_file(field: str, file: UploadFile) -> None:
    _check_name(f"{field}.name", file.name)
    if file.size_bytes < 1:
        raise AdapterInvalidError(file.name, "is empty")
    if _SHA256.fullmatch(file.sha256) is None:
        raise ArgumentInvalidError(f"{field}.sha256", "has 64 hexadecimal digits")
