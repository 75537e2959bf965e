"""Uploads that are not what they say, or say what must not be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hostile.case import BASE, CONFIG, WEIGHTS, Call, Case, World
from manyhats.adapters.errors import (
    AdapterInvalidError,
    AdapterTooLargeError,
    AdapterUnsafeError,
    AdapterUnsupportedError,
    ArgumentInvalidError,
    DigestMismatchError,
    TaskIdInvalidError,
)
from manyhats.engine.errors import FieldInvalidError
from manyhats.v1 import adapter_pb2 as pb
from support.factories.adapters import make_lora

Files = Mapping[str, bytes]
Message = pb.UploadAdapterRequest
_HASH = "0" * 64


def _info(name: str, data: bytes = b"x", **fields: Any) -> pb.FileInfo:
    given = {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | fields
    return pb.FileInfo(**given)


def _header(infos: Sequence[pb.FileInfo], **fields: Any) -> Message:
    return Message(header=pb.UploadHeader(task_id=fields.pop("task_id", "task"), files=infos, **fields))


def _chunk(index: int, offset: int, data: bytes) -> Message:
    return Message(chunk=pb.FileChunk(file_index=index, offset=offset, data=data))


def _whole(files: Files) -> list[Message]:
    return [_chunk(index, 0, data) for index, data in enumerate(files.values())]


def _files(world: World) -> Files:
    """The files of a good adapter that the store has not."""
    make_lora(world.source, BASE, rank=4, seed=9)
    return {name: (world.source / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def _sent(make: Callable[[Files], list[Message]]) -> Callable[[World], Call]:
    return lambda world: make(_files(world))


def _good(files: Files, **fields: Any) -> list[Message]:
    return [_header([_info(name, data) for name, data in files.items()], **fields), *_whole(files)]


def _announced(*infos: pb.FileInfo) -> Callable[[World], Call]:
    return lambda world: [_header(infos)]


def _with_info(**fields: Any) -> Callable[[World], Call]:
    """A good upload, but for what it says of its weights."""

    def make(files: Files) -> list[Message]:
        infos = [_info(CONFIG, files[CONFIG]), _info(WEIGHTS, files[WEIGHTS], **fields)]
        return [_header(infos), *_whole(files)]

    return _sent(make)


def _with_chunks(change: Callable[[list[Message]], list[Message]]) -> Callable[[World], Call]:
    return _sent(lambda files: [_good(files)[0], *change(_whole(files))])


def _holding(name: str, data: bytes) -> Callable[[World], Call]:
    """A true upload of something spoilt."""
    return _sent(lambda files: _good({**files, name: data}))


def _overwritten(chunks: list[Message]) -> list[Message]:
    return [*chunks, _chunk(0, 0, chunks[0].chunk.data)]


def _flipped(chunks: list[Message]) -> list[Message]:
    data = chunks[1].chunk.data
    return [chunks[0], _chunk(1, 0, data[:-1] + bytes([data[-1] ^ 1]))]


NAMES = {
    "up": "../adapter_config.json",
    "absolute": "/etc/passwd",
    "nested": "a/adapter_config.json",
    "backslash": "..\\adapter_config.json",
    "dots": "..",
    "empty": "",
    "NUL": "adapter_config.json\0",
    "line feed": "adapter_config.json\n",
    "long": "x" * 5000,
}
Field, Argument = FieldInvalidError, ArgumentInvalidError
CASES = [
    Case("upload of nothing", Field, "header", lambda world: []),
    Case("upload of an empty message", Field, "header", lambda world: [Message()]),
    Case("upload that begins with a chunk", Field, "header", _sent(_whole)),
    Case("upload of two headers", Field, "chunk", _sent(lambda files: [_good(files)[0]] * 2)),
    Case("upload of an empty message later", Field, "chunk", _with_chunks(lambda chunks: [Message()])),
    Case(
        "upload of an empty file",
        AdapterInvalidError,
        WEIGHTS,
        _announced(_info(CONFIG), _info(WEIGHTS, b"")),
    ),
    Case("upload of no files", AdapterInvalidError, CONFIG, _announced()),
    Case("upload without weights", AdapterInvalidError, WEIGHTS, _announced(_info(CONFIG))),
    Case("upload without a config", AdapterInvalidError, CONFIG, _announced(_info(WEIGHTS))),
    Case(
        "upload of a pickle",
        AdapterUnsafeError,
        "adapter_model.bin",
        _announced(_info(CONFIG), _info("adapter_model.bin")),
    ),
    Case(
        "upload of a stranger",
        Argument,
        "files[2].name",
        _announced(_info(CONFIG), _info(WEIGHTS), _info("run.sh")),
    ),
    Case(
        "upload of a file twice", Argument, "files", _announced(_info(CONFIG), _info(WEIGHTS), _info(CONFIG))
    ),
    Case("upload of 10000 files", Argument, "files", _announced(*[_info(CONFIG)] * 10_000)),
    *(
        Case(f"upload of the name: {what}", Argument, "files[1].name", _announced(_info(CONFIG), _info(name)))
        for what, name in NAMES.items()
    ),
    *(
        Case(f"upload of the hash: {what}", Argument, "sha256", _with_info(sha256=text))
        for what, text in {
            "empty": "",
            "short": "00",
            "no hash": "x" * 64,
            "with NUL": "0" * 63 + "\0",
            "with its algorithm": f"sha256:{_HASH}",
        }.items()
    ),
    Case("upload of a terabyte", AdapterTooLargeError, WEIGHTS, _with_info(size_bytes=2**40)),
    Case("upload of 2**64 - 1 bytes", AdapterTooLargeError, WEIGHTS, _with_info(size_bytes=2**64 - 1)),
    Case(
        "upload of a large config",
        AdapterTooLargeError,
        CONFIG,
        _announced(_info(CONFIG, size_bytes=20_001), _info(WEIGHTS)),
    ),
    Case("upload of another hash", DigestMismatchError, WEIGHTS, _with_info(sha256=_HASH)),
    Case("upload with a bit flipped", DigestMismatchError, WEIGHTS, _with_chunks(_flipped)),
    Case(
        "upload of another digest",
        DigestMismatchError,
        "expected_digest",
        _sent(lambda files: _good(files, expected_digest=f"sha256:{_HASH}")),
    ),
    Case("upload of half", Argument, "", _with_chunks(lambda chunks: chunks[:1])),
    Case("upload of no bytes", Argument, "", _with_chunks(lambda chunks: [])),
    Case(
        "upload with a hole",
        Argument,
        "",
        _with_chunks(lambda chunks: [chunks[0], _chunk(1, 8, chunks[1].chunk.data[8:])]),
    ),
    Case("upload of bytes twice", Argument, "chunk", _with_chunks(_overwritten)),
    Case("upload of a third file", Argument, "file_index", _with_chunks(lambda chunks: [_chunk(2, 0, b"x")])),
    Case(
        "upload past the end",
        Argument,
        "chunk",
        _with_chunks(lambda chunks: [_chunk(0, len(chunks[0].chunk.data), b"x")]),
    ),
    Case("upload at 2**63", Argument, "chunk", _with_chunks(lambda chunks: [_chunk(0, 2**63, b"x")])),
    Case("upload at 2**64 - 1", Argument, "chunk", _with_chunks(lambda chunks: [_chunk(0, 2**64 - 1, b"x")])),
    Case("upload of a config that is none", AdapterInvalidError, CONFIG, _holding(CONFIG, b"[]")),
    Case("upload of weights that are none", AdapterInvalidError, WEIGHTS, _holding(WEIGHTS, b"x" * 100)),
    Case(
        "upload of a disguised zip",
        AdapterUnsafeError,
        WEIGHTS,
        _holding(WEIGHTS, b"PK\x03\x04" + b"\xff" * 99),
    ),
    Case(
        "upload to a task that is none",
        TaskIdInvalidError,
        "task_id",
        _sent(lambda files: _good(files, task_id="../task")),
    ),
    Case(
        "upload of an unsupported method",
        AdapterUnsupportedError,
        "peft_type",
        _holding(CONFIG, b'{"peft_type": "BOFT"}'),
    ),
]
