"""The errors of artifacts and of the store; the server's table turns each into a status.

AdapterError
├── ArgumentInvalidError        FIELD_INVALID: a field of a call is outside its range
│   └── TaskIdInvalidError
├── NotFoundError
│   ├── TaskNotFoundError       TASK_NOT_FOUND: no such task or version
│   └── SourceNotFoundError     SOURCE_NOT_FOUND: nothing lies at the source
├── NoActiveVersionError        NO_ACTIVE_VERSION: the task has versions, but none is active
├── ArtifactError               the artifact can never be served as it is
│   ├── AdapterInvalidError     ADAPTER_INVALID: malformed or contradicts itself
│   ├── AdapterUnsupportedError ADAPTER_UNSUPPORTED: well-formed, but cannot be served exactly
│   ├── AdapterUnsafeError      ADAPTER_UNSAFE: a pickle, or not a regular file
│   ├── AdapterTooLargeError    ADAPTER_TOO_LARGE: over a limit
│   └── AdapterNoEffectError    ADAPTER_NO_EFFECT: it changes nothing
├── BaseMismatchError           BASE_MISMATCH: made for another base model
├── AdapterInUseError           ADAPTER_IN_USE: requests run on it
├── SourceNotAllowedError       SOURCE_NOT_ALLOWED: outside the allowed roots and prefixes
├── SourceUnavailableError      SOURCE_UNAVAILABLE: the source cannot be reached now
├── DigestMismatchError         DIGEST_MISMATCH: not the bytes the caller expected
├── RequestIdReusedError        REQUEST_ID_REUSED: same request id, other content
├── QuotaExceededError          QUOTA_EXCEEDED: the store may hold no more of it
├── DataLossError               DATA_LOSS: stored bytes are not those that were registered
└── StoreError
    ├── StoreConfigError        STORE_CONFIG_INVALID: it cannot be opened as it is configured
    │   └── StoreMissingError   there is none yet, and none was to be made
    ├── StoreFullError          STORE_FULL: no space left
    └── StoreUnavailableError   STORE_UNAVAILABLE: the store cannot be read or written
"""

from __future__ import annotations

from typing import ClassVar

HOW_TO_CONVERT = "convert it offline with `manyhats adapters convert SRC DST`, and register the result"
"""What the callers of an ``AdapterUnsafeError`` can do."""
_MAX_SHOWN = 200


def shown(text: str) -> str:
    """Text from outside, made safe for a message: printable, and at most 200 characters."""
    clean = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text[: _MAX_SHOWN + 1])
    return clean if len(clean) <= _MAX_SHOWN else clean[:_MAX_SHOWN] + "…"


class AdapterError(Exception):
    """Any error of an adapter or of the store.

    Attributes:
        reason: the API's name for the case; a class attribute.
        subject: the file, tensor, config key, field, limit or name that is at fault.
        description: what is wrong with it, in one sentence.
    """

    reason: ClassVar[str] = "ADAPTER_ERROR"

    def __init__(self, subject: str, description: str) -> None:
        self.subject = shown(subject)
        self.description = description
        super().__init__(f"{self.subject}: {description}" if subject else description)


class ArgumentInvalidError(AdapterError):
    """A field of a call is outside its range; ``subject`` is the field."""

    reason = "FIELD_INVALID"


class TaskIdInvalidError(ArgumentInvalidError):
    """Not a task id, or not ``task@version``."""

    def __init__(self, description: str) -> None:
        super().__init__("task_id", description)


class NotFoundError(AdapterError):
    """Something the caller named does not exist."""


class TaskNotFoundError(NotFoundError):
    """No such task, or no such version of it; ``subject`` is the name asked for."""

    reason = "TASK_NOT_FOUND"


class SourceNotFoundError(NotFoundError):
    """Nothing lies at the source; ``subject`` is the uri as the caller gave it."""

    reason = "SOURCE_NOT_FOUND"


class NoActiveVersionError(AdapterError):
    """The task exists, but none of its versions is active."""

    reason = "NO_ACTIVE_VERSION"


class ArtifactError(AdapterError):
    """The artifact can never be served as it is."""


class AdapterInvalidError(ArtifactError):
    """The artifact is malformed or contradicts itself; ``subject`` is the file, tensor or key."""

    reason = "ADAPTER_INVALID"


class AdapterUnsupportedError(ArtifactError):
    """Well-formed, but this server cannot serve it exactly; ``subject`` is the key or tensor."""

    reason = "ADAPTER_UNSUPPORTED"


class AdapterUnsafeError(ArtifactError):
    """Reading the artifact could do harm: a pickle, a link, a pipe; ``subject`` is the file."""

    reason = "ADAPTER_UNSAFE"


class AdapterTooLargeError(ArtifactError):
    """The artifact is over a limit; ``subject`` is the file, tensor or key that exceeds it."""

    reason = "ADAPTER_TOO_LARGE"


class AdapterNoEffectError(ArtifactError):
    """The artifact's output is the base's: every delta is zero."""

    reason = "ADAPTER_NO_EFFECT"


class BaseMismatchError(AdapterError):
    """The adapter was made for another base model."""

    reason = "BASE_MISMATCH"


class AdapterInUseError(AdapterError):
    """The version is in use and deletion was not forced; ``subject`` is its name."""

    reason = "ADAPTER_IN_USE"


class SourceNotAllowedError(AdapterError):
    """The source lies outside the allowed roots and url prefixes; ``subject`` is the uri as the caller gave it."""

    reason = "SOURCE_NOT_ALLOWED"


class SourceUnavailableError(AdapterError):
    """The source cannot be reached now; ``subject`` is the uri as the caller gave it."""

    reason = "SOURCE_UNAVAILABLE"


class DigestMismatchError(AdapterError):
    """The artifact is not the one the caller expected."""

    reason = "DIGEST_MISMATCH"


class RequestIdReusedError(AdapterError):
    """The request id was used before, for a registration with other content."""

    reason = "REQUEST_ID_REUSED"


class QuotaExceededError(AdapterError):
    """The store may hold no more of it; ``subject`` is the quota, such as ``max_versions_per_task``.

    ``retry_after_s`` is when there may be room again, if waiting helps.
    """

    reason = "QUOTA_EXCEEDED"

    def __init__(self, subject: str, description: str, retry_after_s: float | None = None) -> None:
        super().__init__(subject, description)
        self.retry_after_s = retry_after_s


class DataLossError(AdapterError):
    """The stored bytes are not those that were registered; ``subject`` is the adapter's name."""

    reason = "DATA_LOSS"


class StoreError(AdapterError):
    """The store itself is at fault."""


class StoreConfigError(StoreError):
    """The store cannot be opened as it is configured; ``subject`` is the setting."""

    reason = "STORE_CONFIG_INVALID"


class StoreMissingError(StoreConfigError):
    """There is no store where one was to be opened and none was to be made."""


class StoreFullError(StoreError):
    """No space is left for the artifact."""

    reason = "STORE_FULL"


class StoreUnavailableError(StoreError):
    """The store's directory cannot be read or written."""

    reason = "STORE_UNAVAILABLE"
