"""The digest that names an artifact: the same files have the same digest, wherever they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def artifact_digest(files: Mapping[str, bytes | bytearray]) -> str:
    r"""SHA-256 over one line per file, sorted by path: ``<sha256> <size> <path>\n``.

    Args:
        files: path inside the artifact → content.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    return digest_of_hashes(file_hashes(files))


def digest_of_hashes(files: Mapping[str, tuple[str, int]]) -> str:
    """``artifact_digest`` of files that are known by their SHA-256 and size: path → both."""
    return "sha256:" + hashlib.sha256(digest_lines(files)).hexdigest()


def digest_lines(files: Mapping[str, tuple[str, int]]) -> bytes:
    """The lines that are digested."""
    return "".join(f"{sha256} {size} {path}\n" for path, (sha256, size) in sorted(files.items())).encode()


def file_hashes(files: Mapping[str, bytes | bytearray]) -> dict[str, tuple[str, int]]:
    """Path → SHA-256 and size of its content."""
    return {path: (hashlib.sha256(content).hexdigest(), len(content)) for path, content in files.items()}


def hex_digits(digest: str) -> str:
    """The 64 hexadecimal digits of a digest.

    Raises:
        ValueError: it is not one.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"not a digest: {digest!r}")
    return match.group(1)
