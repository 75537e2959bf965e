"""Uploading a directory: which of its files make an adapter, their hashes, and the messages that carry them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manyhats.client.fields import invalid
from manyhats.client.requests import Progress
from manyhats.v1 import adapter_pb2

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_SUFFIX: Final = ".safetensors"
# AdapterHub's head: its tensors and what describes them.
HEAD_FILES: Final = ("model_head.safetensors", "head_config.json")
TEXT_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CHUNK_BYTES: Final = 1024 * 1024
# In the server's initial metadata, once it accepts the header.
ACCEPTED: Final = ("manyhats-upload", "accepted")


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file to send: its path, and its entry in the upload's header."""

    path: Path
    size_bytes: int
    sha256: str

    @property
    def info(self) -> adapter_pb2.FileInfo:
        """Its entry in the header."""
        return adapter_pb2.FileInfo(name=self.path.name, size_bytes=self.size_bytes, sha256=self.sha256)


def read_files(directory: str | os.PathLike[str]) -> tuple[UploadFile, ...]:
    """The adapter's files in a directory, hashed: its configs, safetensors and text files; nothing else is sent.

    Raises:
        InvalidRequestError: it contains no adapter, or cannot be read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
        weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
        if CONFIG_FILE not in names:
            raise invalid("directory", f"{os.fspath(directory)} has no {CONFIG_FILE}")
        if not weights:
            raise invalid(
                "directory",
                f"{os.fspath(directory)} has no {WEIGHTS_SUFFIX} file;"
                " `manyhats adapters convert` makes one from a pickle",
            )
        others: list[str] = [name for name in TEXT_FILES if name in names]
        if all(name in names for name in HEAD_FILES):
            others.append(HEAD_FILES[1])
        return tuple(_read_file(Path(directory, name)) for name in (CONFIG_FILE, *weights, *others))
    except OSError as error:
        raise invalid("directory", f"cannot read {error.filename}: {error.strerror}") from error


def _read_file(path: Path) -> UploadFile:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return UploadFile(path, file.tell(), sha256)


class UploadMessages:
    """The messages of one upload: the header, then every file in chunks.

    A failure while they are made (a file that changed, the caller's ``progress``) ends them early and is kept in
    ``failure``: gRPC would hide it.
    """

    def __init__(
        self, header: adapter_pb2.UploadHeader, files: Sequence[UploadFile], progress: Progress
    ) -> None:
        self.failure: Exception | None = None
        self._messages = self._make(header, files, progress)

    def __iter__(self) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        return self._messages

    def _make(
        self, header: adapter_pb2.UploadHeader, files: Sequence[UploadFile], progress: Progress
    ) -> Iterator[adapter_pb2.UploadAdapterRequest]:
        yield adapter_pb2.UploadAdapterRequest(header=header)
        total, sent = sum(file.size_bytes for file in files), 0
        try:
            for index, file in enumerate(files):
                for offset, data in _chunks(file):
                    chunk = adapter_pb2.FileChunk(file_index=index, offset=offset, data=data)
                    yield adapter_pb2.UploadAdapterRequest(chunk=chunk)
                    sent += len(data)
                    progress(sent, total)
        except Exception as error:  # noqa: BLE001 - it is raised again by the call that reads this
            self.failure = error


def _chunks(file: UploadFile) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each chunk.

    Raises:
        InvalidRequestError: the file's length has changed, or it cannot be read.
    """
    offset = 0
    try:
        with file.path.open("rb") as stream:
            while data := stream.read(CHUNK_BYTES):
                yield offset, data
                offset += len(data)
                if offset > file.size_bytes:
                    break
    except OSError as error:
        raise invalid("directory", f"cannot read {file.path}: {error.strerror}") from error
    if offset != file.size_bytes:
        raise invalid("directory", f"{file.path} changed while it was sent")
