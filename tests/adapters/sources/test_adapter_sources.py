from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from manyhats.adapters.disk.files import open_source
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    SourceNotAllowedError,
    SourceNotFoundError,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed root with one source, next to a secret outside."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_bytes(b"inside")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_bytes(b"secret")
    (tmp_path / "root-2").mkdir()
    return root


def read(uri: str, root: Path, *, name: str = "file", max_bytes: int = 100) -> bytes:
    with open_source(uri, [root]) as directory, directory.open_file(name, max_bytes) as file:
        return bytes(file.read())


def test_a_source_is_read_by_path_by_file_uri_and_relative_to_its_root(root: Path) -> None:
    assert read(str(root / "a"), root) == b"inside"
    assert read(f"file://{root}/a", root) == b"inside"
    assert read(f"file://localhost{root}/a", root) == b"inside"
    assert read("a", root) == b"inside"
    assert read(f"{root}/a/../a/.", root) == b"inside"


def test_relative_sources_are_looked_for_under_every_root(root: Path, tmp_path: Path) -> None:
    with open_source("a", [tmp_path / "root-2", root]) as directory:
        assert directory.names() == ("file",)


def test_a_link_that_stays_inside_is_followed(root: Path) -> None:
    (root / "link").symlink_to(root / "a")
    assert read(str(root / "link"), root) == b"inside"


@pytest.mark.parametrize(
    "uri",
    [
        "{root}/../secret",
        "{root}/a/../../secret",
        "{root}/../root-2",
        "{root}-2",
        "../secret",
        "{tmp}/secret",
        "{tmp}/nothing",
        "{tmp}",
        "/",
        "/etc",
        "/proc/self",
        "file://{root}/../secret",
        "file://{root}/%2e%2e/secret",
        "file://elsewhere{root}/a",
        "file:a",
        "file://{root}/a%00",
        "http://localhost/a",
        "https://example.org/a",
        "s3://bucket/a",
        "gs://bucket/a",
        "ftp:a",
        "data:,x",
        "{root}/a\n",
        "{root}/a\0",
        "{root}/\u202ea",
        "{root}/" + "a/" * 3000,
    ],
)
def test_sources_outside_are_not_allowed(uri: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotAllowedError):
        read(uri.format(root=root, tmp=tmp_path), root)


def test_links_that_lead_outside_are_not_allowed(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    for uri in (f"{root}/out", "out", f"{root}/up/secret", f"{root}/loop"):
        with pytest.raises((SourceNotAllowedError, AdapterInvalidError)):
            read(uri, root)


def test_nothing_outside_is_told_apart(root: Path, tmp_path: Path) -> None:
    messages = set()
    for uri in (f"{tmp_path}/secret", f"{tmp_path}/nothing"):
        with pytest.raises(SourceNotAllowedError) as caught:
            read(uri, root)
        messages.add(caught.value.description)
    assert len(messages) == 1


@pytest.mark.parametrize(
    "uri", ["", "{root}/nothing", "nothing", "{root}/a/nothing", "file://{root}/nothing"]
)
def test_missing_sources_are_not_found(uri: str, root: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read(uri.format(root=root), root)


def test_no_root_allows_nothing(root: Path) -> None:
    for uri in (str(root / "a"), "a"):
        with pytest.raises(SourceNotAllowedError), open_source(uri, []):
            pass


def test_a_file_is_no_source(root: Path) -> None:
    with pytest.raises(AdapterInvalidError, match="not a directory"):
        read(str(root / "a" / "file"), root)


def test_messages_name_no_path_but_the_callers(root: Path, tmp_path: Path) -> None:
    for uri in ("nothing", "../secret", "a/file"):
        with pytest.raises(AdapterError) as caught:
            read(uri, root)
        assert str(tmp_path) not in str(caught.value)


def test_linked_files_are_read_where_the_link_stays_under_the_root(root: Path, tmp_path: Path) -> None:
    (root / "a" / "link").symlink_to(tmp_path / "secret" / "file")
    (root / "a" / "near").symlink_to("file")
    assert read("a", root, name="near") == b"inside"
    with pytest.raises(AdapterUnsafeError, match="symbolic link"):
        read("a", root, name="link")


def test_pipes_sockets_directories_and_devices_are_unsafe(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "directory").mkdir()
    monkeypatch.chdir(root / "a")  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "directory", "socket"):
            with pytest.raises(AdapterUnsafeError):
                read("a", root, name=name)
    with open_source("/dev", [Path("/dev")]) as directory, pytest.raises(AdapterUnsafeError):
        directory.open_file("null", 10).__enter__()


def test_a_pipe_that_replaces_a_file_after_the_check_does_not_block(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = os.stat(root / "a" / "file")
    os.mkfifo(root / "a" / "pipe")
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: checked)
    with open_source(str(root / "a"), [root]) as directory, pytest.raises(AdapterUnsafeError, match="pipe"):
        directory.open_file("pipe", 10).__enter__()


def test_a_link_put_in_place_of_a_directory_after_resolution_leads_nowhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "out").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(os.path, "realpath", lambda path: str(path))
    with pytest.raises((SourceNotAllowedError, AdapterInvalidError)):
        read(str(root / "out"), root)


def test_files_over_the_limit_are_refused_before_they_are_read(root: Path) -> None:
    with open(root / "a" / "big", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterTooLargeError):
        read("a", root, name="big")


def test_a_file_that_changes_while_it_is_read_is_refused(root: Path) -> None:
    with open_source("a", [root]) as directory, directory.open_file("file", 100) as file:
        os.utime(root / "a" / "file", ns=(1, 1))
        (root / "a" / "file").write_bytes(b"other.")
        with pytest.raises(AdapterInvalidError, match="changed"):
            file.read()
        (root / "a" / "file").write_bytes(b"")
        with pytest.raises(AdapterInvalidError, match="changed"):
            file.read()


def test_crowded_directories_are_refused(root: Path) -> None:
    crowded = root / "crowded"
    crowded.mkdir()
    for i in range(4097):
        (crowded / str(i)).touch()
    with pytest.raises(AdapterTooLargeError), open_source("crowded", [root]) as directory:
        directory.names()


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for uri, name in (("a", "file"), ("a", "nothing"), ("nothing", "file"), (str(root / "a" / "file"), "x")):
        try:
            read(uri, root, name=name)
        except AdapterError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_outside_is_refused_with_the_root_beside_it_and_what_to_do(
    root: Path, tmp_path: Path
) -> None:
    outside = [str(tmp_path / name) for name in ("secret", "root-2", "nothing", "root/../secret")]
    for uri in outside:
        with pytest.raises(SourceNotAllowedError, match="manyhats adapters upload") as caught:
            read(uri, root)
        assert f"outside the allowed roots ({root})" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["../secret", "/etc", "/", "/srv/adapters/sql", "a/../../secret", "~/adapters"]
)
def test_roots_elsewhere_are_not_named(root: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises((SourceNotAllowedError, SourceNotFoundError)) as caught:
        read(uri, root)
    assert str(tmp_path) not in str(caught.value)


def test_without_roots_there_is_nothing_to_register_from(root: Path) -> None:
    with pytest.raises(SourceNotAllowedError, match="there are none; `manyhats adapters upload`"):
        open_source(str(root / "a"), []).__enter__()
