"""Sources that lead elsewhere, are something else, or change under the reader's hands."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hostile.case import BASE, CONFIG, WEIGHTS, Call, Case, World, register, replace_path, spoilt
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    ArgumentInvalidError,
    SourceNotAllowedError,
    SourceNotFoundError,
)
from manyhats.v1 import adapter_pb2 as pb
from support.factories.adapters import make_lora

Meanwhile = Callable[[World], AbstractContextManager[None]]

# What is sent as the uri; {root} and {secret} are the world's.
URIS: dict[str, tuple[str, type[AdapterError]]] = {
    "missing": ("{root}/nothing", SourceNotFoundError),
    "missing, relative": ("nothing", SourceNotFoundError),
    "missing, file uri": ("file://{root}/nothing", SourceNotFoundError),
    "a file": ("good/" + CONFIG, AdapterInvalidError),
    "outside": ("{secret}", SourceNotAllowedError),
    "outside, missing": ("{secret}-not", SourceNotAllowedError),
    "outside, file uri": ("file://{secret}", SourceNotAllowedError),
    "up": ("../secret", SourceNotAllowedError),
    "up from inside": ("{root}/good/../../secret", SourceNotAllowedError),
    "up, encoded": ("file://{root}/%2e%2e/secret", SourceNotAllowedError),
    "up, encoded twice": ("file://{root}/%252e%252e/secret", SourceNotFoundError),
    "the root's parent": ("..", SourceNotAllowedError),
    "a name that begins as the root's": ("{root}-2", SourceNotAllowedError),
    "the file system's root": ("/", SourceNotAllowedError),
    "etc": ("/etc", SourceNotAllowedError),
    "proc": ("/proc/self/cwd", SourceNotAllowedError),
    "proc root": ("/proc/self/root{secret}", SourceNotAllowedError),
    "dev": ("/dev", SourceNotAllowedError),
    "NUL": ("{root}/good\0", SourceNotAllowedError),
    "NUL, encoded": ("file://{root}/good%00", SourceNotAllowedError),
    "line feed": ("good\n", SourceNotAllowedError),
    "right-to-left": ("good\u202e", SourceNotAllowedError),
    "long": ("good/" + "./" * 3000, SourceNotAllowedError),
    "a long name": ("a" * 300, SourceNotFoundError),
    "another host's file": ("file://example.org{root}/good", SourceNotAllowedError),
    "relative file uri": ("file:good", SourceNotAllowedError),
    "file uri with a relative path": ("file://good", SourceNotAllowedError),
    "metadata address": ("http://169.254.169.254/latest/meta-data/", SourceNotAllowedError),
    "metadata address, IPv6": ("http://[fd00:ec2::254]/latest/", SourceNotAllowedError),
    "this machine": ("http://127.0.0.1:1/adapter", SourceNotAllowedError),
    "https": ("https://example.org/adapter", SourceNotAllowedError),
    "upper-case scheme": ("HTTP://169.254.169.254/latest", SourceNotAllowedError),
    "s3": ("s3://bucket/adapter", SourceNotAllowedError),
    "gs": ("gs://bucket/adapter", SourceNotAllowedError),
    "memory": ("memory://adapter", SourceNotAllowedError),
    "ftp": ("ftp://example.org/adapter", SourceNotAllowedError),
    "ssh": ("ssh://example.org/adapter", SourceNotAllowedError),
    "data": ("data:,x", SourceNotAllowedError),
    "chained": ("simplecache::file://{secret}", SourceNotAllowedError),
    "chained archive": ("zip://adapter::file://{secret}", SourceNotAllowedError),
    "local": ("local://{secret}", SourceNotAllowedError),
    "unknown scheme": ("x:good", SourceNotAllowedError),
}


def _uri(name: str) -> Case:
    text, error = URIS[name]

    def call(world: World) -> Call:
        return register(world, text.format(root=world.root, secret=world.secret))

    return Case(f"source {name}", error, "", call)


def _linked_directory(target: Callable[[World], str]) -> Callable[[World], Call]:
    def call(world: World) -> Call:
        (world.source / "link").symlink_to(target(world))
        return register(world, str(world.source / "link"))

    return call


def _linked(name: str, target: str) -> Callable[[Path], object]:
    """Puts a link in place of a file; ``target`` is relative to the source."""

    def link(source: Path) -> None:
        (source / name).unlink()
        (source / name).symlink_to(target)
        (source / "out").symlink_to("../../secret")

    return link


def _in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(source: Path) -> None:
        (source / name).unlink()
        make(source / name)

    return replace


def _socket(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{descriptor}/{path.name}")  # an address has at most 108 bytes
    finally:
        os.close(descriptor)


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        pytest.skip("devices are made by root alone")


def _huge(name: str) -> Callable[[Path], object]:
    def grow(source: Path) -> None:
        with open(source / name, "ab") as file:
            file.truncate(2**40)

    return grow


def _crowded(source: Path) -> None:
    for i in range(4097):
        (source / str(i)).touch()


@contextlib.contextmanager
def _after(function: str, applies: Callable[[Any], bool], happens: Callable[[], object]) -> Iterator[None]:
    """Does something once, right after the first call of an ``os`` function whose first argument applies."""
    real, done = getattr(os, function), []

    def call(first: Any, *args: Any, **options: Any) -> Any:
        result = real(first, *args, **options)
        if not done and applies(first):
            done.append(True)
            happens()
        return result

    with mock.patch.object(os, function, call):
        yield
    assert done, "what should have happened meanwhile did not"


def _swapped(name: str, make: Callable[[World], Callable[[Path], object]]) -> Meanwhile:
    """Right after a file was looked at, puts something else in its place."""

    def during(world: World) -> AbstractContextManager[None]:
        path = world.source / name
        return _after("stat", lambda first: first == name, lambda: replace_path(path, make(world)))

    return during


def _linked_inside(name: str) -> Callable[[Path], object]:
    """Puts a link to another file of the source in place of a file."""

    def link(source: Path) -> None:
        (source / name).rename(source / f"blob-{name}.data")
        (source / name).symlink_to(f"blob-{name}.data")

    return link


def _target_swapped(name: str) -> Meanwhile:
    """Right after a link was read, puts a link to the secret in place of what it leads to."""

    def during(world: World) -> AbstractContextManager[None]:
        target = world.source / f"blob-{name}.data"
        return _after(
            "stat",
            lambda first: first == target.name,
            lambda: replace_path(target, lambda made: made.symlink_to(world.secret / name)),
        )

    return during


@contextlib.contextmanager
def _swapped_directory(world: World) -> Iterator[None]:
    """Right after the way to the source was resolved, puts a link to the secret in its place."""
    real, done = os.path.realpath, []

    def realpath(path: Any, **options: Any) -> str:
        result = str(real(path, **options))
        if result == str(world.source) and not done:
            done.append(True)
            replace_path(world.source, lambda made: made.symlink_to(world.secret))
        return result

    with mock.patch.object(os.path, "realpath", realpath):
        yield
    assert done, "the way was not resolved"


def _while_read(name: str, happens: Callable[[Path], object]) -> Meanwhile:
    """Right after the first bytes of a file were read, does something to it."""

    def during(world: World) -> AbstractContextManager[None]:
        def applies(descriptor: int) -> bool:
            return os.readlink(f"/proc/self/fd/{descriptor}") == str(world.source / name)

        return _after("preadv", applies, lambda: happens(world.source / name))

    return during


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    path.write_bytes(b" " * path.stat().st_size)


def _cut(path: Path) -> None:
    os.truncate(path, 10)


@contextlib.contextmanager
def _unreadable(world: World) -> Iterator[None]:
    real = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if str(path) == WEIGHTS:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **options)

    with mock.patch.object(os, "open", refuse):
        yield


def _untouched(source: Path) -> None:
    """Leaves it good; what happens during the call spoils it."""


def _second_part(world: World) -> Call:
    parts = [pb.AdapterPart(uri="good"), pb.AdapterPart(uri=str(world.secret))]
    return pb.RegisterAdapterRequest(task_id="task", parts=parts)


def _many_parts(world: World) -> Call:
    return pb.RegisterAdapterRequest(task_id="task", parts=[pb.AdapterPart(uri="good")] * 1000)


def _weighted(weight: float) -> Callable[[World], Call]:
    def call(world: World) -> Call:
        make_lora(world.source, BASE, rank=2, seed=5)
        parts = [pb.AdapterPart(uri="good"), pb.AdapterPart(uri=str(world.source), weight=weight)]
        return pb.RegisterAdapterRequest(task_id="task", parts=parts)

    return call


def _hidden_in_subdirectory(source: Path) -> None:
    shutil.copytree(source, source / "inner")
    (source / CONFIG).unlink()


Invalid, Unsafe, NotAllowed = AdapterInvalidError, AdapterUnsafeError, SourceNotAllowedError
CASES = [
    *(_uri(name) for name in URIS),
    Case("source directory linked outside", NotAllowed, "", _linked_directory(lambda w: str(w.secret))),
    Case("source directory linked up", NotAllowed, "", _linked_directory(lambda w: "../../secret")),
    Case("source directory linked to itself", Invalid, "", _linked_directory(lambda w: "link")),
    Case("source directory linked to proc", NotAllowed, "", _linked_directory(lambda w: "/proc/self/cwd")),
    Case("source directory linked to nothing", SourceNotFoundError, "", _linked_directory(lambda w: "not")),
    *(
        spoilt(f"source {what} for {name}", _in_place_of(name, make), Unsafe, name)
        for name in (CONFIG, WEIGHTS)
        for what, make in {
            "a pipe": os.mkfifo,
            "a socket": _socket,
            "a device": _device,
            "a directory": os.mkdir,
        }.items()
    ),
    *(
        spoilt(f"source {what} for {name}", _linked(name, target.format(name=name)), Unsafe, name)
        for name in (CONFIG, WEIGHTS)
        for what, target in {
            "a link outside": "../../secret/{name}",
            "a link to a directory": "../good",
            "a link to the root": "..",
            "a link below a file": "../good/{name}/{name}",
            "a link through a link outside": "out/{name}",
            "a dangling link": "nothing",
            "a dangling link outside": "../../nothing",
            "a link with a long name": "x" * 300,
            "a link to itself": "{name}",
            "a link to a device": "/dev/zero",
            "a link to memory": "/proc/self/mem",
        }.items()
    ),
    spoilt("source without a config", lambda source: (source / CONFIG).unlink(), Invalid, CONFIG),
    spoilt("source without weights", lambda source: (source / WEIGHTS).unlink(), Invalid, WEIGHTS),
    spoilt("source in a subdirectory", _hidden_in_subdirectory, Invalid, CONFIG),
    spoilt("source a terabyte of config", _huge(CONFIG), AdapterTooLargeError, CONFIG),
    spoilt("source a terabyte of weights", _huge(WEIGHTS), AdapterTooLargeError, WEIGHTS),
    spoilt("source with 4097 entries", _crowded, AdapterTooLargeError, "directory"),
    spoilt("source unreadable", _untouched, Invalid, WEIGHTS, during=_unreadable),
    spoilt("source directory swapped", _untouched, Invalid, "", during=_swapped_directory),
    *(
        spoilt(
            f"source {name} swapped for a link",
            _untouched,
            Unsafe,
            name,
            during=_swapped(name, lambda world: lambda made: made.symlink_to(world.secret / CONFIG)),
        )
        for name in (CONFIG, WEIGHTS)
    ),
    *(
        spoilt(
            f"source {name} linked inside and swapped for a link",
            _linked_inside(name),
            Unsafe,
            name,
            during=_target_swapped(name),
        )
        for name in (CONFIG, WEIGHTS)
    ),
    spoilt(
        "source swapped for a pipe",
        _untouched,
        Unsafe,
        WEIGHTS,
        during=_swapped(WEIGHTS, lambda world: os.mkfifo),
    ),
    spoilt(
        "source swapped for a socket",
        _untouched,
        Unsafe,
        WEIGHTS,
        during=_swapped(WEIGHTS, lambda world: _socket),
    ),
    *(
        spoilt(f"source {name} {what}", _untouched, Invalid, name, during=_while_read(name, happens))
        for name in (CONFIG, WEIGHTS)
        for what, happens in {"grows": _grow, "is rewritten": _rewrite, "is cut": _cut}.items()
    ),
    Case("parts with one outside", NotAllowed, "parts[1]", _second_part),
    Case("parts beyond the limit", ArgumentInvalidError, "parts", _many_parts),
    *(
        Case(f"parts with the weight {weight}", Invalid, "parts[1]", _weighted(weight))
        for weight in (float("nan"), float("inf"), -float("inf"), 1e300)
    ),
]
