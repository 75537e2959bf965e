"""From a gRPC status to an exception: the one table, for both clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from manyhats.client import errors

_DETAILS_KEY = "grpc-status-details-bin"
# What gRPC puts before the operating system's message, such as "Connection refused"; older versions say "connect", too.
_CONNECT_PREFIX = "Failed to connect to remote host: "
_OLDER_PREFIX = "connect: "

# What asyncio's gRPC says if a call ended while it was being written to.
_LOST = "Internal error from Core"


class FailedCall(Protocol):
    """What ``grpc.RpcError`` (as raised by a call) and ``grpc.aio.AioRpcError`` have in common."""

    def code(self) -> grpc.StatusCode:
        """The status code."""

    def details(self) -> str | None:
        """The status message."""

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The server's trailing metadata; it contains ``google.rpc.Status``."""


@dataclass(slots=True)
class _Details:
    """``google.rpc`` details of a status, in plain types."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


_Make = Callable[[str, str, _Details], errors.ManyhatsError]


def _plain(kind: type[errors.ManyhatsError]) -> _Make:
    def make(message: str, code: str, details: _Details) -> errors.ManyhatsError:
        return kind(
            message,
            code=code,
            reason=details.reason,
            metadata=details.metadata,
            retry_after_s=details.retry_after_s,
        )

    return make


def _invalid(kind: type[errors.InvalidRequestError]) -> _Make:
    def make(message: str, code: str, details: _Details) -> errors.ManyhatsError:
        return kind(
            message,
            violations=details.violations,
            code=code,
            reason=details.reason,
            metadata=details.metadata,
        )

    return make


# The reason decides; the code only if the reason is missing or unknown to this client.
_BY_REASON: dict[str, _Make] = {
    "FIELD_INVALID": _invalid(errors.InvalidRequestError),
    "PROMPT_TOO_LONG": _invalid(errors.PromptTooLongError),
    "REQUEST_ID_REUSED": _invalid(errors.RequestIdReusedError),
    "TASK_NOT_FOUND": _plain(errors.TaskNotFoundError),
    "ADAPTER_INVALID": _plain(errors.AdapterInvalidError),
    "ADAPTER_UNSUPPORTED": _plain(errors.AdapterUnsupportedError),
    "ADAPTER_UNSAFE": _plain(errors.AdapterUnsafeError),
    "ADAPTER_TOO_LARGE": _plain(errors.AdapterTooLargeError),
    "ADAPTER_NO_EFFECT": _plain(errors.AdapterNoEffectError),
    "ADAPTER_IN_USE": _plain(errors.AdapterInUseError),
    "BASE_MISMATCH": _plain(errors.BaseMismatchError),
    "NO_ACTIVE_VERSION": _plain(errors.NoActiveVersionError),
    "TASK_KIND_MISMATCH": _plain(errors.TaskKindError),
    "SOURCE_NOT_FOUND": _plain(errors.SourceNotFoundError),
    "SOURCE_NOT_ALLOWED": _plain(errors.SourceNotAllowedError),
    "DIGEST_MISMATCH": _plain(errors.DigestMismatchError),
    "QUEUE_FULL": _plain(errors.QueueFullError),
    "LOADING": _plain(errors.UnavailableError),
    "DRAINING": _plain(errors.UnavailableError),
    "NUMERICAL_ERROR": _plain(errors.NumericalError),
}

_BY_CODE: dict[grpc.StatusCode, _Make] = {
    grpc.StatusCode.INVALID_ARGUMENT: _invalid(errors.InvalidRequestError),
    grpc.StatusCode.OUT_OF_RANGE: _invalid(errors.InvalidRequestError),
    grpc.StatusCode.ALREADY_EXISTS: _invalid(errors.RequestIdReusedError),
    grpc.StatusCode.NOT_FOUND: _plain(errors.TaskNotFoundError),
    grpc.StatusCode.FAILED_PRECONDITION: _plain(errors.AdapterError),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _plain(errors.ResourceExhaustedError),
    grpc.StatusCode.UNAVAILABLE: _plain(errors.UnavailableError),
    grpc.StatusCode.DEADLINE_EXCEEDED: _plain(errors.DeadlineError),
    grpc.StatusCode.CANCELLED: _plain(errors.CancelledError),
    grpc.StatusCode.UNAUTHENTICATED: _plain(errors.AuthenticationError),
    grpc.StatusCode.PERMISSION_DENIED: _plain(errors.PermissionDeniedError),
    grpc.StatusCode.UNIMPLEMENTED: _plain(errors.NotOfferedError),
    grpc.StatusCode.DATA_LOSS: _plain(errors.DataLossError),
}


def error_from_call(call: FailedCall, target: str) -> errors.ManyhatsError:
    """The exception for a call that failed; ``target`` is the address it went to."""
    code = call.code()
    details = _read_details(call.trailing_metadata())
    message = call.details() or f"the server answered {code.name} without a message"
    if not details.reason:
        message = _explain(code, message, target)
    make = _BY_REASON.get(details.reason) or _BY_CODE.get(code) or _plain(errors.ServerError)
    return make(message, code.name, details)


def _explain(code: grpc.StatusCode, message: str, target: str) -> str:
    """What gRPC itself says, without a server's reason, reworded for a caller."""
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            said = message.rpartition(_CONNECT_PREFIX)[2].removeprefix(_OLDER_PREFIX)
            return f"cannot reach the server at {target}: {said}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the server at {target} did not finish in the time given: {message}"
        case grpc.StatusCode.INTERNAL if message == _LOST:
            return f"the server at {target} ended the call, and the reason was lost; try again"
        case _:
            return message


def _read_details(trailing_metadata: Iterable[tuple[str, str | bytes]] | None) -> _Details:
    found = _Details()
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            _read_status(value, found)
    return found


def _read_status(serialized: bytes, found: _Details) -> None:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(serialized).details:
        if detail.Unpack(info):
            found.reason = info.reason
            found.metadata.update(info.metadata)
        elif detail.Unpack(bad_request):
            for violation in bad_request.field_violations:
                found.violations.setdefault(violation.field, violation.description)
        elif detail.Unpack(retry):
            found.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
