"""A whole store whose artifacts lie in S3, shared by two replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyhats.adapters.errors import DataLossError, StoreUnavailableError, TaskNotFoundError
from manyhats.adapters.registration import Part, Parts, Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from support.factories.adapters import make_base
from support.factories.registrations import nobody
from support.servers.s3 import Bucket

BASE = make_base(names=("org/tiny",))

OpenReplica = Callable[[str], AdapterStore]


@pytest.fixture
def open_replica(
    bucket: Bucket, tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenReplica]:
    """Opens a replica of a name: they share bucket and catalogue, and each has a cache."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.options["secret"])
    stores = []

    def open_one(name: str) -> AdapterStore:
        store = open_store(
            bucket.url,
            BASE,
            [sources],
            catalogue_url=f"sqlite:///{tmp_path}/catalogue.db",
            cache_directory=tmp_path / f"cache-{name}",
        )
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


def test_what_one_replica_registers_another_serves_and_a_restart_keeps(open_replica: OpenReplica) -> None:
    a, b = open_replica("a"), open_replica("b")
    plain = a.register(Registration("fr", Uri("a0"))).record
    composed = a.register(Registration("mix", Parts([Part("a1"), Part("a2", 0.5)]))).record
    assert b.refresh() == {"fr", "mix"}
    for record in (plain, composed):
        assert b.lower(b.get(record.task_id)).digest == record.digest
    assert [found.status for found in b.verify()] == ["ok"] * 3
    restarted = open_replica("c")
    assert restarted.list().records == a.list().records
    assert restarted.lower(restarted.get("mix")).digest == composed.digest


def test_only_old_artifacts_that_no_version_needs_are_collected(open_replica: OpenReplica) -> None:
    a, b = open_replica("a"), open_replica("b")
    record = a.register(Registration("fr", Uri("a0"))).record
    a.register(Registration("de", Uri("a1")))
    b.refresh()
    a.delete("fr", in_use=nobody)
    assert a.gc().num_artifacts == 0
    assert b.gc(older_than_s=0).num_artifacts == 1
    with pytest.raises(TaskNotFoundError):
        b.load(record)
    assert b.lower(b.get("de")).digest == a.get("de").digest


def test_lost_objects_are_data_loss_until_they_are_registered_again(
    open_replica: OpenReplica, bucket: Bucket
) -> None:
    import s3fs

    a = open_replica("a")
    record = a.register(Registration("fr", Uri("a0"))).record
    files = s3fs.S3FileSystem(**bucket.options, skip_instance_cache=True)
    files.rm(bucket.url + "/artifacts", recursive=True)
    assert a.lower(record).digest == record.digest  # it has a copy
    b = open_replica("b")
    with pytest.raises(DataLossError) as caught:
        b.lower(record)
    assert caught.value.subject == "fr@1"
    assert [found.status for found in b.verify()] == ["missing"]
    assert not b.register(Registration("fr", Uri("a0"))).created
    assert b.lower(record).digest == record.digest
    assert [found.status for found in b.verify()] == ["ok"]


def test_a_bucket_out_of_reach_registers_nothing(
    open_replica: OpenReplica, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    store = open_replica("a")
    store.register(Registration("fr", Uri("a0")))
    s3fs.S3FileSystem(**bucket.options, skip_instance_cache=True).rm(
        bucket.url.rpartition("/")[0], recursive=True
    )
    with pytest.raises(StoreUnavailableError):
        store.register(Registration("de", Uri("a1")))
    assert [record.task_id for record in store.list().records] == ["fr"]
    assert store.lower(store.get("fr")).digest == store.get("fr").digest
