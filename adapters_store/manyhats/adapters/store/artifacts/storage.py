"""Where the bytes of artifacts are kept: what every artifact storage promises.

An artifact exists whole or not at all, and is never changed. Rows of the catalogue name artifacts; the order
of writing keeps every row's bytes in place: publish first and commit the row after; delete the row first and
the bytes after, if no row names them any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

NamedDigests = Callable[[Collection[str]], Collection[str]]
"""Those of the given digests that some row names, read from the catalogue's database at the call."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed.

    Attributes:
        num_artifacts: published artifacts, or spare copies of them, that no row needs.
        num_unfinished: publications and deletions that did not end.
        size_bytes: of both.
    """

    num_artifacts: int
    num_unfinished: int
    size_bytes: int


class ArtifactStorage(Protocol):
    """Immutable artifacts by digest, shared by any number of threads and processes.

    A digest is ``sha256:`` and 64 hexadecimal digits; anything else is a ValueError. Every method may raise
    StoreUnavailableError, and those that write StoreFullError.
    """

    def claim(self, catalogue_id: str) -> None:
        """Bind the storage to the catalogue whose rows name its artifacts; to be called before any sweep.

        Raises:
            StoreUnavailableError: it is another catalogue's, whose artifacts a sweep would remove.
        """

    def publishing(self) -> AbstractContextManager[None]:
        """Hold off removal, from before ``publish`` until the rows that name the artifacts are committed."""

    def publish(self, digest: str, files: Mapping[str, bytes | bytearray]) -> None:
        """Store an artifact; durable on return. One that is there and whole is kept, a damaged one replaced."""

    def read(self, digest: str) -> dict[str, bytearray]:
        """The files of an artifact: path inside it → content, checked against the digest.

        Raises:
            DataLossError: it is missing, or not what was published; ``subject`` is the digest.
            AdapterTooLargeError: it is over a limit that was higher when it was published.
        """

    def is_whole(self, digest: str) -> bool:
        """Whether the stored bytes, read again and past any cache, have this digest."""

    def digests(self) -> frozenset[str]:
        """What is published."""

    def remove(self, digests: Collection[str], named: NamedDigests) -> None:
        """Remove those of ``digests`` that no row names. Where removal cannot be held off, ``gc`` does it."""

    def sweep(self, named: NamedDigests) -> Swept:
        """Remove at start what a crash left, where that can be told safely and quickly."""

    def gc(self, named: NamedDigests, *, older_than_s: float) -> Swept:
        """Remove what no row names.

        Args:
            named: asked after the candidates are listed.
            older_than_s: spares what was published later; it matters where removal cannot be held off.
        """
