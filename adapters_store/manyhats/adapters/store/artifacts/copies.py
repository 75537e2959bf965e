r"""Copies of artifacts in an object store: each is written once, and verifies itself.

A copy consists of these objects; the last one makes it exist::

    artifacts/<64 hexadecimal digits>/<unix time, ms>-<random>/<file>
    artifacts/<64 hexadecimal digits>/<unix time, ms>-<random>.manifest

The manifest is the text that the artifact's digest is computed from, one line ``<sha256> <size> <path>\n`` per file. So
the digest verifies the manifest, and the manifest each file.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manyhats.adapters.disk.digest import digest_lines, file_hashes, hex_digits
from manyhats.adapters.disk.object_store import ObjectStore

FileHashes = Mapping[str, tuple[str, int]]
"""Path inside an artifact → SHA-256 and size of its content."""

MAX_MANIFEST_BYTES = 1024 * 1024

_OBJECT = re.compile(r"artifacts/([0-9a-f]{64})/((\d{13})-[0-9a-f]{32})(?:\.manifest|/[^/]+)")
_LINE = re.compile(r"([0-9a-f]{64}) (\d{1,15}) ([^/\n]+)\n")


@dataclass(frozen=True, slots=True)
class ArtifactCopy:
    """A copy, or the part of it that exists.

    Attributes:
        digest: the artifact's.
        key: prefix of its files, which are objects ``<key>/<file>``.
        published: when its publication began, unix time in seconds.
        sizes: object name → bytes, as listed.
    """

    digest: str
    key: str
    published: float
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def manifest(self) -> str:
        """The object that makes it exist."""
        return f"{self.key}.manifest"

    @property
    def exists(self) -> bool:
        """Whether its publication was finished."""
        return self.manifest in self.sizes

    @property
    def size_bytes(self) -> int:
        """The size of all its objects."""
        return sum(self.sizes.values())


def new_copy(digest: str, now: float) -> ArtifactCopy:
    """A copy to be written, under a unique name."""
    key = f"artifacts/{hex_digits(digest)}/{int(now * 1000):013d}-{uuid.uuid4().hex}"
    return ArtifactCopy(digest, key, now)


def list_copies(objects: ObjectStore, digest: str | None = None) -> list[ArtifactCopy]:
    """All copies and remains of copies, of one artifact or of all; newest first for each artifact."""
    directory = "artifacts" if digest is None else f"artifacts/{hex_digits(digest)}"
    copies: dict[str, ArtifactCopy] = {}
    for name, size_bytes in objects.sizes(directory).items():
        if match := _OBJECT.fullmatch(name):
            artifact, copy_name, time_ms = match.groups()
            key = f"artifacts/{artifact}/{copy_name}"
            copy = copies.setdefault(key, ArtifactCopy(f"sha256:{artifact}", key, int(time_ms) / 1000))
            copy.sizes[name] = size_bytes
    return sorted(copies.values(), key=lambda copy: copy.key, reverse=True)


def delete_copies(objects: ObjectStore, copies: Sequence[ArtifactCopy]) -> None:
    """Delete all their objects, manifests first, so that none exists without its files."""
    objects.delete([copy.manifest for copy in copies if copy.exists])
    objects.delete([name for copy in copies for name in copy.sizes if name != copy.manifest])


def read_manifest(objects: ObjectStore, copy: ArtifactCopy) -> FileHashes | None:
    """The files in a copy's manifest; None if it is missing or damaged."""
    size_bytes = copy.sizes.get(copy.manifest, 0)
    if size_bytes > MAX_MANIFEST_BYTES:
        return None
    text = _read(objects, copy, copy.manifest, hex_digits(copy.digest), size_bytes)
    return None if text is None else parse_manifest(text)


def parse_manifest(text: bytes | bytearray) -> FileHashes:
    """The files in a manifest, if it has the digest."""
    return {name: (sha256, int(size)) for sha256, size, name in _LINE.findall(text.decode())}


def read_file(
    objects: ObjectStore, copy: ArtifactCopy, name: str, sha256: str, size_bytes: int
) -> bytearray | None:
    """The content of a copy's file; None if it is missing or damaged."""
    return _read(objects, copy, f"{copy.key}/{name}", sha256, size_bytes)


def is_whole(objects: ObjectStore, copy: ArtifactCopy) -> bool:
    """Whether every byte of a copy is present and right."""
    manifest = read_manifest(objects, copy)
    return manifest is not None and all(
        read_file(objects, copy, name, *expected) is not None for name, expected in manifest.items()
    )


def check_files(digest: str, files: Mapping[str, bytes | bytearray]) -> FileHashes:
    """The hashes of the files to copy.

    Raises:
        ValueError: a file's name cannot be in a manifest, or the digest differs.
    """
    hashes = file_hashes(files)
    lines = digest_lines(hashes)
    if parse_manifest(lines) != hashes or hashlib.sha256(lines).hexdigest() != hex_digits(digest):
        raise ValueError(f"not the files of {digest}")
    return hashes


def _read(
    objects: ObjectStore, copy: ArtifactCopy, name: str, sha256: str, size_bytes: int
) -> bytearray | None:
    if copy.sizes.get(name) != size_bytes:
        return None
    content = objects.read(name, size_bytes)
    return content if hashlib.sha256(content).hexdigest() == sha256 else None
