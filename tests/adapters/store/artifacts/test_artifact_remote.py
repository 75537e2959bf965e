"""Artifacts in an object store: copies, their garbage collection, the cache in front, and a network that fails."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.disk.object_store import ObjectStore
from manyhats.adapters.errors import AdapterError, DataLossError, StoreUnavailableError
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.blob_cache import BlobCache
from manyhats.adapters.store.artifacts.copies import list_copies
from manyhats.adapters.store.artifacts.remote import RemoteArtifacts
from manyhats.adapters.store.artifacts.storage import Swept
from manyhats.adapters.store.opening import open_artifacts
from support.servers.s3 import Bucket

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40}
DIGEST = artifact_digest(FILES)
SIZE = sum(map(len, FILES.values()))
HOUR = 3600.0


class Clock:
    """A time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class FailingObjects(ObjectStore):
    """Objects in memory; ``fail_writes`` fails from that write on, ``is_down`` fails everything."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}/store", {})
        self.writes_left: int | None = None
        self.is_down = False

    def sizes(self, directory: str) -> dict[str, int]:
        self._check()
        return super().sizes(directory)

    def read(self, name: str, size_bytes: int) -> bytearray:
        self._check()
        return super().read(name, size_bytes)

    def write(self, name: str, content: bytes | bytearray) -> None:
        self._check()
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise StoreUnavailableError("store", "the object store cannot be reached (Test)")
            self.writes_left -= 1
        super().write(name, content)

    def _check(self) -> None:
        if self.is_down:
            raise StoreUnavailableError("store", "the object store cannot be reached (Test)")

    def damage(self, suffix: str, how: str) -> None:
        """Damage every object whose name ends so."""
        for path in [path for path in MemoryFileSystem.store if path.startswith(f"/{self._root}/")]:
            if path.endswith(suffix):
                data = MemoryFileSystem.store[path].getvalue()
                match how:
                    case "flip":
                        self._files.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))
                    case "truncate":
                        self._files.pipe_file(path, data[:-1])
                    case "extend":
                        self._files.pipe_file(path, data + b"x")
                    case "remove":
                        self._files.rm_file(path)


@pytest.fixture
def objects() -> Iterator[FailingObjects]:
    yield FailingObjects()
    MemoryFileSystem.store.clear()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(objects: FailingObjects, clock: Clock) -> RemoteArtifacts:
    return RemoteArtifacts(objects, AdapterLimits(), clock=clock)


def cached(objects: ObjectStore, directory: Path) -> RemoteArtifacts:
    return RemoteArtifacts(objects, AdapterLimits(), BlobCache(directory, 1_000_000))


def all_named(digests: Collection[str]) -> Collection[str]:
    return digests


def none_named(digests: Collection[str]) -> Collection[str]:
    return ()


@pytest.mark.parametrize("num_writes", [0, 1, 2])
def test_what_was_not_finished_does_not_exist_and_is_collected_when_old(
    storage: RemoteArtifacts, objects: FailingObjects, clock: Clock, num_writes: int
) -> None:
    objects.writes_left = num_writes
    with pytest.raises(StoreUnavailableError):
        storage.publish(DIGEST, FILES)
    objects.writes_left = None
    assert storage.digests() == frozenset()
    with pytest.raises(DataLossError):
        storage.read(DIGEST)
    assert storage.gc(all_named, older_than_s=HOUR) == Swept(0, 0, 0)
    clock.now += HOUR
    swept = storage.gc(all_named, older_than_s=HOUR)
    assert swept.num_unfinished == (num_writes > 0)
    assert objects.sizes("") == {}
    storage.publish(DIGEST, FILES)
    assert storage.read(DIGEST) == FILES


@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "remove"])
@pytest.mark.parametrize("suffix", ["adapter_config.json", "adapter_model.safetensors", ".manifest"])
def test_damaged_objects_are_data_loss_until_published_again(
    storage: RemoteArtifacts, objects: FailingObjects, suffix: str, how: str
) -> None:
    storage.publish(DIGEST, FILES)
    objects.damage(suffix, how)
    assert not storage.is_whole(DIGEST)
    with pytest.raises(DataLossError) as caught:
        storage.read(DIGEST)
    assert caught.value.subject == DIGEST
    storage.publish(DIGEST, FILES)
    assert storage.is_whole(DIGEST)
    assert storage.read(DIGEST) == FILES


def test_a_damaged_copy_is_passed_over_and_never_collects_a_whole_one(
    storage: RemoteArtifacts, objects: FailingObjects, clock: Clock
) -> None:
    storage.publish(DIGEST, FILES)
    whole = set(objects.sizes("artifacts"))
    clock.now += HOUR
    storage.publish(DIGEST, FILES)
    for name in set(objects.sizes("artifacts")) - whole:
        objects.damage(name, "flip")
    assert storage.read(DIGEST) == FILES
    clock.now += HOUR
    assert storage.gc(all_named, older_than_s=HOUR) == Swept(0, 0, 0)
    assert storage.read(DIGEST) == FILES


def test_spare_copies_are_collected_when_old(storage: RemoteArtifacts, clock: Clock) -> None:
    for _ in range(3):
        storage.publish(DIGEST, FILES)
        clock.now += HOUR
    swept = storage.gc(all_named, older_than_s=HOUR)
    assert swept.num_artifacts == 2
    assert swept.size_bytes > 2 * SIZE
    assert storage.read(DIGEST) == FILES


def test_a_fresh_copy_serves_a_second_publisher(
    storage: RemoteArtifacts, objects: FailingObjects, clock: Clock
) -> None:
    storage.publish(DIGEST, FILES)
    clock.now += 60
    objects.writes_left = 0
    storage.publish(DIGEST, FILES)
    assert len(list_copies(objects)) == 1


def test_removal_and_sweep_at_start_leave_all_to_collection(storage: RemoteArtifacts) -> None:
    storage.publish(DIGEST, FILES)
    storage.remove([DIGEST], none_named)
    assert storage.sweep(none_named) == Swept(0, 0, 0)
    assert storage.read(DIGEST) == FILES


def test_names_that_the_storage_did_not_give_are_left_alone(
    storage: RemoteArtifacts, objects: FailingObjects, clock: Clock
) -> None:
    foreign = ["artifacts/readme", f"artifacts/{'0' * 64}/file", "other/file"]
    for name in foreign:
        objects.write(name, b"mine")
    storage.publish(DIGEST, FILES)
    clock.now += 24 * HOUR
    assert storage.gc(none_named, older_than_s=0).num_artifacts == 1
    assert set(objects.sizes("")) == set(foreign)


def test_two_catalogues_that_claim_at_once_do_not_both_succeed(objects: FailingObjects) -> None:
    storage = RemoteArtifacts(objects, AdapterLimits())
    write = objects.write

    def write_second(name: str, content: bytes | bytearray) -> None:
        write(name, content)
        write("catalogues/second", b"")

    objects.write = write_second  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailableError):
        storage.claim("first")
    objects.write = write  # type: ignore[method-assign]
    storage.claim("second")


ACTS = st.lists(st.sampled_from(["publish", "commit", "drop", "minute", "hour"]), max_size=4)


@settings(max_examples=150, deadline=None)
@given(before=ACTS, when_asked=ACTS, before_deletion=ACTS, after=ACTS, before_second=ACTS)
def test_collection_at_any_moment_takes_nothing_that_a_row_names(
    before: list[str],
    when_asked: list[str],
    before_deletion: list[str],
    after: list[str],
    before_second: list[str],
) -> None:
    """Publishers act between every two steps of two collections; a row is committed soon after publication."""
    clock = Clock()
    objects = FailingObjects()
    storage = RemoteArtifacts(objects, AdapterLimits(), clock=clock)
    rows: set[str] = set()
    relied_on_until = 0.0

    def act(acts: list[str]) -> None:
        nonlocal relied_on_until
        for name in acts:
            match name:
                case "publish":
                    storage.publish(DIGEST, FILES)
                    relied_on_until = clock.now + 20 * 60
                case "commit" if clock.now <= relied_on_until:
                    rows.add(DIGEST)
                case "drop":
                    rows.clear()
                case "minute":
                    clock.now += 60
                case "hour":
                    clock.now += HOUR
            if rows:
                assert storage.read(DIGEST) == FILES

    delete = objects.delete

    def delete_late(names: Collection[str]) -> None:
        act(before_deletion)
        delete(list(names))

    def named(digests: Collection[str]) -> Collection[str]:
        act(when_asked)
        return rows & set(digests)

    objects.delete = delete_late  # type: ignore[method-assign]
    act(before)
    storage.gc(named, older_than_s=HOUR)
    act([*after, *before_second])
    storage.gc(named, older_than_s=HOUR)
    act([])


def test_what_the_cache_has_is_read_without_the_network(objects: FailingObjects, tmp_path: Path) -> None:
    RemoteArtifacts(objects, AdapterLimits()).publish(DIGEST, FILES)
    storage = cached(objects, tmp_path)
    assert storage.read(DIGEST) == FILES
    objects.is_down = True
    assert storage.read(DIGEST) == FILES
    assert cached(objects, tmp_path).read(DIGEST) == FILES
    with pytest.raises(StoreUnavailableError):
        storage.is_whole(DIGEST)


def test_what_was_fetched_is_read_without_the_network(objects: FailingObjects, tmp_path: Path) -> None:
    RemoteArtifacts(objects, AdapterLimits()).publish(DIGEST, FILES)
    storage = cached(objects, tmp_path)
    storage.fetch(DIGEST)
    objects.is_down = True
    storage.fetch(DIGEST)  # it is there
    assert storage.read(DIGEST) == FILES


def test_what_is_missing_or_has_no_place_to_go_is_not_fetched(
    objects: FailingObjects, tmp_path: Path
) -> None:
    with pytest.raises(DataLossError):
        cached(objects, tmp_path).fetch(DIGEST)
    objects.is_down = True
    RemoteArtifacts(objects, AdapterLimits()).fetch(DIGEST)


def test_who_published_has_it_cached(objects: FailingObjects, tmp_path: Path) -> None:
    storage = cached(objects, tmp_path)
    storage.publish(DIGEST, FILES)
    objects.is_down = True
    assert storage.read(DIGEST) == FILES


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_cache_entries_are_fetched_again(objects: FailingObjects, tmp_path: Path, how: str) -> None:
    storage = cached(objects, tmp_path)
    storage.publish(DIGEST, FILES)
    for path in (tmp_path / "blobs").iterdir():
        data = path.read_bytes()
        path.unlink()
        if how != "remove":
            path.write_bytes(data[:-1] if how == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    assert storage.read(DIGEST) == FILES
    objects.is_down = True
    assert storage.read(DIGEST) == FILES


def test_damage_behind_a_cache_is_found_by_verification(objects: FailingObjects, tmp_path: Path) -> None:
    storage = cached(objects, tmp_path)
    storage.publish(DIGEST, FILES)
    objects.damage(".safetensors", "flip")
    assert not storage.is_whole(DIGEST)
    assert storage.read(DIGEST) == FILES
    storage.publish(DIGEST, FILES)
    assert storage.is_whole(DIGEST)


def test_damaged_objects_are_not_cached(objects: FailingObjects, tmp_path: Path) -> None:
    RemoteArtifacts(objects, AdapterLimits()).publish(DIGEST, FILES)
    objects.damage(".safetensors", "flip")
    with pytest.raises(DataLossError):
        cached(objects, tmp_path).read(DIGEST)
    kept = [path.read_bytes() for path in (tmp_path / "blobs").iterdir()]
    assert FILES["adapter_model.safetensors"] not in kept
    assert all(len(content) < 1000 for content in kept)


def test_a_cache_that_is_too_small_does_no_harm(objects: FailingObjects, tmp_path: Path) -> None:
    storage = RemoteArtifacts(objects, AdapterLimits(), BlobCache(tmp_path, 100))
    storage.publish(DIGEST, FILES)
    for _ in range(2):
        assert storage.read(DIGEST) == FILES


# Over a real connection.


def test_files_of_many_ranges_and_none_survive_s3(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhats.adapters.disk.object_store._READ_BYTES", 1000)
    storage = open_artifacts(bucket.url, AdapterLimits(), storage_options=bucket.options)
    files = {"a": bytes(range(250)) * 12, "b": b"", "c": b"x" * 2000}
    digest = artifact_digest(files)
    storage.publish(digest, files)
    assert storage.read(digest) == files


def test_a_bucket_that_does_not_exist_is_said_so(bucket: Bucket) -> None:
    storage = open_artifacts("s3://no-such-bucket/store", AdapterLimits(), storage_options=bucket.options)
    with pytest.raises(StoreUnavailableError, match="bucket"):
        storage.claim("catalogue")


class Gate(socketserver.ThreadingTCPServer):
    """A port in front of S3 that drops the first connections, and hands on the rest."""

    def __init__(self, target: tuple[str, int], num_dropped: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.target = target
        self.num_dropped = num_dropped
        self.clients: list[socket.socket] = []
        threading.Thread(target=self.serve_forever).start()

    def close(self) -> None:
        self.shutdown()
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Relay(socketserver.BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        if self.server.num_dropped > 0:
            self.server.num_dropped -= 1
            return
        self.server.clients.append(self.request)
        with socket.create_connection(self.server.target) as target:
            sides = {self.request: target, target: self.request}
            while True:
                for source in select.select(list(sides), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    sides[source].sendall(data)


@pytest.fixture
def gate(request: pytest.FixtureRequest, bucket: Bucket) -> Iterator[Gate]:
    host, _, port = bucket.options["endpoint_url"].removeprefix("http://").partition(":")
    gate = Gate((host, int(port)), request.param)
    yield gate
    gate.close()


@pytest.mark.parametrize("gate", [1], indirect=True)
def test_a_lost_connection_is_tried_again(bucket: Bucket, gate: Gate) -> None:
    options = bucket.options | {"endpoint_url": f"http://127.0.0.1:{gate.server_address[1]}"}
    storage = open_artifacts(bucket.url, AdapterLimits(), storage_options=options)
    storage.publish(DIGEST, FILES)
    assert storage.read(DIGEST) == FILES


@pytest.mark.parametrize("gate", [1_000_000], indirect=True)
def test_a_network_that_stays_away_is_unavailable_and_what_is_cached_is_served(
    bucket: Bucket, gate: Gate, tmp_path: Path
) -> None:
    cache = BlobCache(tmp_path, 1_000_000)
    RemoteArtifacts(ObjectStore(bucket.url, bucket.options), AdapterLimits(), cache).publish(DIGEST, FILES)
    options = bucket.options | {"endpoint_url": f"http://127.0.0.1:{gate.server_address[1]}"}
    storage = RemoteArtifacts(ObjectStore(bucket.url, options), AdapterLimits(), cache)
    assert storage.read(DIGEST) == FILES
    with pytest.raises(StoreUnavailableError) as caught:
        storage.is_whole(DIGEST)
    assert isinstance(caught.value, AdapterError)
    assert str(gate.server_address[1]) not in str(caught.value)
    assert bucket.url not in str(caught.value)
