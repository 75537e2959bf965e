"""Opens the artifact storage that a path or URL names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from manyhats.adapters.errors import StoreConfigError
from manyhats.adapters.limits import DEFAULT_CACHE_BYTES, AdapterLimits
from manyhats.adapters.store.artifacts.local import LocalArtifacts
from manyhats.adapters.store.artifacts.storage import ArtifactStorage

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def open_artifacts(
    url: str | Path,
    limits: AdapterLimits,
    *,
    cache_directory: Path | None = None,
    cache_max_bytes: int = DEFAULT_CACHE_BYTES,
    storage_options: Mapping[str, Any] = _NO_OPTIONS,
) -> ArtifactStorage:
    """Open a directory (a path, or ``file:///…``), or object storage (``s3://bucket/prefix``, ``gs://…``).

    Args:
        url: where the artifacts are or will be kept.
        limits: how large an artifact may be.
        cache_directory: a local directory for copies from object storage; None for none. Processes may share it.
        cache_max_bytes: how large the cache may grow.
        storage_options: options of object storage's fsspec file system, such as ``endpoint_url``.

    Raises:
        StoreConfigError: the URL is not supported; ``subject`` is the setting.
        StoreError: it cannot be reached or written.
    """
    scheme, separator, _ = str(url).partition("://")
    if isinstance(url, Path) or not separator:
        return LocalArtifacts(Path(url), limits)
    if scheme.lower() == "file":
        return LocalArtifacts(_file_path(url), limits)
    from manyhats.adapters.store.artifacts.remote import open_remote_artifacts

    return open_remote_artifacts(url, limits, cache_directory, cache_max_bytes, storage_options)


def _file_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StoreConfigError("store", "a file URL is file:// followed by an absolute path")
    return Path(unquote(parts.path))
