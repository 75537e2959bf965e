"""Errors of ports and calls.

ServerError
├── AddressError        a port that cannot be bound
├── LoadingError        the model is not loaded yet
├── BusyError           try again later
│   ├── TooManyCallsError       the limit of running calls is reached
│   ├── UnreadAnswersError      large answers wait for their callers
│   └── MessagesError           messages of calls hold much memory
├── TaskKindError       a task does something else than what is asked of it
├── UnexpectedError     a bug; the log has it
├── UploadStalledError  a caller began an upload and stopped sending
├── RequestTooLargeError        a message has more bytes than one may have
├── UnsupportedMediaTypeError   a message is in another format than the API's
├── HostNotAllowedError         the caller meant to reach another host
└── …                   of settings and of access: ``access/errors.py``
"""

from __future__ import annotations

from manyhats.adapters.heads import TaskKind
from manyhats.server.access.errors import ServerError


class AddressError(ServerError):
    """A port cannot be bound, most often because another process has it."""

    def __init__(self, purpose: str, address: str) -> None:
        super().__init__(
            f"cannot listen for {purpose} on {address}: is the port taken, or the host not this machine's? "
            f"see --{purpose.lower()}-port and --host"
        )
        self.address = address


class LoadingError(ServerError):
    """The model is being loaded; try again soon."""

    def __init__(self) -> None:
        super().__init__("the model is being loaded")


class TaskKindError(ServerError):
    """A task does something else than what is asked of it; ``kind`` is what it does."""

    def __init__(self, name: str, kind: TaskKind, act: str) -> None:
        super().__init__(f"{name} does not {act}: its kind is {kind.value}")
        self.kind = kind


class BusyError(ServerError):
    """Some ``limit`` is reached; ``retry_after_s`` is a hint."""

    def __init__(self, message: str, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{message}; try again soon")
        self.limit = limit
        self.retry_after_s = retry_after_s


class TooManyCallsError(BusyError):
    """The limit of running calls is reached; ``limit`` is their number."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} calls are running, which is the limit", limit, retry_after_s)


class UnreadAnswersError(BusyError):
    """There is no room for another large answer besides those not yet read; ``limit`` is in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"too much of earlier answers is still unread; the limit is {limit} bytes", limit, 1.0
        )


class MessagesError(BusyError):
    """There is no room for another message of a call; ``limit`` is in bytes."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        what = (
            f"the messages of the calls that run or wait are too large together; the limit is {limit} bytes"
        )
        super().__init__(what, limit, retry_after_s)


class UnexpectedError(ServerError):
    """An unexpected error ended a call; it is logged under ``error_id``."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id


class UploadStalledError(ServerError):
    """A caller began an upload, and nothing arrived for ``limit_s`` seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"nothing arrived for {limit_s:g} s; the upload was abandoned")
        self.limit_s = limit_s


class RequestTooLargeError(ServerError):
    """A message has more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request has too many bytes; the limit is {limit}")
        self.limit = limit


class UnsupportedMediaTypeError(ServerError):
    """A message is not in the API's format."""

    def __init__(self, given: str, wanted: str) -> None:
        but = f"it is {given}" if given else "it has no content type"
        super().__init__(f"the body must be {wanted}, but {but}")


class HostNotAllowedError(ServerError):
    """A server for this machine alone was asked under another host's name."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"this server answers this machine only, under names such as localhost, not {host}; give it a"
            " --token-file to be reached otherwise"
        )
