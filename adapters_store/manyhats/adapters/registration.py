"""A registration: what is to become a version of a task, and how; and the answer to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from types import MappingProxyType
from typing import TypeAlias

from manyhats.adapters.artifact import AdapterRecord
from manyhats.adapters.errors import ArgumentInvalidError
from manyhats.adapters.reserved_labels import (
    CLASS,
    STOP,
    SYSTEM,
    label_error,
    read_classes,
    read_entitlement,
    read_pooling,
)
from manyhats.adapters.taskid import check_task_id

_MAX_ID_LENGTH = 128

_MAX_LABELS = 64
_MAX_LENGTH = 256
_MAX_SYSTEM_LENGTH = 4096
_MAX_BYTES = 128 * 1024  # a page of versions is one message
_WITHOUT_BREAKS = str.maketrans("", "", "\n\r\t")


@dataclass(frozen=True, slots=True)
class Uri:
    """One adapter that the store can read: a path under an allowed root, or a URL under an allowed prefix."""

    uri: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a composed version: where it is, and the weight of its deltas."""

    uri: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", float(self.weight))


@dataclass(frozen=True, slots=True)
class Parts:
    """Several adapters that the store can read, combined into one."""

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file as its sender announces it; ``sha256`` has 64 hexadecimal digits, of either case."""

    name: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", self.sha256.lower())


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one adapter, which the caller is about to send."""

    files: Sequence[UploadFile]

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(self.files))


@dataclass(frozen=True, slots=True)
class Unannounced:
    """The files of one adapter, which the caller is about to send without saying beforehand what they are."""


Source: TypeAlias = Uri | Parts | Files | Unannounced


def source_of(uri: str, parts: Sequence[Part]) -> Uri | Parts:
    """One adapter or several, whichever is given.

    Raises:
        ArgumentInvalidError: both or neither, or a part has no uri.
    """
    if bool(uri) == bool(parts):
        raise ArgumentInvalidError("uri", "exactly one of uri and parts must be set")
    for index, part in enumerate(parts):
        if not part.uri:
            raise ArgumentInvalidError(f"parts[{index}].uri", "must not be empty")
    return Uri(uri) if uri else Parts(parts)


@dataclass(frozen=True, slots=True)
class Registration:
    """What is to become a version of a task, and how.

    Attributes:
        task_id: the task.
        source: what the version is made of.
        activate: whether the task's name refers to this version from now on.
        validate_only: say what it would be, and store nothing; the answer's record has version 0 if it is new.
        expected_digest: refuse any other; empty for none.
        request_id: identifies the call, so that it may be repeated; empty for none.
        labels: stored with the version.
        assume_base: accept it for the store's base, whatever base it names; shapes must still fit.

    Raises:
        ArgumentInvalidError: a value is out of range.
    """

    task_id: str
    source: Source
    _: KW_ONLY
    activate: bool = True
    validate_only: bool = False
    expected_digest: str = ""
    request_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    assume_base: bool = False

    def __post_init__(self) -> None:
        check_task_id(self.task_id)
        if len(self.request_id) > _MAX_ID_LENGTH or not self.request_id.isprintable():
            raise ArgumentInvalidError(
                "request_id", f"must have at most {_MAX_ID_LENGTH} printable characters"
            )
        object.__setattr__(self, "labels", check_labels(self.labels))
        object.__setattr__(self, "expected_digest", self.expected_digest.strip().lower())
        if self.source in (Uri(""), Parts(())):
            raise ArgumentInvalidError("uri", "exactly one of uri and parts must be given")

    @property
    def source_name(self) -> str:
        """The source in the record."""
        match self.source:
            case Uri(uri):
                return uri
            case Parts():
                return "composed"
            case Files() | Unannounced():
                return "upload"

    def fingerprint(self) -> str:
        """A digest of everything requested except the request id; catalogues store it, so it must not change."""
        asked: list[object] = [
            self.task_id,
            _described(self.source),
            self.activate,
            self.validate_only,
            self.expected_digest,
        ]
        if self.assume_base:
            asked.append("assume_base")
        return hashlib.sha256(json.dumps([*asked, sorted(self.labels.items())]).encode()).hexdigest()


OPTIONS = frozenset(each.name for each in fields(Registration) if each.kw_only)


"""Names of a registration's fields besides task and source; transports and clients use the same."""


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to a registration; ``created`` is false if the version existed or was only validated."""

    record: AdapterRecord
    created: bool


def _described(source: Source) -> list[tuple[str | int | float, ...]]:
    match source:
        case Uri(uri):
            return [("uri", uri)]
        case Parts(parts):
            return [("part", part.uri, part.weight) for part in parts]
        case Files(files):
            return [("file", file.name, file.size_bytes, file.sha256) for file in files]
        case Unannounced():
            return [("files",)]


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """A copy that nobody else can change.

    Raises:
        ArgumentInvalidError: too many, too long, or not printable, where stop sequences, classes and a system message
            may have line breaks and tabs; or what they say of the task's classes, vectors or share is wrong.
    """
    num_own = sum(not key.startswith(CLASS) for key in labels)
    if num_own > _MAX_LABELS:
        raise ArgumentInvalidError("labels", f"has {num_own} entries; the limit is {_MAX_LABELS}")
    for key, value in labels.items():
        limit = _MAX_SYSTEM_LENGTH if key == SYSTEM else _MAX_LENGTH
        if not key or len(key) > _MAX_LENGTH or not key.isprintable():
            raise ArgumentInvalidError("labels", f"keys have 1 to {_MAX_LENGTH} printable characters")
        seen = value.translate(_WITHOUT_BREAKS) if key.startswith((STOP, CLASS, SYSTEM)) else value
        if len(value) > limit or not seen.isprintable():
            raise label_error(key, f"must have at most {limit} printable characters")
    num_bytes = sum(len(text.encode()) for label in labels.items() for text in label)
    if num_bytes > _MAX_BYTES:
        raise ArgumentInvalidError("labels", f"have {num_bytes} bytes together; the limit is {_MAX_BYTES}")
    read_classes(labels)
    read_entitlement(labels)
    read_pooling(labels)
    return MappingProxyType(dict(labels))
