from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manyhats.adapters.artifact import AdapterState
from manyhats.adapters.errors import (
    AdapterTooLargeError,
    DataLossError,
    StoreFullError,
    StoreUnavailableError,
    TaskNotFoundError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.registrations import nobody

BASE = make_base(names=("org/tiny",))


def published(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "store" / "artifacts"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "config"])
def test_damaged_files_are_data_loss_until_they_are_registered_again(
    store: AdapterStore, tmp_path: Path, damage: str
) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    name = "adapter_config.json" if damage == "config" else "adapter_model.safetensors"
    file = tmp_path / "store" / "artifacts" / record.digest.removeprefix("sha256:") / name
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
    assert not store.register(Registration("fr", Uri("a0"))).created
    assert store.lower(record).digest == record.digest


def test_what_nobody_catalogued_is_swept_at_start_and_nothing_else(tmp_path: Path, sources: Path) -> None:
    root = tmp_path / "store"
    (root / "artifacts" / ("0" * 64)).mkdir(parents=True)
    (root / "artifacts" / ("0" * 64) / "file").touch()
    (root / "artifacts" / "mine").mkdir()
    (root / "staging" / "half").mkdir(parents=True)
    (root / "notes.txt").touch()
    open_store(root, BASE, [sources]).close()
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
        store.register(Registration("fr", Uri("a0")))
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert published(tmp_path) == set()
    assert os.listdir(tmp_path / "store" / "staging") == []
    assert store.list().records == ()
    assert store.register(Registration("fr", Uri("a0"))).created


def test_several_processes_share_a_store(store: AdapterStore, tmp_path: Path, sources: Path) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record
    program = (
        "import sys, pathlib\n"
        "from support.factories.adapters import make_base\n"
        "from manyhats.adapters.registration import Registration, Uri\n"
        "from manyhats.adapters.store.opening import open_store\n"
        "root, sources = map(pathlib.Path, sys.argv[1:])\n"
        "store = open_store(root, make_base(names=('org/tiny',)), [sources])\n"
        "store.register(Registration('fr', Uri('a1')))\n"
        "store.register(Registration('de', Uri('a0')))\n"
        "store.delete('fr@1', in_use=lambda record: False)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "store"), str(sources)]
    subprocess.run(command, env=environment, check=True)
    assert store.resolve("fr") == record
    assert store.refresh() >= {"fr", "de"}
    assert store.refresh() == frozenset()
    assert [found.name for found in store.list().records] == ["de@1", "fr@2"]
    for name in ("fr", "de"):
        assert store.lower(store.get(name)).digest == store.get(name).digest
    store.delete("de", in_use=nobody)
    with pytest.raises(TaskNotFoundError):
        store.load(record)


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError):
        open_store(tmp_path / "file" / "store", BASE, [])


def test_registrations_from_many_threads_are_all_kept(store: AdapterStore) -> None:
    jobs = [(f"task-{n % 5}", Uri(f"a{n % 4}")) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        created = [
            answer.created for answer in pool.map(lambda job: store.register(Registration(*job)), jobs)
        ]
    assert sum(created) == len(set(jobs)) == len(store.list().records)
    for n in range(5):
        states = [record.state for record in store.versions(f"task-{n}")]
        assert states.count(AdapterState.ACTIVE) == 1


def test_one_request_id_from_many_threads_registers_once(store: AdapterStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: store.register(Registration("fr", Uri("a0"), request_id="r")), range(16))
        )
    assert all(answer == answers[0] for answer in answers)


def test_registration_and_deletion_race_to_a_whole_store(store: AdapterStore, tmp_path: Path) -> None:
    def churn(n: int) -> None:
        for _ in range(6):
            store.register(Registration(f"t{n}", Uri("a0")))
            store.delete(f"t{n}", in_use=nobody)
        store.register(Registration(f"t{n}", Uri("a0")))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    for n in range(4):
        assert store.lower(store.get(f"t{n}")).deltas
    assert len(published(tmp_path)) == 1


def test_limits_are_the_store_s(tmp_path: Path, sources: Path) -> None:
    store = open_store(tmp_path / "store", BASE, [sources], limits=AdapterLimits(max_rank=1))
    with pytest.raises(AdapterTooLargeError, match="limit is 1"):
        store.register(Registration("fr", Uri("a0")))
    with pytest.raises(ValueError, match="max_rank"):
        AdapterLimits(max_rank=0)
    store.close()


@pytest.mark.parametrize("call", ["preadv", "pread"])
def test_a_failing_disk_is_not_the_adapter_s_fault(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    record = store.register(Registration("fr", Uri("a0"))).record

    def fail(*args: object, **kwargs: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreUnavailableError) as caught:
        store.register(Registration("de", Uri("a1")))
    assert str(tmp_path) not in str(caught.value)
    if call != "pread":
        with pytest.raises(StoreUnavailableError):
            store.load(record)
