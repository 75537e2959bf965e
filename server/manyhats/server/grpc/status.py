"""Errors as the rich statuses that callers of the gRPC port see."""

from __future__ import annotations

import math

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo  # type: ignore[import-untyped]

from manyhats.adapters import errors as adapter
from manyhats.engine import errors as engine
from manyhats.engine.errors import clipped
from manyhats.server.access import errors as access
from manyhats.server.observability.task_labels import BASE_LABEL
from manyhats.server.service import errors as service
from manyhats.server.service.reasons import Reason, is_expected, reason_of

DOMAIN = "manyhats"
# Statuses are sent as HTTP/2 headers, 8 KiB in total, in which a message appears two or three times, and each non-ASCII
# byte takes three.
_MAX_MESSAGE_BYTES = 1000
_MAX_METADATA_BYTES = 256
# Of what is unavailable: nobody knows for how long.
_RETRY_S = 1.0
# Known to gRPC's clients, which do not read ``RetryInfo``.
_PUSHBACK = "grpc-retry-pushback-ms"


def grpc_code(reason: Reason) -> grpc.StatusCode:
    """The status code of a reason."""
    return grpc.StatusCode[reason.code]


def status_of(error: Exception) -> status_pb2.Status:
    """What the caller sees of ``error``; for an unexpected one, only that there was one.

    Texts are truncated, and invalid characters replaced, so that no error's text can keep its status from the caller.
    """
    reason, text = reason_of(error), str(error) if is_expected(error) else "internal error"
    metadata = {key: clipped(value, _MAX_METADATA_BYTES) for key, value in _metadata(error).items()}
    info = ErrorInfo(reason=reason.word, domain=DOMAIN, metadata=metadata)
    code: int = grpc_code(reason).value[0]
    details = [_packed(detail) for detail in (info, *_details(error))]
    return status_pb2.Status(code=code, message=clipped(text, _MAX_MESSAGE_BYTES), details=details)


def _metadata(error: Exception) -> dict[str, str]:
    match error:
        case engine.PromptTooLongError():
            return {"field": error.field, "num_tokens": str(error.num_tokens), "limit": str(error.limit)}
        case engine.RequestError():
            return {"field": error.field}
        case (
            engine.PinLimitError()
            | engine.QueueFullError()
            | engine.AdapterCapacityError()
            | service.BusyError()
        ):
            return {"limit": str(error.limit)}
        case service.TaskKindError():
            return {"kind": error.kind.value}
        case engine.StreamUnreadError():
            return {"limit_s": f"{error.limit_s:g}"}
        case engine.RequestFailedError() | service.UnexpectedError():
            return {"error_id": error.error_id}
        case adapter.ArgumentInvalidError():
            return {"field": error.subject}
        case adapter.AdapterError():
            return {"subject": error.subject}
        case service.UploadStalledError():
            return {"limit_s": f"{error.limit_s:g}"}
        case access.RoleMissingError():
            return {"method": error.method, "roles": ",".join(error.roles)}
        case access.TaskNotAllowedError():
            return {"task": error.task or BASE_LABEL}
        case access.PriorityNotAllowedError():
            return {"max_priority": str(error.max_priority)}
    return {}


def _details(error: Exception) -> tuple[Message, ...]:
    match error:
        case engine.RequestError():
            return (_bad_request(error.field, error.description),)
        case adapter.ArgumentInvalidError():
            return (_bad_request(error.subject, error.description),)
    seconds = _retry_s(error)
    return () if seconds is None else (_retry_info(seconds),)


def retry_metadata(error: Exception, left_s: float | None) -> tuple[tuple[str, str], ...]:
    """Trailing metadata beside the status: when gRPC's clients are to try again by themselves, in milliseconds.

    −1 says never: waiting would not help, or would last longer than the ``left_s`` of the call's deadline.
    """
    seconds = _retry_s(error)
    if seconds is None:
        return ((_PUSHBACK, "-1"),) if reason_of(error).code == "RESOURCE_EXHAUSTED" else ()
    is_late = left_s is not None and seconds >= left_s
    return ((_PUSHBACK, "-1" if is_late else str(math.ceil(seconds * 1000))),)


def _retry_s(error: Exception) -> float | None:
    """When the same call may succeed; None if waiting does not help."""
    match error:
        case (
            engine.QueueFullError()
            | engine.AdapterCapacityError()
            | engine.NoMemoryError()
            | service.BusyError()
            | adapter.QuotaExceededError()
        ):
            return error.retry_after_s
    return _RETRY_S if reason_of(error).code == "UNAVAILABLE" else None


def _retry_info(seconds: float) -> RetryInfo:
    delay = Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return RetryInfo(retry_delay=delay)


def _bad_request(field: str, description: str) -> BadRequest:
    violation = BadRequest.FieldViolation(
        field=clipped(field, _MAX_METADATA_BYTES), description=clipped(description, _MAX_MESSAGE_BYTES)
    )
    return BadRequest(field_violations=[violation])


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
