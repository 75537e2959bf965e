"""Where the bytes of artifacts are kept: the protocol of every artifact storage.

An artifact is complete or absent, and never changes. Rows of the catalogue name artifacts, and the order of writes
keeps every row's bytes: publish first, then commit the row; delete the row first, then the bytes if no row names them
any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

NamedDigests = Callable[[Collection[str]], Collection[str]]
"""Returns those of the given digests that some row names, read from the catalogue's database at each call."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed.

    Attributes:
        num_artifacts: published artifacts that no row needs, or superseded copies.
        num_unfinished: publications and deletions that did not complete.
        size_bytes: of both.
    """

    num_artifacts: int
    num_unfinished: int
    size_bytes: int


class ArtifactStorage(Protocol):
    """Immutable artifacts by digest, shared by any number of threads and processes.

    A digest is ``sha256:`` and 64 hexadecimal digits; anything else is a ValueError. Every method may raise
    StoreUnavailableError; those that write may also raise StoreFullError.

    Attributes:
        is_far: whether reading waits for a network, unless it was fetched.
    """

    is_far: bool

    def claim(self, catalogue_id: str) -> None:
        """Bind the storage to the catalogue whose rows name its artifacts. Call it before any sweep.

        Raises:
            StoreUnavailableError: it belongs to another catalogue, whose artifacts a sweep would remove.
        """

    def check_reads(self) -> None:
        """Check, cheaply, that artifacts can be read.

        Raises:
            StoreUnavailableError: none can.
        """

    def check_writes(self) -> None:
        """Check, cheaply and as far as can be told without writing one, that artifacts can be added.

        Raises:
            StoreError: none can.
        """

    def try_out(self) -> None:
        """Write, read and remove something that is no artifact, in a place that nothing else looks at.

        Raises:
            StoreError: one of these is impossible, or what is read is not what was written.
        """

    def publishing(self) -> AbstractContextManager[None]:
        """Hold off removals, from before ``publish`` until the rows that name the artifacts are committed."""

    def publish(self, digest: str, files: Mapping[str, bytes | bytearray]) -> None:
        """Store an artifact; durable on return. An existing whole one is kept, a damaged one replaced."""

    def fetch(self, digest: str) -> None:
        """Bring an artifact so near that ``read`` waits for no network, if it is far and there is a place for it.

        Raises:
            DataLossError, AdapterTooLargeError: as ``read``.
        """

    def read(self, digest: str) -> dict[str, bytearray]:
        """The files of an artifact: path inside it → content, checked against the digest.

        Raises:
            DataLossError: it is missing, or not what was published; ``subject`` is the digest.
            AdapterTooLargeError: it is over a limit that was higher when it was published.
        """

    def is_whole(self, digest: str) -> bool:
        """Whether the stored bytes, read again and past any cache, have this digest."""

    def digests(self) -> frozenset[str]:
        """The published artifacts."""

    def remove(self, digests: Collection[str], named: NamedDigests) -> None:
        """Remove those of ``digests`` that no row names. If removals cannot be held off, ``gc`` does this instead."""

    def sweep(self, named: NamedDigests) -> Swept:
        """Remove what a crash left, at start, if that can be determined safely and quickly."""

    def gc(self, named: NamedDigests, *, older_than_s: float) -> Swept:
        """Remove what no row names.

        Args:
            named: called after the candidates are listed.
            older_than_s: spares what was published later; it matters if removals cannot be held off.
        """
