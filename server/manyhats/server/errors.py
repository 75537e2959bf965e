"""The server's own errors.

ServerError
├── ConfigError         a setting that cannot be served with; names it
├── AddressError        a port that cannot be bound
├── LoadingError        the model is not loaded yet
├── BusyError           try again later
│   ├── TooManyCallsError       as many calls run as may
│   └── UnreadAnswersError      large answers wait for their callers
├── UnexpectedError     a bug; the log has it
├── UploadStalledError  a caller began an upload and sends no more
├── UnauthenticatedError
│   ├── CredentialMissingError  the call shows no token
│   └── CredentialInvalidError  the call shows a token that is not known
└── NotAllowedError
    ├── RoleMissingError        the token is not for this method
    └── TaskNotAllowedError     the token does not reach this task
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
    """As much is under way as may be, by some ``limit``; ``retry_after_s`` is a hint."""

    def __init__(self, message: str, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{message}; try again soon")
        self.limit = limit
        self.retry_after_s = retry_after_s


class TooManyCallsError(BusyError):
    """As many calls run as may; ``limit`` is their number."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{limit} calls are being answered, which is the limit", limit, retry_after_s)


class UnreadAnswersError(BusyError):
    """Another large answer has no room beside those that their callers have not read; ``limit`` is in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"answers wait to be read by their callers, and {limit} bytes of them is the limit", limit, 1.0
        )


class UnexpectedError(ServerError):
    """Something that nobody raised on purpose ended a call; the log has it under ``error_id``."""

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}")
        self.error_id = error_id


class UploadStalledError(ServerError):
    """A caller began an upload, and nothing came for ``limit_s`` seconds."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"nothing came for {limit_s:g} s; the upload was given up")
        self.limit_s = limit_s


class UnauthenticatedError(ServerError):
    """Who makes a call is not known."""


class CredentialMissingError(UnauthenticatedError):
    """A call without a token, where one is needed."""

    def __init__(self) -> None:
        super().__init__("this server needs a token: send the metadata 'authorization: Bearer TOKEN'")


class CredentialInvalidError(UnauthenticatedError):
    """A token that is not in the token file, or no bearer token at all."""

    def __init__(self) -> None:
        super().__init__("the token is not one that this server knows")


class NotAllowedError(ServerError):
    """It is known who makes a call, and that its token does not allow it."""


class RoleMissingError(NotAllowedError):
    """The token has none of the roles that ``method`` needs; ``roles`` names them."""

    def __init__(self, method: str, roles: Sequence[str]) -> None:
        needed = f"needs the role {' or '.join(roles)}" if roles else "is for nobody"
        super().__init__(f"{method} {needed}, which this token does not have")
        self.method = method
        self.roles = tuple(roles)


class TaskNotAllowedError(NotAllowedError):
    """The token does not reach a task, whether or not it exists; ``task`` is "" for the base model."""

    def __init__(self, task: str) -> None:
        super().__init__(f"this token is not for {f'the task {task}' if task else 'the base model'}")
        self.task = task
