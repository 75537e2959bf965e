"""Any history of the store, its calls to disk and database failing here and there, against a simple model."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from manyhats.adapters.artifact import AdapterRecord, AdapterState
from manyhats.adapters.errors import AdapterError, StoreError, TaskNotFoundError
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.registrations import nobody
from support.factories.uploads import content_of, send
from support.harnesses.failing_calls import FailingCalls, failing

BASE = make_base(names=("org/tiny",))
# Two plain versions and a composed one of both.
SOURCES = ("a0", "a1", "a0+a1")

Versions = dict[int, str]
Fault = tuple[int, bool, int]


class StoreMachine(RuleBasedStateMachine):
    """The store against a model: per task, source by version, and the active version."""

    tasks = st.sampled_from(["a", "b"])
    sources = st.sampled_from(SOURCES)
    # Which call fails, if any; and whether all after it fail too, as on a disk that is gone.
    faults = st.none() | st.tuples(
        st.integers(1, 90), st.booleans(), st.sampled_from([errno.EIO, errno.ENOSPC])
    )
    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.store = self.open()
        self.versions: dict[str, Versions] = {"a": {}, "b": {}}
        self.active: dict[str, int | None] = {"a": None, "b": None}
        self.last = {"a": 0, "b": 0}

    def open(self) -> AdapterStore:
        return open_store(self.root / "store", BASE, [self.root / "sources"])

    def teardown(self) -> None:
        self.store.close()

    @rule(task=tasks, source=sources, activate=st.booleans(), upload=st.booleans(), fault=faults)
    def register(self, task: str, source: str, activate: bool, upload: bool, fault: Fault | None) -> None:
        parts = [Part(uri, 0.5) for uri in source.split("+")]
        content = content_of(self.root / "sources" / parts[0].uri)

        def call() -> object:
            if len(parts) > 1:
                return self.store.register(Registration(task, Parts(parts), activate=activate))
            if upload:
                return send(self.store, task, content, activate=activate)
            return self.store.register(Registration(task, Uri(source), activate=activate))

        versions = self.versions[task]
        known = next((version for version, other in versions.items() if other == source), None)
        version = self.last[task] + 1 if known is None else known
        after = versions | {version: source}
        active = version if activate else self.active[task]
        self.attempt(task, call, after, active, max(version, self.last[task]), fault)

    @rule(task=tasks, version=st.none() | st.integers(1, 4), fault=faults)
    def delete(self, task: str, version: int | None, fault: Fault | None) -> None:
        name = task if version is None else f"{task}@{version}"
        gone = set(self.versions[task]) if version is None else {version} & set(self.versions[task])
        if not gone:
            with pytest.raises(TaskNotFoundError):
                self.store.delete(name, in_use=nobody)
            return
        after = {number: source for number, source in self.versions[task].items() if number not in gone}
        active = None if self.active[task] in gone else self.active[task]
        self.attempt(
            task, lambda: self.store.delete(name, in_use=nobody), after, active, self.last[task], fault
        )

    @rule(task=tasks, version=st.integers(1, 4), fault=faults)
    def activate(self, task: str, version: int, fault: Fault | None) -> None:
        if version in self.versions[task]:
            call = lambda: self.store.activate(f"{task}@{version}")  # noqa: E731
            self.attempt(task, call, self.versions[task], version, self.last[task], fault)

    @rule(fault=faults)
    def reopen(self, fault: Fault | None) -> None:
        self.store.close()
        failure_of(lambda: self.open().close(), fault)
        self.store = self.open()

    @rule()
    def collect(self) -> None:
        self.store.gc()

    def attempt(
        self,
        task: str,
        call: Callable[[], object],
        after: Versions,
        active: int | None,
        last: int,
        fault: Fault | None,
    ) -> None:
        """What succeeds is done; what fails is done or is not, and nothing in between."""
        failure = failure_of(call, fault)
        if failure is not None:
            held = self.held(task)
            self.store.close()
            self.store = self.open()
            assert self.held(task) == held
            if held == (self.versions[task], self.active[task]):
                return
            assert isinstance(failure, StoreError)
        self.versions[task], self.active[task], self.last[task] = after, active, last

    def held(self, task: str) -> tuple[Versions, int | None]:
        """What the store has of a task, in the model's terms."""
        records = self.store.list(task_id=task).records
        active = [record.version for record in records if record.state is AdapterState.ACTIVE]
        assert len(active) <= 1
        return {record.version: source_of(record) for record in records}, active[0] if active else None

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        digests = set()
        for task, versions in self.versions.items():
            assert self.held(task) == (versions, self.active[task])
            for version in versions:
                record = self.store.get(f"{task}@{version}")
                assert self.store.lower(record).digest == record.digest
                digests |= {part.digest.removeprefix("sha256:") for part in record.parts}
        published = set(os.listdir(self.root / "store" / "artifacts"))
        assert published >= digests

    @rule()
    def sweep_leaves_no_orphan(self) -> None:
        self.store.close()
        self.store = self.open()
        needed = {part.digest for record in self.store.list().records for part in record.parts}
        published = set(os.listdir(self.root / "store" / "artifacts"))
        assert published == {digest.removeprefix("sha256:") for digest in needed}
        assert os.listdir(self.root / "store" / "staging") == []
        assert os.listdir(self.root / "store" / "scratch") == []


def failure_of(call: Callable[[], object], fault: Fault | None) -> AdapterError | None:
    """Call with a fault; gives the error, which tells nothing of the machine."""
    if fault is None:
        call()
        return None
    try:
        with failing(FailingCalls(*fault)):
            call()
    except AdapterError as error:
        if "secret" in str(error):
            raise
        return error
    return None


def source_of(record: AdapterRecord) -> str:
    return "+".join(sorted(NAMES[part.digest] for part in record.parts))


NAMES: dict[str, str] = {}


def test_any_history_keeps_catalogue_and_files_together(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "elsewhere", BASE, [sources])
    digests = {store.register(Registration("x", Uri(uri))).record.digest: uri for uri in ("a0", "a1")}
    store.close()
    monkeypatch.setitem(globals(), "NAMES", digests)
    roots = (tmp_path / f"run-{number}" for number in itertools.count())

    class Machine(StoreMachine):
        def __init__(self) -> None:
            self.root = next(roots)
            self.root.mkdir()
            (self.root / "sources").symlink_to(sources)
            super().__init__()

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=25, stateful_step_count=15, deadline=None, report_multiple_bugs=False),
    )
