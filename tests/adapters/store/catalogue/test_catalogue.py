"""The catalogue's meaning, on each database that it may lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterMethod, AdapterRecord, AdapterState, ArtifactPart
from manyhats.adapters.errors import (
    AdapterInUseError,
    DataLossError,
    NoActiveVersionError,
    QuotaExceededError,
    TaskNotFoundError,
)
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.catalogue.catalogue import IN_MEMORY, Catalogue
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import (
    allow,
    digest_of,
    make_record,
    names,
    refuse_with,
    register,
)


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "memory":
            return IN_MEMORY
        case "sqlite":
            return f"sqlite:///{tmp_path}/catalogue.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def catalogue(url: str) -> Iterator[Catalogue]:
    catalogue = Catalogue(url)
    yield catalogue
    catalogue.close()


def test_a_version_is_numbered_and_active_unless_told_otherwise(catalogue: Catalogue) -> None:
    first = register(catalogue, "fr", 0)
    second = register(catalogue, "fr", 1, activate=False)
    assert (first.record.name, first.record.state, first.created) == ("fr@1", AdapterState.ACTIVE, True)
    assert (second.record.name, second.record.state, second.created) == ("fr@2", AdapterState.INACTIVE, True)
    assert catalogue.resolve(TaskName("fr")) == first.record
    assert catalogue.resolve(TaskName("fr", 2)) == second.record
    assert catalogue.versions("fr") == (first.record, second.record)


def test_names_that_mean_nothing(catalogue: Catalogue) -> None:
    register(catalogue, "fr", activate=False)
    with pytest.raises(NoActiveVersionError):
        catalogue.resolve(TaskName("fr"))
    for name in (TaskName("de"), TaskName("de", 1), TaskName("fr", 2)):
        with pytest.raises(TaskNotFoundError):
            catalogue.resolve(name)
        with pytest.raises(TaskNotFoundError):
            catalogue.remove(name, allow)
        with pytest.raises(TaskNotFoundError):
            catalogue.activate(name.task_id, name.version or 1)
        with pytest.raises(TaskNotFoundError):
            catalogue.set_failure(name.task_id, name.version or 1, "why")
    with pytest.raises(TaskNotFoundError):
        catalogue.versions("de")
    assert names(catalogue) == ["fr@1"]


def test_the_same_digest_again_is_the_same_version(catalogue: Catalogue) -> None:
    register(catalogue, "fr", 0)
    register(catalogue, "fr", 1)
    again = register(catalogue, "fr", 0, activate=False)
    assert (again.record.name, again.record.state, again.created) == ("fr@1", AdapterState.INACTIVE, False)
    assert catalogue.resolve(TaskName("fr")).version == 2
    assert register(catalogue, "fr", 0).record.state is AdapterState.ACTIVE
    assert [record.state for record in catalogue.versions("fr")] == [
        AdapterState.ACTIVE,
        AdapterState.INACTIVE,
    ]
    assert register(catalogue, "de", 0).record.name == "de@1"


def test_activation_moves_forward_and_back(catalogue: Catalogue) -> None:
    for number in range(3):
        register(catalogue, "fr", number)
    for version in (1, 3, 3, 2):
        assert catalogue.activate("fr", version) == catalogue.resolve(TaskName("fr"))
        active = [
            record.version for record in catalogue.versions("fr") if record.state is AdapterState.ACTIVE
        ]
        assert active == [version]


def test_a_version_number_never_comes_back(catalogue: Catalogue) -> None:
    for number in range(2):
        register(catalogue, "fr", number)
    catalogue.remove(TaskName("fr", 2), allow)
    assert register(catalogue, "fr", 1).record.name == "fr@3"
    catalogue.remove(TaskName("fr"), allow)
    assert names(catalogue) == []
    assert register(catalogue, "fr", 0).record.name == "fr@4"


def test_removal_of_the_active_version_leaves_none_active(catalogue: Catalogue) -> None:
    for number in range(2):
        register(catalogue, "fr", number)
    assert [record.name for record in catalogue.remove(TaskName("fr", 2), allow)] == ["fr@2"]
    with pytest.raises(NoActiveVersionError):
        catalogue.resolve(TaskName("fr"))
    assert [record.name for record in catalogue.remove(TaskName("fr"), allow)] == ["fr@1"]
    with pytest.raises(TaskNotFoundError):
        catalogue.resolve(TaskName("fr"))


def test_a_check_keeps_what_it_refuses_to_let_go(catalogue: Catalogue) -> None:
    for number in range(2):
        register(catalogue, "fr", number)
    before = catalogue.versions("fr")
    for name in (TaskName("fr"), TaskName("fr", 1)):
        with pytest.raises(AdapterInUseError):
            catalogue.remove(name, refuse_with(AdapterInUseError("fr@1", "is in use")))
    assert catalogue.versions("fr") == before
    assert catalogue.resolve(TaskName("fr")).version == 2
    assert catalogue.named([digest_of(0), digest_of(1)]) == {digest_of(0), digest_of(1)}


def test_nobody_resolves_a_version_between_its_check_and_its_end(catalogue: Catalogue) -> None:
    register(catalogue, "fr")
    with ThreadPoolExecutor(1) as pool:

        def check(gone: Sequence[AdapterRecord]) -> None:
            assert gone == (catalogue.resolve(TaskName("fr")),)
            check.other = pool.submit(catalogue.resolve, TaskName("fr"))  # type: ignore[attr-defined]

        catalogue.remove(TaskName("fr"), check)
        with pytest.raises(TaskNotFoundError):
            check.other.result()  # type: ignore[attr-defined]


def test_a_failed_version_says_why_and_stays_what_its_name_means(catalogue: Catalogue) -> None:
    register(catalogue, "fr", 0)
    register(catalogue, "fr", 1)
    failed = catalogue.set_failure("fr", 2, "its bytes are damaged")
    assert (failed.state, failed.state_reason) == (AdapterState.FAILED, "its bytes are damaged")
    assert catalogue.resolve(TaskName("fr")) == failed
    catalogue.activate("fr", 1)
    with pytest.raises(DataLossError, match="its bytes are damaged"):
        catalogue.activate("fr", 2)
    assert [record.state for record in catalogue.versions("fr")] == [
        AdapterState.ACTIVE,
        AdapterState.FAILED,
    ]


@pytest.mark.parametrize("activate", [True, False])
def test_a_failed_version_is_whole_once_it_is_registered_again(catalogue: Catalogue, activate: bool) -> None:
    register(catalogue, "fr", 0)
    register(catalogue, "fr", 1)
    catalogue.set_failure("fr", 1, "its bytes are damaged")
    healed = register(catalogue, "fr", 0, activate=activate)
    assert (healed.record.version, healed.record.state_reason, healed.created) == (1, "", False)
    assert healed.record.state is (AdapterState.ACTIVE if activate else AdapterState.INACTIVE)
    catalogue.set_failure("fr", 2, "so are its")
    assert catalogue.set_failure("fr", 2, "").state is not AdapterState.FAILED


def test_pages_follow_the_order_of_names(catalogue: Catalogue) -> None:
    for task in ("b", "a", "a.b", "c"):
        for number in range(11 if task == "b" else 1):
            register(catalogue, task, number)
    everything = ["a@1", "a.b@1", *(f"b@{version}" for version in range(1, 12)), "c@1"]
    assert names(catalogue) == everything
    page = catalogue.page(task_id="", after=("a.b", 1), max_records=2)
    assert [record.name for record in page] == ["b@1", "b@2"]
    page = catalogue.page(task_id="b", after=("b", 10), max_records=5)
    assert [record.name for record in page] == ["b@11"]
    assert catalogue.page(task_id="none", after=("", 0), max_records=5) == []
    assert catalogue.page(task_id="", after=("c", 1), max_records=5) == []


def test_digests_are_known_while_any_version_has_them(catalogue: Catalogue) -> None:
    parts = (ArtifactPart(digest_of(1), 0.5, "a"), ArtifactPart(digest_of(2), -2.0, "b"))
    twice = (*parts, ArtifactPart(digest_of(1), 1.0, "a"))
    composed = make_record("mix", 9, method=AdapterMethod.COMPOSED, parts=twice)
    catalogue.add(composed, Registration("mix", Uri("a")), Quotas())
    register(catalogue, "fr", 1)
    asked = [digest_of(number) for number in (1, 2, 3, 9)]
    assert [catalogue.has_digest(digest) for digest in asked] == [True, False, False, True]
    assert catalogue.named(asked) == {digest_of(1), digest_of(2)}
    found = catalogue.find_digest("mix", digest_of(9))
    assert found is not None
    assert found.parts == twice
    assert catalogue.find_digest("fr", digest_of(9)) is None
    catalogue.remove(TaskName("mix"), allow)
    assert not catalogue.has_digest(digest_of(9))
    assert catalogue.named(asked) == {digest_of(1)}
    assert catalogue.named([]) == frozenset()


def test_many_digests_are_asked_for_at_once(catalogue: Catalogue) -> None:
    register(catalogue, "fr", 1)
    register(catalogue, "fr", 2499)
    assert catalogue.named([digest_of(n) for n in range(2500)]) == {digest_of(1), digest_of(2499)}


@pytest.mark.parametrize(
    ("quotas", "subject"),
    [
        (Quotas(max_tasks=2), None),
        (Quotas(max_tasks=1), "max_tasks"),
        (Quotas(max_versions_per_task=1), None),
        (Quotas(max_bytes=300, max_bytes_per_task=100), None),
        (Quotas(max_bytes=299), "max_bytes"),
        (Quotas(max_bytes_per_task=99), "max_bytes_per_task"),
    ],
)
def test_a_new_task_must_fit_the_quotas(catalogue: Catalogue, quotas: Quotas, subject: str | None) -> None:
    register(catalogue, "fr", 0)
    register(catalogue, "fr", 1)
    if subject is None:
        catalogue.check_quotas("de", 100, quotas)
        assert register(catalogue, "de", 0, quotas=quotas).created
        return
    with pytest.raises(QuotaExceededError) as early:
        catalogue.check_quotas("de", 100, quotas)
    with pytest.raises(QuotaExceededError) as caught:
        register(catalogue, "de", 0, quotas=quotas)
    assert early.value.subject == caught.value.subject == subject
    assert names(catalogue) == ["fr@1", "fr@2"]


def test_a_new_version_must_fit_the_quotas_and_an_old_one_always_does(catalogue: Catalogue) -> None:
    for number in range(2):
        register(catalogue, "fr", number)
    for quotas in (Quotas(max_versions_per_task=2), Quotas(max_bytes_per_task=299), Quotas(max_bytes=299)):
        with pytest.raises(QuotaExceededError, match="the limit is"):
            register(catalogue, "fr", 2, quotas=quotas)
        assert register(catalogue, "fr", 0, quotas=quotas).record.name == "fr@1"
    assert register(catalogue, "fr", 2, quotas=Quotas(max_tasks=1)).created
    catalogue.remove(TaskName("fr", 1), allow)
    assert register(catalogue, "fr", 3, quotas=Quotas(max_versions_per_task=3, max_bytes=300)).created


def test_threads_share_it(catalogue: Catalogue) -> None:
    def work(worker: int) -> None:
        for number in range(5):
            register(catalogue, f"t{number % 2}", worker * 5 + number)
            catalogue.generation()
            catalogue.named([digest_of(number)])
            catalogue.resolve(TaskName("t0"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert names(catalogue) == [f"t0@{n}" for n in range(1, 13)] + [f"t1@{n}" for n in range(1, 9)]
    assert catalogue.generation() == 20
