"""The server's own errors.

ServerError ├── ConfigError         an invalid setting; names it ├── AddressError        a port that cannot be bound ├──
LoadingError        the model is not loaded yet ├── BusyError           try again later │   ├── TooManyCallsError
the limit of running calls is reached │   └── UnreadAnswersError      large answers wait for their callers ├──
UnexpectedError     a bug; the log has it ├── UploadStalledError  a caller began an upload and stopped sending ├──
UnauthenticatedError │   ├── CredentialMissingError  the call has no token │   └── CredentialInvalidError  the call has
an unknown token └── NotAllowedError
    ├── RoleMissingError        the token is not for this method └── TaskNotAllowedError     the token does not cover
    this task
"""

from __future__ import annotations

from collections.abc import Sequence


class ServerError(Exception):
    """Any error the server raises on purpose."""


class ConfigError(ServerError):
    """A setting is wrong; ``setting`` is its name as in ``ServeConfig``."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class AddressError(ServerError):
    """A port cannot be bound, most often because another process has it."""

    def __init__(self, purpose: str, address: str) -> None:
        super().__init__(
            f"cannot listen for {purpose} on {address}: is the port taken, or the host not this machine's?"
        )
        self.address = address


class LoadingError(ServerError):
    """The model is being loaded; try again soon."""

    def __init__(self) -> None:
        super().__init__("the model is being loaded")


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


class UnauthenticatedError(ServerError):
    """The caller is unknown."""


class CredentialMissingError(UnauthenticatedError):
    """The call has no token, but needs one."""

    def __init__(self) -> None:
        super().__init__("this server needs a token: send the metadata 'authorization: Bearer TOKEN'")


class CredentialInvalidError(UnauthenticatedError):
    """The token is not in the token file, or not a bearer token."""

    def __init__(self) -> None:
        super().__init__("the token is unknown to this server")


class NotAllowedError(ServerError):
    """The caller is known, and its token does not allow the call."""


class RoleMissingError(NotAllowedError):
    """The token has none of the roles that ``method`` needs; ``roles`` names them."""

    def __init__(self, method: str, roles: Sequence[str]) -> None:
        needed = f"needs the role {' or '.join(roles)}" if roles else "is closed to everyone"
        super().__init__(f"{method} {needed}, which this token does not have")
        self.method = method
        self.roles = tuple(roles)


class TaskNotAllowedError(NotAllowedError):
    """The token does not cover a task, whether or not it exists; ``task`` is "" for the base model."""

    def __init__(self, task: str) -> None:
        super().__init__(f"this token is not for {f'the task {task}' if task else 'the base model'}")
        self.task = task
