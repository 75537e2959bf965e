"""A database that is locked, full, damaged, gone or not one at all: clear errors, and look-ups go on."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyhats.adapters.errors import (
    StoreConfigError,
    StoreFullError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registered, Registration, Uri
from manyhats.adapters.store.catalogue import database as catalogue_database
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.catalogue.database import CatalogueDatabase
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import allow, make_record, names, register
from support.servers.postgres import PostgresServer

ANSWER = Registered(make_record("fr"), created=False)
WRITES: list[Callable[[Catalogue], object]] = [
    lambda catalogue: register(catalogue, "fr", 7),
    lambda catalogue: register(catalogue, "new", 0),
    lambda catalogue: catalogue.activate("fr", 1),
    lambda catalogue: catalogue.set_failure("fr", 1, "damaged"),
    lambda catalogue: catalogue.remove(TaskName("fr"), allow),
    lambda catalogue: register(catalogue, "fr", 0),
    lambda catalogue: catalogue.remember(Registration("fr", Uri("a"), request_id="r"), ANSWER),
]
READS: list[Callable[[Catalogue], object]] = [
    lambda catalogue: catalogue.refresh(),
    lambda catalogue: catalogue.generation(),
    lambda catalogue: catalogue.named(["x"]),
    lambda catalogue: catalogue.recall(Registration("fr", Uri("a"), request_id="r")),
    lambda catalogue: catalogue.check_quotas("fr", 1, Quotas(max_bytes=1)),
]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the database and writes."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalogue.db"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Catalogue]:
    """Two versions of one task, in a file that is not waited for."""
    with contextlib.closing(Catalogue(f"sqlite:///{path}?timeout=0")) as catalogue:
        for number in range(2):
            register(catalogue, "fr", number)
        yield catalogue


def test_a_write_that_cannot_have_its_turn_changes_nothing(catalogue: Catalogue, path: Path) -> None:
    before = catalogue.versions("fr")
    with locked(path):
        for write in WRITES:
            with pytest.raises(StoreUnavailableError, match="cannot be reached or used at the moment"):
                write(catalogue)
            assert catalogue.versions("fr") == before
            assert names(catalogue) == ["fr@1", "fr@2"]
        for read in READS[:-1]:
            read(catalogue)
    assert catalogue.versions("fr") == before
    assert register(catalogue, "fr", 7).record.version == 3


def test_a_full_disk_is_said_to_be_full(
    catalogue: Catalogue, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # no page may be added

    monkeypatch.setattr(catalogue_database, "_enter_wal", limit)
    with contextlib.closing(Catalogue(f"sqlite:///{path}")) as full:
        before = full.versions("fr")
        large = make_record("fr", 2, source="more than a page " * 1000)
        with pytest.raises(StoreFullError):
            full.add(large, Registration("fr", Uri("a")), Quotas())
        assert full.versions("fr") == before
    catalogue.refresh()
    assert catalogue.versions("fr") == before


def test_a_removal_that_cannot_be_committed_hides_nothing(catalogue: Catalogue, path: Path) -> None:
    """A reader of an old journal mode keeps a commit out, when all else is done."""
    before = catalogue.versions("fr")
    catalogue.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as readers:
        patch.setattr(catalogue_database, "_enter_wal", lambda connection: None)
        reader = readers.enter_context(contextlib.closing(sqlite3.connect(path, isolation_level=None)))
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM manyhats_tasks").fetchall()
        with pytest.raises(StoreUnavailableError):
            catalogue.remove(TaskName("fr"), allow)
        assert catalogue.versions("fr") == before
        reader.execute("ROLLBACK")
        assert catalogue.remove(TaskName("fr"), allow) == before
    with pytest.raises(TaskNotFoundError):
        catalogue.versions("fr")


@pytest.mark.postgres
def test_a_server_that_dies_stops_no_look_up_and_is_found_again(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with contextlib.closing(Catalogue(postgres_url)) as catalogue:
        for number in range(2):
            register(catalogue, "fr", number)
        before = catalogue.versions("fr")
        with postgres_server.stopped():
            for call in WRITES + READS:
                with pytest.raises(StoreUnavailableError, match="cannot be reached or used at the moment"):
                    call(catalogue)
            assert catalogue.versions("fr") == before
            with pytest.raises(StoreUnavailableError):
                Catalogue(postgres_url)
        assert catalogue.refresh() == {"fr"}
        assert catalogue.versions("fr") == before
        assert catalogue.activate("fr", 1).version == 1


@pytest.mark.postgres
def test_a_server_that_was_restarted_meanwhile_is_no_error(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with contextlib.closing(Catalogue(postgres_url)) as catalogue:
        register(catalogue, "fr")
        with postgres_server.stopped():
            pass
        assert register(catalogue, "fr", 1).created


@pytest.mark.postgres
def test_a_removal_whose_commit_meets_a_dead_server_hides_nothing(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    with contextlib.closing(Catalogue(postgres_url)) as catalogue:
        before = register(catalogue, "fr").record
        with contextlib.ExitStack() as death:
            with pytest.raises(StoreUnavailableError):
                catalogue.remove(TaskName("fr"), lambda _: death.enter_context(postgres_server.stopped()))
            assert catalogue.resolve(TaskName("fr")) == before
        catalogue.refresh()
        assert catalogue.resolve(TaskName("fr")) == before


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\x00" + b"\xff" * 4096])
def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreUnavailableError) as caught:
        Catalogue(f"sqlite:///{path}")
    assert str(path) not in str(caught.value)
    assert path.read_bytes() == content


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError):
        Catalogue(f"sqlite:///{tmp_path}/none/catalogue.db")


@pytest.mark.parametrize(
    "url", ["", "catalogue.db", "mysql://u:secret@host/db", "postgresql+asyncpg://host/db"]
)
def test_a_url_of_no_database_that_is_served_is_refused(url: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        Catalogue(url)
    assert caught.value.subject == "catalogue_url"
    assert "secret" not in str(caught.value)


def test_a_commit_is_on_the_disk_when_it_returns(path: Path) -> None:
    with (
        contextlib.closing(CatalogueDatabase(f"sqlite:///{path}")) as database,
        database.read() as connection,
    ):
        modes = [
            connection.exec_driver_sql(f"PRAGMA {mode}").scalar_one()
            for mode in ("journal_mode", "synchronous")
        ]
    assert modes == ["wal", 2]  # 2: FULL


@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "deleted"])
def test_a_file_that_is_gone_is_written_no_more_and_its_copy_is_gone_on_with(
    path: Path, is_moved: bool
) -> None:
    """Its connections would still write to what they have open, and nobody would ever see that."""
    catalogue = Catalogue(f"sqlite:///{path}")
    register(catalogue, "fr", 0)
    kept = path.with_name("kept.db")
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(kept)) as copy,
    ):
        source.backup(copy)
    register(catalogue, "fr", 1)
    register(catalogue, "late", 2)
    if is_moved:
        path.rename(path.with_name("elsewhere.db"))
    else:
        path.unlink()
    for call in (*WRITES, *READS):
        with pytest.raises(StoreUnavailableError, match="its file is not there"):
            call(catalogue)
    assert not path.exists(), "none is made"
    assert names(catalogue) == ["fr@1", "fr@2", "late@1"]
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    kept.rename(path)
    assert catalogue.refresh() == {"fr", "late"}
    assert names(catalogue) == ["fr@1"], "as it was when it was copied"
    register(catalogue, "new", 3)
    other = Catalogue(f"sqlite:///{path}")
    assert names(other) == ["fr@1", "new@1"]
    register(other, "fr", 4)
    assert catalogue.refresh() >= {"fr"}
    assert names(catalogue) == ["fr@1", "fr@2", "new@1"]
    catalogue.close()
    other.close()


def test_another_catalogue_in_its_place_is_refused(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    url = f"sqlite:///{directory / 'catalogue.db'}"
    directory.mkdir()
    catalogue = Catalogue(url)
    register(catalogue, "fr", 0)
    directory.rename(elsewhere)
    directory.mkdir()
    Catalogue(url).close()
    for _ in range(2):
        for call in (*WRITES, *READS):
            with pytest.raises(StoreUnavailableError, match="is that of another catalogue"):
                call(catalogue)
    assert names(catalogue) == ["fr@1"]
    directory.rename(tmp_path / "other")
    elsewhere.rename(directory)
    register(catalogue, "fr", 1)
    assert names(catalogue) == ["fr@1", "fr@2"]
    catalogue.close()
