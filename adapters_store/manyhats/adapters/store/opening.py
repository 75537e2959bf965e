"""Opens a store: a directory, or object storage with a catalogue in a database."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.disk.store_errors import store_errors
from manyhats.adapters.errors import StoreConfigError, StoreMissingError
from manyhats.adapters.limits import DEFAULT_CACHE_BYTES, AdapterLimits, Quotas
from manyhats.adapters.sites import BaseDescription
from manyhats.adapters.sources.sources import AdapterSources
from manyhats.adapters.store.artifacts.local import ARTIFACTS, LocalArtifacts
from manyhats.adapters.store.artifacts.storage import ArtifactStorage
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.publication import Publisher
from manyhats.adapters.store.registering import Registering
from manyhats.adapters.store.store import AdapterStore

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CATALOGUE_FILE = "catalogue.db"

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


def open_store(
    store: str | Path,
    base: BaseDescription | None,
    allowed_roots: Sequence[Path] = (),
    *,
    catalogue_url: str = "",
    url_prefixes: Sequence[str] = (),
    limits: AdapterLimits | None = None,
    quotas: Quotas | None = None,
    cache_directory: Path | None = None,
    cache_max_bytes: int = DEFAULT_CACHE_BYTES,
    create: bool = True,
    sweep: bool = True,
) -> AdapterStore:
    """Open a store, creating it if missing; what a crash left in it is removed.

    A directory holds everything: ``artifacts/``, ``catalogue.db`` and ``scratch/``. Object storage holds only
    artifacts; the catalogue is then a database that every replica can reach.

    Args:
        store: a directory, or a URL such as ``s3://bucket/manyhats``.
        base: the resident base; None for maintenance only (list, verify, gc, export, activate, delete).
        allowed_roots: the directories that sources may be under.
        catalogue_url: a database; empty for the directory's own.
        url_prefixes: what source URLs may begin with, such as ``s3://bucket/adapters/``; none by default.
        limits: how large an adapter may be.
        quotas: how much the store may hold.
        cache_directory: where local copies from object storage are kept; None for none.
        cache_max_bytes: the size limit of those copies.
        create: create a missing directory, and missing tables of a database; otherwise they are an error.
        sweep: remove what a crash left; otherwise ``gc`` finds it.

    Raises:
        StoreConfigError: the settings are inconsistent; ``subject`` is the setting.
        StoreMissingError: there is no store, and none is to be created.
        StoreError: the store cannot be read or written.
    """
    limits, quotas = limits or AdapterLimits(), quotas or Quotas()
    directory = _directory(store)
    if directory is not None:
        _make(directory, create=create)
        catalogue_url = catalogue_url or f"sqlite:///{directory / _CATALOGUE_FILE}"
    elif not catalogue_url:
        raise StoreConfigError("catalogue_url", "must be given if the artifacts are in object storage")
    with contextlib.ExitStack() as undo:
        catalogue = Catalogue(catalogue_url, create=create)
        undo.callback(catalogue.close)
        storage = open_artifacts(
            directory or str(store), limits, cache_directory=cache_directory, cache_max_bytes=cache_max_bytes
        )
        # Nothing may be removed unless this catalogue is certain to know what is needed.
        storage.claim(catalogue.catalogue_id)
        scratch = _scratch(directory, quotas)
        undo.callback(scratch.close)
        if sweep:
            storage.sweep(catalogue.named)
            scratch.sweep()
        sources = AdapterSources(allowed_roots, url_prefixes, scratch, limits)
        undo.pop_all()
    publisher = Publisher(storage, catalogue, quotas)
    registering = Registering(sources, scratch, publisher, base, limits)
    return AdapterStore(storage, catalogue, registering, scratch, base, limits)


def _directory(store: str | Path) -> Path | None:
    """A store's directory, with links resolved; None for object storage."""
    if isinstance(store, str) and _URL.match(store):
        parts = urlsplit(store)
        if parts.scheme.lower() != "file":
            return None
        store = unquote(parts.path)
    if not str(store):
        raise StoreConfigError("store", "is empty")
    return Path(os.path.realpath(store))


def _make(directory: Path, *, create: bool) -> None:
    if "?" in str(directory):
        raise StoreConfigError("store", "a store's path cannot have a question mark")
    if not create and not (directory / ARTIFACTS).is_dir():
        raise StoreMissingError("store", "there is no store in this directory")
    with store_errors():
        directory.mkdir(parents=True, exist_ok=True)


def _scratch(directory: Path | None, quotas: Quotas) -> Scratch:
    if directory is None:
        return Scratch.temporary(quotas.max_transfers)
    return Scratch(directory / "scratch", quotas.max_transfers)


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
