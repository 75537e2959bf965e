"""Registrations by request id, on each database that several processes can share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manyhats.adapters.errors import QuotaExceededError, RequestIdReusedError
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Files, Part, Parts, Registered, Registration, UploadFile, Uri
from manyhats.adapters.store.catalogue import rows as answered_requests
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import allow, make_record, names, register

Open = Callable[[], Catalogue]

OTHER_BODIES: list[dict[str, Any]] = [
    {"task_id": "de"},
    {"source": Uri("b")},
    {"source": Parts([Part("a")])},
    {"source": Files([UploadFile("a", 1, "0" * 64)])},
    {"activate": False},
    {"validate_only": True},
    {"expected_digest": "sha256:0"},
    {"labels": {"a": "b"}},
]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def open_catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same catalogue once more, as another process would."""
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/catalogue.db" if is_sqlite else request.getfixturevalue("postgres_url")
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(contextlib.closing(Catalogue(url)))


def test_a_request_id_keeps_its_first_answer_over_restarts(open_catalogue: Open) -> None:
    before = open_catalogue()
    assert before.recall(Registration("fr", Uri("a"), request_id="r")) is None
    first = register(before, "fr", 0, request_id="r")
    register(before, "fr", 1)
    before.remove(TaskName("fr", 1), allow)
    after = open_catalogue()
    generation = after.generation()
    assert after.recall(Registration("fr", Uri("a"), request_id="r")) == first
    assert after.recall(Registration("fr", Uri("a"), request_id="s")) is None
    assert after.recall(Registration("fr", Uri("a"))) is None
    assert after.generation() == generation
    assert register(after, "fr", 5, request_id="r") == first
    assert names(after) == ["fr@2"]


@pytest.mark.parametrize("change", OTHER_BODIES, ids=str)
def test_a_request_id_with_another_body_is_refused(open_catalogue: Open, change: dict[str, Any]) -> None:
    catalogue = open_catalogue()
    register(catalogue, "fr", 0, request_id="r")
    body = Registration(**({"task_id": "fr", "source": Uri("a"), "request_id": "r"} | change))
    with pytest.raises(RequestIdReusedError):
        catalogue.recall(body)
    with pytest.raises(RequestIdReusedError):
        catalogue.add(make_record(body.task_id, 1), body, Quotas())
    with pytest.raises(RequestIdReusedError):
        catalogue.remember(body, Registered(make_record("fr"), created=False))
    assert names(catalogue) == ["fr@1"]


def test_an_answer_that_changed_nothing_is_kept_too(open_catalogue: Open) -> None:
    catalogue = open_catalogue()
    body = Registration("fr", Uri("a"), validate_only=True, request_id="r")
    answer = Registered(make_record("fr", 3), created=False)
    assert catalogue.remember(body, answer) == answer
    assert catalogue.remember(body, Registered(make_record("fr", 4), created=False)) == answer
    assert open_catalogue().recall(body) == answer
    assert names(catalogue) == []


def test_without_a_request_id_nothing_is_kept(open_catalogue: Open) -> None:
    catalogue = open_catalogue()
    answer = Registered(make_record("fr", 3), created=False)
    generation = catalogue.generation()
    assert catalogue.remember(Registration("fr", Uri("a"), validate_only=True), answer) == answer
    assert catalogue.generation() == generation
    register(catalogue, "fr", 0)
    assert register(catalogue, "de", 1).created


def test_a_request_that_failed_may_be_repeated_with_its_id(open_catalogue: Open) -> None:
    catalogue = open_catalogue()
    with pytest.raises(QuotaExceededError):
        register(catalogue, "fr", request_id="r", quotas=Quotas(max_bytes=1))
    assert register(catalogue, "fr", request_id="r").created


def test_one_request_id_from_several_processes_registers_once(open_catalogue: Open) -> None:
    catalogues = [open_catalogue() for _ in range(4)]

    def work(number: int) -> Registered:
        return register(catalogues[number % 4], "fr", number, request_id="r")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    assert all(answer == answers[0] for answer in answers)
    catalogues[0].refresh()
    assert catalogues[0].versions("fr") == (answers[0].record,)


def test_the_latest_answers_are_kept(open_catalogue: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered_requests, "MAX_REMEMBERED", 3)
    catalogue = open_catalogue()
    for number in range(6):
        register(catalogue, "fr", number, request_id=f"r{number}")
        register(catalogue, "de", number)
    kept = [
        catalogue.recall(Registration("fr", Uri("a"), request_id=f"r{number}")) is not None
        for number in range(6)
    ]
    assert kept == [False, False, False, True, True, True]
    assert register(catalogue, "fr", 0, request_id="r0").record.name == "fr@1"
