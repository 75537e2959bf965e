"""The digest that names an artifact: the same files have the same digest, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def artifact_digest(files: Mapping[str, bytearray]) -> str:
    r"""SHA-256 over one line per file, sorted by path: ``<sha256> <size> <path>\n``.

    Args:
        files: path inside the artifact → content.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    lines = (
        f"{hashlib.sha256(content).hexdigest()} {len(content)} {path}\n"
        for path, content in sorted(files.items())
    )
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
