"""What stays in memory: a task's pins follow its name or a version, and outlive processes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from manyhats.adapters.errors import NoActiveVersionError, TaskNotFoundError
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.store.catalogue.task import CataloguedTask
from manyhats.adapters.taskid import TaskName, parse_name
from support.factories.catalogue_records import allow, make_record, register


def pinned(catalogue: Catalogue) -> list[str]:
    return sorted(record.name for record in catalogue.pinned())


def pin(catalogue: Catalogue, name: str, *, is_pinned: bool = True) -> bool:
    """Whether the version that the name refers to is pinned now."""
    return catalogue.set_pin(parse_name(name), is_pinned=is_pinned).is_pinned


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/catalogue.db"


def test_a_task_s_pin_goes_with_its_name_and_a_version_s_stays(url: str) -> None:
    with contextlib.closing(Catalogue(url)) as here, contextlib.closing(Catalogue(url)) as there:
        register(here, "fr", 0)
        register(here, "de", 0)
        assert pin(here, "fr")
        register(here, "fr", 1)
        assert pinned(here) == ["fr@2"]
        assert pin(here, "fr@1")
        assert pinned(here) == ["fr@1", "fr@2"]
        assert there.refresh() == {"fr", "de"}
        assert pinned(there) == ["fr@1", "fr@2"]
        there.activate("fr", 1)
        assert pinned(there) == ["fr@1"]
        assert pin(there, "fr@1", is_pinned=False), "it is the active one of a pinned task"
        assert not pin(there, "fr", is_pinned=False)
        assert "fr" in here.refresh()
        assert pinned(here) == pinned(there) == []


def test_pins_outlive_the_process_and_go_with_what_is_removed(url: str) -> None:
    with contextlib.closing(Catalogue(url)) as before:
        for number in range(3):
            register(before, "fr", number)
        pin(before, "fr")
        pin(before, "fr@1")
        pin(before, "fr@2")
        before.remove(TaskName("fr", 1), allow)
    with contextlib.closing(Catalogue(url)) as after:
        assert pinned(after) == ["fr@2", "fr@3"]
        assert after.versions("fr")[0].is_pinned
        after.remove(TaskName("fr"), allow)
        assert pinned(after) == []
        register(after, "fr", 9)
        assert pinned(after) == [], "a task made anew is another one"


def test_who_is_not_there_cannot_be_pinned(url: str) -> None:
    with contextlib.closing(Catalogue(url)) as catalogue:
        register(catalogue, "fr", 0, activate=False)
        for name, error in (
            ("de", TaskNotFoundError),
            ("fr@2", TaskNotFoundError),
            ("fr", NoActiveVersionError),
        ):
            for is_pinned in (True, False):
                with pytest.raises(error):
                    pin(catalogue, name, is_pinned=is_pinned)
        assert pin(catalogue, "fr@1")


def test_tables_of_before_there_were_pins_get_them(url: str) -> None:
    with contextlib.closing(Catalogue(url)) as catalogue:
        register(catalogue, "fr", 0)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE manyhats_pins"))
    engine.dispose()
    with contextlib.closing(Catalogue(url)) as catalogue:
        assert pinned(catalogue) == []
        assert pin(catalogue, "fr")
    with contextlib.closing(Catalogue(url)) as catalogue:
        assert pinned(catalogue) == ["fr@1"]


_VERSIONS = st.integers(1, 3)
_STEPS = st.one_of(
    st.tuples(st.just("pin"), st.none() | _VERSIONS),
    st.tuples(st.just("unpin"), st.none() | _VERSIONS),
    st.tuples(st.just("activate"), _VERSIONS),
    st.tuples(st.just("remove"), _VERSIONS),
)


@given(st.lists(_STEPS, max_size=12))
def test_a_version_is_pinned_by_itself_or_as_the_active_one(steps: list[tuple[str, int | None]]) -> None:
    task = CataloguedTask(task_id="fr")
    for number in range(3):
        task = task.added(make_record("fr", number))
    task = task.activated(1)
    by_number: set[int] = set()
    by_name, active, versions = False, 1, {1, 2, 3}
    for what, version in steps:
        if (version or active) not in versions:
            continue  # refused, as the tests above have it
        match what:
            case "pin" if version is None:
                task, by_name = task.pinned(TaskName("fr")), True
            case "pin":
                task, by_number = task.pinned(TaskName("fr", version)), by_number | {version}
            case "unpin" if version is None:
                task, by_name, by_number = task.unpinned(TaskName("fr")), False, set()
            case "unpin":
                task, by_number = task.unpinned(TaskName("fr", version)), by_number - {version}
            case "activate":
                assert version is not None
                task, active = task.activated(version), version
            case "remove":
                assert version is not None
                task, versions, by_number = (
                    task.without({version}),
                    versions - {version},
                    by_number - {version},
                )
                by_name = by_name and bool(versions)
        expected = (by_number | ({active} if by_name else set())) & versions
        assert {number for number, record in task.versions.items() if record.is_pinned} == expected
