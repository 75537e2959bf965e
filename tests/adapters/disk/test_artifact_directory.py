"""Artifacts in a directory: durable publication, damage, and several processes at once."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.disk.file_lock import FileLock
from manyhats.adapters.errors import DataLossError, StoreFullError, StoreUnavailableError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.local import LocalArtifacts
from manyhats.adapters.store.artifacts.storage import Swept

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40}
DIGEST = artifact_digest(FILES)


@pytest.fixture
def storage(tmp_path: Path) -> LocalArtifacts:
    return LocalArtifacts(tmp_path / "store", AdapterLimits())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the artifact lies once it is published."""
    return tmp_path / "store" / "artifacts" / DIGEST.removeprefix("sha256:")


def all_named(digests: Collection[str]) -> Collection[str]:
    return digests


def none_named(digests: Collection[str]) -> Collection[str]:
    return ()


def staged(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "store" / "staging")


def test_all_is_synced_before_the_name_and_the_name_before_the_return(
    storage: LocalArtifacts, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "store")
        calls.append(
            f"sync {path.name if path.parts[0] == 'staging' and len(path.parts) > 2 else path.parts[0]}"
        )
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        calls.append(f"rename to {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    storage.publish(DIGEST, FILES)
    assert calls == [
        "sync adapter_config.json",
        "sync adapter_model.safetensors",
        "sync staging",
        f"rename to {directory.name}",
        "sync artifacts",
    ]
    calls.clear()
    storage.publish(DIGEST, FILES)  # whoever renamed it may have died before the last step
    assert calls == ["sync artifacts"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EIO, StoreUnavailableError),
        (errno.EROFS, StoreUnavailableError),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failed_write_leaves_nothing(
    storage: LocalArtifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    call: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(error) as caught:
        storage.publish(DIGEST, FILES)
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.undo()
    assert storage.digests() == frozenset()
    assert staged(tmp_path) == []
    storage.publish(DIGEST, FILES)
    assert storage.read(DIGEST) == FILES


def test_a_disk_that_does_not_keep_what_is_written_publishes_nothing(
    storage: LocalArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def corrupt(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "adapter_model.safetensors":
            os.pwrite(descriptor, b"\xff", 100)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", corrupt)
    with pytest.raises(StoreUnavailableError, match="does not have"):
        storage.publish(DIGEST, FILES)
    assert storage.digests() == frozenset()
    assert staged(tmp_path) == []


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "link", "pipe", "more", "empty", "file", "linked directory"]
)
def test_damage_is_data_loss_until_it_is_published_again(
    storage: LocalArtifacts, tmp_path: Path, directory: Path, damage: str
) -> None:
    storage.publish(DIGEST, FILES)
    file = directory / "adapter_model.safetensors"
    data = file.read_bytes()
    match damage:
        case "flip" | "truncate":
            file.chmod(0o644)
            file.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
        case "remove":
            file.unlink()
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "pipe":
            file.unlink()
            os.mkfifo(file)
        case "more":
            (directory / "more").touch()
        case "empty":
            for entry in directory.iterdir():
                entry.unlink()
        case "file":
            directory.rename(tmp_path / "elsewhere")
            directory.touch()
        case "linked directory":
            directory.rename(tmp_path / "elsewhere")
            directory.symlink_to(tmp_path / "elsewhere")
    assert not storage.is_whole(DIGEST)
    with pytest.raises(DataLossError) as caught:
        storage.read(DIGEST)
    assert caught.value.subject == DIGEST
    assert str(tmp_path) not in str(caught.value)
    storage.publish(DIGEST, FILES)
    assert storage.is_whole(DIGEST)
    assert storage.read(DIGEST) == FILES
    assert staged(tmp_path) == []
    assert not (tmp_path / "elsewhere").exists() or damage in ("link", "file", "linked directory")


@pytest.mark.parametrize("call", ["open", "pread", "preadv"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_cannot_be_read_now_is_no_data_loss(
    storage: LocalArtifacts, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    storage.publish(DIGEST, FILES)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreUnavailableError):
        storage.is_whole(DIGEST) if call == "pread" else storage.read(DIGEST)
    monkeypatch.undo()
    assert storage.read(DIGEST) == FILES


def test_the_sweep_removes_what_a_crash_left_and_touches_no_name_of_others(
    storage: LocalArtifacts, tmp_path: Path, directory: Path
) -> None:
    root = tmp_path / "store"
    storage.claim("catalogue")
    storage.publish(DIGEST, FILES)
    orphan = root / "artifacts" / ("0" * 64)
    orphan.mkdir()
    (orphan / "file").write_bytes(b"12345")
    (root / "staging" / "half").mkdir()
    (root / "staging" / "half" / "file").write_bytes(b"123")
    (root / "staging" / "file").write_bytes(b"12")
    (root / "artifacts" / "mine").mkdir()
    (root / "notes.txt").touch()
    swept = storage.sweep(lambda digests: {DIGEST} & set(digests))
    assert (swept.num_artifacts, swept.num_unfinished, swept.size_bytes) == (1, 2, 10)
    assert set(os.listdir(root / "artifacts")) == {"mine", directory.name}
    assert staged(tmp_path) == []
    assert (root / "notes.txt").exists()
    storage.claim("catalogue")


def test_removal_asks_the_catalogue_while_nobody_publishes(storage: LocalArtifacts) -> None:
    """A row that is committed while removal waits is seen by it."""
    rows: set[str] = set()
    waiting = threading.Event()
    storage.publish(DIGEST, FILES)
    with ThreadPoolExecutor(1) as pool:
        with storage.publishing():
            storage.publish(DIGEST, FILES)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "sleep", lambda _: waiting.set())
                removal = pool.submit(storage.remove, [DIGEST], lambda digests: rows & set(digests))
                assert waiting.wait(60)
                rows.add(DIGEST)
        removal.result()
    assert storage.read(DIGEST) == FILES


def test_readers_and_publishers_share_the_lock(storage: LocalArtifacts) -> None:
    with storage.publishing(), storage.publishing():
        storage.publish(DIGEST, FILES)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(storage.read, DIGEST).result() == FILES


def test_a_lock_that_is_never_given_back_is_unavailable(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", wait_s=0.02)
    with lock.shared():
        with lock.shared():
            pass
        with pytest.raises(StoreUnavailableError, match="locked"), lock.alone():
            pass
    with lock.alone(), pytest.raises(StoreUnavailableError, match="locked"), lock.shared():
        pass
    with lock.alone():
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(storage: LocalArtifacts, tmp_path: Path) -> None:
    lock = tmp_path / "store" / "lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailableError):
        storage.publish(DIGEST, FILES)
    assert not (tmp_path / "elsewhere").exists()


_STOPPED_PUBLISHER = """
import os, sys
from pathlib import Path
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.local import LocalArtifacts

def stop(*names):
    print("staged", flush=True)
    sys.stdin.read()

os.rename = stop
LocalArtifacts(Path(sys.argv[1]), AdapterLimits()).publish(sys.argv[2], {"file": b"content"})
"""


def test_staging_of_a_live_process_is_not_swept_and_that_of_a_killed_one_is(
    storage: LocalArtifacts, tmp_path: Path
) -> None:
    files = {"file": b"content"}
    command = [sys.executable, "-c", _STOPPED_PUBLISHER, str(tmp_path / "store"), artifact_digest(files)]
    waiting = threading.Event()
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as publisher,
        ThreadPoolExecutor(1) as pool,
    ):
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"staged\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: waiting.set())
            sweep = pool.submit(storage.sweep, all_named)
            assert waiting.wait(60)
            assert len(staged(tmp_path)) == 1
            publisher.send_signal(signal.SIGKILL)
            assert sweep.result() == Swept(0, 1, len(b"content"))
    assert staged(tmp_path) == []


def test_many_publishers_heal_one_damaged_artifact(storage: LocalArtifacts, directory: Path) -> None:
    for _ in range(5):
        storage.publish(DIGEST, FILES)
        (directory / "adapter_config.json").unlink()
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(storage.publish, DIGEST, FILES) for _ in range(4)]
        for job in jobs:
            job.result()
        assert storage.read(DIGEST) == FILES


def _churn(root: Path, seed: int) -> None:
    """Publish, name, forget and remove a few artifacts; a file ``rows/<digest>.<process>`` is a row."""
    storage = LocalArtifacts(root / "store", AdapterLimits())
    order = random.Random(seed)

    def named(digests: Collection[str]) -> Collection[str]:
        rows = {row.partition(".")[0] for row in os.listdir(root / "rows")}
        return {digest for digest in digests if digest in rows}

    for _ in range(40):
        files = {"file": bytes([order.randrange(3)]) * 100}
        digest = artifact_digest(files)
        row = root / "rows" / f"{digest}.{seed}"
        if row.exists():
            assert storage.read(digest) == files
            row.unlink()
            storage.remove([digest], named)
        else:
            with storage.publishing():
                storage.publish(digest, files)
                row.touch()
            assert storage.read(digest) == files
        if order.randrange(8) == 0:
            storage.sweep(named)


def test_processes_that_share_a_directory_keep_what_any_of_them_names(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(_churn, [tmp_path] * 3, range(3)))
    storage = LocalArtifacts(tmp_path / "store", AdapterLimits())
    rows = {row.partition(".")[0] for row in os.listdir(tmp_path / "rows")}
    assert storage.digests() == rows
    assert all(storage.is_whole(digest) for digest in rows)
    assert staged(tmp_path) == []
