"""What a source on another machine must offer to be fetched, and object stores, by fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol

from manyhats.adapters.errors import (
    AdapterError,
    AdapterTooLargeError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceUnavailableError,
)

MAX_ENTRIES = 4096
_CHUNK_BYTES = 8 * 1024 * 1024


class RemoteDirectory(Protocol):
    """One directory of files elsewhere. Errors are ``AdapterError``, their subject the uri."""

    def sizes(self) -> Mapping[str, int]:
        """The files directly in it: name → bytes."""
        ...

    def read(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        """A file's content from its start, in pieces. At most ``size_bytes`` and one piece are taken."""
        ...


class ObjectDirectory:
    """A directory of an object store.

    Args:
        uri: of the directory, such as ``s3://bucket/adapters/fr``; checked by the caller.

    Raises:
        SourceNotAllowedError: the package that reads this scheme is not installed.
    """

    def __init__(self, uri: str) -> None:
        import fsspec  # here: few servers register from object stores

        self._uri = uri
        scheme, _, self._path = uri.partition("://")
        with _source_errors(uri):
            # Nothing cached: the objects may have changed since another registration.
            options = {"skip_instance_cache": True, "use_listings_cache": False}
            self._files: Any = fsspec.filesystem(scheme, **options)

    def sizes(self) -> Mapping[str, int]:
        """The objects directly under it."""
        with _source_errors(self._uri):
            entries = self._files.ls(self._path, detail=True)
        if len(entries) > MAX_ENTRIES:
            raise AdapterTooLargeError(self._uri, f"has over {MAX_ENTRIES} entries")
        files = (entry for entry in entries if entry["type"] == "file")
        return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in files}

    def read(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        """An object, in ranges."""
        for begin in range(0, size_bytes, _CHUNK_BYTES):
            end = min(begin + _CHUNK_BYTES, size_bytes)
            with _source_errors(self._uri):
                piece = self._files.cat_file(f"{self._path}/{name}", start=begin, end=end)
            yield piece


@contextlib.contextmanager
def _source_errors(uri: str) -> Iterator[None]:
    """Turn file system errors into errors of the source."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        raise _source_error(uri, error) from error


def _source_error(uri: str, error: Exception) -> AdapterError:
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return SourceNotFoundError(uri, "nothing is there")
        case PermissionError():
            return SourceNotAllowedError(uri, "may not be read with the server's credentials")
        case ImportError():
            return SourceNotAllowedError(uri, "the server has no package installed that reads this scheme")
    return SourceUnavailableError(uri, f"cannot be read now ({type(error).__name__})")
