"""Several processes that write at the same time, on each database that they can share."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.artifact import AdapterState
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from support.factories.catalogue_records import names
from support.harnesses.catalogue_workers import add_versions, churn

NUM_PROCESSES = 3


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Processes that share nothing with this one, and import what they need once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["manyhats.adapters.store.catalogue.catalogue"])
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=context) as pool:
        yield pool


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalogue.db"
    return str(request.getfixturevalue("postgres_url"))


def at_once(processes: Executor, work: Callable[..., Any], url: str, count: int) -> list[Any]:
    """Each process does its share; none waits for the tables to be there."""
    return list(processes.map(work, [url] * NUM_PROCESSES, range(NUM_PROCESSES), [count] * NUM_PROCESSES))


def test_no_version_number_is_given_twice(processes: Executor, url: str) -> None:
    given = at_once(processes, add_versions, url, 15)
    everything = [f"fr@{version}" for version in range(1, 15 * NUM_PROCESSES + 1)]
    assert sorted(name for names_given in given for name in names_given) == sorted(everything)
    with contextlib.closing(Catalogue(url)) as catalogue:
        assert names(catalogue) == everything
        states = [record.state for record in catalogue.versions("fr")]
        assert states == [AdapterState.INACTIVE] * (len(states) - 1) + [AdapterState.ACTIVE]
        assert catalogue.generation() == len(everything)


def test_no_write_is_lost(processes: Executor, url: str) -> None:
    num_writes = at_once(processes, churn, url, 20)
    with contextlib.closing(Catalogue(url)) as catalogue:
        assert catalogue.generation() == sum(num_writes)
        for task in {record.task_id for record in catalogue.page(task_id="", after=("", 0), max_records=100)}:
            versions = catalogue.versions(task)
            assert len({record.digest for record in versions}) == len(versions)
            assert sum(record.state is AdapterState.ACTIVE for record in versions) <= 1
