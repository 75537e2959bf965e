"""What a hostile case is: a call, what it must be refused with, and the place it is made in."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
from google.protobuf.message import Message

from manyhats.adapters import errors
from manyhats.adapters.limits import AdapterLimits
from manyhats.adapters.registration import Registration, Uri
from manyhats.adapters.store.opening import open_store
from manyhats.adapters.store.store import AdapterStore
from manyhats.engine.errors import DrainingError, FieldInvalidError
from manyhats.server.service.errors import LoadingError
from manyhats.v1 import adapter_pb2 as pb
from support.factories.adapters import lora_config, make_base, make_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = make_base(names=("org/tiny", "tiny"))
LIMITS = AdapterLimits(
    max_rank=64, max_size_bytes=10**6, max_num_tensors=40, max_config_bytes=20_000, max_virtual_tokens=32
)
GOOD_TASK = "good"

# What the API promises for each kind of error, written down once more: the server's own table is under test.
STATUS: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    errors.ArgumentInvalidError: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    errors.TaskIdInvalidError: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    FieldInvalidError: (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID"),
    errors.TaskNotFoundError: (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"),
    errors.SourceNotFoundError: (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND"),
    errors.NoActiveVersionError: (grpc.StatusCode.FAILED_PRECONDITION, "NO_ACTIVE_VERSION"),
    errors.AdapterInvalidError: (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_INVALID"),
    errors.AdapterUnsupportedError: (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_UNSUPPORTED"),
    errors.AdapterUnsafeError: (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_UNSAFE"),
    errors.AdapterTooLargeError: (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_TOO_LARGE"),
    errors.AdapterNoEffectError: (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_NO_EFFECT"),
    errors.BaseMismatchError: (grpc.StatusCode.FAILED_PRECONDITION, "BASE_MISMATCH"),
    errors.AdapterInUseError: (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE"),
    errors.SourceNotAllowedError: (grpc.StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED"),
    errors.DigestMismatchError: (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH"),
    errors.RequestIdReusedError: (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
    DrainingError: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    LoadingError: (grpc.StatusCode.UNAVAILABLE, "LOADING"),
}

Call = Message | Sequence[pb.UploadAdapterRequest]
GateState = Literal["open", "draining", "loading"]


@dataclass(frozen=True)
class World:
    """Where a case plays: an allowed root, a secret beside it, and a store with the task ``good``.

    Attributes:
        root: the allowed root; holds ``good``, an adapter.
        secret: an adapter outside of it, which would be registered if it were read.
        source: an empty directory under the root, for this case alone.
    """

    root: Path
    secret: Path
    source: Path
    store_directory: Path
    store: AdapterStore

    def of_case(self, name: str) -> World:
        """The same world with a ``source`` of its own."""
        source = self.root / name
        source.mkdir()
        return World(self.root, self.secret, source, self.store_directory, self.store)

    def state(self) -> tuple[object, ...]:
        """All that the store knows, and every file it keeps."""
        versions = [(record.name, record.state, record.digest) for record in self.store.list().records]
        kept = (self.store_directory / name for name in ("artifacts", "scratch"))
        return (versions, sorted(str(path) for directory in kept for path in directory.rglob("*")))


def make_world(directory: Path) -> World:
    """A new world in an empty directory."""
    root, secret, store_directory = directory / "root", directory / "secret", directory / "store"
    make_lora(root / "good", BASE, rank=4)
    make_lora(secret, BASE, rank=4, seed=1)
    store = open_store(store_directory, BASE, [root], limits=LIMITS)
    store.register(Registration(GOOD_TASK, Uri(str(root / "good"))))
    return World(root, secret, root / "good", store_directory, store)


def nothing_happens(world: World) -> AbstractContextManager[None]:
    """Nothing disturbs the call."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Case:
    """A call that must be refused.

    Attributes:
        id: what pytest calls it.
        error: exactly this kind of error.
        subject: part of the error's subject or field.
        call: prepares the world and gives the message, or the messages of an upload.
        during: what somebody does while the call is handled.
        in_use: whether requests run on every version.
        gate: what the server does at the time.
    """

    id: str
    error: type[Exception]
    subject: str
    call: Callable[[World], Call]
    during: Callable[[World], AbstractContextManager[None]] = field(default=nothing_happens)
    in_use: bool = False
    gate: GateState = "open"


def register(world: World, uri: str | None = None, **fields: Any) -> pb.RegisterAdapterRequest:
    """A registration of the case's own directory as ``task``."""
    given = {"task_id": "task", "uri": str(world.source) if uri is None else uri} | fields
    return pb.RegisterAdapterRequest(**given)


def spoilt(
    name: str,
    spoil: Callable[[Path], object],
    error: type[Exception],
    subject: str,
    *,
    during: Callable[[World], AbstractContextManager[None]] = nothing_happens,
) -> Case:
    """The registration of a good LoRA's directory after ``spoil`` was at it."""

    def call(world: World) -> Call:
        make_lora(world.source, BASE, rank=4)
        spoil(world.source)
        return register(world)

    return Case(name, error, subject, call, during)


def config_of(text: bytes) -> Callable[[Path], object]:
    """Puts bytes in place of the config."""
    return lambda source: (source / CONFIG).write_bytes(text)


def weights_of(data: bytes) -> Callable[[Path], object]:
    """Puts bytes in place of the weights, with a config for all linears."""
    return lambda source: (source / WEIGHTS).write_bytes(data)


def pack(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header; ``length`` is what it says of itself."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def good_config(**fields: Any) -> dict[str, Any]:
    """The config of a good LoRA, with other fields."""
    return lora_config(BASE, rank=4) | fields


def replace_path(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file or directory, at once."""
    made = path.with_name(f"{path.name}.made")
    make(made)
    if path.is_dir() and not path.is_symlink():
        os.rename(path, path.with_name(f"{path.name}.gone"))
    os.replace(made, path)
