"""The catalogue against a simple model, through any course of writes, restarts and other processes' writes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInUseError,
    DataLossError,
    NoActiveVersionError,
    QuotaExceededError,
    RequestIdReusedError,
    TaskNotFoundError,
)
from manyhats.adapters.limits import Quotas
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.catalogue.catalogue import Catalogue
from manyhats.adapters.taskid import TaskName
from support.factories.catalogue_records import allow, digest_of, refuse_with, register

TASKS = ("a", "a.b", "b")
MAX_VERSIONS = 3


@dataclass
class Task:
    """Artifact and failure by version; which is active; the highest that ever was."""

    versions: dict[int, tuple[int, str]] = field(default_factory=dict)
    active: int | None = None
    last: int = 0

    def find(self, number: int) -> int | None:
        return next((version for version, (other, _) in self.versions.items() if other == number), None)

    def state(self, version: int) -> AdapterState:
        if self.versions[version][1]:
            return AdapterState.FAILED
        return AdapterState.ACTIVE if version == self.active else AdapterState.INACTIVE


class CatalogueMachine(RuleBasedStateMachine):
    """Two processes on one SQLite file; the model is a dictionary."""

    tasks = st.sampled_from(TASKS)
    numbers = st.integers(0, 5)
    versions = st.integers(1, 6)
    processes = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{self.directory.name}/catalogue.db"
        self.catalogues = [Catalogue(self.url), Catalogue(self.url)]
        self.model = {task: Task() for task in TASKS}
        self.answers: dict[str, tuple[tuple[str, bool], str]] = {}

    def teardown(self) -> None:
        for catalogue in self.catalogues:
            catalogue.close()
        self.directory.cleanup()

    @rule(
        process=processes,
        task=tasks,
        number=numbers,
        activate=st.booleans(),
        request_id=st.sampled_from(["", "r", "s"]),
    )
    def register(self, process: int, task: str, number: int, activate: bool, request_id: str) -> None:
        quotas = Quotas(max_versions_per_task=MAX_VERSIONS)

        def call() -> tuple[str, bool]:
            answer = register(
                self.catalogues[process],
                task,
                number,
                quotas=quotas,
                activate=activate,
                request_id=request_id,
            )
            return answer.record.name, answer.created

        model = self.model[task]
        body = Registration(task, Uri("a"), activate=activate).fingerprint()
        known = model.find(number)
        if request_id in self.answers:
            answer, answered_body = self.answers[request_id]
            self._expect(call, answer if body == answered_body else RequestIdReusedError)
            return
        if known is None and len(model.versions) == MAX_VERSIONS:
            self._expect(call, QuotaExceededError)
            return
        if known is None:
            model.last += 1
        version = known or model.last
        model.versions[version] = (number, "")
        model.active = version if activate else model.active
        self._expect(call, (f"{task}@{version}", known is None))
        if request_id:
            self.answers[request_id] = ((f"{task}@{version}", known is None), body)

    @rule(process=processes, task=tasks, version=versions)
    def activate(self, process: int, task: str, version: int) -> None:
        model = self.model[task]

        def call() -> str:
            return self.catalogues[process].activate(task, version).name

        if version not in model.versions:
            self._expect(call, TaskNotFoundError)
        elif model.versions[version][1]:
            self._expect(call, DataLossError)
        else:
            model.active = version
            self._expect(call, f"{task}@{version}")

    @rule(process=processes, task=tasks, version=versions, reason=st.sampled_from(["", "damaged", "missing"]))
    def set_failure(self, process: int, task: str, version: int, reason: str) -> None:
        model = self.model[task]

        def call() -> str:
            return self.catalogues[process].set_failure(task, version, reason).state_reason

        if version not in model.versions:
            self._expect(call, TaskNotFoundError)
            return
        model.versions[version] = (model.versions[version][0], reason)
        self._expect(call, reason)

    @rule(process=processes, task=tasks, version=st.none() | versions, is_in_use=st.booleans())
    def remove(self, process: int, task: str, version: int | None, is_in_use: bool) -> None:
        model = self.model[task]
        gone = [each for each in model.versions if version in (None, each)]
        check = refuse_with(AdapterInUseError(task, "is in use")) if is_in_use else allow

        def call() -> list[int]:
            return [
                record.version for record in self.catalogues[process].remove(TaskName(task, version), check)
            ]

        if not gone or is_in_use:
            self._expect(call, AdapterInUseError if gone else TaskNotFoundError)
            return
        for each in gone:
            del model.versions[each]
        model.active = None if model.active in gone else model.active
        self._expect(call, gone)

    @rule(process=processes)
    def restart(self, process: int) -> None:
        self.catalogues[process].close()
        self.catalogues[process] = Catalogue(self.url)

    @rule(process=processes)
    def refresh(self, process: int) -> None:
        self.catalogues[process].refresh()
        assert self.catalogues[process].refresh() == frozenset()
        self._check(self.catalogues[process])

    @invariant()
    def the_database_is_the_model(self) -> None:
        with contextlib.closing(Catalogue(self.url)) as fresh:
            self._check(fresh)

    def _expect(self, call: Callable[[], Any], expected: Any) -> None:
        """The call gives ``expected``, or raises it if that is an error."""
        try:
            given: Any = call()
        except AdapterError as error:
            given = type(error)
        assert given == expected

    def _check(self, catalogue: Catalogue) -> None:
        listed = catalogue.page(task_id="", after=("", 0), max_records=100)
        assert [record.name for record in listed] == [
            f"{task}@{version}" for task in TASKS for version in sorted(self.model[task].versions)
        ]
        for record in listed:
            self._check_version(catalogue, record)
        for task in TASKS:
            self._check_task(catalogue, task)
        stored = {number for model in self.model.values() for number, _ in model.versions.values()}
        digests = [digest_of(number) for number in range(6)]
        assert catalogue.named(digests) == {digest_of(number) for number in stored}
        assert [catalogue.has_digest(digest) for digest in digests] == [
            number in stored for number in range(6)
        ]

    def _check_version(self, catalogue: Catalogue, record: AdapterRecord) -> None:
        model = self.model[record.task_id]
        number, failure = model.versions[record.version]
        assert (record.digest, record.state_reason) == (digest_of(number), failure)
        assert record.state is model.state(record.version)
        assert catalogue.resolve(TaskName(record.task_id, record.version)) == record
        assert catalogue.find_digest(record.task_id, record.digest) == record

    def _check_task(self, catalogue: Catalogue, task: str) -> None:
        model = self.model[task]
        listed = catalogue.page(task_id=task, after=("", 0), max_records=100)
        if not model.versions:
            self._expect(lambda: catalogue.versions(task), TaskNotFoundError)
            self._expect(lambda: catalogue.resolve(TaskName(task)), TaskNotFoundError)
            assert listed == []
            return
        assert list(catalogue.versions(task)) == listed
        active = NoActiveVersionError if model.active is None else model.active
        self._expect(lambda: catalogue.resolve(TaskName(task)).version, active)


def test_the_catalogue_agrees_with_a_model() -> None:
    run_state_machine_as_test(
        CatalogueMachine, settings=settings(max_examples=20, stateful_step_count=25, deadline=None)
    )
