from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import fsspec
import pytest

from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    SourceNotAllowedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreConfigError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.sources import sources as sources_module
from manyhats.adapters.sources.sources import AdapterSources, check_url_prefix, open_remote

PREFIX = "memory://bucket/adapters/"
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors", "README.md": b"hello"}


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """An object store with one adapter, ``fr``, and a secret next to the allowed prefix."""
    files = fsspec.filesystem("memory")
    for name, content in FILES.items():
        files.pipe_file(f"/bucket/adapters/fr/{name}", content)
    files.pipe_file("/bucket/secret/adapter_config.json", b"secret")
    yield files
    files.store.clear()


@pytest.fixture
def sources(tmp_path: Path) -> AdapterSources:
    return AdapterSources([tmp_path], [PREFIX], Scratch(tmp_path / "scratch", 2), AdapterLimits())


def read(sources: AdapterSources, uri: str) -> dict[str, bytes]:
    content = {}
    with sources.open(uri) as directory:
        for name in directory.names():
            with directory.open_file(name, 100) as file:
                content[name] = bytes(file.read())
    return content


def test_an_adapter_is_fetched_from_an_object_store(
    bucket: fsspec.AbstractFileSystem, sources: AdapterSources, tmp_path: Path
) -> None:
    wanted = {name: FILES[name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert read(sources, PREFIX + "fr") == read(sources, PREFIX + "fr/") == wanted
    assert os.listdir(tmp_path / "scratch") == []


def test_what_changed_is_fetched_anew(bucket: fsspec.AbstractFileSystem, sources: AdapterSources) -> None:
    read(sources, PREFIX + "fr")
    bucket.pipe_file("/bucket/adapters/fr/adapter_model.safetensors", b"others")
    assert read(sources, PREFIX + "fr")["adapter_model.safetensors"] == b"others"


@pytest.mark.parametrize(
    "uri",
    [
        "memory://bucket/secret",
        "memory://bucket/adapters",
        "memory://bucket/adapters/",
        "memory://bucket/adapters/../secret",
        "memory://bucket/adapters/./../secret",
        "memory://bucket/adapters/fr/..",
        "memory://bucket/adapters-2/fr",
        "memory://bucket/adapters/%2e%2e/secret",
        "memory://bucket/adapters//secret",
        "memory://bucket/adapters/*",
        "memory://bucket/adapters/fr?x=1",
        "memory://bucket/adapters/fr#x",
        "memory://bucket/adapters/fr::file:///etc",
        "simplecache::memory://bucket/adapters/fr",
        "memory://user:password@bucket/adapters/fr",
        "memory://bucket\\adapters/fr",
        "memory://bucket/adapters/fr\n",
        "memory://bucket/adapters/fr\0",
        "memory://bucket/adapters/\u202efr",
        "MEMORY://bucket/adapters/fr",
        "memory://BUCKET/adapters/fr",
        "s3://bucket/adapters/fr",
        "https://bucket/adapters/fr",
        "gopher://bucket/adapters/fr",
        "local:///etc",
        "reference://bucket/adapters/fr",
        "memory://bucket/adapters/" + "a" * 3000,
    ],
)
def test_only_plain_urls_under_a_prefix_are_opened(
    bucket: fsspec.AbstractFileSystem, sources: AdapterSources, uri: str
) -> None:
    with pytest.raises(SourceNotAllowedError), sources.open(uri):
        pass


def test_no_url_is_allowed_by_default(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    sources = AdapterSources([tmp_path], [], Scratch(tmp_path / "scratch", 1), AdapterLimits())
    with pytest.raises(SourceNotAllowedError), sources.open(PREFIX + "fr"):
        pass


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "s3",
        "s3://",
        "s3:///",
        "s3://bucket",
        "s3://bucket/a",
        "s3://bucket/../",
        "s3://bucket/a/../",
        "s3://bucket/*/",
        "file:///srv/",
        "local:///srv/",
        "simplecache::s3://bucket/",
        "https://user:password@host/",
        "https://host/?a=/",
        "/srv/",
    ],
)
def test_prefixes_that_are_none_are_refused_at_start(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(StoreConfigError) as caught:
        AdapterSources([], [prefix], Scratch(tmp_path, 1), AdapterLimits())
    assert caught.value.subject == "url_prefixes"


@pytest.mark.parametrize("prefix", ["s3://bucket/", "gs://b-1/a/b/", "https://example.org:8443/adapters/"])
def test_prefixes_name_a_host_and_end_in_a_slash(prefix: str) -> None:
    assert check_url_prefix(prefix) == prefix


def test_sizes_are_checked_before_anything_is_fetched(
    bucket: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = Scratch(tmp_path / "scratch", 1)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", never)
    for limits in (AdapterLimits(max_config_bytes=1), AdapterLimits(max_size_bytes=8)):
        with (
            pytest.raises(AdapterTooLargeError),
            AdapterSources([], [PREFIX], scratch, limits).open(PREFIX + "fr"),
        ):
            pass
    assert os.listdir(tmp_path / "scratch") == []


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([], SourceNotFoundError),
        (["adapter_config.json"], AdapterInvalidError),
        (["adapter_model.safetensors"], AdapterInvalidError),
        (["adapter_config.json", "adapter_model.bin"], AdapterUnsafeError),
        (["adapter_config.json", "adapter_model.safetensors", "x.safetensors"], AdapterUnsupportedError),
        (["adapter_config.json", "adapter_model.safetensors/inside"], AdapterInvalidError),
        (["fr/adapter_config.json", "fr/adapter_model.safetensors"], SourceNotFoundError),
    ],
)
def test_what_lies_there_must_be_an_adapter(
    bucket: fsspec.AbstractFileSystem, sources: AdapterSources, names: list[str], error: type[AdapterError]
) -> None:
    for name in names:
        bucket.pipe_file(f"/bucket/adapters/de/{name}", b"{}")
    with pytest.raises(error), sources.open(PREFIX + "de"):
        pass


def test_a_crowded_directory_is_refused(bucket: fsspec.AbstractFileSystem, sources: AdapterSources) -> None:
    for number in range(4097):
        bucket.pipe_file(f"/bucket/adapters/de/{number}", b"")
    with pytest.raises(AdapterTooLargeError, match="4096"), sources.open(PREFIX + "de"):
        pass


class Remote:
    """A directory whose files are of other sizes than it says."""

    def __init__(self, pieces: list[bytes], size_bytes: int = 8) -> None:
        self._pieces = pieces
        self._size_bytes = size_bytes

    def sizes(self) -> Mapping[str, int]:
        return {"adapter_config.json": self._size_bytes, "adapter_model.safetensors": self._size_bytes}

    def read(self, name: str, size_bytes: int) -> Generator[bytes, None, None]:
        yield from self._pieces


@pytest.mark.parametrize("pieces", [[], [b"1234"], [b"12345678", b"9"], [b"x" * 1000]])
def test_a_file_of_another_size_than_listed_is_refused(tmp_path: Path, pieces: list[bytes]) -> None:
    scratch = Scratch(tmp_path, 1)
    sources = AdapterSources([], [PREFIX], scratch, AdapterLimits(), lambda uri: Remote(pieces))
    with pytest.raises(AdapterInvalidError, match="changed"), sources.open(PREFIX + "fr"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_download_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**9, 50))
    monkeypatch.setattr(sources_module.time, "monotonic", lambda: float(next(now)))
    scratch = Scratch(tmp_path, 1)
    sources = AdapterSources([], [PREFIX], scratch, AdapterLimits(), lambda uri: Remote([b"1"] * 8))
    with pytest.raises(SourceUnavailableError, match="too slowly"), sources.open(PREFIX + "fr"):
        pass


def test_a_failing_object_store_is_not_the_adapters_fault(
    bucket: fsspec.AbstractFileSystem, sources: AdapterSources, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LibraryError(Exception):
        """What a library behind fsspec may raise."""

    failures: dict[Exception, type[AdapterError]] = {
        LibraryError("secret"): SourceUnavailableError,
        TimeoutError("secret"): SourceUnavailableError,
        PermissionError("secret"): SourceNotAllowedError,
    }
    for failure, error in failures.items():

        def fail(*args: object, failure: Exception = failure, **kwargs: object) -> None:
            raise failure

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", fail)
        with pytest.raises(error) as caught, sources.open(PREFIX + "fr"):
            pass
        assert "secret" not in str(caught.value)


def test_a_scheme_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError("install something")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(SourceNotAllowedError, match="no package"):
        open_remote("abfs://bucket/adapters/fr")


def test_paths_and_file_urls_are_opened_as_before(sources: AdapterSources, tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr" / "file").write_bytes(b"x")
    for uri in ("fr", str(tmp_path / "fr"), f"file://{tmp_path}/fr"):
        assert read(sources, uri) == {"file": b"x"}
    with pytest.raises(SourceNotAllowedError), sources.open("/etc"):
        pass
