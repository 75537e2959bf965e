from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhats.adapters.disk.files import SourceDirectory
from manyhats.adapters.disk.scratch import Scratch
from manyhats.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    DigestMismatchError,
    StoreFullError,
)
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.probe import Prepare, Probe
from manyhats.adapters.registration import Registered, UploadFile
from manyhats.adapters.store.upload import UploadSession, check_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONTENT = {CONFIG: b"{}" * 20, WEIGHTS: bytes(range(256)) * 4}
LIMITS = AdapterLimits()


class ArrivedError(Exception):
    """Ends an upload with what the store would have got."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files


def catch(
    directory: SourceDirectory, files: Sequence[UploadFile], probe: Probe | None, prepare: Prepare | None
) -> Registered:
    content = {}
    for name in directory.names():
        with directory.open_file(name, 10**9) as file:
            content[name] = bytes(file.read())
    assert {file.name: file for file in announced(content)} == {file.name: file for file in files}
    raise ArrivedError(content)


def announced(content: dict[str, bytes] = CONTENT) -> list[UploadFile]:
    return [UploadFile(n, len(data), hashlib.sha256(data).hexdigest()) for n, data in content.items()]


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path / "scratch", 4)


@pytest.fixture
def session(scratch: Scratch) -> Iterator[UploadSession]:
    with UploadSession(announced(), scratch.open(), catch) as session:
        yield session


def finished(session: UploadSession) -> dict[str, bytes]:
    with pytest.raises(ArrivedError) as caught:
        session.finish()
    return caught.value.files


def send_all(session: UploadSession) -> None:
    for index, data in enumerate(CONTENT.values()):
        session.write(index, 0, data)


@st.composite
def chunkings(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    """Every byte of every file once, cut anywhere, in any order of pieces and files."""
    pieces = []
    for index, data in enumerate(CONTENT.values()):
        cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=12)))
        pieces += [(index, a, data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return draw(st.permutations(pieces))


@settings(deadline=None)
@given(chunkings())
def test_the_files_are_the_same_however_they_are_cut_and_ordered(
    pieces: Sequence[tuple[int, int, bytes]],
) -> None:
    with TemporaryDirectory() as root:
        session = UploadSession(announced(), Scratch(Path(root), 1).open(), catch)
        for piece in pieces:
            session.write(*piece)
        assert finished(session) == CONTENT
        assert os.listdir(root) == []


@settings(deadline=None)
@given(st.data())
def test_no_byte_is_taken_twice(data: st.DataObject) -> None:
    content = CONTENT[WEIGHTS]
    spans = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 300)).filter(
        lambda span: sum(span) <= len(content)
    )
    taken: set[int] = set()
    with (
        TemporaryDirectory() as root,
        UploadSession(announced(), Scratch(Path(root), 1).open(), catch) as session,
    ):
        for begin, length in data.draw(st.lists(spans, max_size=12)):
            span = set(range(begin, begin + length))
            expected = pytest.raises(ArgumentInvalidError, match="overlap") if span & taken else None
            with expected or contextlib.nullcontext():
                session.write(1, begin, content[begin : begin + length])
            taken |= span if expected is None else set()
        if len(taken) < len(content):
            session.write(0, 0, CONTENT[CONFIG])
            with pytest.raises(ArgumentInvalidError, match=f"{len(taken)} of {len(content)} bytes") as caught:
                session.finish()
            assert caught.value.subject == "chunk"


@pytest.mark.parametrize(
    ("piece", "subject"),
    [
        ((2, 0, b"x"), "chunk.file_index"),
        ((-1, 0, b"x"), "chunk.file_index"),
        ((0, -1, b"x"), "chunk.offset"),
        ((0, 40, b"x"), "chunk.offset"),
        ((0, 0, b"x" * 41), "chunk.offset"),
        ((0, 2**63, b"x"), "chunk.offset"),
        ((0, 0, b""), "chunk.data"),
    ],
)
def test_pieces_outside_the_files_are_refused_and_harm_nothing(
    session: UploadSession, piece: tuple[int, int, bytes], subject: str
) -> None:
    with pytest.raises(ArgumentInvalidError) as caught:
        session.write(*piece)
    assert caught.value.subject == subject
    send_all(session)
    assert finished(session) == CONTENT


def test_scattered_pieces_are_bounded(scratch: Scratch) -> None:
    content = {CONFIG: b"{}", WEIGHTS: bytes(10_000)}
    with UploadSession(announced(content), scratch.open(), catch) as session:
        for piece in range(4096):
            session.write(1, 2 * piece, b"\0")
        with pytest.raises(ArgumentInvalidError, match="4096 pieces"):
            session.write(1, 9000, b"\0")
        session.write(1, 1, b"\0")  # joins two, and so is welcome


@pytest.mark.parametrize("in_order", [True, False])
def test_other_bytes_than_announced_are_named_by_their_file(
    session: UploadSession, scratch: Scratch, tmp_path: Path, in_order: bool
) -> None:
    session.write(0, 0, CONTENT[CONFIG])
    spoilt = CONTENT[WEIGHTS][:-1] + b"?"
    for begin in (0, 512) if in_order else (512, 0):
        session.write(1, begin, spoilt[begin : begin + 512])
    with pytest.raises(DigestMismatchError) as caught:
        session.finish()
    assert caught.value.subject == WEIGHTS
    assert os.listdir(tmp_path / "scratch") == []


def test_an_aborted_upload_leaves_nothing_and_takes_nothing(session: UploadSession, tmp_path: Path) -> None:
    send_all(session)
    session.abort()
    session.abort()
    assert os.listdir(tmp_path / "scratch") == []
    for call in (lambda: session.write(0, 0, b"x"), session.finish):
        with pytest.raises(ArgumentInvalidError, match="after the upload's end"):
            call()


def test_a_full_disk_ends_an_upload(
    session: UploadSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StoreFullError) as caught:
        session.write(0, 0, b"x")
    assert str(tmp_path) not in str(caught.value)


def test_no_descriptor_is_left_open(scratch: Scratch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with UploadSession(announced(), scratch.open(), catch) as session:
            send_all(session)
    assert len(os.listdir("/proc/self/fd")) == before


def spoil(index: int, **fields: object) -> list[UploadFile]:
    files = announced()
    values = {"name": files[index].name, "size_bytes": files[index].size_bytes, "sha256": files[index].sha256}
    files[index] = UploadFile(**(values | fields))  # type: ignore[arg-type]
    return files


CASES: dict[str, tuple[list[UploadFile], type[AdapterError], str]] = {
    "nothing": ([], AdapterInvalidError, CONFIG),
    "no config": (announced()[1:], AdapterInvalidError, CONFIG),
    "no tensors": (announced()[:1], AdapterInvalidError, WEIGHTS),
    "twice the same": ([*announced(), announced()[0]], ArgumentInvalidError, "files"),
    "both kinds of tensors": (
        [*announced(), UploadFile("adapter.safetensors", 9, "0" * 64)],
        AdapterUnsupportedError,
        "adapter.safetensors",
    ),
    "a path": (spoil(1, name=f"../{WEIGHTS}"), ArgumentInvalidError, "files[1].name"),
    "an absolute path": (spoil(1, name=f"/etc/{WEIGHTS}"), ArgumentInvalidError, "files[1].name"),
    "no name": (spoil(1, name=""), ArgumentInvalidError, "files[1].name"),
    "a hidden file": (spoil(0, name=".bashrc"), ArgumentInvalidError, "files[0].name"),
    "a zero byte": (spoil(1, name=WEIGHTS + "\0"), ArgumentInvalidError, "files[1].name"),
    "a pickle": (spoil(1, name="adapter_model.bin"), AdapterUnsafeError, "adapter_model.bin"),
    "an empty file": (spoil(1, size_bytes=0), AdapterInvalidError, WEIGHTS),
    "a negative size": (spoil(1, size_bytes=-1), AdapterInvalidError, WEIGHTS),
    "too large a config": (spoil(0, size_bytes=2**20 + 1), AdapterTooLargeError, CONFIG),
    "too large a file": (spoil(1, size_bytes=2**30 + 1), AdapterTooLargeError, WEIGHTS),
    "too large together": (spoil(1, size_bytes=2**30), AdapterTooLargeError, "files"),
    "no hash": (spoil(1, sha256=""), ArgumentInvalidError, "files[1].sha256"),
    "half a hash": (spoil(1, sha256="0" * 63), ArgumentInvalidError, "files[1].sha256"),
    "no hexadecimal hash": (spoil(0, sha256="g" * 64), ArgumentInvalidError, "files[0].sha256"),
    "very many files": (announced() * 1000, ArgumentInvalidError, "files"),
}


@pytest.mark.parametrize(("files", "error", "subject"), CASES.values(), ids=CASES.keys())
def test_what_cannot_be_an_adapter_is_refused_before_a_byte_comes(
    files: list[UploadFile], error: type[AdapterError], subject: str
) -> None:
    with pytest.raises(error) as caught:
        check_files(files, LIMITS)
    assert type(caught.value) is error
    assert caught.value.subject == subject


def test_hashes_may_be_written_in_capitals() -> None:
    files = [UploadFile(file.name, file.size_bytes, file.sha256.upper()) for file in announced()]
    check_files(files, LIMITS)
    assert files == announced()


def test_many_threads_may_send_pieces(session: UploadSession) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pieces = [
        (i, at, data[at : at + 8]) for i, data in enumerate(CONTENT.values()) for at in range(0, len(data), 8)
    ]
    random.Random(0).shuffle(pieces)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: session.write(*piece), pieces))
    assert finished(session) == CONTENT
