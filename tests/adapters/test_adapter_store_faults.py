from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapter_factory import make_base
from manyhats.adapters.artifact import AdapterState
from manyhats.adapters.errors import (
    AdapterTooLargeError,
    DataLossError,
    StoreFullError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store import AdapterStore
from registrations import nobody

BASE = make_base(names=("org/tiny",))


def published(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "artifacts"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "config"])
def test_damaged_files_are_data_loss_until_they_are_registered_again(
    store: AdapterStore, tmp_path: Path, damage: str
) -> None:
    record = store.register("fr", "a0").record
    name = "adapter_config.json" if damage == "config" else "adapter_model.safetensors"
    file = record.path / name
    data = file.read_bytes()
    file.unlink()
    if damage == "link":
        (tmp_path / "copy").write_bytes(data)
        file.symlink_to(tmp_path / "copy")
    elif damage != "remove":
        file.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataLossError) as caught:
        store.load(record)
    assert caught.value.subject == "fr@1"
    assert str(tmp_path) not in str(caught.value)
    assert not store.register("fr", "a0").created
    assert store.load(record).digest == record.digest


def test_what_nobody_catalogued_is_swept_at_start_and_nothing_else(tmp_path: Path, sources: Path) -> None:
    root = tmp_path / "store"
    (root / "artifacts" / ("0" * 64)).mkdir(parents=True)
    (root / "artifacts" / ("0" * 64) / "file").touch()
    (root / "artifacts" / "mine").mkdir()
    (root / "staging" / "half").mkdir(parents=True)
    (root / "notes.txt").touch()
    AdapterStore(root, BASE, [sources])
    assert published(tmp_path) == {"mine"}
    assert os.listdir(root / "staging") == []
    assert (root / "notes.txt").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EIO, StoreUnavailableError),
        (errno.EROFS, StoreUnavailableError),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_failed_write_publishes_nothing(
    store: AdapterStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    call: str,
) -> None:
    original = getattr(os, call)

    def fail(*args: object, **kwargs: object) -> object:
        if call == "open" and not (len(args) > 1 and isinstance(args[1], int) and args[1] & os.O_CREAT):
            return original(*args, **kwargs)
        raise OSError(code, os.strerror(code), str(tmp_path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(error) as caught:
        store.register("fr", "a0")
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert published(tmp_path) == set()
    assert os.listdir(tmp_path / "store" / "staging") == []
    assert store.list().records == ()
    assert store.register("fr", "a0").created


def test_a_store_has_one_process(store: AdapterStore, tmp_path: Path) -> None:
    record = store.register("fr", "a0").record
    program = (
        "import sys, pathlib\n"
        "from adapter_factory import make_base\n"
        "from manyhats.adapters.store import AdapterStore\n"
        "AdapterStore(pathlib.Path(sys.argv[1]), make_base(), [])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "in use by another process" in done.stderr
    assert store.load(record).digest == record.digest


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError):
        AdapterStore(tmp_path / "file" / "store", BASE, [])


def test_registrations_from_many_threads_are_all_kept(store: AdapterStore) -> None:
    jobs = [(f"task-{n % 5}", f"a{n % 4}") for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        created = [answer.created for answer in pool.map(lambda job: store.register(*job), jobs)]
    assert sum(created) == len(set(jobs)) == len(store.list().records)
    for n in range(5):
        states = [record.state for record in store.versions(f"task-{n}")]
        assert states.count(AdapterState.ACTIVE) == 1


def test_one_request_id_from_many_threads_registers_once(store: AdapterStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: store.register("fr", "a0", request_id="r"), range(16)))
    assert all(answer == answers[0] for answer in answers)


def test_registration_and_deletion_race_to_a_whole_store(store: AdapterStore, tmp_path: Path) -> None:
    def churn(n: int) -> None:
        for _ in range(6):
            store.register(f"t{n}", "a0")
            store.delete(f"t{n}", in_use=nobody)
        store.register(f"t{n}", "a0")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    for n in range(4):
        assert store.load(store.get(f"t{n}")).num_parameters > 0
    assert len(published(tmp_path)) == 1


def test_limits_are_the_store_s(tmp_path: Path, sources: Path) -> None:
    store = AdapterStore(tmp_path / "store", BASE, [sources], AdapterLimits(max_rank=1))
    with pytest.raises(AdapterTooLargeError, match="limit is 1"):
        store.register("fr", "a0")
    with pytest.raises(ValueError, match="max_rank"):
        AdapterLimits(max_rank=0)


class StoreMachine(RuleBasedStateMachine):
    """The store against a model: per task, uri by version, and the active version."""

    tasks = st.sampled_from(["a", "b"])
    uris = st.sampled_from(["a0", "a1", "a2"])
    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.store = AdapterStore(self.root / "store", BASE, [self.root / "sources"])
        self.versions: dict[str, dict[int, str]] = {"a": {}, "b": {}}
        self.active: dict[str, int | None] = {"a": None, "b": None}
        self.last = {"a": 0, "b": 0}

    @rule(task=tasks, uri=uris, activate=st.booleans())
    def register(self, task: str, uri: str, activate: bool) -> None:
        registration = self.store.register(task, uri, activate=activate)
        known = next((version for version, other in self.versions[task].items() if other == uri), None)
        if known is None:
            self.last[task] += 1
            known = self.last[task]
            self.versions[task][known] = uri
            assert registration.created
        if activate:
            self.active[task] = known
        assert registration.record.version == known

    @rule(task=tasks, version=st.none() | st.integers(1, 4))
    def delete(self, task: str, version: int | None) -> None:
        name = task if version is None else f"{task}@{version}"
        gone = set(self.versions[task]) if version is None else {version} & set(self.versions[task])
        if not gone:
            with pytest.raises(TaskNotFoundError):
                self.store.delete(name, in_use=nobody)
            return
        assert {record.version for record in self.store.delete(name, in_use=nobody)} == gone
        for number in gone:
            del self.versions[task][number]
        if self.active[task] in gone:
            self.active[task] = None

    @rule(task=tasks, version=st.integers(1, 4))
    def activate(self, task: str, version: int) -> None:
        if version in self.versions[task]:
            self.store.activate(f"{task}@{version}")
            self.active[task] = version

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        expected = {(task, version) for task, versions in self.versions.items() for version in versions}
        records = self.store.list().records
        assert {(record.task_id, record.version) for record in records} == expected
        active = {
            (record.task_id, record.version) for record in records if record.state is AdapterState.ACTIVE
        }
        assert active == {(task, version) for task, version in self.active.items() if version is not None}
        assert {record.path.name for record in records} == published(self.root)
        for record in records:
            assert self.store.load(record).digest == record.digest


def test_any_history_keeps_catalogue_and_files_together(sources: Path, tmp_path: Path) -> None:

    machine = type("Machine", (StoreMachine,), {"root": tmp_path})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=12, deadline=None)
    )


@pytest.mark.parametrize("call", ["preadv", "pread"])
def test_a_failing_disk_is_not_the_adapter_s_fault(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    record = store.register("fr", "a0").record

    def fail(*args: object, **kwargs: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreUnavailableError) as caught:
        store.register("de", "a1")
    assert str(tmp_path) not in str(caught.value)
    if call != "pread":
        with pytest.raises(StoreUnavailableError):
            store.load(record)
