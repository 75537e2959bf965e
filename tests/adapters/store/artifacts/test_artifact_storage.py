"""What every artifact storage promises, whatever it is made of."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from manyhats.adapters.disk.digest import artifact_digest
from manyhats.adapters.errors import (
    AdapterTooLargeError,
    DataLossError,
    StoreConfigError,
    StoreUnavailableError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.store.artifacts.local import LocalArtifacts
from manyhats.adapters.store.artifacts.remote import RemoteArtifacts
from manyhats.adapters.store.artifacts.storage import ArtifactStorage, Swept
from manyhats.adapters.store.opening import open_artifacts

FILES = {"adapter_config.json": bytearray(b"{}"), "adapter_model.safetensors": bytearray(range(256)) * 40}
DIGEST = artifact_digest(FILES)
OTHER = {"adapter_config.json": bytearray(b"[]"), "adapter_model.safetensors": bytearray()}
OTHER_DIGEST = artifact_digest(OTHER)

Open = Callable[..., ArtifactStorage]


def all_named(digests: Collection[str]) -> Collection[str]:
    return digests


def none_named(digests: Collection[str]) -> Collection[str]:
    return ()


@pytest.fixture(params=["directory", "file url", "memory", "memory, cached", "s3"])
def open_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same place again and again, as several processes would."""
    kind, _, cached = request.param.partition(", ")
    options = {}
    match kind:
        case "directory":
            url = str(tmp_path / "store")
        case "file url":
            url = f"file://{tmp_path}/store"
        case "memory":
            url = "memory://bucket/store"
            MemoryFileSystem.store.clear()
        case "s3":
            bucket = request.getfixturevalue("bucket")
            url, options = bucket.url, bucket.options

    def open_again(limits: AdapterLimits | None = None) -> ArtifactStorage:
        return open_artifacts(
            url,
            limits or AdapterLimits(),
            cache_directory=tmp_path / "cache" if cached else None,
            storage_options=options,
        )

    return open_again


@pytest.fixture
def storage(open_storage: Open) -> ArtifactStorage:
    return open_storage()


def test_what_is_published_is_read_by_everybody(storage: ArtifactStorage, open_storage: Open) -> None:
    with storage.publishing():
        storage.publish(DIGEST, FILES)
        storage.publish(OTHER_DIGEST, OTHER)
    for other in (storage, open_storage(), open_storage()):
        assert other.digests() == {DIGEST, OTHER_DIGEST}
        assert other.read(DIGEST) == FILES
        assert other.read(OTHER_DIGEST) == OTHER
        assert other.is_whole(DIGEST)


def test_who_reads_may_change_what_was_read(storage: ArtifactStorage) -> None:
    storage.publish(DIGEST, FILES)
    storage.read(DIGEST)["adapter_config.json"][:] = b"changed"
    assert storage.read(DIGEST) == FILES


def test_what_is_not_there_is_data_loss(storage: ArtifactStorage) -> None:
    storage.publish(OTHER_DIGEST, OTHER)
    with pytest.raises(DataLossError) as caught:
        storage.read(DIGEST)
    assert caught.value.subject == DIGEST
    assert not storage.is_whole(DIGEST)
    assert storage.digests() == {OTHER_DIGEST}


def test_publication_again_changes_nothing(storage: ArtifactStorage) -> None:
    for _ in range(3):
        storage.publish(DIGEST, FILES)
    assert storage.gc(all_named, older_than_s=0) == Swept(0, 0, 0)
    assert storage.read(DIGEST) == FILES


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "0" * 63, "sha256:../" + "0" * 61, "0" * 64])
def test_what_is_no_digest_reaches_no_file(storage: ArtifactStorage, digest: str) -> None:
    with pytest.raises(ValueError, match="digest"):
        storage.publish(digest, FILES)
    with pytest.raises(ValueError, match="digest"):
        storage.read(digest)
    with pytest.raises(ValueError, match="digest"):
        storage.is_whole(digest)


def test_files_of_another_digest_are_not_published(storage: ArtifactStorage) -> None:
    with pytest.raises((ValueError, StoreUnavailableError)):
        storage.publish(OTHER_DIGEST, FILES)
    assert storage.digests() == frozenset()
    with pytest.raises(DataLossError):
        storage.read(OTHER_DIGEST)


def test_gc_keeps_what_rows_name_and_removes_the_rest(storage: ArtifactStorage) -> None:
    storage.publish(DIGEST, FILES)
    storage.publish(OTHER_DIGEST, OTHER)
    swept = storage.gc(lambda digests: {DIGEST} & set(digests), older_than_s=0)
    assert (swept.num_artifacts, swept.num_unfinished) == (1, 0)
    assert swept.size_bytes > 0
    assert storage.digests() == {DIGEST}
    assert storage.read(DIGEST) == FILES


