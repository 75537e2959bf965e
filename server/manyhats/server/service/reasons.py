"""The one table from domain errors to the API's reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from manyhats.adapters import errors as adapter
from manyhats.engine import errors as engine
from manyhats.server.access import errors as access
from manyhats.server.service import errors as service


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a call ends without its answer.

    Attributes:
        word: the API's name for it, for callers' programs.
        code: the name of the canonical code (``google.rpc.Code``), used in metrics and logs for every transport.
    """

    word: str
    code: str


_INVALID = "INVALID_ARGUMENT"
_UNAVAILABLE = "UNAVAILABLE"
_EXHAUSTED = "RESOURCE_EXHAUSTED"
_PRECONDITION = "FAILED_PRECONDITION"

_INTERNAL = Reason("INTERNAL", "INTERNAL")

# A class also covers its subclasses, unless they have their own row.
REASONS: Mapping[type[Exception], Reason] = MappingProxyType(
    {
        engine.RequestError: Reason("FIELD_INVALID", _INVALID),
        engine.PromptTooLongError: Reason("PROMPT_TOO_LONG", _INVALID),
        engine.QueueFullError: Reason("QUEUE_FULL", _EXHAUSTED),
        engine.AdapterCapacityError: Reason("ADAPTER_CAPACITY", _EXHAUSTED),
        engine.PinLimitError: Reason("QUOTA_EXCEEDED", _EXHAUSTED),
        engine.DrainingError: Reason("DRAINING", _UNAVAILABLE),
        engine.EngineDeadError: Reason("ENGINE_DEAD", _UNAVAILABLE),
        engine.DeadlineExceededError: Reason("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        engine.RequestCancelledError: Reason("CANCELLED", "CANCELLED"),
        engine.NumericalError: Reason("NUMERICAL_ERROR", "INTERNAL"),
        engine.NoMemoryError: Reason("OUT_OF_MEMORY", _EXHAUSTED),
        engine.StreamUnreadError: Reason("STREAM_UNREAD", _EXHAUSTED),
        engine.NoTokenAllowedError: Reason("NO_TOKEN_ALLOWED", _INVALID),
        engine.RequestFailedError: _INTERNAL,
        service.UnexpectedError: _INTERNAL,
        service.LoadingError: Reason("LOADING", _UNAVAILABLE),
        service.TaskKindError: Reason("TASK_KIND_MISMATCH", _PRECONDITION),
        service.BusyError: Reason("QUEUE_FULL", _EXHAUSTED),
        service.RequestTooLargeError: Reason("REQUEST_TOO_LARGE", _INVALID),
        service.UnsupportedMediaTypeError: Reason("UNSUPPORTED_MEDIA_TYPE", _INVALID),
        service.HostNotAllowedError: Reason("HOST_NOT_ALLOWED", "PERMISSION_DENIED"),
        service.UploadStalledError: Reason("UPLOAD_STALLED", "DEADLINE_EXCEEDED"),
        access.CredentialMissingError: Reason("CREDENTIAL_MISSING", "UNAUTHENTICATED"),
        access.CredentialInvalidError: Reason("CREDENTIAL_INVALID", "UNAUTHENTICATED"),
        access.RoleMissingError: Reason("ROLE_MISSING", "PERMISSION_DENIED"),
        access.TaskNotAllowedError: Reason("TASK_NOT_ALLOWED", "PERMISSION_DENIED"),
        access.PriorityNotAllowedError: Reason("PRIORITY_NOT_ALLOWED", "PERMISSION_DENIED"),
        adapter.ArgumentInvalidError: Reason("FIELD_INVALID", _INVALID),
        adapter.TaskNotFoundError: Reason("TASK_NOT_FOUND", "NOT_FOUND"),
        adapter.SourceNotFoundError: Reason("SOURCE_NOT_FOUND", "NOT_FOUND"),
        adapter.NoActiveVersionError: Reason("NO_ACTIVE_VERSION", _PRECONDITION),
        adapter.AdapterInvalidError: Reason("ADAPTER_INVALID", _INVALID),
        adapter.AdapterUnsupportedError: Reason("ADAPTER_UNSUPPORTED", _INVALID),
        adapter.AdapterUnsafeError: Reason("ADAPTER_UNSAFE", _INVALID),
        adapter.AdapterTooLargeError: Reason("ADAPTER_TOO_LARGE", _INVALID),
        adapter.AdapterNoEffectError: Reason("ADAPTER_NO_EFFECT", _INVALID),
        adapter.BaseMismatchError: Reason("BASE_MISMATCH", _PRECONDITION),
        adapter.AdapterInUseError: Reason("ADAPTER_IN_USE", _PRECONDITION),
        adapter.SourceNotAllowedError: Reason("SOURCE_NOT_ALLOWED", "PERMISSION_DENIED"),
        adapter.SourceUnavailableError: Reason("SOURCE_UNAVAILABLE", _UNAVAILABLE),
        adapter.DigestMismatchError: Reason("DIGEST_MISMATCH", _INVALID),
        adapter.RequestIdReusedError: Reason("REQUEST_ID_REUSED", "ALREADY_EXISTS"),
        adapter.DataLossError: Reason("DATA_LOSS", "DATA_LOSS"),
        adapter.StoreConfigError: Reason("STORE_CONFIG_INVALID", _PRECONDITION),
        adapter.StoreFullError: Reason("STORE_FULL", _EXHAUSTED),
        adapter.QuotaExceededError: Reason("QUOTA_EXCEEDED", _EXHAUSTED),
        adapter.StoreUnavailableError: Reason("STORE_UNAVAILABLE", _UNAVAILABLE),
    }
)


def reason_of(error: Exception) -> Reason:
    """Why ``error`` ends its call; ``INTERNAL`` for an unexpected one."""
    found = next((REASONS[kind] for kind in type(error).__mro__ if kind in REASONS), None)
    if found is None and engine.is_out_of_memory(error):
        return REASONS[engine.NoMemoryError]
    return found or _INTERNAL


def is_expected(error: Exception) -> bool:
    """Whether it was raised on purpose, so that its caller may see its message."""
    return any(kind in REASONS for kind in type(error).__mro__)
