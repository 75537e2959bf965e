"""The store: whether it is there, can be read and written, and keeps the same time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from manyhats.adapters.disk.object_store import EXTRAS
from manyhats.adapters.errors import AdapterError, StoreMissingError
from manyhats.adapters.store.artifacts.remote import MAX_CLOCK_DIFFERENCE_S
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.opening import open_artifacts
from manyhats.adapters.store.store import AdapterStore
from manyhats.server.access.errors import ConfigError
from manyhats.server.doctor.finding import Finding, failure, ok, warning
from manyhats.server.doctor.model import cannot_write
from manyhats.server.doctor.packages import look_at_packages
from manyhats.server.lifetime.config import ServeConfig
from manyhats.server.lifetime.wiring import open_adapter_store
from manyhats.settings.printing import without_secrets

_NOTICEABLE_S = 10.0


def extras_of(config: ServeConfig) -> list[str]:
    """The extras that the store, its catalogue and the sources of adapters need."""
    urls = [str(config.store), *config.adapter_url_prefixes]
    schemes = [url.partition("://")[0].lower() for url in urls if "://" in url]
    needed = [EXTRAS[scheme] for scheme in schemes if scheme in EXTRAS]
    needed += ["postgres"] if config.catalogue.startswith("postgres") else []
    return sorted({extra for extra in needed if extra != "server"})


def look_at_extras(config: ServeConfig) -> Iterator[Finding]:
    """Whether the packages of object stores and databases are there."""
    for extra in extras_of(config):
        yield from look_at_packages(extra)


def look_at_roots(config: ServeConfig) -> Iterator[Finding]:
    """Whether the directories that adapters may be registered from are there."""
    for root in config.adapter_roots:
        if not Path(root).is_dir():
            text = f"--adapter-root {root} is not a directory: nothing can be registered from it"
            yield warning("adapter roots", text, "make it, or correct the setting")


def look_at_store(config: ServeConfig) -> Iterator[Finding | frozenset[str]]:
    """Whether the store can be used; also gives the tasks in it, if it can be read."""
    try:
        store = open_adapter_store(config, None, only_looks=True)
    except StoreMissingError as error:
        yield from _missing(config, error)
        return
    except (AdapterError, ConfigError) as error:
        advice = "see --store and --catalogue, and whether what they name is up and lets this user in"
        yield failure("store", f"{_name(config)}: {with_cause(error)}", advice)
        return
    try:
        yield store.task_ids()
        yield from _use(store, config)
    finally:
        store.close()


def _missing(config: ServeConfig, error: StoreMissingError) -> Iterator[Finding]:
    """What keeps the first start from making it."""
    if error.subject == "store":
        yield from _missing_directory(config)
        return
    yield _no_tables(config)
    begin_s = time.perf_counter()
    try:
        open_artifacts(config.store, config.adapter_limits).try_out()
    except AdapterError as fault:
        yield failure("store", f"{_name(config)}: {with_cause(fault)}", "see --store and its credentials")
    else:
        yield _round_trip(config, begin_s)


def _missing_directory(config: ServeConfig) -> Iterator[Finding]:
    problem = cannot_write(Path(str(config.store).removeprefix("file://")))
    if problem:
        yield failure("store", f"{config.store} {problem}", "make it writable, or give another --store")
    else:
        yield ok("store", f"{config.store} is not there yet: the first start makes it")
    if not config.catalogue:
        return
    try:
        catalogue = Catalogue(config.catalogue, create=False)
    except StoreMissingError:
        yield _no_tables(config)
    except AdapterError as error:
        yield failure("catalogue", with_cause(error), "see --catalogue, and whether its database is up")
    else:
        num_tasks = len(catalogue.task_ids())
        catalogue.close()
        text = f"it has {num_tasks} tasks, and the store's directory is not there"
        yield warning("catalogue", text, "see --store, and whether its file system is mounted")


def _no_tables(config: ServeConfig) -> Finding:
    where = without_secrets(config.catalogue) or "its file"
    return ok("catalogue", f"{where} can be reached; the first start makes its tables")


def _use(store: AdapterStore, config: ServeConfig) -> Iterator[Finding]:
    """Whether an open store can be read and written."""
    try:
        store.check_reads()
        begin_s = time.perf_counter()
        store.try_out()
    except AdapterError as error:
        advice = "give the server's user the right to write there, and the place room"
        yield failure("store", f"{_name(config)}: {with_cause(error)}", advice)
        return
    yield _round_trip(config, begin_s, f"{len(store.task_ids())} tasks; ")
    difference_s = store.clock_difference_s()
    if difference_s is None:
        return
    text = f"{abs(difference_s):.1f} s {'behind' if difference_s > 0 else 'ahead of'} the database's"
    advice = "set both by NTP"
    if abs(difference_s) > MAX_CLOCK_DIFFERENCE_S:
        yield failure("clock", f"{text}: files of a registration may be taken for old ones", advice)
    elif abs(difference_s) > _NOTICEABLE_S:
        yield warning("clock", text, advice)
    else:
        yield ok("clock", text)


def _round_trip(config: ServeConfig, begin_s: float, found: str = "") -> Finding:
    milliseconds = (time.perf_counter() - begin_s) * 1000
    return ok("store", f"{_name(config)}: {found}written, read and removed in {milliseconds:.0f} ms")


def _name(config: ServeConfig) -> str:
    catalogue = f" with {without_secrets(config.catalogue)}" if config.catalogue else ""
    return f"{without_secrets(str(config.store))}{catalogue}"


def with_cause(error: Exception) -> str:
    """An error with what the system, database or library said: who runs this may know."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    said = lines[0] if lines and cause is not error and str(cause) not in str(error) else ""
    return f"{error} ({said})" if said else str(error)
