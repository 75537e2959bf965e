from __future__ import annotations

import hashlib
import logging
import os
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from manyhats.adapters.store.artifacts.blob_cache import BlobCache


def blob(n: int, size: int = 100) -> bytes:
    return random.Random(n).randbytes(size)


def name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(cache: BlobCache, *contents: bytes) -> None:
    for content in contents:
        cache.put(name(content), content)


def kept(cache: BlobCache, *contents: bytes) -> list[bool]:
    return [cache.get(name(content), len(content)) == content for content in contents]


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / "blobs").iterdir())


def age(directory: Path, content: bytes, seconds: float) -> None:
    path = directory / "blobs" / name(content)
    time = path.stat().st_mtime - seconds
    os.utime(path, (time, time))


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=300)
    a, b, c, d = (blob(n) for n in range(4))
    put(cache, a, b, c)
    for content, seconds in ((a, 30), (b, 20), (c, 10)):
        age(tmp_path, content, seconds)
    assert kept(cache, a) == [True]
    put(cache, d)
    assert kept(cache, a, b, c, d) == [True, False, True, True]
    assert size_bytes(tmp_path) == 300


def test_a_blob_larger_than_the_cache_is_not_kept_and_evicts_nothing(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=300)
    put(cache, blob(0), blob(1, 301))
    assert kept(cache, blob(0), blob(1, 301)) == [True, False]


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "link", "pipe", "directory"])
def test_a_damaged_copy_never_leaves_the_cache(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlobCache(tmp_path, max_bytes=1000)
    content = blob(0)
    put(cache, content)
    path = tmp_path / "blobs" / name(content)
    path.unlink()
    match damage:
        case "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "truncate":
            path.write_bytes(content[:-1])
        case "extend":
            path.write_bytes(content + b"x")
        case "link":
            (tmp_path / "other").write_bytes(content)
            path.symlink_to(tmp_path / "other")
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
    assert cache.get(name(content), 100) is None
    if damage not in ("link", "directory"):
        put(cache, content)
        assert kept(cache, content) == [True]


def test_no_more_is_read_than_the_caller_expects(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=1000)
    put(cache, blob(0))
    assert cache.get(name(blob(0)), 99) is None


def test_names_are_digests_alone(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", max_bytes=1000)
    for bad in ("", "../lock", "0" * 63, "G" * 64):
        with pytest.raises(ValueError, match="SHA-256"):
            cache.get(bad, 10)
        with pytest.raises(ValueError, match="SHA-256"):
            cache.put(bad, b"")


def test_what_a_dead_process_left_half_written_counts_and_goes(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, max_bytes=300)
    partial = tmp_path / "blobs" / "0123.part"
    partial.write_bytes(b"x" * 250)
    os.utime(partial, (1, 1))
    put(cache, blob(0))
    assert not partial.exists()
    assert kept(cache, blob(0)) == [True]


def test_a_cache_that_cannot_be_written_is_logged_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path, max_bytes=300)

    def fail(*args: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path))

    monkeypatch.setattr(os, "rename", fail)
    with caplog.at_level(logging.WARNING):
        put(cache, blob(0))
    assert "no space" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert list((tmp_path / "blobs").iterdir()) == []
    monkeypatch.undo()
    put(cache, blob(0))
    assert kept(cache, blob(0)) == [True]


def test_evicting_what_somebody_reads_leaves_the_reader_his_bytes(tmp_path: Path) -> None:
    """Threads read and evict each other's blobs: each answer is right or none, and some are right."""
    cache = BlobCache(tmp_path, max_bytes=5 * 40_000)
    contents = [blob(n, 40_000) for n in range(10)]

    def use(seed: int) -> int:
        order = random.Random(seed)
        hits = 0
        for _ in range(60):
            content = order.choice(contents)
            found = cache.get(name(content), len(content))
            assert found is None or found == content
            hits += found is not None
            if found is None:
                put(cache, content)
        return hits

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(use, range(4))) > 0
    assert size_bytes(tmp_path) <= 5 * 40_000


def _fill(directory: Path, seed: int) -> int:
    """How often what was just put was still there."""
    cache = BlobCache(directory, max_bytes=1000)
    hits = 0
    for n in range(40):
        content = blob(seed * 100 + n)
        put(cache, content)
        found = cache.get(name(content), len(content))
        assert found in (None, content)
        hits += found is not None
    return hits


def test_processes_that_share_a_cache_keep_its_bound_together(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert min(pool.map(_fill, [tmp_path] * 3, range(3))) > 0
    assert size_bytes(tmp_path) == 1000
