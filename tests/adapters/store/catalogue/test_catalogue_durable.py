"""What outlives a process, and what another process sees, on each database that several can share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, update

from manyhats.adapters.artifact import AdapterState, ArtifactPart
from manyhats.adapters.errors import NoActiveVersionError, StoreConfigError, TaskNotFoundError
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.catalogue.database import CatalogueDatabase
from manyhats.adapters.store.catalogue.rows import read_task
from manyhats.adapters.store.catalogue.tables import CATALOGUE
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import allow, digest_of, make_record, names, register

Open = Callable[[], Catalogue]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalogue.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def open_catalogue(url: str) -> Iterator[Open]:
    """Opens the same catalogue once more, as another process would."""
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(contextlib.closing(Catalogue(url)))


def test_all_of_a_record_comes_back(open_catalogue: Open) -> None:
    odd = "é 漢 '\"\\ \x00 \ud800"
    record = make_record(
        "fr",
        7,
        parts=(ArtifactPart(digest_of(7), 0.1 + 0.2, odd), ArtifactPart(digest_of(8), -3.0, "b")),
        size_bytes=2**40,
        num_parameters=2**41,
        source=odd,
        base_model=odd,
        labels={"team": odd, odd: ""},
        effect=1 / 3,
        notes=(odd, "two"),
    )
    expected = replace(record, version=1, state=AdapterState.ACTIVE)
    assert open_catalogue().add(record, Registration("fr", Uri("a")), Quotas()).record == expected
    assert open_catalogue().resolve(TaskName("fr")) == expected


def test_tasks_versions_and_states_outlive_the_process(open_catalogue: Open) -> None:
    before = open_catalogue()
    for number in range(4):
        register(before, "fr", number)
    register(before, "de", 0, activate=False)
    before.activate("fr", 2)
    before.remove(TaskName("fr", 4), allow)
    before.set_failure("fr", 3, "damaged")
    after = open_catalogue()
    assert names(after) == names(before) == ["de@1", "fr@1", "fr@2", "fr@3"]
    assert after.versions("fr") == before.versions("fr")
    assert after.resolve(TaskName("fr")).version == 2
    assert after.resolve(TaskName("fr", 3)).state_reason == "damaged"
    with pytest.raises(NoActiveVersionError):
        after.resolve(TaskName("de"))
    assert register(after, "fr", 9).record.name == "fr@5"
    assert after.catalogue_id == before.catalogue_id


def test_version_numbers_of_a_removed_task_stay_used_after_a_restart(open_catalogue: Open) -> None:
    before = open_catalogue()
    register(before, "fr")
    before.remove(TaskName("fr"), allow)
    after = open_catalogue()
    with pytest.raises(TaskNotFoundError):
        after.resolve(TaskName("fr"))
    assert register(after, "fr").record.name == "fr@2"


def test_another_process_sees_a_write_after_its_refresh(open_catalogue: Open) -> None:
    here, there = open_catalogue(), open_catalogue()
    assert there.refresh() == frozenset()
    seen = there.generation()
    for task in ("a", "b"):
        register(here, task, 0)
    register(here, "a", 1)
    assert there.generation() == seen + 3
    with pytest.raises(TaskNotFoundError):
        there.resolve(TaskName("a"))
    assert there.refresh() == {"a", "b"}
    assert there.versions("a") == here.versions("a")
    here.activate("a", 1)
    here.set_failure("a", 2, "damaged")
    assert there.refresh() == {"a"}
    assert there.versions("a") == here.versions("a")
    here.remove(TaskName("b"), allow)
    assert there.refresh() == {"b"}
    assert names(there) == ["a@1", "a@2"]
    assert there.refresh() == frozenset()


def test_a_write_rests_on_what_others_wrote_and_not_on_the_index(open_catalogue: Open) -> None:
    here, there = open_catalogue(), open_catalogue()
    register(here, "fr", 0)
    assert not register(there, "fr", 0).created
    assert register(there, "fr", 1).record.name == "fr@2"
    assert register(here, "fr", 2, activate=False).record.name == "fr@3"
    assert here.resolve(TaskName("fr")).version == 2
    assert [record.name for record in here.remove(TaskName("fr"), allow)] == ["fr@1", "fr@2", "fr@3"]
    with pytest.raises(TaskNotFoundError):
        there.activate("fr", 2)
    assert there.named([digest_of(0)]) == frozenset()
    assert there.refresh() == {"fr"}
    assert names(there) == []


def test_a_refresh_names_tasks_that_a_write_here_brought_along(open_catalogue: Open) -> None:
    here, there = open_catalogue(), open_catalogue()
    register(there, "fr", 0)
    register(here, "fr", 1)
    assert here.refresh() == {"fr"}


def test_a_read_sees_one_moment(open_catalogue: Open, url: str) -> None:
    register(open_catalogue(), "fr", 0)
    with contextlib.closing(CatalogueDatabase(url)) as database, database.read() as connection:
        before = read_task(connection, "fr")
        register(open_catalogue(), "fr", 1)
        assert read_task(connection, "fr") == before


def test_catalogues_have_ids_of_their_own(open_catalogue: Open, tmp_path: Path) -> None:
    with contextlib.closing(Catalogue(f"sqlite:///{tmp_path}/other.db")) as other:
        assert other.catalogue_id != open_catalogue().catalogue_id


def test_tables_of_an_unknown_version_are_refused(open_catalogue: Open, url: str) -> None:
    register(open_catalogue(), "fr")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(update(CATALOGUE).values(schema_version=2))
    engine.dispose()
    with pytest.raises(StoreConfigError, match="schema version 2; this software uses version 1"):
        open_catalogue()


@pytest.mark.postgres
def test_a_url_without_a_driver_means_the_one_that_is_installed(postgres_url: str) -> None:
    plain = postgres_url.replace("postgresql+psycopg:", "postgres:")
    with contextlib.closing(Catalogue(plain)) as catalogue:
        register(catalogue, "fr")
    with psycopg.connect(plain) as connection:
        assert connection.execute("SELECT task_id FROM manyhats_tasks").fetchall() == [("fr",)]
