"""Uploads for tests: a directory of an adapter, sent piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Files, Registered, Registration, UploadFile
from manyhats.adapters.store.store import AdapterStore


def content_of(directory: Path) -> Mapping[str, bytes]:
    """The files of a directory: name → bytes."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def announced(content: Mapping[str, bytes]) -> list[UploadFile]:
    """The header of an upload of these files."""
    return [UploadFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()]


def send(
    store: AdapterStore,
    task_id: str,
    content: Mapping[str, bytes],
    *,
    piece_bytes: int = 4096,
    probe: Probe | None = None,
    prepare: Prepare | None = None,
    **options: Any,
) -> Registered:
    """Upload files; ``options`` are those of ``Registration``."""
    with store.open_upload(Registration(task_id, Files(announced(content)), **options)) as session:
        for index, data in enumerate(content.values()):
            for offset in range(0, len(data), piece_bytes):
                session.write(index, offset, data[offset : offset + piece_bytes])
        return session.finish(probe=probe, prepare=prepare)
