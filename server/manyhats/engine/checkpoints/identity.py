"""A checkpoint's identity, from its bytes; large files are hashed once and remembered by their file status."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from manyhats.engine.errors import ModelError

_LOG = logging.getLogger(__name__)

# A file changed within this time of being hashed may change again under the same modification time.
_SETTLED_NS = 2_000_000_000


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """SHA-256 of files, remembered in a directory by path, size, modification and change time.

    A file whose status is unchanged is not read again. If the directory cannot be written, files are hashed each time.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def sha256(self, path: Path) -> str:
        """The digest of ``path``.

        Raises:
            ModelError: the file cannot be read.
        """
        try:
            path = path.resolve(strict=True)
            status = _status(path)
            memo = self._directory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
            remembered = _read_json(memo)
            if remembered.get("status") == status and _is_settled(status, remembered.get("hashed_ns")):
                return str(remembered["sha256"])
            hashed_ns = time.time_ns()
            digest = file_sha256(path)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from error
        self._remember(memo, {"path": str(path), "status": status, "hashed_ns": hashed_ns, "sha256": digest})
        return digest

    def _remember(self, memo: Path, content: Mapping[str, Any]) -> None:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=memo.parent, suffix=".tmp", delete=False) as file:
                json.dump(content, file)
            os.replace(file.name, memo)
        except OSError as error:
            _LOG.debug("cannot remember the digest of %s: %s", content["path"], error)


def _status(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_settled(status: list[int], hashed_ns: Any) -> bool:
    return isinstance(hashed_ns, int) and max(status[1:]) + _SETTLED_NS < hashed_ns


def _read_json(path: Path) -> Mapping[str, Any]:
    """The object in ``path``; empty if there is none, or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def content_digest(files: Iterable[Path], digests: FileDigests) -> str:
    r"""SHA-256 (hex) over lines ``<sha256> <size> <name>\n``, sorted by name.

    Raises:
        ModelError: a file cannot be read.
    """
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        total.update(f"{digests.sha256(path)} {path.stat().st_size} {path.name}\n".encode())
    return total.hexdigest()
