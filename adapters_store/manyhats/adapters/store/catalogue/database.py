"""The catalogue's database, SQLite or PostgreSQL: connections, transactions, and what their errors mean."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from manyhats.adapters.errors import (
    StoreConfigError,
    StoreError,
    StoreFullError,
    StoreMissingError,
    StoreUnavailableError,
)
from manyhats.adapters.store.catalogue.tables import CATALOGUE, METADATA, SCHEMA_VERSION

IN_MEMORY = "sqlite://"

_SUBJECT = "catalogue_url"
_MEMORY = (None, "", ":memory:")
_WAIT_S = 10
# Defaults that a URL may override, as in "?connect_timeout=30".
_SQLITE_DEFAULTS: Mapping[str, Any] = MappingProxyType({"timeout": _WAIT_S})
_POSTGRESQL_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "connect_timeout": 5,
        "tcp_user_timeout": _WAIT_S * 1000,
        "options": f"-c statement_timeout={_WAIT_S}s -c idle_in_transaction_session_timeout={_WAIT_S}s",
    }
)
# A number that nobody else is likely to lock.
_POSTGRESQL_SCHEMA_LOCK = 0x6D616E796861


@dataclass(frozen=True, slots=True)
class WriteTransaction:
    """A transaction that excludes other writers.

    Attributes:
        connection: in the transaction; it sees everything that earlier writers committed.
        generation: the catalogue's generation once this is committed.
    """

    connection: Connection
    generation: int


class CatalogueDatabase:
    """Transactions on the catalogue's tables, which are created if missing. Thread-safe.

    Every database error is a ``StoreUnavailableError``, or a ``StoreFullError`` if its disk is full.

    Args:
        url: ``sqlite:////directory/catalogue.db``, ``postgresql+psycopg://user@host/database``, or ``IN_MEMORY``.
        create: create missing tables; otherwise they are an error.

    Attributes:
        catalogue_id: identifies these tables; random, made with them.
        num_replaced: how often its file was replaced by another copy of these tables.

    Raises:
        StoreConfigError: the URL is not supported, or the tables are of another version of this software.
        StoreMissingError: there are none, and none are to be created.
        StoreUnavailableError: the database cannot be reached.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        parsed = _parse(url)
        self._writers = _create_engine(parsed)
        self._readers = self._writers.execution_options(**_READER_OPTIONS[parsed.get_backend_name()])
        self.num_replaced = 0
        is_file = parsed.get_backend_name() == "sqlite" and parsed.database not in _MEMORY
        self._path = parsed.database if is_file else None
        self._file: tuple[int, int] | None = None
        self._file_lock = threading.Lock()
        try:
            if self._path is not None and not create and not os.path.exists(self._path):
                raise _missing()  # connecting would create it
            with _database_errors(), self._writers.begin() as connection:
                self.catalogue_id = _open_schema(connection, create=create)
            self._require_file()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that reads one consistent snapshot."""
        self._require_file()
        with _database_errors(), self._readers.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTransaction]:
        """A transaction that writes; it is committed unless the block raises."""
        self._require_file()
        with _database_errors(), self._writers.begin() as connection:
            counted = update(CATALOGUE).values(generation=CATALOGUE.c.generation + 1)
            generation = connection.execute(counted.returning(CATALOGUE.c.generation)).scalar_one()
            yield WriteTransaction(connection, generation)

    def check_writes(self) -> None:
        """Write, and take it back: nobody sees anything of it.

        Raises:
            StoreError: nothing can be written.
        """
        with contextlib.suppress(_TakenBackError), self.write():
            raise _TakenBackError

    def clock_difference_s(self) -> float | None:
        """Seconds that the database server's clock is ahead of this machine's; None if there is no server."""
        if self._writers.dialect.name != "postgresql":
            return None
        with self.read() as connection:
            before_s = time.time()
            theirs = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
            return float(theirs) - (before_s + time.time()) / 2

    def close(self) -> None:
        """Close all connections."""
        self._writers.dispose()

    def _require_file(self) -> None:
        """Open SQLite's file again if another is in its place.

        Connections would go on with the file that they have opened, though it is deleted, moved, or of a file system
        that is no longer there, and whatever they wrote would be lost. One that is missing would be created, empty.

        Raises:
            StoreUnavailableError: there is none, or it is not this catalogue's.
        """
        if self._path is None:
            return
        with self._file_lock:
            try:
                status = os.stat(self._path)
            except OSError as error:
                raise StoreUnavailableError("catalogue", "its file is not there") from error
            file = (status.st_dev, status.st_ino)
            if self._file is not None and file != self._file:
                self._reopen(self._path)
            self._file = file

    def _reopen(self, path: str) -> None:
        # Not by the pool, which must not have a connection to another catalogue.
        address = f"{Path(path).absolute().as_uri()}?mode=rw"
        try:
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_WAIT_S)) as connection:
                found = connection.execute(f"SELECT catalogue_id FROM {CATALOGUE.name}").fetchall()
        except sqlite3.Error as error:
            raise StoreUnavailableError("catalogue", "its file cannot be read") from error
        if found != [(self.catalogue_id,)]:
            raise StoreUnavailableError("catalogue", "its file is that of another catalogue")
        self._writers.dispose()
        self.num_replaced += 1


# SQLite: see ``_prepare_sqlite``. PostgreSQL by default gives each statement its own snapshot.
_READER_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sqlite": {"sqlite_begin": "BEGIN"},
        "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
    }
)


def _parse(url: str) -> URL:
    """The URL, with the driver used; messages leave it out, since it may have a password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StoreConfigError(_SUBJECT, "is not a database URL") from None
    match parsed.drivername:
        case "sqlite" | "sqlite+pysqlite" | "postgresql+psycopg":
            return parsed
        case "postgresql" | "postgres":
            return parsed.set(drivername="postgresql+psycopg")
    raise StoreConfigError(
        _SUBJECT, f"names the database '{parsed.drivername}'; sqlite and postgresql+psycopg are served"
    )


