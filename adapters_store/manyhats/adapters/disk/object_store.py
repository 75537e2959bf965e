"""Objects of an object store, by fsspec: listed, read, written and deleted under one prefix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import fsspec

from manyhats.adapters.errors import StoreConfigError, StoreUnavailableError

_READ_BYTES = 16 * 1024 * 1024
_DELETED_TOGETHER = 500

EXTRAS: Mapping[str, str] = MappingProxyType({"s3": "s3", "gs": "gcs", "gcs": "gcs", "memory": "server"})
"""The package that each scheme needs, as an extra of this one. ``memory`` is this process's own."""

# The file systems retry on their own; this bounds how often, and how long a try takes.
_S3_TRIES = 2
_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "s3": {
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": 20,
                "retries": {"mode": "standard", "total_max_attempts": 2},
            }
        },
    }
)


class ObjectStore:
    """Objects under one URL; names are relative to it. Thread-safe.

    Every fault is a ``StoreError``; a missing object is not a fault.

    Args:
        url: such as ``s3://bucket/prefix``.
        options: of the fsspec file system; they replace the defaults.

    Raises:
        StoreConfigError: the scheme is not served, its package is missing, or it does not accept these options.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        scheme, _, path = url.partition("://")
        scheme = scheme.lower()
        if scheme not in EXTRAS:
            raise StoreConfigError("store", f"the scheme '{scheme}' is not served; s3 and gs are")
        self._root = path.strip("/")
        if not self._root:
            raise StoreConfigError("store", f"names no bucket; give {scheme}://bucket/prefix")
        self._files = _file_system(scheme, options)

    def sizes(self, directory: str) -> dict[str, int]:
        """All objects below a directory, at any depth: name → bytes."""
        with _errors():
            found = self._files.find(f"{self._root}/{directory}", detail=True)
        start = len(self._root) + 1
        return {path.lstrip("/")[start:]: int(entry["size"]) for path, entry in found.items()}

    def read(self, name: str, size_bytes: int) -> bytearray:
        """The first ``size_bytes`` of an object; fewer if it is shorter or missing."""
        data = bytearray()
        while len(data) < size_bytes:
            end = min(len(data) + _READ_BYTES, size_bytes)
            piece = b""
            with _errors(), contextlib.suppress(FileNotFoundError):
                piece = self._files.cat_file(f"{self._root}/{name}", start=len(data), end=end)
            if not piece:
                break
            data += piece
        return data

    def write(self, name: str, content: bytes | bytearray) -> None:
        """Write a whole object; it appears at once."""
        with _errors():
            self._files.pipe_file(f"{self._root}/{name}", bytes(content))

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; one that is already gone is not an error."""
        for begin in range(0, len(names), _DELETED_TOGETHER):
            paths = [f"{self._root}/{name}" for name in names[begin : begin + _DELETED_TOGETHER]]
            with _errors(), contextlib.suppress(FileNotFoundError):
                self._files.rm(paths)


def _file_system(scheme: str, options: Mapping[str, Any]) -> Any:
    # Nothing is cached: other processes write, too.
    own = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        files = fsspec.filesystem(scheme, **{**own, **_OPTIONS.get(scheme, {}), **options})
    except ImportError:
        raise StoreConfigError(
            "store", f"needs a package for {scheme}://; pip install 'manyhats[{EXTRAS[scheme]}]'"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise StoreConfigError("storage_options", f"are not accepted by {scheme}://: {error}") from error
    if scheme == "s3":
        files.retries = _S3_TRIES
    return files


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn whatever a file system raises into a StoreError."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreUnavailableError("store", "the object store has no such bucket") from error
    except PermissionError as error:
        raise StoreUnavailableError("store", "the object store refuses the server's credentials") from error
    except Exception as error:
        # Each file system has its own error classes, and their texts name hosts and paths.
        raise StoreUnavailableError(
            "store", f"the object store cannot be reached ({type(error).__name__})"
        ) from error
