"""Errors of settings and of access, and the base of all of the server's own.

ServerError
├── ConfigError         an invalid setting; names it
├── UnauthenticatedError
│   ├── CredentialMissingError  the call has no token
│   └── CredentialInvalidError  the call has an unknown token
├── NotAllowedError
│   ├── RoleMissingError        the token is not for this method
│   ├── TaskNotAllowedError     the token does not cover this task
│   └── PriorityNotAllowedError the token does not allow this priority
└── …                   of ports and calls: ``service/errors.py``
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


class UnauthenticatedError(ServerError):
    """The caller is unknown."""


class CredentialMissingError(UnauthenticatedError):
    """The call has no token, or its connection no certificate, but needs one."""

    def __init__(self, needed: str = "a token: send 'authorization: Bearer TOKEN'") -> None:
        super().__init__(f"this server needs {needed}")


class CredentialInvalidError(UnauthenticatedError):
    """The token is not in the token file, or not a bearer token, or one of several."""

    def __init__(self, message: str = "the token is unknown to this server") -> None:
        super().__init__(message)


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


class PriorityNotAllowedError(NotAllowedError):
    """The call asks for a higher priority than its token allows, ``max_priority``."""

    def __init__(self, priority: int, max_priority: int) -> None:
        super().__init__("the call asks for a higher priority than this token allows")
        self.priority = priority
        self.max_priority = max_priority