def _create_engine(url: URL) -> Engine:
    is_sqlite = url.get_backend_name() == "sqlite"
    defaults = _SQLITE_DEFAULTS if is_sqlite else _POSTGRESQL_DEFAULTS
    connect_args = {key: value for key, value in defaults.items() if key not in url.query}
    if is_sqlite:
        return _create_sqlite_engine(url, connect_args)
    try:
        # Pings, so that a server restarted in the meantime causes no error.
        return create_engine(url, connect_args=connect_args, pool_pre_ping=True)
    except ModuleNotFoundError:
        raise StoreConfigError(_SUBJECT, "needs psycopg: pip install 'manyhats[postgres]'") from None


def _create_sqlite_engine(url: URL, connect_args: dict[str, Any]) -> Engine:
    # An in-memory database lives in its one connection, which threads use in turn.
    one = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0} if url.database in _MEMORY else {}
    engine = create_engine(url, connect_args=connect_args | {"check_same_thread": False}, **one)
    _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: object) -> None:
        # Transactions are begun below, not by Python's driver.
        connection.isolation_level = None
        _enter_wal(connection)
        # A commit is on disk when it returns.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the lock immediately: one that has read first cannot wait for another.
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE"))


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Readers then never wait for a writer. SQLite does not wait to switch the mode, so this does."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The low byte is the kind of error, the others its details.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class _TakenBackError(Exception):
    """Ends a transaction without a trace."""


def _missing() -> StoreMissingError:
    return StoreMissingError(_SUBJECT, "has no tables of a store yet")


def _open_schema(connection: Connection, *, create: bool) -> str:
    """Create the tables if missing and asked to; returns the catalogue's id."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRESQL_SCHEMA_LOCK})
    is_new = not inspect(connection).has_table(CATALOGUE.name)
    if is_new and not create:
        raise _missing()
    # Also what earlier versions of this software, which ignore it, did not have.
    METADATA.create_all(connection)
    if is_new:
        fresh = {"id": 1, "schema_version": SCHEMA_VERSION, "catalogue_id": uuid.uuid4().hex, "generation": 0}
        connection.execute(insert(CATALOGUE), fresh)
    found = connection.execute(select(CATALOGUE.c.schema_version)).scalar_one()
    if found != SCHEMA_VERSION:
        raise StoreConfigError(
            _SUBJECT, f"has tables of schema version {found}; this software uses version {SCHEMA_VERSION}"
        )
    return str(connection.execute(select(CATALOGUE.c.catalogue_id)).scalar_one())


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    """Turn database errors into the store's; their text names no host and no path."""
    try:
        yield
    except IntegrityError:
        raise  # a bug in this software
    except (DBAPIError, PoolTimeoutError) as error:
        raise _store_error(error) from error


def _store_error(error: Exception) -> StoreError:
    cause = getattr(error, "orig", None)
    is_full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if is_full or getattr(cause, "sqlstate", None) == "53100":
        return StoreFullError("catalogue", "no space is left in its database")
    return StoreUnavailableError("catalogue", "its database cannot be reached or used at the moment")
