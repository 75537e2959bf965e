"""The client's errors.

ManyhatsError
├── InvalidRequestError             a field of the request is wrong; names it
│   ├── PromptTooLongError          prompt and adapter prefix leave no room for an answer
│   └── RequestIdReusedError        the same request_id was used with another body
├── TaskNotFoundError               no such task, or no such version of it
├── AdapterError                    this adapter cannot be registered, served or deleted, and why
│   ├── AdapterInvalidError         malformed files
│   ├── AdapterUnsupportedError     well formed, but not a kind that is served
│   ├── AdapterUnsafeError          holds what could run code, such as a pickle
│   ├── AdapterTooLargeError        over a limit of size, rank or number of tensors
│   ├── AdapterNoEffectError        changes nothing
│   ├── AdapterInUseError           requests run on it; delete with ``force``
│   ├── BaseMismatchError           made for another base model
│   ├── NoActiveVersionError        the task exists, but none of its versions is active
│   ├── TaskKindError               the task does something else than what is asked of it
│   ├── SourceNotFoundError         nothing at the uri
│   ├── SourceNotAllowedError       the uri is outside the server's allowed roots
│   └── DigestMismatchError         the files are not those that were expected
├── ResourceExhaustedError          a quota or a disk is full
│   └── QueueFullError              too many requests are waiting; says when to try again
├── UnavailableError                not reachable, still loading, or draining; try again later
├── DeadlineError                   the time given ran out
├── CancelledError                  the call was cancelled
├── CredentialsError                the client's own credentials cannot be used as they are
├── AuthenticationError             no credential, or a bad one
├── PermissionDeniedError           the credential does not allow this
├── NotOfferedError                 that part of the API is not served here
└── ServerError                     the server's fault
    ├── NumericalError              the model gave non-finite numbers for this request
    └── DataLossError               stored bytes are damaged
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_NO_METADATA: Mapping[str, str] = MappingProxyType({})


class ManyhatsError(Exception):
    """Any error the client raises on purpose.

    Attributes:
        message: one sentence, fit to be shown.
        code: the gRPC status code's name such as ``NOT_FOUND``; empty if the server was never asked.
        reason: the server's reason such as ``TASK_NOT_FOUND``; may be empty.
        metadata: what the server adds to the reason, such as the limit or the tensor at fault.
        retry_after_s: when the server suggests trying again, in seconds; None if it does not.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        metadata: Mapping[str, str] = _NO_METADATA,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata)
        self.retry_after_s = retry_after_s


class InvalidRequestError(ManyhatsError):
    """A request that can never succeed.

    Attributes:
        field: the first field at fault, such as ``sampling.top_p``; empty if the server named none.
        violations: every field at fault → what is wrong with it.
    """

    def __init__(
        self,
        message: str,
        *,
        violations: Mapping[str, str] = _NO_METADATA,
        code: str = "",
        reason: str = "",
        metadata: Mapping[str, str] = _NO_METADATA,
    ) -> None:
        super().__init__(message, code=code, reason=reason, metadata=metadata)
        self.violations = dict(violations)
        self.field = next(iter(self.violations), "") or self.metadata.get("field", "")


class PromptTooLongError(InvalidRequestError):
    """Prompt and adapter prefix leave no room for one output token."""


class RequestIdReusedError(InvalidRequestError):
    """The same ``request_id`` was used before, with another body."""


class TaskNotFoundError(ManyhatsError):
    """No such task, or no such version of it."""


class AdapterError(ManyhatsError):
    """An adapter cannot be registered, served or deleted; the message says why."""

    @property
    def subject(self) -> str:
        """The file, tensor, key or limit at fault; empty if the server named none."""
        return self.metadata.get("subject", "")


class AdapterInvalidError(AdapterError):
    """The adapter's files are malformed."""


class AdapterUnsupportedError(AdapterError):
    """The adapter is well formed, but of a kind this server does not serve."""


class AdapterUnsafeError(AdapterError):
    """The adapter contains something that could run code when loaded, such as a pickle."""


class AdapterTooLargeError(AdapterError):
    """The adapter is over a limit of size, rank or number of tensors."""


class AdapterNoEffectError(AdapterError):
    """The adapter changes nothing in what the base model computes."""


class AdapterInUseError(AdapterError):
    """Requests are running on this version; delete it with ``force``, or later."""


class BaseMismatchError(AdapterError):
    """The adapter was made for another base model."""


class NoActiveVersionError(AdapterError):
    """The task exists, but none of its versions is active; name one as ``task@version``."""


class TaskKindError(AdapterError):
    """The task does something else than what is asked of it: it reads texts, say, and does not generate."""


class SourceNotFoundError(AdapterError):
    """There is nothing at the uri."""


class SourceNotAllowedError(AdapterError):
    """The uri is outside the roots the server may read adapters from."""


class DigestMismatchError(AdapterError):
    """The files are not those that ``expected_digest`` names."""


class ResourceExhaustedError(ManyhatsError):
    """A quota or a disk is full."""


class QueueFullError(ResourceExhaustedError):
    """Too many requests are waiting; try again after ``retry_after_s``."""


class UnavailableError(ManyhatsError):
    """The server is not reachable, still loading, or draining; try again later."""


class DeadlineError(ManyhatsError):
    """The time given to the call ran out before it finished."""


class CancelledError(ManyhatsError):
    """The call was cancelled, by the server or by another thread; closing a stream raises nothing."""


class CredentialsError(ManyhatsError):
    """The client's own credentials cannot be used: a bad file, or a token that would be sent unencrypted."""


class AuthenticationError(ManyhatsError):
    """The server requires a credential and got none, or a bad one."""


class PermissionDeniedError(ManyhatsError):
    """The credential does not allow this."""


class NotOfferedError(ManyhatsError):
    """That part of the API is not served here."""


class ServerError(ManyhatsError):
    """The server failed; the request may be fine."""


class NumericalError(ServerError):
    """The model gave non-finite numbers for this request."""


class DataLossError(ServerError):
    """Stored bytes do not match their digest."""
