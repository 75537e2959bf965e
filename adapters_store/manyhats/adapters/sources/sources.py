"""Where adapters are registered from: directories under allowed roots, and URLs under allowed prefixes.

Remote files are first copied into a scratch directory, their sizes checked before a byte is taken; from then on it is a
directory like any other.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from manyhats.adapters.disk.files import SourceDirectory, open_source
from manyhats.adapters.disk.scratch import Scratch, ScratchDirectory
from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreConfigError,
)
from manyhats.adapters.formats.adapterhub import format as adapterhub_format
from manyhats.adapters.formats.artifact_files import FILES, max_bytes_of
from manyhats.adapters.formats.peft import format as peft_format
from manyhats.adapters.formats.text_files import MAX_BYTES
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sources.http import HttpDirectory
from manyhats.adapters.sources.objects import ObjectDirectory, RemoteDirectory

_OBJECT_SCHEMES = ("s3", "gs", "abfs", "memory")
_HTTP_SCHEMES = ("https", "http")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# No query, fragment, user, escape, glob, or "::" that would chain file systems.
_PLAIN_URL = re.compile(r"[a-z][a-z0-9]*://[A-Za-z0-9._-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~+=,@-]+)*/?")
_MAX_URL_LENGTH = 2048
# A download ends within this time, plus what a slow line needs.
_DEADLINE_S = 60.0
_SLOWEST_BYTES_PER_S = 1024 * 1024

OpenRemote = Callable[[str], RemoteDirectory]


def open_remote(uri: str) -> RemoteDirectory:
    """The directory that a plain URL names."""
    return HttpDirectory(uri) if uri.startswith(("http://", "https://")) else ObjectDirectory(uri)


class AdapterSources:
    """Opens sources that the operator allows.

    Args:
        allowed_roots: directories; each is resolved.
        url_prefixes: such as ``s3://bucket/adapters/``; each names a host or bucket and ends in ``/``. A URL may be
            registered from if it begins with one of them. None by default, for web servers too.
        scratch: takes what is downloaded.
        limits: bound a download.
        open_remote: reads a URL.

    Raises:
        StoreConfigError: a prefix is malformed.
    """

    def __init__(
        self,
        allowed_roots: Sequence[Path],
        url_prefixes: Sequence[str],
        scratch: Scratch,
        limits: AdapterLimits,
        open_remote: OpenRemote = open_remote,
    ) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in allowed_roots)
        self._prefixes = tuple(check_url_prefix(prefix) for prefix in url_prefixes)
        self._scratch = scratch
        self._limits = limits
        self._open_remote = open_remote

    @contextlib.contextmanager
    def open(self, uri: str) -> Iterator[SourceDirectory]:
        """The directory that ``uri`` names: a path, ``file://…``, or a URL under an allowed prefix.

        Raises:
            SourceNotAllowedError: it lies outside of what is allowed, or may not be read.
            SourceNotFoundError: nothing is there.
            SourceUnavailableError: it cannot be reached now.
            AdapterInvalidError, AdapterTooLargeError, AdapterUnsafeError, AdapterUnsupportedError: it is not a
                directory of an adapter, or over a limit.
            QuotaExceededError: the limit of simultaneous transfers is reached.
            StoreError: it cannot be written.
        """
        if not _is_remote(uri):
            with open_source(uri, self._roots) as directory:
                yield directory
            return
        _check_url(uri, self._prefixes)
        remote = self._open_remote(uri.rstrip("/"))
        with self._scratch.directory() as scratch:
            _Download(uri, remote, scratch, self._limits).run()
            yield SourceDirectory(scratch.descriptor)


def check_source(
    uri: str, allowed_roots: Sequence[Path], url_prefixes: Sequence[str], limits: AdapterLimits
) -> None:
    """Check that there is an adapter at a source and that its files can be opened, without reading any.

    For a URL, only whether it is allowed is checked.

    Raises:
        AdapterError: as ``AdapterSources.open`` and the registration of its result.
    """
    if _is_remote(uri):
        _check_url(uri, url_prefixes)
        return
    roots = [Path(os.path.realpath(root)) for root in allowed_roots]
    with open_source(uri, roots) as directory:
        peft_format.check_directory(directory)
        present = set(directory.names())
        for name in FILES:
            if name in present:
                with directory.open_file(name, max_bytes_of(name, limits)):
                    pass


def _check_url(uri: str, prefixes: Sequence[str]) -> None:
    is_plain = len(uri) <= _MAX_URL_LENGTH and _PLAIN_URL.fullmatch(uri) is not None
    segments = uri.split("/")
    if not is_plain or "." in segments or ".." in segments:
        raise SourceNotAllowedError(
            uri, "a URL is scheme://host/path of letters, digits and . _ ~ + = , @ -, without .. in it"
        )
    if not any(uri.startswith(prefix) and len(uri) > len(prefix) for prefix in prefixes):
        raise SourceNotAllowedError(uri, "lies outside the allowed URL prefixes")


def check_url_prefix(prefix: str) -> str:
    """Return a URL prefix if it is well formed.

    Raises:
        StoreConfigError: it is not one.
    """
    scheme = prefix.partition("://")[0]
    if scheme not in _OBJECT_SCHEMES + _HTTP_SCHEMES:
        known = ", ".join(_OBJECT_SCHEMES + _HTTP_SCHEMES)
        raise StoreConfigError("url_prefixes", f"'{prefix}' has none of the schemes {known}")
    if (
        not prefix.endswith("/")
        or _PLAIN_URL.fullmatch(prefix) is None
        or "/../" in prefix
        or "/./" in prefix
    ):
        raise StoreConfigError("url_prefixes", f"'{prefix}' is not scheme://host/ or scheme://host/path/")
    return prefix


def _is_remote(uri: str) -> bool:
    scheme = _URL.match(uri)
    return scheme is not None and scheme.group(1).lower() != "file"


class _Download:
    """Copies the files of an adapter from a remote directory into a scratch directory."""

    def __init__(
        self, uri: str, remote: RemoteDirectory, target: ScratchDirectory, limits: AdapterLimits
    ) -> None:
        self._uri = uri
        self._remote = remote
        self._target = target
        self._limits = limits
        self._deadline = time.monotonic() + _DEADLINE_S

    def run(self) -> None:
        """Fetch config, tensors and text files; see ``AdapterSources.open``."""
        sizes = self._remote.sizes()
        if not sizes:
            raise SourceNotFoundError(self._uri, "no file is there")
        peft_format.check_names(sorted(sizes))
        wanted = {name: sizes[name] for name in FILES if name in sizes}
        self._check_sizes(wanted)
        self._deadline += sum(wanted.values()) / _SLOWEST_BYTES_PER_S
        for name, size in wanted.items():
            self._fetch(name, size)

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        for name in (peft_format.CONFIG_FILE, adapterhub_format.HEAD_CONFIG_FILE, *MAX_BYTES):
            limit = max_bytes_of(name, self._limits)
            if sizes.get(name, 0) > limit:
                raise AdapterTooLargeError(name, f"has {sizes[name]} bytes; the limit is {limit}")
        if (total := sum(sizes.values())) > self._limits.max_size_bytes:
            raise AdapterTooLargeError(
                self._uri, f"has {total} bytes; the limit is {self._limits.max_size_bytes}"
            )

    def _fetch(self, name: str, size: int) -> None:
        descriptor = self._target.create(name)
        with contextlib.closing(self._remote.read(name, size)) as pieces, open(descriptor, "wb") as file:
            taken = 0
            for piece in pieces:
                taken += len(piece)
                if time.monotonic() > self._deadline:
                    raise SourceUnavailableError(self._uri, f"'{name}' arrives too slowly")
                if taken > size:
                    break
                with store_errors():
                    file.write(piece)
            with store_errors():
                file.flush()
        if taken != size:
            raise AdapterInvalidError(name, "changed while it was read")