def test_a_catalogue_that_cannot_be_asked_stops_removal(storage: ArtifactStorage) -> None:
    def fail(digests: Collection[str]) -> Collection[str]:
        raise StoreUnavailableError("catalogue", "cannot be read")

    storage.publish(DIGEST, FILES)
    with pytest.raises(StoreUnavailableError, match="catalogue"):
        storage.gc(fail, older_than_s=0)
    assert storage.read(DIGEST) == FILES
    storage.publish(OTHER_DIGEST, OTHER)


def test_removal_and_sweep_spare_what_a_row_names(storage: ArtifactStorage) -> None:
    storage.publish(DIGEST, FILES)
    storage.remove([DIGEST], all_named)
    assert storage.sweep(all_named) == Swept(0, 0, 0)
    assert storage.read(DIGEST) == FILES


def test_only_one_catalogue_claims_a_storage(storage: ArtifactStorage, open_storage: Open) -> None:
    storage.claim("first")
    storage.claim("first")
    open_storage().claim("first")
    with pytest.raises(StoreUnavailableError, match="another catalogue"):
        open_storage().claim("second")
    storage.claim("first")


def test_a_limit_that_became_lower_is_named(storage: ArtifactStorage, open_storage: Open) -> None:
    storage.publish(DIGEST, FILES)
    with pytest.raises(AdapterTooLargeError, match="limit"):
        open_storage(AdapterLimits(max_size_bytes=1000)).read(DIGEST)
    assert open_storage(AdapterLimits(max_size_bytes=1000)).is_whole(DIGEST)


def test_many_threads_publish_read_and_collect_the_same_artifact(storage: ArtifactStorage) -> None:
    named: set[str] = set()
    errors: list[BaseException] = []
    stop = threading.Event()

    def churn() -> None:
        for _ in range(4):
            with storage.publishing():
                storage.publish(DIGEST, FILES)
                named.add(DIGEST)
            assert storage.read(DIGEST) == FILES

    def collect() -> None:
        while not stop.is_set():
            try:
                storage.gc(lambda digests: named & set(digests), older_than_s=3600)
            except BaseException as error:  # noqa: BLE001 - shown by the assertion below
                errors.append(error)
                return

    collector = threading.Thread(target=collect)
    collector.start()
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(churn) for _ in range(3)]
    stop.set()
    collector.join()
    for job in jobs:
        job.result()
    assert errors == []
    assert storage.read(DIGEST) == FILES


def test_urls_choose_the_storage(tmp_path: Path) -> None:
    limits = AdapterLimits()
    assert isinstance(open_artifacts(tmp_path / "a", limits), LocalArtifacts)
    assert isinstance(open_artifacts(f"file://localhost{tmp_path}/with%20space", limits), LocalArtifacts)
    assert (tmp_path / "with space" / "artifacts").is_dir()
    assert isinstance(open_artifacts("memory://bucket", limits), RemoteArtifacts)


@pytest.mark.parametrize(
    ("url", "options", "subject"),
    [
        ("https://host/bucket", {}, "store"),
        ("github://owner/repository", {}, "store"),
        ("s3://", {}, "store"),
        ("file://host/directory", {}, "store"),
        ("s3://bucket/store", {"key": "a", "username": "b"}, "storage_options"),
    ],
)
def test_urls_that_name_no_storage_are_refused(url: str, options: dict[str, object], subject: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        open_artifacts(url, AdapterLimits(), storage_options=options)
    assert caught.value.subject == subject


def test_a_scheme_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreConfigError, match=r"manyhats\[gcs\]"):
        open_artifacts("gs://bucket/store", AdapterLimits())


def test_what_is_there_can_be_read_and_written(storage: ArtifactStorage) -> None:
    storage.claim("a")
    storage.publish(DIGEST, FILES)
    storage.check_reads()
    storage.check_writes()
    assert storage.sweep(all_named) == Swept(0, 0, 0), "nothing is left of the checks"


@pytest.mark.parametrize("is_empty", [True, False], ids=["empty", "missing"])
def test_a_directory_that_is_gone_is_no_data_loss(tmp_path: Path, is_empty: bool) -> None:
    """Such as where a file system is no longer mounted."""
    root = tmp_path / "store"
    storage = LocalArtifacts(root, AdapterLimits())
    storage.claim("a")
    storage.publish(DIGEST, FILES)
    root.rename(tmp_path / "elsewhere")
    if is_empty:
        root.mkdir()
    for call in (lambda: storage.read(DIGEST), storage.check_reads, storage.check_writes):
        with pytest.raises(StoreUnavailableError, match="its directory is not there"):
            call()
    if is_empty:
        assert list(root.iterdir()) == []
        root.rmdir()
    (tmp_path / "elsewhere").rename(root)
    assert storage.read(DIGEST) == FILES
    storage.check_writes()
