"""The one table from domain errors to gRPC statuses, and the rich status that callers see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo  # type: ignore[import-untyped]

from manyhats.adapters import errors as adapter
from manyhats.engine import errors as engine
from manyhats.engine.errors import clipped
from manyhats.server import errors as server
from manyhats.server.observability.task_labels import BASE_LABEL

DOMAIN = "manyhats"
# Statuses travel as HTTP/2 headers, 8 KiB in all. There a message stands twice or three times, and each byte beyond
# ASCII takes three.
_MAX_MESSAGE_BYTES = 1000
_MAX_METADATA_BYTES = 256


@dataclass(frozen=True, slots=True)
class Case:
    """How a kind of error is answered."""

    code: grpc.StatusCode
    reason: str


_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

INTERNAL = Case(grpc.StatusCode.INTERNAL, "INTERNAL")

# A class stands for its subclasses too, unless they have a row of their own.
CASES: Mapping[type[Exception], Case] = MappingProxyType(
    {
        engine.RequestError: Case(_INVALID, "FIELD_INVALID"),
        engine.PromptTooLongError: Case(_INVALID, "PROMPT_TOO_LONG"),
        engine.QueueFullError: Case(_EXHAUSTED, "QUEUE_FULL"),
        engine.AdapterCapacityError: Case(_EXHAUSTED, "ADAPTER_CAPACITY"),
        engine.DrainingError: Case(_UNAVAILABLE, "DRAINING"),
        engine.EngineDeadError: Case(_UNAVAILABLE, "ENGINE_DEAD"),
        engine.DeadlineExceededError: Case(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        engine.RequestCancelledError: Case(grpc.StatusCode.CANCELLED, "CANCELLED"),
        engine.NumericalError: Case(grpc.StatusCode.INTERNAL, "NUMERICAL_ERROR"),
        engine.StreamUnreadError: Case(_EXHAUSTED, "STREAM_UNREAD"),
        engine.NoTokenAllowedError: Case(_INVALID, "NO_TOKEN_ALLOWED"),
        engine.RequestFailedError: Case(grpc.StatusCode.INTERNAL, "INTERNAL"),
        server.LoadingError: Case(_UNAVAILABLE, "LOADING"),
        server.BusyError: Case(_EXHAUSTED, "QUEUE_FULL"),
        server.UploadStalledError: Case(grpc.StatusCode.DEADLINE_EXCEEDED, "UPLOAD_STALLED"),
        server.CredentialMissingError: Case(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_MISSING"),
        server.CredentialInvalidError: Case(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_INVALID"),
        server.RoleMissingError: Case(grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING"),
        server.TaskNotAllowedError: Case(grpc.StatusCode.PERMISSION_DENIED, "TASK_NOT_ALLOWED"),
        adapter.ArgumentInvalidError: Case(_INVALID, "FIELD_INVALID"),
        adapter.TaskNotFoundError: Case(grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"),
        adapter.SourceNotFoundError: Case(grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND"),
        adapter.NoActiveVersionError: Case(_PRECONDITION, "NO_ACTIVE_VERSION"),
        adapter.AdapterInvalidError: Case(_INVALID, "ADAPTER_INVALID"),
        adapter.AdapterUnsupportedError: Case(_INVALID, "ADAPTER_UNSUPPORTED"),
        adapter.AdapterUnsafeError: Case(_INVALID, "ADAPTER_UNSAFE"),
        adapter.AdapterTooLargeError: Case(_INVALID, "ADAPTER_TOO_LARGE"),
        adapter.AdapterNoEffectError: Case(_INVALID, "ADAPTER_NO_EFFECT"),
        adapter.BaseMismatchError: Case(_PRECONDITION, "BASE_MISMATCH"),
        adapter.AdapterInUseError: Case(_PRECONDITION, "ADAPTER_IN_USE"),
        adapter.SourceNotAllowedError: Case(grpc.StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED"),
        adapter.SourceUnavailableError: Case(_UNAVAILABLE, "SOURCE_UNAVAILABLE"),
        adapter.DigestMismatchError: Case(_INVALID, "DIGEST_MISMATCH"),
        adapter.RequestIdReusedError: Case(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
        adapter.DataLossError: Case(grpc.StatusCode.DATA_LOSS, "DATA_LOSS"),
        adapter.StoreConfigError: Case(_PRECONDITION, "STORE_CONFIG_INVALID"),
        adapter.StoreFullError: Case(_EXHAUSTED, "STORE_FULL"),
        adapter.QuotaExceededError: Case(_EXHAUSTED, "QUOTA_EXCEEDED"),
        adapter.StoreUnavailableError: Case(_UNAVAILABLE, "STORE_UNAVAILABLE"),
    }
)


def case_of(error: Exception) -> Case:
    """The row for ``error``; ``INTERNAL`` for one that nobody raised on purpose."""
    for kind in type(error).__mro__:
        if kind in CASES:
            return CASES[kind]
    return INTERNAL


def status_of(error: Exception, *, error_id: str) -> status_pb2.Status:
    """What the caller sees of ``error``.

    An unexpected error shows nothing of itself but ``error_id``, under which the log has it. Texts are cut, and what is
    no character is replaced, so that no error's text can keep its status from the caller.
    """
    case = case_of(error)
    if case is INTERNAL:
        message, metadata = f"internal error {error_id}", {"error_id": error_id}
    else:
        message = clipped(str(error), _MAX_MESSAGE_BYTES)
        metadata = {key: clipped(value, _MAX_METADATA_BYTES) for key, value in _metadata(error).items()}
    info = ErrorInfo(reason=case.reason, domain=DOMAIN, metadata=metadata)
    code: int = case.code.value[0]
    details = [_packed(detail) for detail in (info, *_details(error))]
    return status_pb2.Status(code=code, message=message, details=details)


def _metadata(error: Exception) -> dict[str, str]:
    match error:
        case engine.PromptTooLongError():
            return {"field": error.field, "num_tokens": str(error.num_tokens), "limit": str(error.limit)}
        case engine.RequestError():
            return {"field": error.field}
        case engine.QueueFullError() | engine.AdapterCapacityError() | server.BusyError():
            return {"limit": str(error.limit)}
        case engine.StreamUnreadError():
            return {"limit_s": f"{error.limit_s:g}"}
        case engine.RequestFailedError():
            return {"error_id": error.error_id}
        case adapter.ArgumentInvalidError():
            return {"field": error.subject}
        case adapter.AdapterError():
            return {"subject": error.subject}
        case server.UploadStalledError():
            return {"limit_s": f"{error.limit_s:g}"}
        case server.RoleMissingError():
            return {"method": error.method, "roles": ",".join(error.roles)}
        case server.TaskNotAllowedError():
            return {"task": error.task or BASE_LABEL}
    return {}


def _details(error: Exception) -> tuple[Message, ...]:
    match error:
        case engine.RequestError():
            return (_bad_request(error.field, error.description),)
        case adapter.ArgumentInvalidError():
            return (_bad_request(error.subject, error.description),)
        case engine.QueueFullError() | engine.AdapterCapacityError() | server.BusyError():
            return (_retry_info(error.retry_after_s),)
        case adapter.QuotaExceededError(retry_after_s=float(seconds)):
            return (_retry_info(seconds),)
    return ()


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
